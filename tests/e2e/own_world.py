"""A command in a world of its own on this machine: own network, own processes, own mounts; all of it is gone when the command has ended.

Run: python -m tests.e2e.own_world COMMAND...
Nothing of it is seen outside, and whatever ends the command, also `kill -9`, ends what it has started: that is the kernel's to do.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

MARK, FIRST = "UNFREEZE_TEST_WORLD", "--first"
NETWORK = "10.77.0"
HERE = f"{NETWORK}.1"
BRIDGE = "bed"
PROGRAMS = ("unshare", "nsenter", "ip", "mount")
NEW = ("--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child")
"""Also of a host within the world (`cluster_bed.py`)."""


def why_not() -> str | None:
    """Why no such world can be made here; None where it can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not found (Debian: apt-get install iproute2 util-linux)"
    command = [*_unshare(), "sh", "-c", f"ip link add {BRIDGE} type bridge && unshare --uts --net --pid --fork --kill-child true"]
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if tried.returncode == 0 else f"the system refuses it ({tried.stderr.strip() or f'exit {tried.returncode}'})"


def inside() -> bool:
    """Whether this process is in such a world."""
    return MARK in os.environ


def _unshare() -> list[str]:
    rootless = () if os.geteuid() == 0 else ("--user", "--map-root-user")
    return ["unshare", *rootless, *NEW]


def _enter(command: Sequence[str]) -> int:
    why = why_not()
    if why is None:
        os.execvp("unshare", [*_unshare(), sys.executable, "-m", "tests.e2e.own_world", FIRST, *command])
    print(f"Skipped: no hosts can be made on this machine: {why}.")  # noqa: T201
    return 0


def _be_first(command: Sequence[str]) -> int:
    """What the world's first process does: when it ends, the kernel ends all others."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a first process has no handlers but its own
    signal.signal(signal.SIGINT, lambda *_: None)  # the command gets it too, and may tidy up
    for arguments in (f"link add {BRIDGE} type bridge", f"addr add {HERE}/24 dev {BRIDGE}", f"link set {BRIDGE} up", "link set lo up"):
        subprocess.run(["ip", *arguments.split()], check=True)
    with tempfile.TemporaryDirectory(prefix="unfreeze-world-") as folder:
        names = Path(folder) / "resolv.conf"
        names.write_text("nameserver 127.0.0.1\n")  # nobody is there, and says so at once
        subprocess.run(["mount", "--bind", names, "/etc/resolv.conf"], check=True)
        environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        return subprocess.run(command, env={**environment, MARK: "1"}, check=False).returncode


if __name__ == "__main__":
    of_the_world = sys.argv[1:2] == [FIRST]
    sys.exit(_be_first(sys.argv[2:]) if of_the_world else _enter(sys.argv[1:]))
