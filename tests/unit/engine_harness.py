"""A tiny Llama checkpoint, and a machine to build its engine on: small programs in place of NVIDIA's.

They take the flags that NVIDIA's take and no others, and write the files that those write.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

MadeOnce = Callable[[str, Callable[[Path], object]], Path]
"""The fixture made_once."""

CONVERT_FLAGS = {
    "--model_dir", "--output_dir", "--dtype", "--tp_size", "--pp_size", "--cp_size", "--workers", "--use_weight_only",
    "--weight_only_precision", "--group_size", "--per_group", "--use_fp8", "--use_fp8_rowwise", "--fp8_kv_cache",
    "--int8_kv_cache", "--quant_ckpt_path", "--load_by_shard", "--load_model_on_cpu", "--use_parallel_embedding",
    "--embedding_sharding_dim", "--calib_dataset", "--calib_size", "--calib_max_seq_length", "--log_level",
}  # fmt: skip
QUANTIZE_FLAGS = {
    "--model_dir", "--output_dir", "--dtype", "--qformat", "--kv_cache_dtype", "--calib_dataset", "--calib_size",
    "--calib_max_seq_length", "--batch_size", "--awq_block_size", "--tp_size", "--pp_size", "--export_format",
    "--device", "--device_map", "--seed",
}  # fmt: skip
BUILD_FLAGS = {
    "--checkpoint_dir", "--model_config", "--build_config", "--output_dir", "--max_batch_size", "--max_input_len",
    "--max_seq_len", "--max_beam_width", "--max_num_tokens", "--opt_num_tokens", "--kv_cache_type", "--workers",
    "--input_timing_cache", "--output_timing_cache", "--profiling_verbosity", "--log_level", "--logits_dtype",
}  # fmt: skip
PLUGIN_FLAGS = {"--gpt_attention_plugin", "--gemm_plugin", "--nccl_plugin", "--tokens_per_block"}
SWITCHES = {
    "--context_fmha", "--remove_input_padding", "--use_paged_context_fmha", "--use_fp8_context_fmha",
    "--reduce_fusion", "--use_fused_mlp",
}  # fmt: skip
"""Flags of ``trtllm-build`` that are enable or disable."""

H200 = "0, GPU-11111111, NVIDIA H200, 143771, 143000, 9.0"
A100 = "0, GPU-22222222, NVIDIA A100-SXM4-80GB, 81920, 81000, 8.0"

PROGRAM = """\
import json, os, pathlib, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
if set(flags) - set({flags!r}):
    sys.exit(f"unknown flags {{sorted(set(flags) - set({flags!r}))}}")
state = pathlib.Path({state!r})
with (state / "calls").open("a") as calls:
    calls.write("{name}\\n")
print("begins {name}", flush=True)
if (state / "fail-{name}").exists():
    print("the GPU ran away\\nwith the spoon", file=sys.stderr)
    sys.exit(3)
if (state / "die-{name}").exists():
    os.kill(os.getpid(), 9)
output = pathlib.Path(flags["--output_dir"])
(output / "config.json").write_text(json.dumps(flags))
if (state / "hang-{name}").exists():
    (state / "hanging").write_text(str(os.getpid()))
    import time
    time.sleep(600)
for rank in range(int({ranks})):
    (output / f"rank{{rank}}.{suffix}").write_bytes(bytes(range(100)))
"""


@dataclasses.dataclass(frozen=True)
class Machine:
    """A directory of programs, and what they have been called for."""

    root: Path

    @property
    def examples(self) -> Path:
        return self.root / "examples"

    @property
    def calls(self) -> list[str]:
        path = self.root / "calls"
        return path.read_text().split() if path.exists() else []

    def make(self, what: str) -> None:
        """Has a program ``fail-NAME``, ``die-NAME`` or ``hang-NAME``."""
        (self.root / what).touch()

    def mend(self, what: str) -> None:
        (self.root / what).unlink()

    def set_gpus(self, *lines: str) -> None:
        (self.root / "gpus").write_text("".join(f"{line}\n" for line in lines))

    def environment(self) -> dict[str, str]:
        return {
            "PATH": f"{self.root / 'bin'}:/usr/bin:/bin",
            "PYTHONPATH": f"{self.root / 'packages'}:{Path(__file__).parents[2]}",
            "LIBER_TENSORRT_LLM_EXAMPLES": str(self.examples),
        }


def make_machine(root: Path, version: str | None = "1.2.1", gpus: tuple[str, ...] = (H200, H200)) -> Machine:
    """A machine with TensorRT-LLM of a version, or without it."""
    machine = Machine(root)
    for directory in ("bin", "packages", "examples/models/core/llama", "examples/quantization"):
        (root / directory).mkdir(parents=True)
    machine.set_gpus(*gpus)
    _program(root / "examples/models/core/llama/convert_checkpoint.py", root, "convert", CONVERT_FLAGS)
    _program(root / "examples/quantization/quantize.py", root, "quantize", QUANTIZE_FLAGS)
    _program(root / "bin/trtllm-build", root, "build", BUILD_FLAGS | PLUGIN_FLAGS | SWITCHES)
    smi = root / "bin/nvidia-smi"
    smi.write_text(f"#!/bin/sh\ncat '{root / 'gpus'}'\n")
    smi.chmod(0o755)
    if version is not None:
        for name, number in (("tensorrt_llm", version), ("tensorrt", "10.14.1.48")):
            information = root / "packages" / f"{name}-{number}.dist-info"
            information.mkdir()
            (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
    return machine


def _program(path: Path, root: Path, name: str, flags: set[str]) -> None:
    builds = name == "build"
    path.write_text(
        f"#!{sys.executable}\n"
        + PROGRAM.format(
            flags=sorted(flags),
            state=str(root),
            name=name,
            ranks='flags["--workers"]' if builds else 'flags["--tp_size"]',
            suffix="engine" if builds else "safetensors",
        )
    )
    path.chmod(0o755)


def use(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Has this process find the machine's programs and packages."""
    for name, value in machine.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.syspath_prepend(str(machine.root / "packages"))
    return machine


def make_tiny_llama(directory: Path, shards: bool = False) -> Path:
    """A random Llama of two layers with a tokenizer of few words."""
    import tokenizers
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    llama = transformers.LlamaForCausalLM(config).half()
    llama.save_pretrained(directory, max_shard_size="1MB" if shards else "1GB")
    words = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", "user", "likes", "films"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)
    return directory


def change_config(directory: Path, **changes: object) -> Path:
    """Changes fields of a ``config.json``; None removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return directory
