"""``liber build``, ``liber demo`` and ``liber data``: what needs a checkout and `builders`."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer
from rich.table import Table

from liber_runtime.bundle import Manifest, Precision
from liber_runtime.cli.application import (
    DataOption,
    StoreOption,
    TritonOption,
    WriterModelOption,
    WriterOption,
    WriterUrlOption,
    application,
    needs_builders,
    opened,
    output,
    quiet_grpc,
)
from liber_runtime.exceptions import InvalidInputError
from liber_runtime.memory import MemoryStore
from liber_runtime.settings import load_settings, load_writer_settings

if TYPE_CHECKING:
    from builders.train import TrainingResult


@application.command()
def demo(
    data: DataOption = None,
    output_directory: Annotated[
        Path, typer.Option("--output", help="Where the run is kept; a rerun goes on from there.")
    ] = Path("runs/demo"),
    encoder: Annotated[
        str | None, typer.Option(help="BERT checkpoint: a directory or a hub name. Default: the embedded MiniLM.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, batches and dropout.")] = 1,
) -> None:
    """Run all of LIBER on real behaviors: store, texts, encoding, training, serving on Triton, report.

    Writes report.json and report.html into --output. Needs a checkout and the extras build and serve.
    """
    with needs_builders():
        from builders.build import BuildSettings
        from builders.demo import run_demo
    settings = BuildSettings(seed=seed) if encoder is None else BuildSettings(seed=seed, encoder=encoder)
    report = run_demo(data, output_directory, settings)
    output.print(_report_table(report))
    output.print(f"report: {output_directory / 'report.html'}", soft_wrap=True)


@application.command()
def data(
    name: Annotated[str, typer.Argument(help="ml-100k is the one there is.")],
    to: Annotated[Path, typer.Option(help="Directory to put it in.")] = Path("data"),
) -> None:
    """Download a public data set, its checksum verified."""
    if name != "ml-100k":
        raise InvalidInputError(f"no data set is called {name!r}; there is ml-100k")
    with needs_builders():
        from builders.datasets.download import download_movielens
    output.print(f"{download_movielens(to)}", soft_wrap=True)


OutputOption = Annotated[Path, typer.Option("--output", help="Receives the bundle.")]
RepositoryOption = Annotated[
    Path | None, typer.Option(help="Publish the bundle into this model repository as its next version.")
]
ServingOption = Annotated[
    str | None,
    typer.Option("--triton", help="host:port of a running Triton on that repository: it switches to the new version."),
]
Target: TypeAlias = Literal["cpu", "gpu"]
TargetOption = Annotated[
    Target | None,
    typer.Option(
        help="What --repository is for. cpu: any Triton. gpu: NVIDIA's image, whose own backend runs the graphs. "
        "Default: what it was first published for, else cpu."
    ),
]
TensorrtOption = Annotated[
    bool, typer.Option("--tensorrt", help="For --target gpu: TensorRT compiles the graphs, when a shape comes first.")
]
LOOKBACK = typer.Option(help="Newest behaviors in which feedback to similar items is looked up.", min=1)
LookbackOption = Annotated[int, LOOKBACK]
RefitOption = Annotated[
    bool,
    typer.Option(
        "--refit-pca", help="Fit the PCA anew, not keep that of the last build in --output: every vector is remade."
    ),
]

_BACKBONE_HELP = (
    "LR, DNN, DCN, DCNv2, DeepFM, xDeepFM, AutoInt, FiBiNet, DIN, DIEN, or one of your own as package.module:Class."
)
_FUSION_HELP = (
    "paper: the interest is one more feature (Eq. 7). matched: it also meets the candidate's own text. none: the "
    "backbone alone, served without reading vectors. items: that, with the items' own texts among its numbers."
)
Fusion: TypeAlias = Literal["none", "items", "paper", "matched"]

_PRECISION_HELP = (
    "Of the backbone's weights. int8: one byte each, for machines without compiled kernels, for --target cpu; scores "
    "change a little."
)

building = typer.Typer()
application.add_typer(building, name="build")


@building.callback(invoke_without_command=True)
def build(
    context: typer.Context,
    data: DataOption = None,
    store: StoreOption = None,
    output_directory: OutputOption = Path("runs/build"),
    writer: WriterOption = None,
    writer_url: WriterUrlOption = None,
    writer_model: WriterModelOption = None,
    repository: RepositoryOption = None,
    triton: ServingOption = None,
    target: TargetOption = None,
    tensorrt: TensorrtOption = False,
    condition: Annotated[
        str | None, typer.Option(help="When the cache is cut, for a new store. Default count(20).")
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(help="BERT checkpoint: a directory or a hub name. Default: the embedded MiniLM.")
    ] = None,
    backbone: Annotated[str, typer.Option(help=_BACKBONE_HELP)] = "DIEN",
    fusion: Annotated[Fusion, typer.Option(help=_FUSION_HELP)] = "matched",
    dimension: Annotated[int, typer.Option(help="d: size of representations and interest.", min=1)] = 32,
    history: Annotated[int, typer.Option(help="T: newest behaviors the backbone reads.", min=1)] = 20,
    lookback: LookbackOption = 200,
    refit_pca: RefitOption = False,
    seed: Annotated[int, typer.Option(help="Of weights, batches and dropout.")] = 1,
    precision: Annotated[Precision, typer.Option(help=_PRECISION_HELP)] = "fp32",
) -> None:
    """Make a bundle: fill the store, write texts, fit encoder, PCA, fuser and backbone, export, publish.

    With --fusion none the same store serves the backbone without LIBER; another build serves it with.

    Runs at low priority. Needs a checkout and the extras build and serve.
    """
    if context.invoked_subcommand is not None:
        _refuse_misplaced(context)
        return
    _require_repository(repository, triton, target, tensorrt, precision)
    with needs_builders():
        from builders.datasets import load

        dataset = load(data)
        # Later, for it takes seconds: a mistyped path is told at once.
        _require_backbone(backbone)
        from builders.build import BuildSettings
        from builders.build import build as build_bundle
        from builders.priority import lower_priority
    from liber_runtime.writers.opening import open_writer

    author = open_writer(load_writer_settings(writer=writer, url=writer_url, model=writer_model))
    lower_priority()
    settings = BuildSettings(
        backbone=backbone,
        fusion=fusion,
        dimension=dimension,
        history_length=history,
        lookback=max(lookback, history),
        seed=seed,
        precision=precision,
        refit_pca=refit_pca,
    )
    if encoder is not None:
        settings = dataclasses.replace(settings, encoder=encoder)
    with opened(store, condition, create=True) as memory:
        manifest, result = build_bundle(memory, dataset, author, output_directory, settings)
        _tell_result(manifest, result, output_directory)
        _bring_into_service(memory, manifest, output_directory / "bundle", repository, triton, target, tensorrt)


@building.command("re-encode")
def reencode(
    store: StoreOption = None,
    output_directory: OutputOption = Path("runs/build"),
    writer: WriterOption = None,
    writer_url: WriterUrlOption = None,
    writer_model: WriterModelOption = None,
    repository: RepositoryOption = None,
    triton: ServingOption = None,
    target: TargetOption = None,
    tensorrt: TensorrtOption = False,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="BERT checkpoint: a directory or a hub name. What is not given stays as the bundle in --output has it."
        ),
    ] = None,
    backbone: Annotated[str | None, typer.Option(help=_BACKBONE_HELP)] = None,
    fusion: Annotated[Fusion | None, typer.Option(help=_FUSION_HELP)] = None,
    dimension: Annotated[int | None, typer.Option(help="d: size of representations and interest.", min=1)] = None,
    history: Annotated[int | None, typer.Option(help="T: newest behaviors the backbone reads.", min=1)] = None,
    lookback: Annotated[int | None, LOOKBACK] = None,
    refit_pca: RefitOption = False,
    seed: Annotated[int | None, typer.Option(help="Of weights, batches and dropout.")] = None,
    precision: Annotated[Precision | None, typer.Option(help=_PRECISION_HELP)] = None,
) -> None:
    """Make vectors and a bundle anew from what the store holds: another encoder, dimension or PCA, and no writer call.

    Scoring, appending and workers go on meanwhile, with the old vectors until the new bundle serves. A run that was
    interrupted goes on where it was. Runs at low priority. Needs a checkout and the extras build and serve.
    """
    before = output_directory / "bundle"
    kept = Manifest.load(before) if before.is_dir() else None
    _require_repository(repository, triton, target, tensorrt, precision or (kept.precision if kept else "fp32"))
    # What builds takes seconds to import: a mistyped store is told at once.
    with opened(store):
        pass
    with needs_builders():
        from builders.build import BuildSettings
        from builders.build import reencode as reencode_store
        from builders.priority import lower_priority
    from liber_runtime.writers.opening import open_writer

    author = open_writer(load_writer_settings(writer=writer, url=writer_url, model=writer_model))
    lower_priority()
    settings = BuildSettings(refit_pca=refit_pca)
    if kept is not None:
        was: dict[str, Any] = {
            "backbone": kept.backbone,
            "fusion": kept.fusion,
            "encoder": kept.encoder.name,
            "dimension": kept.dimension,
            "history_length": kept.history_length,
            "lookback": kept.lookback,
            "seed": kept.seed,
            "precision": kept.precision,
        }
        settings = dataclasses.replace(settings, **was)
    given: dict[str, Any] = {
        "backbone": backbone,
        "fusion": fusion,
        "encoder": encoder,
        "dimension": dimension,
        "history_length": history,
        "lookback": lookback,
        "seed": seed,
        "precision": precision,
    }
    settings = dataclasses.replace(settings, **{name: value for name, value in given.items() if value is not None})
    _require_backbone(settings.backbone)
    with opened(store) as memory:
        manifest, result = reencode_store(memory, author, output_directory, settings)
        _tell_result(manifest, result, output_directory)
        _bring_into_service(memory, manifest, before, repository, triton, target, tensorrt)


@building.command()
def switch(store: StoreOption = None, triton: TritonOption = None) -> None:
    """Once a Triton serves the new bundle: have vectors made for that one alone, and no more for the one before.

    `liber build --triton` does it by itself.
    """
    quiet_grpc()
    from liber_runtime.representation import TritonEncoder

    async def ask() -> str:
        encoder = TritonEncoder(triton or load_settings().triton)
        try:
            return await encoder.fingerprint()
        finally:
            await encoder.close()

    with opened(store) as memory:
        fingerprint = asyncio.run(ask())
        with needs_builders():
            from builders.build import switch as switch_store
        _tell_due(switch_store(memory, fingerprint))


def _refuse_misplaced(context: typer.Context) -> None:
    """Says where options of a subcommand belong: before it they would be another command's, and ignored."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name) if parameter.name else None
        if source is not None and source.name == "COMMANDLINE":
            raise InvalidInputError(
                f"{parameter.opts[0]} stands before {context.invoked_subcommand!r}; write `liber build "
                f"{context.invoked_subcommand} {parameter.opts[0]} ...`"
            )


def _require_backbone(name: str) -> None:
    """Finds a backbone before hours of work, one of someone's own also in the current directory.

    A console script has its own directory on the path in place of the current one. That goes last, so that no file in
    it stands before an installed package.
    """
    if ":" in name and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    from builders.models import find_backbone

    find_backbone(name)


def _require_repository(
    repository: Path | None, triton: str | None, target: Target | None, tensorrt: bool, precision: Precision
) -> None:
    """Finds before hours of work what publishing would stumble over."""
    if repository is None:
        if triton is not None:
            raise InvalidInputError("--triton needs --repository, the model repository that this Triton serves")
        if target is not None or tensorrt:
            raise InvalidInputError("--target and --tensorrt say how to publish; they need --repository")
        return
    quiet_grpc()
    with needs_builders():
        from builders.repository import choose_target
    from liber_runtime.model_control import check_access

    choose_target(repository, target, tensorrt, precision)
    if triton is not None:
        check_access(load_settings())


def _tell_result(manifest: Manifest, result: TrainingResult, directory: Path) -> None:
    output.print(
        f"bundle {manifest.bundle_id} in {directory / 'bundle'}: validation AUC {result.auc:.4f}, "
        f"log loss {result.logloss:.4f}",
        soft_wrap=True,
    )


def _bring_into_service(
    memory: MemoryStore,
    manifest: Manifest,
    bundle: Path,
    repository: Path | None,
    triton: str | None,
    target: Target | None,
    tensorrt: bool,
) -> None:
    """Publishes a bundle; a running Triton switches to it, and only then the store to its vectors."""
    from builders.build import encodings
    from builders.build import switch as switch_store
    from builders.repository import choose_target, deploy, publish

    if repository is not None and triton is not None:
        chosen = choose_target(repository, target, tensorrt, manifest.precision)
        version = deploy(bundle, repository, triton, target=chosen, tensorrt=tensorrt)
        output.print(f"published as version {version} of {repository}; Triton at {triton} serves it", soft_wrap=True)
        _tell_due(switch_store(memory, manifest.fingerprint))
        return
    if repository is not None:
        chosen = choose_target(repository, target, tensorrt, manifest.precision)
        version = publish(bundle, repository, target=chosen, tensorrt=tensorrt)
        output.print(f"published as version {version} of {repository}", soft_wrap=True)
    others = encodings(memory) - {manifest.fingerprint}
    if others:
        output.print(
            f"vectors of {', '.join(sorted(others))} are still made beside those of {manifest.fingerprint}; when a "
            "Triton serves the new bundle, run: liber build switch --triton HOST:PORT",
            soft_wrap=True,
        )


def _tell_due(due: int) -> None:
    if due:
        output.print(f"{due} vectors of the newest partitions wait for a worker")


def _report_table(report: dict[str, Any]) -> Table:
    table = Table("figure", "here", title=f"LIBER on {report['data']['name']}, writer: {report['writer']}")
    quality, serving = report["quality"], report["serving"]
    for name in ("base", "liber"):
        table.add_row(f"{report['backbone']} {name}: AUC", f"{quality[name]['auc']:.4f}")
        table.add_row(f"{report['backbone']} {name}: log loss", f"{quality[name]['logloss']:.4f}")
    table.add_row("writer calls per user", f"{report['memory']['calls_per_user']:.4f}")
    table.add_row(f"served AUC over {serving['samples']} samples", f"{serving['auc']:.4f}")
    table.add_row("largest difference to offline", f"{serving['max_abs_diff_vs_offline']:.1e}")
    for shape, figures in serving["seconds_per_1000"].items():
        table.add_row(f"seconds per 1000, {shape}: p50 / p99", f"{figures['p50']:.4f} / {figures['p99']:.4f}")
    return table
