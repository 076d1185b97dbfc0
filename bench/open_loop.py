"""An open-loop generator: calls are due when a seed said so, whether or not the calls before them were answered.

A closed loop asks a slow server less, and so hides how slow it is. Here the arrivals are a Poisson process fixed before
the first call goes out, a latency counts from the moment its call was due, and a call without an answer is a failure
that is slower than any answer. The sender is a process of its own with requests that were encoded beforehand; how late
it was itself is measured with every call.
"""

from __future__ import annotations

import gc
import itertools
import math
import multiprocessing
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2

from bench.calls import Request
from liber_runtime.exceptions import LiberError

MOST_LAG_SECONDS = 0.005
"""A sender whose p99 of lateness is above this did not offer the load it should have."""

UNFINISHED = "UNFINISHED"
"""Status of a call that had neither answer nor error when its run ended."""

BROKEN_ANSWER = "BROKEN_ANSWER"
"""Status of a call whose answer was not one finite probability for each candidate."""

_METHOD = "/inference.GRPCInferenceService/ModelInfer"
_CONNECTIONS = 4
_CHANNEL = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
]
_START_SECONDS = 60.0
_LEAD_SECONDS = 0.05
_GRACE_SECONDS = 1.0
_POLL_SECONDS = 0.002
_LOOK_SECONDS = 0.2

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Schedule:
    """What goes out when; fixed before a run.

    Attributes:
        due: float64[n], seconds from the beginning of the run, sorted.
        request: int64[n], which of the sender's requests.
        seconds: length of the time in which calls are due.
        deadline: seconds from a call's due time after which it counts as failed.
    """

    due: Seconds
    request: npt.NDArray[np.int64]
    seconds: float
    deadline: float


@dataclass(frozen=True)
class Calls:
    """What became of the calls of a run, or of a part of it; moments are those of `time.perf_counter`.

    Attributes:
        begin: when the run, or the part, began.
        end: when the time in which calls were due was over.
        seconds: how long calls were due; less than from `begin` to `end` where parts were joined.
        due: float64[n], when each call was to be sent, sorted.
        sent: float64[n], when it was.
        ended: float64[n], when its answer or its error was there; nan if there was neither.
        status: "OK", the name of a gRPC status, `BROKEN_ANSWER`, or `UNFINISHED`.
        message: what an error said; empty for an answer.
    """

    begin: float
    end: float
    seconds: float
    due: Seconds
    sent: Seconds
    ended: Seconds
    status: tuple[str, ...]
    message: tuple[str, ...]

    @property
    def answered(self) -> npt.NDArray[np.bool_]:
        """bool[n], whether the call has an answer."""
        return np.array([each == "OK" for each in self.status], dtype=np.bool_)

    @property
    def latency(self) -> Seconds:
        """float64[n], seconds from due to answer; infinite for a call that failed."""
        return np.where(self.answered, self.ended - self.due, np.inf)

    @property
    def lag(self) -> Seconds:
        """float64[n], seconds by which the sender itself was late."""
        return self.sent - self.due

    def between(self, begin: float, end: float) -> Calls:
        """The calls that were due from `begin` to before `end`."""
        first, last = np.searchsorted(self.due, [begin, end])
        part = slice(int(first), int(last))
        return Calls(
            begin=begin,
            end=end,
            seconds=end - begin,
            due=self.due[part],
            sent=self.sent[part],
            ended=self.ended[part],
            status=self.status[part],
            message=self.message[part],
        )


def join(parts: Sequence[Calls]) -> Calls:
    """Parts of a run, in order of time, as one."""
    return Calls(
        begin=parts[0].begin,
        end=parts[-1].end,
        seconds=sum(part.seconds for part in parts),
        due=np.concatenate([part.due for part in parts]),
        sent=np.concatenate([part.sent for part in parts]),
        ended=np.concatenate([part.ended for part in parts]),
        status=tuple(each for part in parts for each in part.status),
        message=tuple(each for part in parts for each in part.message),
    )


def draw_schedule(per_second: float, seconds: float, requests: int, seed: int, *, deadline: float) -> Schedule:
    """Draws a Poisson process.

    Args:
        per_second: expected calls in a second.
        seconds: length of the process.
        requests: how many different ones the sender has; each call takes one at random.
        seed: of the draw. With the same seed a load that is twice as high is the same process, twice as fast.
        deadline: see `Schedule`.
    """
    random = np.random.default_rng(seed)
    pauses = random.exponential(size=math.ceil(per_second * seconds) + 16)
    while pauses.sum() <= per_second * seconds:
        pauses = np.concatenate([pauses, random.exponential(size=len(pauses))])
    due = np.cumsum(pauses) / per_second
    due = due[due < seconds]
    chosen = np.random.default_rng((seed, 1)).integers(requests, size=len(due))
    return Schedule(due, chosen, seconds, deadline)


def summarize(calls: Calls) -> dict[str, Any]:
    """The figures of a run or of a part of it.

    Returns:
        ``requests``, ``failed``, ``failures`` (by status), ``offered`` and ``achieved`` (calls due, and calls answered
        within the time in which calls were due, in a second), ``p50_ms`` and ``p99_ms`` (from due to answer, over all
        calls, None where the call at that place failed or there was none), ``lag_p99_ms`` and ``lag_max_ms`` (of the
        sender), and ``valid``: whether the sender kept to its schedule.
    """
    answered, lag = calls.answered, calls.lag
    in_time = answered & (calls.ended < calls.end)
    lag_p99 = _percentile(lag, 99)
    return {
        "requests": len(calls.due),
        "failed": int((~answered).sum()),
        "failures": dict(Counter(each for each in calls.status if each != "OK")),
        "offered": round(len(calls.due) / calls.seconds, 2),
        "achieved": round(float(in_time.sum()) / calls.seconds, 2),
        "p50_ms": _milliseconds(_percentile(calls.latency, 50)),
        "p99_ms": _milliseconds(_percentile(calls.latency, 99)),
        "lag_p99_ms": _milliseconds(lag_p99),
        "lag_max_ms": _milliseconds(_percentile(lag, 100)),
        "valid": lag_p99 is not None and lag_p99 <= MOST_LAG_SECONDS,
    }


def _percentile(seconds: Seconds, share: float) -> float | None:
    """The smallest value that `share` per cent of all do not exceed; None if that is infinite or there are none."""
    if not len(seconds):
        return None
    value = float(np.percentile(seconds, share, method="inverted_cdf"))
    return value if math.isfinite(value) else None


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 2)


class Generator:
    """The sender's process; for a `with` block.

    Args:
        url: host:port of Triton's gRPC endpoint.
        requests: what its schedules choose from.
    """

    def __init__(self, url: str, requests: Sequence[Request]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._stop = context.Event()
        self._process = context.Process(target=_send_schedules, args=(url, list(requests), theirs, self._stop))
        self.requests = len(requests)

    def __enter__(self) -> Generator:
        self._process.start()
        self._receive(_START_SECONDS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.join()
        self._pipe.close()

    def run(self, schedule: Schedule) -> Calls:
        """Sends what is scheduled; returns once every call has ended or is past its deadline."""
        self.begin(schedule)
        return self.finish()

    def begin(self, schedule: Schedule) -> None:
        """Begins to send, and returns; `finish` or `stop` is to be called before the next."""
        self._stop.clear()
        self._left = schedule.seconds + schedule.deadline + _GRACE_SECONDS
        self._pipe.send(schedule)

    def finish(self) -> Calls:
        """Waits for the end of what was begun."""
        calls: Calls = self._receive(self._left + _START_SECONDS)
        return calls

    def stop(self) -> Calls:
        """Ends what was begun: the calls due from now on are not sent and not counted."""
        self._stop.set()
        return self.finish()

    def _receive(self, seconds: float) -> Any:
        end = time.monotonic() + seconds
        while not self._pipe.poll(_LOOK_SECONDS):
            if not self._process.is_alive() or time.monotonic() > end:
                raise LiberError("the process that sends the load ended or hangs; what it said is above: run it again")
        return self._pipe.recv()


def _send_schedules(url: str, requests: list[Request], pipe: Any, stop: Any) -> None:
    """The sender's process: a schedule in, what became of its calls out."""
    channels = [grpc.insecure_channel(url, _CHANNEL) for _ in range(_CONNECTIONS)]
    methods = [
        channel.unary_unary(_METHOD, response_deserializer=service_pb2.ModelInferResponse.FromString)
        for channel in channels
    ]
    # What is there stays; looking through it again and again would only make calls late.
    gc.freeze()
    pipe.send("ready")
    while True:
        try:
            schedule: Schedule = pipe.recv()
        except EOFError:
            return
        pipe.send(_Run(schedule, requests).send(methods, stop))


class _Run:
    """One schedule on its way."""

    def __init__(self, schedule: Schedule, requests: Sequence[Request]) -> None:
        self._schedule = schedule
        self._requests = requests
        self._owner: Any = multiprocessing.parent_process()
        count = len(schedule.due)
        self._sent = np.full(count, np.nan)
        self._ended = np.full(count, np.nan)
        self._status = [UNFINISHED] * count
        self._message = [""] * count
        self._open: dict[int, Any] = {}

    def send(self, methods: Sequence[Any], stop: Any) -> Calls:
        """Sends each call when it is due."""
        schedule = self._schedule
        begin = time.perf_counter() + _LEAD_SECONDS
        due = begin + schedule.due
        count, seconds = len(due), schedule.seconds
        for place, method in zip(range(count), itertools.cycle(methods), strict=False):
            if self._wait(due[place], stop):
                count, seconds = place, time.perf_counter() - begin
                break
            self._sent[place] = now = time.perf_counter()
            payload = self._requests[schedule.request[place]].payload
            call = method.future(payload, timeout=max(0.001, due[place] + schedule.deadline - now))
            self._open[place] = call
            call.add_done_callback(lambda call, place=place: self._note(place, call))
        last = (due[count - 1] if count else begin) + schedule.deadline + _GRACE_SECONDS
        while self._open and time.perf_counter() < last:
            time.sleep(_POLL_SECONDS)
        status, ended, message = tuple(self._status[:count]), self._ended[:count].copy(), tuple(self._message[:count])
        for call in list(self._open.values()):
            call.cancel()
        return Calls(begin, begin + seconds, seconds, due[:count], self._sent[:count], ended, status, message)

    def _wait(self, due: float, stop: Any) -> bool:
        """Sleeps until a call is due; returns whether the run is to be stopped before that."""
        while (left := due - time.perf_counter()) > 0:
            # Nobody would take the result of a load whose owner was killed.
            if stop.is_set() or not self._owner.is_alive():
                return True
            time.sleep(min(left, _LOOK_SECONDS))
        return bool(stop.is_set())

    def _note(self, place: int, call: Any) -> None:
        """What gRPC's thread calls when a call has ended."""
        ended = time.perf_counter()
        code = call.code()
        if code is grpc.StatusCode.OK:
            expected = self._requests[self._schedule.request[place]].candidates
            self._status[place] = "OK" if _is_complete(call.result(), expected) else BROKEN_ANSWER
        else:
            self._status[place], self._message[place] = code.name, call.details() or ""
        self._ended[place] = ended
        self._open.pop(place, None)


def _is_complete(answer: Any, candidates: int) -> bool:
    if len(answer.raw_output_contents) != 1:
        return False
    probability = np.frombuffer(answer.raw_output_contents[0], dtype=np.float32)
    return len(probability) == candidates and bool(np.isfinite(probability).all())
