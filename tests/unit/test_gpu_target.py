"""A bundle published for NVIDIA's Triton: the same tensors, and graphs that give what the Python models give."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from google.protobuf import text_format
from onnx import TensorProto, helper
from test_bundle import make_bundle
from test_served import VOCABULARY, D, T, make_ranker
from tritonclient.grpc import model_config_pb2

from builders.bundle import write_bundle
from builders.export import export_backbone, export_fuser
from builders.models.fuser import AttentionFuser
from builders.onnx_backend import IR_VERSION, MODEL, OPSET, write_model
from builders.pca import fingerprint, fit_pca
from builders.repository import (
    BUNDLE_ENSEMBLES,
    DESCRIPTION,
    GRAPH_OF_MODEL,
    PARTS_OF_MODEL,
    deploy,
    publish,
    target_of,
)
from liber_runtime.bundle import BACKBONE, ENCODER, ENCODER_SPEC, FUSER, PCA, TABLES, TOKENIZER, EncoderSpec
from liber_runtime.bundle import VOCABULARY as VOCABULARY_PART
from liber_runtime.exceptions import ConfigurationError
from liber_runtime.served.backend import ServedModel, Tensors
from liber_runtime.served.encoding import EncoderModel, ProjectionModel
from liber_runtime.served.folding import AttentionFuserModel, BackboneModel
from liber_runtime.server.repository import models_to_load, read_config, read_configs, require_backends

MODELS: dict[str, type[AttentionFuserModel | BackboneModel | EncoderModel | ProjectionModel]] = {
    "attention_fuser": AttentionFuserModel,
    "ctr_backbone": BackboneModel,
    "bert_encoder": EncoderModel,
    "pca_projection": ProjectionModel,
}
PLATFORM = "onnxruntime_onnx"


@dataclasses.dataclass(frozen=True)
class Published:
    """One bundle in a repository of each target."""

    bundle: Path
    cpu: Path
    gpu: Path


def make_real_bundle(directory: Path, encoder: Path, fused: bool) -> Path:
    made = directory / "parts"
    made.mkdir()
    model = make_ranker(T, interest_size=D if fused else 0)
    export_backbone(model, made / BACKBONE)
    if isinstance(model.fuser, AttentionFuser):
        export_fuser(model.fuser, made / FUSER)
    spec = EncoderSpec.load(encoder)
    generator = np.random.default_rng(0)
    fit_pca(generator.normal(size=(64, spec.embedding_size)).astype(np.float32), D, made / PCA)
    (made / VOCABULARY_PART).write_text(VOCABULARY.model_dump_json())
    parts = {path.name: path for path in made.iterdir()}
    parts |= {name: encoder / name for name in (ENCODER, ENCODER_SPEC, TOKENIZER)}
    write_bundle(
        parts,
        directory / "bundle",
        domain="films",
        encoder=spec,
        fingerprint=fingerprint(spec, made / PCA),
        dimension=D,
        history_length=T,
        lookback=T,
        max_partitions=3,
        backbone="DIEN",
        fusion="paper" if fused else "none",
        writers=("statistical",),
        seed=1,
    )
    return directory / "bundle"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, exported_encoder: Path) -> dict[bool, Path]:
    """By whether it is fused."""
    return {
        fused: make_real_bundle(tmp_path_factory.mktemp("bundle"), exported_encoder, fused) for fused in (True, False)
    }


@pytest.fixture(scope="module", params=[True, False], ids=["fused", "plain"])
def published(
    tmp_path_factory: pytest.TempPathFactory, bundles: dict[bool, Path], request: pytest.FixtureRequest
) -> Published:
    directory = tmp_path_factory.mktemp("published")
    bundle = bundles[request.param]
    publish(bundle, directory / "cpu")
    publish(bundle, directory / "gpu", target="gpu")
    return Published(bundle, directory / "cpu", directory / "gpu")


def draw(model: str, users: int, candidates: int) -> dict[str, npt.NDArray[np.generic]]:
    """A request as the step before sends it."""
    random = np.random.default_rng(users)

    def draw_indices(high: int, *shape: int) -> npt.NDArray[np.int32]:
        return random.integers(high, size=(1, *shape), dtype=np.int32)

    length = draw_indices(T + 1, users)
    count = draw_indices(4, users)
    real = np.arange(T) < length[..., np.newaxis]
    rows = max(1, int(count.sum()))
    chunks = np.ones((2 * candidates, 9), dtype=np.int64)
    chunks[::2, 5:] = 0
    return {
        "attention_fuser": {
            "representations": random.normal(size=(1, rows, D)).astype(np.float32),
            "partition_count": count,
        },
        "ctr_backbone": {
            "item_index": draw_indices(len(VOCABULARY.items) + 1, candidates),
            "user_index": draw_indices(users, candidates),
            "history_item": draw_indices(len(VOCABULARY.items) + 1, users, T) * real,
            "history_feedback": draw_indices(6, users, T) * real,
            "history_length": length,
            "profile": draw_indices(3, users, 1),
            "interest": random.normal(size=(1, users, D)).astype(np.float32),
        },
        "bert_encoder": {
            "input_ids": random.integers(5, 40, size=chunks.shape) * chunks,
            "attention_mask": chunks,
            "chunk_owner": np.repeat(np.arange(candidates), 2),
        },
        "pca_projection": {
            "text_embedding": random.normal(size=(candidates, 32)).astype(np.float32),
        },
    }[model]


def load(model: str, repository: Path) -> ServedModel:
    return MODELS[model].load(repository / model / "1")


def run_graph(path: Path, tensors: Tensors) -> dict[str, npt.NDArray[np.generic]]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(tensors)), strict=True))


@pytest.mark.parametrize("kernels", ["none", "auto"])
@pytest.mark.parametrize("model", sorted(GRAPH_OF_MODEL))
def test_graphs_answer_as_the_python_models_do(
    published: Published, model: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly as their graphs, and as compiled kernels to rounding."""
    monkeypatch.setenv("LIBER_KERNELS", kernels)
    if not (published.cpu / model).exists():
        assert not (published.gpu / model).exists()
        return
    served = load(model, published.cpu)
    for users, candidates in ((1, 1), (1, 40), (7, 30)):
        request = {name: value for name, value in draw(model, users, candidates).items() if name in served.inputs}
        (expected,) = served.run([request])
        assert isinstance(expected, dict)
        found = run_graph(published.gpu / model / "1" / MODEL, request)
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            if name == "fingerprint":
                assert found[name].tolist() == [value.decode() for value in array]
                continue
            assert found[name].dtype == array.dtype
            np.testing.assert_allclose(found[name], array, rtol=0, atol=0 if kernels == "none" else 1e-6)


def test_every_model_is_for_a_triton_with_gpus_or_stays_what_it_is(published: Published) -> None:
    assert (target_of(published.cpu), target_of(published.gpu)) == ("cpu", "gpu")
    ours, theirs = read_configs(published.cpu), read_configs(published.gpu)
    assert ours.keys() == theirs.keys()
    for name, config in theirs.items():
        version = {entry.name for entry in (published.gpu / name / "1").iterdir()}
        if name in GRAPH_OF_MODEL:
            assert (config.platform, config.backend, config.max_batch_size) == (PLATFORM, "", 0)
            assert [group.kind for group in config.instance_group] == [model_config_pb2.ModelInstanceGroup.KIND_GPU]
            assert not config.HasField("dynamic_batching")
            assert version == {MODEL, *({TABLES} & {*PARTS_OF_MODEL[name]})}
            assert [each.name for each in config.optimization.execution_accelerators.gpu_execution_accelerator] == [
                "cuda"
            ]
            described = ours[name]
            assert [(each.name, each.data_type) for each in config.input] == [
                (each.name, each.data_type) for each in described.input
            ]
            leading = int(described.max_batch_size > 0)
            for tensor, before in zip(
                [*config.input, *config.output], [*described.input, *described.output], strict=True
            ):
                assert len(tensor.dims) == leading + len(before.dims)
                assert list(tensor.dims[:leading]) == [1] * leading
        else:
            assert config == ours[name]


def test_shapes_are_those_that_the_backend_sees(published: Published) -> None:
    """It compares them: an input's fixed sizes, and an output's sizes altogether."""
    for name, config in read_configs(published.gpu).items():
        if name not in GRAPH_OF_MODEL:
            continue
        session = onnxruntime.InferenceSession(
            str(published.gpu / name / "1" / MODEL), providers=["CPUExecutionProvider"]
        )
        values = [*session.get_inputs(), *session.get_overridable_initializers(), *session.get_outputs()]
        seen = {each.name: [size if isinstance(size, int) else -1 for size in each.shape] for each in values}
        assert {each.name: list(each.dims) for each in (*config.input, *config.output)} == seen
        optional = {each.name for each in config.input if each.optional}
        assert optional == {each.name for each in session.get_overridable_initializers()}


def test_what_triton_24_10_reads(published: Published) -> None:
    for name in GRAPH_OF_MODEL:
        path = published.gpu / name / "1" / MODEL
        if path.exists():
            model = onnx.load(str(path), load_external_data=False)
            onnx.checker.check_model(model)
            assert model.ir_version <= IR_VERSION
            assert not model.functions
            assert all(entry.version <= OPSET for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def test_bundles_with_an_interest_and_without_have_one_configuration(bundles: dict[bool, Path], tmp_path: Path) -> None:
    """So that a server keeps the version before while it takes the next."""
    for bundle in bundles.values():
        publish(bundle, tmp_path / "gpu", target="gpu")
    assert {entry.name for entry in (tmp_path / "gpu" / "ctr_backbone").iterdir() if entry.is_dir()} == {"1", "2"}


def test_tensorrt_is_asked_for(published: Published, tmp_path: Path) -> None:
    publish(published.bundle, tmp_path / "gpu", target="gpu", tensorrt=True)
    config = read_config(tmp_path / "gpu" / "ctr_backbone" / "config.pbtxt")
    accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert [each.name for each in accelerators] == ["tensorrt", "cuda"]
    with pytest.raises(ConfigurationError, match="TensorRT is for target gpu, not for cpu"):
        publish(published.bundle, tmp_path / "cpu", tensorrt=True)


class TestAnotherTarget:
    def test_a_repository_remembers_its_target(self, tmp_path: Path, published: Published) -> None:
        for repository, other in ((published.cpu, "gpu"), (published.gpu, "cpu")):
            before = sorted(repository.rglob("*"))
            there = target_of(repository)
            message = f"{repository.name} is for target {there}, the bundle is to be published for {other}; .*--target"
            for bring in (publish, lambda *where, target: deploy(*where, "127.0.0.1:1", target=target)):
                with pytest.raises(ConfigurationError, match=message):
                    bring(published.bundle, repository, target=other)  # type: ignore[operator]
            assert sorted(repository.rglob("*")) == before
        assert target_of(tmp_path) is None

    def test_a_server_without_the_backend(self, tmp_path: Path, published: Published) -> None:
        (tmp_path / "python").mkdir()
        for repository in (published.cpu, published.gpu):
            configs = read_configs(repository)
            models = models_to_load(configs)
            assert set(models) == set(BUNDLE_ENSEMBLES)
            if repository == published.cpu:
                require_backends(repository, configs, models, tmp_path, Path("tritonserver"))
                continue
            with pytest.raises(ConfigurationError, match=r"is for target gpu: .*ctr_backbone.* target cpu; serve"):
                require_backends(repository, configs, models, tmp_path, Path("tritonserver"))


class TestGraphs:
    @pytest.fixture
    def config(self) -> model_config_pb2.ModelConfig:
        return read_config(DESCRIPTION / "pca_projection" / "config.pbtxt")

    def test_functions_and_external_tables_are_kept_in_meaning(self, tmp_path: Path) -> None:
        """As a backbone may have them: functions of our own domain, and a table beside the graph."""
        table = torch.randn(50, 3).numpy()
        graph = make_graph_with_function(table, tmp_path)
        config = text_format.Parse(
            """
            name: "m" backend: "python" max_batch_size: 8
            input [ { name: "row" data_type: TYPE_INT32 dims: [ -1 ] allow_ragged_batch: true },
                    { name: "unread" data_type: TYPE_FP32 dims: [ -1, -1 ] allow_ragged_batch: true } ]
            output [ { name: "doubled" data_type: TYPE_FP32 dims: [ -1, -1 ] } ]
            """,
            model_config_pb2.ModelConfig(),
        )
        (tmp_path / "published").mkdir()
        (tmp_path / "published" / TABLES).hardlink_to(tmp_path / TABLES)
        path = tmp_path / "published" / MODEL
        made = write_model(graph, config, path, strings={}, tensorrt=False)
        assert [list(each.dims) for each in (*made.input, *made.output)] == [[1, -1], [1, -1, -1], [1, -1, 3]]
        assert path.stat().st_size < 2000
        assert [entry.domain for entry in onnx.load(str(path), load_external_data=False).opset_import] == [""]
        rows = np.array([[4, 0, 49]], dtype=np.int32)
        found = run_graph(path, {"row": rows, "unread": np.zeros((1, 2, 2), dtype=np.float32)})
        np.testing.assert_array_equal(found["doubled"], 2 * table[rows])

    def test_a_graph_that_is_none(self, tmp_path: Path, config: model_config_pb2.ModelConfig) -> None:
        (tmp_path / PCA).write_text("no graph")
        with pytest.raises(
            ConfigurationError, match=rf"{PCA} cannot be read \(.*\); build the bundle again"
        ) as refused:
            write_model(tmp_path / PCA, config, tmp_path / MODEL, strings={}, tensorrt=False)
        assert "\n" not in str(refused.value)

    def test_a_graph_that_is_too_new(self, tmp_path: Path, config: model_config_pb2.ModelConfig) -> None:
        value = helper.make_tensor_value_info("text_embedding", TensorProto.FLOAT, ["b", 2])
        graph = helper.make_graph(
            [helper.make_node("Identity", ["text_embedding"], ["representation"])],
            "g",
            [value],
            [helper.make_tensor_value_info("representation", TensorProto.FLOAT, ["b", 2])],
        )
        newer = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET + 1)])
        onnx.save(newer, str(tmp_path / PCA))
        with pytest.raises(ConfigurationError, match=f"has opset {OPSET + 1}, .* reads up to {OPSET}"):
            write_model(tmp_path / PCA, config, tmp_path / MODEL, strings={}, tensorrt=False)

    def test_a_bundle_that_cannot_be_rendered_leaves_nothing(self, tmp_path: Path) -> None:
        make_bundle(tmp_path / "bundle")
        with pytest.raises(ConfigurationError, match="cannot be read"):
            publish(tmp_path / "bundle", tmp_path / "gpu", target="gpu")
        assert not list((tmp_path / "gpu").rglob("*.py"))
        assert target_of(tmp_path / "gpu") is None


def make_graph_with_function(table: npt.NDArray[np.float32], directory: Path) -> Path:
    (directory / TABLES).write_bytes(table.tobytes())
    weight = TensorProto(name="table", data_type=TensorProto.FLOAT, dims=table.shape)
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", TABLES), ("offset", "0"), ("length", str(table.nbytes))):
        weight.external_data.add(key=key, value=value)
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("liber", 1)]
    double = helper.make_function(
        "liber", "Double", ["x"], ["y"], [helper.make_node("Add", ["x", "x"], ["y"])], imports[:1]
    )
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "row"], ["gathered"]),
            helper.make_node("Double", ["gathered"], ["doubled"], domain="liber"),
        ],
        "backbone",
        [helper.make_tensor_value_info("row", TensorProto.INT32, ["n"])],
        [helper.make_tensor_value_info("doubled", TensorProto.FLOAT, ["n", 3])],
        [weight],
    )
    model = helper.make_model(graph, functions=[double], opset_imports=imports, ir_version=9)
    (directory / BACKBONE).write_bytes(model.SerializeToString())
    return directory / BACKBONE
