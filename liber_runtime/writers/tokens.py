"""Counts tokens as an LLM does, or a safe number of them where its tokenizer is not at hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from liber_runtime.exceptions import ConfigurationError

TokenCount: TypeAlias = Callable[[str], int]
"""How many tokens a text has, without those a server puts around it."""

BYTES_PER_TOKEN = 2
"""Of the estimate. English has about four bytes a token and lists of titles three, so two is on the safe side."""

_FILES = ("tokenizer.json", "tokenizer.model")


def estimated(text: str) -> int:
    """At least as many tokens as a common tokenizer makes of a text in a European language."""
    return -(-len(text.encode()) // BYTES_PER_TOKEN)


def counted_by(path: Path) -> TokenCount:
    """Counts with an LLM's own tokenizer.

    Args:
        path: ``tokenizer.json`` (the tokenizers library), ``tokenizer.model`` (SentencePiece, Llama 2's), or a
            directory with one of them.

    Raises:
        ConfigurationError: there is neither, it cannot be read, or the library for it is not installed.
    """
    file = next((path / name for name in _FILES if (path / name).is_file()), path) if path.is_dir() else path
    if not file.is_file():
        raise ConfigurationError(
            f"no tokenizer at {path}; give {' or '.join(_FILES)} of the LLM's checkpoint, or the directory they are in"
        )
    try:
        return _counted_by_pieces(file) if file.suffix == ".model" else _counted_by_tokenizers(file)
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"{file.name} needs {error.name}, which is not installed: pip install 'liber-runtime[llm]'"
        ) from None


def _counted_by_tokenizers(file: Path) -> TokenCount:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises Exception itself
        raise ConfigurationError(f"{file} is no tokenizer of the tokenizers library: {error}") from None
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def _counted_by_pieces(file: Path) -> TokenCount:
    from sentencepiece import SentencePieceProcessor

    try:
        processor = SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise ConfigurationError(f"{file} is no SentencePiece model: {str(error).splitlines()[0]}") from None
    return lambda text: len(processor.encode(text))
