"""The fused kernel compiles for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_MEMORY_BYTES = 227 * 1024
"""What a program may have on an H100."""

KERNELS = Path(__file__).parents[2] / "builders" / "models" / "cuda_kernels.py"

# In a process of its own: what interprets kernels in other tests changes Triton's language for the whole process.
COMPILE = """
import json, runpy, sys
import triton
from triton.backends.compiler import GPUTarget

recur = runpy.run_path(sys.argv[1])["recur"]
compiled = []
for precision, weights, is_augru in (("tf32x3", "*fp32", True), ("ieee", "*bf16", False)):
    sizes = dict(SIZE=64, BLOCK_ROWS=16, BLOCK_SIZE=64)
    constants = dict(sizes, IS_ATTENDED=is_augru, IS_FOLDED=is_augru, PRECISION=precision)
    types = dict(inputs="*fp32", attention="*fp32", user_index="*i32", recurrent=weights, out="*fp32")
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in recur.arg_names}
    source = triton.compiler.ASTSource(fn=recur, signature=signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    compiled.append({"shared": made.metadata.shared, "tensor_cores": "mma.sync" in made.asm["ptx"]})
print(json.dumps(compiled))
"""


def test_it_compiles_for_an_h100_and_uses_its_tensor_cores(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(KERNELS)],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for compiled in json.loads(done.stdout):
        assert compiled["tensor_cores"]
        assert compiled["shared"] <= SHARED_MEMORY_BYTES
