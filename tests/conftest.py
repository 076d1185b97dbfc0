"""What unit and integration tests share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT with 2 layers and a word list of its own, as a checkpoint directory."""
    return make_tiny_bert(tmp_path_factory.mktemp("tiny-bert"), seed=0)


@pytest.fixture(scope="session")
def other_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with other weights."""
    return make_tiny_bert(tmp_path_factory.mktemp("other-bert"), seed=1)


@pytest.fixture(scope="session")
def exported_encoder(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    """The directory that `tiny_bert` was exported into; not to be written to."""
    from builders.encoder import export_encoder

    directory = tmp_path_factory.mktemp("encoder")
    export_encoder(str(tiny_bert), directory)
    return directory


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
