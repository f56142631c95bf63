"""The evidence of a promotion: judged is what neither model can have seen, and whoever asks can check it."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from infra.committed_folder import MANIFEST, commit
from infra.errors import UserError
from infra.progress import ignore
from ray_jobs import evaluate, prepare
from ray_jobs.dataset import open_dataset
from ray_jobs.images import Range
from ray_jobs.spec import Spec
from ray_jobs.spec_file import parse_spec
from tasks.evidence import Gathered, gather, holdout_digest, plain_gathered
from tasks.gate import judge
from tests.fakes import MemoryObjectStore
from tests.unit.test_fingerprints import jpeg, photo

CLASSES = ("cat", "dog")
Pictures = Mapping[str, tuple[Image.Image, str]]
"""By file name an image and its split; the name's first letters are the class."""


def saved(image: Image.Image) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()


def filler(start: int, holdout: int = 1) -> dict[str, tuple[Image.Image, str]]:
    """Images that no other start has: six of each class in train, one in val, `holdout` in holdout."""
    splits = ["train"] * 6 + ["val"] + ["holdout"] * holdout
    return {
        f"{label}{start}-{n}.png": (photo(start + 100 * k + n, 48), split)
        for k, label in enumerate(CLASSES)
        for n, split in enumerate(splits)
    }


@dataclass
class World:
    """A store with datasets, and an evaluation on one of them."""

    root: Path
    store: MemoryObjectStore = field(default_factory=MemoryObjectStore)
    slices: tuple[str, ...] = ()

    def spec(self, source: Path | str = "x.csv") -> Spec:
        promotion = {"slices": self.slices, "min_images": 1}
        data = {"source": str(source)}
        return parse_spec({"name": "pets", "data": data, "backbone": {"name": "resnet18"}, "storage": "s3://lab", "promotion": promotion})

    def prepared(self, name: str, pictures: Pictures, camera: Mapping[str, str] | None = None) -> dict[str, Any]:
        folder = self.root / name
        folder.mkdir()
        lines = ["image,label,split,camera"]
        for file, (image, split) in pictures.items():
            (folder / file).write_bytes(saved(image))
            lines.append(f"{file},{file[:3]},{split},{(camera or {}).get(file, '')}")
        (folder / "list.csv").write_text("\n".join(lines))
        return prepare.prepare(self.spec(folder / "list.csv"), ignore, make_store=lambda: self.store)

    def evaluated(self, dataset: dict[str, Any], models: Mapping[str, tuple[Sequence[str], Any]]) -> dict[str, Any]:
        """An evaluation as evaluate_on_ray commits it; `models`: labels and probabilities by role."""
        opened = open_dataset(dataset["uri"], self.store, self.root / "cache" / "datasets")
        rows = Range(opened, "holdout", 0, dataset["holdout"])
        files = {}
        for role, (labels, probabilities_NC) in models.items():
            aligned_NK, outside_N = evaluate.aligned(probabilities_NC, labels, dataset["classes"])
            predictions = evaluate.predictions(rows, dataset["classes"], aligned_NK, outside_N)
            files[f"{role}.parquet"] = evaluate.to_parquet(predictions, probabilities_NC)
        uri = "s3://lab/evaluations/1"
        commit(self.store, uri, {"evaluation.json": b"{}", **files})
        return {
            "uri": uri,
            "predictions": {role: f"{uri}/{role}.parquet" for role in models},
            "labels": {role: list(labels) for role, (labels, _) in models.items()},
        }

    def gathered(self, dataset: dict[str, Any], lineages: Mapping[str, Sequence[str]], models: Any = None) -> Gathered:
        default = {role: (CLASSES, sure(dataset, 0)) for role in ("challenger", "champion")}
        evaluation = self.evaluated(dataset, models or default)
        return gather(self.spec(), dataset, evaluation, lineages, is_champion=False, store=self.store, cache=self.root / "cache")


def sure(dataset: dict[str, Any], answer: int) -> Any:
    """Probabilities of a model that always gives the same answer, a little surer of each image than of the one before."""
    probabilities_NC = np.full((dataset["holdout"], 2), 0.2, np.float32)
    probabilities_NC[:, answer] = 0.8 + np.arange(dataset["holdout"]) / 1000
    return probabilities_NC


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_without_overlap_every_holdout_image_is_judged_and_pinned_by_a_digest(world: World) -> None:
    dataset = world.prepared("now", filler(0, holdout=4))
    found = world.gathered(dataset, {"challenger": [dataset["uri"]], "champion": [dataset["uri"]]})
    assert (found.overlap, found.unchecked) == ([], [])
    assert (found.evidence.images_before, found.evidence.removed, len(found.evidence.true_N)) == (8, 0, 8)
    assert found.holdout.items() >= {"images": 8, "judged": 8, "version": dataset["version"], "uri": dataset["uri"]}.items()
    assert [row["true"][:3] for row in found.rows] == [row["file"][:3] for row in found.rows]
    assert found.evidence.true_N.tolist() == [CLASSES.index(row["true"]) for row in found.rows]
    assert json.loads(json.dumps(plain_gathered(found)))["holdout"]["digest"] == found.holdout["digest"]


def test_where_training_images_look_alike_by_nature_only_the_same_bytes_are_taken_out_and_the_judgement_says_so(world: World) -> None:
    one = np.asarray(photo(7, 48)).astype(np.float32)
    alike = {
        f"cat{n}.png": (Image.fromarray((one * (1 - n / 150)).astype(np.uint8)), "train" if n < 6 else "holdout") for n in range(8)
    }  # one part, photographed in changing light
    dataset = world.prepared("now", alike | filler(0, holdout=2))
    found = world.gathered(dataset, {"challenger": [dataset["uri"]]})
    assert found.overlap == []
    assert "holdout images that look like one of it were judged" in found.unchecked[0]


def test_the_digest_pins_images_and_labels_and_no_order() -> None:
    assert holdout_digest(["a", "b"], ["x", "y"]) == holdout_digest(["b", "a"], ["y", "x"])
    assert len({holdout_digest(*pair) for pair in ((["a", "b"], ["x", "y"]), (["a", "b"], ["y", "x"]), (["a"], ["x"]))}) == 3


def test_exact_and_near_copies_in_any_former_training_set_are_removed_and_exact_comes_first(world: World) -> None:
    now = filler(0, holdout=4)
    same, alike, both = (now[f"cat0-{n}.png"][0] for n in (7, 8, 9))
    former = filler(1000) | {"cat-old.png": (same, "train"), "cat-jpeg.png": (jpeg(alike, 60), "val")}
    older = filler(2000) | {"dog-jpeg.png": (jpeg(both, 60), "train"), "dog-same.png": (both, "train")}
    datasets = [world.prepared(name, files) for name, files in (("now", now), ("former", former), ("older", older))]
    dataset, *others = datasets
    lineages = {"challenger": [dataset["uri"], others[1]["uri"]], "champion": [others[0]["uri"], others[1]["uri"] + "/"]}
    found = world.gathered(dataset, lineages)
    by_file = {row["file"]: row for row in found.overlap}
    assert {file: (row["how"], row["with_file"], row["split"], row["seen_by"]) for file, row in by_file.items()} == {
        "cat0-7.png": ("exact", "cat-old.png", "train", ["champion"]),
        "cat0-8.png": ("near", "cat-jpeg.png", "val", ["champion"]),
        "cat0-9.png": ("exact", "dog-same.png", "train", ["challenger", "champion"]),
    }
    assert by_file["cat0-7.png"]["dataset_version"] == others[0]["version"]
    assert (found.evidence.removed, len(found.evidence.true_N), found.holdout["judged"]) == (3, 5, 5)
    assert not {row["file"] for row in found.rows} & set(by_file)
    swapped = {role: uris[::-1] for role, uris in reversed(lineages.items())}
    assert world.gathered(dataset, swapped).overlap == found.overlap


def test_a_near_copy_in_the_datasets_own_training_images_is_overlap(world: World) -> None:
    now = filler(0, holdout=4)
    now["cat-again.png"] = (jpeg(now["cat0-7.png"][0], 80), "train")
    dataset = world.prepared("now", now)
    found = world.gathered(dataset, {"challenger": [dataset["uri"]], "champion": []})
    assert [(row["file"], row["how"], row["seen_by"]) for row in found.overlap] == [("cat0-7.png", "near", ["challenger"])]


def test_what_is_left_are_the_very_answers_to_the_images_that_are_left(world: World) -> None:
    now = filler(0, holdout=4)
    dataset = world.prepared("now", now)
    former = world.prepared("former", filler(1000) | {"dog-old.png": (now["dog0-8.png"][0], "train")})
    whole = world.gathered(dataset, {"challenger": []})
    part = world.gathered(dataset, {"challenger": [former["uri"]]})
    assert part.rows == [row for row in whole.rows if row["file"] != "dog0-8.png"]
    kept_N = [number for number, row in enumerate(whole.rows) if row["file"] != "dog0-8.png"]
    assert np.array_equal(part.evidence.challenger.probabilities_NK, whole.evidence.challenger.probabilities_NK[kept_N])


def test_a_model_with_other_labels_is_aligned_by_name_and_a_number_that_is_none_is_null(world: World) -> None:
    dataset = world.prepared("now", filler(0, holdout=2))
    theirs = np.array([[0.1, 0.2, 0.7]] * 3 + [[np.nan] * 3], np.float32)
    models = {"challenger": (CLASSES, sure(dataset, 1)), "champion": (("dog", "cat", "eel"), theirs)}
    found = world.gathered(dataset, {"challenger": []}, models)
    champion = found.evidence.champion
    assert champion is not None
    assert champion.outside_N is not None
    assert np.allclose(champion.probabilities_NK[0], [0.2, 0.1])
    assert [row["champion"]["class"] for row in found.rows[:3]] == [None] * 3
    assert found.rows[3]["champion"]["probability"] is None
    assert found.evidence.probe is None
    json.dumps(plain_gathered(found), allow_nan=False)


def test_a_dataset_of_the_lineage_that_is_gone_or_altered_is_named_and_stops_nothing(world: World) -> None:
    now = filler(0, holdout=4)
    dataset = world.prepared("now", now)
    gone = world.prepared("gone", filler(1000) | {"cat-old.png": (now["cat0-7.png"][0], "train")})
    altered = world.prepared("altered", filler(2000))
    del world.store.objects[f"{gone['uri']}/{MANIFEST}"]
    world.store.objects[f"{altered['uri']}/manifest.parquet"] += b"x"
    found = world.gathered(dataset, {"champion": [gone["uri"], altered["uri"], dataset["uri"]]})
    assert found.overlap == []
    assert len(found.unchecked) == 2
    assert all("could not be checked" in words for words in found.unchecked)
    assert {words.partition(": ")[0] for words in found.unchecked} == {gone["uri"], altered["uri"]}


def test_of_a_dataset_without_fingerprints_exact_copies_are_found_and_it_is_said(world: World) -> None:
    now = filler(0, holdout=4)
    dataset = world.prepared("now", now)
    old = filler(1000) | {"cat-old.png": (now["cat0-7.png"][0], "train"), "cat-jpeg.png": (jpeg(now["cat0-8.png"][0], 80), "train")}
    former = world.prepared("former", old)
    names = ("manifest.parquet", "quarantine.parquet", "stats.json", "shards/00000.parquet")
    commit(world.store, former["uri"], {name: world.store.objects[f"{former['uri']}/{name}"] for name in names})
    found = world.gathered(dataset, {"champion": [former["uri"]]})
    assert [row["file"] for row in found.overlap] == ["cat0-7.png"]
    assert [words for words in found.unchecked if "16 images have no fingerprint" in words]


def test_an_evaluation_that_was_altered_is_refused_with_its_folder(world: World) -> None:
    dataset = world.prepared("now", filler(0, holdout=2))
    evaluation = world.evaluated(dataset, {"challenger": (CLASSES, sure(dataset, 0))})
    world.store.objects[f"{evaluation['uri']}/challenger.parquet"] += b"x"
    with pytest.raises(UserError, match="does not match its") as caught:
        gather(world.spec(), dataset, evaluation, {}, is_champion=False, store=world.store, cache=world.root / "cache")
    assert f"unfreeze verify {evaluation['uri']}" in caught.value.way_out


def test_slices_of_the_manifest_reach_the_gate_which_refuses_a_broken_one_by_name(tmp_path: Path) -> None:
    world = World(tmp_path, slices=("camera",))
    now = filler(0, holdout=20)
    camera = {file: "night" if number % 2 else "day" for number, file in enumerate(now) if not file.startswith("dog0-7.")}
    dataset = world.prepared("now", now, camera)
    whole = world.gathered(dataset, {"challenger": [dataset["uri"]]})
    values = [row["slices"]["camera"] for row in whole.rows]
    assert whole.evidence.slices == {"camera": values}
    assert values.count("(empty)") == 1
    right = [CLASSES.index(row["true"]) for row in whole.rows]
    wrong_at_night = [answer if value != "night" else 1 - answer for answer, value in zip(right, values, strict=True)]
    answers = {"challenger": wrong_at_night, "champion": right}
    models = {role: (CLASSES, np.eye(2, dtype=np.float32)[chosen]) for role, chosen in answers.items()}
    found = world.gathered(dataset, {"challenger": [dataset["uri"]]}, models)
    refusal = next(rule for rule in judge(found.evidence, world.spec().promotion).rules if rule.name == "slices")
    assert not refusal.passed
    assert "night" in refusal.words
    assert "day" not in refusal.words


def test_a_dataset_without_the_named_slices_says_how_to_get_them(world: World) -> None:
    dataset = world.prepared("now", filler(0, holdout=2))
    evaluation = world.evaluated(dataset, {"challenger": (CLASSES, sure(dataset, 0))})
    spec = World(world.root, slices=("camera",)).spec()
    with pytest.raises(UserError, match="camera") as caught:
        gather(spec, dataset, evaluation, {}, is_champion=False, store=world.store, cache=world.root / "cache")
    assert "retrain" in caught.value.way_out
