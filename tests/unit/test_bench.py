"""What the benchmarks count, and that they would count it if it went wrong."""

from __future__ import annotations

import dataclasses
import math
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from bench.bare import SQLiteGround
from bench.environment import describe_machine, describe_versions, scratch
from bench.ingest import append_all
from bench.plot import draw_lines
from bench.tuning import Variant, arrange
from bench.verification import Notes, Outage, read_notes, verify
from bench.victims import (
    DOMAIN,
    FINGERPRINT,
    Plan,
    catalogue,
    digest,
    last_acknowledged,
    nth_behavior,
    user_name,
    vector_of,
)
from bench.workload import Source, user_names
from builders.repository import DESCRIPTION
from liber_runtime.behavior import Text
from liber_runtime.exceptions import LiberError
from liber_runtime.interest import ShiftPrompt, SummaryPrompt
from liber_runtime.memory import STEPS, MemoryStore, Representation, Result, Task, open_store
from liber_runtime.partition import Count
from liber_runtime.server.repository import read_config

TITLES = {item.item_id: item for item in catalogue()}


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan(f"sqlite:///{tmp_path / 'memory.db'}", tmp_path, seed=1, senders=1, users=2, partition=5)


def send(plan: Plan, count: int, skip: frozenset[int] = frozenset()) -> MemoryStore:
    """A store with a sender's behaviors, all of them acknowledged, those skipped included."""
    store = open_store(plan.url, Count(plan.partition))
    store.describe(
        DOMAIN, catalogue(), {user_name(0, user): {"name": user_name(0, user)} for user in range(plan.users)}
    )
    store.append([nth_behavior(plan, 0, number) for number in range(count) if number not in skip])
    plan.acknowledged(0).write_text(f"{count - 1}\n{count}\n")
    return store


def make(task: Task) -> Text | Representation:
    if task.step == "representation":
        return Representation(vector_of(task.summary, task.shift), FINGERPRINT)
    history = tuple((TITLES[behavior.item_id], behavior.feedback) for behavior in task.behaviors)
    prompt = (
        SummaryPrompt(DOMAIN, task.profile, history)
        if task.step == "summary"
        else ShiftPrompt(DOMAIN, task.previous, task.summary)
    )
    return Text(task.step, f"{task.step} {digest(prompt.text)}", "test", "1", None, None, 0.0, 0.0)


def finish(store: MemoryStore) -> None:
    while tasks := store.claim(STEPS, 100, 60.0, FINGERPRINT):
        store.commit([Result(task, make(task)) for task in tasks])


def test_a_run_without_faults_has_none(plan: Plan) -> None:
    store = send(plan, 60)
    finish(store)
    found = verify(plan, 1, store, Notes())
    store.close()
    partitions = found.partitions
    assert partitions >= 10
    assert found.effects == found.effects_expected == 3 * partitions - plan.users
    assert found.acknowledged == 60
    faults = dataclasses.asdict(found).keys() - {"acknowledged", "partitions", "effects", "effects_expected"}
    assert {name: getattr(found, name) for name in faults} == dict.fromkeys(faults, 0)


def test_an_acknowledged_behavior_that_is_not_there_is_lost(plan: Plan) -> None:
    store = send(plan, 60, skip=frozenset({7, 31}))
    assert verify(plan, 1, store, Notes()).lost == 2
    store.close()


def test_a_behavior_that_nobody_was_told_of_is_not_lost_and_is_counted(plan: Plan) -> None:
    store = send(plan, 60)
    store.append([nth_behavior(plan, 0, 60)])
    found = verify(plan, 1, store, Notes())
    store.close()
    assert (found.lost, found.duplicated, found.unacknowledged) == (0, 0, 1)


def test_behaviors_out_of_order_are_a_break(plan: Plan) -> None:
    store = send(plan, 60, skip=frozenset({3}))
    store.append([nth_behavior(plan, 0, 3)])
    found = verify(plan, 1, store, Notes())
    store.close()
    assert (found.lost, found.order_breaks) == (0, 1)


def test_a_text_made_from_other_inputs_breaks_the_cascade(plan: Plan) -> None:
    store = send(plan, 60)
    (wrong,) = store.claim(("summary",), 1, 60.0)
    store.commit([Result(wrong, Text("summary", "summary of something else", "test", "1", None, None, 0.0, 0.0))])
    finish(store)
    # What was made from the wrong summary fits it: the break is where it happened.
    assert verify(plan, 1, store, Notes()).cascade_breaks == 1
    store.close()


def test_a_vector_of_other_texts_breaks_the_cascade(plan: Plan) -> None:
    store = send(plan, 60)
    tasks: list[Task] = []
    while not tasks:
        store.commit([Result(task, make(task)) for task in store.claim(("summary", "shift"), 100, 60.0)])
        tasks = store.claim(("representation",), 1, 60.0, FINGERPRINT)
    store.commit([Result(tasks[0], Representation(np.zeros(8, dtype=np.float32), FINGERPRINT))])
    finish(store)
    assert verify(plan, 1, store, Notes()).cascade_breaks == 1
    store.close()


def test_effects_that_are_missing_show(plan: Plan) -> None:
    store = send(plan, 60)
    found = verify(plan, 1, store, Notes())
    store.close()
    assert found.effects == 0
    assert found.effects_expected == 3 * found.partitions - plan.users


def test_notes_tell_repeated_calls_and_those_in_flight(tmp_path: Path) -> None:
    killed, other = tmp_path / "worker-0-0.calls", tmp_path / "worker-1-0.calls"
    killed.write_text("S 1.0 aa\nS 2.0 bb\nK 3.0 aa summary 1 ann\n")
    other.write_text("S 5.0 bb\nK 6.0 bb summary 1 bob\nS 7.0 cc\nX 8.0\nS 9.0 cc\nK 9.5 cc shift 2 bob\n")
    notes = read_notes([killed, other])
    assert len(notes.calls) == 5
    assert notes.repeated_calls == 2  # bb, after the kill, and cc, after the failure
    assert notes.in_flight([]) == 1  # bb of the killed worker
    assert notes.in_flight([Outage(7.5, 7.6)]) == 2  # and cc
    assert notes.in_flight([Outage(5.5, 9.2)]) == 4
    assert sorted(call.ended_at for call in notes.calls) == [3.0, 6.0, 8.0, 9.5, math.inf]


def test_a_result_that_was_kept_twice_is_an_effect_twice(plan: Plan) -> None:
    path = plan.notes / "worker-0-0.calls"
    path.write_text("S 1.0 aa\nK 2.0 aa summary 1 ann\nS 3.0 aa\nK 4.0 aa summary 1 ann\n")
    store = send(plan, 10)
    assert verify(plan, 1, store, read_notes([path])).effects_repeated == 1
    store.close()


def test_a_sender_goes_on_from_its_last_note(plan: Plan) -> None:
    assert last_acknowledged(plan.acknowledged(0)) == 0
    plan.acknowledged(0).write_text("3\n11\n")
    assert last_acknowledged(plan.acknowledged(0)) == 11
    assert nth_behavior(plan, 0, 5) == nth_behavior(plan, 0, 5)


@pytest.mark.parametrize("threads", [1, 4])
def test_the_bare_loop_writes_what_the_store_writes(tmp_path: Path, threads: int) -> None:
    users, source = user_names(20), Source(1)
    with SQLiteGround(tmp_path).twins(users, source) as (store, bare):
        for _ in range(3):
            work = [[source.batch(users[thread::threads], 30) for _ in range(4)] for thread in range(threads)]
            appends = [each for turns in zip(*work, strict=True) for each in turns]
            (seconds, calls), plain = bare.beside(appends, lambda work=work: append_all(store, work), threads)  # type: ignore[misc]
            assert min(seconds, plain or 0, *calls) > 0
            assert len(calls) == len(appends)
        bare.check()
        store.append([source.behavior(users[0])])
        with pytest.raises(LiberError, match="differ from the store's"):
            bare.check()


def test_a_plot_is_svg_with_a_line_for_each_series() -> None:
    series = {"one": [(1000.0, 1.0), (10_000.0, 1.1)], "<two>": [(1000.0, 1.0), (10_000.0, 0.9)]}
    root = ElementTree.fromstring(draw_lines(series, title="T", x="x", y="y", limit=1.2))
    assert len(root.findall("{*}polyline")) == 2
    assert "<two>" in [text.text for text in root.findall("{*}text")]


def test_the_machine_is_described_with_its_file_system_and_engines(tmp_path: Path) -> None:
    assert " on " in describe_machine(tmp_path)["file_system"]
    assert "sqlite" in describe_versions()


def test_a_scratch_directory_is_gone_afterwards(tmp_path: Path) -> None:
    with scratch(tmp_path / "made") as directory:
        (directory / "file").touch()
    assert list((tmp_path / "made").iterdir()) == []


def test_a_variant_is_arranged_in_the_repository_that_it_is_served_from(tmp_path: Path) -> None:
    repository = tmp_path / "model_repository"
    shutil.copytree(DESCRIPTION, repository)
    before = {path: path.read_text() for path in repository.glob("*/*/model.py")}
    arrange(repository, Variant("some", instances=3, memory_instances=2, merged=False))
    configs = {path.parent.name: read_config(path) for path in repository.glob("*/config.pbtxt")}
    assert configs["ctr_backbone"].instance_group[0].count == 3
    assert configs["user_memory"].instance_group[0].count == 2
    assert configs["attention_fuser"].instance_group[0].count == 1
    assert not any(config.HasField("dynamic_batching") for config in configs.values())
    assert {path: path.read_text() for path in before} == before
    arrange(repository, Variant("other", spinning=True))
    for path, text in before.items():
        compile(path.read_text(), str(path), "exec")
        assert len(path.read_text()) > len(text)
