"""``liber build``, ``liber demo`` and ``liber data``: what needs a checkout and `builders`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from liber_runtime.cli.application import DataOption, StoreOption, application, needs_builders, opened, output
from liber_runtime.exceptions import InvalidInputError


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


@application.command()
def build(
    data: DataOption = None,
    store: StoreOption = None,
    output_directory: Annotated[Path, typer.Option("--output", help="Receives the bundle.")] = Path("runs/build"),
    repository: Annotated[
        Path | None, typer.Option(help="Publish the bundle into this model repository as its next version.")
    ] = None,
    triton: Annotated[
        str | None,
        typer.Option(help="host:port of a running Triton on that repository: it switches to the new version."),
    ] = None,
    condition: Annotated[
        str | None, typer.Option(help="When the cache is cut, for a new store. Default count(20).")
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(help="BERT checkpoint: a directory or a hub name. Default: the embedded MiniLM.")
    ] = None,
    dimension: Annotated[int, typer.Option(help="d: size of representations and interest.", min=1)] = 32,
    history: Annotated[int, typer.Option(help="T: newest behaviors the backbone reads.", min=1)] = 20,
    refit_pca: Annotated[
        bool,
        typer.Option(
            "--refit-pca", help="Fit the PCA anew, not keep that of the last build in --output: every vector is remade."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of weights, batches and dropout.")] = 1,
) -> None:
    """Make a bundle: fill the store, write texts, fit encoder, PCA, fuser and backbone, export, publish.

    Needs a checkout and the extras build and serve.
    """
    if triton is not None and repository is None:
        raise InvalidInputError("--triton needs --repository, the model repository that this Triton serves")
    with needs_builders():
        from builders.datasets import load

        dataset = load(data)
        # Later, for it takes seconds: a mistyped path is told at once.
        from builders.build import BuildSettings
        from builders.build import build as build_bundle
        from builders.repository import deploy, publish
    from liber_runtime.writers.statistical import StatisticalWriter

    settings = BuildSettings(dimension=dimension, history_length=history, seed=seed, refit_pca=refit_pca)
    if encoder is not None:
        settings = dataclasses.replace(settings, encoder=encoder)
    with opened(store, condition, create=True) as memory:
        manifest, result = build_bundle(memory, dataset, StatisticalWriter(), output_directory, settings)
        output.print(
            f"bundle {manifest.bundle_id} in {output_directory / 'bundle'}: validation AUC {result.auc:.4f}, "
            f"log loss {result.logloss:.4f}",
            soft_wrap=True,
        )
        if repository is None:
            return
        if triton is None:
            version = publish(output_directory / "bundle", repository)
            output.print(f"published as version {version} of {repository}", soft_wrap=True)
            return
        version = deploy(output_directory / "bundle", repository, triton)
        output.print(f"published as version {version} of {repository}; Triton at {triton} serves it", soft_wrap=True)
        # While this build trained, workers encoded with the bundle that served; its vectors would be refused now.
        late = memory.reencode(manifest.fingerprint)
        if late:
            output.print(f"{late} vectors that the bundle before made meanwhile wait for a worker to encode them again")


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
