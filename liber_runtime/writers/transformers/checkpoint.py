"""A Hugging Face checkpoint for this process: what it is, how much memory it takes, its tokenizer and its weights.

Torch and transformers are imported where they are needed, not with this module.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

from liber_runtime.exceptions import ConfigurationError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")

_GIB = 2**30
_WORKSPACE = {"cuda": _GIB, "cpu": _GIB // 4}
"""Bytes of what is neither weights nor cache nor activations: the device's context, libraries, logits."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
_PROBE = "What does this person like?"

_Loaded = TypeVar("_Loaded")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that generating takes.

    Attributes:
        weights: of the checkpoint, in the type they are computed in.
        cache: keys and values of one token.
        activations: what a forward pass holds of one token.
        workspace: all else, whatever the batch.
    """

    weights: int
    cache: int
    activations: int
    workspace: int

    def of(self, cached: int, at_once: int) -> int:
        """With so many tokens in the cache and so many in the largest forward pass."""
        return self.weights + self.workspace + self.cache * cached + self.activations * at_once


class Checkpoint:
    """A causal language model. Its configuration and its tokenizer are read at once, its weights by `load`.

    Args:
        source: a directory, of which everything is read offline, or a name on the Hugging Face Hub.
        device: ``auto`` (a CUDA device if there is one), ``cpu``, ``cuda`` or ``cuda:1``.
        dtype: what it computes in: one of `DTYPES`, or ``auto`` for bfloat16 on CUDA and float32 on the CPU.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: whether Python code that comes with the checkpoint may run in this process.

    Attributes:
        name: short, for the record.
        config: of transformers.
        tokenizer: of transformers.
        device: a torch.device.
        dtype: a torch.dtype.

    Raises:
        ConfigurationError: no such checkpoint, a gated one, one that does not continue text, one without a tokenizer,
            one that needs its own code; an unknown device or type; torch or transformers are not installed.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        revision: str = "main",
        trust_remote_code: bool = False,
    ) -> None:
        transformers = import_transformers()
        self.source, self._is_local = _find(source)
        self.name = Path(self.source).name if self._is_local else self.source
        self.device = find_device(device)
        self.dtype = _find_dtype(dtype, self.device.type)
        self._trusted = trust_remote_code
        self._options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": self._is_local}
        if not self._is_local:
            self._options["revision"] = revision
        self.config: Any = self._read(transformers.AutoConfig.from_pretrained, "configuration")
        self._check_architecture(transformers)
        self.tokenizer: Any = self._read_tokenizer(transformers)

    @property
    def longest(self) -> int | None:
        """Most tokens of prompt and answer that it was made for; None if it does not say."""
        config = self.config.get_text_config()
        found = getattr(config, "max_position_embeddings", None) or getattr(config, "seq_length", None)
        return int(found) if found else None

    @functools.cached_property
    def memory(self) -> Memory:
        """What it takes, computed from its configuration; no weights are read."""
        config, size = self.config.get_text_config(), self.dtype.itemsize

        def first(*names: str, default: int = 0) -> int:
            return next((int(value) for name in names if (value := getattr(config, name, None))), default)

        hidden, layers = first("hidden_size", "n_embd"), first("num_hidden_layers", "num_layers", "n_layer")
        heads = first("num_attention_heads", "n_head", default=1)
        head = first("head_dim", "kv_channels", default=hidden // heads)
        shared = first("multi_query_group_num", "num_key_value_heads", default=heads)
        inner = first("intermediate_size", "ffn_hidden_size", "n_inner", default=4 * hidden)
        return Memory(
            weights=self._weights(),
            cache=2 * layers * shared * head * size,
            activations=(3 * inner + 4 * hidden) * size,
            workspace=_WORKSPACE[self.device.type],
        )

    def require_memory(self, batch_size: int, context_tokens: int, at_once: int | None = None) -> None:
        """Finds out whether it fits.

        Args:
            batch_size: contexts in the cache at once.
            context_tokens: of prompt and answer.
            at_once: tokens of the largest forward pass; None for those of all contexts.

        Raises:
            ConfigurationError: it does not; says how much is needed, how much is free, and what would fit.
        """
        memory, free = self.memory, free_memory(self.device)

        def needed(size: int) -> int:
            return memory.of(size * context_tokens, at_once or size * context_tokens)

        if needed(batch_size) <= free:
            return
        fits = next((size for size in range(batch_size - 1, 0, -1) if needed(size) <= free), 0)
        hint = f"lower the batch size to {fits}" if fits else "lower the context or the batch size"
        if memory.of(0, 0) > free:
            hint = "not even the weights fit: take a smaller or a quantized checkpoint, or a server with its own GPUs"
        raise ConfigurationError(
            f"{self.name} in {_name(self.dtype)} needs {_gib(needed(batch_size))}: {_gib(memory.weights)} for its "
            f"weights and {_gib(needed(batch_size) - memory.weights)} for {batch_size} contexts of {context_tokens} "
            f"tokens; {self.device} has {_gib(free)} free; {hint}"
        )

    def load(self) -> Any:
        """The model with its weights, on its device, for inference; takes seconds to minutes.

        Raises:
            ConfigurationError: the files are missing or broken, or there is too little memory after all.
        """
        transformers = import_transformers()
        # Straight to the device: the weights are never a second time in the memory of the CPU.
        placed = {"device_map": {"": self.device}} if self.device.type == "cuda" else {}
        model = self._read(
            functools.partial(transformers.AutoModelForCausalLM.from_pretrained, dtype=self.dtype, **placed), "weights"
        )
        return model.eval()

    def _read(self, read: Callable[..., _Loaded], what: str) -> _Loaded:
        try:
            return read(self.source, **self._options)
        except Exception as error:  # transformers raises what it comes across, of any kind
            raise ConfigurationError(self._explain(error, what)) from None

    def _read_tokenizer(self, transformers: Any) -> Any:
        without = f"{self.source} has no usable tokenizer; put tokenizer.json of the same checkpoint beside its weights"
        if self._is_local and not any((Path(self.source) / name).is_file() for name in _TOKENIZER_FILES):
            raise ConfigurationError(without)
        tokenizer = self._read(transformers.AutoTokenizer.from_pretrained, "tokenizer")
        known = getattr(self.config.get_text_config(), "vocab_size", None) or 2**31
        highest = max(encode(tokenizer, _PROBE), default=known)
        if highest >= known:
            raise ConfigurationError(without)
        return tokenizer

    def _check_architecture(self, transformers: Any) -> None:
        owned = "AutoModelForCausalLM" in (getattr(self.config, "auto_map", None) or {})
        mapped = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(self.config), None)
        if mapped is None and owned and not self._trusted:
            raise ConfigurationError(self._explain(ValueError("trust_remote_code"), "weights"))
        named = [name.lower() for name in getattr(self.config, "architectures", None) or ()]
        if (not owned and mapped is None) or (mapped is not None and named and mapped.__name__.lower() not in named):
            found = (getattr(self.config, "architectures", None) or [self.config.model_type])[0]
            raise ConfigurationError(
                f"{self.source} is a {found}, which does not continue text; give a causal language model, e.g. a "
                "LlamaForCausalLM"
            )

    def _weights(self) -> int:
        import torch

        transformers = import_transformers()
        if getattr(self.config, "quantization_config", None) is None:
            try:
                with torch.device("meta"):
                    empty = transformers.AutoModelForCausalLM.from_config(
                        self.config, trust_remote_code=self._trusted, dtype=self.dtype
                    )
                parameters: int = sum(each.numel() for each in empty.parameters())
                return parameters * self.dtype.itemsize
            except Exception:  # a checkpoint's own code that cannot be built without its weights
                pass
        return _stored(Path(self.source)) if self._is_local else 0

    def _explain(self, error: BaseException, what: str) -> str:
        names = {type(each).__name__ for each in _chain(error)}
        source = self.source
        if "trust_remote_code" in str(error):
            return (
                f"{source} runs only with Python code that comes with it, which may do anything this process may; if "
                "you trust its authors, say so with trust_remote_code (LIBER_WRITER_TRUST_REMOTE_CODE=true)"
            )
        if "GatedRepoError" in names:
            return (
                f"{source} is gated on the Hugging Face Hub; accept its licence there and log in (hf auth login, or "
                "HF_TOKEN), or give the directory of a copy that you have"
            )
        if "RepositoryNotFoundError" in names or "HFValidationError" in names:
            return (
                f"{source} is neither a directory here nor a checkpoint on the Hugging Face Hub that you may see; "
                "correct the name, or log in (hf auth login, or HF_TOKEN) if it is private"
            )
        if "RevisionNotFoundError" in names:
            return f"{source} has no revision {self._options['revision']!r}; give a branch, tag or commit that it has"
        if names & {"LocalEntryNotFoundError", "ConnectError", "OfflineModeIsEnabled", "ProxyError", "ConnectTimeout"}:
            return (
                f"{source} is no directory here, and the Hugging Face Hub cannot be reached; give the directory of the "
                "checkpoint"
            )
        if "OutOfMemoryError" in names or isinstance(error, MemoryError):
            return f"the {what} of {source} do not fit into the memory of {self.device}; take a smaller checkpoint"
        return f"the {what} of {source} cannot be read: {' '.join(str(error).split()) or type(error).__name__:.300}"


def import_transformers() -> Any:
    """The library, silent on everything that it raises as an error anyway.

    Raises:
        ConfigurationError: it, or torch, is not installed.
    """
    try:
        import torch  # noqa: F401  transformers can be imported without it, and then loads nothing
        import transformers
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"a checkpoint in this process needs {error.name}, which is not installed: pip install "
            "'liber-runtime[local]'"
        ) from None
    library: Any = transformers
    library.logging.set_verbosity(logging.CRITICAL)
    library.logging.disable_progress_bar()
    return library


def find_device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        ConfigurationError: there is none.
    """
    import torch

    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigurationError(f"device {name!r} is unknown; give auto, cpu, cuda or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigurationError(
            f"device {name!r} is not there: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs; give cpu, "
            "or install a torch built for CUDA"
        )
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def free_memory(device: torch.device, control_group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes free on a device; on the CPU no more than what is left to this process's control group."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    try:
        limit = (control_group / "memory.max").read_text().strip()
        used = int((control_group / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    return min(free, int(limit) - used) if limit.isdecimal() else free


def encode(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    """The tokens of a text, with those that begin one if `special`."""
    # No attention mask: tokenizers that come as code of a checkpoint pad in order to make it, and fail.
    encoded = tokenizer(text, add_special_tokens=special, return_attention_mask=False, verbose=False)
    return [int(token) for token in encoded["input_ids"]]


def _find(source: str | Path) -> tuple[str, bool]:
    """The directory or the name on the Hub, and which of the two."""
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigurationError(
                f"{path} holds no config.json, so it is no Hugging Face checkpoint; convert it (weights of another "
                "layout, GGUF) or serve it with what it was made for"
            )
        return str(path), True
    text = str(source)
    if path.exists() or text.count("/") > 1 or text[:1] in "/.~" or "\\" in text:
        raise ConfigurationError(f"there is no checkpoint at {text!r}; give its directory or its name on the Hub")
    return text, False


def _find_dtype(name: str, device: str) -> torch.dtype:
    import torch

    if name == "auto":
        return torch.bfloat16 if device == "cuda" else torch.float32
    if name not in DTYPES:
        raise ConfigurationError(f"dtype {name!r} is unknown; give auto, {', '.join(DTYPES)}")
    found: torch.dtype = getattr(torch, name)
    return found


def _stored(path: Path) -> int:
    """Bytes of the weights as they lie there, as the index says or as large as the files are."""
    for index in path.glob("*.index.json"):
        try:
            return int(json.loads(index.read_text())["metadata"]["total_size"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    files = list(path.glob("*.safetensors")) or list(path.glob("pytorch_model*.bin"))
    return sum(file.stat().st_size for file in files)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"
