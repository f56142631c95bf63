"""The chain of the ledger: what an entry is, and that no byte, entry or order of it changes unseen."""

from __future__ import annotations

import hashlib
import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from infra.errors import LedgerConflict, LedgerDamaged, UserError
from infra.ledger import BEGINNING, Content, Entry, Finding, conflict, encode, next_entry, readable, trusted, verify
from tests.ledger_worlds import MODEL, content

words = st.text(st.characters(codec="utf-8"), max_size=8)
contents = st.builds(
    content,
    to=st.integers(1, 99).map(str),
    by=words.filter(bool),
    reason=words,
    approver=st.none() | words,
    verdict=st.sampled_from(["promoted", "kept", "rejected", "rolled_back"]),
    digests=st.dictionaries(st.sampled_from(["data", "spec", "code", "weights"]), words),
)


def chain(*said: Content) -> dict[int, bytes]:
    kept: dict[int, bytes] = {}
    for number, one in enumerate(said, 1):
        kept[number] = encode(next_entry(MODEL, one, number, kept.get(number - 1)))
    return kept


def rewritten(data: bytes, **changes: Any) -> bytes:
    """As by somebody who knows how a digest is made."""
    fields = {key: value for key, value in (json.loads(data) | changes).items() if key != "digest"}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return json.dumps(fields | {"digest": digest}, sort_keys=True, separators=(",", ":")).encode()


chains = st.lists(contents, min_size=1, max_size=5).map(lambda said: chain(*said))
long_chains = st.lists(contents, min_size=3, max_size=6).map(lambda said: chain(*said))
FIVE = chain(*(content(str(number)) for number in range(1, 6)))


def test_an_entry_has_the_keys_of_the_contract() -> None:
    assert json.loads(FIVE[1]).keys() == {
        "number", "at", "by", "verdict", "from", "to", "reason", "evidence_uri", "approver", "digests", "previous_digest", "digest",
    }  # fmt: skip


def test_the_digest_is_the_sha256_of_the_canonical_json_of_all_the_rest() -> None:
    fields = json.loads(FIVE[2])
    digest = fields.pop("digest")
    assert digest == hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def test_the_first_entry_follows_zeros_and_each_other_the_one_before() -> None:
    entries = trusted(MODEL, FIVE)
    assert [entry.previous_digest for entry in entries] == [BEGINNING] + [entry.digest for entry in entries[:-1]]


@given(chains)
def test_what_was_written_verifies_and_is_read_as_it_was_said(kept: dict[int, bytes]) -> None:
    assert verify(kept) == []
    assert verify(kept, kept) == []
    assert [encode(entry) for entry in trusted(MODEL, kept)] == list(kept.values())


def test_every_single_byte_counts() -> None:
    for number, data in FIVE.items():
        for place in range(len(data)):
            altered = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
            assert [finding.number for finding in verify(FIVE | {number: altered})] == [number], (number, place)


@given(chains, st.data())
def test_bytes_altered_added_or_taken_away_are_found_in_their_entry(kept: dict[int, bytes], data: st.DataObject) -> None:
    number = data.draw(st.sampled_from(sorted(kept)))
    before = kept[number]
    start = data.draw(st.integers(0, len(before)))
    end = data.draw(st.integers(start, min(start + 9, len(before))))
    altered = before[:start] + data.draw(st.binary(max_size=9)) + before[end:]
    assert [finding.number for finding in verify(kept | {number: altered})] == ([number] if altered != before else [])


@given(long_chains, st.data())
def test_an_entry_rewritten_with_a_digest_that_fits_is_found_by_the_one_after_it(kept: dict[int, bytes], data: st.DataObject) -> None:
    number = data.draw(st.integers(1, len(kept) - 1))
    found = verify(kept | {number: rewritten(kept[number], reason="no reason of hers")})
    assert [finding.number for finding in found] == [number]
    assert f"entry {number + 1} was written after another one" in found[0].what


@given(long_chains, st.data())
def test_a_missing_entry_is_found(kept: dict[int, bytes], data: st.DataObject) -> None:
    number = data.draw(st.integers(1, len(kept) - 1))
    assert verify({n: entry for n, entry in kept.items() if n != number}) == [Finding(number, "missing")]


@given(long_chains, st.data())
def test_entries_that_changed_places_are_found(kept: dict[int, bytes], data: st.DataObject) -> None:
    one, other = data.draw(st.lists(st.sampled_from(sorted(kept)), min_size=2, max_size=2, unique=True))
    found = verify(kept | {one: kept[other], other: kept[one]})
    assert {finding.number for finding in found} == {one, other}
    assert all("reordered" in finding.what for finding in found)


def test_a_chain_whose_beginning_was_cut_off_and_renumbered_is_found() -> None:
    moved = {number - 1: rewritten(FIVE[number], number=number - 1) for number in (2, 3, 4, 5)}
    assert verify(moved)[0] == Finding(1, "replaced: it does not begin a chain")


def test_entries_of_another_chain_do_not_fit() -> None:
    other = chain(*(content(str(number), by="bob") for number in range(1, 6)))
    assert [finding.number for finding in verify(FIVE | {3: other[3]})] == [2, 3]


def test_what_lies_far_beyond_the_end_is_found_without_counting_up_to_it() -> None:
    found = verify(FIVE | {10**12: FIVE[5], 0: FIVE[1]})
    assert [finding.number for finding in found] == [0, 6, 10**12]
    assert found[1].what == f"missing, as are those up to {10**12 - 1}"


@given(chains, st.data())
def test_a_copy_that_is_not_the_entry_is_found(kept: dict[int, bytes], data: st.DataObject) -> None:
    number = data.draw(st.sampled_from(sorted(kept)))
    altered = kept | {number: data.draw(st.binary(max_size=9)) + kept[number][:-1]}
    assert verify(kept, altered) == [Finding(number, "its copy on S3 is not the entry in the database")]
    assert verify(kept, {n: copy for n, copy in kept.items() if n != number}) == [Finding(number, "its copy on S3 is missing")]


def test_a_database_that_lost_its_last_entries_is_found_by_the_copies() -> None:
    cut = {number: FIVE[number] for number in (1, 2, 3)}
    assert verify(cut) == []
    assert [finding.number for finding in verify(cut, FIVE)] == [4, 5]


def test_a_last_entry_rewritten_with_a_digest_that_fits_is_found_by_its_copy() -> None:
    assert [finding.number for finding in verify(FIVE | {5: rewritten(FIVE[5], to="9")}, FIVE)] == [5]


def test_a_damaged_ledger_is_not_trusted_but_what_is_sound_of_it_can_be_shown() -> None:
    damaged = FIVE | {2: FIVE[2].replace(b"ada", b"bob"), 4: b""}
    with pytest.raises(LedgerDamaged, match=r"(?s)entry 2: altered: its digest.*entry 4: altered: it cannot be read"):
        trusted(MODEL, damaged)
    assert [entry.number for entry in readable(damaged)] == [1, 3, 5]


@pytest.mark.parametrize("before", [None, b"", FIVE[1], FIVE[2].replace(b"ada", b"bob")])
def test_nothing_is_chained_to_what_is_not_sound(before: bytes | None) -> None:
    with pytest.raises(LedgerDamaged, match="entry 2"):
        next_entry(MODEL, content(), 3, before)


@pytest.mark.parametrize(
    "changes", [{"at": "2026-11-21T19:15:58"}, {"at": "2026-11-21T19:15:58+01:00"}, {"at": "now"}, {"by": ""}, {"verdict": "won"}]
)
def test_what_an_entry_cannot_say_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        content(**changes)


def test_an_entry_cannot_be_changed_in_memory() -> None:
    with pytest.raises(ValidationError):
        Entry.model_validate_json(FIVE[1]).reason = "another"


def test_a_conflict_says_who_was_first_and_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(conflict(MODEL, 3, FIVE[3])))
    assert isinstance(error, LedgerConflict)
    assert isinstance(error, UserError)
    assert "entry 3 of the ledger of emoji exists already (ada, version 3: promoted)" in str(error)
