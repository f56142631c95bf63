"""What a person reads of an answer on a narrow terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from flows import answers


def trial(number: int, **values: Any) -> dict[str, Any]:
    plain = {
        "unfreeze_depth": 2, "lr": 0.00033, "weight_decay": 1e-4, "label_smoothing": 0.0, "layer_decay": 1.0, "optimizer": "adamw",
        "batch_size": 32, "augmentation_strength": 1.0, "backbone": "", "accuracy": 0.949, "epochs": 5,
        "status": "finished", "seconds": 9.5,
    }  # fmt: skip
    return plain | {name: value if number else plain[name] for name, value in values.items()}


def lines(*trials: dict[str, Any]) -> list[str]:
    """The leaderboard at 80 characters a line."""
    best = {key: trials[0][key] for key in ("unfreeze_depth", "lr", "accuracy")}
    answer = {
        "search": {"best": best, "seconds": 12.0, "leaderboard_uri": "s3://unfreeze/searches/x/leaderboard.parquet"},
        "trials_detail": trials, "decisions": [], "report_path": "report.html",
        "cost": {"estimated_s": None, "measured_s": 3.0, "flops": 1e12, "flops_without_sharing": 2e12},
    }  # fmt: skip
    console = Console(width=80, no_color=True)
    with console.capture() as captured:
        console.print(answers.search(answer))
    return captured.get().splitlines()


def test_numbers_and_words_of_the_leaderboard_stay_whole_however_many_dimensions_there_are() -> None:
    many = {"weight_decay": 0.012, "layer_decay": 0.75, "optimizer": "sgd", "backbone": "efficientformerv2_s0", "batch_size": 64}
    rows = lines(*(trial(number, **many) for number in range(2)))
    assert max(map(len, rows)) <= 80
    assert sum({"0.00033", "94.9%", "finished", "9.5"} <= set(row.split()) for row in rows) == 2
    assert any("efficien" in row for row in rows)


def test_only_what_differs_has_a_column() -> None:
    text = "\n".join(lines(trial(0), trial(1, optimizer="sgd")))
    assert "optimizer" in text
    assert "batch" not in text
    assert "backbone" not in text
