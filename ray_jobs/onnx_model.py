"""A trained model as one ONNX file that an outside client needs nothing else for, and the check that it answers as the model does.

Input `images` float32 [N, 3, H, W]: decoded to RGB, the centre square resized, and normalised as (x / 255 - mean) / std.
Outputs `logits` and `probabilities`, both float32 [N, K]. N is free; H, W and K are the model's. metadata_props, each a JSON text: labels,
mean, std, image_size, max_pixels, interpolation. The weights are inside the file. Equal weights give equal bytes.

Exported by tracing (torch's TorchScript exporter), not by torch.export: 0.6 s instead of 9, and torch's compiler stays unloaded.
What a trace bakes in by mistake, such as the size of the batch, the check finds.
"""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ray_jobs.model_folder import Preprocessing

OPSET = 18
TRACED_BATCH = 2  # a batch of one would let the trace take its size for a dimension that broadcasts
MAX_FILE_BYTES = 2**31 - 2**24
"""A protobuf message ends at 2 GiB; some of it is the graph."""
TOLERANCE = 1e-4

Images = npt.NDArray[np.float32]


class NotExportableError(ValueError):
    """This model cannot become one ONNX file; the message says why."""


@dataclass(frozen=True)
class Agreement:
    """The largest absolute differences between the file's answers and the model's, and the largest logit they are seen against."""

    images: int
    probabilities: float
    logits: float
    largest_logit: float

    @property
    def is_close(self) -> bool:
        """Probabilities within 1e-4, and logits within 1e-4 of their own size; a difference that is no number is none."""
        return self.probabilities <= TOLERANCE and self.logits <= TOLERANCE * max(1.0, self.largest_logit)


class _Answers(nn.Module):
    """The model with both of its answers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        logits_BK = self.model(images_BCHW)
        return logits_BK, logits_BK.softmax(1)


def export(model: nn.Module, preprocessing: Preprocessing, labels: Sequence[str]) -> bytes:
    """The file. `model` is in eval mode, on the CPU. Raises NotExportableError."""
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if size_bytes > MAX_FILE_BYTES:
        raise NotExportableError(f"weights of {size_bytes / 2**30:.1f} GiB do not fit into one ONNX file (2 GiB)")
    side = preprocessing.image_size
    try:
        return _with_metadata(_traced(model, torch.zeros(TRACED_BATCH, 3, side, side)), _metadata(preprocessing, labels))
    except Exception as error:  # the exporter raises whatever an operator it does not know leads to
        raise NotExportableError(_first_line(error)) from error


def compare(model: nn.Module, file: bytes, images_NCHW: Images) -> Agreement:
    """How far the file's answers are from the model's: for all images in one batch, and for the first alone."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors; a warning of its optimiser is nobody's business here
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    found = [_compare_batch(model, session, batch_BCHW) for batch_BCHW in (images_NCHW, images_NCHW[:1])]
    probabilities, logits, largest = (float(np.max(column)) for column in zip(*found, strict=True))  # np.max keeps NaN
    return Agreement(len(images_NCHW), probabilities, logits, largest)


def read_metadata(file: bytes) -> dict[str, Any]:
    """What the file says of itself: labels, mean, std, image_size, max_pixels, interpolation."""
    import onnx

    return {entry.key: json.loads(entry.value) for entry in onnx.load_from_string(file).metadata_props}


def _compare_batch(model: nn.Module, session: Any, images_BCHW: Images) -> tuple[float, float, float]:
    with torch.inference_mode():
        expected = [answer.float().numpy() for answer in _Answers(model)(torch.from_numpy(images_BCHW))]
    logits_BK, probabilities_BK = session.run(["logits", "probabilities"], {"images": images_BCHW})
    if logits_BK.shape != expected[0].shape:
        return math.inf, math.inf, 1.0  # a batch size that the trace has baked in
    return _furthest(probabilities_BK, expected[1]), _furthest(logits_BK, expected[0]), float(np.abs(expected[0]).max())


def _furthest(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    return float(np.abs(one.astype(np.float64) - other).max())


def _traced(model: nn.Module, example_BCHW: Tensor) -> bytes:
    sink = io.BytesIO()
    names = ["images", "logits", "probabilities"]
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("ignore")  # of the trace's constants, which `compare` judges, and that the exporter has a successor
        torch.onnx.export(
            _Answers(model).eval(), (example_BCHW,), sink, dynamo=False, opset_version=OPSET, verbose=False,  # type: ignore[arg-type]
            input_names=names[:1], output_names=names[1:], dynamic_axes={name: {0: "N"} for name in names},
        )  # fmt: skip
    return sink.getvalue()


def _metadata(preprocessing: Preprocessing, labels: Sequence[str]) -> dict[str, str]:
    values = {"labels": list(labels), **asdict(preprocessing)}
    return {key: json.dumps(value, ensure_ascii=False) for key, value in sorted(values.items())}


def _with_metadata(file: bytes, metadata: dict[str, str]) -> bytes:
    import onnx

    proto = onnx.load_from_string(file)
    onnx.helper.set_model_props(proto, metadata)
    done: bytes = proto.SerializeToString(deterministic=True)
    return done


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
