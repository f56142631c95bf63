"""The laws of the split: prefix then suffix is the model, at every depth, in both modes, before and after training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from infra.errors import UserError
from ray_jobs.cuts import Cuts
from ray_jobs.groups import freeze, init_head, num_groups, set_mode, trainable_names

SIZE = 32
NAMES = ["tf_efficientnet_lite0", "resnet18", "vit_tiny_patch16_224", "convnext_atto"]
SMALL = ["tf_efficientnet_lite0", "resnet10t", "vit_tiny_patch16_224", "convnext_atto"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def backbone(name: str, **options: Any) -> nn.Module:
    """A random model in which nothing hides: zero-initialised gammas and heads would make any mistake invisible."""
    if name.startswith("vit"):
        options["img_size"] = SIZE
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=5, **options)
    shake(model)
    return model.eval()


def shake(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not name.endswith("running_var"):
                tensor.add_(torch.randn(tensor.shape, generator=generator) * (0.3 if tensor.ndim <= 1 else 0.02))


def images(batch: int, seed: int = 2, size: int = SIZE) -> Tensor:
    return torch.randn((batch, 3, size, size), generator=torch.Generator().manual_seed(seed))


def through(cuts: Cuts, depth: int, images_BCHW: Tensor) -> Tensor:
    with torch.no_grad():
        values = cuts.prefix(images_BCHW)[depth]
    logits_NK: Tensor = cuts.suffix(depth)(*values)
    return logits_NK


@pytest.mark.parametrize("name", NAMES)
def test_prefix_then_suffix_is_the_model_at_every_depth_and_batch_size(name: str) -> None:
    model = backbone(name)
    cuts = Cuts(model, range(num_groups(model) + 1), SIZE)
    for batch in (1, 3):
        with torch.no_grad():
            expected_NK = model(images(batch))
            values_by_depth = cuts.prefix(images(batch))
            for depth in cuts.depths:
                values = values_by_depth[depth]
                assert [(v.shape[0], v.shape[1:]) for v in values] == [(batch, torch.Size(v.shape)) for v in cuts.values(depth)]
                assert torch.equal(cuts.suffix(depth)(*values), expected_NK), depth
    assert expected_NK.std() > 0


@pytest.mark.parametrize("name", SMALL)
def test_a_training_step_moves_exactly_what_trains_at_that_depth(name: str) -> None:
    model = backbone(name)
    groups = num_groups(model)
    cuts = Cuts(model, [0, groups // 2, groups], SIZE)
    for depth in cuts.depths:
        suffix = cuts.suffix(depth).train()
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        assert {key for key, _ in suffix.named_parameters()} == trainable_names(model, depth)
        train_one_step(suffix, list(suffix.parameters()), cuts.prefix(images(4))[depth])
        assert {key for key, parameter in model.named_parameters() if parameter.grad is not None} == trainable_names(model, depth)
        moved = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
        assert moved == trainable_names(model, depth) | trainable_statistics(model, depth)
        suffix.eval()
        with torch.no_grad():
            assert torch.equal(through(cuts, depth, images(3)), model.eval()(images(3)))


def trainable_statistics(model: nn.Module, depth: int) -> set[str]:
    names = trainable_names(model, depth)
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    owners = {name for name in norms if f"{name}.weight" in names}
    return {name for name, _ in model.named_buffers() if name.rpartition(".")[0] in owners}


def train_one_step(module: nn.Module, parameters: list[nn.Parameter], values: tuple[Tensor, ...]) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    optimizer.zero_grad()
    nn.functional.cross_entropy(module(*[value.detach() for value in values]), torch.arange(len(values[0])) % 5).backward()
    optimizer.step()


@pytest.mark.parametrize(("name", "depth"), [("tf_efficientnet_lite0", 2), ("resnet10t", 1), ("vit_tiny_patch16_224", 3)])
def test_training_on_cached_values_equals_training_the_whole_model_with_its_front_frozen(name: str, depth: int) -> None:
    whole, split = backbone(name, drop_path_rate=0.2), backbone(name, drop_path_rate=0.2)
    cuts = Cuts(split, [depth], SIZE)
    with torch.no_grad():
        values = [value.clone() for value in cuts.prefix(images(4))[depth]]
    freeze(whole, depth)
    set_mode(whole, depth, training=True)
    suffix = cuts.suffix(depth).train()
    assert frozen_drop_paths(whole)
    assert not any(module.training for module in frozen_drop_paths(whole))
    for step in range(2):
        torch.manual_seed(step)
        train_one_step(whole, [p for p in whole.parameters() if p.requires_grad], (images(4),))
        torch.manual_seed(step)
        train_one_step(suffix, list(suffix.parameters()), tuple(values))
    for key, tensor in whole.state_dict().items():
        torch.testing.assert_close(split.state_dict()[key], tensor, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize(("name", "depth", "source"), [
    ("tf_efficientnet_lite0", 1, 3), ("tf_efficientnet_lite0", 0, 8), ("resnet10t", 1, 2), ("vit_tiny_patch16_224", 2, 5),
    ("convnext_atto", 0, 2),
])  # fmt: skip
def test_a_suffix_from_a_farther_cut_trains_the_same_and_leaves_what_lies_between_alone(name: str, depth: int, source: int) -> None:
    model = backbone(name, drop_path_rate=0.2)
    cuts = Cuts(model, [depth, source], SIZE)
    with torch.no_grad():
        values = {key: tuple(value.clone() for value in found) for key, found in cuts.prefix(images(4)).items()}
    start = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    results = []
    for origin in (depth, source):
        model.load_state_dict(start)
        suffix = cuts.suffix(depth, origin).train()
        torch.manual_seed(5)
        logits_NK = suffix(*values[origin])
        nn.functional.cross_entropy(logits_NK, torch.arange(4) % 5).backward()
        gradients = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
        model.zero_grad()
        results.append((logits_NK, gradients, {key: tensor.clone() for key, tensor in model.state_dict().items()}))
    (near, near_gradients, near_state), (far, far_gradients, far_state) = results
    torch.testing.assert_close(far, near, rtol=0, atol=0)
    assert near_gradients.keys() == far_gradients.keys() == trainable_names(model, depth)
    for key, gradient in near_gradients.items():
        torch.testing.assert_close(far_gradients[key], gradient, rtol=0, atol=0, msg=key)
    for key, tensor in near_state.items():
        assert torch.equal(far_state[key], tensor), key
    moved = {key for key, tensor in far_state.items() if not torch.equal(tensor, start[key])}
    assert moved == trainable_statistics(model, depth)


def frozen_drop_paths(model: nn.Module) -> list[nn.Module]:
    around = {name: model.get_submodule(name.rpartition(".")[0]) for name, module in model.named_modules() if isinstance(module, DropPath)}
    return [model.get_submodule(name) for name, block in around.items() if not any(p.requires_grad for p in block.parameters())]


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto"])
def test_dropout_and_drop_path_live_in_train_mode_and_are_dead_in_eval_mode(name: str) -> None:
    model = backbone(name, drop_path_rate=0.5, drop_rate=0.5)
    groups = num_groups(model)
    cuts = Cuts(model, [0, 1, groups], SIZE)
    for depth in cuts.depths:
        suffix = cuts.suffix(depth)
        with torch.no_grad():
            values = cuts.prefix(images(4))[depth]
            assert torch.equal(suffix.eval()(*values), model.eval()(images(4)))
            set_mode(model, groups, training=False)
            suffix.train()
            assert not torch.equal(seeded(suffix, 1, *values), seeded(suffix, 2, *values)), depth
            if depth == groups:
                drawn = seeded(suffix, 3, *values)
                assert torch.equal(seeded(model.train(), 3, images(4)), drawn)
        suffix.eval()
        assert torch.equal(suffix(*values), suffix(*values))


def seeded(module: nn.Module, seed: int, *values: Tensor) -> Tensor:
    torch.manual_seed(seed)
    logits_NK: Tensor = module(*values)
    return logits_NK


def test_nothing_beyond_the_deepest_needed_cut_is_computed_and_nothing_twice() -> None:
    model = backbone("tf_efficientnet_lite0")
    calls: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    cuts = Cuts(model, [4, 6], SIZE)
    calls.clear()
    cuts.prefix(images(2))
    frozen = {name.rpartition(".")[0] for name, _ in model.named_parameters() if name not in trainable_names(model, 4)}
    assert sorted(calls) == sorted(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d) and name in frozen)


def test_the_input_is_what_crosses_at_full_depth() -> None:
    model = backbone("resnet18")
    cuts = Cuts(model, [num_groups(model)], SIZE)
    pictures = images(2)
    (value,) = cuts.prefix(pictures)[cuts.num_groups]
    assert value is pictures


def test_the_prefix_stays_in_eval_mode() -> None:
    model = backbone("resnet18")
    cuts = Cuts(model, [1], SIZE)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    cuts.prefix.train()
    cuts.prefix(images(4))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_reset_puts_everything_back_and_draws_the_same_new_classifier_for_the_same_seed() -> None:
    model = backbone("tf_efficientnet_lite0")
    init_head(model, 7)
    expected = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    cuts = Cuts(model, [1, 8], SIZE)
    for depth in (8, 1):
        suffix = cuts.suffix(depth).train()
        train_one_step(suffix, list(suffix.parameters()), cuts.prefix(images(4))[depth])
    cuts.reset(7)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())
    cuts.reset(8)
    assert [key for key, tensor in model.state_dict().items() if not torch.equal(tensor, expected[key])] == ["classifier.weight"]


class Toy(nn.Module):
    """Three groups and a classifier around one function, which makes the values that cross."""

    def __init__(self, middle: Callable[[Toy, Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 8, stride=8)
        self.second = nn.Linear(8, 8)
        self.third = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)
        self.bias = nn.Parameter(torch.randn(1, 4, 8))
        self.middle = middle

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"a": r"^first|bias", "b": r"^second", "c": r"^third"}

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.middle(self, self.first(x)))
        return out


def with_sizes(m: Toy, x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    y = m.third(m.second(x.flatten(2).transpose(1, 2))).reshape(batch, height, width, channels)
    return y.reshape(batch * height, width, channels).sum(1).reshape(batch, height, channels).mean(1)


def with_windows(m: Toy, x: Tensor) -> Tensor:
    windows = x.flatten(2).transpose(1, 2).reshape(x.shape[0] * 2, 2, 8)
    return m.third(m.second(windows)).reshape(x.shape[0], 4, 8).mean(1)


def with_interleaved_windows(m: Toy, x: Tensor) -> Tensor:
    windows = torch.cat(x.flatten(2).transpose(1, 2).chunk(2, dim=1), dim=0)
    return torch.cat(m.third(m.second(windows)).chunk(2, dim=0), dim=1).mean(1)


def with_the_batch_second(m: Toy, x: Tensor) -> Tensor:
    return m.third(m.second(x.flatten(2).permute(2, 0, 1))).mean(0)


def with_a_constant(m: Toy, x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    return (m.third(m.second(tokens)) + m.bias.softmax(-1)).mean(1)


def with_a_tuple(m: Toy, x: Tensor) -> Tensor:
    shape = x.shape
    parts = m.second(x.flatten(2).transpose(1, 2)).split(2, dim=1)
    return m.third(torch.cat(parts, dim=1)).transpose(1, 2).reshape(shape).mean((2, 3))


def with_writing_in_place(m: Toy, x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    tokens.add_(m.second(tokens))
    tokens.add_(m.third(tokens))
    return tokens.mean(1)


def with_functional_dropout(m: Toy, x: Tensor) -> Tensor:
    tokens = m.third(nn.functional.dropout(m.second(x.flatten(2).transpose(1, 2)), 0.5, m.training))
    return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens, dropout_p=0.5 if m.training else 0.0).mean(1)


MIDDLES = [
    with_sizes,
    with_windows,
    with_interleaved_windows,
    with_the_batch_second,
    with_a_constant,
    with_a_tuple,
    with_writing_in_place,
    with_functional_dropout,
]


@pytest.mark.parametrize("middle", MIDDLES)
def test_whatever_crosses_is_handed_over_image_by_image(middle: Callable[[Toy, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Toy(middle).eval()
    cuts = Cuts(model, range(4), 16)
    for batch in (1, 2, 3, 7):
        pictures = images(batch, size=16)
        with torch.no_grad():
            expected_NK = model(pictures)
            values_by_depth = cuts.prefix(pictures)
            order = torch.randperm(batch, generator=torch.Generator().manual_seed(3))
            for depth in range(4):
                values = [value.contiguous().clone() for value in values_by_depth[depth]]
                kept = [value.clone() for value in values]
                torch.testing.assert_close(cuts.suffix(depth)(*values), expected_NK, rtol=1e-5, atol=1e-6)
                assert all(torch.equal(a, b) for a, b in zip(values, kept, strict=True)), "the suffix wrote into the cache"
                shuffled = cuts.suffix(depth)(*[value[order] for value in values])
                torch.testing.assert_close(shuffled, expected_NK[order], rtol=1e-5, atol=1e-6)


def test_functional_dropout_follows_the_mode_of_the_suffix() -> None:
    torch.manual_seed(0)
    model = Toy(with_functional_dropout).eval()
    cuts = Cuts(model, [2], 16)
    (value,) = cuts.prefix(images(4, size=16))[2]
    suffix = cuts.suffix(2)
    assert torch.equal(seeded(suffix, 1, value), seeded(suffix, 2, value))
    suffix.train()
    assert not torch.equal(seeded(suffix, 1, value), seeded(suffix, 2, value))


def test_a_value_that_mixes_the_images_of_a_batch_is_refused() -> None:
    def mixing(m: Toy, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return m.third(m.second(tokens.flatten(0, 1).cumsum(0).flip(0))).reshape(tokens.shape).mean(1)

    torch.manual_seed(0)
    with pytest.raises(UserError, match="cannot be taken apart by image"):
        Cuts(Toy(mixing).eval(), [2], 16)


def test_control_flow_that_depends_on_the_data_is_refused() -> None:
    def branching(m: Toy, x: Tensor) -> Tensor:
        return m.third(m.second(x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))))

    with pytest.raises(UserError, match=r"Toy cannot be split: torch\.fx does not trace it"):
        Cuts(Toy(branching).eval(), [2], 16)


def test_random_numbers_outside_a_module_are_refused() -> None:
    def noisy(m: Toy, x: Tensor) -> Tensor:
        return m.third(m.second(x.mean((2, 3)) + torch.rand_like(x.mean((2, 3)))))

    with pytest.raises(UserError, match="draws random numbers"):
        Cuts(Toy(noisy).eval(), [2], 16)


def test_a_depth_beyond_the_groups_is_refused_with_the_number_there_is() -> None:
    with pytest.raises(UserError, match="Unfreeze depth 6 is beyond this backbone: it has 5 groups"):
        Cuts(backbone("resnet18"), [0, 6], SIZE)
