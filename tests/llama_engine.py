"""Runs a tiny Llama for servers of the tests: what they answer with, and what goes wrong with it."""

from __future__ import annotations

import contextlib
import queue
import threading
import zlib
from collections import defaultdict, deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from types import TracebackType
from typing import Any

_LOOK_SECONDS = 0.02


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one call.

    Attributes:
        seconds: the answer is kept back for so long, or until the caller is gone.
        reply: stands in for these parts of the answer, see `LlamaEngine`.
        generates: whether the answer is computed at all.
    """

    seconds: float = 0.0
    reply: Mapping[str, Any] = field(default_factory=dict)
    generates: bool = True


@dataclass(frozen=True)
class _Waiting:
    question: Mapping[str, Any]
    prompt: Any
    answer: Future[dict[str, Any]]


class LlamaEngine:
    """Runs a checkpoint with transformers for whoever connects, in this process, so that a server that is killed costs
    no import of torch: models on a Triton of the tests ask it, as those of TensorRT-LLM ask their engine's process.

    A question is a dict of prompt, max_tokens, temperature, top_k, top_p and seed (None for what was not said); the
    reply a dict of text (bytes), finish_reason, prompt_tokens and response_tokens, or of error. Calls that wait at the
    same time are generated as one batch.

    Attributes:
        address: where it listens, for `multiprocessing.connection.Client`.
        most_prompt_tokens: longer prompts are refused in TensorRT-LLM's words.
        faults: each stands in for one of the next calls.
        asked: every question, in order.
        replied: the texts that went back, by prompt.
        answered: replies that somebody took.
        abandoned: calls whose caller was gone before the answer.
        largest_batch: most calls that were generated together.
    """

    def __init__(self, checkpoint: Path, most_prompt_tokens: int = 3000) -> None:
        import torch
        import transformers

        self._torch = torch
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).eval()
        self.most_prompt_tokens = most_prompt_tokens
        self.faults: deque[Fault] = deque()
        self.asked: list[Mapping[str, Any]] = []
        self.replied: defaultdict[str, list[bytes]] = defaultdict(list)
        self.answered = self.abandoned = self.largest_batch = 0
        self._lock = threading.Lock()
        self._waiting: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._listener = Listener(family="AF_UNIX")
        self.address = str(self._listener.address)
        self._closing = False
        self._threads = [threading.Thread(target=self._accept), threading.Thread(target=self._generate)]

    def __enter__(self) -> LlamaEngine:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing = True
        self._waiting.put(None)
        Client(self.address).close()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def count(self, text: str) -> int:
        return len(self._tokenizer(text, add_special_tokens=False).input_ids)

    def _accept(self) -> None:
        answering = []
        while True:
            connection = self._listener.accept()
            if self._closing:
                connection.close()
                break
            answering.append(threading.Thread(target=self._answer, args=(connection,)))
            answering[-1].start()
        for thread in answering:
            thread.join()

    def _answer(self, connection: Connection) -> None:
        with connection, contextlib.suppress(EOFError, OSError):
            question = connection.recv()
            with self._lock:
                self.asked.append(question)
                fault = self.faults.popleft() if self.faults else Fault()
            reply = self._begin(question) if fault.generates else Future()
            if not fault.generates:
                reply.set_result({})
            left = fault.seconds
            while not self._closing and (left > 0 or not reply.done()):
                # A caller sends one question: whatever else can be read is the end of the connection.
                if connection.poll(_LOOK_SECONDS):
                    with self._lock:
                        self.abandoned += 1
                    return
                left -= _LOOK_SECONDS
            if reply.done():
                made = {**reply.result(), **fault.reply}
                connection.send(made)
                with self._lock:
                    self.replied[question["prompt"]].append(made.get("text", b""))
                    self.answered += 1

    def _begin(self, question: Mapping[str, Any]) -> Future[dict[str, Any]]:
        answer: Future[dict[str, Any]] = Future()
        prompt = self._tokenizer(question["prompt"], return_tensors="pt").input_ids[0]
        if len(prompt) > self.most_prompt_tokens:
            limits = f"Prompt length ({len(prompt)}) exceeds maximum input length ({self.most_prompt_tokens})"
            answer.set_result({"error": f"Encountered an error when fetching new request: {limits}."})
        else:
            self._waiting.put(_Waiting(question, prompt, answer))
        return answer

    def _generate(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch = [first]
            with contextlib.suppress(queue.Empty):
                while len(batch) < 16 and (more := self._waiting.get_nowait()) is not None:
                    batch.append(more)
            self.largest_batch = max(self.largest_batch, len(batch))
            try:
                self._generate_batch(batch)
            except Exception as error:
                for waiting in batch:
                    waiting.answer.set_result({"error": f"{type(error).__name__}: {error}"})

    def _generate_batch(self, batch: list[_Waiting]) -> None:
        torch, end = self._torch, self._tokenizer.eos_token_id
        padded = self._tokenizer.pad({"input_ids": [waiting.prompt for waiting in batch]}, return_tensors="pt")
        step, mask, cache = padded["input_ids"], padded["attention_mask"], None
        # What such a model writes hardly depends on what it reads, so the draws do.
        seeds = [zlib.crc32(waiting.question["prompt"].encode(), waiting.question["seed"] or 0) for waiting in batch]
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        written: list[list[int]] = [[] for _ in batch]
        most = [waiting.question["max_tokens"] for waiting in batch]
        with torch.inference_mode():
            for number in range(max(most)):
                places = (mask.cumsum(1) - 1).clamp(min=0)[:, -step.shape[1] :]
                made = self._model(
                    step, attention_mask=mask, position_ids=places, past_key_values=cache, logits_to_keep=1
                )
                cache = made.past_key_values
                for row, (waiting, draw) in enumerate(zip(batch, draws, strict=True)):
                    if number < most[row] and end not in written[row]:
                        written[row].append(self._pick(made.logits[row, -1], waiting.question, draw))
                step = torch.tensor([[tokens[-1]] for tokens in written])
                mask = torch.cat([mask, torch.ones(len(batch), 1, dtype=mask.dtype)], 1)
        for waiting, tokens in zip(batch, written, strict=True):
            waiting.answer.set_result(
                {
                    "text": self._tokenizer.decode(tokens, skip_special_tokens=True).encode(),
                    "finish_reason": "stop" if end in tokens else "length",
                    "prompt_tokens": len(waiting.prompt),
                    "response_tokens": len(tokens),
                }
            )

    def _pick(self, logits: Any, question: Mapping[str, Any], draw: Any) -> int:
        """TensorRT-LLM's rules: greedy is one token to choose from, or nothing said of how to draw."""
        said = [question[name] for name in ("temperature", "top_k", "top_p")]
        if question["top_k"] == 1 or question["top_p"] == 0 or said == [None, None, None]:
            return int(logits.argmax())
        chances = (logits / (question["temperature"] or 1.0)).softmax(-1)
        return int(self._torch.multinomial(chances, 1, generator=draw))
