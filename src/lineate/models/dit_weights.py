"""DiT's weights: the geometry that a state dict tells, and diffusers' names for the same tensors, both ways.

    here, as in the original and in SiT        diffusers' DiTTransformer2DModel
    x_embedder.proj                            pos_embed.proj
    t_embedder.mlp.{0,2}                       transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_{1,2}, every block
    y_embedder.embedding_table                 transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table, every block
    pos_embed                                  not stored: it is computed
    blocks.{i}.adaLN_modulation.1              transformer_blocks.{i}.norm1.linear
    blocks.{i}.attn.qkv, .proj                 transformer_blocks.{i}.attn1.to_q, .to_k, .to_v, .to_out.0
    blocks.{i}.attn.core.*                     transformer_blocks.{i}.attn1.core.*, of a converted one
    blocks.{i}.mlp.fc1, .fc2                   transformer_blocks.{i}.ff.net.0.proj, .net.2
    final_layer.adaLN_modulation.1, .linear    proj_out_1, proj_out_2

diffusers keeps one copy of the embedders a block; a model whose copies were trained apart is no DiT and is refused. With the same
tensors it computes a little other values than the original: its 128 frequencies of the time end at exactly 1/10000 (divisor 127
instead of 128), and its second norm of a block has ε 1e-5 unless its config says 1e-6. `lineate.generation.pipeline` sets both
right, in a model that says so when it is saved.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lineate.models.dit import WIDTHS, DiT, grid_positions

Tensors = dict[str, Tensor]

_BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
_EMBEDDERS = {
    "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table",
}
_ENDS = {"pos_embed.proj": "x_embedder.proj", "proj_out_1": "final_layer.adaLN_modulation.1", "proj_out_2": "final_layer.linear"}


class WeightsError(ValueError):
    """Tensors that are not a DiT's, or not of one that can be built; the message names them."""


def geometry(tensors: Mapping[str, Tensor], num_heads: int | None = None) -> dict[str, Any]:
    """The arguments of `DiT`, read off tensors under the original's names; a grid that no shape tells is square.

    `num_heads` is needed for widths that are none of the paper's. Raises `WeightsError`.
    """

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name not in tensors:
            raise WeightsError(f"not a DiT: missing {name}")
        if tensors[name].ndim != axes:
            raise WeightsError(f"{name} has shape {tuple(tensors[name].shape)}, expected {axes} axes")
        return tuple(tensors[name].shape)

    width, channels, patch, _ = shape("x_embedder.proj.weight", 4)
    tokens = shape("pos_embed", 3)[1]
    side, values = math.isqrt(tokens), shape("final_layer.linear.weight", 2)[0]
    known = {size: heads for size, _, heads in WIDTHS.values()}
    if side**2 != tokens:
        raise WeightsError(f"pos_embed has {tokens} tokens, which is not a square grid")
    if values not in (patch**2 * channels, 2 * patch**2 * channels):
        raise WeightsError(f"final_layer.linear gives {values} values a patch, not one or two for each of {patch**2 * channels}")
    if num_heads is None and width not in known:
        choices = ", ".join(map(str, known))
        raise WeightsError(f"no shape tells the heads of a width of {width}; pass num_heads= (known widths: {choices})")
    blocks = _blocks(tensors)
    if blocks != set(range(len(blocks))):
        raise WeightsError(f"the blocks are not numbered from 0 without a gap: {sorted(blocks)}")
    return {
        "input_size": side * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": len(blocks),
        "num_heads": num_heads or known[width],
        "mlp_ratio": shape("blocks.0.mlp.fc1.weight", 2)[0] / width,
        "num_classes": shape("y_embedder.embedding_table.weight", 2)[0] - 1,
        "learn_sigma": values == 2 * patch**2 * channels,
    }


def _blocks(tensors: Mapping[str, Tensor]) -> set[int]:
    return {int(found[1]) for name in tensors if (found := re.match(r"blocks\.(\d+)\.", name))}


def dit_from(tensors: Mapping[str, Tensor], num_heads: int | None = None, grid: tuple[int, int] = (16, 16)) -> DiT:
    """A `DiT` with these tensors, under the original's names or diffusers', in eval mode; the last class is the null label.

    `num_heads` is needed for widths that are none of the paper's, `grid` for diffusers' names and another grid than that.
    Raises `WeightsError` naming what is missing, too many or misshapen; nothing is ever skipped.
    """
    if any(name.startswith("transformer_blocks.") for name in tensors):
        tensors = from_diffusers(tensors, grid)
    arguments = geometry(tensors, num_heads)
    try:
        with torch.device("meta"):
            model = DiT(**arguments)
        model.load_state_dict(dict(tensors), assign=True)
    except (RuntimeError, ValueError) as error:
        raise WeightsError(f"not a DiT: {' '.join(str(error).split())}") from error
    return model.eval()


def from_diffusers(tensors: Mapping[str, Tensor], grid: tuple[int, int] = (16, 16)) -> Tensors:
    """diffusers' names to the original's. `grid` (rows, columns) of the positions, which diffusers does not store.

    Raises `WeightsError` for a name that is not DiT's, and for embedders that differ from block to block.
    """
    found: Tensors = {}
    for name, tensor in tensors.items():
        own = _own_name(name)
        if own in found and not torch.equal(found[own], tensor):
            raise WeightsError(f"{name} differs from the first block's: a DiT has one {own} for all blocks")
        found[own] = tensor
    for block in {name.rpartition(".attn.")[0] for name in found if ".attn.to_" in name}:
        for kind in ("weight", "bias"):
            parts = [f"{block}.attn.to_{x}.{kind}" for x in "qkv"]
            if missing := [name for name in parts if name not in found]:
                raise WeightsError(f"not a DiT: missing {missing[0]}")
            found[f"{block}.attn.qkv.{kind}"] = torch.cat([found.pop(name) for name in parts])
    if "x_embedder.proj.weight" not in found:
        raise WeightsError("not a DiT: missing pos_embed.proj.weight")
    found["pos_embed"] = grid_positions(found["x_embedder.proj.weight"].shape[0], grid, grid)
    return found


def _own_name(name: str) -> str:
    """The original's name of a tensor of diffusers'; q, k and v, which are one tensor there, keep theirs."""
    stem, _, kind = name.rpartition(".")
    if stem in _ENDS:
        return f"{_ENDS[stem]}.{kind}"
    if parts := re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", stem):
        block, inner = parts.groups()
        if inner in _EMBEDDERS:
            return f"{_EMBEDDERS[inner]}.{kind}"
        if inner in _BLOCK:
            return f"blocks.{block}.{_BLOCK[inner]}.{kind}"
        if inner in ("attn1.to_q", "attn1.to_k", "attn1.to_v"):
            return f"blocks.{block}.attn.{inner.removeprefix('attn1.')}.{kind}"
    raise WeightsError(f"{name} is not a tensor of diffusers' DiTTransformer2DModel")


def to_diffusers(tensors: Mapping[str, Tensor]) -> Tensors:
    """The original's names to diffusers', each embedder once a block; those of a converted DiT's cores too.

    Raises `WeightsError` for a name that is not DiT's.
    """
    blocks = sorted(_blocks(tensors))
    inner, embedders, ends = ({own: theirs for theirs, own in names.items()} for names in (_BLOCK, _EMBEDDERS, _ENDS))
    found: Tensors = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        parts = re.fullmatch(r"blocks\.(\d+)\.(.+)", stem)
        if name == "pos_embed":
            continue
        if stem in ends:
            found[f"{ends[stem]}.{kind}"] = tensor
        elif stem in embedders:
            found |= {f"transformer_blocks.{block}.{embedders[stem]}.{kind}": tensor for block in blocks}
        elif parts and parts[2] == "attn.qkv":
            names = (f"transformer_blocks.{parts[1]}.attn1.to_{x}.{kind}" for x in "qkv")
            found |= {own: part.contiguous() for own, part in zip(names, tensor.chunk(3), strict=True)}
        elif parts and parts[2] in inner:
            found[f"transformer_blocks.{parts[1]}.{inner[parts[2]]}.{kind}"] = tensor
        elif core := re.fullmatch(r"blocks\.(\d+)\.attn\.(core\..+)", name):
            found[f"transformer_blocks.{core[1]}.attn1.{core[2]}"] = tensor
        else:
            raise WeightsError(f"{name} is not a tensor of a DiT")
    return found
