"""The CPU kernels of `aligned_cpu.cpp`: compiled once, when somebody asks for it, and from then on found and used.

    lineate build        or lineate.kernels.cpu.build(): half a minute, with a C++20 compiler (CXX, or c++, g++ or clang++)

Nothing is ever compiled otherwise. A library is kept in LINEATE_CACHE (~/.cache/lineate), under a name that stands for its
source, PyTorch's version and the processor's vectors, so that a change of any of them asks for another. LINEATE_CPU_KERNELS=0
leaves it unused. `lineate.ops.aligned_cpu` calls it, and is what it must equal. To torch.compile its functions are operators.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("aligned_cpu.cpp")
MODELS = ("2layer", "swiglu")
TYPES = (torch.float32, torch.bfloat16, torch.float16)
FEW = 32  # queries that are answered one after the other
# The compiler's name for what PyTorch found the processor to have; elsewhere its own default is good.
ARCHITECTURES = {"AVX512": ["-march=x86-64-v4"], "AVX2": ["-march=x86-64-v3"]}


def _statistics_of(k: Tensor, eps: float) -> Tensor:
    batch, _, heads, dim = k.shape
    return k.new_empty((batch, 2, heads, dim), dtype=torch.float32)


def _sums_of(k: Tensor, v: Tensor, norm: Tensor | None, convolution: list[Tensor], weights: list[Tensor], *_: Any) -> Tensor:
    return k.new_empty((len(weights), len(k), *weights[0].shape), dtype=torch.float32)


def _answers_of(q: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _core_of(q: Tensor, *_: Any) -> Tensor:
    return _answers_of(q.transpose(1, 2)).transpose(1, 2)


# What a compiler sees of the library's functions.
SHAPES: dict[str, Callable[..., Tensor]] = {
    "cpu_statistics": _statistics_of,
    "cpu_learn": _sums_of,
    "cpu_answer": _answers_of,
    "cpu_core": _core_of,
    "cpu_windows": _answers_of,
    "cpu_joined": _answers_of,
}


class BuildError(RuntimeError):
    """The kernels could not be compiled."""


def library() -> Path:
    """Where the compiled kernels are, or would be."""
    made = (SOURCE.read_text(encoding="utf-8"), torch.__version__, torch.backends.cpu.get_cpu_capability())
    folder = Path(os.environ.get("LINEATE_CACHE") or Path.home() / ".cache" / "lineate")
    return folder / f"aligned_cpu-{hashlib.sha256(repr(made).encode()).hexdigest()[:16]}.so"


def _compiler() -> str:
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    found = next((path for name in wanted if (path := shutil.which(name))), None)
    if found is None:
        raise BuildError(f"no C++ compiler: {', '.join(wanted)} not found; install g++ 11 or later, or name a compiler in CXX")
    return found


def build() -> Path:
    """Compile the kernels for this machine and this PyTorch, unless that is done; models use them from their next call on."""
    if sys.platform != "linux":
        raise BuildError(f"the CPU kernels are compiled on linux only, not on {sys.platform}; everything works without them")
    file, torch_folder = library(), Path(torch.__file__).parent
    if not file.exists():
        compiler = _compiler()
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            compiled, linked = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
            options = ["-std=c++20", "-O3", "-fPIC", "-fopenmp", *ARCHITECTURES.get(torch.backends.cpu.get_cpu_capability(), [])]
            # Linked without -fopenmp: the runtime that it would bring is there, PyTorch's own.
            for command in (
                [*options, f"-I{torch_folder / 'include'}", "-c", str(SOURCE), "-o", str(compiled)],
                ["-shared", str(compiled), "-o", str(linked), f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"],
            ):
                done = subprocess.run([compiler, *command], capture_output=True, text=True, check=False)
                if done.returncode:
                    said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
                    raise BuildError(f"{compiler} failed ({done.returncode}): {said}; g++ 11 or later is known to work")
            linked.replace(file)
    _missing.cache_clear()
    return file


def load(file: Path) -> None:
    """Load a compiled library."""
    torch.ops.load_library(file)
    for name, shape_of in SHAPES.items():
        torch.library.register_fake(f"lineate::{name}", shape_of, allow_override=True)


@cache
def _missing() -> str | None:
    """Load the library; why that cannot be, or None."""
    if os.environ.get("LINEATE_CPU_KERNELS") == "0":
        return "LINEATE_CPU_KERNELS=0 leaves them unused"
    file = library()
    if not file.exists():
        return "`lineate build` has not compiled them here"
    try:
        load(file)
    except OSError as error:
        return f"{file} does not load ({error})"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _unavailable() -> str | None:
    """`_missing`, as a compiler can see it."""
    return _missing()


def available() -> bool:
    """Whether they are compiled, and in use."""
    return _missing() is None


def refusal(tensors: Sequence[Tensor], model: str) -> str | None:
    """Why the kernels cannot take these, or None."""
    return f"they know the inner models {', '.join(MODELS)}, not {model}" if model not in MODELS else unfit(tensors)


def unfit(tensors: Sequence[Tensor]) -> str | None:
    """Why no kernel can take these, or None."""
    if type(tensors[0]) is not Tensor or torch._C._are_functorch_transforms_active() or torch.compiler.is_exporting():
        return "operators are traced, counted, transformed or exported"
    if other := {x.dtype for x in tensors}.difference(TYPES):
        return f"they do not compute in {str(other.pop()).removeprefix('torch.')}"
    why: str | None = _unavailable()
    return why


def plain(given: Sequence[Tensor]) -> bool:
    """Whether these are tensors of one type on a CPU that kernels can take."""
    return given[0].device.type == "cpu" and len({x.dtype for x in given}) == 1 and unfit(given) is None


def _tokens(x: Tensor) -> Tensor:
    """x (B, N, H, D) as the kernels read it: any strides but the last."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _dense(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Parameters may lie as a user left them."""
    return [x.contiguous() for x in parameters]


def statistics(k: Tensor, eps: float) -> Tensor:
    """k (B, N, H, D) -> the key norm's offset and scale, (B, 2, H, D)."""
    found: Tensor = torch.ops.lineate.cpu_statistics(_tokens(k), eps)
    return found


def learn(
    k: Tensor, v: Tensor, norm: Tensor | None, convolution: Sequence[Tensor], weights: Sequence[Tensor], place: Sequence[int],
    l2: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """G of (k̂, v), (B, H, D, D) each; `place` is the grid's height, width, first token, `convolution` weight and bias or ()."""
    if k.dtype != v.dtype:
        k, v = k.float(), v.float()
    sums: Tensor = torch.ops.lineate.cpu_learn(_tokens(k), _tokens(v), norm, _dense(convolution), _dense(weights), *place, l2)
    return sums.unbind(0)


def answer(q: Tensor, convolution: Sequence[Tensor], fitted: Sequence[Tensor], place: Sequence[int]) -> Tensor:
    """o (B, N, H, D) of q and the fitted matrices (B, H, D, D)."""
    out: Tensor = torch.ops.lineate.cpu_answer(_tokens(q), _dense(convolution), _dense(fitted), *place)
    return out


def core(
    q: Tensor, k: Tensor, v: Tensor, convolutions: Sequence[Tensor], weights: Sequence[Tensor], eps: float | None,
    place: Sequence[int], l2: bool, mix_logit: Tensor | None = None, window: int = 0, exact: bool = False,
) -> Tensor:  # fmt: skip
    """o (B, H, N, D) of q, k, v, all of a T⁵ core in one; `convolutions` are weight and bias of the queries', of the keys'.

    `mix_logit`, `window` and `exact` as `joined` has them.
    """
    if not q.dtype == k.dtype == v.dtype:
        given = q.float(), k.float(), v.float(), convolutions, weights, eps, place, l2, mix_logit, window, exact
        return core(*given).to(q.dtype)
    out: Tensor = torch.ops.lineate.cpu_core(q, k, v, convolutions, weights, eps, mix_logit, *place, l2, window, exact)
    return out


def windows(q: Tensor, k: Tensor, v: Tensor, place: Sequence[int]) -> Tensor:
    """o (B, h·w, H, D) of q on the grid, with k and v (B, M, H, D); `place` is the grid's height, width, window, first token."""
    out: Tensor = torch.ops.lineate.cpu_windows(_tokens(q), _tokens(k), _tokens(v), *place)
    return out


def joins(given: Sequence[Tensor], outside: int) -> bool:
    """Whether `joined` takes these (mixed, q, k, v), `outside` of whose tokens are answered exactly, one by one."""
    return not torch.is_grad_enabled() and outside <= FEW and plain(given)


def joined(
    mixed: Tensor, q: Tensor, k: Tensor, v: Tensor, mix_logit: Tensor | None, place: Sequence[int], window: int, exact: bool
) -> Tensor:
    """o (B, N, H, D): the mixer's, with windows' mixed in on the grid and, with `exact`, softmax attention's off it.

    sigmoid(`mix_logit`), (H,), is the windows' share, one half where it is None; `window` 0 is none; `place` is height, width and
    first token.
    """
    given = _tokens(mixed), _tokens(q), _tokens(k), _tokens(v)
    out: Tensor = torch.ops.lineate.cpu_joined(*given, mix_logit, *place, window, exact)
    return out
