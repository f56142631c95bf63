"""Objects to S3 against boto3's own transfer and rclone: python benchmarks/transfers.py [--small]

Many small objects and one large, to the embedded S3 server on this machine, which takes its share of the cores. Arms: boto3's upload_file
one after the other, as its guide teaches; all files in one of boto3's transfer managers, in Python and with the CRT client;
`rclone copy` with 16 transfers; ours. Each arm's objects are deleted before the next one. Besides the wall time, the CPU time an object of
the client and of the server, which other load on the machine hardly changes: (client + server) / cores is what no client of this server can
beat on this machine. The last row publishes a folder a second time, and counts what was sent.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from bench import Figure, home, in_turns, medians, options, report

SMALL_BYTES = 100_000
BUCKET = "unfreeze"
THREADS = 16
GOAL = 3.0


def make_files(folder: Path, count: int, size_bytes: int) -> list[Path]:
    """Files of random bytes."""
    folder.mkdir()
    for number in range(count):
        with (folder / f"{number:05}").open("wb") as file:
            for start in range(0, size_bytes, 2**24):
                file.write(os.urandom(min(2**24, size_bytes - start)))
    return sorted(folder.iterdir())


def boto3_one_by_one(files: list[Path], prefix: str) -> None:
    import boto3

    client = boto3.session.Session().client("s3")
    for path in files:
        client.upload_file(str(path), BUCKET, f"{prefix}/{path.name}")


def boto3_manager(files: list[Path], prefix: str) -> None:
    import boto3
    from boto3.s3.transfer import TransferConfig, create_transfer_manager

    client = boto3.session.Session().client("s3")
    with create_transfer_manager(client, TransferConfig(preferred_transfer_client="classic")) as manager:
        for under_way in [manager.upload(str(path), BUCKET, f"{prefix}/{path.name}") for path in files]:
            under_way.result()


def boto3_crt(files: list[Path], prefix: str) -> None:
    """boto3 itself insists on TLS here, which this server does not speak: so the same classes, told so."""
    from botocore.session import Session
    from s3transfer.crt import BotocoreCRTCredentialsWrapper, BotocoreCRTRequestSerializer, CRTTransferManager, create_s3_crt_client

    session, region = Session(), os.environ["AWS_DEFAULT_REGION"]
    credentials = BotocoreCRTCredentialsWrapper(session.get_credentials()).to_crt_credentials_provider()
    client = create_s3_crt_client(region, crt_credentials_provider=credentials, use_ssl=False)
    with CRTTransferManager(client, BotocoreCRTRequestSerializer(session, {"region_name": region})) as manager:
        for under_way in [manager.upload(str(path), BUCKET, f"{prefix}/{path.name}") for path in files]:
            under_way.result()


def rclone(files: list[Path], prefix: str) -> None:
    program = Path(sys.executable).with_name("rclone")
    remote = f":s3,provider=Other,env_auth=true,force_path_style=true,endpoint='{os.environ['AWS_ENDPOINT_URL']}':{BUCKET}/{prefix}"
    command = [str(program), "copy", str(files[0].parent), remote, "--transfers", str(THREADS), "--config", os.devnull]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def ours(files: list[Path], prefix: str) -> None:
    from infra.in_threads import in_threads
    from infra.object_store import S3ObjectStore

    store = S3ObjectStore()
    for _ in in_threads(lambda path: store.upload(path, f"s3://{BUCKET}/{prefix}/{path.name}"), files, THREADS):
        pass


ARMS: dict[str, Callable[[list[Path], str], None]] = {
    "boto3 one by one": boto3_one_by_one, "boto3 manager": boto3_manager, "CRT manager": boto3_crt, "rclone": rclone, "ours": ours,
}  # fmt: skip


NOT_LARGE = "CRT manager"
"""Its client finds no upload id in this server's answers, so it can send no object in parts."""


def server_cpu_s() -> float:
    """What the S3 server has used."""
    from infra import settings, stack_file

    times = psutil.Process(stack_file.read(settings.home_dir()).servers["s3"].leader.pid).cpu_times()
    return float(times.user + times.system)


def arms_of(files: list[Path], root: Path, cpu: dict[str, list[float]], server: dict[str, list[float]]) -> dict[str, Callable[[], float]]:
    """Each arm as wall seconds of one upload of all files; what arrived is counted, then deleted."""
    size_bytes = sum(path.stat().st_size for path in files)

    def timed(name: str) -> float:
        wall, used, served = time.perf_counter(), _cpu_s(), server_cpu_s()
        ARMS[name](files, "arm")
        wall, used, served = time.perf_counter() - wall, _cpu_s() - used, server_cpu_s() - served
        cpu.setdefault(name, []).append(used)
        server.setdefault(name, []).append(served)
        arrived = [path.stat().st_size for path in (root / "arm").iterdir()]
        assert (len(arrived), sum(arrived)) == (len(files), size_bytes), name
        shutil.rmtree(root / "arm")
        print(f"{name}: {wall:.1f} s, CPU of the client {used:.1f} s, of the server {served:.1f} s", flush=True)
        return wall

    names = [name for name in ARMS if name != NOT_LARGE or len(files) > 1]
    return {name: lambda name=name: timed(name) for name in names}  # type: ignore[misc]  # a default binds the name


def _cpu_s() -> float:
    """Of this process and of those that it has run."""
    mine = os.times()
    return mine.user + mine.system + mine.children_user + mine.children_system


def publish_twice(files: list[Path]) -> tuple[int, int]:
    """How many objects the first and the second publish of the same folder sent."""
    from infra.committed_folder import commit
    from infra.object_store import S3ObjectStore

    named: dict[str, Path | bytes] = {path.name: path for path in files}
    first, second = (commit(S3ObjectStore(), f"s3://{BUCKET}/published", named).transferred for _ in range(2))
    return first, second


def measure(files: list[Path], what: str, root: Path, rounds: int, goals: dict[str, float]) -> tuple[list[Figure], dict[str, Any]]:
    cpu: dict[str, list[float]] = {}
    server: dict[str, list[float]] = {}
    found = in_turns(arms_of(files, root, cpu, server), rounds)
    middle, used, served = medians(found), medians(cpu), medians(server)
    figures = []
    for name in (name for name in middle if name != "ours"):
        against = f"{what}: ours against {name} ({middle[name]:.1f} s against {middle['ours']:.1f})"
        figures.append(Figure(against, middle[name] / middle["ours"], "x", goals.get(name)))
    for name in middle:
        of_server = f"(and of the server {1000 * served[name] / len(files):.3g})"
        figures.append(Figure(f"{what}: CPU of {name} an object {of_server}", 1000 * used[name] / len(files), " ms"))
    bound = (used["ours"] + served["ours"]) / (os.cpu_count() or 1) / middle["ours"]
    figures.append(Figure(f"{what}: ours, share of all cores' time that it and the server use", 100 * bound, " %"))
    return figures, {"wall_s": found, "cpu_s": cpu, "server_cpu_s": server}


def main() -> None:
    chosen = options(__doc__, objects=(10_000, 300, "small objects"), megabytes=(2_000, 100, "size of the large object"))
    from infra import local_stack

    with home() as folder, local_stack.session(["s3"], storage=local_stack.DEFAULT_STORAGE):
        root = next(path for path in (folder / "home").rglob(BUCKET) if path.is_dir())
        small = make_files(folder / "small", chosen.more.objects, SMALL_BYTES)
        goals = {} if chosen.small else {"boto3 one by one": GOAL}
        figures, detail = measure(small, f"{len(small)} x 100 kB", root, chosen.rounds, goals)
        first, second = publish_twice(small[:100])
        large = make_files(folder / "large", 1, chosen.more.megabytes * 10**6)
        more, large_detail = measure(large, f"1 x {chosen.more.megabytes} MB", root, chosen.rounds, {})
        figures += [*more, Figure(f"objects sent by a publish: {first} at first, then", float(second), "", 0.0, higher=False)]
    report("Objects to S3", figures, chosen, small=detail, large=large_detail)


if __name__ == "__main__":
    main()
