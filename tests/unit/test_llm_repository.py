"""The LLM's model repositories: both layouts, as Triton reads them."""

from __future__ import annotations

import ast
import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_harness import Machine, MadeOnce, change_config, make_machine, make_tiny_llama, use
from google.protobuf import text_format
from llm_image import make_image
from tritonclient.grpc import model_config_pb2
from typer.testing import CliRunner

from builders.llm.checkpoint import open_llm_checkpoint
from builders.llm.engines import EngineSettings
from builders.llm.repository import Layout, LlmService, check_llmapi, check_repository, model_yaml, write_repository
from liber_runtime.cli import application
from liber_runtime.exceptions import ConfigurationError, InvalidInputError

SETTINGS = EngineSettings("fp8", 2, max_batch_size=64)

# The tensors that the writer and TensorRT-LLM's ensemble have agreed on.
ENSEMBLE_INPUTS = {
    "text_input": "STRING", "max_tokens": "INT32", "bad_words": "STRING", "stop_words": "STRING", "end_id": "INT32",
    "pad_id": "INT32", "top_k": "INT32", "min_tokens": "INT32", "beam_width": "INT32", "num_return_sequences": "INT32",
    "top_p": "FP32", "temperature": "FP32", "length_penalty": "FP32", "repetition_penalty": "FP32",
    "presence_penalty": "FP32", "frequency_penalty": "FP32", "seed": "UINT64", "stream": "BOOL",
    "exclude_input_in_output": "BOOL", "return_log_probs": "BOOL", "return_perf_metrics": "BOOL",
    "return_num_input_tokens": "BOOL", "return_num_output_tokens": "BOOL",
}  # fmt: skip
ENSEMBLE_OUTPUTS = {
    "text_output": "STRING", "cum_log_probs": "FP32", "output_log_probs": "FP32", "kv_cache_reused_blocks": "INT32",
    "num_input_tokens": "INT32", "num_output_tokens": "INT32",
}  # fmt: skip


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_image(tmp_path / "all_models")


@pytest.fixture
def service(tmp_path: Path) -> LlmService:
    return LlmService(SETTINGS, tmp_path / "llama", tmp_path / "engine")


def read(repository: Path) -> dict[str, model_config_pb2.ModelConfig]:
    """Every configuration of a repository, as Triton parses it; nothing may be left open in any of them."""
    configs = {}
    for path in repository.iterdir():
        text = (path / "config.pbtxt").read_text()
        assert "${" not in text
        configs[path.name] = text_format.Parse(text, model_config_pb2.ModelConfig())
        assert configs[path.name].name == path.name
        assert (path / "1").is_dir()
    return configs


def types(tensors: object) -> dict[str, str]:
    return {
        tensor.name: model_config_pb2.DataType.Name(tensor.data_type).removeprefix("TYPE_")
        for tensor in tensors  # type: ignore[attr-defined]
    }


def parameters(config: model_config_pb2.ModelConfig) -> dict[str, str]:
    return {name: value.string_value for name, value in config.parameters.items()}


def test_an_engine_is_served_by_four_models(service: LlmService, image: Path, tmp_path: Path) -> None:
    write_repository(service, "inflight_batcher_llm", tmp_path / "models", image)
    configs = read(tmp_path / "models")
    assert set(configs) == {"preprocessing", "tensorrt_llm", "postprocessing", "ensemble"}
    assert {config.max_batch_size for config in configs.values()} == {64}
    engine = configs["tensorrt_llm"]
    assert engine.backend == "tensorrtllm"
    assert engine.HasField("model_transaction_policy")
    assert not engine.model_transaction_policy.decoupled
    told = parameters(engine)
    assert told["gpt_model_path"] == str(tmp_path / "engine")
    assert told["gpt_model_type"] == "inflight_fused_batching"
    assert told["batch_scheduler_policy"] == "guaranteed_no_evict"
    assert told["kv_cache_free_gpu_mem_fraction"] == "0.9"
    for switch in ("enable_kv_cache_reuse", "enable_chunked_context", "exclude_input_in_output"):
        assert told[switch] == "true"
    # Looked up by the backend, which does not start without them.
    for empty in ("tokenizer_dir", "xgrammar_tokenizer_info_path", "guided_decoding_backend"):
        assert told[empty] == ""
    for name in ("preprocessing", "postprocessing"):
        assert parameters(configs[name])["tokenizer_dir"] == str(tmp_path / "engine" / "tokenizer")
        assert configs[name].instance_group[0].count == 1
    assert parameters(configs["preprocessing"])["multimodal_model_path"] == ""
    assert parameters(configs["preprocessing"])["add_special_tokens"] == "true"
    for name in ("preprocessing", "postprocessing"):
        code = (image / "inflight_batcher_llm" / name / "1/model.py").read_text()
        assert (tmp_path / "models" / name / "1/model.py").read_text() == code
    assert not (tmp_path / "models/preprocessing/1/__pycache__").exists()


def test_the_ensemble_has_the_tensors_the_writer_knows(service: LlmService, image: Path, tmp_path: Path) -> None:
    write_repository(service, "inflight_batcher_llm", tmp_path / "models", image)
    ensemble = read(tmp_path / "models")["ensemble"]
    assert types(ensemble.input) == ENSEMBLE_INPUTS
    assert types(ensemble.output) == ENSEMBLE_OUTPUTS
    assert [tensor.name for tensor in ensemble.input if not tensor.optional] == ["text_input", "max_tokens"]
    steps = [step.model_name for step in ensemble.ensemble_scheduling.step]
    assert steps == ["preprocessing", "tensorrt_llm", "postprocessing"]


def test_the_llm_api_serves_the_checkpoint(service: LlmService, image: Path, tmp_path: Path) -> None:
    write_repository(dataclasses.replace(service, engine=None), "llmapi", tmp_path / "models", image)
    configs = read(tmp_path / "models")
    assert set(configs) == {"tensorrt_llm"}
    # These come from model.yaml; Triton's defaults are the same.
    assert configs["tensorrt_llm"].max_batch_size == 0
    assert not configs["tensorrt_llm"].HasField("model_transaction_policy")
    version = tmp_path / "models/tensorrt_llm/1"
    assert sorted(path.name for path in version.iterdir()) == ["helpers.py", "model.py", "model.yaml"]
    yaml = pytest.importorskip("yaml")
    told = yaml.safe_load((version / "model.yaml").read_text())
    assert told == {
        "model": str(tmp_path / "llama"),
        "tensor_parallel_size": 2,
        "max_batch_size": 64,
        "max_num_tokens": 8192,
        "max_seq_len": 4096,
        "kv_cache_config": {"enable_block_reuse": True, "dtype": "fp8", "free_gpu_memory_fraction": 0.9},
        "enable_chunked_prefill": True,
        "triton_config": {"max_batch_size": 0, "decoupled": False},
    }
    plain = json.loads(model_yaml(LlmService(EngineSettings("int4-awq"), tmp_path)))
    assert plain["kv_cache_config"]["dtype"] == "auto"


def test_a_repository_is_written_again_and_never_mixed(service: LlmService, image: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    write_repository(service, "inflight_batcher_llm", models, image)
    write_repository(dataclasses.replace(service, settings=EngineSettings()), "inflight_batcher_llm", models, image)
    assert read(models)["ensemble"].max_batch_size == 192
    with pytest.raises(ConfigurationError, match=r"holds ensemble, .* which the layout llmapi does not have"):
        write_repository(service, "llmapi", models, image)
    write_repository(service, "llmapi", tmp_path / "other", image)
    with pytest.raises(ConfigurationError, match="holds tensorrt_llm of another layout"):
        check_repository(tmp_path / "other", "inflight_batcher_llm", image)
    shutil.copytree(models / "postprocessing", tmp_path / "scoring" / "liber_score")
    with pytest.raises(ConfigurationError, match=r"holds liber_score, .*leave the models of scoring in one"):
        check_repository(tmp_path / "scoring", "llmapi", image)


@pytest.mark.parametrize(
    ("layout", "missing"),
    [
        ("inflight_batcher_llm", "inflight_batcher_llm/postprocessing/config.pbtxt"),
        ("inflight_batcher_llm", "inflight_batcher_llm/preprocessing/1/model.py"),
        ("llmapi", "llmapi/tensorrt_llm/1/model.py"),
    ],
)
def test_models_that_the_image_lacks_are_named(image: Path, tmp_path: Path, layout: Layout, missing: str) -> None:
    (image / missing).unlink()
    with pytest.raises(ConfigurationError, match=f"{missing} is not there; it belongs to NVIDIA's image"):
        check_repository(tmp_path / "models", layout, image)


def replace(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    return change


@pytest.mark.parametrize(
    ("model", "change", "reason"),
    [
        ("preprocessing", replace('"OUT_END_ID"', '"END"'), "preprocessing of this image has no tensor OUT_END_ID"),
        (
            "preprocessing",
            replace('"IMAGE_URL" data_type: TYPE_STRING dims: [ 1 ] optional: true', '"IMAGE" data_type: TYPE_STRING'),
            "preprocessing of this image also needs IMAGE",
        ),
        (
            "preprocessing",
            replace('"REQUEST_OUTPUT_LEN" data_type: TYPE_INT32', '"REQUEST_OUTPUT_LEN" data_type: TYPE_UINT32'),
            "preprocessing of this image takes another type of REQUEST_OUTPUT_LEN",
        ),
        ("postprocessing", replace("TYPE_STRING", "TYPE_UINT8"), "no model of this image makes text_output"),
        ("postprocessing", replace("count: $", "count: ${number} $"), "leaves number open, which is not known here"),
        ("postprocessing", replace("backend:", "frontend:"), "model configuration .* cannot be read"),
    ],
)
def test_an_image_that_does_not_fit_is_refused_by_what_differs(
    service: LlmService, image: Path, tmp_path: Path, model: str, change: Callable[[str], str], reason: str
) -> None:
    path = image / "inflight_batcher_llm" / model / "config.pbtxt"
    path.write_text(change(path.read_text()))
    with pytest.raises(ConfigurationError, match=reason):
        write_repository(service, "inflight_batcher_llm", tmp_path / "models", image)
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('"sampling_param_max_tokens"', '"max_tokens"', "sampling_param_max_tokens"),
        ("dims: [ 1 ] optional: true },", "dims: [ 1 ] },", "streaming"),
        ('"text_output"', '"text"', "text_output"),
    ],
)
def test_an_llm_api_with_other_tensors_is_refused(
    service: LlmService, image: Path, tmp_path: Path, old: str, new: str, named: str
) -> None:
    path = image / "llmapi/tensorrt_llm/config.pbtxt"
    path.write_text(replace(old, new)(path.read_text()))
    with pytest.raises(ConfigurationError, match=rf"has other tensors than those known here \(.*{named}"):
        write_repository(service, "llmapi", tmp_path / "models", image)


def test_the_llm_api_takes_weights_as_they_are(made_once: MadeOnce, tmp_path: Path) -> None:
    llama = made_once("engine-llama", make_tiny_llama)
    plain = open_llm_checkpoint(llama)
    check_llmapi(plain, EngineSettings("fp16"))
    with pytest.raises(InvalidInputError, match=r"are not quantized, .* not as fp8; give a checkpoint that ModelOpt"):
        check_llmapi(plain, EngineSettings("fp8"))
    model = change_config(shutil.copytree(llama, tmp_path / "a"), quantization_config={"quant_algo": "FP8"})
    check_llmapi(open_llm_checkpoint(model), EngineSettings("fp8"))
    (model / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "W4A16_AWQ"}}))
    check_llmapi(open_llm_checkpoint(model), EngineSettings("int4-awq"))
    with pytest.raises(InvalidInputError, match=r"are W4A16_AWQ, .* not as fp16; give the --quantization"):
        check_llmapi(open_llm_checkpoint(model), EngineSettings("fp16"))


# The command


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return use(make_machine(tmp_path / "machine"), monkeypatch)


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(application, ["build", "engine", *map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return result.output


def test_one_command_builds_an_engine_and_its_repository(
    made_once: MadeOnce, machine: Machine, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIBER_TENSORRT_LLM_MODELS", str(image))
    llama = made_once("engine-llama", make_tiny_llama)
    arguments = ("--model", llama, "--tp", 2, "--output", tmp_path / "out", "--repository", tmp_path / "models")
    invoke(*arguments)
    told = parameters(read(tmp_path / "models")["tensorrt_llm"])
    assert (Path(told["gpt_model_path"]) / "rank1.engine").is_file()
    tokenizer = parameters(read(tmp_path / "models")["preprocessing"])["tokenizer_dir"]
    assert (Path(tokenizer) / "tokenizer.json").is_file()
    # All of it again builds nothing, and serves other limits from another engine.
    invoke(*arguments)
    invoke(*arguments, "--max-batch-size", 8)
    assert machine.calls == ["convert", "build", "build"]
    assert parameters(read(tmp_path / "models")["tensorrt_llm"])["gpt_model_path"] != told["gpt_model_path"]


def test_a_repository_that_cannot_be_written_is_told_before_anything_is_built(
    made_once: MadeOnce, machine: Machine, tmp_path: Path
) -> None:
    llama = made_once("engine-llama", make_tiny_llama)
    with pytest.raises(ConfigurationError, match="is not there; it belongs to NVIDIA's image"):
        invoke(
            *("--model", llama, "--output", tmp_path / "out"),
            *("--repository", tmp_path / "models", "--image-models", tmp_path / "nowhere"),
        )
    assert machine.calls == []


def test_the_llm_api_needs_no_engine(
    made_once: MadeOnce, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a version that has no engines any more. Too little memory is told all the same."""
    machine = use(make_machine(tmp_path / "machine", version="1.3.0"), monkeypatch)
    llama = made_once("engine-llama", make_tiny_llama)
    arguments = ("--model", llama, "--layout", "llmapi", "--repository", tmp_path / "models", "--image-models", image)
    assert "tensorrt_llm/config.pbtxt" in invoke(*arguments, "--dry-run")
    assert not (tmp_path / "models").exists()
    invoke(*arguments)
    assert json.loads((tmp_path / "models/tensorrt_llm/1/model.yaml").read_text())["model"] == str(llama)
    assert machine.calls == []
    machine.set_gpus("0, GPU-5, Quadro P400, 1024, 1000, 6.1")
    with pytest.raises(ConfigurationError, match=r"Quadro P400 has 1.0 GiB"):
        invoke(*arguments)
    with pytest.raises(InvalidInputError, match="--layout llmapi builds no engine, only a model repository"):
        invoke("--model", llama, "--layout", "llmapi")


def test_building_engines_imports_nothing_heavy() -> None:
    """It runs inside NVIDIA's image, before anything of that is loaded."""
    root = Path(__file__).parents[2]
    files = sorted((root / "builders" / "llm").glob("*.py"))
    assert len(files) >= 8
    for file in files:
        tree = ast.parse(file.read_text())
        top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        top |= {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
        own = {module for module in top if module.split(".")[0] not in sys.stdlib_module_names}
        assert {module.split(".")[0] for module in own} <= {"builders", "liber_runtime", "google", "tritonclient"}
