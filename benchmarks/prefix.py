"""The shared prefix pass against timm's eager forward: python benchmarks/prefix.py [--small]

Eager is `model(images)` in eval and inference mode as timm builds it. Ours is the pass of the feature cache (all of cuts 0, 1, 2 tapped in
one forward, the way found on the first batch) with the classifier behind it, so that both end in logits, which are compared. BatchNorm
statistics and affine parameters are randomised. One core, batches of 32 in turns, the least of the repeats.
"""

from __future__ import annotations

import statistics
from typing import Any

from bench import Figure, options, report, seconds

CASES = {"tf_efficientnet_lite0": 96, "resnet18": 224, "vit_tiny_patch16_224": 224}
GOAL, TOLERANCE = 1.3, 1e-4


def randomised(name: str, size: int) -> Any:
    """The timm model with norms that do something, in eval mode."""
    from ray_jobs import backbone

    import torch  # isort: skip  # after light_timm had its way in backbone

    model = backbone.create(name, image_size=size, num_classes=9, seed=0)
    for module in model.modules():
        for parameter in ("weight", "bias"):
            value = getattr(module, parameter, None)
            if "Norm" in type(module).__name__ and value is not None:
                torch.nn.init.uniform_(value, 0.5, 1.5) if parameter == "weight" else torch.nn.init.normal_(value, 0, 0.1)
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(8, 3, size, size))
    return model.eval()


def measure(name: str, size: int, repeats: int) -> dict[str, float]:
    """Milliseconds an image of both, their ratio, and the largest difference of the logits, relative to the largest."""
    import torch

    from ray_jobs.cuts import Cuts
    from ray_jobs.features import BATCH, FrozenPrefix

    torch.manual_seed(0)
    eager = randomised(name, size)
    images_BCHW = torch.randn(BATCH, 3, size, size)
    model = randomised(name, size)
    model.load_state_dict(eager.state_dict())
    cuts = Cuts(model.to(memory_format=torch.channels_last), [0, 1, 2], size)
    prefix, head = FrozenPrefix(cuts), cuts.suffix(0).eval()
    ours_BCHW = images_BCHW.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected_BK, found_BK = eager(images_BCHW), head(*prefix(ours_BCHW)[0])
        difference = float((found_BK - expected_BK).abs().max() / expected_BK.abs().max())
        least = {"eager": float("inf"), "ours": float("inf")}
        for _ in range(repeats):
            least["eager"] = min(least["eager"], seconds(lambda: eager(images_BCHW)))
            least["ours"] = min(least["ours"], seconds(lambda: head(*prefix(ours_BCHW)[0])))
    ms = {arm: 1000 * value / BATCH for arm, value in least.items()}
    return {**ms, "ratio": ms["eager"] / ms["ours"], "difference": difference}


def main() -> None:
    chosen = options(__doc__, repeats=(10, 2, "batches of each arm in a round"))
    import torch

    torch.set_num_threads(1)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CASES}
    for _ in range(chosen.rounds):
        for name, size in CASES.items():
            found[name].append(measure(name, size, chosen.more.repeats))
    figures = []
    for name, rounds in found.items():
        middle = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        what = f"{name}, {CASES[name]} px ({middle['eager']:.2f} ms an image against {middle['ours']:.2f})"
        figures.append(Figure(what, middle["ratio"], "x", GOAL))
        figures.append(Figure("  largest difference of the logits", max(one["difference"] for one in rounds), "", TOLERANCE, higher=False))
    report("The prefix pass against timm's eager forward", figures, chosen, rounds=found)


if __name__ == "__main__":
    main()
