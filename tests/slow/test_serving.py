"""What was promoted is served: by MLflow's own server on a machine without our code, by `unfreeze predict`, and by its ONNX file."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.site import TIMEOUT_S, Site

pytestmark = pytest.mark.slow
MLFLOW = Path(sys.executable).with_name("mlflow")
NO_CODE_OF_OURS = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("flows", "tasks", "ray_jobs", "infra", "ray", "prefect"):
            raise ModuleNotFoundError(f"{name} is not on a serving machine")

sys.meta_path.insert(0, Refuse())
"""


@pytest.fixture(scope="module")
def retrained(site: Site) -> dict[str, Any]:
    return site.json("retrain", site.spec("served"))


@pytest.fixture(scope="module")
def server(site: Site, retrained: dict[str, Any]) -> Iterator[str]:
    """`mlflow models serve` of the champion, in processes that have a serving machine's packages alone; its address."""
    assert retrained["status"] == "promoted"
    bare = site.folder / "bare"
    bare.mkdir()
    (bare / "sitecustomize.py").write_text(NO_CODE_OF_OURS)
    env = {
        "MLFLOW_TRACKING_URI": site.status["mlflow"]["uri"], "PYTHONPATH": str(bare), "HOME": str(bare),
        "PATH": f"{MLFLOW.parent}{os.pathsep}{os.environ['PATH']}", "MLFLOW_DISABLE_TELEMETRY": "true",
    }  # fmt: skip
    port = _free_port()
    model = ["-m", "models:/served@champion", "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    log = site.folder / "serve.log"
    with log.open("w") as sink:
        process = subprocess.Popen([str(MLFLOW), "models", "serve", *model], env=env, cwd=bare, stdout=sink, stderr=sink)
    try:
        _wait_until_it_answers(f"http://127.0.0.1:{port}/ping", process, log)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        process.terminate()  # the server that it started ends with it
        process.wait(60)
        _wait_until_free(port)


def test_mlflows_server_answers_over_http_as_predict_does_and_a_broken_image_costs_its_own_row_only(
    site: Site, server: str
) -> None:  # fmt: skip
    broken = site.folder / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n no more")
    good = sorted(site.images.glob("*/00[0-3].png"))
    files = [*good[:5], broken, *good[5:]]
    served = _post(server, {"dataframe_split": {"columns": ["image"], "data": [[_base64(path)] for path in files]}})["predictions"]
    assert len(served) == len(files)
    predicted = _predicted(site, files)
    for path, ours, theirs in zip(files, predicted, served, strict=True):
        if path == broken:
            assert theirs == {"class": None, "probability": None, "error": ours["error"]}
            continue
        assert theirs["error"] is None
        assert theirs["class"] == ours["class"]
        assert theirs["probability"] == pytest.approx(ours["probability"], abs=1e-6)


def test_the_published_onnx_file_alone_answers_as_predict_does(site: Site, retrained: dict[str, Any]) -> None:
    import onnxruntime

    told = retrained["publish"].get("onnx")  # the command's answer may leave it out; what is published may not
    assert told is None or (told["exported"] is True and told["max_difference"] <= 1e-4)
    file = site.s3().get_object(Bucket=site.status["s3"]["bucket"], Key="models/served/1/model.onnx")["Body"].read()
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    about = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    files = sorted(site.images.glob("*/00*.png"))
    pixels_NHWC = np.stack([_square(path, about["image_size"]) for path in files])
    images_NCHW = ((pixels_NHWC / 255 - about["mean"]) / about["std"]).transpose(0, 3, 1, 2).astype(np.float32)
    (probabilities_NK,) = session.run(["probabilities"], {"images": images_NCHW})
    predicted = _predicted(site, files)
    assert [row["class"] for row in predicted] == [about["labels"][best] for best in probabilities_NK.argmax(1)]
    assert probabilities_NK.max(1) == pytest.approx([row["probability"] for row in predicted], abs=1e-4)


def test_a_published_version_lists_its_onnx_file_and_verifies(site: Site, retrained: dict[str, Any]) -> None:
    manifest = site.s3().get_object(Bucket=site.status["s3"]["bucket"], Key="models/served/1/MANIFEST.json")["Body"].read()
    assert "model.onnx" in [entry["key"] for entry in json.loads(manifest)["objects"]]
    assert site.json("verify", retrained["publish"]["uri"])["verified"] is True


def _predicted(site: Site, files: list[Path]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in site.run("predict", "served@champion", *files, "--json").stdout.splitlines()]


def _square(path: Path, side: int) -> Any:
    """What the file's metadata describe; the same kernel as ours, since two implementations of bicubic differ by a level or two."""
    from ray_jobs.preprocessing import to_square

    return to_square(Image.open(path).convert("RGB"), side)


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _post(url: str, body: Any) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return json.loads(answer.read(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    except urllib.error.HTTPError as error:
        pytest.fail(f"{error}: {error.read().decode()[:2000]}")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait_until_it_answers(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(url, timeout=30):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"{url} did not answer: {log.read_text()[-4000:]}")


def _wait_until_free(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return
        time.sleep(0.2)
    pytest.fail(f"something still listens on {port}")
