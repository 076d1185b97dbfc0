"""What stands for a run in the processes of `bench.quality_cache`: light, for they import it afresh."""

from __future__ import annotations

from pathlib import Path

from bench.quality_cache import Run
from bench.quality_table import Result
from liber_runtime.exceptions import InvalidInputError


def result(backbone: str, variant: str, seed: int, auc: float, logloss: float = 0.5) -> Result:
    return Result(backbone, variant, seed, auc, logloss, auc - 0.01, logloss + 0.01, 5, 3, 1.5)


_notes: Path | None = None


def note_in(directory: Path) -> None:
    global _notes
    _notes = directory


def work_noting(run: Run, key: str) -> Result:
    """Stands for a run in the processes of `complete`; leaves a note of having been asked."""
    assert _notes is not None
    if run.seed == 13:
        raise InvalidInputError("thirteen is no seed")
    with (_notes / f"{run}.asked").open("a") as file:
        file.write("x")
    return result(*run, 0.8 + run.seed / 100)
