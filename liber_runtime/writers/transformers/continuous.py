"""Continuous batching by transformers: a call takes the place of one that has ended, without waiting for the others."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from typing import Any

from liber_runtime.exceptions import LiberError
from liber_runtime.writers.transformers.batching import Tokens
from liber_runtime.writers.transformers.checkpoint import import_transformers

TOKENS_AT_ONCE = 1024
"""Most tokens of one forward pass. Without flash-attn each of them has a mask over the whole cache."""

_PAGE = 64
_FLASH_PAGE = 256
"""flash-attn's; a prefix is shared in whole pages, so smaller ones share more."""

_GLANCE_SECONDS = 1.0


class ContinuousBatches:
    """Puts calls to transformers' `ContinuousBatchingManager`; belongs to one event loop until it is closed.

    Args:
        batch_size: most calls at once.
        context_tokens: most tokens of each.
        seed: of what is drawn.
    """

    def __init__(self, batch_size: int, context_tokens: int, seed: int) -> None:
        self._batch_size = batch_size
        self._context_tokens = context_tokens
        self._seed = seed
        self._numbers = itertools.count()
        self._model: Any = None
        self._manager: Any = None
        self._restarting = asyncio.Lock()

    def start(self, model: Any) -> None:
        """Makes room for the cache and begins; not in the event loop, for it takes a while."""
        import_transformers()
        # What it logs, with tracebacks, is told by the error of each call.
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        on_cuda = model.device.type == "cuda"
        page = _FLASH_PAGE if on_cuda else _PAGE
        # Room for a whole context each, and a page that is begun.
        pages = self._batch_size * (-(-self._context_tokens // page) + 1)
        self._model = model
        self._manager = model.init_continuous_batching(
            generation_config=model.generation_config,
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=page,
                num_blocks=pages,
                max_batch_tokens=TOKENS_AT_ONCE,
                max_requests_per_batch=self._batch_size,
                auto_switch_to_flash=on_cuda,
                seed=self._seed,
            ),
        )
        # A thread is a daemon if the one that starts it is: a process that is not told to close shall end all the same.
        starter = threading.Thread(target=self._manager.start, daemon=True)
        starter.start()
        starter.join()

    async def put(self, tokens: Tokens, response_tokens: int) -> Tokens:
        """What was written; a call that is cancelled makes room for another.

        Raises:
            LiberError: it failed, and all others with it; the next call begins anew.
        """
        async with self._restarting:
            if not self._is_open():
                await asyncio.to_thread(self._restart)
        manager, number = self._manager, f"call-{next(self._numbers)}"
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def hear(output: Any) -> None:
            if not answer.done():
                answer.set_result(output)

        manager.register_result_handler(number, hear)
        try:
            if manager.add_request(tokens, request_id=number, max_new_tokens=response_tokens) is None:
                raise LiberError("continuous batching has just ended; the next call begins anew")
            # A call that came while the manager's thread ended is answered by nobody.
            while not answer.done() and manager.is_running():
                await asyncio.wait({answer}, timeout=_GLANCE_SECONDS)
            return self._read(answer)
        finally:
            if not answer.done() or answer.cancelled():
                manager.cancel_request(number)
            manager.output_router.result_handlers.pop(number, None)

    async def close(self) -> None:
        """Ends all calls and frees the cache; the next call, in any event loop, begins anew."""
        await asyncio.to_thread(self._stop)
        self._restarting = asyncio.Lock()

    def _read(self, answer: asyncio.Future[Any]) -> Tokens:
        error = answer.result().error if answer.done() else "its thread ended"
        if error is not None:
            said = (str(error).strip().splitlines() or [""])[0]
            raise LiberError(
                f"continuous batching of up to {self._batch_size} contexts of {self._context_tokens} tokens failed: "
                f"{said:.300}; if memory ran out, lower the batch size or the context, or use static batching"
            )
        return [int(token) for token in answer.result().generated_tokens]

    def _is_open(self) -> bool:
        if self._manager is None:
            return False
        return self._manager.is_running() and not self._manager.background_thread_status.can_accept_new_requests()

    def _restart(self) -> None:
        self._stop()
        self.start(self._model)

    def _stop(self) -> None:
        if self._manager is not None:
            self._manager.stop(block=True, hard_stop=True)
            self._manager.destroy()
            self._manager = None
