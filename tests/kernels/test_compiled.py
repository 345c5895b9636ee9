"""The kernels as the compiler makes them, with no GPU: no large spill, tensor cores, as much shared memory as GPUs have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

COMMAND = Path(__file__).parents[2] / "benchmarks" / "compiled.py"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LARGE = 256  # bytes a thread
SHARED_KIB = {80: 99, 90: 227}  # sm_80's code runs on GPUs of consumers too, which have less
PRODUCTS = {"gradients", "answers", "query_gradients", "key_gradients", "weight_gradients"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (TOOLS / "cuobjdump").exists(), reason="this Triton ships no ptxas and cuobjdump"),
]


@pytest.mark.parametrize(
    ("capability", "dim", "model", "loss"),
    [(80, 64, "2layer", "inner-product"), (90, 64, "2layer", "l2"), (80, 72, "swiglu", "l2"), (80, 128, "swiglu", "l2")],
)
def test_no_large_spill_and_tensor_cores(capability: int, dim: int, model: str, loss: str) -> None:
    # In its own process: here, the kernels are the interpreter's.
    options = ["--capability", str(capability), "--dims", str(dim), "--models", model, "--losses", loss, "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run([sys.executable, COMMAND, *options], capture_output=True, text=True, check=True, env=environment)
    kernels = [json.loads(line) for line in found.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in kernels} >= PRODUCTS
    for kernel in kernels:
        assert kernel["spills"] <= LARGE and kernel["shared_kib"] <= SHARED_KIB[capability], kernel
        assert (kernel["tensor_cores"] > 0) == (kernel["kernel"] in PRODUCTS), kernel
