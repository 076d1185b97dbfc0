"""A tiny Llama with random weights, as a checkpoint directory that transformers loads: what tests of LLMs share."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

LLAMA_TOKENIZER = "LIBER_LLAMA_TOKENIZER"
"""Names the directory with Llama 2's own ``tokenizer.model``; without it the tests train a tokenizer of their own."""

_SPECIAL = ("<unk>", "<s>", "</s>")
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_SPACE = "▁"

Pair = tuple[str, str]


def make_tiny_llama(
    directory: Path, seed: int = 0, hidden_size: int = 32, layers: int = 2, positions: int = 4096, heads: int = 2
) -> Path:
    """Writes config, ``model.safetensors`` and tokenizer files; under greedy decoding it soon goes round in a loop.

    Sample it with temperature 1 and a seed for answers that differ; they are words in no order, seldom with an end.
    """
    import torch
    import transformers

    tokenizer = make_llama_tokenizer(directory)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=positions,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def make_llama_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Writes ``tokenizer.json`` and its config (and Llama 2's ``tokenizer.model``, if there is one); returns it."""
    import transformers

    named = os.environ.get(LLAMA_TOKENIZER)
    vocabulary, merges = _read_pieces(Path(named) / "tokenizer.model") if named else _train()
    if named:
        shutil.copy2(Path(named) / "tokenizer.model", directory)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_like_llama(vocabulary, merges),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(directory)
    return tokenizer


def _like_llama(vocabulary: dict[str, int], merges: list[Pair]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return tokenizer


def _read_pieces(file: Path) -> tuple[dict[str, int], list[Pair]]:
    """Pieces and merges of a SentencePiece BPE model; a merge is tried the sooner, the higher its piece's score."""
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(file))
    vocabulary = {pieces.id_to_piece(number): number for number in range(len(pieces))}
    learned = [piece for piece in vocabulary if piece not in _SPECIAL and piece not in _BYTES]
    learned.sort(key=lambda piece: -pieces.get_score(vocabulary[piece]))
    return vocabulary, [pair for piece in learned for pair in _halves(piece, vocabulary)]


def _halves(piece: str, vocabulary: dict[str, int]) -> list[Pair]:
    pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
    known = [(left, right) for left, right in pairs if left in vocabulary and right in vocabulary]
    return sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))


def _train() -> tuple[dict[str, int], list[Pair]]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    sentences = [
        "The user loves comedies and dramas, dislikes horror, and rates musicals with four stars out of five.",
        "Summarize the preferences of this user: favorite genres, years and directors, in a few short sentences.",
        "Compared with before, the interest in action movies has risen; that in romance and adventure is gone.",
        "Based on the history, would the user like the next movie? Answer yes or no. Yes. No.",
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(sentences * 4, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    trained = json.loads(tokenizer.to_str())["model"]
    printable = [chr(code) for code in range(33, 127)]
    pieces = dict.fromkeys(
        (*_SPECIAL, *_BYTES, _SPACE, *printable, *sorted(trained["vocab"], key=trained["vocab"].get))
    )
    return {piece: number for number, piece in enumerate(pieces)}, [tuple(merge) for merge in trained["merges"]]
