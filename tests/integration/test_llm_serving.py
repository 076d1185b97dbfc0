"""The ensemble around an engine, loaded and called in a real Triton; only the engine itself is a stand-in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import tritonclient.grpc as triton
from llm_image import ENGINE, make_image

from builders.llm.engines import EngineSettings
from builders.llm.repository import LlmService, write_repository
from liber_runtime.server import TritonServer


def tensor(name: str, values: npt.NDArray[np.generic], kind: str) -> triton.InferInput:
    sent = triton.InferInput(name, list(values.shape), kind)
    sent.set_data_from_numpy(values)
    return sent


def test_a_prompt_goes_through_the_ensemble(tmp_path: Path) -> None:
    service = LlmService(EngineSettings(max_batch_size=8), tmp_path / "llama", tmp_path / "engine")
    models = tmp_path / "models"
    write_repository(service, "inflight_batcher_llm", models, make_image(tmp_path / "all_models"))
    config = models / "tensorrt_llm" / "config.pbtxt"
    # NVIDIA's backend needs a GPU; the tensors stay those that it gets and gives.
    config.write_text(config.read_text().replace('backend: "tensorrtllm"', 'backend: "python"'))
    (models / "tensorrt_llm" / "1" / "model.py").write_text(ENGINE)

    asked = [
        tensor("text_input", np.array([[b"slits"]], np.object_), "BYTES"),
        tensor("max_tokens", np.array([[4]], np.int32), "INT32"),
        tensor("temperature", np.array([[0]], np.float32), "FP32"),
        tensor("stop_words", np.array([[b"."]], np.object_), "BYTES"),
        tensor("seed", np.array([[7]], np.uint64), "UINT64"),
    ]
    counted = tensor("return_num_input_tokens", np.array([[True]]), "BOOL")
    outputs = [triton.InferRequestedOutput(name) for name in ("text_output", "num_input_tokens")]
    with TritonServer(models, log_file=tmp_path / "triton.log") as server:
        client = triton.InferenceServerClient(server.grpc_url)
        plain = client.infer("ensemble", asked)
        told = client.infer("ensemble", [*asked, counted], outputs=outputs)
        client.close()
    assert plain.as_numpy("text_output").tolist() == [b"stil"]
    assert told.as_numpy("text_output").tolist() == [b"stil"]
    assert told.as_numpy("num_input_tokens").tolist() == [[5]]
