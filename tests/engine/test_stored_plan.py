"""Stored plans: followed where no flag says otherwise, ignored with a reason where they do not apply."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from text_models import load

from moestream import stored_plan
from moestream.config import RunConfig
from moestream.stored_plan import StoredPlan, find, follow, forget, machine_fingerprint, model_fingerprint, save

SLOTS = 7


@pytest.fixture(autouse=True)
def plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(stored_plan.FOLDER_VARIABLE, str(tmp_path / "plans"))
    return tmp_path / "plans"


def plan_of(folder: Path, **changes: Any) -> StoredPlan:
    plan = StoredPlan(
        cache="hybrid",
        slots=SLOTS,
        ram=10**9,
        date="2026-11-23T12:00:00+00:00",
        machine=machine_fingerprint(),
        model=model_fingerprint(folder),
        measured={"candidates": []},
    )
    return dataclasses.replace(plan, **changes)


def test_a_plan_comes_back_as_it_was_stored_until_it_is_forgotten(folder: Path, plans: Path) -> None:
    assert find(folder) is None
    plan = plan_of(folder)
    path = save(folder, plan)
    assert [path] == list(plans.iterdir())
    assert find(folder) == plan
    newer = plan_of(folder, cache="page", slots=3)
    save(folder, newer)
    assert find(folder) == newer
    assert forget(folder)
    assert not forget(folder)
    assert find(folder) is None


def cut(text: str) -> str:
    return text[: len(text) // 2]


def changed(**fields: Any) -> Callable[[str], str]:
    return lambda text: json.dumps(json.loads(text) | fields)


def without(field: str) -> Callable[[str], str]:
    return lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != field})


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut, "Unterminated|Expecting"),
        (lambda text: "[1, 2]", "is not a JSON object"),
        (lambda text: "[" * 100_000, ""),
        (without("slots"), "field slots is missing"),
        (changed(version=2), "version is 2"),
        (changed(cache="none"), "cache is 'none'"),
        (changed(cache=["arena"]), "cache is"),
        (changed(slots=-1), "must be positive"),
        (changed(slots="many"), "slots is 'many'"),
        (changed(slots=True), "slots is True"),
        (changed(measured=None), "measured is None"),
        (changed(model="another"), "the model's files have changed"),
        (changed(machine={"cpu": "another"}), "another machine .*cpu was another"),
    ],
)
def test_damaged_and_stale_plans_are_ignored_by_name(folder: Path, damage: Callable[[str], str], reason: str) -> None:
    path = save(folder, plan_of(folder))
    path.write_text(damage(path.read_text()))
    with pytest.warns(UserWarning, match=f"stored plan ignored: .*{path.name}: .*{reason}.*--forget"):
        assert find(folder) is None


def test_a_changed_model_is_another_model(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).symlink_to(file.resolve())
    assert model_fingerprint(copy) == model_fingerprint(folder)
    (copy / "config.json").unlink()
    (copy / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert model_fingerprint(copy) != model_fingerprint(folder)


def test_flags_come_before_stored_plans_before_the_default(folder: Path) -> None:
    save(folder, plan_of(folder))
    settled, plan = follow(RunConfig(), folder)
    assert (settled.cache, plan) == ("hybrid", plan_of(folder))
    for run, cache in (
        (RunConfig(cache="page"), "page"),
        (RunConfig(ram=10**9), "arena"),
        (RunConfig(stored_plan=False), "arena"),
    ):
        settled, plan = follow(run, folder)
        assert (settled.cache, plan) == (cache, None)


def test_a_damaged_plan_that_nobody_asks_for_is_not_even_read(folder: Path) -> None:
    save(folder, plan_of(folder)).write_text("{")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        follow(RunConfig(ram=10**9), folder)


def test_a_loaded_model_follows_its_plan_and_says_so(folder: Path) -> None:
    save(folder, plan_of(folder))
    with load(folder, ram=None) as llm:
        setup = llm.runtime.setup
        assert (setup.cache, setup.slots, setup.measured) == ("hybrid", SLOTS, "2026-11-23")
        assert llm.runtime.store.arena.slots == SLOTS
        receipt = llm.generate([1, 2, 3], max_tokens=2, ignore_eos=True).receipt
        assert "plan measured on 2026-11-23" in "\n".join(receipt.lines())
        assert receipt.to_dict()["measured"] == "2026-11-23"
    with load(folder, ram=None, stored_plan=False) as llm:
        assert (llm.runtime.setup.cache, llm.runtime.setup.measured) == ("arena", None)
        assert llm.runtime.setup.slots > SLOTS


def test_a_plan_never_takes_more_than_the_budget_allows(folder: Path) -> None:
    with load(folder, ram=None, stored_plan=False) as llm:
        largest = llm.runtime.plan
    save(folder, plan_of(folder, slots=1000 * largest.slots, ram=1000 * largest.total))
    with load(folder, ram=None) as llm:
        assert llm.runtime.plan.slots == largest.slots
        assert llm.runtime.plan.total <= llm.runtime.plan.budget
    save(folder, plan_of(folder, slots=1))
    with load(folder, ram=None) as llm:  # fewer slots than one token needs would be no plan
        assert llm.runtime.plan.slots == llm.runtime.plan.slots_minimum
