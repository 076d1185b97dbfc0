"""The knowledge of items: a text for each by the writer of the partitions, and its vector in the partitions' space."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from builders.datasets import Dataset
from builders.texts import encode_pairs, write_prompts
from liber_runtime.exceptions import InvalidInputError
from liber_runtime.interest import ItemPrompt
from liber_runtime.representation import Encoder
from liber_runtime.vocabulary import Vocabulary
from liber_runtime.writers import Writer


def write_items(dataset: Dataset, writer: Writer, directory: Path) -> dict[str, str]:
    """Has every item of the catalogue described, once each: an interrupted run goes on where it was.

    Nothing of the behaviors is in the prompts, so the texts of items that only the test part names are no leak.

    Args:
        dataset: its catalogue.
        writer: that of the partitions' texts.
        directory: keeps the answers, see `builders.texts.write_prompts`.

    Returns:
        The texts by item id.

    Raises:
        LiberError: the writer gave no usable answer.
    """
    prompts = (ItemPrompt(dataset.domain, item) for item in dataset.items.values())
    texts = write_prompts("write items", prompts, len(dataset.items), writer, directory)
    return dict(zip(dataset.items, texts, strict=True))


def embed_items(texts: Mapping[str, str], vocabulary: Vocabulary, encoder: Encoder) -> npt.NDArray[np.float32]:
    """The items' vectors, made as those of the partitions are: an item's text is a summary without a shift.

    Args:
        texts: of `write_items`.
        vocabulary: whose item indices name the rows.
        encoder: encoder and PCA of the partitions' vectors.

    Returns:
        float32[I+1, d] in the order of the item indices; zeros in row 0 and for items without a text.

    Raises:
        InvalidInputError: no item of the vocabulary has a text, or the encoder's answer is unusable.
        ScoringError: the encoding server refused.
    """
    known = [item_id for item_id in vocabulary.items if item_id in texts]
    if not known:
        raise InvalidInputError(
            f"none of the vocabulary's {len(vocabulary.items)} items has a text, so their knowledge cannot be read; "
            "bring an item table with the log"
        )
    vectors = encode_pairs("encode items", [(texts[item_id], "") for item_id in known], encoder)
    table = np.zeros((len(vocabulary.items) + 1, vectors.shape[1]), dtype=np.float32)
    table[vocabulary.item_indices(known)] = vectors
    return table
