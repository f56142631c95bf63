"""Chaos: the whole job is broken at random moments and ends as if nothing had been: make chaos [ARGS="--small --seed N --only FAULT"]

One site with a stack that stays up and an S3 server of its own. An undisturbed `unfreeze retrain` first; then rounds, each a retraining
of its own (name and storage) over the same images, points and seed, so that all must end alike. In each, one fault comes at a moment of
one step, both drawn from the seed; what it stops is started again, once, by the same command. Checked: exit codes; the undisturbed
result, down to the digests of the weights; no finished step, trial or epoch computed again; every folder with a manifest verifies, and
nothing was read of one without; one ledger entry, one version; nothing RUNNING in MLflow and Prefect; no process, actor, task or
placement group left. Ends with 1 where a round differs.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import chaos_checks as checks
import psutil
from bench import Figure, Options, home, options, report
from chaos_site import BUCKET, ROUND, Command, Site, called, kill, one_of, site
from rich.console import Console
from rich.table import Table

POLL_S = 0.02
SETTLE_S = 2.0
LONG_OUTAGE_S, SHORT_OUTAGE_S = 60.0, 8.0
MOST_ROOM_BYTES = 24 * 2**20
"""A little more than the backbone, so that any file may be the one that is cut off."""
JUMP_S = 600
"""Less than the quarter of an hour beyond which S3 refuses a signature for its time."""
SCHEDULERS = ("asha", "ladder")
FIT = "Fitting"
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
NOT_AT_WORK = ("ray::IDLE", *AGENTS)
STARTS = "starting"
DONE = ": done in "


@dataclass(frozen=True)
class Fault:
    """What is broken. `inject` says whether there was anything to break yet; `exits` is how the command may end for it, besides 0."""

    what: str
    inject: Callable[[Site, Command, random.Random], bool]
    exits: tuple[int, ...] = ()
    step: str | None = None
    clock: bool = False


@dataclass
class Round:
    """One fault, its moment, and how the job ended."""

    number: int
    scheduler: str
    fault: str
    step: str
    after_s: float
    known: str = ""
    exits: list[int | None] = field(default_factory=list)
    seconds: float = 0.0
    extra_s: float = 0.0
    sent_again: int = 0
    redone: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def cells(self) -> tuple[str, ...]:
        moment, ended = f"{self.after_s:.1f} s into {self.step}", ", ".join(map(str, self.exits))
        result = "; ".join(self.problems + self.redone) or "the same"
        cost = f"{self.extra_s:+.0f} s, {self.sent_again} objects"
        return str(self.number), self.fault, moment, self.scheduler, self.known, ended, cost, result


@dataclass(frozen=True)
class Undisturbed:
    """What every round of a scheduler must find, and when its steps begin: (title, seconds)."""

    outcome: dict[str, Any]
    seconds: float
    steps: list[tuple[str, float]]


def _flow(site: Site, command: Command, rng: random.Random) -> bool:
    command.process.kill()
    return True


def _ctrl_c(site: Site, command: Command, rng: random.Random) -> bool:
    command.process.send_signal(rng.choice((signal.SIGINT, signal.SIGTERM)))
    return True


def _everything(site: Site, command: Command, rng: random.Random) -> bool:
    """As when the power fails: the command, S3 and the whole stack."""
    servers = [process for name in ("mlflow", "prefect", "ray") for process in site.family(name)]
    command.process.kill()
    site.s3.kill()
    return kill(servers)


def _worker(site: Site, command: Command, rng: random.Random) -> bool:
    """A process of Ray's that does something now."""
    at_work = [one for one in site.family("ray") if called(one).startswith("ray::") and not called(one).startswith(NOT_AT_WORK)]
    return kill(one_of(at_work, rng))


def _agent(site: Site, command: Command, rng: random.Random) -> bool:
    """One of the two that Ray's raylet ends with."""
    return kill(one_of([one for one in site.family("ray") if called(one).startswith(AGENTS)], rng))


def _fit_worker(site: Site, command: Command, rng: random.Random) -> bool:
    return kill(one_of([one for one in site.family("ray") if "RayTrainWorker" in called(one)], rng))


def _raylet(site: Site, command: Command, rng: random.Random) -> bool:
    return kill([one for one in site.family("ray") if one.name() == "raylet"])


def _server(name: str) -> Callable[[Site, Command, random.Random], bool]:
    return lambda site, command, rng: kill(site.family(name))


def _s3(site: Site, command: Command, rng: random.Random) -> bool:
    """Its host starts it again a few seconds later."""
    site.s3.kill()
    site.later(rng.uniform(1, SHORT_OUTAGE_S), site.s3.have)
    return True


def _refused(site: Site, command: Command, rng: random.Random) -> bool:
    site.timers.append(site.proxy.refuse_for(rng.uniform(1, 2 * SHORT_OUTAGE_S)))
    return True


def _throttled(seconds: float) -> Callable[[Site, Command, random.Random], bool]:
    def inject(site: Site, command: Command, rng: random.Random) -> bool:
        site.proxy.answer(503, "SlowDown", seconds=seconds)
        return True

    return inject


def _slow(site: Site, command: Command, rng: random.Random) -> bool:
    site.proxy.slow(100_000, times=100)
    return True


def _truncated(site: Site, command: Command, rng: random.Random) -> bool:
    site.proxy.truncate(rng.randrange(40), times=20)
    return True


def _lost(site: Site, command: Command, rng: random.Random) -> bool:
    site.proxy.lose_answer(times=20)
    return True


def _full(site: Site, command: Command, rng: random.Random) -> bool:
    site.disk.fill(rng.choice((0, rng.randrange(MOST_ROOM_BYTES))))
    return True


def _clock(seconds: int) -> Callable[[Site, Command, random.Random], bool]:
    def inject(site: Site, command: Command, rng: random.Random) -> bool:
        site.clock.jump(seconds)
        return True

    return inject


KILLED, BY_RAY, FAILED, INTERRUPTED = -signal.SIGKILL, 1, 3, 130
FAULTS = {
    "flow": Fault("the flow's process, which is Ray's driver, is killed", _flow, (KILLED,)),
    "ctrl-c": Fault("Ctrl-C, or TERM", _ctrl_c, (INTERRUPTED,)),
    "everything": Fault("the power fails", _everything, (KILLED,)),
    "worker": Fault("a Ray worker that is at work is killed", _worker),
    "fit-worker": Fault("a worker of the fit is killed", _fit_worker, step=FIT),
    "raylet": Fault("Ray's raylet, a whole machine of its cluster, is killed", _raylet, (FAILED,)),
    "agent": Fault("an agent of the raylet's, which ends with it, is killed", _agent, (FAILED, BY_RAY)),
    "mlflow": Fault("MLflow's server is killed", _server("mlflow"), (FAILED,)),
    "prefect": Fault("Prefect's server is killed", _server("prefect"), (FAILED,)),
    "s3": Fault("S3's server is killed, and started again a few seconds later", _s3),
    "s3-refused": Fault("S3 refuses connections for a while", _refused),
    "s3-503": Fault("S3 answers 503 for a few seconds", _throttled(SHORT_OUTAGE_S)),
    "s3-503-minute": Fault("S3 answers 503 for 60 s", _throttled(LONG_OUTAGE_S)),
    "s3-slow": Fault("100 answers of S3 come with 100 kB/s", _slow),
    "s3-truncated": Fault("20 answers of S3 break off", _truncated),
    "s3-lost": Fault("20 answers to writes are lost", _lost),
    "disk-full": Fault("the scratch disk is full, or nearly, until the command ends", _full, (FAILED,)),
    "clock-forward": Fault("the command's clock jumps ten minutes ahead", _clock(JUMP_S), clock=True),
    "clock-back": Fault("the command's clock jumps ten minutes back", _clock(-JUMP_S), (FAILED,), clock=True),
}
SMALL = ("flow", "fit-worker", "s3-503", "everything", "s3-truncated")


def deck(wanted: Sequence[str], seed: int) -> Iterator[str]:
    """The faults again and again, each time in another order, so that each comes about equally often."""
    rng = random.Random(seed)
    while True:
        yield from rng.sample(wanted, len(wanted))


def steps_of(lines: str) -> list[tuple[str, float]]:
    """Each step of the job by the beginning of its title, up to what may differ, with its seconds; the start of the command first."""
    ended = [line.split(DONE) for line in lines.splitlines() if DONE in line]
    found = [(re.split(r",| \d", title)[0].strip(), float(lasted.removesuffix(" s"))) for title, lasted in ended]
    return [(STARTS, 1.0), *found]


def undisturbed(site: Site, scheduler: str) -> Undisturbed:
    spec = site.spec(f"undisturbed-{scheduler}", scheduler)
    started = time.monotonic()
    command = site.start(spec)
    if (code := command.wait()) != 0:  # None: it hung
        raise RuntimeError(f"exit {code}: {command.lines[-3000:]}")
    seconds = time.monotonic() - started
    answer = json.loads(command.out.read_text())
    early = checks.read_too_early(asked(site), spec.stem)
    assert not early, early
    return Undisturbed(checks.outcome(answer, site.on_s3(spec.stem)), seconds, steps_of(command.lines))


def asked(site: Site) -> list[tuple[str, str]]:
    return [(one.method, one.path) for one in site.proxy.asked]


def one_round(site: Site, number: int, name: str, scheduler: str, expected: Undisturbed, seed: int) -> Round | None:
    """Break the job once and let it end; None where it had ended before there was anything to break."""
    fault, rng = FAULTS[name], random.Random(f"{seed}/{number}")
    step, lasts_s = rng.choice([one for one in expected.steps if one[0].startswith(fault.step or "")])
    found = Round(number, scheduler, name, step, round(rng.random() * lasts_s, 2))
    spec = site.spec(f"chaos-{number:03d}", scheduler)
    site.clean()
    site.proxy.asked.clear()
    started, env = time.monotonic(), site.clock.environment if fault.clock else {}
    command = site.start(spec, env=env)
    before = _break(site, command, found, fault, rng)
    if before is None:
        command.wait()
        return None
    requests = len(asked(site))
    found.known = str(before)
    found.exits.append(command.wait())
    site.heal()
    if found.exits[-1] != 0:
        if found.exits[-1] not in fault.exits:
            found.problems.append(f"the command {_told(found.exits[-1])}: {command.lines[-500:]}")
        command = site.start(spec, attempt=2, env=env)
        found.exits.append(command.wait())
    found.seconds = time.monotonic() - started
    found.extra_s = found.seconds - expected.seconds
    found.sent_again = checks.written_again(asked(site)[:requests], asked(site)[requests:], spec.stem)
    if found.exits[-1] != 0:
        found.problems.append(f"the same command again {_told(found.exits[-1])}: {command.lines[-500:]}")
        return found
    try:
        _check(site, spec.stem, json.loads(command.out.read_text()), before, expected, found)
    except Exception as error:  # the other rounds still count
        found.problems.append(f"it could not be checked: {error!r}"[:500])
    return found


def _break(site: Site, command: Command, found: Round, fault: Fault, rng: random.Random) -> checks.Finished | None:
    """Wait for the moment and inject the fault; what was finished by then. None where the command ended before."""
    while found.step != STARTS and found.step not in command.lines and not command.is_over:
        time.sleep(POLL_S)
    moment = time.monotonic() + found.after_s
    while time.monotonic() < moment and not command.is_over:
        time.sleep(POLL_S)
    while not command.is_over:
        before = checks.finished(site.on_s3(command.log.name.partition(".")[0]))
        if not command.is_over and fault.inject(site, command, rng):
            return before
        time.sleep(POLL_S)
    return None


def _told(code: int | None) -> str:
    return "hung" if code is None else f"ended with {code}"


def _check(site: Site, name: str, answer: dict[str, Any], before: checks.Finished, expected: Undisturbed, found: Round) -> None:
    """Note in `found` whatever is not as it should be."""
    from infra import local_stack, tracking

    root = site.on_s3(name)
    wanted = {"promoted"} | ({"skipped"} if len(found.exits) > 1 else set())  # it was killed after its last write
    if answer["status"] not in wanted:
        found.problems.append(f"status {answer['status']}")
    found.problems += checks.differences(checks.outcome(answer, root), expected.outcome)
    found.redone += checks.done_again(before, root)
    found.problems += checks.read_too_early(asked(site), name)
    found.problems += checks.verified(root, BUCKET)
    site.clean()
    checks.settled(lambda: [name for name, one in local_stack.status().items() if one["state"] != "running"])  # a busy server answers late
    status = local_stack.status()
    os.environ["MLFLOW_TRACKING_URI"] = status["mlflow"]["uri"]
    tracking.client.cache_clear()  # a server that was started again may be elsewhere
    found.problems += checks.one_promotion(name, f"s3://{BUCKET}/{name}")
    found.problems += checks.running_in_mlflow(name)
    del os.environ["MLFLOW_TRACKING_URI"]
    found.problems += checks.settled(lambda: checks.running_in_prefect(status["prefect"]["api_url"]))
    found.problems += checks.settled(lambda: checks.left_in_ray(status["ray"]))
    found.problems += checks.settled(lambda: left_processes(site, str(site.folder / f"{name}.yaml")))


def left_processes(site: Site, spec: str) -> list[str]:
    """Processes of the round's commands that live, and are none of the stack's."""
    from infra import processes, stack_file

    stack = stack_file.read(site.folder / "home")
    records = [record for server in stack.servers.values() for record in (server.leader, *server.members)]
    ours = {member.pid for member in processes.family([*records, *([stack.worker] if stack.worker else [])])}
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid not in ours and process.environ().get(ROUND) == spec and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"process {process.pid} is left: {called(process)[:80]}")
        except psutil.Error:
            continue
    return found


def faults_here(site: Site, wanted: Sequence[str]) -> list[str]:
    """The faults that can be had on this machine; what cannot is said."""
    missing = {"disk-full": site.disk.missing, "clock-forward": site.clock.missing, "clock-back": site.clock.missing}
    for name in wanted:
        if missing.get(name):
            print(f"skipped here: {name}: {missing[name]}", flush=True)
    return [name for name in wanted if not missing.get(name)]


def chaos(chosen: Options, site: Site) -> list[Round]:
    """Every round, told as it ends."""
    wanted = faults_here(site, chosen.more.only.split(",") if chosen.more.only else SMALL if chosen.small else list(FAULTS))
    schedulers = SCHEDULERS[:1] if chosen.small or chosen.more.only else SCHEDULERS
    expected = {scheduler: undisturbed(site, scheduler) for scheduler in schedulers}
    for scheduler, one in expected.items():
        print(f"undisturbed, {scheduler}: {one.seconds:.1f} s: {', '.join(f'{title} {s:.1f}' for title, s in one.steps)}", flush=True)
    rounds: list[Round] = []
    again: list[str] = []
    faults, number = deck(wanted, chosen.seed), 0
    while len(rounds) < chosen.rounds:
        number += 1
        name, scheduler = again.pop() if again else next(faults), schedulers[number % len(schedulers)]
        found = one_round(site, number, name, scheduler, expected[scheduler], chosen.seed)
        if found is None:
            print(f"{number}: {name}: the job had ended; another moment", flush=True)
            again.append(name)
            continue
        rounds.append(found)
        print(": ".join(found.cells), flush=True)
    return rounds


def main() -> None:
    chosen = options(__doc__, rounds=(50, 5), only=f"comma-separated faults: {', '.join(FAULTS)}")
    if unknown := set(filter(None, chosen.more.only.split(","))) - set(FAULTS):
        sys.exit(f"no such fault: {', '.join(sorted(unknown))}; there are {', '.join(FAULTS)}")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # a time limit stops the servers, too
    with home() as folder, site(folder, chosen.seed) as here:
        rounds = chaos(chosen, here)
    table = Table(title=f"chaos, seed {chosen.seed}")
    for column in ("", "fault", "moment", "scheduler", "finished by then", "exits", "cost", "result"):
        table.add_column(column, overflow="fold")
    for one in rounds:
        table.add_row(*one.cells)
    Console(width=180).print(table)
    good = sum(not one.problems and not one.redone for one in rounds)
    figures = [
        Figure("rounds that end as undisturbed", good, f" of {len(rounds)}", len(rounds)),
        Figure("finished steps, folders, trials or epochs computed again", sum(len(one.redone) for one in rounds), "", 0, higher=False),
        Figure("rounds in which the same command ran again", sum(len(one.exits) > 1 for one in rounds)),
        Figure("objects of unfinished work sent again", sum(one.sent_again for one in rounds)),
        Figure("seconds that a fault cost, on average, outages included", sum(one.extra_s for one in rounds) / len(rounds), " s"),
    ]
    report("Chaos of the whole job", figures, chosen, chaos=[vars(one) for one in rounds])
    sys.exit(good < len(rounds))


if __name__ == "__main__":
    main()
