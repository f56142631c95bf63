"""The served model, as MLflow's models-from-code: this file, safetensors weights and no pickle.

It is copied into every registered version and runs there with mlflow, torch, timm and pillow alone:
`mlflow.pyfunc.load_model("models:/NAME@champion").predict(pandas.DataFrame({"image": [bytes, ...]}))`.
"""

from __future__ import annotations

import base64
import importlib.util
import json
from pathlib import Path
from typing import Any

import mlflow.models
import mlflow.pyfunc
import numpy as np
import pandas as pd

IMAGES_PER_BATCH = 32


class ImageClassifier(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
    """Encoded images in, class and probability out; an image that cannot be read gets an error instead."""

    def load_context(self, context: Any) -> None:
        """Read the model folder: weights, labels, and the preprocessing code it was trained with."""
        import timm
        from safetensors.torch import load_file

        folder = Path(context.artifacts["model"])
        config, self.labels, self.preprocessing = (
            json.loads((folder / f"{name}.json").read_text()) for name in ("config", "labels", "preprocessing")
        )
        self.code = _load_code(folder / "preprocessing.py")
        arguments = {"pretrained": False, "num_classes": config["num_classes"]}
        try:  # transformers are built for one image size; convolutional models know no such argument
            self.model = timm.create_model(config["backbone"], img_size=config["image_size"], **arguments)
        except TypeError:
            self.model = timm.create_model(config["backbone"], **arguments)
        self.model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
        self.model.eval()

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Class, probability and error for each row's `image`: the bytes of a file, or their base64 text."""
        rows: list[dict[str, Any]] = []
        encoded = list(model_input["image"])
        for start in range(0, len(encoded), IMAGES_PER_BATCH):
            rows += self._predict_batch(encoded[start : start + IMAGES_PER_BATCH])
        return pd.DataFrame(rows, columns=["class", "probability", "error"], dtype=object)  # None stays None: JSON knows no NaN

    def _predict_batch(self, encoded: list[Any]) -> list[dict[str, Any]]:
        import torch

        squares: list[Any] = []
        errors: list[str | None] = []
        for item in encoded:
            try:
                image = self.code.decode(_bytes(item), self.preprocessing["max_pixels"])
                squares.append(self.code.to_square(image, self.preprocessing["image_size"]))
                errors.append(None)
            except Exception as error:  # whatever a broken file raises is that row's answer, not the batch's
                squares.append(None)
                errors.append(str(error) or type(error).__name__)
        readable = [square for square in squares if square is not None]
        probabilities: Any = iter(())
        if readable:
            images_BCHW = self.code.normalise(np.stack(readable), self.preprocessing["mean"], self.preprocessing["std"])
            with torch.inference_mode():
                probabilities = iter(self.model(torch.from_numpy(images_BCHW)).softmax(1).double().numpy())
        return [{"class": None, "probability": None, "error": error} if error else self._row(next(probabilities)) for error in errors]

    def _row(self, probabilities_K: Any) -> dict[str, Any]:
        best = int(probabilities_K.argmax())
        return {"class": self.labels[best], "probability": float(probabilities_K[best]), "error": None}


def _bytes(item: Any) -> bytes:
    return base64.b64decode(item, validate=True) if isinstance(item, str) else bytes(item)


def _load_code(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("unfreeze_preprocessing", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mlflow.models.set_model(ImageClassifier())
