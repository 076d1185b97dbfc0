"""What runs inside Triton, without Triton: a real store, real graphs, a real tokenizer."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from model_harness import make_statistics

from builders.encoder import PooledEncoder, _load
from builders.export import export_backbone, export_fuser
from builders.models import make_backbone
from builders.models.backbone import Ranker
from builders.models.features import FeatureEmbedding, Inputs
from builders.models.functions import pad_partitions
from builders.models.fuser import AttentionFuser, Fuser, MeanFuser
from builders.models.numbers import Numbers
from builders.pca import fingerprint, fit_pca
from liber_runtime.behavior import Behavior, Domain, Item
from liber_runtime.bundle import BACKBONE, FUSER, PCA, EncoderSpec, Manifest
from liber_runtime.exceptions import ConfigurationError, InvalidInputError, StoreError
from liber_runtime.memory import MemoryStore, open_store
from liber_runtime.memory.sqlite import SQLiteStore
from liber_runtime.representation import Encoded
from liber_runtime.served.backend import Gathered
from liber_runtime.served.encoding import EncoderModel, ProjectionModel, TokenizerModel
from liber_runtime.served.folding import USERS_TOGETHER, AttentionFuserModel, BackboneModel
from liber_runtime.served.session import OnnxSession
from liber_runtime.served.user_memory import UserMemoryModel, check
from liber_runtime.settings import Settings
from liber_runtime.vocabulary import Field, Vocabulary
from liber_runtime.worker import Worker
from liber_runtime.writers.statistical import StatisticalWriter

D, T, LOOKBACK = 4, 6, 15

FEEDBACK = Field(name="feedback", kind="number", boundaries=(1.5, 2.5, 3.5, 4.5))
VOCABULARY = Vocabulary(
    items=tuple(f"i{number}" for number in range(30)),
    user_fields=(Field(name="gender", kind="category", values=("female", "male")),),
    item_fields=(),
    feedback=FEEDBACK,
)
DOMAIN = Domain("films", "movie", "stars", (1, 5), 3, ("genre",))


def manifest(fingerprint: str = "abc", lookback: int = T, fused: bool = True) -> Manifest:
    return Manifest(
        format=1,
        bundle_id="b",
        created_at="2026-01-01",
        domain="films",
        encoder=EncoderSpec(name="e", digest="d", embedding_size=8, max_tokens=16, start_id=2, end_id=3, pad_id=0),
        fingerprint=fingerprint,
        dimension=D,
        history_length=T,
        lookback=lookback,
        fusion="matched",
        fused=fused,
        precision="fp32",
        max_partitions=3,
        backbone="DIEN",
        writers=("statistical",),
        seed=1,
        digests={},
    )


def request(users: list[bytes], items: list[bytes], index: list[int]) -> dict[str, np.ndarray]:
    return {
        "user_id": np.array([users], dtype=np.object_).reshape(1, len(users)),
        "item_id": np.array([items], dtype=np.object_).reshape(1, len(items)),
        "user_index": np.array([index], dtype=np.int32).reshape(1, len(index)),
    }


class ConstantEncoder:
    """Vectors that tell their order: the number of texts encoded before."""

    def __init__(self, fingerprint: str) -> None:
        self._fingerprint = fingerprint
        self._count = 0

    async def fingerprint(self) -> str:
        return self._fingerprint

    async def encode(self, texts: Sequence[tuple[str, str]]) -> Encoded:
        rows = [[float(self._count + place)] * D for place in range(len(texts))]
        self._count += len(rows)
        return Encoded(np.array(rows, dtype=np.float32), self._fingerprint)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MemoryStore]:
    memory = open_store(f"sqlite:///{tmp_path / 'memory.db'}")
    memory.describe(
        DOMAIN,
        [Item(item, f"Film {item}") for item in VOCABULARY.items],
        {"long": {"gender": "male"}, "short": {"gender": "none"}},
    )
    memory.append([Behavior("long", f"i{n % 30}", 1.0 + n % 5, float(n), f"e{n}") for n in range(105)])
    memory.append([Behavior("short", "i1", 5.0, 1.0), Behavior("short", "elsewhere", 2.0, 2.0)])
    yield memory
    memory.close()


@pytest.fixture
async def encoded(store: MemoryStore) -> MemoryStore:
    await Worker(store, StatisticalWriter(), ConstantEncoder("abc")).drain()
    return store


def make_step(store: MemoryStore, lookback: int = T, kernels: str = "auto") -> UserMemoryModel:
    return UserMemoryModel(store, VOCABULARY, manifest(lookback=lookback), Settings(kernels=kernels))


def test_without_fusion_no_vectors_are_read_whoever_made_them(encoded: MemoryStore) -> None:
    asked = request([b"long", b"short"], [b"i3"], [0])
    (full,) = make_step(encoded).run([asked])
    assert isinstance(full, dict)
    for maker in ("abc", "unheard of"):
        model = UserMemoryModel(encoded, VOCABULARY, manifest(maker, fused=False), Settings())
        (plain,) = model.run([asked])
        assert isinstance(plain, dict)
        assert set(full) - set(plain) == {name for name in full if name.startswith(("representations", "partition_"))}
        for name, array in plain.items():
            np.testing.assert_array_equal(array, full[name])


def test_user_memory_maps_what_the_store_holds(encoded: MemoryStore) -> None:
    (outcome,) = make_step(encoded).run([request([b"long", b"short"], [b"i3", b"new", b"i0"], [0, 1, 0])])
    assert isinstance(outcome, dict)
    assert outcome["item_index"].tolist() == [[4, 0, 1]]
    assert outcome["item_known"].tolist() == [[True, False, True]]
    assert outcome["user_known"].tolist() == [[True, True]]
    assert outcome["history_length"].tolist() == [[T, 2]]
    assert outcome["history_item"][0, 0].tolist() == [n % 30 + 1 for n in range(99, 105)]
    assert outcome["history_item"][0, 1].tolist() == [2, 0, 0, 0, 0, 0]
    assert outcome["history_feedback"][0, 1].tolist() == [5, 2, 0, 0, 0, 0]
    assert outcome["profile"].tolist() == [[[2], [0]]]
    assert outcome["representations"].shape == (1, 3, D)
    assert outcome["partition_count"].tolist() == [[3, 0]]


def test_a_history_is_as_long_as_the_bundle_looks_back_whatever_its_backbone_reads(encoded: MemoryStore) -> None:
    model = make_step(encoded, lookback=LOOKBACK)
    (outcome,) = model.run([request([b"long", b"short", b"nobody"], [b"i3"], [0])])
    assert isinstance(outcome, dict)
    assert outcome["history_length"].tolist() == [[LOOKBACK, 2, 0]]
    assert outcome["history_item"].shape == outcome["history_feedback"].shape == (1, 3, LOOKBACK)
    assert outcome["history_item"][0, 0].tolist() == [n % 30 + 1 for n in range(105 - LOOKBACK, 105)]
    assert outcome["history_feedback"][0, 0].tolist() == [n % 5 + 1 for n in range(105 - LOOKBACK, 105)]
    assert outcome["history_item"][0, 1].tolist() == [2] + [0] * (LOOKBACK - 1)
    assert not outcome["history_item"][0, 2].any()


def test_a_user_of_whom_nothing_is_held_is_empty_not_an_error(encoded: MemoryStore) -> None:
    (outcome,) = make_step(encoded).run([request([b"nobody"], [b"i3"], [0])])
    assert isinstance(outcome, dict)
    assert outcome["user_known"].tolist() == [[False]]
    assert outcome["history_length"].tolist() == [[0]]
    assert outcome["partition_count"].tolist() == [[0]]
    assert outcome["representations"].tolist() == [[[0] * D]]


def test_a_bad_request_leaves_the_others_of_its_batch_alone(encoded: MemoryStore) -> None:
    good = request([b"long"], [b"i3"], [0])
    first, second, third = make_step(encoded).run([good, request([b"long"], [b"i3"], [7]), good])
    assert isinstance(second, InvalidInputError)
    assert isinstance(first, dict)
    assert isinstance(third, dict)
    assert all(np.array_equal(first[name], third[name]) for name in first)


def test_vectors_of_another_encoder_are_refused(encoded: MemoryStore) -> None:
    step = UserMemoryModel(encoded, VOCABULARY, manifest("other"), Settings())
    refused, unaffected = step.run([request([b"long"], [b"i3"], [0]), request([b"short"], [b"i3"], [0])])
    assert isinstance(refused, ConfigurationError)
    assert "user 'long'" in str(refused)
    assert "abc" in str(refused)
    assert "this bundle reads other" in str(refused)
    assert isinstance(unaffected, dict)


def test_kernels_map_what_the_vocabulary_maps(encoded: MemoryStore) -> None:
    encoded.append(
        [Behavior("odd", item, n / 2, float(n)) for n, item in enumerate(["i1", "映画", "i", "i29 ", "i29"])]
    )
    users = [b"nobody", b"long", b"short", b"odd", b"long\nshort"]
    items = [b"i3", b"new", "映画".encode(), b"i3\ni4", b"i29", b"i30"]
    for lookback in (1, T, 104, 500):
        asked = [
            request(users, items, [0] * 6),
            request(users[::-1], items[:1], [4]),
            request([b"nobody"], items, [0] * 6),
        ]
        compiled = make_step(encoded, lookback).run(asked)
        interpreted = make_step(encoded, lookback, kernels="none").run(asked)
        for first, second in zip(compiled, interpreted, strict=True):
            assert isinstance(first, dict)
            assert isinstance(second, dict)
            for name, array in second.items():
                assert first[name].dtype == array.dtype
                np.testing.assert_array_equal(first[name], array)


def test_ids_travel_one_by_one_or_in_lines(encoded: MemoryStore) -> None:
    model = make_step(encoded)
    apart = request([b"long", b"short"], [b"i3", b"new"], [1, 0])
    lines = {**request([b"long\nshort"], [b"i3\nnew"], []), "user_index": apart["user_index"]}
    first, second = model.run([apart, lines])
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ([[1, 2, float("nan"), 4]], "a vector of user 'bad one' in the store holds NaN or infinity; make them again"),
        (
            [[1] * 4, [float("-inf")] * 4],
            "holds NaN or infinity; make them again with `liber rewrite --user 'bad one'`",
        ),
        ([[1] * 8], "the store's vectors of user 'bad one' have 8 numbers, this bundle reads 4; make them again"),
        ([[1] * 8, [1] * 4], "the store's vectors of user 'bad one' are not of one size; make them again"),
    ],
)
def test_a_user_with_an_unusable_vector_is_named_and_not_scored(
    encoded: MemoryStore, vectors: list[list[float]], message: str
) -> None:
    """No store takes such vectors: they are written behind its back."""
    assert isinstance(encoded, SQLiteStore)
    encoded.append([Behavior("bad one", f"i{n}", 3.0, float(n)) for n in range(40)])
    rows = [(number, np.array(vector, "<f4").tobytes()) for number, vector in enumerate(vectors, 1)]
    encoded._file.write(
        lambda db: db.executemany(
            "INSERT INTO representations SELECT user, 1, ?, ? FROM users WHERE user_id = 'bad one'", rows
        )
    )
    good = request([b"long"], [b"i3"], [0])
    first, bad, last = make_step(encoded).run([good, request([b"short", b"bad one"], [b"i3"], [0]), good])
    assert isinstance(bad, StoreError)
    assert message in str(bad)
    assert isinstance(first, dict)
    assert isinstance(last, dict)


def test_users_of_whom_more_is_held_than_is_looked_back_are_counted(encoded: MemoryStore) -> None:
    counted: Counter[str] = Counter()
    for lookback, more in ((T, 2), (105, 0), (104, 1)):
        encoded.append([Behavior("other", f"i{n}", 3.0, float(n)) for n in range(T + 1)])
        model = UserMemoryModel(encoded, VOCABULARY, manifest(lookback=lookback), Settings(), counted.update)
        model.run([request([b"long", b"short"], [b"i3"], [0]), request([b"other", b"long", b"nobody"], [b"i3"], [0])])
        assert counted["liber_histories_truncated_total"] == more
        counted.clear()


@pytest.mark.parametrize("kernels", ["auto", "none"])
def test_users_and_candidates_are_counted_and_those_not_known(encoded: MemoryStore, kernels: str) -> None:
    counted: Counter[str] = Counter()
    model = UserMemoryModel(encoded, VOCABULARY, manifest(), Settings(kernels=kernels), counted.update)
    model.warm_up()
    assert not counted
    refused = request([b"long"], [b"i3"], [1])
    model.run(
        [
            request([b"long", b"nobody"], [b"i3", b"new", b"i4"], [0, 1, 0]),
            refused,
            request([b"nobody", b"long", b"short"], [b"new"], [2]),
        ]
    )
    assert counted == {
        "liber_scored_users_total": 5,
        "liber_unknown_users_total": 2,
        "liber_scored_candidates_total": 4,
        "liber_unknown_candidates_total": 2,
        "liber_histories_truncated_total": 1,
    }


def test_amounts_are_handed_on_together_and_the_last_at_the_end() -> None:
    handed: list[tuple[str, int]] = []
    gathered = Gathered(lambda name, amount: handed.append((name, amount)), seconds=0.001)
    threads = [threading.Thread(target=lambda: [gathered.add({"a": 1, "b": 0}) for _ in range(500)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gathered.close()
    assert sum(amount for name, amount in handed if name == "a") == 2000
    assert {name for name, _ in handed} == {"a"}
    late: list[tuple[str, int]] = []
    patient = Gathered(lambda name, amount: late.append((name, amount)), seconds=3600.0)
    patient.add({"a": 2})
    patient.add({"a": 3})
    patient.close()
    assert late == [("a", 5)]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (request([b"u"], [], []), "1 users and 0 candidates"),
        (request([], [b"i"], [0]), "0 users and 1 candidates"),
        (request([b"u"], [b"i"] * 11, [0] * 11), "11 candidates in one request; the limit is 10"),
        (request([b"u"] * 6, [b"i"], [0]), "6 users in one request; the limit is 5"),
        (request([b"u"], [b"i", b"j"], [0]), "user_index has 1 entries for 2 candidates"),
        (request([b"a\nb\nc\nd\ne\nf"], [b"i"], [0]), "6 users in one request; the limit is 5"),
        (request([b"u", b"v"], [b"i"], [2]), r"user_index\[0\] is 2; with 2 users it must lie in 0..1"),
        (request([b"u"], [b"i"], [-1]), r"user_index\[0\] is -1"),
        (request([b"\xff\xfe"], [b"i"], [0]), r"user_id\[0\] is b'\\xff\\xfe', which is not UTF-8"),
        (request([b"u"], [b"i", b"\xc3("], [0, 0]), r"item_id\[1\] is b'\\xc3\(', which is not UTF-8"),
    ],
)
def test_unusable_requests_are_named(tensors: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        check(tensors, Settings(max_users=5, max_candidates=10))


def make_ranker(lookback: int, interest_size: int = D) -> Ranker:
    torch.manual_seed(0)
    table = np.arange(len(VOCABULARY.items) + 1, dtype=np.int32)[:, np.newaxis]
    features = FeatureEmbedding(
        VOCABULARY,
        table,
        Numbers(make_statistics(len(VOCABULARY.items)), T),
        history_length=T,
        lookback=lookback,
        embedding_dim=4,
        interest_size=interest_size,
    )
    fuser = AttentionFuser(D) if interest_size else None
    return Ranker(features, make_backbone("DIEN", features.schema), fuser).eval()


@pytest.fixture(scope="module", params=[T, LOOKBACK], ids=["reads-all", "looks-back"])
def graphs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Ranker, Path]:
    """A trained model and what is served of it, with and without a history longer than its backbone reads."""
    directory = tmp_path_factory.mktemp("graphs")
    model = make_ranker(request.param)
    assert model.fuser is not None
    export_fuser(model.fuser, directory / FUSER)
    export_backbone(model, directory / BACKBONE)
    return model, directory


def test_a_backbone_without_liber_asks_for_no_interest(tmp_path: Path) -> None:
    export_backbone(make_ranker(T, interest_size=0), tmp_path / BACKBONE)
    assert "interest" not in BackboneModel.load(tmp_path).inputs


def score(memory: UserMemoryModel, graphs: Path, requests: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
    """The three steps of the ensemble."""
    tensors = memory.run(requests)
    interest = AttentionFuserModel.load(graphs).run(tensors)
    merged = [
        {**read, **fused, "user_index": sent["user_index"]}
        for read, fused, sent in zip(tensors, interest, requests, strict=True)
    ]
    return [outcome["click_probability"] for outcome in BackboneModel.load(graphs).run(merged)]


def test_merged_requests_are_answered_as_if_alone(encoded: MemoryStore, graphs: tuple[Ranker, Path]) -> None:
    batch = [
        request([b"long", b"short"], [b"i3", b"i4", b"i0"], [0, 1, 0]),
        request([b"nobody"], [b"i7"], [0]),
        request([b"short", b"long"], [b"i9"] * 4, [1, 1, 0, 0]),
    ]
    model, directory = graphs
    memory = make_step(encoded, model.features.lookback)
    together = score(memory, directory, batch)
    alone = [score(memory, directory, [each])[0] for each in batch]
    assert [answer.shape for answer in together] == [(1, 3), (1, 1), (1, 4)]
    for merged, single in zip(together, alone, strict=True):
        np.testing.assert_allclose(merged, single, atol=1e-6)


def test_what_is_served_is_what_the_trained_model_says(encoded: MemoryStore, graphs: tuple[Ranker, Path]) -> None:
    model, directory = graphs
    memory = make_step(encoded, model.features.lookback)
    sent = request([b"long", b"short", b"nobody"], [b"i3", b"i4", b"new"] * 3, [0, 0, 0, 1, 1, 1, 2, 2, 2])
    (served,) = score(memory, directory, [sent])
    (read,) = memory.run([sent])
    assert isinstance(read, dict)
    tensors = {name: torch.from_numpy(array[0]) for name, array in {**read, **sent}.items() if array.dtype != object}
    inputs = Inputs(**{name: tensors[name] for name in Inputs._fields if name in tensors})
    with torch.inference_mode():
        padded = pad_partitions(tensors["representations"], tensors["partition_count"])
        expected = model(inputs, *padded).sigmoid().numpy()
    np.testing.assert_allclose(served[0], expected, atol=1e-5)
    assert served.std() > 1e-4


@pytest.fixture(scope="module", params=[AttentionFuser, MeanFuser])
def fuser(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Fuser, Path]:
    torch.manual_seed(0)
    model, directory = request.param(D), tmp_path_factory.mktemp("fuser")
    export_fuser(model, directory / FUSER)
    return model, directory


@pytest.mark.parametrize("sizes", [[1], [3, 1, 200], [USERS_TOGETHER, USERS_TOGETHER + 1]])
@pytest.mark.parametrize("most", [0, 1, 40])
@pytest.mark.parametrize("kernels", ["auto", "none"])
def test_users_fused_together_are_fused_as_one_by_one(
    fuser: tuple[Fuser, Path], sizes: list[int], most: int, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, directory = fuser
    monkeypatch.setenv("LIBER_KERNELS", kernels)
    random = np.random.default_rng(most)
    counts = [random.integers(most + 1, size=(1, size)).astype(np.int32) for size in sizes]
    batch = [
        {"representations": random.normal(size=(1, count.sum() or 1, D)).astype(np.float32), "partition_count": count}
        for count in counts
    ]
    outcomes = AttentionFuserModel.load(directory).run(batch)
    for tensors, outcome in zip(batch, outcomes, strict=True):
        assert isinstance(outcome, dict)
        (count,) = tensors["partition_count"]
        parts = np.split(tensors["representations"][0], np.cumsum(count))[: len(count)]
        with torch.inference_mode():
            alone = [model(torch.from_numpy(part[None]), torch.ones(1, len(part), dtype=torch.bool)) for part in parts]
        np.testing.assert_allclose(outcome["interest"][0], torch.cat(alone).numpy(), atol=1e-5)


def texts(*pairs: tuple[str, str]) -> dict[str, np.ndarray]:
    summaries, shifts = zip(*pairs, strict=True)
    return {
        "summary": np.array([text.encode() for text in summaries], dtype=np.object_),
        "shift": np.array([text.encode() for text in shifts], dtype=np.object_),
    }


def embed(exported_encoder: Path, *pairs: tuple[str, str]) -> np.ndarray:
    (tokens,) = TokenizerModel.load(exported_encoder).run([texts(*pairs)])
    assert isinstance(tokens, dict)
    (embedding,) = EncoderModel.load(exported_encoder).run([tokens])
    assert isinstance(embedding, dict)
    return embedding["text_embedding"]


def test_long_texts_are_read_in_chunks_of_at_most_the_encoders_length(exported_encoder: Path) -> None:
    long = "level average stars liked " * 100
    (tokens,) = TokenizerModel.load(exported_encoder).run([texts((long, "new"), ("liked", ""))])
    assert isinstance(tokens, dict)
    spec = EncoderSpec.load(exported_encoder)
    assert tokens["input_ids"].shape[1] == spec.max_tokens == 64
    assert tokens["chunk_owner"].tolist() == [0] * 7 + [1]
    lengths = tokens["attention_mask"].sum(axis=1)
    assert lengths.sum() == 400 + 1 + 1 + 1 + 2 * 8
    assert (tokens["input_ids"][:, 0] == spec.start_id).all()
    assert all(row[length - 1] == spec.end_id for row, length in zip(tokens["input_ids"], lengths, strict=True))


def test_embedding_is_the_masked_mean_over_all_chunks(exported_encoder: Path, tiny_bert: Path) -> None:
    long, shift = "level average stars liked " * 40, "new gone risen"
    pooled = embed(exported_encoder, (long, shift), ("liked", ""))
    bert, tokenizer = _load(str(tiny_bert))
    spec = EncoderSpec.load(exported_encoder)

    def states_of(ids: list[int]) -> torch.Tensor:
        room = spec.max_tokens - 2
        states = [
            bert(torch.tensor([[spec.start_id, *ids[start : start + room], spec.end_id]])).last_hidden_state[0]
            for start in range(0, len(ids), room)
        ]
        return torch.cat(states)

    summary_ids, shift_ids, short_ids = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (long, shift, "liked")
    )
    with torch.inference_mode():
        first = states_of([*summary_ids, spec.end_id, *shift_ids]).mean(0).numpy()
        second = states_of(short_ids).mean(0).numpy()
    np.testing.assert_allclose(pooled, np.stack([first, second]), atol=1e-5)


def test_neighbours_and_padding_do_not_change_an_embedding(exported_encoder: Path) -> None:
    pair = ("level liked", "new gone")
    alone = embed(exported_encoder, pair)[0]
    beside = embed(exported_encoder, ("average stars " * 60, "risen"), pair, ("", ""))[1]
    np.testing.assert_allclose(alone, beside, atol=1e-5)


def test_empty_texts_have_an_embedding(exported_encoder: Path) -> None:
    assert np.isfinite(embed(exported_encoder, ("", ""))).all()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (texts(("a", "b")) | {"shift": np.array([], dtype=np.object_)}, "1 summaries and 0 shifts"),
        (texts(("a", "b")) | {"summary": np.array([b"\xff"], dtype=np.object_)}, r"summary\[0\] is not UTF-8"),
    ],
)
def test_unusable_texts_are_named(exported_encoder: Path, tensors: dict[str, np.ndarray], message: str) -> None:
    (outcome,) = TokenizerModel.load(exported_encoder).run([tensors])
    assert isinstance(outcome, InvalidInputError)
    assert re.search(message, str(outcome))


def test_projection_is_the_fitted_pca_and_names_it(tmp_path: Path, exported_encoder: Path) -> None:
    random = np.random.default_rng(0)
    rows = (random.normal(size=(200, 3)) @ random.normal(size=(3, 32)) + 5).astype(np.float32)
    fit_pca(rows, 3, tmp_path / PCA)
    mark = fingerprint(EncoderSpec.load(exported_encoder), tmp_path / PCA)
    (outcome,) = ProjectionModel(OnnxSession(tmp_path / PCA, threads=1), mark).run([{"text_embedding": rows}])
    assert isinstance(outcome, dict)
    projected = outcome["representation"]
    assert outcome["fingerprint"].tolist() == [mark.encode()]
    assert projected.var(axis=0).mean() == pytest.approx(1, rel=1e-3)
    np.testing.assert_allclose(projected.mean(axis=0), 0, atol=1e-3)
    assert np.abs(np.corrcoef(projected.T) - np.eye(3)).max() < 1e-2
    # Three directions hold all there is: distances survive, up to the one scale.
    ratio = np.linalg.norm(rows[1:] - rows[0], axis=1) / np.linalg.norm(projected[1:] - projected[0], axis=1)
    assert ratio.std() / ratio.mean() < 1e-3


def test_a_pooled_encoder_averages_what_belongs_together(tiny_bert: Path) -> None:
    bert, _ = _load(str(tiny_bert))
    encoder = PooledEncoder(bert)
    ids = torch.randint(5, 40, (2, 6))
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    with torch.inference_mode():
        together = encoder(ids, mask, torch.tensor([0, 0]))[0]
        apart = encoder(ids, mask, torch.tensor([0, 1]))
    torch.testing.assert_close(together, (6 * apart[0] + 3 * apart[1]) / 9)


async def test_a_bundle_reads_the_vectors_of_its_own_encoding_and_no_others(encoded: MemoryStore) -> None:
    encoded.encode_by({"abc", "other"})
    models = [UserMemoryModel(encoded, VOCABULARY, manifest(name), Settings()) for name in ("abc", "other")]

    def read(model: UserMemoryModel) -> tuple[list[float], int]:
        (outcome,) = model.run([request([b"long"], [b"i3"], [0])])
        assert isinstance(outcome, dict)
        return outcome["representations"][0, :, 0].tolist(), int(outcome["partition_count"][0, 0])

    # Wanted and not made yet: there is nothing, which is no reason to refuse.
    before = read(models[0])
    assert before[1] == 3
    assert read(models[1]) == ([0.0], 0)
    encoder = ConstantEncoder("other")
    await encoder.encode([("", "")] * 100)
    await Worker(encoded, None, encoder).drain()
    assert read(models[0]) == before
    assert read(models[1])[1] == 3
    assert min(read(models[1])[0]) >= 100
    # After the switch, what is on its way to the bundle before is still answered.
    encoded.encode_by({"other"})
    assert read(models[0]) == before


def test_pending_partitions_do_not_hold_up_scoring(store: MemoryStore) -> None:
    assert store.statistics().pending["summary"] == 5
    (outcome,) = make_step(store).run([request([b"long"], [b"i3"], [0])])
    assert isinstance(outcome, dict)
    assert not outcome["partition_count"].any()
    assert outcome["history_length"].tolist() == [[T]]
