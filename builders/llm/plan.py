"""What ``liber build engine`` is going to do: all that can be found out, and refused, before anything is loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

from builders.llm.checkpoint import FileDigests, LlmCheckpoint, find_checkpoint, identity
from builders.llm.engines import CALIBRATION_DATA, TOKENIZER, EngineSettings, Step, check_fit, plan_steps
from builders.llm.machine import (
    Gpu,
    find_gpus,
    find_tools,
    free_disk,
    installed_versions,
    require_engines,
    require_tools,
)
from builders.llm.sizes import EngineSizes, gib, sizes_of
from liber_runtime.bundle import digest_of
from liber_runtime.exceptions import ConfigurationError, InvalidInputError

MANIFEST = "manifest.json"
"""In every directory that a step has finished; written last."""

_FP8_CAPABILITY = (8, 9)
_SPARE_DISK = 1.05


@dataclasses.dataclass(frozen=True)
class EnginePlan:
    """What a build will do.

    Attributes:
        model: as it was asked for.
        checkpoint: that it is made from.
        digests: of the checkpoint's files.
        settings: of the engine.
        sizes: what it takes.
        steps: in order; each needs the one before.
        gpu: name of the GPU it is for; ``unknown`` if none is seen.
        versions: of TensorRT-LLM and TensorRT, if installed.
        unknown: what the keys depend on and is not known here.
    """

    model: str
    checkpoint: LlmCheckpoint
    digests: FileDigests
    settings: EngineSettings
    sizes: EngineSizes
    steps: tuple[Step, Step]
    gpu: str
    versions: dict[str, str]
    unknown: tuple[str, ...]

    @property
    def engine(self) -> Path:
        """The directory of the engine, once it is built."""
        return self.steps[-1].directory


def plan_engine(
    model: str,
    settings: EngineSettings,
    output: Path,
    *,
    calibration: Path | None = None,
    examples: Path | None = None,
    dry_run: bool = False,
) -> EnginePlan:
    """Finds out all that a build needs, and refuses what cannot work, before anything is loaded.

    Args:
        model: a checkpoint, see `find_checkpoint`.
        settings: of the engine.
        output: directory of all results.
        calibration: directory of a data set with a column ``text``, for quantization; None takes a public one.
        examples: directory of TensorRT-LLM's examples, see `find_tools`.
        dry_run: only plan: this machine needs neither a GPU nor TensorRT-LLM.

    Raises:
        InvalidInputError: the checkpoint or the settings cannot be used.
        ConfigurationError: the checkpoint is incomplete, or this machine cannot build the engine.
    """
    versions = installed_versions()
    version = versions.get("tensorrt_llm")
    if not dry_run or version:
        require_engines(version)
    tools = find_tools(examples, version)
    quantizes = settings.quantization != "fp16"
    if calibration is not None and not (quantizes and calibration.is_dir()):
        raise InvalidInputError(
            f"--calibration {calibration}: give a directory, and a --quantization that is calibrated (fp8, int4-awq)"
        )
    # Its weights are downloaded only when it is known that they are of use here.
    checkpoint = find_checkpoint(model, dry_run=True)
    _require_plain(checkpoint)
    check_fit(checkpoint.shape, settings)
    sizes = sizes_of(checkpoint.shape, settings)
    gpus = find_gpus()
    gpu = gpus[0].name if gpus else "unknown"
    if not dry_run:
        require_tools(tools, quantizes=quantizes)
        require_gpus(gpus, settings, sizes)
        checkpoint = find_checkpoint(model)
    digests = checkpoint.digests()
    steps = plan_steps(
        checkpoint.directory,
        checkpoint.tokenizer,
        settings,
        tools,
        output.absolute(),
        identity=identity(digests),
        versions=versions,
        gpu=gpu,
        calibration=str(calibration.absolute()) if calibration else CALIBRATION_DATA,
        calibration_identity=_digest_of_directory(calibration) if calibration else "",
    )
    known = {"the weights": checkpoint.weights, "TensorRT-LLM's version": version, "the GPU": gpus}
    unknown = tuple(name for name, value in known.items() if not value)
    plan = EnginePlan(model, checkpoint, digests, settings, sizes, steps, gpu, versions, unknown)
    if not dry_run:
        _require_room(plan, gpus)
    return plan


def plan_llmapi(model: str, settings: EngineSettings, *, dry_run: bool = False) -> tuple[LlmCheckpoint, EngineSizes]:
    """The checkpoint that the layout ``llmapi`` serves as it is, and what serving it takes.

    The repository may be written where there is no GPU; where there are some, the model has to fit.

    Raises:
        InvalidInputError: the checkpoint or the settings cannot be used.
        ConfigurationError: the checkpoint is incomplete, or does not fit the GPUs that are there.
    """
    checkpoint = find_checkpoint(model, dry_run=True)
    check_fit(checkpoint.shape, settings)
    sizes = sizes_of(checkpoint.shape, settings)
    gpus = find_gpus()
    if gpus and not dry_run:
        require_gpus(gpus, settings, sizes)
    return checkpoint if dry_run else find_checkpoint(model), sizes


def require_gpus(gpus: tuple[Gpu, ...], settings: EngineSettings, sizes: EngineSizes) -> None:
    """Checks that an engine fits the GPUs that are there, were they idle.

    Raises:
        ConfigurationError: too few GPUs, unlike ones, without fp8, or with too little memory.
    """
    if len(gpus) < settings.tp:
        raise ConfigurationError(
            f"{len(gpus)} GPUs are seen and --tp {settings.tp} needs {settings.tp}; give the container GPUs (docker "
            "run --gpus), check CUDA_VISIBLE_DEVICES, or pass --dry-run to see the commands"
        )
    used = gpus[: settings.tp]
    if len({gpu.name for gpu in used}) > 1:
        raise ConfigurationError(f"the GPUs are {' and '.join(gpu.name for gpu in used)}; --tp needs equal ones")
    if settings.quantization == "fp8" and used[0].capability < _FP8_CAPABILITY:
        raise ConfigurationError(
            f"{used[0].name} has compute capability {'.'.join(map(str, used[0].capability))}, and fp8 needs 8.9 (Ada, "
            "Hopper or later); use --quantization int4-awq or fp16"
        )
    _require_memory(min(gpu.total for gpu in used), f"{used[0].name} has", settings, sizes)


def describe(plan: EnginePlan) -> list[str]:
    """The plan as lines of text: every command, the files there will be, memory and disk."""
    lines = [f"model: {plan.model}, {plan.checkpoint.shape.parameters:,} parameters"]
    due = due_steps(plan)
    for step in plan.steps:
        lines += [f"{step.name}:" if step in due else f"{step.name}, done:", f"  {shlex.join(step.command)}"]
        lines += [f"  -> {step.directory / name}" for name in _files_of(step)]
    lines += describe_memory(plan.sizes, plan.settings)
    if plan.sizes.calibration:
        lines.append(f"memory of all GPUs while quantizing: {gib(plan.sizes.calibration)}")
    lines.append(f"disk: {gib(plan.sizes.disk)} checkpoint, {gib(plan.sizes.disk)} engine")
    return lines


def describe_memory(sizes: EngineSizes, settings: EngineSettings) -> list[str]:
    """What serving takes, as lines of text."""
    each = "the GPU" if settings.tp == 1 else f"each of {settings.tp} GPUs"
    return [
        f"memory of {each}: at least {gib(sizes.least)} ({gib(sizes.weights)} weights, {gib(sizes.workspace)} "
        f"workspace, KV cache {sizes.token:,} bytes a token); {gib(sizes.full)} for {sizes.batch} sequences of "
        f"{settings.max_seq_len} tokens at once, fewer or shorter ones take less"
    ]


def read_manifest(step: Step) -> dict[str, Any] | None:
    """The manifest of a step that is done; None if it is not, or if its files are not what they were."""
    try:
        manifest: dict[str, Any] = json.loads((step.directory / MANIFEST).read_text("utf-8"))
        whole = manifest["key"] == step.key and all(
            (step.directory / name).stat().st_size == file["bytes"] for name, file in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
        manifest = {}
    return manifest if whole else None


def due_steps(plan: EnginePlan) -> tuple[Step, ...]:
    """The steps that are still to be run: none if the engine is there, whether or not its checkpoint still is."""
    if read_manifest(plan.steps[-1]) is not None:
        return ()
    return tuple(step for step in plan.steps if read_manifest(step) is None)


def _require_plain(checkpoint: LlmCheckpoint) -> None:
    if checkpoint.quantization is not None:
        raise InvalidInputError(
            f"{checkpoint.directory} is quantized already ({checkpoint.quantization}); give the original model, or "
            "serve this one by --layout llmapi"
        )


def _require_memory(there: int, whose: str, settings: EngineSettings, sizes: EngineSizes) -> None:
    if there < sizes.least:
        raise ConfigurationError(
            f"{gib(sizes.least)} of GPU memory are needed on each of {settings.tp}: {gib(sizes.weights)} weights, "
            f"{gib(sizes.workspace)} workspace and the KV cache of one sequence; {whose} {gib(there)}: use "
            "--quantization int4-awq, --tp 2, a smaller --max-seq-len, or a larger GPU"
        )


def _require_room(plan: EnginePlan, gpus: tuple[Gpu, ...]) -> None:
    """Checks what must be free of memory and disk for the steps that are to be run: none, if all are done."""
    due = due_steps(plan)
    if due:
        idle = min(gpu.free for gpu in gpus[: plan.settings.tp])
        _require_memory(idle, f"{plan.gpu} is in use, and free are", plan.settings, plan.sizes)
    needed, free = int(len(due) * plan.sizes.disk * _SPARE_DISK), free_disk(plan.engine.parent)
    if free < needed:
        raise ConfigurationError(
            f"{gib(needed)} of disk are needed in {plan.engine.parent} and {gib(free)} are free; free some, or name "
            "another --output"
        )
    free = sum(gpu.free for gpu in gpus)
    if plan.steps[0] in due and free < plan.sizes.calibration:
        raise ConfigurationError(
            f"quantizing loads the model in fp16, which takes {gib(plan.sizes.calibration)} of GPU memory, and "
            f"{gib(free)} are free; quantize on a larger GPU, and copy {plan.steps[0].directory.name} from its --output"
        )


def _digest_of_directory(directory: Path) -> str:
    found = {str(path.relative_to(directory)): digest_of(path) for path in directory.rglob("*") if path.is_file()}
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _files_of(step: Step) -> list[str]:
    return [*step.files, *(f"{TOKENIZER}/{path.name}" for path in step.tokenizer), MANIFEST]
