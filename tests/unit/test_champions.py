"""Who serves, and who has served, is a function of the ledger's entries alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from infra.ledger import BEGINNING, SERVING, Entry, champion_of, former_champions, promotion_of, serving_since
from tests.ledger_worlds import content

VERSIONS, VERDICTS = st.integers(1, 6).map(str), st.sampled_from(["promoted", "kept", "rejected", "rolled_back"])
decided = st.lists(st.tuples(VERDICTS, VERSIONS), max_size=12)


def entries(rows: list[tuple[str, str]], before: str | None = None) -> list[Entry]:
    """Entries of these verdicts on these versions, each naming whoever served then; their chain is of no matter here."""
    made: list[Entry] = []
    for number, (verdict, version) in enumerate(rows, 1):
        serves = champion_of(made) if made else before
        fields = content(version, verdict=verdict, **{"from": serves}).model_dump(by_alias=True)
        made.append(Entry.model_validate(fields | {"number": number, "previous_digest": BEGINNING, "digest": BEGINNING}))
    return made


@given(decided, st.none() | VERSIONS)
def test_whoever_was_last_promoted_or_put_back_serves_else_whoever_did_before_the_first_entry(
    rows: list[tuple[str, str]], before: str | None
) -> None:
    made = entries(rows, before)
    served = [version for verdict, version in rows if verdict in SERVING]
    assert champion_of(made) == (served[-1] if served else before if rows else None)
    since = serving_since(made)
    assert (since.to_version if since else None) == (served[-1] if served else None)


@given(decided, st.none() | VERSIONS)
def test_former_champions_have_served_do_not_serve_and_come_the_last_first(rows: list[tuple[str, str]], before: str | None) -> None:
    made = entries(rows, before)
    former, now = former_champions(made), champion_of(made)
    served = [before] * bool(before and rows) + [version for verdict, version in rows if verdict in SERVING]
    assert set(former) == set(served) - {now}
    assert len(former) == len(set(former))
    if former:
        assert former[0] == next(version for version in reversed(served) if version != now)


@given(decided)
def test_a_version_was_promoted_by_the_last_entry_that_says_so(rows: list[tuple[str, str]]) -> None:
    made = entries(rows)
    for version in {version for _, version in rows}:
        found = promotion_of(made, version)
        numbers = [number for number, row in enumerate(rows, 1) if row == ("promoted", version)]
        assert (found.number if found else None) == (numbers[-1] if numbers else None)
