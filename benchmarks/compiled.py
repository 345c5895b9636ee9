"""What the compiler makes of the Triton kernels, without a GPU: registers, spills, shared memory, tensor-core instructions.

    python benchmarks/compiled.py --worst                            a line of the table in docs/kernels.md for each D and model
    python benchmarks/compiled.py --capability 80 --dims 64,128 --dtypes float32 --models swiglu

The launches of one forward and backward are recorded on tensors without data, and each is compiled as it stands, for the GPU that
is named, by Triton and the ptxas that it ships; cuobjdump then tells what came out. Spills are bytes a thread.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lineate.kernels import convolution, launch, step

HEAD = "kernel             warps registers spills shared KiB tensor cores"
ROW = "{:18} {:5} {:9} {:6} {:10} {:12}"
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
OPTIONS = ("num_warps", "num_stages", "default_dot_input_precision")


class Launch(NamedTuple):
    """One recorded launch."""

    kernel: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class Compiled(NamedTuple):
    """What one kernel became; `tensor_cores` counts the matrix instructions in its code."""

    kernel: str
    warps: int
    registers: int
    spills: int
    shared_kib: int
    tensor_cores: int


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Kernels that note their arguments in the place of those that run."""
    calls: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *arguments, **keywords: calls.append(Launch(self.kernel, arguments, keywords))

    kept = {(module, name): getattr(module, name) for module, names in KERNELS.items() for name in names}
    for (module, name), kernel in kept.items():
        setattr(module, name, Recorder(kernel))
    try:
        yield calls
    finally:
        for (module, name), kernel in kept.items():
            setattr(module, name, kernel)


KERNELS = {
    convolution: ("statistics", "convolve", "convolve_backward", "norm_backward"),
    step: ("gradients", "fit", "answers", "query_gradients", "key_gradients", "weight_gradients"),
}


def launches(dim: int, dtype: torch.dtype, gated: bool, l2: bool) -> list[Launch]:
    """Those of one forward and backward with key norm, convolutions and tokens off the grid."""
    batch, heads, height, width = 2, 24, 64, 64
    tokens = 333 + height * width
    q, k, v = torch.empty(batch, tokens, 3, heads, dim, dtype=dtype, device="meta").permute(2, 0, 3, 1, 4)
    weights = torch.empty(heads, 3 if gated else 2, dim, dim, device="meta")
    taps = [torch.empty(heads, 10, dim, device="meta") for _ in "qk"]
    with recorded() as calls:
        out, fitted, sums = launch.forward(q, k, v, weights, *taps, height, width, 0, 1.0, l2)
        launch.backward(out, q, k, v, weights, *taps, fitted, sums, height, width, 0, 1.0, l2)
    return calls


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def compile_launch(call: Launch, capability: int) -> Compiled:
    """As Triton's launcher would: None and 1 are constants, multiples of 16 are known to be."""
    names = call.kernel.arg_names
    values = dict(zip(names, call.arguments, strict=False)) | {n: v for n, v in call.keywords.items() if n in names}
    constant = {n for n, p in zip(names, call.kernel.params, strict=True) if p.is_constexpr or values[n] is None}
    signature = {n: "constexpr" if n in constant else _type(values[n]) for n in names}
    even = [n for n in names if isinstance(values[n], Tensor) or (signature[n] == "i32" and values[n] % 16 == 0)]
    source = ASTSource(
        fn=call.kernel,
        signature=signature,
        constexprs={(names.index(n),): values[n] for n in constant},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in even},
    )
    options = {name: call.keywords[name] for name in OPTIONS if name in call.keywords}
    return _read(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options))


def _read(kernel: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "--dump-sass")
        )
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage).group(1)) for word in ("REG", "STACK"))
    tensor_cores = len(re.findall(r"\b(?:HMMA|HGMMA)\.", code))
    metadata = kernel.metadata
    return Compiled(metadata.name, metadata.num_warps, registers, stack, metadata.shared // 1024, tensor_cores)


def table(capability: int, dim: int, dtype: torch.dtype, model: str, loss: str) -> Iterator[Compiled]:
    """Every distinct kernel of one forward and backward, as it comes out."""
    seen = set()
    for call in launches(dim, dtype, model == "swiglu", loss == "l2"):
        row = compile_launch(call, capability)
        if row not in seen:
            seen.add(row)
            yield row


def worst(rows: list[Compiled]) -> str:
    """Two cells: bytes spilled a thread and by which kernel, KiB of shared memory and of which."""
    spilled, shared = (max(rows, key=lambda row: getattr(row, what)) for what in ("spills", "shared_kib"))
    by = f", `{spilled.kernel}`" if spilled.spills else ""
    return f"{spilled.spills}{by} | {shared.shared_kib}, `{shared.kernel}`"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--dims", default=",".join(map(str, launch.CHUNKS)))
    parser.add_argument("--dtypes", default="bfloat16")
    parser.add_argument("--models", default="2layer,swiglu")
    parser.add_argument("--losses", default="l2")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each kernel, not a table")
    parser.add_argument("--worst", action="store_true", help="the kernels with the most spills and the most shared memory alone")
    chosen = parser.parse_args()
    lists = (getattr(chosen, name).split(",") for name in ("dims", "dtypes", "models", "losses"))
    for dim, dtype, model, loss in product(*lists):
        rows = table(chosen.capability, int(dim), getattr(torch, dtype), model, loss)
        if chosen.worst:
            print(f"| sm_{chosen.capability} | {dim} | {dtype} | {model} | {loss} | {worst(list(rows))} |", flush=True)
            continue
        if not chosen.json:
            print(f"\nsm_{chosen.capability}, D = {dim}, {dtype}, {model}, {loss}\n" + HEAD)
        for row in rows:
            print(json.dumps(row._asdict()) if chosen.json else ROW.format(*row), flush=True)


if __name__ == "__main__":
    main()
