"""``liber build engine``: an LLM's engine, and the model repository that serves it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import typer

from liber_runtime.cli.application import needs_builders, output
from liber_runtime.cli.build import building
from liber_runtime.exceptions import InvalidInputError
from liber_runtime.progress import console

if TYPE_CHECKING:
    from builders.llm.engines import EngineSettings

Quantization: TypeAlias = Literal["fp16", "fp8", "int4-awq"]
Layout: TypeAlias = Literal["inflight_batcher_llm", "llmapi"]

_LAYOUT_HELP = (
    "Of --repository. inflight_batcher_llm: serves the engine (TensorRT-LLM 1.0 to 1.2). llmapi: serves the checkpoint "
    "itself (1.0 and later); no engine is built."
)


@building.command()
def engine(
    model: Annotated[
        str, typer.Option(help="Llama checkpoint in Hugging Face's format: a directory, or a name on its hub.")
    ],
    quantization: Annotated[Quantization, typer.Option(help="fp8 is for weights and KV cache.")] = "fp16",
    tp: Annotated[Literal["1", "2"], typer.Option(help="GPUs that share every layer (tensor parallelism).")] = "1",
    output_directory: Annotated[Path, typer.Option("--output", help="Receives checkpoint and engine.")] = Path(
        "runs/engine"
    ),
    repository: Annotated[
        Path | None, typer.Option(help="Write the model repository for the LLM's own Triton here.")
    ] = None,
    layout: Annotated[Layout, typer.Option(help=_LAYOUT_HELP)] = "inflight_batcher_llm",
    max_batch_size: Annotated[int, typer.Option(help="Most sequences in flight.")] = 192,
    max_input_len: Annotated[int, typer.Option(help="Longest prompt, in tokens.")] = 3584,
    max_seq_len: Annotated[int, typer.Option(help="Longest prompt with its answer.")] = 4096,
    max_num_tokens: Annotated[int, typer.Option(help="Most tokens of one forward pass.")] = 8192,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Data set for fp8 and int4-awq: a directory with a column text. Default: cnn_dailymail."),
    ] = None,
    examples: Annotated[
        Path | None,
        typer.Option(envvar="LIBER_TENSORRT_LLM_EXAMPLES", help="TensorRT-LLM's examples. Default: the image's."),
    ] = None,
    image_models: Annotated[
        Path, typer.Option(envvar="LIBER_TENSORRT_LLM_MODELS", help="NVIDIA's models for Triton.")
    ] = Path("/app/all_models"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the commands and what they need; run nothing.")
    ] = False,
) -> None:
    """Build a TensorRT-LLM engine of a Llama checkpoint, and the model repository that serves it.

    What is in --output already is not built again. Runs in NVIDIA's image with TensorRT-LLM; --dry-run runs anywhere.
    """
    with needs_builders():
        from builders.llm.building import build_engine
        from builders.llm.engines import EngineSettings
        from builders.llm.plan import describe, plan_engine
        from builders.llm.repository import LlmService, check_repository, models_of, write_repository

        settings = EngineSettings(quantization, int(tp), max_batch_size, max_input_len, max_seq_len, max_num_tokens)
        if layout == "llmapi":
            _serve_checkpoint(model, settings, repository, image_models, dry_run)
            return
        if repository is not None and not dry_run:
            check_repository(repository, layout, image_models)
        plan = plan_engine(
            model, settings, output_directory, calibration=calibration, examples=examples, dry_run=dry_run
        )
        if dry_run:
            _print([*describe(plan), *_repository_lines(repository, models_of(layout))])
            if plan.unknown:
                console.print(
                    f"not known here: {', '.join(plan.unknown)}; the names of the directories follow from it too",
                    soft_wrap=True,
                )
            return
        directory = build_engine(plan)
        output.print(f"engine: {directory}", soft_wrap=True)
        if repository is not None:
            service = LlmService(settings, plan.checkpoint.directory, directory)
            write_repository(service, layout, repository, image_models)
            output.print(f"model repository: {repository}", soft_wrap=True)


def _serve_checkpoint(
    model: str, settings: EngineSettings, repository: Path | None, image_models: Path, dry_run: bool
) -> None:
    from builders.llm.plan import describe_memory, plan_llmapi
    from builders.llm.repository import LlmService, check_llmapi, check_repository, models_of, write_repository

    if repository is None:
        raise InvalidInputError("--layout llmapi builds no engine, only a model repository; name it by --repository")
    if not dry_run:
        check_repository(repository, "llmapi", image_models)
    checkpoint, sizes = plan_llmapi(model, settings, dry_run=dry_run)
    check_llmapi(checkpoint, settings)
    if dry_run:
        _print([*describe_memory(sizes, settings), *_repository_lines(repository, models_of("llmapi"))])
        return
    write_repository(LlmService(settings, checkpoint.directory), "llmapi", repository, image_models)
    output.print(f"model repository: {repository}", soft_wrap=True)


def _repository_lines(repository: Path | None, models: tuple[str, ...]) -> list[str]:
    if repository is None:
        return []
    return ["repository:", *(f"  -> {repository / name / 'config.pbtxt'}" for name in models)]


def _print(lines: list[str]) -> None:
    for line in lines:
        output.print(line, soft_wrap=True)
