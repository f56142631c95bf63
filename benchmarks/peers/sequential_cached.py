"""The strongest thing one would write by hand: one process, features cached at each cut, then one training after the other.

    python sequential_cached.py --data MANIFEST.csv --weights FILE --depths 0,1,2 --lrs 1e-2,3e-3 --epochs 8 --out answer.json

Plain timm and torch, nothing of Unfreeze: the same split, optimizer, schedule and batch size as ray_tune_baseline.py, whose data and
model functions it uses. The front of the network is cut where the tensors enter the first trained block of tf_efficientnet_lite0.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from ray_tune_baseline import build, read_split


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--data", required=True)
    p.add_argument("--backbone", default="tf_efficientnet_lite0")
    p.add_argument("--weights", required=True)
    p.add_argument("--image-size", type=int, default=96)
    p.add_argument("--depths", default="0,1,2")
    p.add_argument("--lrs", default="1e-2,3e-3,1e-3")
    p.add_argument("--epochs", type=int, default=6)
    p.add_argument("--batch-size", type=int, default=32)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out")
    a = p.parse_args()

    started = time.perf_counter()
    import timm
    import torch
    from PIL import Image
    from torch import nn

    torch.set_num_threads(a.threads)
    train, val, num_classes = read_split(a.data, 0.25)
    labels = torch.tensor([label for _, label in [*train, *val]])
    depths, lrs = [int(d) for d in a.depths.split(",")], [float(x) for x in a.lrs.split(",")]

    def parts(depth: int) -> tuple[nn.Module, nn.Sequential, nn.Sequential, list[nn.Module]]:
        """The model, its front and its back at this depth, and the norms that stay frozen."""
        model, frozen_norms = build(a.backbone, a.weights, num_classes, depth)
        stem = nn.Sequential(model.conv_stem, model.bn1)
        blocks = [stem, *model.blocks]
        end = nn.Sequential(model.conv_head, model.bn2, model.global_pool, nn.Identity(), model.classifier)
        # coarse groups from the end: the last block with conv_head, then a block each, then the stem
        if depth == 0:
            return model, nn.Sequential(*blocks, *end[:3]), nn.Sequential(*end[3:]), frozen_norms
        return model, nn.Sequential(*blocks[: len(blocks) - depth]), nn.Sequential(*blocks[len(blocks) - depth :], *end), frozen_norms

    model, *_ = parts(0)
    config = timm.data.resolve_data_config({}, model=model) | {"input_size": (3, a.image_size, a.image_size), "crop_pct": 1.0}
    transform = timm.data.create_transform(**config, is_training=False)
    images = torch.stack([transform(Image.open(path).convert("RGB")) for path, _ in [*train, *val]])
    features = {}
    with torch.inference_mode():
        for depth in depths:
            _, front, _, _ = parts(depth)
            front.eval()
            features[depth] = torch.cat([front(x) for x in images.split(64)]).clone()
    cached_s = time.perf_counter() - started

    rows = []
    for depth in depths:
        for lr in lrs:
            torch.manual_seed(a.seed)
            _, _, back, frozen_norms = parts(depth)
            parameters = [q for q in back.parameters() if q.requires_grad]
            steps = a.epochs * -(-len(train) // a.batch_size)
            optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-4)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
            for _ in range(a.epochs):
                back.train()
                for norm in frozen_norms:
                    norm.eval()
                for batch in torch.randperm(len(train)).split(a.batch_size):
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(back(features[depth][batch]), labels[batch]).backward()
                    optimizer.step()
                    schedule.step()
                back.eval()
                with torch.no_grad():
                    guess = torch.cat([back(x).argmax(1) for x in features[depth][len(train) :].split(128)])
                accuracy = (guess == labels[len(train) :]).float().mean().item()
            rows.append({"depth": depth, "lr": lr, "accuracy": accuracy, "epochs": a.epochs})
    answer = {
        "arm": "sequential",
        "seconds": round(time.perf_counter() - started, 1),
        "cached_s": round(cached_s, 1),
        "trials": len(rows),
        "best": max(rows, key=lambda r: r["accuracy"]),
        "rows": rows,
    }
    print(json.dumps({k: v for k, v in answer.items() if k != "rows"}))
    if a.out:
        Path(a.out).write_text(json.dumps(answer, indent=1))


if __name__ == "__main__":
    main()
