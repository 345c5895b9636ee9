"""A model as a file that runs without lineate: a program of torch.export (.pt2) or an ONNX graph, for pictures of any size.

    pixel_values (B, 3, h, w)                       ->  logits (B, classes), last_hidden_state (B, N, C), class_token (B, C)
    latents (B, C, h, w), times (B,), classes (B,)  ->  prediction (B, C', h, w)                         lineate's own DiT

B, h and w are free where the model takes any size (two or more patches a side; where attention has windows, more than one of the
tiles that they are cut into: nine), and position embeddings are interpolated inside the file. Before a file appears it is run (an
ONNX graph by onnxruntime) at three sizes, beside the model: where they disagree there is no file. `last_hidden_state` is after
the last norm, `class_token` its first token. Tracing is torch.export's non-strict mode: the grid reaches the cores through hooks,
which strict mode does not follow.

Legend: B batch, N tokens, C channels, h×w px.
"""

from __future__ import annotations

import importlib.util
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from lineate.convert import core_modules
from lineate.evaluate import evaluating
from lineate.families import Features, Geometry, detect
from lineate.ops.local import SMALLEST_TILE
from lineate.version import __version__

Format = Literal["onnx", "torch"]
SUFFIX: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2"}  # diffusers' folders are of `generation/pipeline.py`
OUTPUTS: dict[str, Callable[[Features], Tensor | None]] = {
    "logits": lambda found: found.logits,
    "last_hidden_state": lambda found: found.tokens,
    "class_token": lambda found: found.tokens[:, 0],
}
NEEDS = ("onnx", "onnxscript", "onnxruntime")  # for ONNX
TOLERANCE = 1e-4  # ‖file - model‖ / ‖model‖ of each output; different orders of summation in fp32 are at about 1e-6
Runner = Callable[..., Sequence[Tensor]]


class ExportError(ValueError):
    """A model cannot be exported, or its file does not answer as it does; the message is one line."""


@dataclass(frozen=True)
class Agreement:
    """The largest relative error of a file's outputs at one size in px."""

    height: int
    width: int
    error: float


@dataclass(frozen=True)
class _Call:
    """How a model is called: the module, names of its inputs and outputs, inputs drawn for (B, h, w), sizes in px to check at."""

    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    draw: Callable[[int, int, int], tuple[Tensor, ...]]
    patch: tuple[int, int]
    sizes: tuple[tuple[int, int], ...]
    fewest: int  # patches a side


class _Pictures(nn.Module):
    """A model of pictures, down to the outputs asked for."""

    def __init__(self, model: nn.Module, outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        found = detect(self.model).features(self.model, pixel_values)
        return tuple(cast(Tensor, OUTPUTS[name](found)) for name in self.outputs)


class _Denoiser(nn.Module):
    """lineate's DiT, under the names of its inputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: Tensor, times: Tensor, classes: Tensor) -> tuple[Tensor]:
        return (self.model(latents, times, classes),)


def _fewest(model: nn.Module) -> int:
    """Patches a side from which on a trace holds: it takes for granted that windows are cut into several tiles."""
    extents = [0]
    for core in core_modules(model).values():
        windows = (core.config.neighborhood, core.config.mixer)
        extents += [getattr(part, name) for part in windows for name in ("window", "radius") if hasattr(part, name)]
    return max(SMALLEST_TILE, *extents) + 1 if any(extents) else 2


def _sizes(geometry: Geometry, fewest: int) -> tuple[tuple[int, int], ...]:
    """A low, a high and the model's own size; the own one alone where it takes no other."""
    patch_h, patch_w = geometry.patch
    own = geometry.image or (16 * patch_h, 16 * patch_w)
    if not geometry.any_size:
        return (own,)
    rows, columns = (max(fewest, side) for side in (own[0] // patch_h, own[1] // patch_w))
    grids = ((max(fewest, rows // 2), columns + fewest), (rows + fewest, max(fewest, columns // 2)), (rows, columns))
    return tuple((r * patch_h, c * patch_w) for r, c in grids)


def _call(model: Any, outputs: Sequence[str]) -> _Call:
    """How `model` is called. Raises `ExportError` for outputs that it does not have."""
    family = detect(model)
    geometry = family.geometry(model)
    fewest = _fewest(model)
    sizes = _sizes(geometry, fewest)
    found = partial(_Call, patch=geometry.patch, sizes=sizes, fewest=fewest)
    if family.name == "lineate":
        channels, labels = model.x_embedder.proj.in_channels, model.y_embedder.classes
        draw = lambda b, h, w: (torch.randn(b, channels, h, w), 999 * torch.rand(b), torch.randint(labels, (b,)))  # noqa: E731
        return found(_Denoiser(model), ("latents", "times", "classes"), _chosen(outputs, ["prediction"]), draw)
    if family.name.startswith("diffusers"):
        raise ExportError(f"{type(model).__name__} is diffusers' own denoiser; what can be exported takes pictures, or is a DiT")
    with torch.no_grad():
        probe = family.features(model, torch.zeros(1, 3, *sizes[0]))
    absent = {"logits": probe.logits is None, "class_token": not geometry.class_token}
    chosen = _chosen(outputs, [name for name in OUTPUTS if not absent.get(name)])
    return found(_Pictures(model, chosen), ("pixel_values",), chosen, lambda b, h, w: (torch.randn(b, 3, h, w),))


def _chosen(outputs: Sequence[str], names: list[str]) -> tuple[str, ...]:
    """The outputs asked for, or the first of those that there are."""
    for name in outputs:
        if name not in names:
            raise ExportError(f"the model has no output {name!r}; choices: {', '.join(names)}")
    return tuple(dict.fromkeys(outputs)) or (names[0],)


def _trace(call: _Call) -> ExportedProgram:
    (height, width), (patch_h, patch_w) = call.sizes[0], call.patch
    batch = Dim("batch", min=1)
    free: dict[int, Any] = {0: batch}
    if len(call.sizes) > 1:
        free |= {2: patch_h * Dim("rows", min=call.fewest), 3: patch_w * Dim("columns", min=call.fewest)}
    inputs = call.draw(2, height, width)
    shapes = tuple(free if x.ndim == 4 else {0: batch} for x in inputs)
    return torch.export.export(call.module, inputs, dynamic_shapes=shapes, strict=False)


def _write_torch(program: ExportedProgram, call: _Call, file: Path, opset: int | None) -> Runner:
    torch.export.save(program, file)
    return cast(Runner, torch.export.load(file).module())


def _write_onnx(program: ExportedProgram, call: _Call, file: Path, opset: int | None) -> Runner:
    """Write the graph, its axes named and its weights in a second file if they are large; what runs it."""
    import onnxruntime

    written: Any = torch.onnx.export(
        program, dynamo=True, input_names=call.inputs, output_names=call.outputs, opset_version=opset, verbose=False
    )
    shape = written.model.graph.inputs[0].shape
    symbols = {axis: str(shape[axis]).rpartition("*")[2] for axis in (0, 2, 3)}
    names = {0: "batch"} if len(call.sizes) == 1 else {0: "batch", 2: "rows", 3: "columns"}
    written.rename_axes({symbols[axis]: name for axis, name in names.items()})
    written.model.metadata_props["lineate"] = __version__
    written.save(file)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> list[Tensor]:
        fed = {name: x.numpy() for name, x in zip(call.inputs, inputs, strict=True)}
        return [torch.from_numpy(x) for x in session.run(list(call.outputs), fed)]

    return run


_WRITERS: dict[Format, Callable[[ExportedProgram, _Call, Path, int | None], Runner]] = {
    "onnx": _write_onnx,
    "torch": _write_torch,
}


def _compare(run: Runner, call: _Call, batch: int, size: tuple[int, int]) -> Agreement:
    """Raise `ExportError` unless the file answers as the model does at this size."""
    inputs = call.draw(batch, *size)
    errors = {}
    for name, found, expected in zip(call.outputs, run(*inputs), call.module(*inputs), strict=True):
        errors[name] = float((found - expected).norm() / expected.norm())
        if found.shape != expected.shape or not errors[name] <= TOLERANCE:
            raise ExportError(
                f"the file disagrees with the model at {size[0]}×{size[1]} px: {name} by {errors[name]:.1e} (relative), more "
                f"than {TOLERANCE:.0e}; nothing was written"
            )
    return Agreement(*size, max(errors.values()))


@torch.no_grad()
def export(
    model: nn.Module, path: str | Path, *, format: Format = "onnx", outputs: Sequence[str] = (), opset: int | None = None
) -> list[Agreement]:
    """Write `model`, converted or not, in fp32 and on the CPU, to the file `path`, and return how well it agrees at each size.

    `outputs` are names of the module docstring; the default is logits where the model has classes, else `last_hidden_state`.
    Weights beyond ONNX's 2 GB go to a second file beside the first, `path` + ".data". An older file is replaced.
    Raises `ExportError`; then nothing was written or changed.
    """
    target = Path(path).resolve()
    _check(model, target, format)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    with evaluating(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            temporary.mkdir(parents=True)
            call = _call(model, outputs)
            run = _write(call, format, temporary / target.name, opset)
            found = [_compare(run, call, 1 + (i == 0), size) for i, size in enumerate(call.sizes)]
            for file in sorted(temporary.iterdir(), reverse=True):  # the weights beside a graph come before it
                file.replace(target.with_name(file.name))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return found


def _check(model: nn.Module, target: Path, format: str) -> None:
    """Raise `ExportError` for what would fail after the tracing, which takes long."""
    if format not in SUFFIX:
        raise ExportError(f"unknown format {format!r}; choices: {', '.join(SUFFIX)}")
    if target.suffix != SUFFIX[format]:
        raise ExportError(f"a file of format {format!r} is named *{SUFFIX[format]}, got {target.name!r}")
    if target.is_dir():
        raise ExportError(f"{target} is a folder; the output is a file")
    if missing := [name for name in NEEDS if format == "onnx" and importlib.util.find_spec(name) is None]:
        raise ExportError(f"ONNX needs {', '.join(missing)}: pip install '.[export]' in a clone")
    first = next(model.parameters())
    if first.dtype != torch.float32 or first.device.type != "cpu":
        raise ExportError(f"the model is in {first.dtype} on {first.device}; call model.float().cpu() before")


def _write(call: _Call, format: Format, file: Path, opset: int | None) -> Runner:
    """Trace and write. Raises `ExportError` with the cause of whatever the exporters raise, most of it of torch's own kinds."""
    try:
        return _WRITERS[format](_trace(call), call, file, opset)
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise ExportError(f"{type(call.module.model).__name__} cannot be exported to {format}: {reason}") from error
