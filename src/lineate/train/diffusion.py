"""What a class-conditional denoiser minimises: DDPM with a learned variance, or a linear flow. Objectives for `train.loop.fit`.

    DDPM   x_t = √ᾱ_t·x + √(1 - ᾱ_t)·ε        t uniform in 0 ... T-1, β_t linear, α_t = 1 - β_t, ᾱ_t = α_0 ··· α_t
           loss = mean (ε_θ(x_t, t, y) - ε)² + vlb·L_t
           L_t  = KL(q(x_{t-1} | x_t, x) ‖ N(μ_θ, Σ_θ)) for t > 0, -log p(x | x_0) for t = 0: mean over values, in bits
           log Σ_θ = f·log β_t + (1 - f)·log β̃_t,   f = (v_θ + 1)/2,   β̃_t = β_t·(1 - ᾱ_{t-1})/(1 - ᾱ_t)
    flow   x_t = t·x + (1 - t)·ε               t uniform in [0, 1), fed to the model as it is
           loss = mean (u_θ(x_t, t, y) - (x - ε))²

L_t does not teach the mean: μ_θ is detached there. The model gives 2C channels, ε_θ first and v_θ after; of a flow's the first C
count. One L_t a sample, with weight 1, is what DiT was trained with: the bound is the sum of T such terms, so this is a weight of
0.001 on all of it at T = 1000, the λ of Nichol & Dhariwal; guided-diffusion's "rescaled" variant of T/1000 is 1 there too.
The likelihood at t = 0 takes x for pixels of 256 levels in [-1, 1]; as in DiT's training, latents are treated alike.
With probability `label_dropout` a label is the null class, for guidance. They are dropped once: a DiT that is in training mode
drops its own, as often as it was built to, and then none is dropped here.

Sources: Ho et al., arXiv 2006.11239 (eqs. 4-7, 13); Nichol & Dhariwal, arXiv 2102.09672 (eqs. 15, 16); Peebles & Xie, arXiv
2212.09748; Ma et al., SiT, arXiv 2401.08740 (linear path, velocity). Legend: B batch, C channels, h×w grid, T steps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from lineate.mixers.base import Frozen
from lineate.models.dit import LabelEmbedder
from lineate.train import TrainError
from lineate.train.config import Denoise
from lineate.train.data import Batch
from lineate.train.objectives import Objective


class Ddpm(Frozen):
    """The chain of noise and what is minimised along it; the default is DiT's. `vlb` weighs L_t, see the module docstring."""

    steps: int = Field(1000, ge=2)
    beta_start: float = Field(1e-4, gt=0, lt=1)
    beta_end: float = Field(0.02, gt=0, lt=1)
    vlb: float = Field(1.0, ge=0)
    label_dropout: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _rises(self) -> Ddpm:
        if self.beta_start > self.beta_end:
            raise ValueError(f"beta_start {self.beta_start:g} must not exceed beta_end {self.beta_end:g}")
        return self


class Chain:
    """The closed forms of a DDPM; x, noise and the like are (B, C, h, w), t is (B,) int64 in 0 ... T-1."""

    def __init__(self, config: Ddpm) -> None:
        beta = torch.linspace(config.beta_start, config.beta_end, config.steps, dtype=torch.float64)
        bar = (1 - beta).cumprod(0)
        before = F.pad(bar[:-1], (1, 0), value=1.0)
        spread = beta * (1 - before) / (1 - bar)
        spread[0] = spread[1]  # q(x_{-1} | x_0, x) has no spread, and no logarithm
        self.tables = {
            "signal": bar.sqrt(),
            "noise": (1 - bar).sqrt(),
            "clean": before.sqrt() * beta / (1 - bar),
            "current": (1 - beta).sqrt() * (1 - before) / (1 - bar),
            "high": beta.log(),
            "low": spread.log(),
        }

    def at(self, name: str, t: Tensor) -> Tensor:
        """(B, 1, 1, 1): one of the tables at the samples' steps."""
        self.tables[name] = self.tables[name].to(t.device)
        found: Tensor = self.tables[name][t].float()
        return found.view(-1, 1, 1, 1)

    def noised(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t."""
        return self.at("signal", t) * x + self.at("noise", t) * noise

    def clean(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The x that x_t was made from, if `noise` is what was added."""
        return (x_t - self.at("noise", t) * noise) / self.at("signal", t)

    def mean(self, x: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The mean of q(x_{t-1} | x_t, x); its log-variance is the table "low"."""
        return self.at("clean", t) * x + self.at("current", t) * x_t

    def log_variance(self, v: Tensor, t: Tensor) -> Tensor:
        """log Σ_θ for the model's v, which is between log β̃_t at -1 and log β_t at 1."""
        return torch.lerp(self.at("low", t), self.at("high", t), (v + 1) / 2)

    def bits(self, x: Tensor, x_t: Tensor, t: Tensor, noise: Tensor, v: Tensor) -> Tensor:
        """L_t (B,) in bits a value, for the model's `noise` and `v`; gradients reach `v` alone."""
        mean, log_variance = self.mean(self.clean(x_t, t, noise), x_t, t).detach(), self.log_variance(v, t)
        apart = divergence(self.mean(x, x_t, t), self.at("low", t), mean, log_variance)
        nats = torch.where(t[:, None, None, None] == 0, -pixel_log_likelihood(x, mean, log_variance), apart)
        return nats.flatten(1).mean(1) / math.log(2)


def divergence(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL of two normal distributions a value, in nats."""
    ratio, distance = log_variance - other_log_variance, (mean - other_mean) ** 2 * torch.exp(-other_log_variance)
    return 0.5 * (torch.exp(ratio) - ratio - 1 + distance)


def pixel_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log-probability, in nats a value, of the interval of 2/255 around x under a normal; the outermost ones are open outward."""
    scale, half = torch.exp(-0.5 * log_variance), 1 / 255
    above: Tensor = torch.special.ndtr((x + half - mean) * scale)
    below: Tensor = torch.special.ndtr((x - half - mean) * scale)
    inside = above.masked_fill(x > 1 - half / 2, 1) - below.masked_fill(x < half / 2 - 1, 0)
    return inside.clamp(min=1e-12).log()


def denoising(null: int | None, config: Denoise) -> Objective:
    """What `config` says. `null` is the label for none; a model without one can have no labels dropped."""
    label = 0 if null is None else null
    if config.objective == "flow":
        return flow(label, label_dropout=config.dropout)
    return ddpm(label, Ddpm(vlb=config.vlb, label_dropout=config.dropout))


def ddpm(null: int, config: Ddpm | None = None) -> Objective:
    """Noise, and where the model gives 2C channels the variance: {"loss", "mse", "vlb"}, the last in bits and unweighted.

    `null` is the label that stands for none.
    """
    config = config or Ddpm()
    chain = Chain(config)

    def minimise(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        x = batch.images
        t = torch.randint(config.steps, (len(x),), device=x.device)
        noise = torch.randn_like(x)
        x_t = chain.noised(x, t, noise)
        output = predict(model, x_t, t, dropped(batch.labels, null, _share(model, config.label_dropout)))
        found = output[:, : x.shape[1]]
        mse = F.mse_loss(found, noise)
        if output.shape[1] == x.shape[1]:
            return {"loss": mse}
        vlb = chain.bits(x, x_t, t, found, output[:, x.shape[1] :]).mean()
        return {"loss": mse + config.vlb * vlb, "mse": mse, "vlb": vlb}

    return minimise


def flow(null: int, *, label_dropout: float = 0.1) -> Objective:
    """Velocity along the straight line from noise at t = 0 to data at t = 1: {"loss"}. `null` is the label for none."""
    if not 0 <= label_dropout < 1:
        raise TrainError(f"label_dropout is a share of the labels, 0 <= label_dropout < 1, got {label_dropout}")

    def minimise(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        x = batch.images
        t = torch.rand(len(x), device=x.device)
        noise = torch.randn_like(x)
        x_t = torch.lerp(noise, x, t[:, None, None, None])
        output = predict(model, x_t, t, dropped(batch.labels, null, _share(model, label_dropout)))
        return {"loss": F.mse_loss(output[:, : x.shape[1]], x - noise)}

    return minimise


def dropped(labels: Tensor, null: int, share: float) -> Tensor:
    """Labels (B,), each with probability `share` the null label; drawn from torch's generator."""
    return labels.masked_fill(torch.rand(len(labels), device=labels.device) < share, null)


def _share(model: nn.Module, label_dropout: float) -> float:
    """How many labels are left to drop for a model that may drop its own."""
    drops = any(isinstance(module, LabelEmbedder) and module.training and module.dropout > 0 for module in model.modules())
    return 0.0 if drops else label_dropout


def predict(model: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """(B, C or 2C, h, w) in fp32 from model(x, t, y), a tensor or diffusers' output that holds one as `.sample`.

    Raises `TrainError` for any other number of channels.
    """
    output: Any = model(x, t, y)
    found: Tensor = output if isinstance(output, Tensor) else output.sample
    if found.shape[1] not in (x.shape[1], 2 * x.shape[1]):
        raise TrainError(f"the model gives {found.shape[1]} channels for {x.shape[1]}; as many or twice as many were expected")
    return found.float()
