"""What unit and integration tests share."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

# The models of the tests are small, and test processes share the processors: more threads would only wait for each
# other, for minutes in all. Before anything imports torch; processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

MadeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """Makes a directory by name, once for all the processes that share out the tests; not to be written to."""
    own = tmp_path_factory.getbasetemp()
    root = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (root / name).exists():
                building = root / f".{name}"
                # What a process left that ended in the middle.
                shutil.rmtree(building, ignore_errors=True)
                building.mkdir()
                fill(building)
                building.rename(root / name)
        return root / name

    return make


@pytest.fixture(scope="session")
def tiny_bert(made_once: MadeOnce) -> Path:
    """A random BERT with 2 layers and a word list of its own, as a checkpoint directory."""
    return made_once("tiny-bert", lambda directory: make_tiny_bert(directory, seed=0))


@pytest.fixture(scope="session")
def other_bert(made_once: MadeOnce) -> Path:
    """The same with other weights."""
    return made_once("other-bert", lambda directory: make_tiny_bert(directory, seed=1))


@pytest.fixture(scope="session")
def exported_encoder(made_once: MadeOnce, tiny_bert: Path) -> Path:
    """The directory that `tiny_bert` was exported into; not to be written to."""
    from builders.encoder import export_encoder

    return made_once("encoder", lambda directory: export_encoder(str(tiny_bert), directory))


@pytest.fixture(scope="session")
def tiny_llama(made_once: MadeOnce) -> Path:
    """A random Llama with 2 layers and a tokenizer, as a checkpoint directory."""
    from llama_harness import make_tiny_llama

    return made_once("tiny-llama", lambda directory: make_tiny_llama(directory))


def make_tiny_bert(directory: Path, seed: int) -> Path:
    # Imported here, so that the runtime's tests also run where only the runtime is installed.
    import tokenizers
    import torch
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,:;()\"'-"
    words += [*letters, *(f"##{letter}" for letter in letters)]
    words += ["level", "average", "stars", "liked", "loved", "mixed", "disliked", "favorites", "new", "gone", "risen"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    fast = transformers.BertTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
    )
    torch.manual_seed(seed)
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=len(words),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
        )
    )
    bert.save_pretrained(directory)
    fast.save_pretrained(directory)
    return directory
