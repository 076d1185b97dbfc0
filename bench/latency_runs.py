"""What `bench.inference_latency` measures, part by part: bundles and stores are made, engines raced, rows written."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from bench.deepctr import MODELS as DEEPCTR_MODELS
from bench.deepctr import run_deepctr
from bench.engines import (
    Engine,
    ExportedModel,
    LocalModels,
    Question,
    ServedGraph,
    Tensors,
    export_plainly,
    in_one_thread,
    run_eagerly,
    serve_over_grpc,
    unfold,
)
from bench.fastapi_service import serve_with_fastapi
from bench.floor import count_flops
from bench.race import Limits, Timing, race
from bench.serving import MadeBundle, Workshop, make_store, serve
from builders.export import export_backbone
from builders.models import BACKBONES
from liber_runtime.bundle import BACKBONE
from liber_runtime.exceptions import ConfigurationError, LiberError
from liber_runtime.scoring import ScoringClient
from liber_runtime.server import TritonServer

MAIN = "DIEN"
"""The backbone of the paper's Table 7, and of everything that is measured of one backbone alone."""

SHORT = 20
"""T of everything that is measured at one length alone."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Of the models; the defaults are the published ones.

    Attributes:
        embedding_dim: E.
        hidden_size: of DIEN's recurrences and of the steps that DIN attends to.
        attention_size: hidden units of the attention of DIEN and DIN.
        mlp_sizes: of every deep part.
        dimension: d, of r_j and r̂.
    """

    embedding_dim: int = 32
    hidden_size: int = 64
    attention_size: int = 64
    mlp_sizes: tuple[int, ...] = (200, 80)
    dimension: int = 32

    def options(self, backbone: str) -> dict[str, Any]:
        """Of a backbone's class."""
        options: dict[str, Any] = {} if backbone == "LR" else {"mlp_sizes": self.mlp_sizes}
        if backbone == "DIEN":
            options |= {"hidden_size": self.hidden_size, "attention_size": self.attention_size}
        if backbone == "DIN":
            options |= {"attention_size": self.hidden_size, "hidden_size": self.attention_size}
        return options


PUBLISHED = Sizes()

SERVED = Limits(seconds=8.0, least=20, most=200)
RIVALS = Limits(seconds=20.0, least=10, most=60)


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        backbones: those that are served with LIBER and without it.
        histories: T of `MAIN`.
        samples: N of every shape, and U of ``distinct_users``.
        folded_users: U of ``folded``.
        items: I, but where it is what varies.
        sizes: of the models.
        counts: N where it is what varies.
        partitions: of a user, where they are what varies.
        catalogues: I where it is what varies.
        served: limits of races of what is served.
        rivals: limits of races with the engines of others.
        seconds: multiplies the seconds of both limits.
        price: US dollars for an hour of a machine like this.
        only: shell pattern of the parts to measure.
        seed: of everything random.
    """

    backbones: tuple[str, ...] = tuple(BACKBONES)
    histories: tuple[int, ...] = (20, 50, 100)
    samples: int = 1000
    folded_users: int = 32
    items: int = 2000
    sizes: Sizes = PUBLISHED
    counts: tuple[int, ...] = (100, 1000, 4000)
    partitions: tuple[int, ...] = (5, 50, 500, 10_000)
    catalogues: tuple[int, ...] = (10_000, 100_000, 1_000_000)
    served: Limits = SERVED
    rivals: Limits = RIVALS
    seconds: float = 1.0
    price: float = 0.0893
    only: str = "*"
    seed: int = 1

    def parts(self) -> list[str]:
        """Names of the parts to measure, in order.

        Raises:
            ConfigurationError: `only` names none.
        """
        main = [f"{MAIN}-{history}" for history in self.histories] if MAIN in self.backbones else []
        others = [f"{name}-{SHORT}" for name in self.backbones if name != MAIN]
        there = [*main, *others, "samples", "partitions", "catalogue"]
        chosen = fnmatch.filter(there, self.only)
        if not chosen:
            raise ConfigurationError(f"--only {self.only!r} matches none of the parts: {', '.join(there)}")
        return chosen

    def limits(self, limits: Limits, share: float = 1.0) -> Limits:
        """With the seconds that this plan has for them."""
        return dataclasses.replace(limits, seconds=limits.seconds * self.seconds * share)


QUICK = Plan(
    backbones=("DIEN",),
    histories=(20,),
    samples=100,
    folded_users=8,
    items=300,
    sizes=Sizes(embedding_dim=8, hidden_size=16, attention_size=16, mlp_sizes=(20, 8), dimension=8),
    counts=(50, 100),
    partitions=(5, 50),
    catalogues=(300, 3000),
    served=Limits(1.0, 3, 10),
    rivals=Limits(1.0, 3, 5),
)
"""Enough to see that everything works."""


class Bench:
    """One run of a plan, in a directory of its own.

    Args:
        plan: what to measure.
        directory: scratch.
    """

    def __init__(self, plan: Plan, directory: Path) -> None:
        self.plan = plan
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self._directory = directory
        self._workshop = self._open_workshop(plan.items)
        self._began = time.perf_counter()

    def run(self) -> None:
        """Measures all parts of the plan into `rows`; what was left out, and why, is in `notes`."""
        parts = self.plan.parts()
        served = [part for part in parts if part not in ("samples", "partitions", "catalogue")]
        if served or "samples" in parts:
            self._tell(f"a store with {self.plan.samples} users of 200 behaviors")
            self._store = self._make_store("memory", self.plan.samples, 200, 10, self.plan.items)
        for part in parts:
            if part == "samples":
                self._measure_samples()
            elif part == "partitions":
                self._measure_partitions()
            elif part == "catalogue":
                self._measure_catalogue()
            else:
                backbone, _, history = part.rpartition("-")
                self._measure_served(backbone, int(history))

    def set_floors(self, gemm_gflops: float) -> None:
        """Gives every row its floor: the time of its matrix products at the machine's peak."""
        for row in self.rows:
            row["floor_ms"] = None if row["gflop"] is None else round(1e3 * row["gflop"] / gemm_gflops, 4)

    def _measure_served(self, backbone: str, history: int) -> None:
        """A backbone with LIBER and without it, served in every way; for `MAIN` beside the engines of others."""
        is_main = backbone == MAIN
        with contextlib.ExitStack() as stack:
            self._tell(f"{backbone}, T={history}: bundles and servers")
            pair = {
                liber: self._make_bundle(
                    f"{backbone}-{history}-{'liber' if liber else 'base'}", backbone, history, liber
                )
                for liber in (True, False)
            }
            local = {liber: self._open_models(stack, made, self._store) for liber, made in pair.items()}
            served = {liber: self._serve(stack, made) for liber, made in pair.items()}
            rivals = self._open_rivals(stack, pair[True]) if is_main else None
            questions = self._questions()
            if is_main and history == SHORT:
                single = Question("single", questions[0].user_ids[:1], questions[0].item_ids[:1])
                questions = [*questions, single]
            quantized = self._quantize(pair[True])
            for question in questions:
                self._tell(f"{backbone}, T={history}, {question.shape}")
                engines = [
                    engine
                    for liber in (True, False)
                    for engine in self._served_engines(question, liber, local[liber], *served[liber])
                ]
                limits = self.plan.limits(self.plan.served, 1.0 if is_main else 0.6)
                self._note(race(engines, limits), question, pair, history)
                tensors = local[True][0].prepare(question.tensors())
                engines = [
                    _graph_engine(liber, *local[liber], local[liber][0].prepare(question.tensors()))
                    for liber in (True, False)
                ]
                if quantized is not None:
                    engines.append(_quantized_engine(quantized, tensors))
                if rivals is not None and question.shape != "single":
                    engines += rivals(question, tensors)
                limits = self.plan.limits(self.plan.rivals, 1.0 if is_main else 0.1)
                self._note(race(engines, limits), question, pair, history)

    def _measure_samples(self) -> None:
        """The graph alone on more and more candidates, of one user and of as many users."""
        self._tell("more and more samples")
        with contextlib.ExitStack() as stack:
            made = self._make_bundle("samples", MAIN, SHORT, True)
            local = self._open_models(stack, made, self._store)
            for question in self._questions()[:2]:
                tensors = local[0].prepare(question.tensors())
                sized = {count: take(tensors, question.shape, count) for count in self.plan.counts}
                engines = [_graph_engine(True, *local, each) for each in sized.values()]
                engines = [dataclasses.replace(engine, comparable=False) for engine in engines]
                timings = race(engines, self.plan.limits(self.plan.served))
                for count, timing in zip(sized, timings, strict=True):
                    users = 1 if question.shape == "one_user" else count
                    self._write(timing, made, question.shape, users, count, SHORT, part="samples")

    def _measure_partitions(self) -> None:
        """The whole way in process for users with more and more partitions, each in a store of its own."""
        with contextlib.ExitStack() as stack:
            made = self._make_bundle("partitions", MAIN, SHORT, True)
            models = {}
            for count in self.plan.partitions:
                self._tell(f"a user with {count} partitions")
                # At least as many behaviors as are looked back, so that histories are as long for all.
                behaviors = max(200, 20 * count)
                store = self._make_store(f"partitions-{count}", 1, behaviors, count, self.plan.items)
                models[count] = self._open_models(stack, made, store)
            items = self._questions()[0].item_ids
            for shape, candidates in (("one_user", items), ("single", items[:1])):
                question = Question(shape, ("user-0",) * len(candidates), candidates)
                engines = [
                    dataclasses.replace(_local_engine(question, True, *each), comparable=False)
                    for each in models.values()
                ]
                timings = race(engines, self.plan.limits(self.plan.served))
                for count, timing in zip(models, timings, strict=True):
                    self._write(timing, made, shape, 1, question.candidates, SHORT, part="partitions", partitions=count)

    def _measure_catalogue(self) -> None:
        """The whole way and the graph alone over larger and larger catalogues."""
        with contextlib.ExitStack() as stack:
            engines: dict[str, list[tuple[int, MadeBundle, Engine]]] = {"one_user": [], "distinct_users": []}
            for items in self.plan.catalogues:
                self._tell(f"a catalogue of {items} items")
                workshop = self._open_workshop(items)
                made = workshop.bundle("bundle", MAIN, history_length=SHORT, options=self.plan.sizes.options(MAIN))
                store = self._make_store(f"items-{items}", self.plan.samples, 200, 10, items)
                local = self._open_models(stack, made, store)
                for question in self._questions(items)[:2]:
                    graph = _graph_engine(True, *local, local[0].prepare(question.tensors()))
                    for engine in (_local_engine(question, True, *local), graph):
                        alone = dataclasses.replace(engine, comparable=False)
                        engines[question.shape].append((items, made, alone))
            for shape, entered in engines.items():
                timings = race([engine for _, _, engine in entered], self.plan.limits(self.plan.served))
                for (items, made, _), timing in zip(entered, timings, strict=True):
                    users = 1 if shape == "one_user" else self.plan.samples
                    self._write(timing, made, shape, users, self.plan.samples, SHORT, part="catalogue", items=items)

    def _served_engines(
        self,
        question: Question,
        liber: bool,
        models: tuple[LocalModels, LocalModels],
        server: TritonServer,
        client: ScoringClient,
    ) -> list[Engine]:
        over_grpc = Engine(
            "liber",
            "grpc",
            serve_over_grpc(client, question),
            liber,
            processes=lambda: _family(server.process_id),
        )
        return [_local_engine(question, liber, *models), over_grpc]

    def _open_rivals(
        self, stack: contextlib.ExitStack, made: MadeBundle
    ) -> Callable[[Question, Tensors], list[Engine]]:
        """Makes what the engines of others need; gives them for a question and the tensors of `LocalModels.prepare`."""
        ranker_file = made.directory.with_suffix(".pt")
        torch.save(made.ranker, ranker_file)
        service = stack.enter_context(serve_with_fastapi(ranker_file, made.directory, self._store))
        exported: list[ExportedModel] = []
        plan, backbone = self.plan, made.manifest.backbone

        def engines(question: Question, tensors: Tensors) -> list[Engine]:
            rows = unfold(tensors)
            if not exported:
                path = made.directory.with_suffix(".plain.onnx")
                export_plainly(made.ranker, rows, path)
                exported.extend((ExportedModel(path), ExportedModel(path, threads=1)))
            eager = run_eagerly(made.ranker, rows)
            ask, close = service.asking(question)
            stack.callback(close)
            found = [
                Engine("torch_eager", "in_process", eager, True, single=in_one_thread(eager)),
                Engine(
                    "onnx_export",
                    "in_process",
                    exported[0].answering(rows),
                    True,
                    single=exported[1].answering(rows),
                ),
                Engine("fastapi", "http", ask, True, processes=lambda: [service.process_id]),
            ]
            if backbone in DEEPCTR_MODELS:
                theirs = run_deepctr(
                    backbone,
                    made.fitted,
                    rows,
                    embedding_dim=plan.sizes.embedding_dim,
                    mlp_sizes=plan.sizes.mlp_sizes,
                    seed=plan.seed,
                )
                found.append(
                    Engine("deepctr_torch", "in_process", theirs, True, single=in_one_thread(theirs), comparable=False)
                )
            return found

        return engines

    def _open_models(
        self, stack: contextlib.ExitStack, made: MadeBundle, store: str
    ) -> tuple[LocalModels, LocalModels]:
        """The bundle's models, with the threads that serving takes and with one."""
        models = LocalModels(made.directory, store), LocalModels(made.directory, store, threads=1)
        for each in models:
            stack.callback(each.close)
        return models

    def _serve(self, stack: contextlib.ExitStack, made: MadeBundle) -> tuple[TritonServer, ScoringClient]:
        directory = made.directory.with_suffix(".serving")
        directory.mkdir()
        server = stack.enter_context(serve(made.directory, self._store, directory))
        # A connection of its own: two servers one after the other may have the same port.
        client = stack.enter_context(ScoringClient(server.grpc_url, own_connection=True))
        return server, client

    def _make_bundle(self, name: str, backbone: str, history: int, liber: bool) -> MadeBundle:
        return self._workshop.bundle(
            name,
            backbone,
            fusion="matched" if liber else "none",
            history_length=history,
            options=self.plan.sizes.options(backbone),
        )

    def _quantize(self, made: MadeBundle) -> tuple[ServedGraph, ServedGraph] | None:
        directory = made.directory.with_suffix(".int8")
        directory.mkdir()
        try:
            path = directory / BACKBONE
            export_backbone(made.ranker, path, precision="int8")
            return ServedGraph(path), ServedGraph(path, threads=1)
        except LiberError as error:
            # The scratch directory is gone when this is read.
            reason = str(error).replace(f"{directory}/", "")
            self.notes.append(f"{made.manifest.backbone}, T={made.manifest.history_length}: no int8: {reason}")
            return None

    def _questions(self, items: int | None = None) -> list[Question]:
        """The three shapes; ``one_user`` first, then ``distinct_users``."""
        draw = np.random.default_rng(self.plan.seed)
        samples = self.plan.samples
        candidates = tuple(f"item-{number}" for number in draw.integers(items or self.plan.items, size=samples))
        folded = np.sort(np.arange(samples) % self.plan.folded_users)
        return [
            Question("one_user", ("user-0",) * samples, candidates),
            Question("distinct_users", tuple(f"user-{number}" for number in range(samples)), candidates),
            Question("folded", tuple(f"user-{number}" for number in folded), candidates),
        ]

    def _open_workshop(self, items: int) -> Workshop:
        sizes = self.plan.sizes
        return Workshop(
            self._directory / f"catalogue-{items}", items, sizes.dimension, sizes.embedding_dim, self.plan.seed
        )

    def _make_store(self, name: str, users: int, behaviors: int, partitions: int, items: int) -> str:
        url = f"sqlite:///{self._directory / name}.db"
        make_store(
            url,
            self._workshop.encoding.fingerprint,
            users=users,
            behaviors=behaviors,
            partitions=partitions,
            items=items,
            dimension=self.plan.sizes.dimension,
            seed=self.plan.seed,
        )
        return url

    def _note(
        self, timings: Sequence[Timing], question: Question, pair: Mapping[bool, MadeBundle], history: int
    ) -> None:
        """Writes a row for each engine of a race; with LIBER also the ratio to the same engine without it."""
        bare = {_kind(timing.engine): timing for timing in timings if not timing.engine.liber}
        for timing in timings:
            extra: Row = {}
            partner = bare.get(_kind(timing.engine))
            if timing.engine.liber and partner is not None:
                extra["ratio_to_backbone"] = round(float(np.median(timing.seconds / partner.seconds)), 4)
            self._write(
                timing,
                pair[timing.engine.liber],
                question.shape,
                question.users,
                question.candidates,
                history,
                part="served",
                **extra,
            )

    def _write(
        self, timing: Timing, made: MadeBundle, shape: str, users: int, candidates: int, history: int, **extra: Any
    ) -> None:
        engine = timing.engine
        # Another's model multiplies other matrices.
        gflop = count_flops(made.ranker, users, candidates) / 1e9 if engine.name != "deepctr_torch" else None
        p50 = timing.milliseconds(50)
        self.rows.append(
            {
                "model": made.manifest.backbone,
                "engine": engine.name,
                "path": engine.path,
                "shape": shape,
                "users": users,
                "candidates": candidates,
                "history": history,
                "liber": engine.liber,
                "precision": engine.precision,
                "device": "cpu",
                "p50_ms": round(p50, 4),
                "p99_ms": round(timing.milliseconds(99), 4),
                "cpu_ms": None if timing.cpu_seconds is None else round(1e3 * timing.cpu_seconds, 4),
                "gflop": None if gflop is None else round(gflop, 6),
                "calls": len(timing.seconds),
                "rss_mib": None if timing.rss_bytes is None else round(timing.rss_bytes / 2**20, 1),
                "usd_per_million": round(self.plan.price / 3600 * p50 / 1e3 / candidates * 1e6, 6),
                "max_difference": timing.difference,
                **extra,
            }
        )

    def _tell(self, what: str) -> None:
        print(f"[{time.perf_counter() - self._began:5.0f} s] {what}", file=sys.stderr, flush=True)


def take(tensors: Tensors, shape: str, count: int) -> Tensors:
    """As many candidates, of as many users where all are distinct: the first ones, and all of them again if need be.

    Args:
        tensors: of `LocalModels.prepare`.
        shape: ``one_user`` or ``distinct_users``.
        count: N.
    """
    place = np.arange(count) % tensors["item_index"].shape[1]
    owners = np.zeros(count, dtype=np.int32) if shape == "one_user" else np.arange(count, dtype=np.int32)
    users = place[:1] if shape == "one_user" else place
    taken = {name: array[:, users] for name, array in tensors.items() if name not in ("item_index", "user_index")}
    return {"item_index": tensors["item_index"][:, place], "user_index": owners[np.newaxis], **taken}


def _local_engine(question: Question, liber: bool, models: LocalModels, single: LocalModels) -> Engine:
    request = question.tensors()
    return Engine("liber", "in_process", lambda: models.score(request), liber, single=lambda: single.score(request))


def _graph_engine(liber: bool, models: LocalModels, single: LocalModels, tensors: Tensors) -> Engine:
    return Engine(
        "liber_graph", "in_process", lambda: models.graph(tensors), liber, single=lambda: single.graph(tensors)
    )


def _quantized_engine(models: tuple[ServedGraph, ServedGraph], tensors: Tensors) -> Engine:
    call, single = (model.answering(tensors) for model in models)
    return Engine("liber_graph_int8", "in_process", call, True, precision="int8", single=single)


def _kind(engine: Engine) -> tuple[str, str, str]:
    return engine.name, engine.path, engine.precision


def _family(number: int | None) -> list[int]:
    """A process and its children, theirs included."""
    if number is None:
        return []
    return [number, *(child.pid for child in psutil.Process(number).children(recursive=True))]
