"""Settings -> the commands that make a TensorRT-LLM engine, and where their results go; pure.

Two steps: a Hugging Face checkpoint becomes one of TensorRT-LLM's (quantized, split for tensor parallelism), and that
an engine. A step's directory is named by a key of all that its result follows from, so that what is there need not be
made again, and engines of several settings lie side by side.

The flags are those of TensorRT-LLM 1.0 to 1.2, the last versions with engines. Paged cache, blocks of 32 tokens and
paged-context attention are named although they are defaults of 1.2: block reuse and chunked context, which are switched
on where the engine is served (`repository`), need them, and older versions had other defaults.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeAlias

from builders.llm.checkpoint import LlamaShape
from liber_runtime.exceptions import InvalidInputError

Quantization: TypeAlias = Literal["fp16", "fp8", "int4-awq"]

TOKENS_PER_BLOCK = 32
AWQ_GROUP = 128
CALIBRATION_SAMPLES = 512
CALIBRATION_DATA = "cnn_dailymail"

TOKENIZER = "tokenizer"
"""Directory beside an engine with the tokenizer it was built for."""


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """What an engine is to be.

    Attributes:
        quantization: ``fp16``, ``fp8`` (weights and KV cache), or ``int4-awq`` (weights; the cache stays fp16).
        tp: GPUs that share every layer (tensor parallelism).
        max_batch_size: most sequences in flight.
        max_input_len: longest prompt, in tokens.
        max_seq_len: longest prompt with its answer.
        max_num_tokens: most tokens of one forward pass, over all sequences; longer prompts go through it in chunks.

    Raises:
        InvalidInputError: limits that contradict each other.
    """

    quantization: Quantization = "fp16"
    tp: int = 1
    max_batch_size: int = 192
    max_input_len: int = 3584
    max_seq_len: int = 4096
    max_num_tokens: int = 8192

    def __post_init__(self) -> None:
        for name in ("tp", "max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{_option(name)} {getattr(self, name)} is less than 1; give at least that")
        if self.max_input_len >= self.max_seq_len:
            raise InvalidInputError(
                f"--max-input-len {self.max_input_len} leaves no room for an answer in --max-seq-len "
                f"{self.max_seq_len}, which prompt and answer share; lower the first"
            )
        if self.max_num_tokens < self.max_batch_size:
            raise InvalidInputError(
                f"--max-num-tokens {self.max_num_tokens} is less than --max-batch-size {self.max_batch_size}, and "
                "every sequence takes a token of each pass; raise it"
            )

    @property
    def cache_bytes(self) -> int:
        """Bytes of a value in the KV cache."""
        return 1 if self.quantization == "fp8" else 2


@dataclasses.dataclass(frozen=True)
class Tools:
    """What the commands run: an interpreter that has TensorRT-LLM, its two scripts and its compiler."""

    python: str
    convert: Path
    quantize: Path
    build: str


@dataclasses.dataclass(frozen=True)
class Step:
    """One command and what it leaves.

    Attributes:
        name: ``checkpoint`` or ``engine``.
        key: of all that the result follows from.
        directory: where the result is when it is complete.
        command: argv; it writes into `partial`.
        files: what must be there afterwards, names in the directory.
        tokenizer: files that are copied into `TOKENIZER` in the directory.
    """

    name: str
    key: str
    directory: Path
    command: tuple[str, ...]
    files: tuple[str, ...]
    tokenizer: tuple[Path, ...] = ()

    @property
    def partial(self) -> Path:
        """Where the command works; renamed to `directory` at the end."""
        return self.directory.with_name(f"{self.directory.name}.partial")

    @property
    def log(self) -> Path:
        """All that the command prints; kept when it fails."""
        return self.directory.with_name(f"{self.directory.name}.log")


def check_fit(shape: LlamaShape, settings: EngineSettings) -> None:
    """Refuses settings that a model of this shape cannot have.

    Raises:
        InvalidInputError: a longer context than the model's, or sizes that do not divide.
    """
    if settings.max_seq_len > shape.positions:
        raise InvalidInputError(
            f"--max-seq-len {settings.max_seq_len} is more than the {shape.positions} positions of the model; lower "
            "it, and --max-input-len with it"
        )
    divided = {
        "attention heads": shape.heads,
        "key-value heads": shape.key_value_heads,
        "columns of the MLP": shape.intermediate_size,
    }
    for name, size in divided.items():
        if size % settings.tp:
            raise InvalidInputError(f"--tp {settings.tp} does not divide the model's {size} {name}; use --tp 1")
    if settings.quantization == "int4-awq":
        attention, mlp = shape.heads * shape.head_size // settings.tp, shape.intermediate_size // settings.tp
        for part in (shape.hidden_size, attention, mlp):
            if part % AWQ_GROUP:
                raise InvalidInputError(
                    f"int4-awq groups {AWQ_GROUP} weights, and a matrix of this model has {part} columns for each GPU; "
                    "use another --quantization"
                )


def checkpoint_arguments(settings: EngineSettings, calibration: str = CALIBRATION_DATA) -> dict[str, str]:
    """Flags of ``convert_checkpoint.py``, or of ``quantize.py`` if weights are quantized, without paths of models."""
    common = {"--dtype": "float16", "--tp_size": str(settings.tp)}
    if settings.quantization == "fp16":
        return common
    formats = {
        "fp8": {"--qformat": "fp8", "--kv_cache_dtype": "fp8"},
        "int4-awq": {"--qformat": "int4_awq", "--awq_block_size": str(AWQ_GROUP)},
    }
    samples = {"--calib_dataset": calibration, "--calib_size": str(CALIBRATION_SAMPLES)}
    return {**common, **formats[settings.quantization], **samples}


def engine_arguments(settings: EngineSettings) -> dict[str, str]:
    """Flags of ``trtllm-build``, without paths. It takes the tensor parallelism from the checkpoint."""
    arguments = {
        "--max_batch_size": str(settings.max_batch_size),
        "--max_input_len": str(settings.max_input_len),
        "--max_seq_len": str(settings.max_seq_len),
        "--max_num_tokens": str(settings.max_num_tokens),
        "--max_beam_width": "1",
        "--kv_cache_type": "paged",
        "--tokens_per_block": str(TOKENS_PER_BLOCK),
        "--remove_input_padding": "enable",
        "--gpt_attention_plugin": "auto",
        "--context_fmha": "enable",
        "--use_paged_context_fmha": "enable",
        "--workers": str(settings.tp),
    }
    if settings.quantization == "fp16":
        arguments["--gemm_plugin"] = "auto"
    if settings.quantization == "fp8":
        arguments["--use_fp8_context_fmha"] = "enable"
    return arguments


def plan_steps(
    model: Path,
    tokenizer: tuple[str, ...],
    settings: EngineSettings,
    tools: Tools,
    output: Path,
    *,
    identity: str,
    versions: Mapping[str, str],
    gpu: str,
    calibration: str = CALIBRATION_DATA,
    calibration_identity: str = "",
) -> tuple[Step, Step]:
    """The two steps from a checkpoint to an engine.

    Args:
        model: directory of the Hugging Face checkpoint.
        tokenizer: names of the tokenizer's files in it.
        settings: of the engine.
        tools: what to run.
        output: directory of all results.
        identity: digest of the checkpoint's content.
        versions: of the packages that the result depends on. A checkpoint depends on TensorRT-LLM's; an engine runs
            with nothing but the TensorRT it was built by.
        gpu: name of the GPU. An engine runs on no other kind; a checkpoint is for all of them.
        calibration: data set that quantization reads, a name or a directory.
        calibration_identity: digest of that directory's content.
    """
    ranks = range(settings.tp)
    script = tools.convert if settings.quantization == "fp16" else tools.quantize
    conversion = checkpoint_arguments(settings, calibration)
    told = {**conversion, "--calib_dataset": calibration_identity or calibration}
    key = _key("checkpoint", identity, told, dict(versions))
    checkpoint = Step(
        "checkpoint",
        key,
        output / f"checkpoint-{key}",
        (),
        ("config.json", *(f"rank{rank}.safetensors" for rank in ranks)),
    )
    paths = {"--model_dir": str(model), "--output_dir": str(checkpoint.partial)}
    checkpoint = dataclasses.replace(checkpoint, command=(tools.python, str(script), *_flat({**paths, **conversion})))

    building = engine_arguments(settings)
    key = _key("engine", checkpoint.key, building, dict(versions), gpu)
    engine = Step(
        "engine",
        key,
        output / f"engine-{key}",
        (),
        ("config.json", *(f"rank{rank}.engine" for rank in ranks)),
        tuple(model / name for name in tokenizer),
    )
    paths = {"--checkpoint_dir": str(checkpoint.directory), "--output_dir": str(engine.partial)}
    return checkpoint, dataclasses.replace(engine, command=(tools.build, *_flat({**paths, **building})))


def _flat(arguments: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(part for pair in arguments.items() for part in pair)


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
