"""A tiny Llama with random weights, as a checkpoint directory that transformers loads: what tests of LLMs share."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import threading
import zlib
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

LLAMA_TOKENIZER = "LIBER_LLAMA_TOKENIZER"
"""Names the directory with Llama 2's own ``tokenizer.model``; without it the tests train a tokenizer of their own."""

_SPECIAL = ("<unk>", "<s>", "</s>")
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_SPACE = "▁"

Pair = tuple[str, str]


def make_tiny_llama(
    directory: Path, seed: int = 0, hidden_size: int = 32, layers: int = 2, positions: int = 4096, heads: int = 2
) -> Path:
    """Writes config, ``model.safetensors`` and tokenizer files; under greedy decoding it soon goes round in a loop.

    Sample it with temperature 1 and a seed for answers that differ; they are words in no order, seldom with an end.
    """
    import torch
    import transformers

    tokenizer = make_llama_tokenizer(directory)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=positions,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def make_llama_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Writes ``tokenizer.json`` and its config (and Llama 2's ``tokenizer.model``, if there is one); returns it."""
    import transformers

    named = os.environ.get(LLAMA_TOKENIZER)
    vocabulary, merges = _read_pieces(Path(named) / "tokenizer.model") if named else _train()
    if named:
        shutil.copy2(Path(named) / "tokenizer.model", directory)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_like_llama(vocabulary, merges),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(directory)
    return tokenizer


def _like_llama(vocabulary: dict[str, int], merges: list[Pair]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return tokenizer


def _read_pieces(file: Path) -> tuple[dict[str, int], list[Pair]]:
    """Pieces and merges of a SentencePiece BPE model; a merge is tried the sooner, the higher its piece's score."""
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(file))
    vocabulary = {pieces.id_to_piece(number): number for number in range(len(pieces))}
    learned = [piece for piece in vocabulary if piece not in _SPECIAL and piece not in _BYTES]
    learned.sort(key=lambda piece: -pieces.get_score(vocabulary[piece]))
    return vocabulary, [pair for piece in learned for pair in _halves(piece, vocabulary)]


def _halves(piece: str, vocabulary: dict[str, int]) -> list[Pair]:
    pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
    known = [(left, right) for left, right in pairs if left in vocabulary and right in vocabulary]
    return sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))


def _train() -> tuple[dict[str, int], list[Pair]]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    sentences = [
        "The user loves comedies and dramas, dislikes horror, and rates musicals with four stars out of five.",
        "Summarize the preferences of this user: favorite genres, years and directors, in a few short sentences.",
        "Compared with before, the interest in action movies has risen; that in romance and adventure is gone.",
        "Based on the history, would the user like the next movie? Answer yes or no. Yes. No.",
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(sentences * 4, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    trained = json.loads(tokenizer.to_str())["model"]
    printable = [chr(code) for code in range(33, 127)]
    pieces = dict.fromkeys(
        (*_SPECIAL, *_BYTES, _SPACE, *printable, *sorted(trained["vocab"], key=trained["vocab"].get))
    )
    return {piece: number for number, piece in enumerate(pieces)}, [tuple(merge) for merge in trained["merges"]]


# -- an engine that runs it --------------------------------------------------------------------------------------------

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
                connection.send({**reply.result(), **fault.reply})
                with self._lock:
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
