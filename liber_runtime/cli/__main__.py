"""``python -m liber_runtime.cli``."""

from liber_runtime.cli import main

main()
