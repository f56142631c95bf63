"""Promotions as the real gate judges them, over made-up probabilities: a proven gain, a broken class, a first version, hostile names."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from ray_jobs.metrics import measure
from ray_jobs.promotion_spec import PromotionSpec
from tasks.gate import Evidence, Scores, judge, plain_judgement
from tasks.report_pictures import thumbnail
from tasks.report_promotion import PromotionContent, disagreements

BREEDS = (
    "Australian shepherd", "beagle", "Border collie", "dachshund", "English foxhound", "golden retriever", "Rhodesian ridgeback",
    "Samoyed", "Shih-Tzu", "whippet",
)  # fmt: skip
BROKEN = "beagle"
Floats = npt.NDArray[np.float64]


def promotion(
    *,
    classes: tuple[str, ...] = BREEDS,
    images: int = 1200,
    better: float = 0.25,
    broken: str | None = None,
    champion: bool = True,
    pictures: bool = True,
    spec: PromotionSpec | None = None,
    **changes: Any,
) -> PromotionContent:
    """A version that is so much surer of the true class than the champion; it takes many images of the `broken` class for another."""
    rng = np.random.default_rng(len(classes))
    true_N = np.sort(rng.integers(0, len(classes), images))
    shared_NK, camera_N = rng.gumbel(size=(images, len(classes))), np.where(rng.random(images) < 0.3, "scanner", "phone")
    found = {
        "challenger": _scores(rng, shared_NK, true_N, 6.3 + better, 1.0),
        "champion": _scores(rng, shared_NK, true_N, 6.3, 1.05) if champion else None,
        "probe": _scores(rng, shared_NK, true_N, 5.4, 0.8),
    }
    mine_NK = found["challenger"]
    assert mine_NK is not None
    if broken:
        hit_N = (true_N == classes.index(broken)) & (rng.random(images) < 0.3)
        other = (classes.index(broken) + 3) % len(classes)
        mine_NK[np.ix_(hit_N, [true_N[hit_N][0], other])] = mine_NK[np.ix_(hit_N, [other, true_N[hit_N][0]])]
    scores = {role: None if found_NK is None else Scores(found_NK) for role, found_NK in found.items()}
    assert scores["challenger"]
    removed = 12 if champion else 0
    evidence = Evidence(
        list(classes), true_N, scores["challenger"], scores["champion"], scores["probe"], {"camera": camera_N}, removed, images + removed
    )
    judgement = plain_judgement(judge(evidence, spec or PromotionSpec(slices=("camera",))))
    rows = [_row(n, classes, true_N, found) for n in range(images)]
    shown = disagreements(rows).digests if pictures else set()
    whole: dict[str, Any] = {
        "name": "dogs", "version": "14" if champion else "1", "champion_version": "13" if champion else None,
        "status": judgement["status"], "judgement": judgement,
        "evaluation": {role: None if found_NK is None else measure(found_NK, true_N, classes) for role, found_NK in found.items()},
        "holdout": {"uri": "s3://unfreeze/datasets/dogs/6d92713c51", "version": "6d92713c51", "digest": _digest("holdout"),
                    "images": images + removed, "judged": images},
        "overlap": [
            {"file": f"dogs/beagle/{n:04d}.jpg", "label": "beagle", "how": ("exact", "near")[n % 2], "with_file": f"old/{n:04d}.png",
             "dataset_version": "b2d0448a11", "split": "train", "seen_by": "champion"} for n in range(removed)
        ],
        "rows": rows, "pictures": {row["sha256"]: _dog(row) for row in rows if row["sha256"] in shown},
        "entry": {"number": 17, "at": "2026-11-21T10:32:05+00:00", "by": "nightly", "verdict": judgement["status"], "approver": None,
                  "from": "13" if champion else None, "to": "14" if champion else "1", "reason": judgement["reason"],
                  "evidence_uri": "s3://unfreeze/models/dogs/14/", "previous_digest": _digest("16"), "digest": _digest("17")},
    }  # fmt: skip
    return PromotionContent(**(whole | changes))


def asked() -> dict[str, Any]:
    """A request for approval that nobody has answered."""
    return {
        "id": "9c41f07ab2e3", "by": "mira@example.org", "at": "2026-11-21T10:32:05+00:00", "reason": "the retraining with the new photos",
        "expires_at": "2026-11-28T10:32:05+00:00",
    }  # fmt: skip


def _scores(rng: np.random.Generator, shared_NK: Floats, true_N: npt.NDArray[np.int64], skill: float, sharpness: float) -> Floats:
    """Probabilities of a model: noise that it mostly shares with the others, and how well it knows the true class."""
    logits_NK = 1.5 * shared_NK + 0.5 * rng.gumbel(size=shared_NK.shape)
    logits_NK[np.arange(len(true_N)), true_N] += skill
    powers_NK = np.exp(sharpness * (logits_NK - logits_NK.max(1, keepdims=True)))
    return np.asarray(powers_NK / powers_NK.sum(1, keepdims=True), np.float64)


def _row(n: int, classes: tuple[str, ...], true_N: npt.NDArray[np.int64], found: dict[str, Floats | None]) -> dict[str, Any]:
    label = classes[int(true_N[n])]
    answers = {
        role: {"class": classes[int(found_NK[n].argmax())], "probability": float(found_NK[n].max())}
        for role, found_NK in found.items()
        if found_NK is not None
    }
    return {"sha256": _digest(str(n)), "file": f"holdout/{label}/{n:05d}.jpg", "true": label, **answers}


def _dog(row: dict[str, Any]) -> str:
    seed = int(row["sha256"][:8], 16)
    picture = Image.new("RGB", (96, 96), (200 + seed % 50, 220, 180 + seed // 50 % 60))
    pen, coat = ImageDraw.Draw(picture), (90 + seed % 120, 60 + seed // 7 % 90, 40)
    for box in ((14, 20, 38, 62), (58, 20, 82, 62), (22, 16, 74, 82)):
        pen.ellipse(box, fill=coat)
    for box in ((36, 38, 43, 45), (54, 38, 61, 45), (42, 56, 54, 64)):
        pen.ellipse(box, fill=(20, 20, 20))
    written = io.BytesIO()
    picture.save(written, "PNG")
    return thumbnail(written.getvalue())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
