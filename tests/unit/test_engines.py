"""``liber build engine``: commands, sizes, what is skipped and resumed, what is refused."""

from __future__ import annotations

import dataclasses
import fcntl
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine_harness import (
    A100,
    BUILD_FLAGS,
    CONVERT_FLAGS,
    H200,
    PLUGIN_FLAGS,
    QUANTIZE_FLAGS,
    SWITCHES,
    Machine,
    MadeOnce,
    change_config,
    make_machine,
    make_tiny_llama,
    use,
)
from hypothesis import given
from hypothesis import strategies as st

from builders.llm.building import build_engine
from builders.llm.checkpoint import (
    LLAMA2_7B,
    LLAMA2_13B,
    LlamaShape,
    LlmCheckpoint,
    find_checkpoint,
    open_llm_checkpoint,
)
from builders.llm.engines import EngineSettings, Quantization, Tools, checkpoint_arguments, engine_arguments, plan_steps
from builders.llm.plan import EnginePlan, describe, plan_engine
from builders.llm.sizes import GIB, sizes_of
from liber_runtime.exceptions import ConfigurationError, InvalidInputError, LiberError

QUANTIZATIONS: tuple[Quantization, ...] = ("fp16", "fp8", "int4-awq")
COMMAND = (sys.executable, "-m", "liber_runtime.cli", "build", "engine")
PATIENCE_SECONDS = 120.0


@pytest.fixture(scope="module")
def llama(made_once: MadeOnce) -> Path:
    return made_once("engine-llama", make_tiny_llama)


@pytest.fixture(scope="module")
def sharded_llama(made_once: MadeOnce) -> Path:
    return made_once("sharded-llama", lambda directory: make_tiny_llama(directory, shards=True))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return use(make_machine(tmp_path / "machine"), monkeypatch)


def build(model: Path, machine: Machine, output: Path, settings: EngineSettings | None = None) -> EnginePlan:
    plan = plan_engine(str(model), settings or EngineSettings(), output, examples=machine.examples)
    build_engine(plan)
    return plan


# The commands


@given(
    quantization=st.sampled_from(QUANTIZATIONS),
    tp=st.sampled_from((1, 2)),
    batch=st.integers(1, 512),
    prompt=st.integers(1, 4000),
    answer=st.integers(1, 1000),
    tokens=st.integers(512, 16384),
)
def test_commands_have_known_flags_and_limits_that_fit(
    quantization: Quantization, tp: int, batch: int, prompt: int, answer: int, tokens: int
) -> None:
    settings = EngineSettings(quantization, tp, batch, prompt, prompt + answer, tokens)
    tools = Tools("python3", Path("convert_checkpoint.py"), Path("quantize.py"), "trtllm-build")
    checkpoint, engine = plan_steps(
        Path("model"), (), settings, tools, Path("out"), identity="digest", versions={}, gpu="NVIDIA H200"
    )
    assert checkpoint.command[1] == ("convert_checkpoint.py" if quantization == "fp16" else "quantize.py")
    converted = dict(zip(checkpoint.command[2::2], checkpoint.command[3::2], strict=True))
    assert set(converted) <= (CONVERT_FLAGS if quantization == "fp16" else QUANTIZE_FLAGS)
    assert converted["--tp_size"] == str(tp)
    built = dict(zip(engine.command[1::2], engine.command[2::2], strict=True))
    assert set(built) <= BUILD_FLAGS | PLUGIN_FLAGS | SWITCHES
    assert {value for name, value in built.items() if name in SWITCHES} <= {"enable", "disable"}
    assert int(built["--max_input_len"]) + answer == int(built["--max_seq_len"])
    assert built["--workers"] == str(tp)
    assert built["--checkpoint_dir"] == str(checkpoint.directory)
    # What block reuse and chunked context need, whatever else is chosen.
    assert (built["--kv_cache_type"], built["--tokens_per_block"]) == ("paged", "32")
    assert {built[name] for name in ("--use_paged_context_fmha", "--context_fmha", "--remove_input_padding")} == {
        "enable"
    }
    for command, step in ((converted, checkpoint), (built, engine)):
        assert command["--output_dir"] == str(step.partial)
    assert engine.files == ("config.json", *(f"rank{rank}.engine" for rank in range(tp)))


def test_each_quantization_has_its_flags() -> None:
    assert checkpoint_arguments(EngineSettings("fp16")) == {"--dtype": "float16", "--tp_size": "1"}
    fp8 = checkpoint_arguments(EngineSettings("fp8"))
    assert (fp8["--qformat"], fp8["--kv_cache_dtype"], fp8["--calib_size"]) == ("fp8", "fp8", "512")
    awq = checkpoint_arguments(EngineSettings("int4-awq"))
    assert (awq["--qformat"], awq["--awq_block_size"]) == ("int4_awq", "128")
    assert "--kv_cache_dtype" not in awq
    assert engine_arguments(EngineSettings("fp8"))["--use_fp8_context_fmha"] == "enable"
    assert engine_arguments(EngineSettings("fp16"))["--gemm_plugin"] == "auto"


def keys_of(
    settings: EngineSettings, model: str = "digest", version: str = "1.2.1", gpu: str = "NVIDIA H200"
) -> tuple[str, str]:
    tools = Tools("python3", Path("convert_checkpoint.py"), Path("quantize.py"), "trtllm-build")
    steps = plan_steps(
        Path("m"), (), settings, tools, Path("out"), identity=model, versions={"tensorrt_llm": version}, gpu=gpu
    )
    return steps[0].key, steps[1].key


def test_keys_follow_from_what_the_results_follow_from() -> None:
    checkpoint, engine = keys_of(EngineSettings())
    for other in (EngineSettings(max_batch_size=8), EngineSettings(max_num_tokens=4096)):
        assert keys_of(other)[0] == checkpoint
        assert keys_of(other)[1] != engine
    assert keys_of(EngineSettings(), gpu="NVIDIA L40S")[0] == checkpoint
    assert keys_of(EngineSettings(), gpu="NVIDIA L40S")[1] != engine
    changed = [keys_of(EngineSettings(tp=2)), keys_of(EngineSettings("fp8"))]
    changed += [keys_of(EngineSettings(), model="other"), keys_of(EngineSettings(), version="1.1.0")]
    assert len({checkpoint, *(key for key, _ in changed)}) == 5
    assert len({engine, *(key for _, key in changed)}) == 5


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"max_batch_size": 0}, "--max-batch-size 0 is less than 1"),
        ({"max_input_len": 4096}, "--max-input-len 4096 leaves no room for an answer"),
        ({"max_num_tokens": 100}, "--max-num-tokens 100 is less than --max-batch-size 192"),
    ],
)
def test_contradicting_limits_are_refused(changes: dict[str, int], reason: str) -> None:
    with pytest.raises(InvalidInputError, match=reason):
        dataclasses.replace(EngineSettings(), **changes)  # type: ignore[arg-type]


# Sizes


@pytest.mark.parametrize(("shape", "parameters"), [(LLAMA2_7B, 6_738_415_616), (LLAMA2_13B, 13_015_864_320)])
def test_llama2_has_the_parameters_it_is_published_with(shape: LlamaShape, parameters: int) -> None:
    assert shape.parameters == parameters
    assert sizes_of(shape, EngineSettings()).weights == 2 * parameters


def test_quantization_and_parallelism_divide_what_they_should() -> None:
    sizes = {(q, tp): sizes_of(LLAMA2_13B, EngineSettings(q, tp)) for q in QUANTIZATIONS for tp in (1, 2)}
    # 40 layers x 40 heads x 128, keys and values.
    assert sizes["fp16", 1].token == sizes["int4-awq", 1].token == 819_200
    assert sizes["fp8", 1].token == 409_600
    assert sizes["fp16", 2].token == 409_600
    for quantization in QUANTIZATIONS:
        one, two = sizes[quantization, 1], sizes[quantization, 2]
        # All but the embedding and the norms is split.
        assert 2 * two.weights - one.weights == 2 * (32000 * 5120 + 81 * 5120)
        assert one.least < one.full
        assert one.cached_tokens(one.least) >= 4096 > one.cached_tokens(one.weights + one.workspace + 100_000)
    assert sizes["int4-awq", 1].weights < sizes["fp8", 1].weights < sizes["fp16", 1].weights
    assert sizes["fp16", 1].calibration == 0
    assert sizes["fp8", 1].calibration > 2 * LLAMA2_13B.parameters
    assert sizes["fp8", 1].cached_tokens(139 * GIB) > 280_000


# A dry run


def liber(*arguments: object, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LIBER_", "HF_", "CUDA_"))}
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        env=kept | {"COLUMNS": "200"} | (environment or {}),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )


def test_a_dry_run_needs_neither_gpu_nor_tensorrt_llm(llama: Path, tmp_path: Path) -> None:
    ran = liber("--model", llama, "--quantization", "fp8", "--tp", 2, "--output", tmp_path / "out", "--dry-run")
    assert ran.returncode == 0, ran.stderr
    assert f"python3 /app/examples/quantization/quantize.py --model_dir {llama} " in ran.stdout
    assert "trtllm-build --checkpoint_dir" in ran.stdout
    for name in ("rank1.safetensors", "rank1.engine", "tokenizer/tokenizer.json", "manifest.json"):
        assert f"/{name}\n" in ran.stdout
    assert "memory of each of 2 GPUs: at least" in ran.stdout
    assert "memory of all GPUs while quantizing: 4.0 GiB" in ran.stdout
    assert "disk: " in ran.stdout
    assert "TensorRT-LLM's version" in ran.stderr
    assert not (tmp_path / "out").exists()


def test_a_dry_run_of_a_published_model_downloads_nothing(tmp_path: Path) -> None:
    ran = liber(
        *("--model", "meta-llama/Llama-2-13b-hf", "--quantization", "fp8", "--repository", tmp_path, "--dry-run"),
        environment={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )
    assert ran.returncode == 0, ran.stderr
    assert "13,015,864,320 parameters" in ran.stdout
    assert "models--meta-llama--Llama-2-13b-hf/snapshots" in ran.stdout
    assert f"{tmp_path}/ensemble/config.pbtxt" in ran.stdout
    assert "the weights" in ran.stderr


def test_a_dry_run_where_no_engine_can_be_built_says_so(llama: Path, tmp_path: Path) -> None:
    machine = make_machine(tmp_path / "machine", version="1.3.0")
    ran = liber("--model", llama, "--dry-run", environment=machine.environment())
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: TensorRT-LLM 1.3.0 builds no engines")
    assert "--layout llmapi" in ran.stderr


# A build


def test_a_build_leaves_an_engine_with_its_manifest(sharded_llama: Path, machine: Machine, tmp_path: Path) -> None:
    plan = build(sharded_llama, machine, tmp_path / "out", EngineSettings("fp8", 2))
    assert machine.calls == ["quantize", "build"]
    files = sorted(str(path.relative_to(plan.engine)) for path in plan.engine.rglob("*") if path.is_file())
    tokenizer = [f"tokenizer/{name}" for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json")]
    assert files == ["config.json", "manifest.json", "rank0.engine", "rank1.engine", *tokenizer]
    flags = json.loads((plan.engine / "config.json").read_text())
    assert flags["--checkpoint_dir"] == str(plan.steps[0].directory)
    manifest = json.loads((plan.engine / "manifest.json").read_text())
    assert manifest["settings"] == dataclasses.asdict(EngineSettings("fp8", 2))
    assert manifest["gpu"] == "NVIDIA H200"
    assert manifest["versions"]["tensorrt_llm"] == "1.2.1"
    assert manifest["versions"]["tensorrt"] == "10.14.1.48"
    assert manifest["command"] == list(plan.steps[1].command)
    assert [step["command"] for step in manifest["before"]] == [list(plan.steps[0].command)]
    assert manifest["files"]["rank1.engine"]["bytes"] == 100
    assert set(manifest["model"]["files"]) == {
        "config.json",
        *(path.name for path in sharded_llama.glob("*.safetensors")),
        *(Path(name).name for name in tokenizer),
    }
    assert plan.steps[1].log.read_text() == "begins build\n"
    assert not list((tmp_path / "out").glob("*.partial"))


def test_what_is_there_is_not_built_again(llama: Path, machine: Machine, tmp_path: Path) -> None:
    first = build(llama, machine, tmp_path / "out")
    assert build(llama, machine, tmp_path / "out").engine == first.engine
    assert machine.calls == ["convert", "build"]
    build(llama, machine, tmp_path / "out", EngineSettings(max_batch_size=8))
    assert machine.calls == ["convert", "build", "build"]
    # A server holds the GPU's memory: to find that nothing is due takes none.
    machine.set_gpus(H200.replace("143000", "500"))
    build(llama, machine, tmp_path / "out")
    assert machine.calls == ["convert", "build", "build"]
    machine.set_gpus(A100)
    build(llama, machine, tmp_path / "out")
    assert machine.calls == ["convert", "build", "build", "build"]
    # Weights of the same size and shape, with another value.
    tuned = shutil.copytree(llama, tmp_path / "tuned")
    with (tuned / "model.safetensors").open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\x12\x34")
    build(tuned, machine, tmp_path / "out")
    assert machine.calls[4:] == ["convert", "build"]


def test_an_engine_does_without_the_checkpoint_it_was_made_of(llama: Path, machine: Machine, tmp_path: Path) -> None:
    plan = build(llama, machine, tmp_path / "out")
    assert [line for line in describe(plan) if line.endswith("done:")] == ["checkpoint, done:", "engine, done:"]
    shutil.rmtree(plan.steps[0].directory)
    build(llama, machine, tmp_path / "out")
    assert machine.calls == ["convert", "build"]


def test_a_damaged_engine_is_built_again(llama: Path, machine: Machine, tmp_path: Path) -> None:
    plan = build(llama, machine, tmp_path / "out")
    (plan.engine / "rank0.engine").write_bytes(b"half")
    build(llama, machine, tmp_path / "out")
    assert machine.calls == ["convert", "build", "build"]
    assert (plan.engine / "rank0.engine").stat().st_size == 100


def test_a_failing_command_is_told_and_what_was_done_before_is_kept(
    llama: Path, machine: Machine, tmp_path: Path
) -> None:
    machine.make("fail-build")
    plan = plan_engine(str(llama), EngineSettings(), tmp_path / "out", examples=machine.examples)
    with pytest.raises(
        ConfigurationError,
        match=r"trtllm-build ended with status 3; it said: .*the GPU ran away \| with the spoon; all of it",
    ):
        build_engine(plan)
    assert plan.steps[1].log.read_text().endswith("the GPU ran away\nwith the spoon\n")
    assert not plan.engine.exists()
    machine.mend("fail-build")
    build_engine(plan)
    assert machine.calls == ["convert", "build", "build"]


def test_a_killed_command_is_told_as_such(llama: Path, machine: Machine, tmp_path: Path) -> None:
    machine.make("die-convert")
    with pytest.raises(ConfigurationError, match="was killed by signal 9, perhaps for want of memory; it said: begins"):
        build(llama, machine, tmp_path / "out")


def test_a_command_that_makes_nothing_is_an_error(llama: Path, machine: Machine, tmp_path: Path) -> None:
    (machine.root / "bin/trtllm-build").write_text("#!/bin/sh\nexit 0\n")
    with pytest.raises(ConfigurationError, match=r"trtllm-build ended without an error and left no config\.json"):
        build(llama, machine, tmp_path / "out")


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_build_resumes(llama: Path, machine: Machine, tmp_path: Path, how: signal.Signals) -> None:
    machine.make("hang-build")
    process = subprocess.Popen(
        [*COMMAND, "--model", str(llama), "--output", str(tmp_path / "out")],
        env=os.environ | machine.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    hanging = machine.root / "hanging"
    wait_for(lambda: hanging.exists() and hanging.read_text() != "", process)
    child = int(hanging.read_text())
    process.send_signal(how)
    process.communicate(timeout=PATIENCE_SECONDS)
    machine.mend("hang-build")
    if how == signal.SIGKILL:
        # Nobody could end the command: it still holds the directory.
        assert alive(child)
        with pytest.raises(ConfigurationError, match="another build is at work in"):
            build(llama, machine, tmp_path / "out")
        os.kill(child, signal.SIGKILL)
    while alive(child):
        time.sleep(0.01)
    assert [path.suffix for path in (tmp_path / "out").glob("engine-*") if path.is_dir()] == [".partial"]
    plan = build(llama, machine, tmp_path / "out")
    assert machine.calls == ["convert", "build", "build"]
    assert (plan.engine / "rank0.engine").is_file()
    assert not plan.steps[1].partial.exists()


def test_one_build_works_in_a_directory(llama: Path, machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigurationError, match="another build is at work in"):
            build(llama, machine, tmp_path / "out")
    build(llama, machine, tmp_path / "out")


def test_calibration_data_of_ones_own_is_part_of_the_key(llama: Path, machine: Machine, tmp_path: Path) -> None:
    data = tmp_path / "prompts"
    data.mkdir()

    def plan(text: str) -> EnginePlan:
        (data / "train.jsonl").write_text(json.dumps({"text": text}))
        return plan_engine(
            str(llama), EngineSettings("fp8"), tmp_path / "out", calibration=data, examples=machine.examples
        )

    one, other = plan("likes films"), plan("likes books")
    assert one.steps[0].command[one.steps[0].command.index("--calib_dataset") + 1] == str(data)
    assert one.steps[0].key != other.steps[0].key
    with pytest.raises(InvalidInputError, match=r"--calibration .*: give a directory, and a --quantization"):
        plan_engine(str(llama), EngineSettings(), tmp_path / "out", calibration=data, examples=machine.examples)


# What is refused before anything is loaded


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, "TensorRT-LLM is not installed for .*--dry-run"),
        ("1.3.0", "TensorRT-LLM 1.3.0 builds no engines: the engine flow ends with 1.2; pass --layout llmapi"),
        ("1.3.0rc15", "TensorRT-LLM 1.3.0rc15 builds no engines"),
        ("0.21.0", "TensorRT-LLM 0.21.0 is older than the flags used here"),
    ],
)
def test_versions_without_this_engine_flow_are_refused(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None, reason: str
) -> None:
    machine = use(make_machine(tmp_path / "machine", version), monkeypatch)
    with pytest.raises(ConfigurationError, match=reason):
        build(llama, machine, tmp_path / "out")
    assert machine.calls == []


@pytest.mark.parametrize(
    ("gpus", "settings", "reason"),
    [
        ((), EngineSettings(), "0 GPUs are seen and --tp 1 needs 1"),
        ((H200,), EngineSettings(tp=2), "1 GPUs are seen and --tp 2 needs 2"),
        ((H200, A100), EngineSettings(tp=2), "the GPUs are NVIDIA H200 and NVIDIA A100-SXM4-80GB; --tp needs equal"),
        ((A100,), EngineSettings("fp8"), "NVIDIA A100-SXM4-80GB has compute capability 8.0, and fp8 needs 8.9"),
        (
            ("0, GPU-3, Tesla T4, 15360, 500, 7.5",),
            EngineSettings(),
            r"1\.\d GiB of GPU memory are needed on each of 1: .* Tesla T4 is in use, and free are 0\.5 GiB: use",
        ),
        (
            ("0, GPU-5, Quadro P400, 1024, 1000, 6.1",),
            EngineSettings(),
            r"1\.\d GiB of GPU memory are needed on each of 1: .* Quadro P400 has 1\.0 GiB: use",
        ),
        (
            ("0, GPU-4, NVIDIA L4, 23034, 3000, 8.9",),
            EngineSettings("fp8"),
            r"quantizing loads the model in fp16, which takes 4\.0 GiB of GPU memory, and 2\.9 GiB are free",
        ),
    ],
)
def test_gpus_that_do_not_do_are_told_before_anything_is_loaded(
    llama: Path, machine: Machine, tmp_path: Path, gpus: tuple[str, ...], settings: EngineSettings, reason: str
) -> None:
    machine.set_gpus(*gpus)
    with pytest.raises(ConfigurationError, match=reason):
        build(llama, machine, tmp_path / "out", settings)
    assert machine.calls == []


def test_only_visible_gpus_count(
    llama: Path, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.set_gpus(A100, H200.replace("0,", "1,", 1))
    for visible in ("1", "GPU-1111"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert plan_engine(str(llama), EngineSettings("fp8"), tmp_path, examples=machine.examples).gpu == "NVIDIA H200"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigurationError, match="0 GPUs are seen"):
        plan_engine(str(llama), EngineSettings(), tmp_path, examples=machine.examples)


def test_a_failing_driver_is_told(llama: Path, machine: Machine, tmp_path: Path) -> None:
    (machine.root / "bin/nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    with pytest.raises(ConfigurationError, match=r"nvidia-smi fails \(NVIDIA-SMI has failed\); repair the driver"):
        build(llama, machine, tmp_path / "out")


def test_a_full_disk_is_told(llama: Path, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builders.llm.plan.free_disk", lambda directory: 1000)
    with pytest.raises(ConfigurationError, match=r"GiB of disk are needed in .* and 0\.0 GiB are free"):
        build(llama, machine, tmp_path / "out")


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("examples/models/core/llama/convert_checkpoint.py", "is not there; name the directory .* by --examples"),
        ("bin/trtllm-build", "trtllm-build is not on the PATH"),
    ],
)
def test_missing_programs_are_told(llama: Path, machine: Machine, tmp_path: Path, missing: str, reason: str) -> None:
    (machine.root / missing).unlink()
    with pytest.raises(ConfigurationError, match=reason):
        build(llama, machine, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "changes", "reason"),
    [
        (EngineSettings(max_seq_len=8192), {}, "--max-seq-len 8192 is more than the 4096 positions of the model"),
        (EngineSettings(tp=2), {"num_key_value_heads": 1}, "--tp 2 does not divide the model's 1 key-value heads"),
        (EngineSettings("int4-awq", 2), {"intermediate_size": 128}, "int4-awq groups 128 weights, .* has 64 columns"),
    ],
)
def test_settings_that_the_model_cannot_have_are_refused(
    llama: Path, tmp_path: Path, settings: EngineSettings, changes: dict[str, int], reason: str
) -> None:
    model = change_config(shutil.copytree(llama, tmp_path / "model"), **changes)
    with pytest.raises(InvalidInputError, match=reason):
        plan_engine(str(model), settings, tmp_path / "out", dry_run=True)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            lambda d: change_config(d, architectures=["ChatGLMModel"]),
            "is a checkpoint of ChatGLMModel, and engines are",
        ),
        (lambda d: change_config(d, architectures=None), "is a checkpoint of nothing, and engines are built of Llama"),
        (
            lambda d: change_config(d, auto_map={"AutoModel": "evil.Model"}),
            r"brings Python code of its own \(auto_map\)",
        ),
        (lambda d: change_config(d, hidden_size="wide"), r"config\.json: hidden_size is 'wide', not a size"),
        (lambda d: (d / "config.json").write_text("{"), r"config\.json cannot be read"),
        (lambda d: (d / "config.json").write_text("[]"), r"config\.json is not a JSON object"),
        (lambda d: (d / "config.json").unlink(), r"has no config\.json; give the directory of a checkpoint in Hugging"),
        (lambda d: (d / "model-00002-of-00003.safetensors").unlink(), "lacks 1 of the files that .* first model-00002"),
        (lambda d: cut(d / "model-00002-of-00003.safetensors"), r"has \d+ of \d+ bytes; download it again"),
        (lambda d: (d / "model-00001-of-00003.safetensors").write_bytes(b""), "is empty; download it again"),
        (lambda d: (d / "model-00001-of-00003.safetensors").write_bytes(b"no tensors"), "is no safetensors file"),
        (
            lambda d: (d / "model-00001-of-00003.safetensors").write_text(
                "version https://git-lfs.github.com/spec/v1\n"
            ),
            "is a pointer of Git LFS, not weights; run: git lfs pull",
        ),
        (lambda d: (d / "model.safetensors.index.json").unlink(), "has no weights"),
        (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "names no weights; download it again"),
        (lambda d: (d / "tokenizer.json").unlink(), "has no tokenizer"),
    ],
)
def test_unusable_checkpoints_are_refused_by_name(
    sharded_llama: Path, tmp_path: Path, spoil: Callable[[Path], object], reason: str
) -> None:
    model = shutil.copytree(sharded_llama, tmp_path / "model")
    assert len(open_llm_checkpoint(model).weights) == 3
    spoil(model)
    with pytest.raises(LiberError, match=reason) as error:
        plan_engine(str(model), EngineSettings(), tmp_path / "out", dry_run=True)
    assert str(model) in str(error.value)


def test_a_quantized_checkpoint_makes_no_engine(llama: Path, tmp_path: Path) -> None:
    model = change_config(shutil.copytree(llama, tmp_path / "model"), quantization_config={"quant_method": "gptq"})
    with pytest.raises(InvalidInputError, match=r"is quantized already \(gptq\); give the original model"):
        plan_engine(str(model), EngineSettings(), tmp_path / "out", dry_run=True)


# The Hugging Face hub


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub with one public model, whose configuration alone it serves, and one gated."""

    config = b""

    def do_HEAD(self) -> None:
        if self.path == "/someone/tiny/resolve/main/config.json":
            self.send_response(200)
            self.send_header("ETag", '"0123456789abcdef0123456789abcdef01234567"')
            self.send_header("X-Repo-Commit", "f" * 40)
            self.send_header("Content-Length", str(len(self.config)))
        else:
            code, reason = (403, "GatedRepo") if self.path.startswith("/someone/gated") else (404, "RepoNotFound")
            code, reason = (404, "EntryNotFound") if self.path.startswith("/someone/other") else (code, reason)
            self.send_response(code)
            self.send_header("X-Error-Code", reason)
            self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        if self.path == "/someone/tiny/resolve/main/config.json":
            self.wfile.write(self.config)

    def log_message(self, *arguments: object) -> None:
        pass


ASK = """
import sys
from builders.llm.checkpoint import find_checkpoint
from liber_runtime.exceptions import ConfigurationError
for model in sys.argv[1:]:
    for dry_run in (False, True):
        try:
            print(find_checkpoint(model, dry_run=dry_run))
        except ConfigurationError as error:
            print(error)
"""


@pytest.fixture
def hub(llama: Path) -> Iterator[str]:
    handler = type("Handler", (Hub,), {"config": (llama / "config.json").read_bytes()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_model_of_the_hub_is_planned_from_its_configuration_or_refused_in_one_line(
    hub: str, llama: Path, tmp_path: Path
) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", ASK, "someone/gated", "someone/nothing", "someone/other", "someone/tiny"],
        env=os.environ | {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=True,
    )
    *lines, _, planned = ran.stdout.splitlines()
    gated = "someone/gated is a gated model: accept the licence on its page, https://huggingface.co/someone/gated, and"
    assert [line[: len(gated)] for line in lines[:2]] == [gated] * 2
    nothing = "the Hugging Face hub has no model someone/nothing, or none that HF_TOKEN gives access to; check"
    assert [line[: len(nothing)] for line in lines[2:4]] == [nothing] * 2
    other = "someone/other has no config.json; name a repository in Hugging Face's format"
    assert lines[4:] == [other] * 2
    directory = tmp_path / "hub" / "models--someone--tiny" / "snapshots" / ("f" * 40)
    assert planned == repr(LlmCheckpoint(directory, open_llm_checkpoint(llama).shape))


def test_without_a_network_a_model_of_the_hub_is_one_clear_line(tmp_path: Path) -> None:
    ran = liber("--model", "someone/tiny", "--dry-run", environment={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)})
    assert ran.returncode == 1
    (line,) = ran.stderr.splitlines()
    assert line.startswith("error: someone/tiny is not in the local cache and the Hugging Face hub cannot be reached")


@pytest.mark.parametrize("model", ["no/such/directory", "./model", "llama", "../llama", ""])
def test_what_is_neither_a_directory_nor_a_name_is_refused(model: str) -> None:
    with pytest.raises(InvalidInputError, match=r"--model .*: there is no such directory, and a name on"):
        find_checkpoint(model)


def test_a_cached_file_is_known_by_the_name_it_lies_under(llama: Path, tmp_path: Path) -> None:
    """The hub's cache names large files by their sha256 and links to them."""
    model = shutil.copytree(llama, tmp_path / "snapshots" / "f")
    digest = open_llm_checkpoint(llama).digests()["model.safetensors"]["sha256"]
    blob = tmp_path / "blobs" / str(digest)
    blob.parent.mkdir()
    (model / "model.safetensors").rename(blob)
    (model / "model.safetensors").symlink_to(blob)
    assert open_llm_checkpoint(model).digests() == open_llm_checkpoint(llama).digests()
