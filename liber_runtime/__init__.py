"""LIBER's online side: memory, interest, representation, scoring and the Triton server that serves them."""

__version__ = "0.1.0"
