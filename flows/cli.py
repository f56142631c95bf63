"""The command `unfreeze`: `unfreeze --help`."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import typer

from flows import answers
from infra.errors import UnfreezeError, UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Transfer learning that is searched, judged and published.",
)

cache_app = typer.Typer()
app.add_typer(cache_app, name="cache")

DEMO_SPEC = Path(__file__).resolve().parent.parent / "examples" / "emoji.yaml"
INTERRUPTED = 130
RARELY = (100_000, 50, 50)
"""What a command imports lives as long as it does; to look for garbage in it as often as Python does by default takes 0.6 s."""
DEFAULT_STORAGE = "s3://unfreeze"

SpecPath = Annotated[Path, typer.Argument(metavar="SPEC.yaml", help="The spec; examples/emoji.yaml is one to copy.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="a.b=value", help="Override one value of the spec; may be repeated.")]
Storage = Annotated[str, typer.Option(metavar="s3://...", help="Bucket and optional prefix, as `storage:` in the spec.")]
ModelName = Annotated[str, typer.Argument(metavar="NAME", help="The registered model, `name:` in the spec.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")]


@app.command()
def demo(overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Run the main job on the bundled images."""
    from flows import commands

    answers.show(commands.retrain(DEMO_SPEC, overrides or []), as_json=as_json, render=answers.retrain)


@app.command()
def retrain(spec: SpecPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Prepare, search, fit, evaluate, register, publish and promote the next version."""
    from flows import commands

    answers.show(commands.retrain(spec, overrides or []), as_json=as_json, render=answers.retrain)


@app.command()
def search(spec: SpecPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """The search over unfreeze depth and learning rate alone."""
    from flows import commands

    answers.show(commands.search(spec, overrides or []), as_json=as_json, render=answers.search)


@app.command()
def deploy(
    spec: SpecPath,
    cron: Annotated[str, typer.Option(metavar='"0 2 * * *"', help="Minute, hour, day of month, month, day of week.")],
    overrides: Overrides = None,
    overlap: Annotated[
        Literal["skip", "queue"], typer.Option(help="A start while the last one is still going: refused, or it waits.")
    ] = "skip",
    timezone: Annotated[str, typer.Option(metavar="ZONE", help="Of the schedule, as Europe/Berlin.")] = "UTC",
    as_json: AsJson = False,
) -> None:
    """Retrain by Prefect's clock: create or change the scheduled deployment."""
    from flows import commands

    answer = commands.deploy(spec, overrides or [], cron=cron, timezone=timezone, overlap=overlap)
    answers.show(answer, as_json=as_json, render=answers.deployed)


@app.command()
def promote(
    name: ModelName,
    version: Annotated[str | None, typer.Option(metavar="N", help="By default the challenger.")] = None,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why; it goes into the ledger.")] = "",
    approve: Annotated[str | None, typer.Option(metavar="ID", help="Approve a pending request.")] = None,
    reject: Annotated[str | None, typer.Option(metavar="ID", help="Reject a pending request.")] = None,
    as_json: AsJson = False,
) -> None:
    """Judge a version against the champion, and let it serve if the gate passes; or answer a request for approval."""
    from flows import commands

    if (approve and reject) or ((approve or reject) and version):
        raise UserError("--approve, --reject and --version exclude one another.", "Give one of them.")
    if approve or reject:
        answer = commands.answer(name, approve or reject or "", approve=approve is not None, reason=reason)
    else:
        answer = commands.promote(name, version, reason)
    answers.show(answer, as_json=as_json, render=answers.promote)


@app.command()
def rollback(
    name: ModelName,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why; it goes into the ledger.")],
    to: Annotated[str | None, typer.Option(metavar="N", help="A former champion; by default the last one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Put a former champion back at once."""
    from flows import commands

    answers.show(commands.rollback(name, to, reason), as_json=as_json, render=answers.promote)


@app.command()
def history(
    name: ModelName,
    verify: Annotated[bool, typer.Option("--verify", help="Check the chain, the evidence and the weights of all that served.")] = False,
    as_json: AsJson = False,
) -> None:
    """The ledger of a model: who, when, from which version to which, and why."""
    from flows import commands

    answer = commands.history(name, verify=verify)
    answers.show(answer, as_json=as_json, render=answers.history)
    if answer["verified"] is False:
        raise typer.Exit(2)


@app.command()
def predict(
    model: Annotated[str, typer.Argument(metavar="NAME[@alias or /version]", help="By default the champion.")],
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Images, or folders of images.")],
    as_json: AsJson = False,
) -> None:
    """Class and probability for each image."""
    from flows import commands

    for row in commands.predict(model, paths):
        answers.show_prediction(row, as_json=as_json)


@app.command()
def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="Say what can be mended, then mend it, one by one; without it, only look.")] = False,
    storage: Storage = DEFAULT_STORAGE,
    as_json: AsJson = False,
) -> None:
    """What is reachable and configured, what the store enforces, and where Prefect, Ray, MLflow, S3 and the ledger disagree."""
    from flows import commands

    answer = commands.doctor(storage, fix=fix)
    answers.show(answer, as_json=as_json, render=answers.doctor)
    if not answer["healthy"]:
        raise typer.Exit(2)


@app.command()
def verify(uri: Annotated[str, typer.Argument(metavar="URI", help="A published folder, as s3://...")], as_json: AsJson = False) -> None:
    """Check every object of a published result against its manifest."""
    from flows import commands

    answer = commands.verify(uri)
    answers.show(answer, as_json=as_json, render=answers.verify)
    if not answer["verified"]:
        raise typer.Exit(2)


@cache_app.callback(invoke_without_command=True)
def cache(context: typer.Context, storage: Storage = DEFAULT_STORAGE, as_json: AsJson = False) -> None:
    """What the feature cache holds, on S3 and on this machine."""
    from flows import commands

    if context.invoked_subcommand is None:
        answers.show(commands.cache(storage), as_json=as_json, render=answers.cache)


@cache_app.command()
def prune(
    older_than: Annotated[float | None, typer.Option(metavar="DAYS", min=0, help="What was not used for so many days.")] = None,
    to_bytes: Annotated[str | None, typer.Option(metavar="SIZE", help="The least recently used, until SIZE is left: 5GB, 0.")] = None,
    local: Annotated[bool, typer.Option("--local", help="On this machine, instead of on S3.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and leave it.")] = False,
    storage: Storage = DEFAULT_STORAGE,
    as_json: AsJson = False,
) -> None:
    """Throw cached features away; a search that needs them computes them anew."""
    from flows import commands

    answer = commands.cache_prune(storage, local=local, older_than_days=older_than, to_bytes=to_bytes, dry_run=dry_run)
    answers.show(answer, as_json=as_json, render=answers.pruned)


@app.command()
def up(as_json: AsJson = False) -> None:
    """Start the embedded stack as long-lived servers."""
    from flows import commands

    answers.show(commands.up(), as_json=as_json, render=answers.status)


@app.command()
def down() -> None:
    """Stop the embedded stack."""
    from flows import commands

    commands.down()
    answers.say("The embedded stack is stopped.")


@app.command()
def status(as_json: AsJson = False) -> None:
    """Every address and credential of the services in use."""
    from flows import commands

    answers.show(commands.status(), as_json=as_json, render=answers.status)


@app.command()
def schema() -> None:
    """Print the JSON Schema of the spec."""
    from ray_jobs.spec import Spec

    answers.show(Spec.model_json_schema(), as_json=True, render=answers.status)


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    answers.debug = debug


def main(arguments: list[str] | None = None) -> None:
    """Run one command; exit 0 done, 2 the user's mistake, 3 a service failed, 130 interrupted, 1 our bug."""
    gc.set_threshold(*RARELY)
    code = [1]
    if arguments is None:
        atexit.register(_leave, code)  # the first to be registered is the last to be called
        signal.signal(signal.SIGTERM, _interrupt)
    code[0] = _run(arguments)
    if arguments is None and code[0]:
        _leave(code)  # at its end Prefect's client would go on trying, for minutes, to tell a server that may be away
    sys.exit(code[0])


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """TERM, by which hosts and containers stop what runs on them, ends a command as Ctrl-C does."""
    raise KeyboardInterrupt


def _leave(code: list[int]) -> None:
    """End at once: to take every imported module apart again would take the interpreter another 0.7 s."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code[0])


def _run(arguments: list[str] | None) -> int:
    try:
        answer: Any = app(arguments, standalone_mode=False)
    except UnfreezeError as error:
        answers.complain(str(error), error)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        answer = INTERRUPTED
    except Exception as error:
        return _unexpected(error)
    if answer == INTERRUPTED:  # typer turns Ctrl-C into this exit code
        answers.complain("Interrupted. The same command carries on where it was.")
    return answer if isinstance(answer, int) else 0


def _unexpected(error: Exception) -> int:
    show = getattr(error, "show", None)  # click's own usage errors tell about themselves
    if show is not None:
        show()
        return int(getattr(error, "exit_code", 2))
    answers.complain(f"Unexpected {type(error).__name__}: {error}\nThis is a bug of ours; `unfreeze --debug ...` shows where.", error)
    return 1


if __name__ == "__main__":
    main()
