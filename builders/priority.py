"""A build beside a server leaves it the processors: a low priority, and half of the threads."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

NICENESS = 10
"""A tenth of a processor that a normal process wants all of. With less, on a machine without idle time, Triton takes
the models of the build's own server for dead."""


def lower_priority() -> None:
    """Gives this process, and what it starts from now on, a low priority and half of the processors.

    ``LIBER_THREADS`` says how many threads a graph gets instead, if it is set.
    """
    threads = max(1, (os.cpu_count() or 1) // 2)
    os.environ.setdefault("LIBER_THREADS", str(threads))
    torch.set_num_threads(threads)
    os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
    # A session that others are in too, as that of a terminal, is not this command's to lower.
    if os.getsid(0) == os.getpid():
        share_priority(os.getpid())


def share_priority(leader: int) -> None:
    """Gives the session that the process `leader` leads the priority of this process.

    Where Linux divides the processors between sessions (``kernel.sched_autogroup_enabled``), the priority that a child
    inherits counts only within its own.
    """
    with contextlib.suppress(OSError):  # a system that does not
        Path(f"/proc/{leader}/autogroup").write_text(str(os.getpriority(os.PRIO_PROCESS, 0)))
