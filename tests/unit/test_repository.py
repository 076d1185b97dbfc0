"""Publishing: whole versions side by side, ensembles pinned to them, old ones gone, nothing half-made."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_bundle import make_bundle

from builders.repository import (
    BUNDLE_ENSEMBLES,
    DESCRIPTION,
    EMBEDDING_ENSEMBLES,
    EMBEDDING_MODELS,
    KEPT_VERSIONS,
    PARTS_OF_MODEL,
    publish,
    publish_encoder,
    read_config,
    withdraw,
)
from liber_runtime.bundle import BACKBONE, MANIFEST
from liber_runtime.exceptions import ConfigurationError


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    make_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


def versions(repository: Path, model: str) -> set[str]:
    return {entry.name for entry in (repository / model).iterdir() if entry.is_dir()}


def pinned(repository: Path, ensemble: str) -> set[int]:
    config = read_config(repository / ensemble / "config.pbtxt")
    return {step.model_version for step in config.ensemble_scheduling.step}


class TestPublish:
    def test_everything_a_bundle_needs_is_there(self, bundle: Path, tmp_path: Path) -> None:
        repository = tmp_path / "repository"
        assert publish(bundle, repository) == 1
        assert {path.name for path in repository.iterdir()} == {*PARTS_OF_MODEL, *BUNDLE_ENSEMBLES}
        for model, parts in PARTS_OF_MODEL.items():
            assert {path.name for path in (repository / model / "1").iterdir()} == {"model.py", *parts}
            for part in parts:
                assert (repository / model / "1" / part).read_bytes() == (bundle / part).read_bytes()
        for ensemble in BUNDLE_ENSEMBLES:
            assert pinned(repository, ensemble) == {1}

    def test_versions_count_up_and_the_newest_stay(self, bundle: Path, tmp_path: Path) -> None:
        repository = tmp_path / "repository"
        for version in range(1, KEPT_VERSIONS + 3):
            make_bundle(bundle, content=f"bundle {version}")
            assert publish(bundle, repository) == version
            kept = {str(number) for number in range(max(1, version - KEPT_VERSIONS + 1), version + 1)}
            for model in (*PARTS_OF_MODEL, *BUNDLE_ENSEMBLES):
                assert versions(repository, model) == kept
            for ensemble in BUNDLE_ENSEMBLES:
                assert pinned(repository, ensemble) == {version}
            assert f"bundle {version}" in (repository / "ctr_backbone" / str(version) / BACKBONE).read_text(
                encoding="utf-8"
            )

    def test_an_older_version_keeps_its_own_files(self, bundle: Path, tmp_path: Path) -> None:
        publish(bundle, tmp_path / "repository")
        before = (tmp_path / "repository" / "ctr_backbone" / "1" / BACKBONE).read_bytes()
        make_bundle(bundle, content="other")
        publish(bundle, tmp_path / "repository")
        assert (tmp_path / "repository" / "ctr_backbone" / "1" / BACKBONE).read_bytes() == before

    def test_a_model_that_lags_behind_gets_the_common_version(self, bundle: Path, tmp_path: Path) -> None:
        repository = tmp_path / "repository"
        (repository / "ctr_backbone" / "41").mkdir(parents=True)
        assert publish(bundle, repository) == 42
        assert versions(repository, "user_memory") == {"42"}
        assert versions(repository, "ctr_backbone") == {"41", "42"}

    def test_what_a_killed_publish_left_is_taken_away(self, bundle: Path, tmp_path: Path) -> None:
        half = tmp_path / "repository" / "ctr_backbone" / ".1"
        half.mkdir(parents=True)
        (half / "half").touch()
        publish(bundle, tmp_path / "repository")
        assert not half.exists()
        assert not (tmp_path / "repository" / "ctr_backbone" / "1" / "half").exists()

    def test_a_bundle_that_was_changed_is_refused_before_anything_is_written(
        self, bundle: Path, tmp_path: Path
    ) -> None:
        publish(bundle, tmp_path / "repository")
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "repository").rglob("*")}
        (bundle / BACKBONE).unlink()
        (bundle / BACKBONE).write_text("shorter")
        with pytest.raises(ConfigurationError, match=f"{BACKBONE} is not the file the manifest was written for"):
            publish(bundle, tmp_path / "repository")
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "repository").rglob("*")} == before

    def test_what_is_no_bundle_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match=f"{MANIFEST} cannot be read"):
            publish(tmp_path / "nothing", tmp_path / "repository")
        assert not (tmp_path / "repository").exists()


class TestKinds:
    """With an interest and without: what is not needed is not there, and one may follow the other."""

    @pytest.fixture
    def plain(self, tmp_path: Path) -> Path:
        make_bundle(tmp_path / "plain", fused=False)
        return tmp_path / "plain"

    def test_a_bundle_that_is_not_fused_is_scored_without_a_fuser(self, plain: Path, tmp_path: Path) -> None:
        repository = tmp_path / "repository"
        assert publish(plain, repository) == 1
        there = {*PARTS_OF_MODEL, *BUNDLE_ENSEMBLES} - {"attention_fuser"}
        assert {path.name for path in repository.iterdir()} == there
        config = read_config(repository / "liber_score" / "config.pbtxt")
        memory, backbone = config.ensemble_scheduling.step
        assert (memory.model_name, backbone.model_name) == ("user_memory", "ctr_backbone")
        # Every tensor that is made is read, and every one that is read is made.
        assert set(memory.output_map) == set(backbone.input_map) - {"user_index"} | {"user_known", "item_known"}
        assert "interest" not in backbone.input_map
        described = read_config(DESCRIPTION / "liber_encode" / "config.pbtxt").ensemble_scheduling.step
        steps = read_config(repository / "liber_encode" / "config.pbtxt").ensemble_scheduling.step
        assert [step.model_name for step in steps] == [step.model_name for step in described]
        assert pinned(repository, "liber_score") == pinned(repository, "liber_encode") == {1}

    def test_one_kind_follows_the_other(self, bundle: Path, plain: Path, tmp_path: Path) -> None:
        repository = tmp_path / "repository"
        kinds = [bundle, plain, plain, bundle]
        fusers = [{"1"}, {"1"}, None, {"4"}]
        for version, (kind, fuser) in enumerate(zip(kinds, fusers, strict=True), start=1):
            assert publish(kind, repository) == version
            assert pinned(repository, "liber_score") == {version}
            there = repository / "attention_fuser"
            assert (versions(repository, "attention_fuser") if there.exists() else None) == fuser
            kept = {str(number) for number in range(max(1, version - KEPT_VERSIONS + 1), version + 1)}
            assert versions(repository, "ctr_backbone") == kept

    @pytest.mark.parametrize("order", [("bundle", "plain"), ("plain", "bundle")])
    def test_taking_one_back_leaves_the_other_as_it_was(
        self, order: tuple[str, str], bundle: Path, plain: Path, tmp_path: Path
    ) -> None:
        first, second = ({"bundle": bundle, "plain": plain}[kind] for kind in order)
        repository = tmp_path / "repository"
        publish(first, repository)
        before = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}
        assert withdraw(repository, publish(second, repository))
        assert {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()} == before

    def test_versions_of_a_format_that_nobody_reads_any_more_go(self, bundle: Path, tmp_path: Path) -> None:
        repository = tmp_path / "repository"
        publish(bundle, repository)
        manifest = repository / "user_memory" / "1" / MANIFEST
        manifest.unlink()
        manifest.write_text('{"format": 1}')
        assert publish(bundle, repository) == 2
        for model in (*PARTS_OF_MODEL, *BUNDLE_ENSEMBLES):
            assert versions(repository, model) == {"2"}

    def test_versions_that_the_new_configuration_is_not_for_go(self, bundle: Path, tmp_path: Path) -> None:
        """There is one configuration for all versions of a model."""
        repository = tmp_path / "repository"
        publish(bundle, repository)
        path = repository / "ctr_backbone" / "config.pbtxt"
        path.write_text(path.read_text().replace('"profile"', '"profile_of_old"'))
        assert publish(bundle, repository) == 2
        for model in (*PARTS_OF_MODEL, *BUNDLE_ENSEMBLES):
            assert versions(repository, model) == {"2"}


class TestWithdraw:
    def test_the_version_before_is_pinned_again(self, bundle: Path, tmp_path: Path) -> None:
        repository = tmp_path / "repository"
        publish(bundle, repository)
        before = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}
        make_bundle(bundle, content="other")
        assert withdraw(repository, publish(bundle, repository))
        assert {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()} == before
        assert publish(bundle, repository) == 2

    def test_the_only_version_stays(self, bundle: Path, tmp_path: Path) -> None:
        repository = tmp_path / "repository"
        assert not withdraw(repository, publish(bundle, repository))
        assert pinned(repository, "liber_score") == {1}


def test_an_encoder_alone_needs_no_bundle(bundle: Path, tmp_path: Path) -> None:
    (bundle / MANIFEST).unlink()
    assert publish_encoder(bundle, tmp_path / "repository") == 1
    assert {path.name for path in (tmp_path / "repository").iterdir()} == {*EMBEDDING_MODELS, *EMBEDDING_ENSEMBLES}
    assert pinned(tmp_path / "repository", "liber_embed") == {1}


class TestDescription:
    """What lies in git: every model it names is there, and a step's tensors fit the next one's."""

    def test_each_model_is_called_as_its_directory(self) -> None:
        names = {path.parent.name for path in DESCRIPTION.glob("*/config.pbtxt")}
        assert names == {*PARTS_OF_MODEL, *BUNDLE_ENSEMBLES, *EMBEDDING_ENSEMBLES}
        for name in names:
            assert read_config(DESCRIPTION / name / "config.pbtxt").name == name

    @pytest.mark.parametrize("ensemble", [*BUNDLE_ENSEMBLES, *EMBEDDING_ENSEMBLES])
    def test_tensors_of_an_ensemble_agree_in_type_and_rank(self, ensemble: str) -> None:
        config = read_config(DESCRIPTION / ensemble / "config.pbtxt")
        made = {tensor.name: (tensor.data_type, len(tensor.dims)) for tensor in config.input}
        for step in config.ensemble_scheduling.step:
            model = read_config(DESCRIPTION / step.model_name / "config.pbtxt")
            inputs = {tensor.name: (tensor.data_type, len(tensor.dims)) for tensor in model.input}
            outputs = {tensor.name: (tensor.data_type, len(tensor.dims)) for tensor in model.output}
            assert set(step.input_map) == set(inputs)
            for name, source in step.input_map.items():
                assert made[source] == inputs[name], f"{source} -> {step.model_name}.{name}"
            assert set(step.output_map) <= set(outputs)
            made |= {target: outputs[name] for name, target in step.output_map.items()}
        for tensor in config.output:
            assert made[tensor.name] == (tensor.data_type, len(tensor.dims))

    @pytest.mark.parametrize("model", sorted(PARTS_OF_MODEL))
    def test_as_many_versions_are_loaded_as_publishing_keeps(self, model: str) -> None:
        assert read_config(DESCRIPTION / model / "config.pbtxt").version_policy.latest.num_versions == KEPT_VERSIONS

    def test_a_configuration_that_cannot_be_read(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"config\.pbtxt cannot be read"):
            read_config(tmp_path / "config.pbtxt")
        (tmp_path / "config.pbtxt").write_text("name: [")
        with pytest.raises(ConfigurationError, match=r"config\.pbtxt cannot be read") as refused:
            read_config(tmp_path / "config.pbtxt")
        assert "\n" not in str(refused.value)
