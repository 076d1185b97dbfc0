"""What a writer takes for the prompts of a variant: seconds and tokens, measured on a sample of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from bench.llm_cost.prompts import Prompts
from builders.variants import Plan
from liber_runtime.exceptions import LiberError, UnusableAnswerError
from liber_runtime.interest import PartitionPrompt
from liber_runtime.writers import Completion, Writer, close
from liber_runtime.writers.llm import LLMWriter
from liber_runtime.writers.tokens import TokenCount


@dataclass
class Answers:
    """To prompts of one kind.

    Attributes:
        texts: one for each prompt, empty where the answer was no knowledge.
        prompt_tokens: of each prompt, as its server counted them, or else the tokenizer.
        response_tokens: of each answer, likewise.
        seconds: from the first call to the last answer.
        cpu_seconds: of this process's processors meanwhile.
        unusable: answers that were no knowledge; paid for all the same.
    """

    texts: list[str] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    response_tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    unusable: int = 0

    def __len__(self) -> int:
        return len(self.texts)


def ask_variant(
    plan: Plan, prompts: Prompts, writer: Writer, count: TokenCount, most: int, in_flight: int
) -> Mapping[str, Answers]:
    """Has at most about `most` summaries of a plan written, and the shifts between them.

    Where a plan has shifts, those are drawn, and with each the two summaries that it is made of; else summaries are.

    Args:
        plan: of the variant.
        prompts: of the plan's samples.
        writer: called from an event loop of this call's own, and closed at its end if it is an LLM's.
        count: the LLM's tokenizer, for writers that count none.
        most: summaries.
        in_flight: calls at a time.

    Returns:
        Answers by kind: ``summary``, and ``shift`` where the plan has any.

    Raises:
        LiberError: the writer failed.
    """
    shifted = np.flatnonzero(plan.shifted)
    drawn = prompts.draw(shifted, max(1, most // 2)) if len(plan.user) > most else shifted
    rows = np.arange(len(plan.user), dtype=np.int64)
    if len(rows) > most:
        rows = np.union1d(drawn - 1, drawn) if len(drawn) else prompts.draw(rows, most)

    async def ask_opened() -> dict[str, Answers]:
        try:
            if isinstance(writer, LLMWriter):
                await writer.check()
            return await _ask(prompts, plan, rows.tolist(), drawn.tolist(), writer, count, in_flight)
        finally:
            await close(writer)

    return asyncio.run(ask_opened())


async def _ask(
    prompts: Prompts,
    plan: Plan,
    rows: Sequence[int],
    shifted: Sequence[int],
    writer: Writer,
    count: TokenCount,
    in_flight: int,
) -> dict[str, Answers]:
    answers = {"summary": await ask([prompts.summary(plan, row) for row in rows], writer, count, in_flight)}
    text_of = dict(zip(rows, answers["summary"].texts, strict=True))
    shifts = [prompts.shift(text_of[row - 1], text_of[row]) for row in shifted if text_of[row - 1] and text_of[row]]
    if shifts:
        answers["shift"] = await ask(shifts, writer, count, in_flight)
    elif shifted:
        raise LiberError(f"writer {writer.name!r} wrote no two usable summaries; nothing can be compared")
    return answers


async def ask(prompts: Sequence[PartitionPrompt], writer: Writer, count: TokenCount, in_flight: int) -> Answers:
    """Has prompts answered, `in_flight` at a time, and measures it.

    Raises:
        LiberError: the writer failed.
    """
    made: list[Completion | UnusableAnswerError | None] = [None] * len(prompts)
    waiting = iter(enumerate(prompts))

    async def work(waiting: Iterator[tuple[int, PartitionPrompt]]) -> None:
        for number, prompt in waiting:
            try:
                made[number] = await writer.write(prompt)
            except UnusableAnswerError as error:
                made[number] = error

    started, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(work(waiting) for _ in range(in_flight)))
    answers = Answers(seconds=time.perf_counter() - started, cpu_seconds=time.process_time() - cpu)
    for prompt, each in zip(prompts, made, strict=True):
        assert each is not None
        text = each.text if isinstance(each, Completion) else ""
        answers.texts.append(text)
        answers.unusable += isinstance(each, UnusableAnswerError)
        answers.prompt_tokens.append(count(prompt.text) if each.prompt_tokens is None else each.prompt_tokens)
        answers.response_tokens.append(count(text) if each.response_tokens is None else each.response_tokens)
    return answers
