"""The split holds for timm's families, a small model of each, at every group boundary, in eval and in train mode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ray_jobs import backbone
from ray_jobs.cuts import Cuts
from ray_jobs.groups import num_groups, set_mode, trainable_names

pytestmark = pytest.mark.slow
FAMILIES = {
    "beit": ("beit_base_patch16_224", 32),
    "byoanet": ("halonet26t", 256),
    "byobnet": ("test_byobnet", 64),
    "cait": ("cait_xxs24_224", 32),
    "coat": ("coat_tiny", 64),
    "convit": ("convit_tiny", 32),
    "convmixer": ("convmixer_768_32", 32),
    "convnext": ("test_convnext", 64),
    "crossvit": ("crossvit_9_240", 240),
    "cspnet": ("cs3darknet_focus_s", 64),
    "davit": ("davit_tiny", 64),
    "deit": ("deit_tiny_distilled_patch16_224", 32),
    "densenet": ("densenet121", 64),
    "dla": ("dla46_c", 64),
    "dpn": ("dpn48b", 64),
    "edgenext": ("edgenext_xx_small", 64),
    "efficientformer": ("efficientformer_l1", 224),
    "efficientformer_v2": ("efficientformerv2_s0", 224),
    "efficientnet": ("test_efficientnet", 64),
    "efficientvit_mit": ("efficientvit_b0", 64),
    "efficientvit_msra": ("efficientvit_m0", 224),
    "eva": ("eva02_tiny_patch14_224", 56),
    "fasternet": ("fasternet_t0", 64),
    "fastvit": ("fastvit_t8", 64),
    "focalnet": ("focalnet_tiny_srf", 64),
    "gcvit": ("gcvit_xxtiny", 224),
    "ghostnet": ("ghostnet_050", 64),
    "hgnet": ("hgnetv2_b0", 64),
    "hiera": ("hiera_tiny_224", 224),
    "hrnet": ("hrnet_w18_small", 64),
    "inception_next": ("inception_next_atto", 64),
    "inception_v3": ("inception_v3", 96),
    "levit": ("levit_128s", 224),
    "mambaout": ("test_mambaout", 64),
    "maxxvit": ("coatnet_pico_rw_224", 224),
    "metaformer": ("poolformerv2_s12", 64),
    "mlp_mixer": ("mixer_s32_224", 64),
    "mobilenetv3": ("mobilenetv3_small_050", 64),
    "mobilevit": ("mobilevit_xxs", 64),
    "mobilevitv2": ("mobilevitv2_050", 64),
    "mvitv2": ("mvitv2_tiny", 64),
    "nest": ("nest_tiny", 224),
    "nextvit": ("nextvit_small", 64),
    "nfnet": ("test_nfnet", 64),
    "pit": ("pit_ti_224", 224),
    "pvt_v2": ("pvt_v2_b0", 64),
    "rdnet": ("rdnet_tiny", 64),
    "regnet": ("regnetx_002", 64),
    "repghost": ("repghostnet_050", 64),
    "repvit": ("repvit_m0_9", 64),
    "resnet": ("resnet10t", 64),
    "resnetv2": ("resnetv2_50", 64),
    "rexnet": ("rexnet_100", 64),
    "senet": ("legacy_seresnet18", 64),
    "sequencer": ("sequencer2d_s", 224),
    "sknet": ("skresnet18", 64),
    "starnet": ("starnet_s1", 64),
    "swiftformer": ("swiftformer_xs", 224),
    "swin": ("swin_tiny_patch4_window7_224", 64),
    "swin_v2": ("swinv2_tiny_window8_256", 64),
    "tiny_vit": ("tiny_vit_5m_224", 64),
    "tnt": ("tnt_s_legacy_patch16_224", 32),
    "twins": ("twins_svt_small", 224),
    "visformer": ("visformer_tiny", 224),
    "vit": ("test_vit4", 64),
    "vit_hybrid": ("vit_tiny_r_s16_p8_224", 64),
    "volo": ("volo_d1_224", 224),
    "xception": ("legacy_xception", 96),
    "xcit": ("xcit_nano_12_p16_224", 64),
}


# one for each way in which a split can go wrong; the rest runs with `pytest -m exhaustive`
EVERY_TIME = {
    "cait",
    "convnext",
    "deit",
    "densenet",
    "efficientnet",
    "hiera",
    "mlp_mixer",
    "mobilevit",
    "pit",
    "regnet",
    "resnet",
    "swin",
    "vit",
}


@pytest.mark.parametrize("family", [pytest.param(name, marks=() if name in EVERY_TIME else pytest.mark.exhaustive) for name in FAMILIES])
@pytest.mark.filterwarnings("ignore")  # old families use old torch calls
def test_prefix_then_suffix_is_the_model_in_both_modes(family: str) -> None:
    torch.set_num_threads(1)
    name, size = FAMILIES[family]
    model = backbone.create(name, image_size=size, num_classes=5, seed=0)
    shake(model)
    measure_norms(model, images(4, size))
    groups = num_groups(model)
    cuts = Cuts(model, range(groups + 1), size)
    for batch in (2, 3):
        images_BCHW = images(batch, size)
        with torch.no_grad():
            expected_NK = model(images_BCHW)
            values_by_depth = cuts.prefix(images_BCHW)
            for depth in range(groups + 1):
                assert all(len(value) == batch for value in values_by_depth[depth])
                assert torch.equal(cuts.suffix(depth)(*values_by_depth[depth]), expected_NK), depth
                if batch == 3:  # from a cache the values come contiguous, whatever they were
                    cached = [value.clone(memory_format=torch.contiguous_format) for value in values_by_depth[depth]]
                    scale = expected_NK.abs().max().item()
                    torch.testing.assert_close(cuts.suffix(depth)(*cached), expected_NK, rtol=1e-3, atol=1e-3 * scale)
    assert expected_NK.std(0).max() > 1e-6, "the model does not look at its input: the test shows nothing"
    gradients_reach_what_trains(cuts, groups // 2 + 1, images(3, size))
    trains_like_the_model(cuts, images(3, size))


def shake(model: nn.Module) -> None:
    """Zero-initialised gammas hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not name.endswith("running_var"):
                tensor.add_(torch.randn(tensor.shape, generator=generator) * (0.1 if tensor.ndim <= 1 else 0.02))


def measure_norms(model: nn.Module, images_BCHW: Tensor) -> None:
    """Statistics of real activations: with those of an untrained norm the input's trace dies out in deep networks."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    if norms:
        with torch.no_grad():
            model.train()(images_BCHW)
    model.eval()


def images(batch: int, size: int) -> Tensor:
    return torch.randn((batch, 3, size, size), generator=torch.Generator().manual_seed(2))


def gradients_reach_what_trains(cuts: Cuts, depth: int, images_BCHW: Tensor) -> None:
    suffix = cuts.suffix(depth).train()
    with torch.no_grad():
        values = cuts.prefix(images_BCHW)[depth]
    suffix(*[value.clone() for value in values]).square().sum().backward()
    reached = {name for name, parameter in cuts.model.named_parameters() if parameter.grad is not None}
    assert reached == trainable_names(cuts.model, depth) == {name for name, _ in suffix.named_parameters()}


def trains_like_the_model(cuts: Cuts, images_BCHW: Tensor) -> None:
    """Drop path and dropout draw the same numbers: nothing random was baked in or left out."""
    suffix = cuts.suffix(cuts.num_groups).train()
    torch.manual_seed(3)
    split_NK = suffix(images_BCHW)
    set_mode(cuts.model, cuts.num_groups, training=True)
    torch.manual_seed(3)
    torch.testing.assert_close(split_NK, cuts.model(images_BCHW), rtol=1e-4, atol=1e-4)
