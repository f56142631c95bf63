"""What a lead relies on: the ledger decides who serves, the alias follows it, and nothing serves that is not what was judged."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from infra import registry
from infra.errors import UserError
from infra.object_store import join_uri, object_store
from infra.tracking import client
from ray_jobs.spec import Spec
from tasks import answering, approval, champion
from tasks import serving as serving_of
from tasks.candidate import find_candidate
from tasks.doctor import diagnose
from tasks.history import history, verified_history
from tasks.ledger_book import open_book
from tests import promotion_worlds as worlds

pytestmark = pytest.mark.slow
GOOD, BETTER, BEST = 0.7, 0.85, 0.97


@pytest.fixture
def spec(mlflow_url: str, s3: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Spec]:
    for name, value in worlds.environment(mlflow_url, tmp_path / "home", None).items():
        monkeypatch.setenv(name, value)
    client.cache_clear()
    yield worlds.spec_of(f"model-{secrets.token_hex(4)}", f"s3://unfreeze/{secrets.token_hex(4)}")
    client.cache_clear()


def serving(spec: Spec) -> str | None:
    found = registry.champion(spec.name)
    return found.version if found else None


def manual(spec: Spec, **rules: Any) -> Spec:
    return worlds.spec_of(spec.name, spec.storage, approval="manual", **rules)


def promoted(spec: Spec, *skills: float) -> list[str]:
    """Versions of these skills, each promoted in its turn."""
    versions = []
    for number, skill in enumerate(skills):
        versions.append(worlds.register(spec, skill, number))
        assert worlds.promote(spec, versions[-1])["status"] == "promoted"
    return versions


def test_the_better_one_serves_the_worse_one_is_kept_out_and_the_ledger_tells_both(spec: Spec) -> None:
    first, second = promoted(spec, GOOD, BETTER)
    worse = worlds.register(spec, GOOD, 7)
    settled = worlds.promote(spec, worse)
    assert (settled["status"], settled["serving"]) == ("kept", second)
    assert serving(spec) == second
    challenger = registry.by_alias(spec.name, "challenger")
    assert challenger is not None
    assert challenger.version == worse
    entries = history(spec.name)["entries"]
    assert [(row["number"], row["verdict"], row["from"], row["to"]) for row in entries] == [
        (1, "promoted", None, first),
        (2, "promoted", first, second),
        (3, "kept", second, worse),
    ]
    assert verified_history(spec.name)["verified"] is True


def test_the_same_question_is_answered_once_and_whoever_serves_is_not_judged_against_itself(spec: Spec) -> None:
    (version,) = promoted(spec, GOOD)
    again = worlds.promote(spec, version)
    assert (again["status"], again["entry"]["number"]) == ("promoted", 1)
    other_question = worlds.promote(spec, version, request="another question")
    assert (other_question["status"], other_question["entry"]["number"]) == ("kept", 1)
    assert len(history(spec.name)["entries"]) == 1


def test_a_question_that_was_answered_before_a_rollback_is_not_answered_anew(spec: Spec) -> None:
    first, second = promoted(spec, GOOD, BETTER)
    serving_of.roll_back(spec.name, None, "broke in production", "ada")
    settled = worlds.promote(spec, second)
    assert settled["serving"] == serving(spec) == first


def test_a_crash_between_entry_and_alias_is_repaired_by_the_next_command(spec: Spec) -> None:
    first, second = promoted(spec, GOOD, BETTER)
    registry.set_alias(spec.name, registry.CHAMPION, first)  # as a command leaves it that is killed after its entry
    found = champion.find_champion.fn(spec, "next")  # type: ignore[attr-defined]
    assert (found["version"], serving(spec)) == (second, second)
    assert "entry 2 of the ledger" in found["notes"][0]


@pytest.mark.parametrize("removed", [False, True])
def test_an_alias_moved_by_hand_is_reported_put_back_and_never_taken_as_truth(spec: Spec, removed: bool) -> None:
    _, second = promoted(spec, GOOD, BETTER)
    other = worlds.register(spec, BEST, 9)
    if removed:
        registry.delete_alias(spec.name, registry.CHAMPION)
    else:
        registry.set_alias(spec.name, registry.CHAMPION, other)
    found = next(row for row in diagnose(spec.storage, fix=False)["findings"] if spec.name in row["what"] and row["state"] == "wrong")
    assert found["fixable"]
    assert serving(spec) == (None if removed else other)  # only said
    found = champion.find_champion.fn(spec, "next")  # type: ignore[attr-defined]
    assert found["version"] == second
    assert "moved by hand" in found["notes"][0]
    assert serving(spec) == second


def test_an_alias_set_by_hand_before_anything_was_promoted_is_not_judged_against(spec: Spec) -> None:
    by_hand = worlds.register(spec, BEST, 1)
    registry.set_alias(spec.name, registry.CHAMPION, by_hand)
    version = worlds.register(spec, GOOD, 2)
    settled = worlds.promote(spec, version)
    assert (settled["status"], settled["entry"]["from"], serving(spec)) == ("promoted", None, version)


def test_a_champion_from_before_there_was_a_ledger_is_judged_against(spec: Spec) -> None:
    old = worlds.register(spec, BETTER, 1, before_ledgers=True)
    registry.set_alias(spec.name, registry.CHAMPION, old)
    worse, better = worlds.register(spec, GOOD, 2), worlds.register(spec, BEST, 3)
    assert worlds.promote(spec, worse)["status"] == "kept"
    assert serving(spec) == old
    settled = worlds.promote(spec, better)
    assert (settled["status"], settled["entry"]["from"], serving(spec)) == ("promoted", old, better)
    assert serving_of.roll_back(spec.name, None, "no good", "ada")["to"] == old


def test_an_approved_request_promotes_and_names_the_approver(spec: Spec) -> None:
    asks = manual(spec)
    version = worlds.register(spec, GOOD, 1)
    settled = worlds.promote(asks, version)
    assert (settled["status"], settled["entry"], settled["serving"], serving(spec)) == ("awaiting_approval", None, None, None)
    assert worlds.promote(asks, version)["request"] == settled["request"]  # asked once
    request_id = settled["request"]["id"]
    assert [request["id"] for request in history(spec.name)["requests"]] == [request_id]
    entry = answering.answer_request(spec.name, request_id, approve=True, by="grace", reason="looked at it")
    assert (entry["verdict"], entry["by"], entry["approver"], entry["to"]) == ("promoted", "ada", "grace", version)
    assert entry["reason"].startswith("approved by grace (looked at it)")
    assert serving(spec) == version
    assert history(spec.name)["requests"] == []
    assert answering.answer_request(spec.name, request_id, approve=True, by="grace", reason="again") == entry
    with pytest.raises(UserError, match="answered already: entry 1"):
        answering.answer_request(spec.name, request_id, approve=False, by="grace", reason="")
    assert worlds.promote(asks, version)["status"] == "promoted"


def test_a_rejected_request_is_in_the_ledger_and_changes_nothing(spec: Spec) -> None:
    (first,) = promoted(spec, GOOD)
    asks = manual(spec)
    version = worlds.register(spec, BETTER, 3)
    request = worlds.promote(asks, version)["request"]
    entry = answering.answer_request(spec.name, request["id"], approve=False, by="grace", reason="not on a Friday")
    assert (entry["verdict"], entry["from"], entry["to"], serving(spec)) == ("rejected", first, version, first)
    assert worlds.promote(asks, version)["status"] == "kept"
    assert verified_history(spec.name)["verified"] is True


def test_a_request_goes_stale_when_another_serves_and_expires(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    promoted(spec, GOOD)
    asks = manual(spec, approval_hours=1)
    request = worlds.promote(asks, worlds.register(spec, BETTER, 3))["request"]
    book = open_book(spec.name)
    later = datetime.now(UTC) + timedelta(hours=1, seconds=1)
    assert "expired" in (approval.closed(book, request, later) or "")
    assert approval.closed(book, request) is None
    worlds.promote(spec, worlds.register(spec, BEST, 4))
    with pytest.raises(UserError, match="stale"):
        answering.answer_request(spec.name, request["id"], approve=True, by="grace", reason="")
    assert history(spec.name)["requests"] == []


def test_whoever_asked_may_not_approve_where_another_must_but_may_withdraw(spec: Spec) -> None:
    asks = manual(spec, approver_differs=True)
    version = worlds.register(spec, GOOD, 1)
    request_id = worlds.promote(asks, version, by="ada")["request"]["id"]
    with pytest.raises(UserError, match="another must approve"):
        answering.answer_request(spec.name, request_id, approve=True, by="ada", reason="")
    assert serving(spec) is None
    assert answering.answer_request(spec.name, request_id, approve=False, by="ada", reason="")["verdict"] == "rejected"


@pytest.mark.parametrize("what", ["request", "weights", "evidence"])
def test_what_was_altered_after_it_was_judged_is_not_promoted(spec: Spec, what: str) -> None:
    version = worlds.register(spec, GOOD, 1)
    request = worlds.promote(manual(spec), version)["request"]
    uris = {
        "request": join_uri(spec.storage, "requests", spec.name, f"{request['id']}.json"),
        "weights": join_uri(spec.storage, "models", spec.name, version, "model.safetensors"),
        "evidence": join_uri(request["evidence_uri"], "judgement.json"),
    }
    store = object_store()
    data = store.read(uris[what])
    store.write(uris[what], data.replace(b"0", b"1", 1))
    with pytest.raises(UserError):
        answering.answer_request(spec.name, request["id"], approve=True, by="grace", reason="")
    assert serving(spec) is None
    assert history(spec.name)["entries"] == []


def test_a_rollback_puts_the_last_champion_back_or_the_one_that_is_named(spec: Spec) -> None:
    first, second, third = promoted(spec, GOOD, BETTER, BEST)
    entry = serving_of.roll_back(spec.name, None, "broke", "ada")
    assert (entry["verdict"], entry["from"], entry["to"], entry["reason"], serving(spec)) == ("rolled_back", third, second, "broke", second)
    assert serving_of.roll_back(spec.name, first, "older still", "ada")["to"] == first
    assert serving_of.roll_back(spec.name, None, "the one before", "ada")["to"] == second
    with pytest.raises(UserError, match="serves already"):
        serving_of.roll_back(spec.name, second, "?", "ada")
    never = worlds.register(spec, GOOD, 8)
    with pytest.raises(UserError, match="never champion"):
        serving_of.roll_back(spec.name, never, "?", "ada")
    assert verified_history(spec.name)["verified"] is True


def test_a_champion_that_was_deleted_from_mlflow_is_named_and_a_rollback_replaces_it(spec: Spec) -> None:
    first, second = promoted(spec, GOOD, BETTER)
    client().delete_model_version(spec.name, second)
    with pytest.raises(UserError, match="deleted from MLflow"):
        worlds.promote(spec, worlds.register(spec, BEST, 5))
    assert verified_history(spec.name)["verified"] is False
    assert serving_of.roll_back(spec.name, None, "it was deleted", "ada")["to"] == first
    assert serving(spec) == first
    assert verified_history(spec.name)["verified"] is True


def test_nothing_that_does_not_verify_can_be_promoted_or_put_back(spec: Spec) -> None:
    first, _ = promoted(spec, GOOD, BETTER)
    weights = join_uri(spec.storage, "models", spec.name, first, "model.safetensors")
    object_store().write(weights, b"something else")
    with pytest.raises(UserError, match=r"model\.safetensors is altered"):
        serving_of.roll_back(spec.name, first, "?", "ada")
    with pytest.raises(UserError, match=r"model\.safetensors is altered"):
        find_candidate(spec.name, first)
    object_store().delete([weights])
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        serving_of.roll_back(spec.name, first, "?", "ada")


def test_an_altered_champion_is_noticed_by_the_doctor_and_by_the_history_even_with_a_manifest_that_fits(spec: Spec) -> None:
    from infra.committed_folder import commit

    (version,) = promoted(spec, GOOD)
    uri = join_uri(spec.storage, "models", spec.name, version)
    store = object_store()
    commit(store, uri, {"model.safetensors": b"other weights", "lineage.json": store.read(join_uri(uri, "lineage.json"))})
    wrong = [row["words"] for row in diagnose(spec.storage, fix=False)["findings"] if row["state"] == "wrong" and spec.name in row["what"]]
    assert any("not those that were promoted" in words for words in wrong)
    found = verified_history(spec.name)
    assert found["verified"] is False
    assert any("not those that were promoted" in problem for problem in found["problems"])
    with pytest.raises(UserError, match="not those that were promoted"):
        worlds.promote(spec, worlds.register(spec, BEST, 5))


@pytest.mark.parametrize("what", ["evidence", "evaluation"])
def test_an_altered_byte_of_the_evidence_is_found(spec: Spec, what: str) -> None:
    promoted(spec, GOOD)
    store, (entry,) = object_store(), history(spec.name)["entries"]
    judgement = json.loads(store.read(join_uri(entry["evidence_uri"], "judgement.json")))
    uri = {
        "evidence": join_uri(entry["evidence_uri"], "judgement.json"),
        "evaluation": join_uri(judgement["evaluation"]["uri"], "evaluation.json"),
    }[what]
    store.write(uri, store.read(uri) + b" ")
    found = verified_history(spec.name)
    assert found["verified"] is False
    assert f"{what} altered" in found["problems"][0]


def test_a_model_that_does_not_exist_is_a_mistake_that_names_those_that_do(spec: Spec) -> None:
    promoted(spec, GOOD)
    with pytest.raises(UserError, match="no model 'nothing'") as caught:
        history("nothing")
    assert spec.name in str(caught.value)
    with pytest.raises(UserError, match="no version 99"):
        find_candidate(spec.name, "99")
    with pytest.raises(UserError, match="no request 'abc'"):
        answering.answer_request(spec.name, "abc", approve=True, by="ada", reason="")
