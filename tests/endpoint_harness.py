"""An OpenAI-compatible server that runs a tiny Llama (transformers' own), and what can go wrong between it and us."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

START_SECONDS = 120.0

HTML = b"<html><body>502 Bad Gateway: the proxy is unwell</body></html>"


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class LlamaServer:
    """``transformers serve`` with one checkpoint, on a port that stays the same when it is started again."""

    def __init__(self, checkpoint: Path, directory: Path) -> None:
        self.checkpoint = checkpoint
        self.port = free_port()
        self.log = directory / "serve.log"
        # No cache of models, so that it lists none and looks for none on the network.
        self._environment = {**os.environ, "HF_HUB_CACHE": str(directory / "hub"), "HF_HUB_OFFLINE": "1"}
        (directory / "hub").mkdir()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def model(self) -> str:
        return str(self.checkpoint)

    def start(self) -> None:
        """Starts it and waits until it answers."""
        command = [str(Path(sys.executable).with_name("transformers")), "serve", self.model]
        options = ["--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu", "--dtype", "float32"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *options], env=self._environment, stdout=log, stderr=subprocess.STDOUT
            )
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as answer,
            ):
                if answer.status == 200:
                    return
            time.sleep(0.1)
        raise AssertionError(f"transformers serve did not start:\n{self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        """Ends it without a word."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class Weather:
    """A proxy in front of an endpoint that passes calls on, or spoils them, as `now` says.

    Attributes:
        now: ``fair``, ``busy`` (429), ``overloaded`` (503), ``broken`` (500), ``page`` (HTML for an answer), ``half``
            (half of the JSON), ``torn`` (the connection ends in the middle), ``slow``, ``empty``, ``long``, ``locked``.
        seen: what came in, by weather.
    """

    def __init__(self, target: int) -> None:
        self.now = "fair"
        self.seen: list[str] = []
        self.bodies: list[bytes] = []
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._ready = threading.Event()
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Weather:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self._loop.close()

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._handle, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        async with server:
            await self._stop.wait()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError), contextlib.closing(writer):
            head = await reader.readuntil(b"\r\n\r\n")
            lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            body = await reader.readexactly(int(lengths[0].split(b":")[1])) if lengths else b""
            weather = self.now if head.startswith(b"POST") else "fair"
            self.seen.append(weather)
            self.bodies.append(body)
            await getattr(self, f"_{weather}")(head, body, writer)
            await writer.drain()

    async def _passed(self, head: bytes, body: bytes) -> bytes:
        # One call for each connection, so that the answer ends with it.
        lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
        reader, writer = await asyncio.open_connection("127.0.0.1", self._target)
        with contextlib.closing(writer):
            writer.write(b"\r\n".join([lines[0], b"Connection: close", *lines[1:]]) + body)
            return await reader.read()

    async def _fair(self, head: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(await self._passed(head, body))

    async def _torn(self, head: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        answer = await self._passed(head, body)
        writer.write(answer[: len(answer) - 40])

    async def _half(self, head: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        answer = (await self._passed(head, body)).partition(b"\r\n\r\n")[2]
        _answer(writer, 200, answer[: len(answer) // 2])

    async def _slow(self, head: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(30)

    async def _page(self, head: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        _answer(writer, 200, HTML, "text/html")

    async def _busy(self, head: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        _answer(writer, 429, b'{"error": {"message": "slow down"}}', "application/json", b"Retry-After: 0.2\r\n")

    async def _overloaded(self, head: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        _answer(writer, 503, HTML, "text/html")

    async def _broken(self, head: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        _answer(writer, 500, b"Internal Server Error", "text/plain")

    async def _locked(self, head: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        _answer(writer, 401, b'{"error": {"message": "Incorrect API key provided"}}')

    async def _long(self, head: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        _answer(writer, 400, b'{"error": {"message": "This model\'s maximum context length is 4096 tokens"}}')

    async def _empty(self, head: bytes, body: bytes, writer: asyncio.StreamWriter) -> None:
        choice = b'{"index": 0, "finish_reason": "stop", "text": "", "message": {"role": "assistant", "content": ""}}'
        usage = b'{"prompt_tokens": 50, "completion_tokens": 0, "total_tokens": 50}'
        _answer(writer, 200, b'{"id": "1", "choices": [' + choice + b'], "usage": ' + usage + b"}")


def _answer(
    writer: asyncio.StreamWriter, status: int, body: bytes, kind: str = "application/json", headers: bytes = b""
) -> None:
    head = f"HTTP/1.1 {status} Status\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    writer.write(head.encode() + headers + b"\r\n" + body)


@contextlib.contextmanager
def served(checkpoint: Path, directory: Path) -> Iterator[LlamaServer]:
    """A running server."""
    server = LlamaServer(checkpoint, directory)
    try:
        server.start()
        yield server
    finally:
        server.kill()
