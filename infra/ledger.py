"""The ledger of promotions: one append-only chain of entries for each registered model, and the proof that nobody touched it (pure).

The commit of a promotion is the write of entry N + 1 only if there is none. How a backend makes sure of that is its own matter:
`ledger_on_s3.py` by a conditional write, `ledger_in_sql.py` by a primary key. `ledger_choice.py` says which one is used, and why.

An entry is kept as canonical JSON (keys sorted, no blanks, ASCII), so that no byte of it can change unseen. Its digest is the sha256
of that JSON without the digest, and covers the digest of the entry before. What a chain alone cannot show is that its end was cut off,
or its last entry written anew with a digest that fits: the copies on S3 of a ledger in a database show it, and the champion in MLflow.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal, Protocol

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from infra.errors import LedgerConflict, LedgerDamaged

BEGINNING = "0" * 64
"""The previous digest of entry 1."""

Verdict = Literal["promoted", "kept", "rejected", "rolled_back"]
SERVING: tuple[Verdict, ...] = ("promoted", "rolled_back")
"""The verdicts after which the entry's version serves."""

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _utc(at: str) -> str:
    moment = datetime.fromisoformat(at)
    if moment.utcoffset() != timedelta(0):
        raise ValueError("not a moment in UTC")
    return at


class Content(BaseModel):
    """What was decided: an entry without its place in the chain. `from` is a word of Python's: hence the aliases."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True)

    at: Annotated[str, AfterValidator(_utc)] = Field(description="ISO 8601, UTC.")
    by: str = Field(min_length=1, description="Who asked for it.")
    verdict: Verdict
    from_version: str | None = Field(alias="from", description="The champion before; None where there was none.")
    to_version: str = Field(alias="to", description="The version that was judged, or put back.")
    reason: str
    evidence_uri: str
    approver: str | None = Field(default=None, description="Who answered the request; None where nobody was asked.")
    digests: dict[str, str] = Field(description="Of data, spec, code and weights.")


class Entry(Content):
    """One entry, in its place."""

    number: int = Field(ge=1)
    previous_digest: Digest
    digest: Digest


@dataclass(frozen=True)
class Kept:
    """The bytes of a ledger as they lie there, by number; `copies` are those on S3 where a database holds the ledger."""

    entries: Mapping[int, bytes]
    copies: Mapping[int, bytes] | None = None


@dataclass(frozen=True)
class Finding:
    """What is wrong with the entry of this number."""

    number: int
    what: str

    def __str__(self) -> str:
        return f"entry {self.number}: {self.what}"


class Ledger(Protocol):
    """Where chains are kept. Many processes may use one at once, on many machines."""

    def entries(self, model: str) -> list[Entry]:
        """Every entry from the first. Raises LedgerDamaged where the chain does not verify."""
        ...

    def append(self, model: str, content: Content, expected_number: int) -> Entry:
        """Commit the entry of this number. Raises LedgerConflict where there is one, LedgerDamaged where the one before is not sound."""
        ...

    def kept(self, model: str) -> Kept:
        """What `verify` looks at, damaged or not."""
        ...


def champion_of(entries: Sequence[Entry]) -> str | None:
    """The version that serves by these entries: the last that was promoted or put back, else the one that there was before them."""
    since = serving_since(entries)
    if since is not None:
        return since.to_version
    return entries[0].from_version if entries else None


def serving_since(entries: Sequence[Entry]) -> Entry | None:
    """The entry by which the champion came to serve; None where it was there before the first."""
    return next((entry for entry in reversed(entries) if entry.verdict in SERVING), None)


def former_champions(entries: Sequence[Entry]) -> list[str]:
    """Every version that has served before the one that serves now, the last of them first."""
    served = [champion_of(entries[:number]) for number in range(len(entries), 0, -1)] + [entry.from_version for entry in entries[:1]]
    now = champion_of(entries)
    return list(dict.fromkeys(version for version in served if version is not None and version != now))


def promotion_of(entries: Sequence[Entry], version: str) -> Entry | None:
    """The entry that last made this version the champion by a judgement."""
    return next((entry for entry in reversed(entries) if entry.verdict == "promoted" and entry.to_version == version), None)


def encode(entry: Entry) -> bytes:
    """The bytes of an entry, in a database and on S3 alike."""
    return _canonical(entry.model_dump(by_alias=True))


def read_entry(data: bytes, number: int) -> Entry:
    """The entry in the place `number`. Raises ValueError saying what is wrong with it, whatever stands before and after it."""
    try:
        entry = Entry.model_validate_json(data)
    except ValidationError as error:
        wrong = error.errors(include_input=False, include_url=False)[0]
        raise ValueError(f"altered: it cannot be read ({'.'.join(map(str, wrong['loc'])) or 'JSON'}: {wrong['msg']})") from None
    if encode(entry) != data:
        raise ValueError("altered: its bytes are not those of an entry")
    if _digest(entry.model_dump(by_alias=True, exclude={"digest"})) != entry.digest:
        raise ValueError("altered: its digest is not that of its content")
    if entry.number != number:
        raise ValueError(f"reordered: entry {entry.number} lies in its place")
    return entry


def next_entry(model: str, content: Content, number: int, before: bytes | None) -> Entry:
    """The entry `number` that follows the bytes `before`. Raises LedgerDamaged where those are not a sound entry."""
    assert number >= 1, number
    previous_digest = BEGINNING
    if number > 1:
        try:
            if before is None:
                raise ValueError("missing")
            previous_digest = read_entry(before, number - 1).digest
        except ValueError as error:
            raise damaged(model, [Finding(number - 1, str(error))]) from None
    fields = content.model_dump(by_alias=True) | {"number": number, "previous_digest": previous_digest}
    return Entry.model_validate(fields | {"digest": _digest(fields)})


def verify(entries: Mapping[int, bytes], copies: Mapping[int, bytes] | None = None) -> list[Finding]:
    """Every entry that is altered, missing or out of order, and every copy that is not the entry's; by number."""
    sound: dict[int, Entry] = {}
    found, awaited = [], 1
    for number in sorted(entries):
        if number > awaited:
            found.append(Finding(awaited, "missing" if number == awaited + 1 else f"missing, as are those up to {number - 1}"))
        try:
            sound[number] = read_entry(entries[number], number)
        except ValueError as error:
            found.append(Finding(number, str(error)))
        awaited = max(awaited, number + 1)
    found += [Finding(number, what) for number in sound if (what := _misfit(sound, number))]
    found += [Finding(number, what) for number in copies or () if (what := _copy_misfit(entries, copies or {}, number))]
    found += [Finding(number, "its copy on S3 is missing") for number in entries if copies is not None and number not in copies]
    return sorted(found, key=lambda finding: finding.number)


def trusted(model: str, entries: Mapping[int, bytes]) -> list[Entry]:
    """The entries in order. Raises LedgerDamaged unless the whole chain verifies."""
    if found := verify(entries):
        raise damaged(model, found)
    return readable(entries)


def readable(entries: Mapping[int, bytes]) -> list[Entry]:
    """Those entries, in the order they lie in, that are sound by themselves: what can still be shown of a damaged ledger."""
    shown = []
    for number, data in sorted(entries.items()):
        try:
            shown.append(read_entry(data, number))
        except ValueError:
            continue
    return shown


def damaged(model: str, found: list[Finding]) -> LedgerDamaged:
    """The error that names what was found."""
    return LedgerDamaged(
        f"The ledger of {model} is damaged: " + "; ".join(map(str, found)) + ".",
        f"Nothing is promoted by it. `unfreeze history {model} --verify` lists all that is wrong; put it back from the copies or a backup.",
    )


def conflict(model: str, number: int, there: bytes | None) -> LedgerConflict:
    """The error of whoever came second; `there` is the entry that came first."""
    try:
        first = read_entry(there or b"", number)
        who = f" ({first.by}, version {first.to_version}: {first.verdict})"
    except ValueError:
        who = ""
    return LedgerConflict(
        f"Another got there first: entry {number} of the ledger of {model} exists already{who}.",
        "Run the same command again: it judges against what serves now, and computes nothing twice.",
    )


def _misfit(sound: Mapping[int, Entry], number: int) -> str:
    """What is wrong between this entry and the next (or, for the first, the beginning)."""
    if number == 1 and sound[1].previous_digest != BEGINNING:
        return "replaced: it does not begin a chain"
    following = sound.get(number + 1)
    if following is not None and following.previous_digest != sound[number].digest:
        return f"replaced: entry {number + 1} was written after another one"
    return ""


def _copy_misfit(entries: Mapping[int, bytes], copies: Mapping[int, bytes], number: int) -> str:
    if number not in entries:
        return "missing from the database, though there is a copy on S3"
    return "" if entries[number] == copies[number] else "its copy on S3 is not the entry in the database"


def _canonical(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(fields)).hexdigest()
