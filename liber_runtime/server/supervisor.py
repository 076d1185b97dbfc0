"""Keeps a server serving: loads a model anew whose process died, starts a server again that died."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Mapping

from liber_runtime.exceptions import ServerError
from liber_runtime.server.control import NoAnswerError, ServerControl
from liber_runtime.server.process import TritonProcess
from liber_runtime.server.stubs import Stub, StubWatch, expected_stubs, find_broken

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_LOOK_SECONDS = 2.0
_HEAL_SECONDS = 10.0
_FAILURE_WINDOW_SECONDS = 60.0
_MOST_SERVER_DEATHS = 5


class Backoff:
    """Delays that grow while failures keep coming: 0, 0.5, 1, 2, ... seconds.

    Args:
        window: seconds after which a failure no longer counts.
        longest: the largest delay, in seconds.
    """

    def __init__(self, window: float, longest: float) -> None:
        self._window = window
        self._longest = longest
        self._failures: deque[float] = deque()

    def record(self, now: float) -> int:
        """Notes a failure at `now` (seconds, monotonic) and returns how many lie within the window."""
        while self._failures and now - self._failures[0] > self._window:
            self._failures.popleft()
        self._failures.append(now)
        return len(self._failures)

    @property
    def delay(self) -> float:
        """Seconds to wait after the last failure before the next attempt."""
        if len(self._failures) <= 1:
            return 0.0
        return float(min(self._longest, 0.5 * 2.0 ** min(len(self._failures) - 2, 60)))


class Supervisor:
    """Watches one server, and what is started in its place.

    Args:
        launch: starts a server and returns once it is ready, or raises ServerError.
        control: speaks to the running server.
        reload_model: loads these versions of a model anew within so many seconds, or raises ServerError.

    Attributes:
        process: the server's last process; it may be dead.
        stub_restarts: model processes that died and were replaced.
        server_restarts: times the server died and was started again.
    """

    def __init__(
        self,
        launch: Callable[[], TritonProcess],
        control: ServerControl,
        reload_model: Callable[[str, Collection[str], float], None],
    ) -> None:
        self._launch = launch
        self._control = control
        self._reload_model = reload_model
        self._server_backoff = Backoff(_FAILURE_WINDOW_SECONDS, longest=8.0)
        self._model_backoff = defaultdict[str, Backoff](lambda: Backoff(_FAILURE_WINDOW_SECONDS, longest=30.0))
        self._next_heal: dict[str, float] = {}
        begin = time.monotonic()
        self.process = launch()
        # Triton never ends the load of a model whose process dies in the first moments of its life. One model that
        # takes this much longer than all of them did is taken for such a one.
        self._heal_seconds = _HEAL_SECONDS + 5 * (time.monotonic() - begin)
        self.stub_restarts = 0
        self.server_restarts = 0

    def run(self, stopping: threading.Event) -> None:
        """Watches until `stopping` is set.

        Raises:
            ServerError: the server died too often.
        """
        watch, next_look = StubWatch(self.process.pid), 0.0
        while not stopping.wait(_POLL_SECONDS):
            if self.process.exit_status is not None:
                self._restart(stopping)
                watch, next_look = StubWatch(self.process.pid), 0.0
            elif watch.lost_one() or time.monotonic() >= next_look:
                # Looking even when no loss was seen finds a stub that died before it was first seen alive.
                next_look = time.monotonic() + _LOOK_SECONDS
                next_look = min(next_look, self._heal_models(watch))

    def _heal_models(self, watch: StubWatch) -> float:
        """Heals what is broken and due; returns when to look again at the latest (monotonic; infinity if all is well).

        A stub counts as living if it does before or after Triton is asked what it has loaded: one that ends with an
        unload in between was not lost. One that was lost in between is found at the next look, which is then at once.
        """
        before = watch.scan()
        try:
            expected = self._expected_stubs()
        except ServerError:
            return 0.0
        after = watch.scan()
        living = before | after
        broken = find_broken(expected, living.values())
        postponed = math.inf if before.keys() <= after.keys() else 0.0
        for name in sorted({model.name for model in broken}):
            lost = {model.version: count for model, count in broken.items() if model.name == name}
            replaced = [pid for pid, stub in living.items() if stub.model in broken and stub.model.name == name]
            if time.monotonic() >= self._next_heal.get(name, 0.0) and self._heal(name, lost):
                watch.retire(replaced)
            else:
                postponed = min(postponed, self._next_heal[name])
        return postponed

    def _expected_stubs(self) -> Counter[Stub]:
        expected: Counter[Stub] = Counter()
        for model in self._control.loaded_versions():
            expected += expected_stubs(model, self._control.configuration(model))
        return expected

    def _heal(self, name: str, lost: Mapping[str, int]) -> bool:
        begin = time.monotonic()
        backoff = self._model_backoff[name]
        backoff.record(begin)
        what = f"model {name} version {', '.join(sorted(lost))}: {sum(lost.values())} of its processes died"
        try:
            self._reload_model(name, lost, self._heal_seconds)
        except NoAnswerError as error:
            logger.error("%s and their replacement hangs: %s; ending the server", what, error)
            self.process.kill()
            return False
        except ServerError as error:
            logger.error("%s and cannot be replaced: %s", what, error)
            return False
        finally:
            self._next_heal[name] = time.monotonic() + backoff.delay
        self.stub_restarts += sum(lost.values())
        logger.warning("%s; replaced in %.2f s", what, time.monotonic() - begin)
        return True

    def _restart(self, stopping: threading.Event) -> None:
        deaths = self._server_backoff.record(time.monotonic())
        what = f"tritonserver ended with exit status {self.process.exit_status}"
        if deaths > _MOST_SERVER_DEATHS:
            raise ServerError(f"{what}, {deaths} times within {_FAILURE_WINDOW_SECONDS:g} s: giving up")
        logger.warning("%s; starting it again", what)
        self.process.end()
        if stopping.wait(self._server_backoff.delay):
            return
        try:
            self.process = self._launch()
        except ServerError as error:
            logger.error("%s", error)
        else:
            self.server_restarts += 1
