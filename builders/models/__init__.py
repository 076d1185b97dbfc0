"""The models: features, fusers and backbones. Pure: no clock, no files, no network."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from builders.models.autoint import AutoInt
from builders.models.dcn import DCN, DCNv2
from builders.models.deepfm import DeepFM
from builders.models.dien import DIEN
from builders.models.din import DIN
from builders.models.dnn import DNN
from builders.models.features import FeatureSchema
from builders.models.fibinet import FiBiNet
from builders.models.lr import LR
from builders.models.xdeepfm import XDeepFM
from liber_runtime.exceptions import ConfigurationError

BACKBONES: Mapping[str, type[nn.Module]] = {
    "LR": LR,
    "DNN": DNN,
    "DCN": DCN,
    "DCNv2": DCNv2,
    "DeepFM": DeepFM,
    "xDeepFM": XDeepFM,
    "AutoInt": AutoInt,
    "FiBiNet": FiBiNet,
    "DIN": DIN,
    "DIEN": DIEN,
}
"""The backbones that come with LIBER, by the names the paper gives them."""


def make_backbone(name: str, schema: FeatureSchema, options: Mapping[str, Any] | None = None) -> nn.Module:
    """A backbone with fresh weights.

    Args:
        name: one of `BACKBONES`, or a backbone of your own as ``package.module:Class`` (see `Backbone`).
        schema: what it will be given.
        options: keyword arguments of the class beside the schema.

    Raises:
        ConfigurationError: there is no such class, it is not a module, or it does not take these options or a value
            of theirs.
    """
    kind = find_backbone(name)
    given = dict(options or {})
    known = inspect.signature(kind).parameters
    unknown = sorted(given.keys() - known.keys())
    if unknown and not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in known.values()):
        raise ConfigurationError(
            f"backbone {name} has no option {', '.join(unknown)}; it has {', '.join(list(known)[1:]) or 'none'}"
        )
    try:
        return kind(schema, **given)
    except Exception as error:  # of any type: a class, which may be a user's own, checks its options as it likes
        if not given:
            raise
        values = ", ".join(f"{option}={value!r}" for option, value in given.items())
        raise ConfigurationError(
            f"backbone {name} cannot be made with {values} ({type(error).__name__}: {error}); correct these options"
        ) from error


def find_backbone(name: str) -> type[nn.Module]:
    """The class that `make_backbone` makes a backbone of, named as there.

    Raises:
        ConfigurationError: there is no such class, or it is not a module.
    """
    if name in BACKBONES:
        return BACKBONES[name]
    module_name, _, class_name = name.partition(":")
    if not class_name:
        raise ConfigurationError(
            f"backbone {name!r} is unknown; there are {', '.join(BACKBONES)}, or name your own as package.module:Class"
        )
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(
            f"backbone {name!r} cannot be imported ({error}); run from the directory that holds it, or install it"
        ) from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigurationError(f"backbone {name!r} is no torch.nn.Module; name a class that derives from it")
    return found
