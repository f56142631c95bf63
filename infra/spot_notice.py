"""Tells Ray that this machine will be taken away, as soon as EC2 announces it. Beside the raylet: `python -m infra.spot_notice`.

EC2 gives two minutes. What Ray is told is what Kubernetes tells it too (infra/k8s): the node drains, a fit on it writes a checkpoint
and goes on elsewhere. Needs nothing but Ray's own command, and ends when it has told.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

METADATA_URL = "http://169.254.169.254"
POLL_S = 5.0
TIMEOUT_S = 2.0
TOKEN_LIFE_S = 300
RAY = Path(sys.executable).with_name("ray")
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the address is this machine's own: no proxy knows it

log = logging.getLogger(__name__)


def notice(url: str = METADATA_URL) -> datetime | None:
    """When this machine will be taken away; None where nothing is announced. Raises OSError where nobody answers."""
    asks = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_LIFE_S)}
    token = _answer(urllib.request.Request(f"{url}/latest/api/token", method="PUT", headers=asks))
    request = urllib.request.Request(f"{url}/latest/meta-data/spot/instance-action", headers={"X-aws-ec2-metadata-token": token})
    try:
        found = json.loads(_answer(request))
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise
    return datetime.fromisoformat(found["time"])


def drain_command(seconds_left: int) -> list[str]:
    """What tells Ray, on the machine itself."""
    why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "EC2 takes this spot machine back"]
    return [str(RAY), "drain-node", *why, "--deadline-remaining-seconds", str(max(0, seconds_left))]


def watch(url: str = METADATA_URL) -> int:
    """Wait for the notice and tell Ray; the exit code of Ray's command."""
    while True:
        try:
            at = notice(url)
        except (OSError, ValueError, KeyError) as error:  # asked again: a machine whose metadata is silent for a moment still has its place
            log.warning("no answer from %s: %s", url, error)
            at = None
        if at:
            return subprocess.run(drain_command(int((at - datetime.now(UTC)).total_seconds())), check=False).returncode
        time.sleep(POLL_S)


def _answer(request: urllib.request.Request) -> str:
    with _direct.open(request, timeout=TIMEOUT_S) as response:
        answer: bytes = response.read()
    return answer.decode()


if __name__ == "__main__":
    sys.exit(watch())
