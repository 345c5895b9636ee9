"""The aligned operator (key norm, convolutions, inner step) against softmax attention, plain eager and the same compiled.

    python benchmarks/ops.py --tokens 256,1024,4096 --out benchmarks/results/cpu-ops.json
    python benchmarks/ops.py --tokens 4096 --backward --out benchmarks/results/cpu-ops-backward.json
    python benchmarks/ops.py --device cuda --dtype bfloat16 --batch 2 --heads 24 --tokens 1024,4096,16384,65536 --out ...

For each number of tokens (square grids), head dimension and inner model the contenders take turns, each time on the next of a
few inputs, so that whatever else the machine does falls on all and no input stays in cache; median and interquartile range. q, k
and v are views of one projection, as in a host. `floor_ms` is what no implementation can beat by much: the larger of seven passes
over a (B, N, C) tensor at this machine's copy rate and of the forward's multiply-adds at its GEMM rate, both measured in the same
run. `saved_mib` is what forward keeps for backward beyond the projection, `peak_mib` the most that a call makes live beyond it.
`aligned` is what a converted model runs, on a CPU the kernels that `lineate build` has compiled or, without them, the `pieces`.
"""

from __future__ import annotations

import argparse
import importlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lineate import runs
from lineate.evaluate.cost import LiveTensors, gemm_rate, time_ms
from lineate.ops import aligned
from lineate.ops.aligned_cpu import by_pieces
from lineate.ops.aligned_eager import Setting, by_eager
from lineate.ops.ttt import INNER

INPUTS = 3
PASSES = 7
# Products of N·D² multiply-adds a head in the forward pass, by inner model and loss
PRODUCTS = {"2layer": {"inner-product": 6, "l2": 7}, "swiglu": {"inner-product": 9, "l2": 10}}
Contender = Callable[[Tensor, Tensor, Tensor], Tensor]


def softmax_attentions() -> Iterator[tuple[str, Contender]]:
    """PyTorch's own, one backend each; those that cannot run here say so when called."""
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH):

        def attend(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        yield f"sdpa {backend.name.removesuffix('_ATTENTION').lower()}", attend


def linear_attentions() -> Iterator[tuple[str, Contender]]:
    """flash-linear-attention's, where it is installed: causal, without norm and convolutions; tokens come before heads there."""
    with suppress(ImportError):
        chunk = importlib.import_module("fla.ops.linear_attn").chunk_linear_attn
        yield "fla linear attention, causal", lambda q, k, v: chunk(*(x.transpose(1, 2) for x in (q, k, v)))[0].transpose(1, 2)


def operators(weights: list[Tensor], convolutions: list[Tensor], setting: Setting) -> Iterator[tuple[str, Contender]]:
    """The operator itself, every way there is."""

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return by_eager(q, k, v, weights, convolutions, setting)

    grid, inner = setting[:3], {"eps": setting.eps, "model": setting.model, "loss": setting.loss}
    yield "eager", eager
    yield "compiled", torch.compile(eager, fullgraph=True, dynamic=False)
    if weights[0].device.type == "cpu":
        yield "pieces", lambda q, k, v: by_pieces(q, k, v, weights, convolutions, setting)
    yield "aligned", lambda q, k, v: aligned.aligned_ttt(q, k, v, weights, *grid, convolutions=convolutions, **inner)


def call(contender: Contender, projection: Tensor, backward: bool) -> None:
    """Once, from the projection (B, N, 3, H, D) to the output, and back where asked for."""
    out = contender(*projection.permute(2, 0, 3, 1, 4).unbind(0))
    if backward:
        out.backward(torch.ones_like(out))


def spread(timings: list[float]) -> dict[str, float]:
    low, median, high = torch.tensor(timings, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    return {"ms": median.item(), "iqr_ms": (high - low).item(), "repeats": len(timings)}


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What this machine does at best: a copy, read and write counted, and a product of two large matrices."""
    source = torch.randn((64 if device.type == "cpu" else 1024) * 2**20 // dtype.itemsize, device=device).to(dtype)
    target = torch.empty_like(source)
    copy = min(time_ms(lambda: target.copy_(source), device) for _ in range(10))
    return {"copy_gb_s": 2 * source.nbytes / copy / 1e6, "gemm_gmac_s": gemm_rate(device, dtype)}


def saved_mib(contender: Contender, projection: Tensor) -> float:
    """Storages kept for backward, the projection's own left out."""
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        contender(*projection.permute(2, 0, 3, 1, 4).unbind(0))
    kept.pop(projection.untyped_storage().data_ptr(), None)
    return sum(kept.values()) / 2**20


def peak_mib(contender: Contender, projection: Tensor, backward: bool) -> float:
    """On CUDA the allocator's peak, on a CPU that of all live tensors: compiled code's inner ones do not show."""
    if projection.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(contender, projection, backward)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with LiveTensors([projection]) as live:
        call(contender, projection, backward)
    return live.peak / 2**20


def measure(args: argparse.Namespace, tokens: int, dim: int, model: str, limits: dict[str, float]) -> dict[str, Any]:
    """All contenders at one size."""
    device, dtype, side = torch.device(args.device), getattr(torch, args.dtype), math.isqrt(tokens)
    setting, channels = Setting(side, side, 0, 1.0, model, args.loss), args.heads * dim

    def draw(*shape: int, scale: float = 1.0, learned: bool = args.backward) -> Tensor:
        return (scale * torch.randn(shape, device=device)).to(dtype).requires_grad_(learned)

    projections = [draw(args.batch, side * side, 3, args.heads, dim) for _ in range(INPUTS)]
    weights = [draw(args.heads, dim, dim, scale=0.02) for _ in range(INNER[model].matrices)]
    convolutions = [draw(*shape, scale=0.2) for shape in 2 * [(channels, 1, 3, 3), (channels,)]]
    contenders = dict([*softmax_attentions(), *linear_attentions(), *operators(weights, convolutions, setting)])
    found: dict[str, dict[str, Any]] = {}
    with torch.inference_mode(not args.backward):
        for name in [name for name in contenders if name not in args.skip]:
            try:
                call(contenders[name], projections[0], args.backward)
                found[name] = {}
                if device.type == "cuda" or name != "compiled":
                    found[name]["peak_mib"] = peak_mib(contenders[name], projections[1], args.backward)
                if args.backward:
                    found[name]["saved_mib"] = saved_mib(contenders[name], projections[0])
            except Exception as error:  # whatever a backend says where it cannot run
                found[name] = {"unavailable": str(error).strip().splitlines()[0]}
        running = [name for name, row in found.items() if "unavailable" not in row]
        timings: dict[str, list[float]] = {name: [] for name in running}
        deadline = time.monotonic() + args.seconds
        while len(timings[running[0]]) < args.repeats and (len(timings[running[0]]) < 3 or time.monotonic() < deadline):
            for name in running:
                projection = projections[len(timings[name]) % INPUTS]
                projection.grad = None
                timings[name].append(time_ms(partial(call, contenders[name], projection, args.backward), device))
    work = PRODUCTS[model][args.loss] * args.batch * side * side * channels * dim / limits["gemm_gmac_s"] / 1e6
    floor = max(work, PASSES * projections[0].nbytes / 3 / limits["copy_gb_s"] / 1e6)
    for name in running:
        found[name] |= spread(timings[name]) | ({} if args.backward else {"of_floor": floor / spread(timings[name])["ms"]})
    row = {"tokens": side * side, "head_dim": dim, "model": model, "floor_ms": floor, "contenders": found}
    print(f"N {side * side} d {dim} {model}:", *(f"{name} {found[name]['ms']:.2f} ms," for name in running), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--tokens", type=numbers, default=[256, 1024, 4096])
    parser.add_argument("--head-dims", type=numbers, default=[64])
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(PRODUCTS))
    parser.add_argument("--loss", choices=["inner-product", "l2"], default="inner-product")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--backward", action="store_true", help="forward and backward instead of inference")
    parser.add_argument("--skip", action="append", default=[], metavar="NAME", help="a contender to leave out")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=15, help="of timing a row, after which three rounds are enough")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64
    device = runs.find_device(args.device)
    limits = ceilings(device, getattr(torch, args.dtype))
    rows = [measure(args, n, d, model, limits) for n in args.tokens for d in args.head_dims for model in args.models]
    asked = {name: value for name, value in vars(args).items() if name != "out"}
    head = {"command": ["benchmarks/ops.py", *runs.command_line()[1:]], "created": runs.now(), "asked": asked}
    runs.write_json(args.out, head | {"environment": runs.environment(device), "ceilings": limits, "rows": rows})


if __name__ == "__main__":
    main()
