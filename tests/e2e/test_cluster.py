"""The whole job on a cluster of several hosts, of which one is lost in the middle: `make e2e-cluster`."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest

from tests.e2e import own_world
from tests.e2e.cluster_bed import Bed, cluster_bed
from tests.site import TIMEOUT_S, UNFREEZE, Site

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not own_world.inside(), reason="needs hosts of its own: make e2e-cluster")]
RANK = "RayTrainWorker"
EPOCHS = 40
"""Some 20 s on this data: time enough to lose hosts in."""


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    with cluster_bed(tmp_path_factory.mktemp("bed")) as made:
        yield made


@pytest.fixture(scope="module")
def site(bed: Bed, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Where the commands run: no machine of the cluster. The data is on S3."""
    made = Site(tmp_path_factory.mktemp("site"))
    made.env |= bed.environment | {"HOME": str(made.folder)}
    for path in made.images.rglob("*.png"):
        _s3(bed).upload_file(str(path), "unfreeze", f"incoming/{path.relative_to(made.images)}")
    return made


@pytest.fixture(scope="module")
def undisturbed(bed: Bed, site: Site) -> dict[str, Any]:
    """What the whole job answers where nothing happens to it, and on which hosts its fit was."""
    command = Command(site, bed, "undisturbed")
    hosts: set[str] = set()
    command.until(lambda: command.has_ended or hosts.update(bed.where(RANK)))
    return command.answer() | {"hosts": hosts}


def test_the_whole_job_runs_with_its_fit_on_two_hosts(bed: Bed, undisturbed: dict[str, Any]) -> None:
    assert undisturbed["status"] == "promoted"
    assert undisturbed["search"]["trials"] == 4
    assert undisturbed["fit"]["workers"] == 2
    assert undisturbed["publish"]["verified"] is True
    assert undisturbed["hosts"] == {"one", "two"}
    assert set(bed.jobs().values()) == {"SUCCEEDED"}


def test_ctrl_c_stops_a_job_and_a_killed_command_leaves_it_to_the_next(bed: Bed, site: Site, undisturbed: dict[str, Any]) -> None:
    """The same command four times, by the job server's address: interrupted, then killed in its search, killed in its fit, left alone."""
    before = bed.jobs()

    def attempts(kind: str) -> list[str]:
        """The states of the jobs of one step, in their order."""
        return [status for job_id, status in sorted(bed.jobs().items()) if job_id not in before and _kind(job_id) == kind]

    def start() -> Command:
        return Command(site, bed, "ended", RAY_ADDRESS=bed.job_server)

    interrupted = start()
    interrupted.until(lambda: attempts("run-search") == ["RUNNING"])
    assert interrupted.end(signal.SIGINT) == 130
    assert attempts("run-search") == ["STOPPED"]
    killed = start()
    killed.until(lambda: attempts("run-search") == ["STOPPED", "RUNNING"])
    killed.end(signal.SIGKILL)
    killed = start()
    killed.until(killed.checkpoints)
    killed.end(signal.SIGKILL)
    assert _result(start().answer()) == _result(undisturbed)
    assert attempts("run-search") == ["STOPPED", "SUCCEEDED"]  # the killed commands' jobs were taken up, not begun anew
    assert attempts("run-fit") == ["SUCCEEDED"]


def test_hosts_lost_amid_the_fit_cost_no_result(bed: Bed, site: Site, undisturbed: dict[str, Any]) -> None:
    """First one whose cable is pulled, then one without power. For each another host comes, as on a cluster that grows again."""
    command = Command(site, bed, "lost")
    command.until(command.checkpoints)
    assert bed.hosts["one"].runs(RANK)
    bed.hosts["one"].cut_off()
    bed.add_node("three")
    command.until(lambda: bed.hosts["three"].runs(RANK))
    done = command.checkpoints()
    command.until(lambda: command.checkpoints() - done)
    bed.hosts["two"].power_off()
    bed.add_node("four")
    command.until(lambda: bed.hosts["four"].runs(RANK))
    found, expected = _result(command.answer()), _result(undisturbed)
    assert found["found"] == expected["found"]
    # a fit on fewer workers sees the same images in the same steps, and adds floats up in another order
    assert found["accuracies"] == pytest.approx(expected["accuracies"], abs=0.1)


class Command:
    """`unfreeze retrain` of the small data, in a process of its own; under another name all is done anew, with the same seed."""

    def __init__(self, site: Site, bed: Bed, name: str, **env: str) -> None:
        self.bed, self.name = bed, name
        spec = site.spec(
            name,
            {"backbone": {"name": "resnet10t", "weights": "none"}, "storage": f"s3://unfreeze/{name}"},
            data__source="s3://unfreeze/incoming",
            search__unfreeze_depth=[1, 2],
            fit__num_workers=2,
            fit__max_epochs=EPOCHS,
            fit__patience=EPOCHS,
        )
        self.out, self.err = site.folder / f"{name}.out", site.folder / f"{name}.err"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [str(UNFREEZE), "retrain", str(spec), "--json"], env=site.env | env, cwd=site.folder, stdout=out, stderr=err
            )

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def until(self, condition: Callable[[], object]) -> None:
        """Wait, at most as long as a command may take."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert not self.has_ended or condition(), self._told()
            assert time.monotonic() < deadline, self._told()
            time.sleep(0.2)

    def checkpoints(self) -> set[str]:
        """Those of its fit that are whole."""
        found = _s3(self.bed).list_objects_v2(Bucket="unfreeze", Prefix=f"{self.name}/fits/").get("Contents", [])
        return {item["Key"] for item in found if "/checkpoints/" in item["Key"] and item["Key"].endswith("/MANIFEST.json")}

    def end(self, number: signal.Signals) -> int:
        """Send it this signal; its exit code."""
        self.process.send_signal(number)
        return self.process.wait(TIMEOUT_S)

    def answer(self) -> dict[str, Any]:
        """What it prints at its end."""
        assert self.process.wait(TIMEOUT_S) == 0, self._told()
        found: dict[str, Any] = json.loads(self.out.read_text())
        return found

    def _told(self) -> str:
        return f"{self.err.read_text(errors='replace')[-6000:]}\n{self.bed.last_words()}"


def _s3(bed: Bed) -> Any:
    environment = bed.environment
    return boto3.session.Session().client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=environment["AWS_DEFAULT_REGION"],
    )


def _kind(job_id: str) -> str:
    """The step whose work a job does, from unfreeze-STEP-DIGEST-ATTEMPT."""
    return job_id.removeprefix("unfreeze-").rsplit("-", 2)[0]


def _result(answer: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on what happened on the way."""
    best, fit = answer["search"]["best"], answer["fit"]
    return {
        "found": [answer["status"], answer["dataset"]["version"], best["unfreeze_depth"], best["lr"], best["accuracy"], fit["epochs"]],
        "accuracies": [fit["accuracy"], answer["evaluation"]["challenger"]["accuracy"]],
    }
