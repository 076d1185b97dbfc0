"""How each backbone is made and trained: what `bench.search` chose on the validation slice, checked in as JSON.

``hyperparameters.json`` holds ``default`` and, under ``backbones``, what is different for each of them. It lies beside
this module; ``builders`` is used from a checkout and is in no wheel.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pydantic

from builders.train import TrainingSettings
from liber_runtime.exceptions import ConfigurationError

CHOSEN = Path(__file__).with_name("hyperparameters.json")

Share = Annotated[float, pydantic.Field(ge=0, lt=1)]


@dataclass(frozen=True)
class Hyperparameters:
    """What distinguishes one training of a backbone from another on the same data, beside the seed.

    Attributes:
        training: see `TrainingSettings`.
        dropout: of the embeddings, see `FeatureEmbedding`.
        id_dropout: see `ItemEmbedding`.
        embedding_dim: E.
        options: keyword arguments of the backbone's class, e.g. ``{"dropout": 0.5, "mlp_sizes": [200, 80]}``.
    """

    training: TrainingSettings = field(default_factory=TrainingSettings)
    dropout: Share = 0.2
    id_dropout: Share = 0.1
    embedding_dim: Annotated[int, pydantic.Field(ge=1)] = 32
    options: dict[str, Any] = field(default_factory=dict)


def load_hyperparameters(backbone: str, path: Path = CHOSEN) -> Hyperparameters:
    """Those of a backbone by its name; the defaults for one of your own, or one that nothing was chosen for.

    Raises:
        ConfigurationError: the file is no JSON, or holds a key that there is not or a value that cannot be; the
            message names the key.
    """
    chosen = _read(path)
    default, own = _section(chosen, path, "default"), _section(_section(chosen, path, "backbones"), path, backbone)
    training = {**_section(default, path, "training"), **_section(own, path, "training")}
    return parse_hyperparameters({**default, **own, "training": training}, f"{path}: {backbone}")


def parse_hyperparameters(given: Mapping[str, Any], origin: str) -> Hyperparameters:
    """From JSON's values; what is left out has its default.

    Args:
        given: by attribute; ``training`` holds those of `TrainingSettings`.
        origin: what an error begins with.

    Raises:
        ConfigurationError: names the key and what is wrong with its value.
    """
    try:
        # From JSON, so that a list is taken for a tuple and nothing else is bent.
        return _HYPERPARAMETERS.validate_json(json.dumps(given), strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigurationError(f"{origin}: {key}: {first['msg']} (is {first['input']!r})") from error
    except ConfigurationError as error:
        raise ConfigurationError(f"{origin}: training.{error}") from error


def save_hyperparameters(backbone: str, hyperparameters: Hyperparameters, path: Path = CHOSEN) -> None:
    """Puts what was chosen for one backbone in place of what was there; the others stay as they are.

    Raises:
        ConfigurationError: the file there is cannot be read.
    """
    chosen = _read(path) if path.is_file() else {}
    backbones = {**_section(chosen, path, "backbones"), backbone: asdict(hyperparameters)}
    building = path.with_name(f"{path.name}.building")
    building.write_text(json.dumps({**chosen, "backbones": backbones}, indent=2) + "\n")
    building.replace(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        chosen = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read ({error}); restore it from git") from error
    if not isinstance(chosen, dict) or not chosen.keys() <= {"default", "backbones"}:
        raise ConfigurationError(f"{path} holds more than the objects 'default' and 'backbones'; remove what is else")
    return chosen


def _section(given: Mapping[str, Any], path: Path, name: str) -> dict[str, Any]:
    section = given.get(name, {})
    if not isinstance(section, dict):
        raise ConfigurationError(f"{path}: {name} is {section!r}; give an object")
    return section


def _refuse_unknown(kind: type[Any]) -> None:
    kind.__pydantic_config__ = pydantic.ConfigDict(extra="forbid")


_refuse_unknown(TrainingSettings)
_refuse_unknown(Hyperparameters)
_HYPERPARAMETERS = pydantic.TypeAdapter(Hyperparameters)
