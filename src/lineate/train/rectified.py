"""What a text-conditional denoiser minimises: rectified flow, as Stable Diffusion 3 is trained. Objectives for `train.loop.fit`.

    x_σ = (1 - σ)·x + σ·ε            ε normal, σ = s·u / (1 + (s - 1)·u), u = sigmoid(n), n normal: logit-normal times
    loss = mean (v_θ(x_σ, 1000·σ, text) - (ε - x))²          every time weighs the same
    from the teacher: mean (v_θ - v_teacher)², both on the same input; no picture need then be true to its text

s is the shift of the pipeline's scheduler, 3 for SD3: times are drawn where the sampler will ask. With probability `dropout` a
text is replaced by the empty one, for guidance. Source: Esser et al., arXiv 2403.03206, section 3.1; diffusers' training of SD3.

Legend: B batch, C channels, h×w grid of latents, M text tokens, E width of their embeddings, P width of the pooled ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor, nn

from lineate.train.objectives import Objective

TIMES = 1000  # what σ is multiplied by before the model sees it


class Pairs(NamedTuple):
    """Pictures and texts, ready for the model: latents (B, C, h, w), texts (B, M, E), and texts as a whole (B, P)."""

    latents: Tensor
    text: Tensor
    pooled: Tensor


def rectified_flow(
    empty: tuple[Tensor, Tensor],
    *,
    shift: float = 1.0,
    dropout: float = 0.1,
    teacher: nn.Module | None = None,
    taught: float = 0.0,
) -> Objective:
    """Velocity along the straight line from a picture to noise: {"loss"}, and its parts where a teacher says something too.

    `empty` is the empty text, (M, E) and (P,). The loss is (1 - taught)·flow + taught·teacher's.
    """
    if teacher is not None:
        teacher.requires_grad_(False).eval()

    def minimise(model: nn.Module, batch: Pairs) -> dict[str, Tensor]:
        x = batch.latents
        u = compute_density_for_timestep_sampling("logit_normal", len(x), logit_mean=0.0, logit_std=1.0, device=x.device)
        sigma = shift * u / (1 + (shift - 1) * u)
        noise = torch.randn_like(x)
        without = torch.rand(len(x), device=x.device) < dropout
        text, pooled = (
            torch.where(without.view(-1, *[1] * none.ndim), none.to(given), given)
            for none, given in zip(empty, (batch.text, batch.pooled), strict=True)
        )
        asked = (torch.lerp(x, noise, sigma.view(-1, 1, 1, 1)), sigma * TIMES, text, pooled)
        found = velocity(model, *asked)
        flow = F.mse_loss(found, noise - x)
        if teacher is None:
            return {"loss": flow}
        with torch.no_grad():
            expected = velocity(teacher.to(x.device), *asked)
        apart = F.mse_loss(found, expected)
        return {"loss": torch.lerp(flow, apart, taught), "flow": flow, "teacher": apart}

    return minimise


def velocity(model: nn.Module, x: Tensor, t: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
    """(B, C, h, w) in fp32 from diffusers' SD3 transformer, at times t (B,) from 0 to 1000."""
    output: Any = model(
        hidden_states=x, encoder_hidden_states=text, pooled_projections=pooled, timestep=t, return_dict=False
    )  # fmt: skip
    found: Tensor = output[0]
    return found.float()
