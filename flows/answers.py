"""How answers look: one JSON object on stdout, or a few good-looking lines; complaints on stderr."""

from __future__ import annotations

import json
import math
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, JustifyMethod
from rich.filesize import decimal
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

debug = False
LEADERS = 20
LOCAL = ("report_path", "page_path")
OTHER_DIMENSIONS = ("weight_decay", "label_smoothing", "layer_decay", "optimizer", "batch_size", "augmentation_strength", "backbone")
VERDICTS = {
    "promoted": "[bold green]promoted[/]",
    "kept": "[bold yellow]kept[/] (the champion stays)",
    "skipped": "[bold cyan]skipped[/] (nothing changed)",
    "awaiting_approval": "[bold magenta]awaiting approval[/]",
}

LEDGER_VERDICTS = {
    "promoted": "[green]promoted[/]",
    "kept": "[yellow]kept[/]",
    "rejected": "[red]rejected[/]",
    "rolled_back": "[cyan]rolled back[/]",
}


def show(answer: dict[str, Any], *, as_json: bool, render: Callable[[dict[str, Any]], object]) -> None:
    """Print an answer for a script or for a person."""
    if as_json:
        sys.stdout.write(json.dumps({key: value for key, value in _plain(answer).items() if key not in LOCAL}) + "\n")
        sys.stdout.flush()
    else:
        _stdout().print(render(answer))


def show_prediction(row: dict[str, Any], *, as_json: bool) -> None:
    """Print one row at once, so that a long list streams."""
    if as_json:
        text = json.dumps(row)
    elif "error" in row:
        text = f"{row['file']}: {row['error']}"
    else:
        text = f"{row['file']}: {row['class']} ({row['probability']:.1%})"
    sys.stdout.write(text.encode("utf-8", "replace").decode() + "\n")
    sys.stdout.flush()


def say(text: str) -> None:
    """One line for a person, on stderr."""
    Console(stderr=True, highlight=False).print(text)


def complain(text: str, error: BaseException | None = None) -> None:
    """One short message on stderr; the traceback only with --debug."""
    if debug and error is not None:
        traceback.print_exception(error)
    sys.stderr.write(f"unfreeze: {text}\n".encode("utf-8", "replace").decode())


def retrain(answer: dict[str, Any]) -> Panel:
    """The summary of a retraining: what was found, what serves, where everything is, what to try next."""
    model, best, scores = answer["model"], answer["search"]["best"], answer["evaluation"]["challenger"]
    dataset = answer["dataset"]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    name, version, serving = model["name"], model["version"], model["champion_version"]
    challenger = "" if serving == version else f" (challenger: {version})"
    quarantined = f", {dataset['quarantined']} quarantined" if dataset["quarantined"] else ""
    found = f"{_backbone(best)}unfreeze depth {best['unfreeze_depth']}, learning rate {best['lr']:.2g}"
    table.add_row("verdict", f"{VERDICTS[answer['status']]}: {escape(answer['decision']['reason'])}")
    table.add_row("serving", f"[bold]{name} version {serving}[/]{challenger}" if serving else "[bold]no version yet[/]")
    if request := answer.get("request"):
        command = f"[bold cyan]unfreeze promote {name} --approve {request['id']}[/]"
        table.add_row("to answer", f"{command} (or --reject), until {request['expires_at']}")
    table.add_row("holdout", f"accuracy [bold]{_percent(scores['accuracy'])}[/] on {dataset['holdout']} images never trained on")
    table.add_row("found", f"{found}: best of {answer['search']['trials']} trials (val {_percent(best['accuracy'])})")
    fit = answer["fit"]
    if fit["chosen"] == "probe" or fit.get("falls_short") or fit.get("fits", 1) > 1:  # an answer kept by an earlier version lacks them
        table.add_row("[yellow]fit[/]", fit["chosen_reason"])
    table.add_row("data", f"{dataset['images']} images, {dataset['classes']} classes{quarantined} (version {dataset['version'][:8]})")
    table.add_row("published", f"{answer['publish']['uri']} ({answer['publish']['objects']} objects, verified)")
    table.add_row("report", answer.get("report_path") or answer["report"])
    if "page_path" in answer:
        table.add_row("page", answer["page_path"])
    table.add_row("time", _times(answer["seconds"]))
    table.add_row("try next", f"[bold cyan]unfreeze predict {name}{'@champion' if serving else f'/{version}'} IMAGE...[/]")
    table.add_row("", "[bold cyan]unfreeze up[/] [dim](the web pages of MLflow, Prefect and Ray)[/]")
    return Panel(
        table, title=f"Unfreeze · {model['name']}", border_style="green" if answer["status"] == "promoted" else "cyan", expand=False
    )


def search(answer: dict[str, Any]) -> Group:
    """The leaderboard of a search, and what it cost."""
    best, trials = answer["search"]["best"], answer["trials_detail"]
    found = f"best: {_backbone(best)}depth {best['unfreeze_depth']}, lr {best['lr']:.2g}, val {_percent(best['accuracy'])}"
    title = f"{len(trials)} trials in {answer['search']['seconds']:.0f} s; {found}"
    varied = [name for name in OTHER_DIMENSIONS if len({trial[name] for trial in trials}) > 1]
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, padding=0 if len(varied) > 3 else (0, 1))
    for name in ("depth", "lr", *varied, "val", "epochs", "status", "s"):
        justify: JustifyMethod = "left" if name in ("status", "backbone") else "right"
        whole = name != "backbone"  # which a narrow terminal breaks; numbers stay whole
        table.add_column(name.replace("_", "\n"), justify=justify, overflow="fold", no_wrap=whole, min_width=None if whole else 8)
    shown = sorted(trials, key=lambda row: -(row["accuracy"] if row["accuracy"] is not None else -1))[:LEADERS]
    for trial in shown:
        others = [f"{trial[name]:.2g}" if isinstance(trial[name], float) else str(trial[name]) for name in varied]
        result = (_percent(trial["accuracy"]), str(trial["epochs"]), trial["status"], f"{trial['seconds']:.1f}")
        table.add_row(str(trial["unfreeze_depth"]), f"{trial['lr']:.2g}", *others, *result)
    lines = [f"[dim]and {len(trials) - len(shown)} more[/]"] if len(trials) > len(shown) else []
    places = Table.grid(padding=(0, 2))
    for name, place in (("leaderboard", answer["search"]["leaderboard_uri"]), ("report", answer["report_path"])):
        places.add_row(Text(name, style="dim"), Text(place, overflow="fold"))
    return Group(table, *lines, *answer["decisions"], _cost(answer["cost"]), places)


def _backbone(best: dict[str, Any]) -> str:
    """The winner's, where a search had several."""
    return f"{best['backbone']}, " if "backbone" in best else ""


def _cost(cost: dict[str, Any]) -> str:
    estimated = f" (estimated {cost['estimated_s']:.0f} s)" if cost["estimated_s"] is not None else ""
    saved = (
        f"{cost['flops']:.2g} FLOPs, {cost['flops_without_sharing'] / max(cost['flops'], 1):.1f} times less than without sharing the prefix"
    )
    return f"features and trials took {cost['measured_s']:.0f} s{estimated}; {saved}"


WORKERS = {
    "running": "the embedded stack's worker runs it, as long as the stack is up",
    "stopped": "[yellow]none yet[/]: the embedded stack must be up to work by the clock, [bold cyan]unfreeze up[/]",
    "external": "yours: [bold cyan]prefect worker start --pool unfreeze[/], in this project's environment",
}


def deployed(answer: dict[str, Any]) -> Table:
    """The scheduled retraining, and when it works next."""
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(overflow="fold")
    overlap = {"skip": "a start while the last one is still going is refused", "queue": "a start while the last one is still going waits"}
    rows.add_row("deployed", f"[bold]{escape(answer['deployment'])}[/]")
    rows.add_row("schedule", f"{escape(answer['cron'])} ({answer['timezone']}); {overlap[answer['overlap']]}")
    rows.add_row("next", ", ".join(time.replace("T", " ") for time in answer["next"]))
    rows.add_row("page", Text(answer["url"], overflow="fold"))
    rows.add_row("worker", WORKERS[answer["worker"]])
    return rows


def promote(answer: dict[str, Any]) -> Group:
    """One entry of the ledger, or a request for approval, with what to do next."""
    name, rows = answer["model"], Table.grid(padding=(0, 2))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(overflow="fold")
    if "verdict" in answer:
        came = f"version {answer['from']}" if answer["from"] else "nothing"
        verdict = f"{LEDGER_VERDICTS[answer['verdict']]}: {name} version {answer['to']} (before: {came})"
        rows.add_row("verdict", verdict)
        rows.add_row("reason", Text(answer["reason"]))
        rows.add_row("ledger", f"entry {answer['number']}, {answer['at']}, by {escape(answer['by'])}")
    else:
        rows.add_row("verdict", f"{VERDICTS['awaiting_approval']}: {name} version {answer['version']}, asked by {escape(answer['by'])}")
        rows.add_row("reason", Text(answer["reason"]))
        for way in ("approve", "reject"):
            rows.add_row(way, f"[bold cyan]unfreeze promote {name} --{way} {answer['id']}[/]")
        rows.add_row("expires", answer["expires_at"])
    if page := answer.get("page_path") or answer.get("page"):
        rows.add_row("page", Text(page, overflow="fold"))
    return Group(rows)


def history(answer: dict[str, Any]) -> Group:
    """The ledger, the newest entry last, each with its reason below it, and whether it verifies."""
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for row in answer["entries"]:
        by = row["by"] + (f", answered by {row['approver']}" if row["approver"] else "")
        when = row["at"].replace("T", " ").removesuffix("+00:00")
        change = f"{row['from'] or 'nothing'} → {row['to']}"
        table.add_row(str(row["number"]), f"{LEDGER_VERDICTS[row['verdict']]}  {change}  [dim]{when} UTC, {escape(by)}[/]")
        table.add_row("", Text(row["reason"]))
    parts: list[Any] = [table if answer["entries"] else f"The ledger of {answer['model']} has no entry yet."]
    parts += [f"[magenta]waiting[/]: request {r['id']} for version {r['version']}, until {r['expires_at']}" for r in answer["requests"]]
    if answer["verified"]:
        parts.append("[green]verified[/]: the chain, its evidence and the weights of every version that has served")
    parts += [Text(f"not as it was written: {problem}", style="red") for problem in answer["problems"]]
    return Group(*parts)


def doctor(answer: dict[str, Any]) -> Table:
    """What was looked at, and what to do about what is wrong."""
    table = Table(box=None, padding=(0, 2), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    marks = {"ok": "[green]✓ ok[/]", "note": "[yellow]• note[/]", "wrong": "[red]✗ wrong[/]"}
    for row in answer["findings"]:
        table.add_row("[green]✓ mended[/]" if row["fixed"] else marks[row["state"]], row["what"], Text(row["words"]))
        if row["outcome"]:
            table.add_row("", "", Text(f"→ {row['outcome']}", style="green" if row["fixed"] else "red"))
        elif row["fix"]:
            by = " (`unfreeze doctor --fix` does it)" if row["fixable"] else ""
            table.add_row("", "", Text(f"→ {row['fix']}{by}", style="cyan"))
    return table


def verify(answer: dict[str, Any]) -> str:
    """The result of a verification."""
    if answer["verified"]:
        return f"[green]verified[/]: {answer['objects']} objects at {answer['uri']} match their manifest"
    lines = [f"[red]{row['problem']}[/]: {row['key']}" for row in answer["problems"]]
    return "\n".join([f"{answer['uri']} does not match its manifest:", *lines])


def cache(answer: dict[str, Any]) -> Group:
    """Both tiers of the feature cache."""
    table = Table(box=None, padding=(0, 1))
    for column in ("backbone", "depth", "view", "px", "stored", "images", "size", "last used"):
        table.add_column(column, justify="right" if column in ("depth", "px", "images", "size") else "left", overflow="fold")
    for row in answer["sets"]:
        depth = "-" if row["unfreeze_depth"] is None else str(row["unfreeze_depth"])
        about = (row["backbone"] or "any (pixels)", depth, row["view"], str(row["image_size"]), row["dtype"])
        table.add_row(*about, f"{row['images']:,}", decimal(row["bytes"]), _ago(row["used_at"]))
    on_s3 = f"on S3: {decimal(answer['bytes'])} in {len(answer['sets'])} sets below {answer['storage']}/features"
    local, budget = decimal(answer["local_bytes"]), decimal(answer["local_budget_bytes"])
    return Group(
        *([table] if answer["sets"] else []),
        on_s3,
        f"on this machine: {local} in {len(answer['local'])} copies, of {budget} at most (UNFREEZE_CACHE_BYTES)",
    )


def pruned(answer: dict[str, Any]) -> str:
    """What a pruning threw away."""
    what, tier = ("would free" if answer["dry_run"] else "freed"), "on this machine" if answer["tier"] == "local" else "on S3"
    return f"{what} {decimal(answer['freed_bytes'])} of {len(answer['removed'])} {tier}; {decimal(answer['left_bytes'])} left"


def _ago(at: float) -> str:
    seconds = max(0.0, time.time() - at)
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return "just now"


def status(answer: dict[str, Any]) -> Table:
    """Services, their state and where to open them."""
    table = Table(box=None, padding=(0, 2))
    for column in ("service", "state", "address"):
        table.add_column(column, overflow="fold")
    colours = {"running": "green", "external": "cyan", "stopped": "dim"}
    addresses = {"s3": ("endpoint",), "mlflow": ("uri",), "prefect": ("ui_url", "api_url"), "ray": ("dashboard_url", "address")}
    for service, keys in addresses.items():
        row = answer[service]
        address = next((row[key] for key in keys if row.get(key)), None) or "-"
        table.add_row(service, f"[{colours.get(row['state'], 'red')}]{row['state']}[/]", address)
    return table


def _times(seconds: dict[str, float]) -> str:
    steps = ", ".join(f"{step} {value:.0f} s" for step, value in seconds.items() if step != "total" and value >= 1)
    return f"{seconds['total']:.0f} s" + (f" ({steps})" if steps else "")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _stdout() -> Console:
    return Console(highlight=False)


def _plain(value: Any) -> Any:
    """JSON has no NaN: such figures become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
