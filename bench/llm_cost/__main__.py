"""``python -m bench.llm_cost``."""

from __future__ import annotations

from bench.environment import run_command
from bench.llm_cost import main

run_command(main)
