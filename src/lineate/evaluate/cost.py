"""What a conversion buys: latency, multiply-adds and memory of host and converted model side by side, and where they cross.

Latency: one forward pass end to end, of a denoiser one step; the two models taking turns, so that whatever else the machine
does falls on both; median and interquartile range; CUDA synchronised on both sides of every timing.
Multiply-adds: a multiply-add counts one (the paper's convention). Matrix products and convolutions count, norms and
elementwise functions do not. Counted on fake tensors: exact for any size, without memory or arithmetic. Softmax attention is
counted as its two matrix products (the MATH backend): not every torch counts the fused ones on a CPU.
Local attention has two figures: what runs (the eager code's dense tiles, several times more; NATTEN's kernels, where they run,
are counted as those too) and what the operator itself needs, two products of C channels for each pair of a query and a key that
it sees: in neighborhood attention a full window and the M tokens off the grid, 2·N·(w² + M)·C. The paper's NAT rows, M = 0, fit
twice that.
Memory: the peak above what was live before the pass, so activations and temporaries, neither weights nor input. On CUDA the
allocator's own peak; on a CPU the bytes of all live tensors, a kernel's private scratch not included.

Legend: B batch, H heads, N tokens, D head dim, C = H·D, M tokens off the grid, h×w grid, w window.
"""

from __future__ import annotations

import math
import platform
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lineate.convert import core_modules
from lineate.core import CoreAttention, CoreConfig
from lineate.evaluate import EvaluationError, Progress, evaluating
from lineate.families import detect
from lineate.kernels import cpu
from lineate.layout import TokenLayout
from lineate.mixers.base import Frozen
from lineate.ops.neighborhood import neighborhood_attention

_FEWEST_TIMINGS = 3
Run = Callable[[Tensor], object]


class CostRow(Frozen):
    """One picture size: pixels, tokens, medians and interquartile ranges in ms over `repeats` timings of each model.

    GMACs and peak MiB are for the whole batch. `converted_gmacs` is what runs, `converted_operator_gmacs` what the operator
    needs: they differ only under local attention. `speedup` is the original's median over the converted model's.
    """

    height: int
    width: int
    tokens: int
    repeats: int
    original_ms: float
    converted_ms: float
    original_iqr_ms: float
    converted_iqr_ms: float
    speedup: float
    original_gmacs: float
    converted_gmacs: float
    converted_operator_gmacs: float
    original_peak_mib: float
    converted_peak_mib: float


class Cost(Frozen):
    """The rows in order of size, where the two models cross, and what they were measured on.

    `crossover_px` is the side of the square picture from which the speed-up stays above 1, or None if it never or always
    does; `crossover_note` says which. `original_attention` is the host's softmax attention: "fused", "unfused" or "mixed".
    `compiled`: whether both models were timed through `torch.compile`; memory is the uncompiled models' in any case.
    `gemm_gmac_s` is what a product of two large matrices reaches here, in 10⁹ multiply-adds a second: no model is faster.
    """

    rows: tuple[CostRow, ...]
    crossover_px: float | None
    crossover_note: str
    batch: int
    device: str
    dtype: str
    original_attention: str
    gemm_gmac_s: float
    compiled: bool = False


def _executed_macs(function: Callable[..., object], *args: Any) -> float:
    """Multiply-adds that `function(*args)` executes, found on fake copies of its tensors."""
    math_attention, counter = sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False)
    with torch.inference_mode(), FakeTensorMode(allow_non_fake_inputs=True) as fake, math_attention, counter:
        function(*(fake.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in args))
    return float(counter.get_total_flops()) / 2


def _surplus(core: CoreAttention, shape: torch.Size, layout: TokenLayout) -> float:
    """Multiply-adds that a core's local attention executes beyond what the operator needs; `shape` is (B, H, N, D)."""
    batch, heads, _, dim = shape
    surplus, pairs = 0.0, core.mixer.attended(layout)
    if pairs is not None:
        q = torch.empty(shape)
        surplus += _executed_macs(core.mixer, q, q, q, layout) - 2 * batch * heads * dim * pairs
    if core.config.neighborhood is not None:
        surplus += _neighborhood_surplus(core.config.neighborhood.window, shape, layout)
    return surplus


def _neighborhood_surplus(window: int, shape: torch.Size, layout: TokenLayout) -> float:
    """As `_surplus`, of a neighborhood branch's windows: beyond 2·N·(w² + M)·C."""
    batch, heads, tokens, dim = shape
    q, k = (torch.empty(batch, heads, n, dim) for n in (layout.grid_tokens, tokens))
    seen = min(window, layout.height) * min(window, layout.width) + tokens - layout.grid_tokens
    executed = _executed_macs(neighborhood_attention, q, k, k, layout.height, layout.width, window, layout.prefix)
    return executed - 2 * q.numel() * seen


def _count(model: nn.Module, run: Callable[..., object], *args: Any) -> tuple[float, float]:
    """GMACs of one forward pass `run(*args)` of the model: what is executed, and what the operator needs."""
    calls: dict[tuple[CoreConfig, torch.Size, TokenLayout], list[CoreAttention]] = {}

    def note(core: CoreAttention, inputs: tuple[Any, ...]) -> None:
        calls.setdefault((core.config, inputs[0].shape, inputs[3]), []).append(core)

    handles = [core.register_forward_pre_hook(note) for core in core_modules(model).values()]
    try:
        with evaluating(model):
            executed = _executed_macs(run, *args)
    finally:
        for handle in handles:
            handle.remove()
    surplus = sum(len(cores) * _surplus(cores[0], shape, layout) for (_, shape, layout), cores in calls.items())
    return executed / 1e9, (executed - surplus) / 1e9


def count_macs(model: nn.Module, *args: Any) -> float:
    """GMACs that one forward pass `model(*args)` in eval mode executes; a multiply-add counts one. See the module docstring."""
    return _count(model, model, *args)[0]


def count_operator_macs(model: nn.Module, *args: Any) -> float:
    """As `count_macs`, with each local attention at what the operator needs instead of its eager tiles."""
    return _count(model, model, *args)[1]


class LiveTensors(TorchDispatchMode):
    """Bytes of the storages that operators made and that still live, and their peak; `known` storages do not count."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live, self.peak = 0, 0
        self.known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.known:
            return
        self.known.add(storage._cdata)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, nbytes: int) -> None:
        self.known.discard(key)
        self.live -= nbytes


@torch.inference_mode()
def peak_mib(model: nn.Module, images: Tensor, run: Run | None = None) -> float:
    """Peak MiB of activations and temporaries of one forward pass, above what was live before it. See the module docstring.

    `run` is what runs the model on the images, where calling it is not enough.
    """
    run = run or model
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
        torch.cuda.reset_peak_memory_stats(images.device)
        before = torch.cuda.memory_allocated(images.device)
        run(images)
        torch.cuda.synchronize(images.device)
        return float(torch.cuda.max_memory_allocated(images.device) - before) / 2**20
    with LiveTensors([*model.parameters(), *model.buffers(), images]) as live:
        run(images)
    return float(live.peak) / 2**20


def time_ms(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds that `run` takes, a GPU's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """10⁹ multiply-adds a second of a product of two large square matrices, the best of some."""
    side = 1024 if device.type == "cpu" else 8192
    a = torch.randn(side, side, device=device).to(dtype)
    return side**3 / min(time_ms(lambda: a @ a, device) for _ in range(10)) / 1e6


def _interleaved(runs: tuple[Run, Run], images: Tensor, repeats: int, warmup: int, deadline: float | None) -> Tensor:
    """Timings in ms, (repeats, 2), the models taking turns; past the deadline no more than `_FEWEST_TIMINGS` rounds."""
    for _ in range(warmup):
        for run in runs:
            run(images)
    timings: list[list[float]] = []
    while len(timings) < repeats:
        if deadline is not None and len(timings) >= _FEWEST_TIMINGS and time.monotonic() > deadline:
            break
        timings.append([time_ms(partial(run, images), images.device) for run in runs])
    return torch.tensor(timings, dtype=torch.float64)


def _row(
    models: tuple[nn.Module, nn.Module], images: Tensor, repeats: int, warmup: int, seconds: float | None, compiled: bool
) -> CostRow:
    """Everything about one size. The memory pass comes first and warms up too."""
    original, converted = models
    geometry, runs = detect(original).geometry(original), (detect(original).runner(original), detect(converted).runner(converted))
    deadline = None if seconds is None else time.monotonic() + seconds
    if images.is_cuda:  # libraries take their workspaces at the first call, which would count against the first model
        _interleaved(runs, images, 1, 0, None)
    peaks = [peak_mib(model, images, run) for model, run in zip(models, runs, strict=True)]
    timed = (torch.compile(runs[0], dynamic=False), torch.compile(runs[1], dynamic=False)) if compiled else runs
    timings = _interleaved(timed, images, repeats, warmup, deadline)
    low, median, high = torch.quantile(timings, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), dim=0)
    executed, operator = _count(converted, runs[1], images)
    height, width = images.shape[-2:]
    patch_h, patch_w = geometry.patch
    return CostRow(
        height=height,
        width=width,
        tokens=(height // patch_h) * (width // patch_w) + geometry.prefix,
        repeats=len(timings),
        original_ms=float(median[0]),
        converted_ms=float(median[1]),
        original_iqr_ms=float(high[0] - low[0]),
        converted_iqr_ms=float(high[1] - low[1]),
        speedup=float(median[0] / median[1]),
        original_gmacs=_count(original, runs[0], images)[0],
        converted_gmacs=executed,
        converted_operator_gmacs=operator,
        original_peak_mib=peaks[0],
        converted_peak_mib=peaks[1],
    )


def check_sizes(model: nn.Module, sizes: Sequence[tuple[int, int]]) -> None:
    """Raise `EvaluationError` for a (height, width) in px that `model` cannot take, or if there is none."""
    if not sizes:
        raise EvaluationError("there are no picture sizes to measure at")
    geometry = detect(model).geometry(model)
    patch_h, patch_w = geometry.patch
    fixed = None if geometry.any_size else geometry.image
    for height, width in sizes:
        if height < patch_h or width < patch_w or height % patch_h or width % patch_w:
            raise EvaluationError(f"size {height}×{width} px is not a multiple of the model's {patch_h}×{patch_w} px patches")
        if fixed is not None and (height, width) != fixed:
            raise EvaluationError(
                f"size {height}×{width} px: this model takes {fixed[0]}×{fixed[1]} px only; build it with dynamic_img_size=True"
            )


def _check(original: Any, converted: nn.Module, sizes: Sequence[tuple[int, int]], counts: dict[str, int]) -> None:
    """Raise `EvaluationError` for anything that would fail or mislead half-way through."""
    for name, least in (("repeats", 1), ("batch", 1), ("warmup", 0)):
        if counts[name] < least:
            raise EvaluationError(f"{name} must be at least {least}, got {counts[name]}")
    here, there = (next(model.parameters()) for model in (original, converted))
    if (here.device, here.dtype) != (there.device, there.dtype):
        raise EvaluationError(
            f"the original is on {here.device} in {here.dtype}, the converted model on {there.device} in {there.dtype}: "
            "a comparison needs both alike"
        )
    check_sizes(original, sizes)


def crossover(rows: Sequence[CostRow]) -> tuple[float | None, str]:
    """Side in px of the square picture from which the converted model is faster at every larger measured size, and a sentence.

    Between the two rows around it, log speed-up is taken as linear in log tokens. None if there is no such size.
    """
    points = sorted((row.height * row.width, row.speedup) for row in rows)
    smallest, largest = (round(math.sqrt(points[i][0])) for i in (0, -1))
    slower = [i for i, (_, speedup) in enumerate(points) if speedup < 1]
    if not slower:
        return None, f"the converted model is faster at every measured size, from {smallest} px up"
    if len(slower) == len(points):
        return None, f"the original is faster at every measured size, up to {largest} px"
    last = slower[-1]
    if last == len(points) - 1:
        return None, f"the converted model is faster at some of the measured sizes, but not at the largest, {largest} px"
    (area, speedup), (next_area, next_speedup) = points[last], points[last + 1]
    share = math.log(speedup) / (math.log(speedup) - math.log(next_speedup))
    px = math.sqrt(area) * (next_area / area) ** (share / 2)
    if slower == list(range(last + 1)):
        return px, f"below {px:.0f} px the original is faster on this machine, above it the converted model"
    return px, f"from {px:.0f} px up the converted model is faster on this machine; below that the two trade places"


def device_name(device: torch.device) -> str:
    """The processor in words, for example "Intel Xeon, 2 threads", and whether lineate's kernels are compiled for it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}{', CPU kernels' if cpu.available() else ''}"


@torch.inference_mode()
def cost(
    original: nn.Module,
    converted: nn.Module,
    sizes: Sequence[tuple[int, int]],
    *,
    batch: int = 1,
    repeats: int = 5,
    warmup: int = 1,
    seconds_per_size: float | None = None,
    compiled: bool = False,
    progress: Progress | None = None,
) -> Cost:
    """Measure both models at every (height, width) of `sizes`, in px and multiples of the patch, on random pictures.

    `repeats` timings of each model after `warmup` untimed passes; once `seconds_per_size` have gone by at a size it stops at
    three timings; `compiled` times both models through `torch.compile`. `progress(done, total, what)` is called before each size
    and at the end. Raises `EvaluationError`.
    """
    _check(original, converted, sizes, {"batch": batch, "repeats": repeats, "warmup": warmup})
    reference, channels = next(original.parameters()), detect(original).geometry(original).channels
    generator = torch.Generator().manual_seed(0)
    rows: list[CostRow] = []
    with evaluating(original, converted):
        for height, width in sorted(sizes, key=math.prod):
            if progress is not None:
                progress(len(rows), len(sizes), f"timing {height}×{width} px")
            images = torch.randn(batch, channels, height, width, generator=generator).to(reference.device, reference.dtype)
            rows.append(_row((original, converted), images, repeats, warmup, seconds_per_size, compiled))
    if progress is not None:
        progress(len(rows), len(sizes), "timing done")
    px, note = crossover(rows)
    return Cost(
        rows=tuple(rows),
        crossover_px=px,
        crossover_note=note,
        batch=batch,
        device=device_name(reference.device),
        dtype=str(reference.dtype).removeprefix("torch."),
        original_attention=detect(original).softmax_kind(original),
        gemm_gmac_s=gemm_rate(reference.device, reference.dtype),
        compiled=compiled,
    )
