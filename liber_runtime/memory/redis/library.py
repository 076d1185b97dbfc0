"""The functions that run inside Redis, as one library of the Lua files beside this module."""

from __future__ import annotations

import hashlib
import importlib.resources

_FILES = ("steps", "behaviors", "queue", "rebuilding", "reading", "erasing")

_HEADER = """#!lua name=liber_{digest}
local function register(name, callback, flags)
  redis.register_function({{function_name = name .. '_{digest}', callback = callback, flags = flags or {{}}}})
end
"""


def _read() -> str:
    folder = importlib.resources.files("liber_runtime.memory.redis")
    return "\n".join((folder / f"{name}.lua").read_text(encoding="utf-8") for name in _FILES)


_BODY = _read()

DIGEST = hashlib.sha256(_BODY.encode()).hexdigest()[:12]
"""Part of every function's name, so that two versions of LIBER can use one server."""

SOURCE = _HEADER.format(digest=DIGEST) + _BODY
"""What ``FUNCTION LOAD`` takes."""


def function_name(verb: str) -> str:
    """The name in the server of the function that a Lua file registers as `verb`."""
    return f"{verb}_{DIGEST}"
