"""Tiny random hosts, and what several test files ask of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import SD3Transformer2DModel

    from lineate.models.dit import DiT

DIT = {"input_size": (8, 6), "patch_size": 2, "in_channels": 3, "hidden_size": 24, "depth": 2, "num_heads": 3, "num_classes": 5}

# transformers' configs
VISION = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
PLAIN = VISION | {"intermediate_size": 48}
TEXT = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 99,
    "bos_token_id": 1, "eos_token_id": 2, "projection_size": 24,
}  # fmt: skip


def dit(**changes: Any) -> DiT:
    """A DiT, random everywhere, also where it starts at zero."""
    from lineate.models.dit import DiT

    model = DiT(**(DIT | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def sd3(**changes: Any) -> SD3Transformer2DModel:
    """An SD3 transformer, random everywhere; two plain joint blocks where nothing is said."""
    from diffusers import SD3Transformer2DModel

    geometry = {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8,
        "num_attention_heads": 3, "joint_attention_dim": 12, "caption_projection_dim": 24, "pooled_projection_dim": 10,
        "pos_embed_max_size": 12,
    }  # fmt: skip
    return SD3Transformer2DModel(**geometry | changes).eval()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient by name; the model's own are gone afterwards."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_with_gradients(found: Callable[..., Tensor], expected: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    """Two functions of the inputs give the same output and the same gradients."""
    leaves = [x.requires_grad_() for x in inputs]
    cotangent = torch.randn_like(leaves[0])
    outputs, slopes = [], []
    for function in (found, expected):
        out = function(*leaves)
        outputs.append(out.detach())
        slopes.append(torch.autograd.grad((out * cotangent).sum(), leaves))
    torch.testing.assert_close(*outputs)
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other)
