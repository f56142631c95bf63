"""Which model of a fit is kept: the fit or the linear probe that it started from, and the fit with or without its augmentation. Pure.

A trial of the search has shown on val what its depth and learning rate can give. A fit that falls short of that was not spoilt by its
depth but by what it does otherwise than the trial: its augmentation. Mirrored digits are other digits, and a crop may lack what tells.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ray_jobs.fit_plan import EpochRow, Plan

CHOICE_CODE_VERSION = 1
"""Raise it when another of the same fits would be kept, or other words would be said of it."""
CLEARLY = 2.0
"""Standard errors of a difference. The best of many trials was chosen on val, so that a fit comes out a little lower without any fault."""

Result = Mapping[str, Any]


def choose(best: EpochRow | None, plan: Plan) -> tuple[str, str]:
    """What to register, the fit or the linear probe that it started from, and why in one sentence."""
    if best is None or best.val_loss is None:
        return "probe", "The fit diverged (its loss was no number), so the linear probe is kept."
    fit, probe = (best.val_accuracy, -best.val_loss), (plan.probe_accuracy, -plan.probe_val_loss)
    shown = f"{best.val_accuracy:.3f} against {plan.probe_accuracy:.3f} on val"
    if fit[0] == probe[0]:
        shown += f", by val loss {best.val_loss:.3f} against {plan.probe_val_loss:.3f}"
    if fit < probe and plan.unfreeze_depth == 0:
        return "probe", f"The linear probe of the search is kept, since its head is better than the one of the fit ({shown})."
    if fit < probe:
        return "probe", f"Training depth {plan.unfreeze_depth} made the model worse than the linear probe ({shown}): negative transfer."
    return "fit", f"The fit at depth {plan.unfreeze_depth} is at least as good as the linear probe ({shown})."


def falls_short(fit: Result, search: Result, val_images: int) -> bool:
    """Whether a fit is worse on val than its trial in the search: clearly, or so that a probe is kept which the trial had beaten."""
    trial, probe = search["best"]["accuracy"], search["probe"]["accuracy"]
    if fit["chosen"] == "probe":
        return bool(trial > probe)
    reached = fit["accuracy"]
    error = math.sqrt((trial * (1 - trial) + reached * (1 - reached)) / val_images)
    return bool(trial - reached > CLEARLY * error)


def best_of(fits: Sequence[Result], search: Result, val_images: int) -> dict[str, Any]:
    """The better of a fit with its augmentation and perhaps one without, with the reason in words, and the seconds of both."""
    best = max(fits, key=lambda fit: (fit["chosen"] == "fit", fit["accuracy"] or 0.0, -(fit["val_loss"] or 0.0)))
    trial, short = search["best"]["accuracy"], falls_short(best, search, val_images)
    reason = best["chosen_reason"]
    if short and best["chosen"] == "probe":  # the trial has shown that it is no negative transfer
        reason = f"The linear probe is kept ({search['probe']['accuracy']:.3f} on val): the fit came to {reached(best)}."
    if len(fits) > 1:
        came_to = ", ".join(f"{reached(fit)} with augmentation {fit['augmentation']}" for fit in fits)
        reason += f" Fitted twice, since the first fell short of its trial in the search ({trial:.3f}): {came_to}."
        reason += " With fit.augmentation: none the next one need not." if best["augmentation"] == "none" else ""
    if short:
        reason += f" That falls short of the trial ({trial:.3f}): more fit.max_epochs or another fit.augmentation may help."
    seconds = round(sum(fit["seconds"] for fit in fits), 2)
    return {**best, "chosen_reason": reason, "falls_short": short, "fits": len(fits), "seconds": seconds}


def reached(fit: Result) -> str:
    """The val accuracy of a fit in words."""
    return "no number" if fit["accuracy"] is None else f"{fit['accuracy']:.3f}"
