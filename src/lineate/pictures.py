"""The pictures of a run, as PNG: patch features, implicit attention and saliency, the original beside the converted model.

Features: the three leading principal components of the original's patch features as red, green and blue; the converted
model's in the same basis and range, so that equal colours mean equal features (`analysis.pca_rgb`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lineate.analysis import implicit_attention, pca_rgb
from lineate.evaluate import evaluating
from lineate.families import detect
from lineate.images import centre_crop, whole
from lineate.mixers.base import Frozen
from lineate.sources import Source

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Models = Mapping[str, nn.Module]  # "original" and "converted", in the order in which they are shown

DETAIL_PX = 448  # short side of the pictures whose features are shown, where the model's own size is not larger
WIDTH_PX, TITLE_PX = 1320, 34
DPI = 100


class Picture(Frozen):
    """One picture of a run: its file below the run's folder, what kind it is, and its words."""

    file: str
    kind: Literal["pca", "attention", "saliency"]
    title: str
    caption: str


def draw_features(folder: Path, source: Source, models: Models, paths: Sequence[Path]) -> list[Picture]:
    """`folder`/pictures/pca_{i}.png: photograph | features of the original | of the converted model."""
    drawn = []
    for i, path in enumerate(paths):
        image = _photograph(source, path, DETAIL_PX, models["original"])
        grid = _grid(models["original"], image)
        features = {name: _patches(model, image)[0] for name, model in models.items()}
        original, converted = pca_rgb(features["original"], features["converted"], grid)
        panels = {"photograph": _pixels(source, image), "original": original, "converted": converted}
        file = _save_row(folder, f"pca_{i}", panels)
        caption = (
            "First three principal components of the patch features as red, green and blue, in the original's basis. "
            f"Held out; {image.shape[-2]}×{image.shape[-1]} px, {grid[0]}×{grid[1]} patches."
        )
        drawn.append(Picture(file=file, kind="pca", title=path.name, caption=caption))
    return drawn


def draw_saliency(folder: Path, source: Source, models: Models, paths: Sequence[Path]) -> list[Picture]:
    """`folder`/pictures/saliency_{i}.png: photograph | saliency by the original | by the converted model; head unchanged."""
    assert source.head is not None
    drawn = []
    for i, path in enumerate(paths):
        image = _photograph(source, path, source.image_size, models["original"])
        size, grid = tuple(image.shape[-2:]), _grid(models["original"], image)
        panels = {"photograph": _pixels(source, image)}
        for name, model in models.items():
            with torch.inference_mode():
                panels[name] = source.head(_patches(model, image), grid, size)[0, 0].cpu().numpy()
        off = abs(panels["original"] - panels["converted"]).mean()
        file = _save_row(folder, f"saliency_{i}", panels)
        caption = f"Saliency, white 1 and black 0, by the same unchanged head. Mean absolute difference {off:.3f}. Held out."
        drawn.append(Picture(file=file, kind="saliency", title=path.name, caption=caption))
    return drawn


def draw_attention(folder: Path, source: Source, models: Models, sites: Sequence[str], path: Path) -> Picture:
    """`folder`/pictures/attention.png: a row a model, by its name, and a column a site; the query is the patch in the middle."""
    first = next(iter(models.values()))
    image = _photograph(source, path, DETAIL_PX, first)
    (height, width), prefix = _grid(first, image), detect(first).geometry(first).prefix
    row, column = height // 2, width // 2
    x, y = (column + 0.5) * source.multiple, (row + 0.5) * source.multiple
    photograph = _pixels(source, image)
    grey = photograph.mean(-1)
    aspect = image.shape[-2] / image.shape[-1]
    figure, axes = _figure(len(models), len(sites) + 1, aspect)
    for line, (name, model) in zip(axes, models.items(), strict=True):
        line[0].imshow(photograph)
        for colour, width_pt in (("white", 4), ("crimson", 2)):  # a rim, to be seen on any photograph
            line[0].plot(x, y, "o", ms=9, mfc="none", mec=colour, mew=width_pt)
        line[0].set_title(name, fontsize=12)
        for axis, site in zip(line[1:], sites, strict=True):
            weights = implicit_attention(model, image, site, prefix + row * width + column)[:, prefix:].mean(0)
            shown = weights.unflatten(0, (height, width)).cpu().numpy()
            axis.imshow(grey, cmap="gray", vmin=0, vmax=1)
            extent = (-0.5, grey.shape[1] - 0.5, grey.shape[0] - 0.5, -0.5)
            top = max(float(torch.quantile(weights, 0.995)), torch.finfo(torch.float32).tiny)
            axis.imshow(shown, cmap="inferno", vmin=0, vmax=top, alpha=0.75, extent=extent, interpolation="bilinear")
            axis.set_title(site, fontsize=12)
    file = _save(folder, "attention", figure)
    caption = (
        "How much each token's value weighs in the output of one query, the circled patch: the mean over the heads of "
        "‖∂o/∂v‖ (softmax's own attention, for the original). Every map has its own colour scale."
    )
    return Picture(file=file, kind="attention", title=path.name, caption=caption)


def early_middle_late(sites: Sequence[str]) -> list[str]:
    """Three sites that stand for all: the first, the middle one and the last; fewer where there are fewer."""
    return [sites[i] for i in sorted({0, len(sites) // 2, len(sites) - 1})]


def _photograph(source: Source, path: Path, size: int, model: nn.Module) -> Tensor:
    """The whole picture (1, 3, h, w), its short side `size` or the source's own; cropped for a model of one fixed size."""
    if not detect(model).geometry(model).any_size:
        image = centre_crop(path, source.image_size, source.mean, source.std)
    else:
        image = whole(path, max(size, source.image_size), source.mean, source.std, source.multiple)
    reference = next(model.parameters())
    return image.to(reference.device, reference.dtype)


def _grid(model: nn.Module, image: Tensor) -> tuple[int, int]:
    height, width = detect(model).geometry(model).patch
    return image.shape[-2] // height, image.shape[-1] // width


@torch.inference_mode()
def _patches(model: nn.Module, image: Tensor) -> Tensor:
    """Patch features (1, h·w, C) after the last norm."""
    family = detect(model)
    with evaluating(model):
        return family.features(model, image).tokens[:, family.geometry(model).prefix :]


def _pixels(source: Source, image: Tensor) -> Any:
    """A normalised picture (1, 3, h, w) as (h, w, 3) in [0, 1]."""
    shown = image[0].detach().cpu().float()
    shown = shown * torch.tensor(source.std).view(3, 1, 1) + torch.tensor(source.mean).view(3, 1, 1)
    return shown.clamp(0, 1).permute(1, 2, 0).numpy()


def _figure(rows: int, columns: int, aspect: float) -> tuple[Figure, list[list[Axes]]]:
    """A figure `WIDTH_PX` wide of equal panels with height / width = `aspect`, each with room for a title."""
    from matplotlib.figure import Figure

    height = rows * (WIDTH_PX / columns * aspect + TITLE_PX)
    figure = Figure(figsize=(WIDTH_PX / DPI, height / DPI), dpi=DPI, layout="constrained", facecolor="white")
    axes: list[list[Axes]] = figure.subplots(rows, columns, squeeze=False).tolist()
    for axis in (axis for line in axes for axis in line):
        axis.set_axis_off()
    return figure, axes


def _save_row(folder: Path, name: str, panels: Mapping[str, Any]) -> str:
    height, width = next(iter(panels.values())).shape[:2]
    figure, (axes,) = _figure(1, len(panels), height / width)
    for axis, (title, panel) in zip(axes, panels.items(), strict=True):
        axis.imshow(panel, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(title, fontsize=12)
    return _save(folder, name, figure)


def _save(folder: Path, name: str, figure: Figure) -> str:
    (folder / "pictures").mkdir(exist_ok=True)
    figure.savefig(folder / "pictures" / f"{name}.png")
    return f"pictures/{name}.png"
