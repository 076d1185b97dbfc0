"""What every engine of `MemoryStore` promises. An engine's test module subclasses `MemoryStoreContract`.

The subclass gives one fixture, ``engine``, an `Engine`. Everything else is the same for all engines.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from liber_runtime.behavior import Behavior, Domain, Item, Text
from liber_runtime.exceptions import ConfigurationError, InvalidInputError, StoreError
from liber_runtime.memory import (
    STEPS,
    Appended,
    Committed,
    DeadStep,
    Failure,
    Forgotten,
    Mark,
    MemoryStore,
    Representation,
    Result,
    Step,
    Task,
    open_store,
)
from liber_runtime.partition import AnyOf, Count, InterestDrift, PartitionCondition, TimeGap, stream

DOMAIN = Domain("films", "film", "stars", (1.0, 5.0), 3.0, ("genre", "era"), "genres", "year")
TEXT_STEPS: tuple[Step, ...] = ("summary", "shift")


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Engine(Protocol):
    """A place for one store of the engine under test."""

    url: str

    def open(self, condition: PartitionCondition | None = None) -> MemoryStore:
        """Opens the store at `url`; closed by the fixture. Leases run on `clock`."""

    clock: Clock

    def fresh(self) -> Engine:
        """Another place, empty."""

    def now(self) -> float:
        """By the clock that steps age by, in seconds; steps may be taken for up to two milliseconds older."""

    def let_age(self) -> float:
        """Lets steps grow older; returns by how many seconds at least."""


def behavior(user: str, number: int, feedback: float = 4.0) -> Behavior:
    return Behavior(user, f"item-{number % 7}", feedback, 1e9 + number, f"event-{number}")


def run(user: str, count: int, start: int = 0) -> list[Behavior]:
    return [behavior(user, number) for number in range(start, start + count)]


def make(task: Task, fingerprint: str = "encoder-1") -> Result:
    """A result that tells from which texts it came."""
    if task.step == "summary":
        text = "summary of " + ",".join(behavior.event_id for behavior in task.behaviors)
    elif task.step == "shift":
        text = f"shift from [{task.previous}] to [{task.summary}]"
    else:
        vector = np.full(4, task.number + (0.5 if task.shift else 0.0), dtype=np.float32)
        return Result(task, Representation(vector, fingerprint))
    return Result(task, Text(task.step, text, "test", "v1", 10, None, 0.25, 5.0))


def work_all(store: MemoryStore, steps: Sequence[Step] = STEPS, fingerprint: str = "encoder-1") -> Counter[str]:
    done: Counter[str] = Counter()
    while tasks := store.claim(steps, 7, 60.0, fingerprint):
        committed = store.commit([make(task, fingerprint) for task in tasks])
        assert committed == Committed(len(tasks), 0)
        done.update(task.step for task in tasks)
    return done


def give_back(
    store: MemoryStore, tasks: Sequence[Task], error: str, retry_seconds: float | None, attempted: bool = True
) -> Committed:
    return store.commit([Result(task, Failure(error, retry_seconds, attempted)) for task in tasks])


def partitions_of(store: MemoryStore, user: str) -> list[tuple[str, ...]]:
    timeline = store.timeline(user)
    assert timeline is not None
    return [tuple(behavior.event_id for behavior in record.behaviors) for record in timeline.partitions]


# -- other processes ---------------------------------------------------------------------------------------------------


def append_in_process(url: str, user: str, first: int, count: int) -> None:
    store = open_store(url, Count(5))
    for number in range(first, first + count, 3):
        store.append([behavior(user, n) for n in range(number, min(number + 3, first + count))])
    store.close()


def append_until_killed(url: str, user: str, first: int, log: str) -> None:
    """Writes each event's number to `log` after its acknowledgement, never before."""
    store = open_store(url, Count(5))
    number = first
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    while True:
        store.append([behavior(user, number), behavior(user, number + 1)])
        os.write(descriptor, f"{number}\n{number + 1}\n".encode())
        number += 2


def work_in_process(url: str, counts: multiprocessing.Queue[Counter[str]]) -> None:
    store = open_store(url)
    counts.put(work_all(store))
    store.close()


def spawn(function: Callable[..., None], *arguments: object) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    return process


# -- the model ---------------------------------------------------------------------------------------------------------

StepKey: TypeAlias = tuple[str, int, Step, str]
"""User, number, step, and the fingerprint wanted of a representation."""


class Model:
    """Algorithm 1 and the knowledge it needs in plain Python, written from the paper and the protocol.

    There is no queue in it. Whatever is made remembers what it was made from; a step is ready when what is there was
    made from something else than it would be made from now.
    """

    SIZE, GAP = 3, 50.0
    condition = AnyOf(Count(SIZE), TimeGap(GAP))

    def __init__(self) -> None:
        self.cache: dict[str, list[Behavior]] = {}
        self.partitions: dict[str, list[list[Behavior]]] = {}
        self.seen: set[tuple[str, str]] = set()
        self.texts: dict[tuple[str, int, Step], tuple[str, object]] = {}
        self.vectors: dict[tuple[str, int, str], tuple[list[float], object]] = {}
        self.outdated: set[tuple[str, int, Step]] = set()
        self.wanted: set[str] = set()
        self.dead: dict[StepKey, object] = {}

    def append(self, behaviors: Sequence[Behavior]) -> Appended:
        kept = cut = 0
        for new in behaviors:
            if (new.user_id, new.event_id) in self.seen:
                continue
            self.seen.add((new.user_id, new.event_id))
            kept += 1
            cache = self.cache.setdefault(new.user_id, [])
            partitions = self.partitions.setdefault(new.user_id, [])
            if cache and new.timestamp - cache[-1].timestamp > self.GAP:
                partitions.append(list(cache))
                cache.clear()
                cut += 1
            cache.append(new)
            if len(cache) == self.SIZE:
                partitions.append(list(cache))
                cache.clear()
                cut += 1
        return Appended(kept, len(behaviors) - kept, cut)

    def held_of(self, user: str) -> list[Behavior]:
        return [b for run in self.partitions.get(user, []) for b in run] + self.cache.get(user, [])

    def forget(self, user: str) -> Forgotten:
        gone = Forgotten(len(self.held_of(user)), len(self.partitions.pop(user, [])))
        self.cache.pop(user, None)
        self.seen = {key for key in self.seen if key[0] != user}
        for made in (self.texts, self.vectors, self.dead):
            for key in [key for key in made if key[0] == user]:
                del made[key]  # type: ignore[attr-defined]
        self.outdated = {key for key in self.outdated if key[0] != user}
        return gone

    def forget_event(self, user: str, event_id: str) -> Forgotten:
        runs = [*enumerate(self.partitions.get(user, []), 1), (0, self.cache.get(user, []))]
        for number, behaviors in runs:
            kept = [b for b in behaviors if b.event_id != event_id]
            if len(kept) == len(behaviors):
                continue
            behaviors[:] = kept
            if number:
                erased = {(user, number, "summary"), (user, number, "shift"), (user, number + 1, "shift")}
                self.texts = {key: made for key, made in self.texts.items() if key not in erased}
                self.outdated -= {key for key in self.outdated if key in erased}
                self.vectors = {
                    k: v for k, v in self.vectors.items() if k[:2] not in {(user, number), (user, number + 1)}
                }
                self.dead = {k: v for k, v in self.dead.items() if k[:2] != (user, number)}
                self.dead = {k: v for k, v in self.dead.items() if k[:2] != (user, number + 1) or k[2] == "summary"}
            return Forgotten(1, 0)
        return Forgotten(0, 0)

    def rewrite(self, user: str) -> int:
        texts = [key for key in self.texts if key[0] == user]
        summaries = {number for _, number, step in texts if step == "summary"}
        shifts = {number for _, number, step in texts if step == "shift"}
        for number in summaries:
            self.outdated.add((user, number, "summary"))
            self.dead.pop((user, number, "summary", ""), None)
        # The others' summaries are made again, and they with them.
        alone = {n for n in shifts if not {n, n - 1} & summaries}
        self.outdated |= {(user, number, "shift") for number in alone}
        return len(summaries) + len(alone)

    def encode_by(self, fingerprints: set[str]) -> None:
        stale = {
            (user, number, fingerprint)
            for (user, number, step, wanted) in self.open_steps()
            if step == "representation" and wanted not in (fingerprints or {""})
            for fingerprint in ({wanted} if wanted else ENCODINGS)
        }
        kept = fingerprints | self.wanted
        self.vectors = {k: v for k, v in self.vectors.items() if k[2] in kept and k not in stale}
        self.wanted = set(fingerprints)
        self.dead = {k: v for k, v in self.dead.items() if k[2] != "representation" or k[3] in (fingerprints or {""})}

    def needs_shift(self, user: str, number: int) -> bool:
        return number > 1 and bool(self.partitions[user][number - 2])

    def inputs(self, user: str, number: int, step: Step) -> object:
        """What the step would be made from now; None if that is not there, or about to be replaced."""
        if step == "summary":
            return tuple(b.event_id for b in self.partitions[user][number - 1]) or None
        texts: list[tuple[int, Step]] = [(number, "summary")]
        if step == "shift":
            if not self.needs_shift(user, number):
                return None
            texts.append((number - 1, "summary"))
        elif self.needs_shift(user, number):
            texts.append((number, "shift"))
        if any((user, *text) not in self.texts or self.owed(user, *text) for text in texts):
            return None
        return tuple(self.texts[(user, *text)] for text in texts)

    def owed(self, user: str, number: int, step: Step) -> bool:
        """Whether a text is to be made, now or once its inputs are there."""
        if (user, number, step) in self.outdated or (user, number, step) not in self.texts:
            return True
        if step == "summary":
            return False
        inputs = self.inputs(user, number, step)
        return inputs is not None and self.texts[user, number, step][1] != inputs

    def open_steps(self) -> dict[StepKey, object]:
        """Steps that can be made now, with what they are made from."""
        found: dict[StepKey, object] = {}
        for user, partitions in self.partitions.items():
            for number in range(1, len(partitions) + 1):
                for step in TEXT_STEPS:
                    inputs = self.inputs(user, number, step)
                    if inputs is not None and self.owed(user, number, step):
                        found[user, number, step, ""] = inputs
                inputs = self.inputs(user, number, "representation")
                if inputs is None:
                    continue
                made = {f: self.vectors.get((user, number, f), (None, None))[1] for f in ENCODINGS}
                for wanted in self.wanted:
                    if made[wanted] != inputs:
                        found[user, number, "representation", wanted] = inputs
                if not self.wanted and inputs not in made.values():
                    found[user, number, "representation", ""] = inputs
        return found

    def ready_steps(self) -> dict[StepKey, object]:
        steps = self.open_steps()
        self.dead = {key: inputs for key, inputs in self.dead.items() if steps.get(key) == inputs}
        return {key: inputs for key, inputs in steps.items() if key not in self.dead}

    def commit(self, task: Task, result: Result) -> None:
        inputs = self.open_steps()[key_of(task)]
        if isinstance(result.made, Text):
            self.texts[task.user_id, task.number, task.step] = (result.made.text, inputs)
            self.outdated.discard((task.user_id, task.number, task.step))
        else:
            assert isinstance(result.made, Representation)
            vector = result.made.vector.tolist()
            self.vectors[task.user_id, task.number, result.made.fingerprint] = (vector, inputs)


def key_of(task: Task) -> StepKey:
    return task.user_id, task.number, task.step, task.fingerprint


USERS = ("ann", "bo", "čeněk")
ENCODINGS = ("encoder-1", "encoder-2")


class MemoryMachine(RuleBasedStateMachine):
    """Drives a store and the model side by side; after every step they must agree."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine.fresh()
        self.store = self.engine.open(Model.condition)
        self.model = Model()
        self.held: list[tuple[Task, object]] = []
        self.time = 0.0
        self.made = 0

    def teardown(self) -> None:
        self.store.close()

    def make(self, task: Task) -> Result:
        """As `make`, but never the same text twice, so that every text tells which others it was made from."""
        result = make(task, task.fingerprint or ENCODINGS[0])
        if isinstance(result.made, Text):
            self.made += 1
            result = Result(task, dataclasses.replace(result.made, text=f"{self.made}: {result.made.text[:200]}"))
        return result

    def still_held(self) -> list[Task]:
        """Claims of which the step is still what it was when it was claimed."""
        ready = self.model.ready_steps()
        self.held = [(task, inputs) for task, inputs in self.held if ready.get(key_of(task)) == inputs]
        return [task for task, _ in self.held]

    def let_go(self, affected: Callable[[Task], bool]) -> None:
        """Checks that claims on what was taken back commit nothing."""
        before = [task for task, _ in self.held]
        self.held = [(task, inputs) for task, inputs in self.held if not affected(task)]
        still = self.still_held()
        void = [task for task in before if task not in still]
        assert self.store.commit([self.make(task) for task in void]) == Committed(0, len(void))

    @rule(
        events=st.lists(
            st.tuples(st.sampled_from(USERS), st.integers(0, 60), st.sampled_from([0.0, 1.0, 60.0])), max_size=14
        )
    )
    def append(self, events: list[tuple[str, int, float]]) -> None:
        behaviors = []
        for user, number, pause in events:
            self.time += pause
            behaviors.append(Behavior(user, f"item {number}", float(number), self.time, f"e{number}"))
        assert self.store.append(behaviors) == self.model.append(behaviors)

    @rule(
        steps=st.sets(st.sampled_from(STEPS), min_size=1),
        limit=st.integers(1, 5),
        fingerprint=st.sampled_from(ENCODINGS),
    )
    def claim(self, steps: set[Step], limit: int, fingerprint: str) -> None:
        ready = self.model.ready_steps()
        held = {key_of(task) for task in self.still_held()}
        free = {key for key in ready if key not in held and key[2] in steps and key[3] in ("", fingerprint)}
        tasks = self.store.claim(steps, limit, 100.0, fingerprint)
        claimed = {key_of(task) for task in tasks}
        assert len(claimed) == len(tasks) == min(limit, len(free))
        assert claimed <= free
        for task in tasks:
            self.check_task(task)
        self.held += [(task, ready[key_of(task)]) for task in tasks]

    def check_task(self, task: Task) -> None:
        def text(number: int, step: Step) -> str:
            return self.model.texts[task.user_id, number, step][0]

        if task.step == "summary":
            assert list(task.behaviors) == self.model.partitions[task.user_id][task.number - 1]
            return
        assert task.summary == text(task.number, "summary")
        assert task.previous == (text(task.number - 1, "summary") if task.step == "shift" else "")
        if task.step == "representation":
            shift = self.model.needs_shift(task.user_id, task.number)
            assert task.shift == (text(task.number, "shift") if shift else "")

    @precondition(lambda self: self.still_held())
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(self.still_held()), min_size=1, unique_by=id))
        results = [self.make(task) for task in chosen]
        assert self.store.commit(results) == Committed(len(chosen), 0)
        assert self.store.commit(results) == Committed(0, len(chosen))
        for task, result in zip(chosen, results, strict=True):
            self.model.commit(task, result)
        self.let_go(lambda other: any(other is task for task in chosen))

    @precondition(lambda self: self.still_held())
    @rule(dead=st.booleans())
    def give_back_one(self, dead: bool) -> None:
        task = self.still_held().pop()
        if dead:
            self.model.dead[key_of(task)] = self.model.open_steps()[key_of(task)]
        assert give_back(self.store, [task], "no answer", None if dead else 0.0) == Committed(1, 0)
        self.held = [(other, inputs) for other, inputs in self.held if other is not task]
        assert self.store.commit([self.make(task)]) == Committed(0, 1)

    @rule()
    def revive(self) -> None:
        self.model.ready_steps()
        assert self.store.revive() == len(self.model.dead)
        self.model.dead.clear()

    @precondition(lambda self: self.still_held())
    @rule()
    def let_leases_expire(self) -> None:
        held = self.still_held()
        self.engine.clock.now += 60.0
        assert self.store.renew(held[:1], 100.0) == []
        self.engine.clock.now += 50.0
        taken = [task for fingerprint in ENCODINGS for task in self.store.claim(STEPS, 1000, 100.0, fingerprint)]
        ready = self.model.ready_steps()
        assert {key_of(task) for task in taken} == set(ready) - {key_of(task) for task in held[:1]}
        assert self.store.commit([self.make(task) for task in held[1:]]) == Committed(0, len(held) - 1)
        self.held = [(task, ready[key_of(task)]) for task in [*held[:1], *taken]]

    @rule(user=st.sampled_from(USERS))
    def forget(self, user: str) -> None:
        assert self.store.forget(user) == self.model.forget(user)
        self.let_go(lambda task: task.user_id == user)
        assert self.store.timeline(user) is None

    @precondition(lambda self: any(self.model.held_of(user) for user in USERS))
    @rule(data=st.data())
    def forget_event(self, data: st.DataObject) -> None:
        event = data.draw(st.sampled_from([b for user in USERS for b in self.model.held_of(user)]))
        number = next((n for n, run in enumerate(self.model.partitions[event.user_id], 1) if event in run), 0)
        assert self.store.forget(event.user_id, event.event_id) == self.model.forget_event(
            event.user_id, event.event_id
        )
        self.let_go(
            lambda task: (
                number > 0
                and task.user_id == event.user_id
                and (task.number == number or (task.number == number + 1 and task.step != "summary"))
            )
        )
        assert self.store.forget(event.user_id, event.event_id) == Forgotten(0, 0)

    @rule(user=st.sampled_from(USERS))
    def rewrite(self, user: str) -> None:
        rewritten = {key for key in self.model.texts if key[0] == user}
        assert self.store.rewrite(user_ids=[user]) == self.model.rewrite(user)
        self.let_go(lambda task: (task.user_id, task.number, task.step) in rewritten)

    @rule(fingerprints=st.sets(st.sampled_from(ENCODINGS), min_size=1))
    def encode_by(self, fingerprints: set[str]) -> None:
        self.store.encode_by(fingerprints)
        self.model.encode_by(fingerprints)
        self.let_go(lambda task: task.step == "representation" and task.fingerprint not in fingerprints)

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = self.engine.open()

    @rule(history=st.integers(0, 12), newest=st.integers(0, 4), fingerprint=st.sampled_from(ENCODINGS))
    def read(self, history: int, newest: int, fingerprint: str) -> None:
        asked = [*USERS, "nobody", USERS[0]]
        for user, memory in zip(asked, self.store.read(asked, history, newest, fingerprint), strict=True):
            if user not in self.model.cache:
                assert memory is None
                continue
            assert memory is not None
            everything = self.model.held_of(user)
            expected = [(b.item_id, b.feedback) for b in everything][max(0, len(everything) - history) :]
            assert list(memory.history) == expected
            theirs = {f: sorted(n for u, n, f_ in self.model.vectors if (u, f_) == (user, f)) for f in ENCODINGS}
            numbers = theirs[fingerprint]
            vectors = [self.model.vectors[user, n, fingerprint][0] for n in numbers[max(0, len(numbers) - newest) :]]
            assert memory.representations.tolist() == vectors
            lost = newest > 0 and not numbers and fingerprint not in self.model.wanted
            assert memory.foreign == ({f for f in ENCODINGS if theirs[f]} if lost else set())

    @invariant()
    def timelines_agree(self) -> None:
        for user, cache in self.model.cache.items():
            timeline = self.store.timeline(user)
            assert timeline is not None
            assert list(timeline.cache) == cache
            assert [list(record.behaviors) for record in timeline.partitions] == self.model.partitions[user]
            for record in timeline.partitions:
                for step, text in (("summary", record.summary), ("shift", record.shift)):
                    made = self.model.texts.get((user, record.number, step))
                    assert (text.text if text else None) == (made[0] if made else None)
                vectors = {f: made.vector.tolist() for f, made in record.representations.items()}
                expected = {f: self.model.vectors.get((user, record.number, f)) for f in ENCODINGS}
                assert vectors == {f: made[0] for f, made in expected.items() if made}

    @invariant()
    def statistics_agree(self) -> None:
        statistics = self.store.statistics()
        assert statistics.users == sum(bool(self.model.held_of(user)) for user in USERS)
        assert statistics.behaviors == sum(len(self.model.held_of(user)) for user in USERS)
        assert statistics.partitions == sum(map(len, self.model.partitions.values()))
        waiting = Counter(step for _, _, step, _ in self.model.ready_steps())
        assert statistics.pending == {step: waiting[step] for step in STEPS}
        dead = Counter(step for _, _, step, _ in self.model.dead)
        assert statistics.dead == {step: dead[step] for step in STEPS}
        assert not any(age for step, age in statistics.age_seconds.items() if not waiting[step])
        assert statistics.vectors == Counter(fingerprint for _, _, fingerprint in self.model.vectors)
        assert statistics.encodings == self.model.wanted


# -- the suite ---------------------------------------------------------------------------------------------------------


class MemoryStoreContract:
    """Subclass with an ``engine`` fixture."""

    examples = 50  # runs of the state machine: fewer where a store costs more to make

    @pytest.fixture
    def engine(self) -> Engine:
        raise NotImplementedError

    @pytest.fixture
    def store(self, engine: Engine) -> MemoryStore:
        return engine.open(Count(5))

    # append

    def test_counts_what_it_kept_and_cut(self, store: MemoryStore) -> None:
        assert store.append([]) == Appended(0, 0, 0)
        assert store.append(run("ann", 12)) == Appended(12, 0, 2)
        assert partitions_of(store, "ann") == [tuple(f"event-{n}" for n in r) for r in (range(5), range(5, 10))]
        timeline = store.timeline("ann")
        assert timeline is not None
        assert timeline.cache == tuple(run("ann", 2, 10))
        assert [record.number for record in timeline.partitions] == [1, 2]

    def test_a_known_event_changes_nothing(self, store: MemoryStore) -> None:
        store.append(run("ann", 7))
        again = [dataclasses.replace(b, feedback=1.0) for b in run("ann", 7)]
        assert store.append([*again, behavior("ann", 7), behavior("ann", 7)]) == Appended(1, 8, 0)
        timeline = store.timeline("ann")
        assert timeline is not None
        assert [b.feedback for b in timeline.cache] == [4.0] * 3

    def test_the_same_event_id_of_two_users_is_two_behaviors(self, store: MemoryStore) -> None:
        assert store.append([behavior("ann", 1), behavior("bo", 1)]) == Appended(2, 0, 0)

    def test_users_may_be_mixed_in_one_call(self, store: MemoryStore) -> None:
        mixed = [b for pair in zip(run("ann", 6), run("bo", 6), strict=True) for b in pair]
        assert store.append(mixed) == Appended(12, 0, 2)
        assert partitions_of(store, "ann") == partitions_of(store, "bo")

    def test_arrival_order_is_kept_whatever_the_timestamps_say(self, store: MemoryStore) -> None:
        backwards = run("ann", 5)[::-1]
        store.append(backwards)
        assert partitions_of(store, "ann") == [tuple(b.event_id for b in backwards)]

    @pytest.mark.parametrize(
        "identity", ["a b", "čeněk", "漢字", "'; DROP TABLE users; --", "%", "u\u2028v", "x" * 512]
    )
    def test_any_valid_id_comes_back(self, store: MemoryStore, identity: str) -> None:
        behaviors = [Behavior(identity, identity, 0.1 + 0.2, 1e9 + n / 3, f"{identity[:500]}{n}") for n in range(6)]
        store.append(behaviors)
        timeline = store.timeline(identity)
        assert timeline is not None
        assert [*timeline.partitions[0].behaviors, *timeline.cache] == behaviors
        (memory,) = store.read([identity], 20, 1, "encoder-1")
        assert memory is not None
        assert memory.history == ((identity, 0.1 + 0.2),) * 6

    def test_a_failing_condition_leaves_nothing_behind(self, engine: Engine) -> None:
        class Broken:
            def boundary(self, cache: Sequence[Behavior], previous: object) -> int:
                return 99 if len(cache) == 2 else 0

            def __str__(self) -> str:
                return "broken"

        store = engine.open(Broken())
        with pytest.raises(ConfigurationError, match="broken cut 99"):
            store.append([behavior("ann", 1), behavior("ann", 2)])
        assert store.users() == []
        assert store.statistics().behaviors == 0
        assert store.append([behavior("ann", 1)]) == Appended(1, 0, 0)

    def test_chunks_do_not_matter(self, engine: Engine) -> None:
        # Within the test, because hypothesis wants a function of its own for each engine.
        @settings(max_examples=25, deadline=None)
        @given(data=st.data())
        def check(data: st.DataObject) -> None:
            condition = AnyOf(Count(4), TimeGap(30))
            pauses = data.draw(st.lists(st.sampled_from([1.0, 31.0]), max_size=40))
            behaviors, moment = [], 0.0
            for number, pause in enumerate(pauses):
                moment += pause
                behaviors.append(Behavior("ann" if number % 3 else "bo", "item", 1.0, moment, str(number)))
            store = engine.fresh().open(condition)
            start = 0
            while start < len(behaviors):
                size = data.draw(st.integers(1, 9))
                store.append(behaviors[start : start + size])
                start += size
            for user in ("ann", "bo"):
                once = stream(condition, (), [b for b in behaviors if b.user_id == user])
                timeline = store.timeline(user)
                kept = [r.behaviors for r in timeline.partitions] if timeline else []
                assert (kept, timeline.cache if timeline else ()) == (list(once.partitions), once.cache)
            store.close()

        check()

    def test_a_model_based_condition_sees_the_last_partition(self, engine: Engine) -> None:
        vectors = {"left": np.array([1.0, 0.0], np.float32), "right": np.array([0.0, 1.0], np.float32)}
        condition = InterestDrift(vectors, distance=0.5, least=2, first=3)
        behaviors = [
            Behavior("ann", item, 1.0, float(n), str(n))
            for n, item in enumerate(["left"] * 3 + ["left"] * 2 + ["right"] * 9)
        ]
        store = engine.open(condition)
        for one in behaviors:
            store.append([one])
        once = stream(condition, (), behaviors)
        assert len(once.partitions) >= 2
        timeline = store.timeline("ann")
        assert timeline is not None
        assert tuple(record.behaviors for record in timeline.partitions) == once.partitions

    # condition and reopening

    def test_the_default_condition_is_the_papers(self, engine: Engine) -> None:
        assert engine.open().condition == Count(20)

    def test_the_condition_is_kept(self, engine: Engine) -> None:
        condition = AnyOf(Count(7), TimeGap(1800))
        engine.open(condition).close()
        assert engine.open().condition == condition
        assert engine.open(condition).condition == condition

    def test_another_condition_is_refused(self, engine: Engine) -> None:
        engine.open(Count(7)).close()
        with pytest.raises(ConfigurationError, match=r"cuts partitions by count\(7\), not count\(8\)"):
            engine.open(Count(8))

    def test_a_condition_without_a_name_is_refused(self, engine: Engine) -> None:
        class Nameless:
            def boundary(self, cache: Sequence[Behavior], previous: object) -> int:
                return 0

        with pytest.raises(ConfigurationError, match="give it a __str__"):
            engine.open(Nameless())

    def test_a_condition_made_in_python_must_be_given_to_append(self, engine: Engine) -> None:
        drift = InterestDrift({"item": np.ones(2, np.float32)})
        engine.open(drift).append([behavior("ann", 1)])
        store = engine.open()
        assert store.users() == ["ann"]
        with pytest.raises(ConfigurationError, match="interest_drift"):
            store.append([behavior("ann", 2)])
        assert engine.open(drift).append([behavior("ann", 2)]) == Appended(1, 0, 0)

    def test_everything_is_there_after_reopening(self, engine: Engine) -> None:
        store = engine.open(Count(5))
        store.describe(DOMAIN, [Item("item-1", "One", {"genres": ("a", "b"), "year": 1994, "stars": 4.5})])
        store.describe(profiles={"ann": {"age": 31, "job": "poet"}})
        store.append(run("ann", 12))
        work_all(store)
        before = (
            store.timeline("ann"),
            store.statistics(),
            store.read(["ann"], 20, 5, "encoder-1"),
            store.items(["item-1"]),
        )
        store.close()
        store = engine.open()
        after = (
            store.timeline("ann"),
            store.statistics(),
            store.read(["ann"], 20, 5, "encoder-1"),
            store.items(["item-1"]),
        )
        assert repr(after) == repr(before)
        assert store.domain == DOMAIN

    # items and profiles

    def test_items_and_domain(self, store: MemoryStore) -> None:
        assert store.domain is None
        one, two = Item("1", "One", {"genres": ("a",), "year": 1994}), Item("2", 'Two "II"\x00\n')
        store.describe(DOMAIN, [one, two])
        assert store.domain == DOMAIN
        assert store.items(["1", "2", "2", "unknown"]) == {"1": one, "2": two}
        store.describe(dataclasses.replace(DOMAIN, name="new"), [dataclasses.replace(one, title="Uno")])
        assert store.domain is not None
        assert store.domain.name == "new"
        assert store.items(["1"])["1"].title == "Uno"
        assert store.statistics().items == 2

    def test_text_that_is_not_utf8_is_refused_whole(self, store: MemoryStore) -> None:
        with pytest.raises(InvalidInputError, match="not valid UTF-8"):
            store.describe(DOMAIN, [Item("1", "fine"), Item("2", "broken \ud800")])
        assert store.domain is None
        assert store.items(["1"]) == {}

    def test_profiles(self, store: MemoryStore) -> None:
        store.describe(profiles={"ann": {"age": 31, "tags": ("x", "y")}, "bo": {}})
        store.describe(profiles={"ann": {"age": 32, "tags": ("x", "y")}})
        (memory,) = store.read(["ann"], 20, 5, "encoder-1")
        assert memory is not None
        assert memory.profile == {"age": 32, "tags": ("x", "y")}
        assert memory.history == ()
        assert memory.representations.shape == (0, 0)
        store.append(run("ann", 5))
        (task,) = store.claim(["summary"], 1, 60.0)
        assert task.profile == {"age": 32, "tags": ("x", "y")}
        timeline = store.timeline("ann")
        assert timeline is not None
        assert timeline.profile == {"age": 32, "tags": ("x", "y")}

    def test_users_are_those_with_behaviors_or_a_profile(self, store: MemoryStore) -> None:
        store.append(run("zoe", 1))
        store.describe(profiles={"mia": {"age": 1}})
        store.append([*run("ann", 1), *run("zoe", 1, 1)])
        assert sorted(store.users()) == ["ann", "mia", "zoe"]
        assert store.statistics().users == 2

    # the cascade

    def test_the_cascade(self, store: MemoryStore) -> None:
        store.append(run("ann", 16))
        assert store.claim(["shift", "representation"], 9, 60.0) == []
        summaries = store.claim(["summary"], 9, 60.0)
        assert [(task.number, task.step, task.attempts) for task in summaries] == [
            (1, "summary", 1),
            (2, "summary", 1),
            (3, "summary", 1),
        ]
        assert [b for task in summaries for b in task.behaviors] == run("ann", 15)

        store.commit([make(summaries[2])])
        assert store.claim(STEPS, 9, 60.0) == []

        store.commit([make(summaries[0])])
        (first,) = store.claim(STEPS, 9, 60.0)
        assert (first.number, first.step, first.shift) == (1, "representation", "")
        assert store.statistics().pending == {"summary": 1, "shift": 0, "representation": 1}

        store.commit([make(summaries[1])])
        shifts = store.claim(STEPS, 9, 60.0)
        assert [(task.number, task.step) for task in shifts] == [(2, "shift"), (3, "shift")]
        texts = [made.text for task in summaries if isinstance(made := make(task).made, Text)]
        assert [(task.previous, task.summary) for task in shifts] == [(texts[0], texts[1]), (texts[1], texts[2])]

        store.commit([make(task) for task in shifts])
        representations = store.claim(STEPS, 9, 60.0)
        assert [(task.number, task.summary) for task in representations] == [(2, texts[1]), (3, texts[2])]
        assert all(task.shift.startswith("shift from") for task in representations)

        store.commit([make(task) for task in [first, *representations]])
        assert store.claim(STEPS, 9, 60.0) == []
        (memory,) = store.read(["ann"], 20, 9, "encoder-1")
        assert memory is not None
        assert memory.representations.tolist() == [[1.0] * 4, [2.5] * 4, [3.5] * 4]
        assert memory.representations.dtype == np.float32
        assert memory.foreign == frozenset()

    def test_provenance_is_kept(self, store: MemoryStore) -> None:
        store.append(run("ann", 10))
        work_all(store)
        timeline = store.timeline("ann")
        assert timeline is not None
        first, second = timeline.partitions
        assert first.shift is None
        assert second.summary == Text(
            "summary", "summary of event-5,event-6,event-7,event-8,event-9", "test", "v1", 10, None, 0.25, 5.0
        )
        assert second.shift is not None
        assert list(second.representations) == ["encoder-1"]
        assert second.representations["encoder-1"].vector.tolist() == [2.5] * 4

    def test_a_note_on_a_text_is_kept(self, store: MemoryStore) -> None:
        store.append(run("ann", 5))
        (task,) = store.claim(["summary"], 1, 60.0)
        made = Text("summary", "text", "test", "v1", 10, 5, 0.25, 5.0, "the oldest 2 of 5 behaviors were left out")
        store.commit([Result(task, made)])
        timeline = store.timeline("ann")
        assert timeline is not None
        assert timeline.partitions[0].summary == made

    def test_the_oldest_steps_of_a_user_come_first(self, engine: Engine) -> None:
        store = engine.open(Count(5))
        for start in (0, 5, 10):
            store.append(run("ann", 5, start))
            engine.clock.now += 1.0
        claimed = [store.claim(["summary"], 1, 60.0)[0].number for _ in range(3)]
        assert claimed == [1, 2, 3]

    def test_claim_takes_only_what_is_asked(self, store: MemoryStore) -> None:
        store.append(run("ann", 25))
        assert store.claim([], 9, 60.0) == []
        assert store.claim(["summary"], 0, 60.0) == []
        assert len(store.claim(["summary"], 2, 60.0)) == 2
        assert len(store.claim(["summary"], 9, 60.0)) == 3

    # claims

    def test_an_expired_claim_is_taken_over_and_its_result_discarded(self, engine: Engine) -> None:
        store = engine.open(Count(5))
        store.append(run("ann", 5))
        (first,) = store.claim(["summary"], 1, 60.0)
        engine.clock.now += 59.0
        assert store.claim(["summary"], 1, 60.0) == []
        engine.clock.now += 2.0
        (second,) = store.claim(["summary"], 1, 60.0)
        assert (second.attempts, store.statistics().repeated) == (2, 1)
        assert store.commit([make(first)]) == Committed(0, 1)
        assert store.commit([make(second)]) == Committed(1, 0)
        assert store.commit([make(second)]) == Committed(0, 1)
        give_back(store, [first, second], "too late", None)
        assert store.statistics().dead["summary"] == 0

    def test_an_expired_claim_that_nobody_took_still_counts(self, engine: Engine) -> None:
        store = engine.open(Count(5))
        store.append(run("ann", 5))
        tasks = store.claim(["summary"], 1, 60.0)
        engine.clock.now += 1_000.0
        assert store.commit([make(task) for task in tasks]) == Committed(1, 0)

    def test_release_waits_then_gives_the_step_again(self, engine: Engine) -> None:
        store = engine.open(Count(5))
        store.append(run("ann", 5))
        give_back(store, store.claim(["summary"], 1, 60.0), "no answer", 30.0)
        assert store.claim(["summary"], 1, 60.0) == []
        assert store.statistics().pending["summary"] == 1
        engine.clock.now += 31.0
        (task,) = store.claim(["summary"], 1, 60.0)
        assert task.attempts == 2

    def test_what_was_not_attempted_does_not_count(self, engine: Engine) -> None:
        store = engine.open(Count(5))
        store.append(run("ann", 5))
        for _ in range(3):
            (task,) = store.claim(["summary"], 1, 60.0)
            assert task.attempts == 1
            give_back(store, [task], "nobody there", 0.0, attempted=False)
        (task,) = store.claim(["summary"], 1, 60.0)
        give_back(store, [task], "no answer", 0.0)
        (task,) = store.claim(["summary"], 1, 60.0)
        assert task.attempts == 2

    def test_a_dead_step_is_not_claimed(self, engine: Engine) -> None:
        store = engine.open(Count(5))
        store.append(run("ann", 5))
        give_back(store, store.claim(["summary"], 1, 60.0), "broken \ud800 " + "x" * 100_000, None)
        engine.clock.now += 1e9
        assert store.claim(STEPS, 9, 60.0) == []
        assert store.statistics().dead == {"summary": 1, "shift": 0, "representation": 0}
        assert store.statistics().pending == {"summary": 0, "shift": 0, "representation": 0}

    def test_a_result_of_the_wrong_kind_is_refused_whole(self, store: MemoryStore) -> None:
        store.append(run("ann", 10))
        first, second = store.claim(["summary"], 2, 60.0)
        wrong = Result(second, Text("shift", "text", "test", "v1", None, None, 0.0, 0.0))
        with pytest.raises(InvalidInputError, match="a shift was made for a summary"):
            store.commit([make(first), wrong])
        assert store.commit([make(first), make(second)]) == Committed(2, 0)

    @pytest.mark.parametrize("values", [[[1.0, 2.0]], [], [float("nan"), 1.0]])
    def test_a_broken_vector_is_refused(self, store: MemoryStore, values: list[object]) -> None:
        store.append(run("ann", 5))
        work_all(store, TEXT_STEPS)
        (task,) = store.claim(["representation"], 1, 60.0)
        with pytest.raises(InvalidInputError, match="float32"):
            store.commit([Result(task, Representation(np.array(values, np.float32), "encoder-1"))])
        assert store.commit([make(task)]) == Committed(1, 0)

    # re-encoding

    def test_two_encodings_lie_side_by_side_until_one_is_not_wanted(self, store: MemoryStore) -> None:
        store.append(run("ann", 15))
        assert store.encode_by({"encoder-1"}) == 0
        work_all(store)
        before = store.timeline("ann")
        assert store.encode_by({"encoder-1", "encoder-2"}) == 3
        assert store.encode_by({"encoder-1", "encoder-2"}) == 0
        assert store.statistics().encodings == {"encoder-1", "encoder-2"}
        assert store.claim(STEPS, 9, 60.0, "encoder-1") == []
        tasks = store.claim(STEPS, 9, 60.0, "encoder-2")
        assert [(task.number, task.step, task.fingerprint) for task in tasks] == [
            (n, "representation", "encoder-2") for n in (1, 2, 3)
        ]
        store.commit([make(tasks[0], "encoder-2")])
        (old,), (new,) = store.read(["ann"], 0, 9, "encoder-1"), store.read(["ann"], 0, 9, "encoder-2")
        assert old is not None
        assert new is not None
        assert (old.representations.shape, new.representations.shape) == ((3, 4), (1, 4))
        assert old.foreign == new.foreign == frozenset()
        store.append(run("ann", 5, 15))
        assert work_all(store, STEPS, "encoder-1") == {"summary": 1, "shift": 1, "representation": 1}
        store.commit([make(task, "encoder-2") for task in tasks[1:]])
        assert work_all(store, STEPS, "encoder-2") == {"representation": 1}
        assert store.statistics().vectors == {"encoder-1": 4, "encoder-2": 4}

        assert store.encode_by({"encoder-2"}) == 0
        (old,) = store.read(["ann"], 0, 9, "encoder-1")
        assert old is not None
        assert old.representations.shape == (4, 4)
        store.encode_by({"encoder-2", "encoder-3"})
        assert store.statistics().vectors == {"encoder-2": 4}
        after = store.timeline("ann")
        assert before is not None
        assert after is not None
        assert [(r.summary, r.shift) for r in after.partitions[:3]] == [(r.summary, r.shift) for r in before.partitions]
        assert store.statistics().repeated == 0

    def test_vectors_of_another_encoding_are_told_and_never_returned(self, store: MemoryStore) -> None:
        store.append(run("ann", 10))
        work_all(store)
        (memory,) = store.read(["ann"], 5, 5, "encoder-2")
        assert memory is not None
        assert memory.representations.shape == (0, 0)
        assert memory.foreign == {"encoder-1"}
        store.encode_by({"encoder-1", "encoder-2"})
        (memory,) = store.read(["ann"], 5, 5, "encoder-2")
        assert memory is not None
        assert memory.foreign == frozenset()

    def test_encodings_not_wanted_any_more_void_their_claims(self, store: MemoryStore) -> None:
        store.append(run("ann", 10))
        store.encode_by({"encoder-1"})
        work_all(store, TEXT_STEPS)
        held = store.claim(["representation"], 9, 60.0, "encoder-1")
        assert store.encode_by({"encoder-2"}) == 2
        assert store.commit([make(task, "encoder-1") for task in held]) == Committed(0, 2)
        assert work_all(store, ["representation"], "encoder-2") == {"representation": 2}
        assert store.statistics().vectors == {"encoder-2": 2}

    def test_a_vector_of_another_encoding_than_wanted_is_refused(self, store: MemoryStore) -> None:
        store.append(run("ann", 5))
        store.encode_by({"encoder-1"})
        work_all(store, TEXT_STEPS)
        (task,) = store.claim(["representation"], 1, 60.0, "encoder-1")
        with pytest.raises(InvalidInputError, match="was made by encoder-2 and is wanted of encoder-1"):
            store.commit([make(task, "encoder-2")])
        assert store.commit([make(task, "encoder-1")]) == Committed(1, 0)

    # rewriting and dead steps

    def test_rewriting_keeps_the_old_until_the_new_is_there(self, store: MemoryStore) -> None:
        store.append(run("ann", 15))
        store.append(run("bo", 5))
        work_all(store)
        assert store.rewrite(writer="nobody") == 0
        assert store.rewrite(writer="test", prompt_version="v1", user_ids=["ann", "nobody"]) == 3
        before = store.timeline("ann")
        assert before is not None
        assert all(record.summary and record.representations for record in before.partitions)
        first, second, third = store.claim(STEPS, 9, 60.0)
        assert {task.step for task in (first, second, third)} == {"summary"}

        def remake(task: Task, text: str) -> Result:
            kind = "shift" if task.step == "shift" else "summary"
            return Result(task, Text(kind, text, "better", "v2", 1, 1, 0.1, 6.0))

        store.commit([remake(second, "new 2")])
        assert store.claim(STEPS, 9, 60.0) == []
        store.commit([remake(first, "new 1")])
        tasks = store.claim(STEPS, 9, 60.0)
        assert [(task.number, task.step) for task in tasks] == [(2, "shift"), (1, "representation")] or [
            (task.number, task.step) for task in tasks
        ] == [(1, "representation"), (2, "shift")]
        shift = next(task for task in tasks if task.step == "shift")
        assert (shift.previous, shift.summary) == ("new 1", "new 2")
        store.commit([remake(shift, "shift 2"), remake(third, "new 3")])
        store.commit([make(task) for task in tasks if task.step == "representation"])
        rest = work_all(store)
        assert rest == {"shift": 1, "representation": 2}
        after = store.timeline("ann")
        assert after is not None
        assert [r.summary.text for r in after.partitions if r.summary] == ["new 1", "new 2", "new 3"]
        assert store.statistics().vectors == {"encoder-1": 4}

    def test_rewriting_shifts_alone(self, store: MemoryStore) -> None:
        store.append(run("ann", 15))
        store.commit([make(task) for task in store.claim(["summary"], 9, 60.0)])
        shifts = store.claim(["shift"], 9, 60.0)
        store.commit([Result(task, Text("shift", "poor", "poor", "v0", 1, 1, 0.1, 1.0)) for task in shifts])
        work_all(store)
        assert store.rewrite(writer="poor") == 2
        assert work_all(store) == {"shift": 2, "representation": 2}

    def test_a_claim_on_what_is_rewritten_is_void(self, store: MemoryStore) -> None:
        store.append(run("ann", 10))
        store.commit([make(task) for task in store.claim(["summary"], 9, 60.0)])
        (shift,) = store.claim(["shift"], 9, 60.0)
        assert store.rewrite(user_ids=["ann"]) == 2
        assert store.commit([make(shift)]) == Committed(0, 1)
        assert work_all(store) == {"summary": 2, "shift": 1, "representation": 2}

    def test_the_dead_are_listed_and_revived(self, store: MemoryStore) -> None:
        store.append([*run("ann", 5), *run("bo", 5)])
        give_back(store, store.claim(["summary"], 9, 60.0), "the writer says no", None)
        dead = sorted(store.dead(), key=lambda step: step.user_id)
        assert dead == [
            DeadStep("ann", 1, "summary", 1, "the writer says no"),
            DeadStep("bo", 1, "summary", 1, "the writer says no"),
        ]
        assert len(store.dead(1)) == 1
        assert store.revive() == 2
        assert store.dead() == []
        assert {task.attempts for task in store.claim(["summary"], 9, 60.0)} == {1}
        assert store.revive() == 0

    def test_a_step_ages_from_when_it_became_ready_until_it_is_made(self, engine: Engine) -> None:
        store = engine.open(Count(5))

        def age(step: Step) -> float:
            return store.statistics().age_seconds[step]

        def since(moment: float) -> float:
            return engine.now() - moment + 0.002

        assert store.statistics().age_seconds == dict.fromkeys(STEPS, 0.0)
        first = engine.now()
        store.append(run("ann", 10))
        passed = engine.let_age()
        second = engine.now()
        store.append(run("bo", 5))
        passed += engine.let_age()
        assert passed <= age("summary") <= since(first)
        # Neither a claim nor a failure makes a step younger.
        tasks = store.claim(["summary"], 3, 0.0)
        assert passed <= age("summary") <= since(first)
        give_back(store, tasks, "later", 60.0)
        assert passed <= age("summary") <= since(first)
        engine.clock.now += 60.0
        made = engine.now()
        store.commit([make(task) for task in store.claim(["summary"], 3, 60.0) if task.user_id == "ann"])
        assert 0.0 < age("summary") <= since(second)
        # The shift and the vector became ready only now, long after their partitions were cut.
        passed = engine.let_age()
        assert all(passed <= age(step) <= since(made) for step in ("shift", "representation"))
        engine.clock.now += 60.0
        give_back(store, store.claim(["summary"], 3, 60.0), "the writer says no", None)
        assert age("summary") == 0.0
        revived = engine.now()
        store.revive()
        passed = engine.let_age()
        assert passed <= age("summary") <= since(revived)
        rewritten = engine.now()
        store.rewrite(user_ids=["ann"])
        passed = engine.let_age()
        store.forget("bo")
        assert passed <= age("summary") <= since(rewritten)
        assert age("shift") == age("representation") == 0.0
        store.forget("ann")
        assert store.statistics().age_seconds == dict.fromkeys(STEPS, 0.0)

    def test_a_renewed_claim_is_not_taken_over(self, engine: Engine) -> None:
        store = engine.open(Count(5))
        store.append(run("ann", 10))
        first, second = store.claim(["summary"], 2, 60.0)
        engine.clock.now += 50.0
        assert store.renew([first], 60.0) == []
        engine.clock.now += 50.0
        (taken,) = store.claim(["summary"], 9, 60.0)
        assert taken.number == second.number
        assert store.renew([first, second], 60.0) == [second]
        assert store.commit([make(first), make(second)]) == Committed(1, 1)
        assert store.renew([first], 60.0) == [first]
        assert store.renew([], 60.0) == []

    # reading

    def test_read_keeps_the_order_asked_for(self, store: MemoryStore) -> None:
        store.append([*run("ann", 3), *run("bo", 13)])
        work_all(store)
        nobody, bo, ann, again = store.read(["nobody", "bo", "ann", "bo"], 4, 1, "encoder-1")
        assert nobody is None
        assert ann is not None
        assert bo is not None
        assert again is not None
        assert bo.history == again.history == tuple((b.item_id, b.feedback) for b in run("bo", 4, 9))
        assert len(ann.history) == 3
        assert ann.representations.shape == (0, 0)
        assert ann.foreign == frozenset()
        assert bo.representations.tolist() == [[2.5] * 4]
        assert store.read([], 4, 1, "encoder-1") == []

    def test_read_never_waits_for_a_writer(self, store: MemoryStore) -> None:
        """A condition that blocks inside `append` holds the write; readers go on."""
        store.append(run("ann", 3))
        writing, finish = threading.Event(), threading.Event()

        class Slow:
            def boundary(self, cache: Sequence[Behavior], previous: object) -> int:
                writing.set()
                assert finish.wait(20)
                return 0

            def __str__(self) -> str:
                return "slow"

        slow = self._fresh_with(store, Slow())
        thread = threading.Thread(target=slow.append, args=(run("ann", 4),))
        thread.start()
        assert writing.wait(20)
        assert slow.read(["ann"], 5, 5, "encoder-1") == [None]
        assert slow.users() == []
        finish.set()
        thread.join()
        (memory,) = slow.read(["ann"], 5, 5, "encoder-1")
        assert memory is not None
        assert len(memory.history) == 4

    @pytest.fixture(autouse=True)
    def _remember_engine(self, engine: Engine) -> None:
        self.engine = engine

    def _fresh_with(self, store: MemoryStore, condition: PartitionCondition) -> MemoryStore:
        return self.engine.fresh().open(condition)

    # forgetting

    def test_forget_leaves_nothing(self, store: MemoryStore) -> None:
        store.append([*run("ann", 12), *run("bo", 12)])
        store.describe(profiles={"ann": {"age": 31}})
        work_all(store)
        store.append(run("ann", 5, 12))
        assert store.forget("ann") == Forgotten(17, 3)
        assert store.timeline("ann") is None
        assert store.read(["ann"], 5, 5, "encoder-1") == [None]
        assert store.users() == ["bo"]
        assert store.claim(STEPS, 9, 60.0) == []
        statistics = store.statistics()
        assert (statistics.users, statistics.behaviors, statistics.partitions) == (1, 12, 2)
        assert store.forget("ann") == Forgotten(0, 0)
        assert store.append(run("ann", 5)) == Appended(5, 0, 1)
        assert partitions_of(store, "ann") == [tuple(f"event-{n}" for n in range(5))]

    @pytest.mark.parametrize("comes_back", [False, True])
    def test_a_late_worker_cannot_bring_a_user_back(self, store: MemoryStore, comes_back: bool) -> None:
        store.append(run("ann", 10))
        tasks = store.claim(["summary"], 2, 60.0)
        assert store.forget("ann") == Forgotten(10, 2)
        if comes_back:
            store.append(run("ann", 10))
            assert len(store.claim(["summary"], 2, 60.0)) == 2
        assert store.commit([make(task) for task in tasks]) == Committed(0, 2)
        give_back(store, tasks, "late", 0.0)
        timeline = store.timeline("ann")
        assert (timeline is not None) == comes_back
        assert timeline is None or all(record.summary is None for record in timeline.partitions)
        assert store.claim(STEPS, 9, 60.0) == []

    def test_forget_a_user_with_a_profile_only(self, store: MemoryStore) -> None:
        store.describe(profiles={"ann": {"age": 31}})
        assert store.forget("ann") == Forgotten(0, 0)
        assert store.users() == []
        assert store.statistics().users == 0

    # erasing one behavior

    def test_erasing_an_event_remakes_what_was_made_from_it_and_nothing_else(self, store: MemoryStore) -> None:
        store.append(run("ann", 21))
        work_all(store)
        before = store.timeline("ann")
        assert store.forget("ann", "event-7") == Forgotten(1, 0)
        timeline = store.timeline("ann")
        assert before is not None
        assert timeline is not None
        assert [b.event_id for b in timeline.partitions[1].behaviors] == ["event-5", "event-6", "event-8", "event-9"]
        assert [bool(record.summary) for record in timeline.partitions] == [True, False, True, True]
        assert [bool(record.shift) for record in timeline.partitions] == [False, False, False, True]
        assert [bool(record.representations) for record in timeline.partitions] == [True, False, False, True]
        assert "event-7" not in repr(timeline)
        assert store.statistics().behaviors == 20
        assert work_all(store) == {"summary": 1, "shift": 2, "representation": 2}
        after = store.timeline("ann")
        assert after is not None
        assert repr(after.partitions[0]) == repr(before.partitions[0])
        assert repr(after.partitions[3]) == repr(before.partitions[3])
        assert "event-7" not in repr(after)

    def test_an_erased_event_does_not_come_back(self, store: MemoryStore) -> None:
        store.append(run("ann", 7))
        assert store.forget("ann", "event-6") == Forgotten(1, 0)
        assert store.forget("ann", "event-3") == Forgotten(1, 0)
        assert store.append(run("ann", 7)) == Appended(0, 7, 0)
        timeline = store.timeline("ann")
        assert timeline is not None
        assert [b.event_id for b in timeline.cache] == ["event-5"]
        assert store.forget("ann", "event-6") == Forgotten(0, 0)
        assert store.forget("ann", "never") == Forgotten(0, 0)
        assert store.forget("nobody", "event-1") == Forgotten(0, 0)

    def test_a_late_worker_cannot_bring_an_erased_event_back(self, store: MemoryStore) -> None:
        store.append(run("ann", 10))
        first, second = store.claim(["summary"], 9, 60.0)
        store.forget("ann", "event-1")
        assert store.commit([make(first), make(second)]) == Committed(1, 1)
        (again,) = store.claim(["summary"], 9, 60.0)
        assert [b.event_id for b in again.behaviors] == ["event-0", "event-2", "event-3", "event-4"]
        store.commit([make(again)])
        (shift,) = store.claim(["shift"], 9, 60.0)
        store.forget("ann", "event-0")
        assert store.commit([make(shift)]) == Committed(0, 1)

    def test_a_partition_may_lose_all_its_behaviors(self, store: MemoryStore) -> None:
        store.append(run("ann", 15))
        work_all(store)
        for number in range(5, 10):
            assert store.forget("ann", f"event-{number}") == Forgotten(1, 0)
        timeline = store.timeline("ann")
        assert timeline is not None
        assert timeline.partitions[1].behaviors == ()
        assert work_all(store) == {"representation": 1}
        timeline = store.timeline("ann")
        assert timeline is not None
        assert (timeline.partitions[1].summary, timeline.partitions[2].shift) == (None, None)
        (memory,) = store.read(["ann"], 20, 9, "encoder-1")
        assert memory is not None
        assert memory.representations.tolist() == [[1.0] * 4, [3.0] * 4]
        assert len(memory.history) == 10
        assert store.append(run("ann", 5, 15)) == Appended(5, 0, 1)
        assert work_all(store) == {"summary": 1, "shift": 1, "representation": 1}

    def test_a_user_whose_last_behavior_is_erased_can_return(self, store: MemoryStore) -> None:
        store.append(run("ann", 1))
        store.forget("ann", "event-0")
        assert (store.statistics().users, store.statistics().behaviors) == (0, 0)
        assert store.append(run("ann", 2)) == Appended(1, 1, 0)
        assert (store.statistics().users, store.statistics().behaviors) == (1, 1)

    # marks

    def test_a_mark_is_kept_with_its_behaviors_and_never_goes_back(self, store: MemoryStore) -> None:
        assert store.position("log") == 0
        store.append(run("ann", 2), Mark("log", 10))
        store.append([], Mark("other", 3))
        store.append(run("ann", 1, 2), Mark("log", 7))
        assert (store.position("log"), store.position("other")) == (10, 3)

    # bad input

    def test_the_future_is_refused_whole(self, store: MemoryStore) -> None:
        ahead = Behavior("ann", "item", 1.0, time.time() + 3 * 86_400, "late")
        with pytest.raises(InvalidInputError, match="of user 'ann' lies in the future"):
            store.append([behavior("ann", 1), ahead], Mark("log", 1))
        assert store.users() == []
        assert store.position("log") == 0
        assert store.append([Behavior("ann", "item", 1.0, time.time() + 3600)]) == Appended(1, 0, 0)

    # concurrency

    def test_threads_append_the_same_events_once(self, store: MemoryStore) -> None:
        appended: list[Appended] = []

        def append_all() -> None:
            appended.extend(store.append(run("ann", 3, start)) for start in range(0, 60, 3))

        threads = [threading.Thread(target=append_all) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(one.behaviors for one in appended) == 60
        assert sum(one.partitions for one in appended) == 12
        assert sorted(e for p in partitions_of(store, "ann") for e in p) == sorted(b.event_id for b in run("ann", 60))

    def test_threads_claim_each_step_once(self, store: MemoryStore) -> None:
        store.append(run("ann", 200))
        claimed: list[Task] = []

        def claim_all() -> None:
            while tasks := store.claim(["summary"], 3, 60.0):
                claimed.extend(tasks)

        threads = [threading.Thread(target=claim_all) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(task.number for task in claimed) == list(range(1, 41))

    def test_processes_append_and_work_at_once(self, engine: Engine) -> None:
        store = engine.open(Count(5))
        appenders = [spawn(append_in_process, engine.url, "ann", first, 60) for first in (0, 30)]
        for process in appenders:
            process.join(60)
            assert process.exitcode == 0
        assert store.statistics().behaviors == 90
        counts: multiprocessing.Queue[Counter[str]] = multiprocessing.get_context("spawn").Queue()
        workers = [spawn(work_in_process, engine.url, counts) for _ in range(2)]
        done = counts.get(timeout=60) + counts.get(timeout=60) + work_all(store)
        for process in workers:
            process.join(60)
            assert process.exitcode == 0
        counts.close()
        assert done == {"summary": 18, "shift": 17, "representation": 18}
        assert store.statistics().repeated == 0

    def test_nothing_acknowledged_is_lost_to_a_kill(self, engine: Engine, tmp_path: Path) -> None:
        store = engine.open(Count(5))
        acknowledged: list[int] = []
        for kill in range(4):
            log = tmp_path / f"log{kill}"
            process = spawn(append_until_killed, engine.url, "ann", kill * 1_000_000, str(log))
            patience = time.monotonic() + 60
            while not (log.exists() and log.stat().st_size > 500) and time.monotonic() < patience:
                time.sleep(0.01)
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            assert process.exitcode == -signal.SIGKILL
            acknowledged += [int(line) for line in log.read_text().splitlines()]
            # Whoever was not told sends again; what was kept counts once.
            last = acknowledged[-1]
            store.append([behavior("ann", last), behavior("ann", last + 1), behavior("ann", last + 2)])
        timeline = store.timeline("ann")
        assert timeline is not None
        kept = [b.event_id for record in timeline.partitions for b in record.behaviors]
        kept += [b.event_id for b in timeline.cache]
        assert len(acknowledged) > 200
        assert set(kept) >= {f"event-{number}" for number in acknowledged}
        assert len(kept) == len(set(kept)) == store.statistics().behaviors
        assert all(len(record.behaviors) == 5 for record in timeline.partitions)
        numbers = [int(event.split("-")[1]) for event in kept]
        assert numbers == sorted(numbers)

    # the end

    def test_close_is_idempotent_and_final(self, store: MemoryStore) -> None:
        store.append(run("ann", 1))
        store.close()
        store.close()
        for use in (
            lambda: store.append(run("ann", 1)),
            lambda: store.read(["ann"], 1, 1, "encoder-1"),
            lambda: store.claim(STEPS, 1, 1.0),
            lambda: store.forget("ann"),
            store.statistics,
        ):
            with pytest.raises(StoreError, match="closed"):
                use()

    def test_behaves_as_the_model(self, engine: Engine) -> None:
        run_state_machine_as_test(
            lambda: MemoryMachine(engine),
            settings=settings(max_examples=self.examples, stateful_step_count=30, deadline=None),
        )
