"""What the tests of models share: small features of random statistics, folded batches, and a graph of them in ONNX."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor, nn

from builders.models.features import FeatureEmbedding, Features, FeatureSchema, Inputs
from builders.models.meeting import Meeting, ProductMeeting
from builders.models.numbers import ItemStatistics, Numbers
from liber_runtime.vocabulary import Field, Vocabulary

T, D, ITEMS = 6, 4, 30
"""Steps of a history, size of the interest, items of the catalogue."""

EMBEDDING_DIM = 4
YEAR = Field(name="year", kind="number", boundaries=(1980.0, 1990.0))
GENRES = Field(name="genres", kind="categories", values=("a", "b", "c"), width=2)
AGE = Field(name="age", kind="number", boundaries=(20.0, 40.0))
SEX = Field(name="sex", kind="category", values=("F", "M"))
STARS = Field(name="stars", kind="number", boundaries=(1.5, 2.5, 3.5, 4.5))
ITEM_FIELDS, USER_FIELDS = (YEAR, GENRES), (AGE, SEX)


def make_vocabulary(
    item_fields: tuple[Field, ...] = ITEM_FIELDS, user_fields: tuple[Field, ...] = USER_FIELDS, items: int = ITEMS
) -> Vocabulary:
    return Vocabulary(
        items=tuple(f"i{number}" for number in range(1, items + 1)),
        user_fields=user_fields,
        item_fields=item_fields,
        feedback=STARS,
    )


def make_item_table(vocabulary: Vocabulary) -> npt.NDArray[np.int32]:
    """Random attributes; every item has an id embedding of its own."""
    generator, items = np.random.default_rng(0), len(vocabulary.items)
    columns = [np.arange(items + 1)]
    for field in vocabulary.item_fields:
        columns += list(generator.integers(0, field.size, (field.width, items + 1)))
    table = np.stack(columns, axis=1).astype(np.int32)
    table[0] = 0
    return table


def make_statistics(items: int = ITEMS, factors: int = 3, attributes: int = 5) -> ItemStatistics:
    """Random, of the sizes and the scale that fitted ones have; row 0 is that of an unknown item."""
    generator = np.random.default_rng(1)
    vectors = generator.normal(size=(items + 1, factors), scale=0.5)
    likeness = generator.normal(size=(items + 1, attributes))
    likeness /= np.linalg.norm(likeness, axis=1, keepdims=True)
    mean, count = generator.normal(size=items + 1, scale=0.5), generator.integers(1, 100, items + 1)
    for table in (vectors, likeness, mean, count):
        table[0] = 0
    similarity = generator.normal(size=(items + 1, 4), scale=0.3)
    similarity[0] = 0
    return ItemStatistics(
        level=3.5,
        feedback=np.array([3.5, *range(1, STARS.size)], dtype=np.float32),
        mean=mean.astype(np.float32),
        count=count.astype(np.float32),
        vectors=vectors.astype(np.float32),
        similarity=similarity.astype(np.float32),
        attributes=likeness.astype(np.float32),
        noise=0.8,
        bias=0.2,
    )


def make_features_module(
    *,
    item_fields: tuple[Field, ...] = ITEM_FIELDS,
    user_fields: tuple[Field, ...] = USER_FIELDS,
    interest_size: int = D,
    meeting: bool | Meeting = False,
    items: int = ITEMS,
    history_length: int = T,
    embedding_dim: int = EMBEDDING_DIM,
    embedding_scale: float = 1.0,
    seed: int = 0,
    **options: float,
) -> FeatureEmbedding:
    """Features in eval mode, with large embeddings: fresh ones are so small that a wrong gather would hide.

    Args:
        item_fields: attributes of an item.
        user_fields: attributes of a user.
        interest_size: d; 0 for features without an interest.
        meeting: how the interest meets knowledge of the items, random here; True for their product, False if not.
        items: of the catalogue.
        history_length: T.
        embedding_dim: E.
        embedding_scale: standard deviation of the embeddings.
        seed: of all weights.
        options: more keyword arguments of `FeatureEmbedding`, e.g. ``dropout`` or ``lookback``.
    """
    torch.manual_seed(seed)
    vocabulary = make_vocabulary(item_fields, user_fields, items)
    knowledge = np.random.default_rng(2).normal(size=(items + 1, interest_size)).astype(np.float32)
    features = FeatureEmbedding(
        vocabulary,
        make_item_table(vocabulary),
        Numbers(make_statistics(items), history_length),
        history_length=history_length,
        embedding_dim=embedding_dim,
        interest_size=interest_size,
        meeting=(ProductMeeting(interest_size, embedding_dim) if meeting is True else meeting) or None,
        item_knowledge=knowledge if meeting else None,
        **options,
    )
    for name, parameter in features.named_parameters():
        if "table" in name:
            nn.init.normal_(parameter, std=embedding_scale)
    return features.eval()


def draw_inputs(
    features: FeatureEmbedding, users: int, candidates: int | None = None, *, history: str = "mixed", seed: int = 0
) -> Inputs:
    """A random folded batch, its histories as long as the features look back.

    Args:
        features: that are to read it.
        users: U.
        candidates: N, each of a random user; None for one of each user in order, as in training (`user_index` is None).
        history: ``empty``, ``full``, or ``mixed``: any lengths, the first user's full, the last's of several empty.
        seed: of all draws.
    """
    generator = torch.Generator().manual_seed(seed)
    steps, items = features.lookback, features.num_items

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, dtype=torch.int32)

    length = integers(steps + 1, users)
    if history == "mixed":
        length[-1], length[0] = 0, steps
    else:
        length[:] = {"empty": 0, "full": steps}[history]
    real = torch.arange(steps) < length[:, None]
    return Inputs(
        item_index=integers(items, users if candidates is None else candidates),
        user_index=None if candidates is None else integers(users, candidates),
        history_item=integers(items, users, steps) * real,
        history_feedback=(1 + integers(features.feedback_size - 1, users, steps)) * real,
        history_length=length,
        profile=torch.cat([integers(size, users, 1) for size in features.profile_sizes] or [integers(1, users, 0)], 1),
        interest=torch.randn(users, features.interest_size, generator=generator) if features.interest_size else None,
    )


def unfold(inputs: Inputs) -> Inputs:
    """The same candidates with a row of the user for each, as in training."""
    assert inputs.user_index is not None
    index = inputs.user_index.long()
    rows = {
        name: getattr(inputs, name)[index]
        for name in ("history_item", "history_feedback", "history_length", "profile", "interest")
        if getattr(inputs, name) is not None
    }
    return inputs._replace(user_index=None, **rows)


def draw_features(
    schema: FeatureSchema, users: int, candidates: int | None = None, *, scale: float = 1.0, seed: int = 0
) -> Features:
    """Random features of a schema, without anything that embeds; arguments as in `draw_inputs`."""
    generator = torch.Generator().manual_seed(seed)
    rows, size = users if candidates is None else candidates, schema.embedding_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    length = torch.randint(schema.history_length + 1, (users,), generator=generator)
    length[-1], length[0] = 0, schema.history_length
    history = normal(schema.history_length, users, schema.step_size)
    real = torch.arange(schema.history_length)[:, None] < length
    return Features(
        candidate=normal(rows, len(schema.candidate), size),
        user=normal(users, len(schema.user), size),
        pair=normal(rows, len(schema.pair), size),
        numbers=normal(rows, len(schema.numbers)),
        history=history,
        history_mask=real,
        history_length=length,
        history_mean=(history * real.unsqueeze(-1)).sum(0) / length.clamp(min=1).unsqueeze(1),
        user_index=None if candidates is None else torch.randint(users, (rows,), generator=generator),
    )


class _Flat(nn.Module):
    """A model of `Inputs` as one of flat tensors, those that are None left out: what the tracing exporter takes."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *tensors: Tensor) -> Tensor:
        given: dict[str, Tensor | None] = dict.fromkeys(Inputs._fields)
        logits: Tensor = self.model(Inputs(**{**given, **dict(zip(self.names, tensors, strict=True))}))
        return logits


def export_flat(model: nn.Module, example: Inputs, path: Path) -> onnxruntime.InferenceSession:
    """Traces a model of `Inputs` -> float[N] and opens it, dynamic in users and candidates."""
    names = [name for name, tensor in example._asdict().items() if tensor is not None]
    axes = {name: {0: "candidates" if name in ("item_index", "user_index", "numbers") else "users"} for name in names}
    # The exporter puts a module back into the mode it had, children included; a fresh one is in training.
    flat = _Flat(model, names).train(model.training)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        # `ItemEmbedding` picks one of two equal ways by the size of the example.
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        torch.onnx.export(
            flat,
            tuple(tensor for tensor in example if tensor is not None),
            str(path),
            input_names=names,
            output_names=["logits"],
            dynamic_axes={**axes, "logits": {0: "candidates"}},
            opset_version=18,
            dynamo=False,
        )
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def run_flat(session: onnxruntime.InferenceSession, inputs: Inputs) -> npt.NDArray[np.float32]:
    """The logits of a graph of `export_flat`."""
    wanted = [entry.name for entry in session.get_inputs()]
    (logits,) = session.run(None, {name: getattr(inputs, name).numpy() for name in wanted})
    found: npt.NDArray[np.float32] = logits
    return found
