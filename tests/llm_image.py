"""The models that NVIDIA's image has, as small ones of our own: the same tensors, blanks and parameters.

A token is a byte of the text. The engine's stand-in says a prompt backwards.
"""

from __future__ import annotations

from pathlib import Path

PREPROCESSING = """
name: "preprocessing"
backend: "python"
max_batch_size: ${triton_max_batch_size}
dynamic_batching {
  preferred_batch_size: [ ${triton_max_batch_size} ]
  max_queue_delay_microseconds: ${max_queue_delay_microseconds}
  default_queue_policy: { max_queue_size: ${max_queue_size} }
}
input [
  { name: "QUERY" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "REQUEST_OUTPUT_LEN" data_type: TYPE_INT32 dims: [ 1 ] },
  { name: "BAD_WORDS_DICT" data_type: TYPE_STRING dims: [ -1 ] optional: true },
  { name: "STOP_WORDS_DICT" data_type: TYPE_STRING dims: [ -1 ] optional: true },
  { name: "END_ID" data_type: TYPE_INT32 dims: [ 1 ] optional: true },
  { name: "PAD_ID" data_type: TYPE_INT32 dims: [ 1 ] optional: true },
  { name: "IMAGE_URL" data_type: TYPE_STRING dims: [ 1 ] optional: true }
]
output [
  { name: "INPUT_ID" data_type: TYPE_INT32 dims: [ -1 ] },
  { name: "REQUEST_INPUT_LEN" data_type: TYPE_INT32 dims: [ 1 ] },
  { name: "REQUEST_OUTPUT_LEN" data_type: TYPE_INT32 dims: [ -1 ] },
  { name: "BAD_WORDS_IDS" data_type: TYPE_INT32 dims: [ 2, -1 ] },
  { name: "STOP_WORDS_IDS" data_type: TYPE_INT32 dims: [ 2, -1 ] },
  { name: "OUT_END_ID" data_type: TYPE_INT32 dims: [ 1 ] },
  { name: "OUT_PAD_ID" data_type: TYPE_INT32 dims: [ 1 ] },
  { name: "PIXEL_VALUES" data_type: TYPE_FP16 dims: [ -1, -1 ] }
]
parameters { key: "tokenizer_dir" value: { string_value: "${tokenizer_dir}" } }
parameters { key: "add_special_tokens" value: { string_value: "${add_special_tokens}" } }
parameters { key: "multimodal_model_path" value: { string_value: "${multimodal_model_path}" } }
instance_group [ { count: ${preprocessing_instance_count} kind: KIND_CPU } ]
"""

POSTPROCESSING = """
name: "postprocessing"
backend: "python"
max_batch_size: ${triton_max_batch_size}
dynamic_batching {}
input [
  { name: "TOKENS_BATCH" data_type: TYPE_INT32 dims: [ -1, -1 ] },
  { name: "SEQUENCE_LENGTH" data_type: TYPE_INT32 dims: [ -1 ] }
]
output [ { name: "OUTPUT" data_type: TYPE_STRING dims: [ -1 ] } ]
parameters { key: "tokenizer_dir" value: { string_value: "${tokenizer_dir}" } }
parameters { key: "skip_special_tokens" value: { string_value: "${skip_special_tokens}" } }
instance_group [ { count: ${postprocessing_instance_count} kind: KIND_CPU } ]
"""

LLMAPI = """
name: "tensorrt_llm"
backend: "python"
instance_group [ { count: 1 kind: KIND_CPU } ]
input [
  { name: "text_input" data_type: TYPE_STRING dims: [ -1 ] },
  { name: "streaming" data_type: TYPE_BOOL dims: [ 1 ] optional: true },
  { name: "sampling_param_max_tokens" data_type: TYPE_INT32 dims: [ 1 ] optional: true },
  { name: "sampling_param_temperature" data_type: TYPE_FP32 dims: [ 1 ] optional: true }
]
output [
  { name: "text_output" data_type: TYPE_STRING dims: [ -1 ] },
  { name: "finish_reason" data_type: TYPE_STRING dims: [ -1 ] }
]
"""

TOKENIZE = """
import json

import numpy as np
import triton_python_backend_utils as triton


class TritonPythonModel:
    def initialize(self, args):
        parameters = json.loads(args["model_config"])["parameters"]
        assert parameters["tokenizer_dir"]["string_value"]
        assert parameters["multimodal_model_path"]["string_value"] == ""

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        def given(name):
            return triton.get_input_tensor_by_name(request, name).as_numpy()

        tokens = np.array([list(text[0]) for text in given("QUERY")], np.int32)
        lengths = np.array([[row.size] for row in tokens], np.int32)
        none = np.zeros((len(tokens), 2, 0), np.int32)
        end = np.zeros((len(tokens), 1), np.int32)
        made = {"INPUT_ID": tokens, "REQUEST_INPUT_LEN": lengths, "REQUEST_OUTPUT_LEN": given("REQUEST_OUTPUT_LEN")}
        made |= {"BAD_WORDS_IDS": none, "STOP_WORDS_IDS": none, "OUT_END_ID": end, "OUT_PAD_ID": end}
        return triton.InferenceResponse([triton.Tensor(name, array) for name, array in made.items()])
"""

DETOKENIZE = """
import numpy as np
import triton_python_backend_utils as triton


class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        tokens = triton.get_input_tensor_by_name(request, "TOKENS_BATCH").as_numpy()[0, 0]
        length = triton.get_input_tensor_by_name(request, "SEQUENCE_LENGTH").as_numpy()[0, 0]
        text = np.array([bytes(tokens[:length].tolist())], np.object_)
        return triton.InferenceResponse([triton.Tensor("OUTPUT", text)])
"""

ENGINE = """
import numpy as np
import triton_python_backend_utils as triton


class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        def given(name):
            tensor = triton.get_input_tensor_by_name(request, name)
            return None if tensor is None else tensor.as_numpy()

        tokens = given("input_ids")[:, ::-1][:, : int(given("request_output_len")[0])]
        made = {"output_ids": tokens[:, None], "sequence_length": np.array([[tokens.shape[1]]], np.int32)}
        if given("return_num_input_tokens") is not None:
            made["num_input_tokens"] = given("input_lengths").reshape(1, 1)
        return triton.InferenceResponse([triton.Tensor(name, array) for name, array in made.items()])
"""


def make_image(root: Path) -> Path:
    """A directory of models as ``all_models`` of an image is."""
    models = {
        "inflight_batcher_llm/preprocessing": (PREPROCESSING, TOKENIZE),
        "inflight_batcher_llm/postprocessing": (POSTPROCESSING, DETOKENIZE),
        "llmapi/tensorrt_llm": (LLMAPI, "# the LLM API\n"),
    }
    for name, (config, code) in models.items():
        (root / name / "1" / "__pycache__").mkdir(parents=True)
        (root / name / "config.pbtxt").write_text(config)
        (root / name / "1" / "model.py").write_text(code)
    (root / "llmapi/tensorrt_llm/1/helpers.py").write_text("# helpers\n")
    (root / "llmapi/tensorrt_llm/1/model.yaml").write_text("model: some/other\ntriton_config: {}\n")
    return root
