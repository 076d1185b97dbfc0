"""``python -m liber_runtime.cli``."""

from liber_runtime.cli import main

if __name__ == "__main__":
    main()
