"""The ONNX file answers as the model does, says what an outside client must know, and is never taken for good where it does not."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from infra.committed_folder import read_manifest
from ray_jobs import backbone, onnx_export, onnx_model
from ray_jobs.model_folder import Preprocessing, load_model, write
from ray_jobs.onnx_export import Export, run
from ray_jobs.onnx_model import Agreement, NotExportableError, compare, export, read_metadata
from tests.fakes import MemoryObjectStore
from tests.fit_worlds import BACKBONE, FitWorld, make_world

LABELS = ["café", "square 🟦", "größe", "犬", 'a "quoted" one']
MODEL_URI, TARGET_URI = "s3://unfreeze/fits/f/fit", "s3://unfreeze/onnx/o"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def view(side: int) -> Preprocessing:
    return Preprocessing(side, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 10**8)


def random_model(name: str, side: int, classes: int = len(LABELS)) -> nn.Module:
    """Random everywhere: what starts at zero, as the last norm of a residual branch does, would hide errors."""
    model = backbone.create(name, image_size=side, num_classes=classes, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.02 * torch.randn(tensor.shape, generator=generator))
        for key, buffer in model.named_buffers():
            if key.endswith(("running_mean", "running_var")):
                buffer.add_(0.1 * torch.rand(buffer.shape, generator=generator))
    return model.eval()


def random_images(count: int, side: int) -> onnx_model.Images:
    return np.random.default_rng(2).normal(size=(count, 3, side, side)).astype(np.float32)


class Tiny(nn.Module):
    """Answers with a few numbers of the image; `how` says what goes wrong."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.how = how
        self.head = nn.Linear(12, len(LABELS))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        features_BD = nn.functional.adaptive_avg_pool2d(images_BCHW, 2).flatten(1)
        if self.how == "branches on what it sees" and bool(features_BD.abs().sum() > 0):
            features_BD = features_BD.flip(1)
        if self.how == "bakes the batch in":
            features_BD = features_BD + torch.zeros(int(images_BCHW.shape[0]), 1)
        if self.how == "has no operator in ONNX":
            features_BD = torch.linalg.qr(features_BD.new_ones(2, 2))[0].sum() + features_BD
        if self.how == "answers with NaN":
            features_BD = features_BD / 0.0 * 0.0
        logits_BK: Tensor = self.head(features_BD)
        return logits_BK


@pytest.mark.parametrize(
    ("name", "side"), [("resnet18", 64), ("vit_tiny_patch16_224", 96), ("convnext_atto", 64), ("tf_efficientnet_lite0", 64)]
)
def test_the_file_of_a_timm_model_answers_as_the_model_in_any_batch(name: str, side: int) -> None:
    model = random_model(name, side)
    found = compare(model, export(model, view(side), LABELS), random_images(9, side))
    assert found.is_close, found
    assert found.images == 9


def test_the_file_alone_tells_an_outside_client_all_it_needs() -> None:
    import onnxruntime

    file = export(Tiny(), view(32), LABELS)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [(one.name, one.type, one.shape) for one in session.get_inputs()] == [("images", "tensor(float)", ["N", 3, 32, 32])]
    assert [(one.name, one.shape) for one in session.get_outputs()] == [("logits", ["N", 5]), ("probabilities", ["N", 5])]
    told = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    assert told == read_metadata(file)
    assert told == {
        "labels": LABELS, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "image_size": 32,
        "max_pixels": 10**8, "interpolation": "bicubic",
    }  # fmt: skip
    probabilities = session.run(["probabilities"], {"images": random_images(3, 32)})[0]
    assert np.allclose(probabilities.sum(1), 1)


def test_equal_weights_give_equal_bytes() -> None:
    assert export(random_model(BACKBONE, 32), view(32), LABELS) == export(random_model(BACKBONE, 32), view(32), LABELS)


@pytest.mark.parametrize("how", ["branches on what it sees", "answers with NaN"])
def test_a_file_that_answers_otherwise_or_with_no_number_is_not_close(how: str) -> None:
    model = Tiny(how).eval()
    assert not compare(model, export(model, view(32), LABELS), random_images(8, 32)).is_close


def test_a_batch_size_that_the_trace_baked_in_is_found() -> None:
    model = Tiny("bakes the batch in").eval()
    file = export(model, view(32), LABELS)
    with pytest.raises(Exception, match="ONNXRuntimeError"):  # it will not add 8 rows to 2
        compare(model, file, random_images(8, 32))


def test_an_operator_that_onnx_does_not_have_is_named() -> None:
    with pytest.raises(NotExportableError, match="qr"):
        export(Tiny("has no operator in ONNX").eval(), view(32), LABELS)


def test_weights_beyond_what_one_file_holds_are_refused_before_anything_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_model, "MAX_FILE_BYTES", 100)
    with pytest.raises(NotExportableError, match="2 GiB"):
        export(Tiny().eval(), view(32), LABELS)


@pytest.mark.parametrize(
    ("probabilities", "logits", "largest", "close"),
    [
        (1e-4, 0.0, 1.0, True), (1.1e-4, 0.0, 1.0, False), (0.0, 1e-3, 20.0, True), (0.0, 1e-3, 5.0, False),
        (math.nan, 0.0, 1.0, False), (0.0, math.nan, 1.0, False), (0.0, 1e-3, math.nan, False),
    ],
)  # fmt: skip
def test_close_is_a_ten_thousandth_and_of_a_logit_that_of_its_size(
    probabilities: float, logits: float, largest: float, close: bool
) -> None:
    assert Agreement(8, probabilities, logits, largest).is_close is close


@pytest.fixture
def world(tmp_path: Path) -> FitWorld:
    found = make_world(tmp_path, MemoryObjectStore())
    model = random_model(BACKBONE, 32, classes=3)
    config = {"backbone": BACKBONE, "num_classes": 3, "image_size": 32}
    write(found.store, MODEL_URI, model, config=config, labels=found.dataset["classes"], preprocessing=view(32))
    return found


def test_a_folder_is_exported_verified_on_the_holdout_and_committed_once(world: FitWorld, tmp_path: Path) -> None:
    work = Export(MODEL_URI, world.dataset["uri"], TARGET_URI)
    found = run(work, world.store, tmp_path / "cache")
    assert found["exported"] is True
    assert found["why"] is None
    assert found["images"] >= 8
    assert found["max_difference"] <= 1e-4
    manifest = read_manifest(world.store, TARGET_URI)
    assert manifest is not None
    assert [entry.key for entry in manifest.objects] == ["model.onnx", "verified.json"]
    assert json.loads(world.store.read(f"{TARGET_URI}/verified.json")) == found
    assert read_metadata(world.store.read(f"{TARGET_URI}/model.onnx"))["labels"] == world.dataset["classes"]
    writes = world.store.writes  # type: ignore[attr-defined]
    assert run(work, world.store, tmp_path / "cache") == found
    assert world.store.writes == writes  # type: ignore[attr-defined]


def test_what_disagrees_or_cannot_be_exported_is_an_answer_and_commits_nothing(
    world: FitWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Export(MODEL_URI, world.dataset["uri"], TARGET_URI)
    another = export(random_model(BACKBONE, 32, classes=3), view(32), LABELS[:3])
    model, _, _ = load_model(onnx_export.fetch(world.store, MODEL_URI, tmp_path / "cache" / "models"))
    with torch.no_grad():
        model.get_parameter("conv_stem.weight").mul_(-2)
    for file, why in ((export(model, view(32), LABELS[:3]), "differ"), (b"no ONNX", "refused"), (NotExportableError("no qr"), "no qr")):

        def made(*_: object, file: bytes | Exception = file) -> bytes:
            if isinstance(file, Exception):
                raise file
            return file

        monkeypatch.setattr(onnx_model, "export", made)
        found = run(work, world.store, tmp_path / "cache")
        assert found["exported"] is False
        assert why in found["why"]
        assert read_manifest(world.store, TARGET_URI) is None
    monkeypatch.setattr(onnx_model, "export", lambda *_: another)
    assert run(work, world.store, tmp_path / "cache")["exported"] is True
