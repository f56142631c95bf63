"""The whole job as its users run it: the command line in its own process, seen by outside S3, MLflow and Prefect clients."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.site import TIMEOUT_S, UNFREEZE, Site
from tests.small_data import CLASSES, write_folder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def first(site: Site) -> dict[str, Any]:
    return site.json("retrain", site.spec("shapes"))


def test_the_first_retraining_is_promoted_and_answers_by_the_contract(first: dict[str, Any]) -> None:
    assert first["status"] == "promoted"
    assert first["dataset"]["images"] == 90
    assert first["dataset"]["classes"] == 3
    assert first["dataset"]["train"] + first["dataset"]["val"] + first["dataset"]["holdout"] == 90
    assert first["search"]["trials"] == 4
    assert first["fit"]["workers"] == 1
    assert set(first["evaluation"]["challenger"]["per_class"]) == set(CLASSES)
    assert first["evaluation"]["champion"] is None
    assert first["model"]["champion_version"] == first["model"]["version"] == "1"
    assert first["publish"]["verified"] is True
    assert set(first["seconds"]) == {"prepare", "cache", "search", "fit", "evaluate", "publish", "total"}


def test_an_outside_s3_client_lists_what_was_published(site: Site, first: dict[str, Any]) -> None:
    bucket = site.status["s3"]["bucket"]
    keys = {item["Key"] for item in site.s3().list_objects_v2(Bucket=bucket, Prefix="models/shapes/1/")["Contents"]}
    described = ("config.json", "labels.json", "preprocessing.json", "lineage.json", "evaluation.json", "report.html", "MANIFEST.json")
    assert keys == {f"models/shapes/1/{name}" for name in ("model.safetensors", "model.onnx", *described)}


def test_an_outside_mlflow_client_finds_champion_search_and_trials_and_nothing_is_running(site: Site, first: dict[str, Any]) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(site.status["mlflow"]["uri"])
    champion = client.get_model_version_by_alias("shapes", "champion")
    assert str(champion.version) == "1"
    assert champion.tags["unfreeze.dataset_version"] == first["dataset"]["version"]
    experiment = client.get_experiment_by_name("shapes")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    kinds = [run.data.tags["unfreeze.kind"] for run in runs]
    assert sorted(kinds) == ["evaluation", "fit", "search", *["trial"] * 4]
    search = next(run for run in runs if run.data.tags["unfreeze.kind"] == "search")
    trials = [run for run in runs if run.data.tags["unfreeze.kind"] == "trial"]
    assert {run.data.tags["mlflow.parentRunId"] for run in trials} == {search.info.run_id}
    assert {run.data.params["unfreeze_depth"] for run in trials} == {"0", "1"}
    assert all(client.get_metric_history(run.info.run_id, "val_accuracy") for run in trials)
    costs = {"cpu_s", "gpu_s", "s3_read_bytes", "s3_written_bytes", "s3_retries", "seconds"}
    assert all(costs <= set(run.data.metrics) for run in runs if run not in trials)


def test_prefect_shows_the_flow_run_with_its_tasks_and_artifacts(site: Site, first: dict[str, Any]) -> None:
    api = site.status["prefect"]["api_url"]
    run = _get(f"{api}/flow_runs/{first['flow_run_id']}")
    assert run["state"]["type"] == "COMPLETED"
    wanted = {"flow_runs": {"id": {"any_": [first["flow_run_id"]]}}}
    tasks = {task["name"].rsplit("-", 1)[0] for task in _post(f"{api}/task_runs/filter", wanted)}
    assert {"prepare data", "prepare backbone", "cache features", "search", "fit", "evaluate", "register", "publish", "promote"} <= tasks
    kinds = {artifact["type"] for artifact in _post(f"{api}/artifacts/filter", wanted)}
    assert {"markdown", "table"} <= kinds


def test_a_retraining_leaves_an_account_of_every_step_and_a_log_of_every_trial(site: Site, first: dict[str, Any]) -> None:
    account = _account(site, first)
    steps = {step["step"]: step for step in account["steps"]}
    assert (account["flow_run_id"], account["status"]) == (first["flow_run_id"], "promoted")
    wanted = {"prepare data", "prepare backbone", "plan search", "cache features", "search", "fit", "evaluate", "register", "publish"}
    assert wanted <= set(steps)
    assert {steps[name]["state"] for name in wanted} == {"computed"}
    assert min(steps[name]["cpu_s"] for name in ("prepare data", "cache features", "search", "fit", "evaluate")) > 0
    assert steps["publish"]["s3_written_bytes"] > first["publish"]["bytes"] / 2
    for name, step in {"prepare": "prepare data", "search": "search", "fit": "fit", "publish": "publish"}.items():
        assert first["seconds"][name] == round(steps[step]["seconds"], 2)
    log = site.folder / "home" / "logs" / f"{first['flow_run_id']}.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {line["trial"] for line in lines if "trial" in line} == {0, 1, 2, 3}
    assert {line["step"] for line in lines if "trial" in line} == {"search"}
    assert {line["service"] for line in lines if "service" in line} == {"s3", "mlflow", "prefect", "ray"}
    assert lines[-1]["what"] == "done"


def test_a_retraining_that_skips_says_which_steps_it_kept(site: Site, first: dict[str, Any]) -> None:
    account = _account(site, site.json("retrain", site.spec("shapes")))
    steps = {step["step"]: step["state"] for step in account["steps"]}
    assert account["status"] == "skipped"
    assert steps == {"prepare data": "kept", "prepare backbone": "kept", "look for a finished retraining": "computed"}


def _account(site: Site, answer: dict[str, Any]) -> dict[str, Any]:
    bucket, _, key = answer["metrics"].removeprefix("s3://").partition("/")
    account: dict[str, Any] = json.loads(site.s3().get_object(Bucket=bucket, Key=key)["Body"].read())
    return account


def test_the_champion_loads_with_plain_mlflow_elsewhere_and_holds_no_pickle(site: Site, first: dict[str, Any]) -> None:
    code = """
import glob, json, sys
import mlflow, pandas
model = mlflow.pyfunc.load_model("models:/shapes@champion")
images = [open(path, "rb").read() for path in sorted(glob.glob(sys.argv[1] + "/*/000.png"))] + [b"no image"]
rows = model.predict(pandas.DataFrame({"image": images})).to_dict("records")
ours = [name for name in sys.modules if name.split(".")[0] in ("flows", "tasks", "ray_jobs", "infra", "ray", "prefect")]
folder = mlflow.artifacts.download_artifacts("models:/shapes@champion")
pickles = glob.glob(folder + "/**/*.pkl", recursive=True)
print(json.dumps({"rows": rows, "ours": ours, "pickles": pickles}))
"""
    env = {"MLFLOW_TRACKING_URI": site.status["mlflow"]["uri"], "PATH": os.environ["PATH"], "HOME": str(site.folder)}
    command = [sys.executable, "-W", "ignore", "-c", code, str(site.images)]
    done = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    answer = json.loads(done.stdout.splitlines()[-1])
    assert [row["class"] for row in answer["rows"][:3]].count(None) == 0
    assert all(0 < row["probability"] <= 1 for row in answer["rows"][:3])
    assert "image" in answer["rows"][3]["error"]
    assert answer["ours"] == []
    assert answer["pickles"] == []


def test_the_same_command_again_skips_and_keeps_the_champion(site: Site, first: dict[str, Any]) -> None:
    again = site.json("retrain", site.spec("shapes"))
    assert again["status"] == "skipped"
    assert again["model"] == first["model"]
    assert again["evaluation"] == first["evaluation"]


def test_predict_streams_an_answer_for_each_file_and_goes_on_after_a_bad_one(site: Site, first: dict[str, Any]) -> None:
    bad = site.folder / "bad.png"
    bad.write_bytes(b"\x89PNG no more")
    good = site.images / "circle" / "000.png"
    done = site.run("predict", "shapes@champion", bad, good, site.folder / "missing.png", site.images / "stripes", "--json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [set(row) for row in rows[:3]] == [{"file", "error"}, {"file", "class", "probability"}, {"file", "error"}]
    assert len(rows) == 3 + 30
    assert {row["class"] for row in rows if "class" in row} <= set(CLASSES)


def test_another_search_is_judged_against_the_champion_on_the_same_images(site: Site, first: dict[str, Any]) -> None:
    second = site.json("retrain", site.spec("shapes", search__seed=1))
    assert second["status"] in ("promoted", "kept")
    assert second["model"]["version"] == "2"
    assert second["dataset"]["version"] == first["dataset"]["version"]
    assert second["evaluation"]["champion"]["accuracy"] == first["evaluation"]["challenger"]["accuracy"]
    refused = [rule["name"] for rule in second["decision"]["rules"] if not rule["passed"]]
    assert (second["status"] == "promoted") == (not refused)
    assert second["model"]["champion_version"] == ("2" if second["status"] == "promoted" else "1")


def test_verify_finds_a_missing_an_altered_and_an_extra_object(site: Site, first: dict[str, Any]) -> None:
    uri, bucket = first["publish"]["uri"], site.status["s3"]["bucket"]
    assert site.json("verify", uri)["verified"] is True
    s3, copy = site.s3(), "models/shapes/copy"
    for item in s3.list_objects_v2(Bucket=bucket, Prefix="models/shapes/1/")["Contents"]:
        name = item["Key"].rpartition("/")[2]
        if name == "preprocessing.json":
            continue
        body = s3.get_object(Bucket=bucket, Key=item["Key"])["Body"].read()
        s3.put_object(Bucket=bucket, Key=f"{copy}/{name}", Body=b"[]" if name == "labels.json" else body)
    s3.put_object(Bucket=bucket, Key=f"{copy}/more.txt", Body=b"x")
    done = site.run("verify", f"s3://{bucket}/{copy}", "--json", expect=2)
    problems = {row["key"]: row["problem"] for row in json.loads(done.stdout)["problems"]}
    assert problems == {"preprocessing.json": "missing", "labels.json": "altered", "more.txt": "extra"}


def test_a_zip_with_a_transformer_an_s3_prefix_with_a_convnext_and_a_manifest_all_work(site: Site) -> None:
    archive = site.folder / "images.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(site.images.rglob("*.png")):
            file.write(path, path.relative_to(site.images))
    bucket = site.status["s3"]["bucket"]
    for path in site.images.rglob("*.png"):
        site.s3().upload_file(str(path), bucket, f"incoming/{path.relative_to(site.images)}")
    manifest = site.folder / "manifest.csv"
    lines = [f"images/{path.relative_to(site.images)},{path.parent.name}" for path in sorted(site.images.rglob("*.png"))]
    manifest.write_text("\n".join(["image,label", *lines]), encoding="utf-8")
    small = {"search__lr": [3e-3], "search__max_epochs": 1, "fit__max_epochs": 1}
    answers = [
        site.json("retrain", site.spec("zipped", data__source=str(archive), backbone__name="vit_tiny_patch16_224", **small)),
        site.json("retrain", site.spec("prefixed", data__source=f"s3://{bucket}/incoming", backbone__name="convnext_atto", **small)),
        site.json("search", site.spec("listed", data__source=str(manifest), **small)),
    ]
    assert [answer.get("status") for answer in answers] == ["promoted", "promoted", None]
    assert len({answer["dataset"]["version"] for answer in answers}) == 1


def test_a_command_that_is_told_to_end_ends_its_servers_and_says_how_to_go_on(site: Site) -> None:
    folder = site.folder / "alone"
    folder.mkdir()
    env, spec = {**site.env, "UNFREEZE_HOME": str(folder / "home")}, site.spec("told")
    said = []
    with subprocess.Popen([str(UNFREEZE), "search", str(spec)], env=env, stderr=subprocess.PIPE, text=True) as command:
        assert command.stderr is not None
        for line in command.stderr:
            said.append(line)
            if line.startswith("Searching") and line.endswith("...\n"):
                command.send_signal(signal.SIGTERM)
    assert command.returncode == 130, said
    assert "carries on" in said[-1]
    status = json.loads(subprocess.run([str(UNFREEZE), "status", "--json"], env=env, capture_output=True, check=True).stdout)
    assert {service["state"] for service in status.values()} == {"stopped"}


def test_a_job_killed_in_its_search_carries_on_and_leaves_nothing_running(site: Site) -> None:
    spec = site.spec("killed", search__max_epochs=3, search__lr=[1e-3, 3e-3, 1e-2])
    log = site.folder / "killed.log"
    with log.open("w") as stderr:
        victim = subprocess.Popen([str(UNFREEZE), "retrain", str(spec)], env=site.env, cwd=site.folder, stderr=stderr, stdout=stderr)
        deadline = time.monotonic() + TIMEOUT_S
        while "Searching" not in log.read_text():
            assert victim.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        victim.send_signal(signal.SIGKILL)
        victim.wait()
    answer = site.json("retrain", spec)
    assert answer["status"] == "promoted"
    from mlflow.tracking import MlflowClient

    client = MlflowClient(site.status["mlflow"]["uri"])
    experiment = client.get_experiment_by_name("killed")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert len([run for run in runs if run.data.tags["unfreeze.kind"] == "trial"]) == 6


def test_of_two_equal_commands_at_once_the_later_waits_and_finds_it_done(site: Site) -> None:
    spec = site.spec("pair", search__lr=[3e-3], search__max_epochs=1, fit__max_epochs=1)
    with ThreadPoolExecutor(2) as pool:
        done = [future.result() for future in [pool.submit(site.run, "retrain", spec, "--json") for _ in range(2)]]
    answers = [json.loads(one.stdout) for one in done]
    assert sorted(answer["status"] for answer in answers) == ["promoted", "skipped"]
    waited = next(one for one, answer in zip(done, answers, strict=True) if answer["status"] == "skipped")
    assert "which works on the same spec" in " ".join(waited.stderr.split())
    from mlflow.tracking import MlflowClient

    client = MlflowClient(site.status["mlflow"]["uri"])
    assert [version.version for version in client.search_model_versions("name = 'pair'")] == ["1"]
    experiment = client.get_experiment_by_name("pair")
    assert experiment is not None
    kinds = [run.data.tags["unfreeze.kind"] for run in client.search_runs([experiment.experiment_id])]
    assert sorted(kinds) == ["evaluation", "fit", "search", "trial", "trial"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"backbone__name": "resnet_18"}, "resnet18"),
        ({"search__unfreeze_depth": [0, 99]}, "99"),
        ({"backbone__weights": "package:no_such_package"}, "no_such_package"),
        ({"backbone__weights": "missing.safetensors"}, "missing.safetensors"),
        ({"fit__num_workers": 64}, "64"),
        ({"data__source": "s3://unfreeze/nothing-here"}, "nothing-here"),
        ({"data__source": "s3://no-such-bucket-anywhere/x"}, "no-such-bucket-anywhere"),
    ],
)
def test_a_mistake_that_only_a_server_or_the_backbone_can_see_is_named(site: Site, changes: dict[str, Any], named: str) -> None:
    done = site.run("retrain", site.spec("wrong", **changes), expect=2)
    complaint = done.stderr.split("unfreeze:")[-1]
    assert named in complaint
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_service_that_is_down_ends_with_exit_code_3_and_its_name(site: Site) -> None:
    down = {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
        "UNFREEZE_S3_DEADLINE_S": "1",
    }
    done = site.run("verify", "s3://unfreeze/models/shapes/1", expect=3, **down)
    assert "127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_source_that_grows_keeps_every_image_on_its_side(site: Site, first: dict[str, Any]) -> None:
    grown = site.folder / "grown"
    shutil.copytree(site.images, grown)
    write_folder(site.folder / "more", images_per_class=34)
    for label in CLASSES:
        for path in sorted((site.folder / "more" / label).iterdir())[30:]:
            shutil.copy(path, grown / label / path.name)
    answer = site.json("search", site.spec("shapes", data__source=str(grown), search__lr=[1e-2], search__max_epochs=1))
    assert answer["dataset"]["images"] == 102
    assert answer["dataset"]["version"] != first["dataset"]["version"]
    _assert_its_report_is_kept(site, answer)


def _assert_its_report_is_kept(site: Site, answer: dict[str, Any]) -> None:
    """On this disk, and beside the search's run for any MLflow client."""
    from mlflow.artifacts import download_artifacts

    kept = site.folder / "home" / "reports" / f"shapes-search-{answer['search']['search_id'][:8]}.html"
    fetched = download_artifacts(answer["report"], tracking_uri=site.status["mlflow"]["uri"], dst_path=str(site.folder / "fetched"))
    assert Path(fetched).read_bytes() == kept.read_bytes()
    assert answer["search"]["search_id"].encode() in kept.read_bytes()


def _get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


def _post(url: str, body: Any) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)
