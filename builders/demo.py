"""The main job: real behaviors through the whole of LIBER, and a report with the paper's figures beside its own.

The log is cut where its test part begins. What came before fills the store, gets its texts and trains the models. The
test part is then lived through: every test sample is scored over gRPC from what the store holds at that moment, then
its behavior arrives, and a partition that it completes is written and encoded before the next one is scored. Nothing
the served model answers from has seen the future.
"""

from __future__ import annotations

import asyncio
import csv
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import log_loss, roc_auc_score

from bench.environment import describe_machine, describe_versions
from bench.inference_latency import measure
from builders.assembly import FittedFeatures, with_knowledge
from builders.build import (
    BuildSettings,
    Knowledge,
    drain,
    export_bundle,
    fit_for,
    fit_representations,
    know_items,
    make_base,
    make_liber,
    prepare,
    read_vectors,
    remember,
    train_once,
    write_texts,
)
from builders.datasets import Dataset, load
from builders.embedding import keep_embedders
from builders.models.backbone import Ranker
from builders.models.fuser import AttentionFuser
from builders.replay import Samples, Split, calls_per_user, replay, split
from builders.report import write as write_report
from builders.repository import publish
from builders.train import TrainingData, TrainingResult, predict
from liber_runtime import __version__
from liber_runtime.bundle import Manifest
from liber_runtime.exceptions import ConfigurationError, LiberError
from liber_runtime.memory import MemoryStore, Timeline, open_store
from liber_runtime.partition import Count
from liber_runtime.progress import console, progress
from liber_runtime.representation import TritonEncoder
from liber_runtime.scoring import AsyncScoringClient
from liber_runtime.server import TritonServer
from liber_runtime.settings import load_settings
from liber_runtime.worker import Worker
from liber_runtime.writers.statistical import StatisticalWriter

ILLUSTRATED_PARTITIONS = 8
"""The report shows the user whose number of partitions comes nearest to this: enough to see interests move."""


JOURNAL = "served.csv"


@dataclass
class Stopwatch:
    """Seconds per named step."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Times one step."""
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 3)


def run_demo(source: Path | None, directory: Path, settings: BuildSettings) -> dict[str, Any]:
    """Runs the main job in `directory`, going on from what an earlier run of the same job finished there.

    Args:
        source: a data set, see `builders.datasets.load`; None for the generated sample.
        directory: receives ``memory.db``, ``bundle``, ``model_repository``, ``report.json``, ``report.html``.
        settings: of the bundle.

    Returns:
        What ``report.json`` holds.

    Raises:
        LiberError: unusable data, a directory that another store is in, or a server that does not start.
    """
    watch = Stopwatch()
    with watch.step("load"):
        dataset = load(source)
    console.print(f"data: {dataset.domain.name} ({dataset.origin})", soft_wrap=True)
    _claim_directory(directory, dataset, settings)
    store = open_store(f"sqlite:///{directory / 'memory.db'}", Count(settings.minimum))
    try:
        return _run(dataset, store, directory, settings, watch)
    finally:
        store.close()


def _run(
    dataset: Dataset, store: MemoryStore, directory: Path, settings: BuildSettings, watch: Stopwatch
) -> dict[str, Any]:
    with watch.step("replay"):
        samples = replay(dataset, store.condition, settings.minimum)
        parts = split(samples)
    test_begins = int(samples.behavior[parts.test[0]])
    with watch.step("ingest"):
        remember(store, dataset, dataset.behaviors[:test_begins])
    with watch.step("texts"):
        write_texts(store, StatisticalWriter())
    with keep_embedders():
        with watch.step("encode"):
            knowledge = fit_representations(store, dataset, samples, parts, directory / "knowledge", settings)
        with watch.step("features"):
            fitted = fit_for(dataset, samples, parts, settings)
            items = know_items(dataset, StatisticalWriter(), knowledge, fitted, settings)
            knowing = with_knowledge(fitted, samples, parts, items)
    stored = read_vectors(store, samples, parts.training_part, knowledge, settings)
    base_data = prepare(stored, dataset, samples, parts.training_part, fitted)
    data = prepare(stored, dataset, samples, parts.training_part, knowing)
    base, liber = make_base(fitted, settings), make_liber(knowing, items, settings)
    with watch.step("train_base"):
        base_result = train_once("base", base, base_data, parts, settings, directory / "models")
    with watch.step("train_liber"):
        liber_result = train_once("liber", liber, data, parts, settings, directory / "models")
    with watch.step("export"):
        manifest = _export_once(liber, knowing, knowledge, dataset, directory, settings)
    tested: list[int] = samples.behavior[parts.test].tolist()
    remembered = store.statistics().behaviors
    answers = _read_journal(directory / JOURNAL, manifest, [row for row in tested if row < remembered])

    with watch.step("start_server"):
        server = TritonServer(
            directory / "model_repository",
            log_file=directory / "triton.log",
            environment={"LIBER_STORE": f"sqlite:///{(directory / 'memory.db').resolve()}"},
        )
        server.start()
    try:
        with watch.step("serve"):
            asyncio.run(_live(dataset, tested, answers, store, server.grpc_url, directory / JOURNAL))
        with watch.step("latency"):
            users, items_known = store.users(), fitted.vocabulary.vocabulary.items
            plain = load_settings().without_tls
            latency = measure(server.grpc_url, users, items_known, seed=settings.seed, settings=plain)
    finally:
        server.stop()

    with watch.step("evaluate"):
        stored = read_vectors(store, samples, parts.test, knowledge, settings)
        base_test = prepare(stored, dataset, samples, parts.test, fitted)
        test = prepare(stored, dataset, samples, parts.test, knowing)
        rows = np.arange(len(parts.test))
        served = np.array([answers[row] for row in tested], dtype=np.float32)
        most = settings.chosen.training.max_partitions
        offline = predict(liber, test, rows, max_partitions=most)
        base_offline = predict(base, base_test, rows, max_partitions=most)
    report = {
        "data": _describe_data(dataset, samples, parts),
        "memory": _describe_memory(store, samples),
        "quality": {
            "base": _quality(test, base_offline, base_result),
            "liber": _quality(test, offline, liber_result),
        },
        "serving": {
            "samples": len(served),
            "max_abs_diff_vs_offline": float(np.abs(served - offline).max()),
            "auc": float(roc_auc_score(test.label, served)),
            "seconds_per_1000": latency,
        },
        "writer": ", ".join(manifest.writers),
        "encoder": manifest.encoder.name,
        "backbone": manifest.backbone,
        "seed": settings.seed,
        "machine": describe_machine(),
        "versions": describe_versions(),
        "seconds": watch.seconds,
        "illustration": _illustrate(dataset, store, liber, knowledge.fingerprint),
    }
    write_report(report, directory)
    return report


def _claim_directory(directory: Path, dataset: Dataset, settings: BuildSettings) -> None:
    """Empties what another job left: its vectors, weights and answers are not this job's.

    Raises:
        ConfigurationError: a store is there that no demo made.
    """
    digest = hashlib.sha256(
        f"{__version__} {settings!r} {dataset.domain!r} {dataset.items!r} {dataset.profiles!r}".encode()
    )
    for behavior in dataset.behaviors:
        digest.update(f"{behavior.user_id}\x1f{behavior.event_id}\x1e".encode())
    note = directory / "job.json"
    job = json.dumps({"job": digest.hexdigest(), "data": dataset.domain.name, "seed": settings.seed})
    if not note.is_file() and (directory / "memory.db").exists():
        raise ConfigurationError(
            f"{directory / 'memory.db'} is a store that no demo made; give the demo another --output"
        )
    if note.is_file() and note.read_text() != job:
        console.print(f"{directory} holds another job; starting afresh", soft_wrap=True)
        for name in ("memory.db", "memory.db-wal", "memory.db-shm", JOURNAL, "report.json", "report.html"):
            (directory / name).unlink(missing_ok=True)
        for name in ("knowledge", "models", "bundle", "model_repository"):
            shutil.rmtree(directory / name, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    note.write_text(job)


def _export_once(
    model: Ranker,
    fitted: FittedFeatures,
    knowledge: Knowledge,
    dataset: Dataset,
    directory: Path,
    settings: BuildSettings,
) -> Manifest:
    bundle, repository = directory / "bundle", directory / "model_repository"
    weights = hashlib.sha256((directory / "models" / "liber.pt").read_bytes()).hexdigest()
    note = directory / "models" / "exported"
    if note.is_file() and note.read_text() == weights and bundle.is_dir() and repository.is_dir():
        return Manifest.load(bundle)
    manifest = export_bundle(model, fitted, knowledge, dataset, bundle, settings)
    publish(bundle, repository)
    note.write_text(weights)
    return manifest


async def _live(
    dataset: Dataset, tested: Sequence[int], answers: dict[int, float], store: MemoryStore, url: str, journal: Path
) -> None:
    """Lives through the test part: score, then remember, then learn.

    Each answer is noted before its behavior is appended, so that a run that was interrupted goes on where it was:
    appending again changes nothing, and scoring again would see the future.

    Args:
        dataset: whose behaviors from the first of `tested` on are lived through.
        tested: rows of the behaviors that are test samples.
        answers: receives the click probability of each of them, by row; those it has already are not asked for.
        store: has the behaviors before.
        url: host:port of Triton's gRPC endpoint.
        journal: where answers are noted.
    """
    settings = load_settings().without_tls
    client, encoder = AsyncScoringClient(url, settings), TritonEncoder(url, settings)
    worker = Worker(store, StatisticalWriter(), encoder)
    is_test = set(tested)
    try:
        await drain(worker)
        with (
            progress("serve and learn", len(dataset.behaviors) - tested[0]) as advance,
            journal.open("a", newline="") as file,
        ):
            notes = csv.writer(file)
            for row in range(tested[0], len(dataset.behaviors)):
                behavior = dataset.behaviors[row]
                if row in is_test and row not in answers:
                    scores = await client.score(behavior.user_id, [behavior.item_id])
                    answers[row] = float(scores.probability[0])
                    notes.writerow([row, repr(answers[row])])
                    file.flush()
                if store.append([behavior]).partitions:
                    await drain(worker)
                advance(1)
    finally:
        await client.close()
        await encoder.close()


def _read_journal(path: Path, manifest: Manifest, owed: Sequence[int]) -> dict[int, float]:
    """Answers noted by an interrupted run of the same bundle, by row of the log; begins the journal if there is none.

    Args:
        path: of the journal.
        manifest: of the bundle that answers.
        owed: rows of the test samples that the store has moved past: their answers must be there.

    Raises:
        LiberError: the journal is another bundle's, or lacks what is owed.
    """
    heading = ["bundle", manifest.bundle_id]
    # A killed run can leave half a line: it was not acknowledged, so it is taken off.
    whole = path.read_bytes().rpartition(b"\n")[0] if path.is_file() else b""
    rows = list(csv.reader(whole.decode().splitlines()))
    answers = {int(row): float(probability) for row, probability in rows[1:]}
    if rows and rows[0] != heading:
        raise LiberError(
            f"{path} holds answers of another bundle than {manifest.bundle_id}, and the store has moved on since; "
            f"delete {path.parent} and run the demo again"
        )
    if lost := [row for row in owed if row not in answers]:
        raise LiberError(
            f"{path} lacks the answers to {len(lost)} samples that the store has moved past; delete {path.parent} and "
            "run the demo again"
        )
    if not rows:
        path.write_text(",".join(heading) + "\n")
    elif path.stat().st_size > len(whole) + 1:
        os.truncate(path, len(whole) + 1)
    return answers


def _describe_data(dataset: Dataset, samples: Samples, parts: Split) -> dict[str, Any]:
    return {
        "name": dataset.domain.name,
        "origin": dataset.origin,
        "users": len(samples.user_ids),
        "items": len(samples.item_ids),
        "behaviors": len(dataset.behaviors),
        "eligible_users": len(np.unique(samples.user)),
        "samples": len(samples),
        "train_samples": len(parts.training_part),
        "test_samples": len(parts.test),
    }


def _describe_memory(store: MemoryStore, samples: Samples) -> dict[str, Any]:
    per_user = Counter(np.diff(samples.boundaries.offsets).tolist())
    statistics = store.statistics()
    return {
        "partitions": statistics.partitions,
        "calls_per_user": calls_per_user(samples),
        "partitions_per_user": {str(count): per_user[count] for count in sorted(per_user)},
        "repeated_calls": statistics.repeated,
    }


def _quality(
    test: TrainingData, probability: np.ndarray[Any, np.dtype[np.float32]], result: TrainingResult
) -> dict[str, Any]:
    values = probability.astype(np.float64)
    return {
        "auc": float(roc_auc_score(test.label, values)),
        "logloss": float(log_loss(test.label, values, labels=[0, 1])),
        "validation_auc": result.auc,
        "validation_logloss": result.logloss,
        "best_epoch": result.best_epoch,
        "epochs": [asdict(epoch) for epoch in result.epochs],
    }


def _illustrate(dataset: Dataset, store: MemoryStore, model: Ranker, fingerprint: str) -> dict[str, Any]:
    """One user's partitions, texts and the fuser's weights as the memory grew."""
    timelines = (timeline for user in store.users() if (timeline := store.timeline(user)))
    chosen = min(timelines, key=lambda timeline: abs(len(timeline.partitions) - ILLUSTRATED_PARTITIONS))
    return {
        "user_id": chosen.user_id,
        "profile": dict(chosen.profile),
        "item_noun": dataset.domain.item_noun,
        "partitions": [
            {
                "number": record.number,
                "start": record.behaviors[0].timestamp,
                "end": record.behaviors[-1].timestamp,
                "behaviors": len(record.behaviors),
                "mean_feedback": float(np.mean([behavior.feedback for behavior in record.behaviors])),
                "summary": record.summary.text if record.summary else "",
                "shift": record.shift.text if record.shift else "",
            }
            for record in chosen.partitions
        ],
        "attention": _attention(chosen, model, fingerprint),
    }


def _attention(timeline: Timeline, model: Ranker, fingerprint: str) -> list[list[float]]:
    if not isinstance(model.fuser, AttentionFuser):
        return []
    made = [record.representations.get(fingerprint) for record in timeline.partitions]
    vectors = [each.vector for each in made if each is not None]
    rows = []
    for count in range(1, len(vectors) + 1):
        representations = torch.from_numpy(np.stack(vectors[:count]))[None]
        with torch.inference_mode():
            weights = model.fuser.weights(representations, torch.ones(1, count, dtype=torch.bool))
        rows.append([float(weight) for weight in weights[0]])
    return rows
