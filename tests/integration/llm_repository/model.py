"""An LLM on the tests' Triton with the tensors of TensorRT-LLM's layouts; a `LlamaEngine` computes its answers."""

import json
import threading
from multiprocessing.connection import Client

import numpy as np
import triton_python_backend_utils as pb

SAMPLING = ("temperature", "top_k", "top_p", "seed")
FINAL = pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class CancelledError(Exception):
    pass


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        said = {name: value["string_value"] for name, value in config["parameters"].items()}
        self.engine = said["engine"]
        self.llmapi = said["layout"] == "llmapi"
        self.waits = "waits" in said
        self.decoupled = config.get("model_transaction_policy", {}).get("decoupled", False)

    def execute(self, requests):
        # Each call waits for itself, so that the engine can compute together what is in flight.
        calls = [
            threading.Thread(target=self.answer, args=(request, request.get_response_sender())) for request in requests
        ]
        for call in calls:
            call.start()
        if self.waits:
            for call in calls:
                call.join()

    def answer(self, request, sender):
        try:
            reply = self.ask(request)
            if "error" in reply:
                raise RuntimeError(reply["error"])
            *pieces, last = self.responses(request, reply)
        except CancelledError:
            error = pb.TritonError("Request cancelled by client", pb.TritonError.CANCELLED)
            pieces, last = [], pb.InferenceResponse(error=error)
        except Exception as error:
            pieces, last = [], pb.InferenceResponse(error=pb.TritonError(f"Error generating request: {error}"))
        for piece in pieces:
            sender.send(piece)
        sender.send(last, flags=FINAL)

    def ask(self, request):
        prefix = "sampling_param_" if self.llmapi else ""
        question = {name: self.read(request, prefix + name) for name in SAMPLING}
        question["prompt"] = self.read(request, "text_input").decode()
        question["max_tokens"] = self.read(request, prefix + "max_tokens")
        with Client(self.engine) as connection:
            connection.send(question)
            while not connection.poll(0.02):
                if request.is_cancelled():
                    raise CancelledError
            return connection.recv()

    def responses(self, request, reply):
        text = reply["text"]
        if not self.llmapi and not self.read(request, "exclude_input_in_output"):
            text = self.read(request, "text_input") + text
        # A character may be cut in two.
        for piece in [text[: len(text) // 2], text[len(text) // 2 :]] if self.decoupled else [text]:
            outputs = {"text_output": np.array([piece], dtype=np.object_), **dict(self.told(request, reply))}
            outputs.update({name: np.array([value], np.float32) for name, value in reply.get("floats", {}).items()})
            yield pb.InferenceResponse(
                [
                    pb.Tensor(name, array if self.llmapi else array[np.newaxis])
                    for name, array in outputs.items()
                    if name not in reply.get("missing", ())
                ]
            )

    def told(self, request, reply):
        if self.llmapi:
            if self.read(request, "return_finish_reason"):
                yield "finish_reason", np.array([reply["finish_reason"].encode()], dtype=np.object_)
            return
        for name, count in (("input", "prompt_tokens"), ("output", "response_tokens")):
            if self.read(request, f"return_num_{name}_tokens"):
                yield f"num_{name}_tokens", np.array([reply[count]], np.int32)

    def read(self, request, name):
        tensor = pb.get_input_tensor_by_name(request, name)
        return None if tensor is None else tensor.as_numpy().item()
