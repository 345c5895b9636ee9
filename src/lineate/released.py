"""Models from checkpoints that others released: the T⁵ authors' classification formats, their DiT⁵, and the original DiT.

    tensor                                   shape                here
    blocks.{i}.attn.w1, .w2 (and .w3)        (1, H, D, D)         blocks.{i}.attn.core.mixer.w1 ... (H, D, D)
    blocks.{i}.attn.{q,k}_conv2d.*           (C, 1, 3, 3), (C,)   blocks.{i}.attn.core.{q,k}_conv.*
    blocks.{i}.attn.qk_{scale,offset}_ttt    (1, 1, C, 2)         blocks.{i}.attn.core.{q,k}_{scale,offset} (H, D); DiT⁵ alone
    all others                               timm's names, DiT's  the same

The current classification format is SwiGLU with DWC-QK; the older one has w1 and w2 only and no convolutions, and is the 2-layer
inner model. Both take the inner-product loss, instance-normed keys (ε 1), no class token, LayerNorm ε 1e-6, and end in the final
norm, the mean over the tokens and the head. DiT⁵ is preset `dit5`: no tensor tells its neighborhood branch, and no source which
of the two entries of a scale or offset is q's; the first is taken to be. The geometry is read off the tensors, and every tensor
must be used.

Source of these facts: `paper.md` of this project; arXiv 2605.02772. Legend: H heads, D head dim, C = H·D channels.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lineate.checkpoint import disagreement, shapes
from lineate.convert import Conversion, convert
from lineate.mixers.ttt import TTTConfig

if TYPE_CHECKING:
    from lineate.models.dit import DiT

# "ema" is what trainers of denoisers store and evaluate; of a classifier's, the authors evaluate the raw weights.
WRAPPERS = ("ema", "model", "state_dict", "model_ema")
PREFIXES = ("module.", "_orig_mod.")


class ReleasedError(ValueError):
    """A released checkpoint cannot be read, or is not in a format that is known; the message is one line."""


def read_released(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pt, .pth or .bin file by name, freed of training wrappers and "module." prefixes.

    Pickles are read with `weights_only=True`. Raises `ReleasedError`.
    """
    file = Path(path)
    if not file.is_file():
        raise ReleasedError(f"{file} is {'not a file' if file.exists() else 'not there'}")
    try:
        if file.suffix == ".safetensors":
            return unwrap(load_file(file))
        if file.suffix in (".pt", ".pth", ".bin"):
            # Trainers of this kind store their command line beside the weights; a Namespace only holds values.
            with torch.serialization.safe_globals([argparse.Namespace]):
                return unwrap(torch.load(file, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"{refused[1]} is refused" if refused else "no pickle of tensors"
        raise ReleasedError(f"{file} holds more than weights ({reason}); store its state dict alone") from error
    except (OSError, RuntimeError, EOFError, SafetensorError) as error:
        raise ReleasedError(f"{file} cannot be read: {(str(error) or type(error).__name__).splitlines()[0]}") from error
    raise ReleasedError(f"{file} ends in {file.suffix!r}; choices: .safetensors, .pt, .pth, .bin")


def unwrap(source: Any) -> dict[str, Tensor]:
    """The state dict inside a training checkpoint: the first of `WRAPPERS` that it has, or itself, without name prefixes."""
    if not isinstance(source, Mapping):
        raise ReleasedError(f"a checkpoint is a mapping of names to tensors, got {type(source).__name__}")
    for wrapper in WRAPPERS:
        if isinstance(source.get(wrapper), Mapping):
            return unwrap(source[wrapper])
    tensors: dict[str, Tensor] = {}
    for name, tensor in source.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ReleasedError(f"a checkpoint is a mapping of names to tensors, but {name!r} is a {type(tensor).__name__}")
        while name.startswith(PREFIXES):
            name = name.partition(".")[2]
        tensors[name] = tensor
    return tensors


def from_released(source: str | Path | Mapping[str, Tensor]) -> nn.Module:
    """The converted model of a released T⁵ or DiT⁵ checkpoint (a file or its contents), fp32, in eval mode.

    A timm model takes pictures (B, 3, H, W) of any size divisible by the patch and gives the authors' logits; a `DiT` denoises.
    Raises `ReleasedError` naming every tensor that is missing, unexpected or misshapen; none is ever skipped.
    """
    tensors = unwrap(source) if isinstance(source, Mapping) else read_released(source)
    kind = "DiT⁵" if "x_embedder.proj.weight" in tensors else "T⁵ classification"
    model = _dit5(tensors) if kind == "DiT⁵" else _classifier(tensors)
    state = model.state_dict()
    released = {name: _released_name(name) for name in state}
    expected = {released[name]: _released_shape(name, tensor) for name, tensor in state.items()}
    if trouble := disagreement(expected, shapes(tensors)):
        raise ReleasedError(f"not a {kind} checkpoint: {trouble}")
    model.load_state_dict({name: _released_value(name, tensors[released[name]]).reshape(state[name].shape) for name in state})
    return model.eval()


def load_dit(path: str | Path, *, num_heads: int | None = None) -> DiT:
    """The unconverted `DiT` of an original or SiT checkpoint (raw, or of a training run, its EMA first), or of diffusers' folder.

    `num_heads` is needed for a file whose width is none of the paper's. Raises `ReleasedError`.
    """
    from lineate.models.dit_weights import WeightsError, dit_from

    grid = (16, 16)
    file = Path(path)
    if file.is_dir():
        folder = file / "transformer" if (file / "transformer").is_dir() else file  # a pipeline's, or the model's own
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            num_heads, grid = config["num_attention_heads"], (config["sample_size"] // config["patch_size"],) * 2
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ReleasedError(f"{folder} is not a folder of diffusers' DiTTransformer2DModel: {error}") from error
        stored = [folder / f"diffusion_pytorch_model.{suffix}" for suffix in ("safetensors", "bin")]
        if not (there := [file for file in stored if file.is_file()]):
            raise ReleasedError(f"{folder} holds no weights; one of {', '.join(file.name for file in stored)} was expected")
        file = there[0]
    try:
        return dit_from(read_released(file), num_heads, grid)
    except WeightsError as error:
        raise ReleasedError(f"{file}: {error}") from error


def _classifier(tensors: Mapping[str, Tensor]) -> nn.Module:
    from timm.models import VisionTransformer

    return convert(VisionTransformer(**_geometry(tensors)), _conversion(tensors))


def _dit5(tensors: Mapping[str, Tensor]) -> nn.Module:
    from lineate.models.dit import DiT
    from lineate.models.dit_weights import WeightsError, geometry

    start = tensors.get("blocks.0.attn.w1")
    if start is None or start.ndim != 4:
        raise ReleasedError("not a DiT⁵ checkpoint: no blocks.0.attn.w1 of 4 axes; an unconverted DiT is read by load_dit")
    try:
        return convert(DiT(**geometry(tensors, start.shape[1])), "dit5")
    except (WeightsError, ValueError) as error:
        raise ReleasedError(f"not a DiT⁵ checkpoint: {error}") from error


def _conversion(tensors: Mapping[str, Tensor]) -> Conversion:
    """Current or older format, by what there is below `blocks.0.attn`; the strict comparison holds all blocks to it."""
    third, convolved = "blocks.0.attn.w3" in tensors, any(".q_conv2d." in name or ".k_conv2d." in name for name in tensors)
    if third != convolved:
        raise ReleasedError(
            f"w3 {'is' if third else 'is not'} there but the convolutions {'are' if convolved else 'are not'}: "
            "the current T⁵ format has both, the older one neither"
        )
    if third:
        return Conversion(mixer=TTTConfig(inner="swiglu", loss="inner-product"), key_norm="instance", locality="dwc-qk")
    return Conversion(mixer=TTTConfig(inner="2layer", loss="inner-product"), key_norm="instance", locality="none")


def _geometry(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of timm's VisionTransformer, read off the tensors' shapes."""

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name not in tensors:
            raise ReleasedError(f"not a T⁵ classification checkpoint: missing {name}")
        if tensors[name].ndim != axes:
            raise ReleasedError(f"{name} has shape {tuple(tensors[name].shape)}, expected {axes} axes")
        return tuple(tensors[name].shape)

    width, channels, *patch = shape("patch_embed.proj.weight", 4)
    tokens = shape("pos_embed", 3)[1]
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise ReleasedError(f"pos_embed has {tokens} tokens, which is not a square grid without a class token")
    _, heads, head_dim, _ = shape("blocks.0.attn.w1", 4)
    if heads * head_dim != width:
        raise ReleasedError(f"blocks.0.attn.w1 has {heads} heads of {head_dim} channels, but the model has {width} channels")
    blocks = {int(found[1]) for name in tensors if (found := re.match(r"blocks\.(\d+)\.", name))}
    if blocks != set(range(len(blocks))):
        raise ReleasedError(f"the blocks are not numbered from 0 without a gap: {sorted(blocks)}")
    return {
        "img_size": (side * patch[0], side * patch[1]),
        "patch_size": tuple(patch),
        "in_chans": channels,
        "num_classes": shape("head.weight", 2)[0],
        "global_pool": "avg",
        "embed_dim": width,
        "depth": len(blocks),
        "num_heads": heads,
        "mlp_ratio": shape("blocks.0.mlp.fc1.weight", 2)[0] / width,
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "class_token": False,
        "fc_norm": False,  # the final norm stands before the mean, and keeps its name
        "dynamic_img_size": True,
    }


_AFFINE = r"\.core\.([qk])_(scale|offset)$"


def _released_name(name: str) -> str:
    name = re.sub(r"\.core\.mixer\.(w\d)$", r".\1", re.sub(r"\.core\.([qk])_conv\.", r".\1_conv2d.", name))
    return re.sub(_AFFINE, r".qk_\2_ttt", name)


def _released_shape(name: str, tensor: Tensor) -> tuple[int, ...]:
    if re.search(_AFFINE, name):
        return (1, 1, tensor.numel(), 2)
    return (1, *tensor.shape) if ".core.mixer." in name else tuple(tensor.shape)


def _released_value(name: str, tensor: Tensor) -> Tensor:
    found = re.search(_AFFINE, name)
    return tensor[..., "qk".index(found[1])] if found else tensor
