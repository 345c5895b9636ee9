"""All that lies between a host's projections and its output projection: key norm, locality, mixer, neighborhood branch.

    q̃ = q·γ + β, k̃ = k·γ' + β'        per channel, with `qk_affine` (DiT⁵'s, from its code); q, k themselves otherwise
    k̂ = norm(k̃)                      over the tokens, per sample and channel (instance norm; equation 12): over all, or over
                                      the grid's and the others' each for themselves, with `key_norm_scope` "modality"
    q̂ = q̃ + DWC(q̃), k̂ = k̂ + DWC(k̂)   depthwise 3×3 over the grid, all H·D channels (equation 14)
    o = mixer(q̂, k̂, v)
    o = (1 - m)·o + m·NAT(q, k, v)    on the raw q, k, v; m = 1/2 (equation 15) or learned per head

Source: Li et al., arXiv 2605.02772, section 4; ε = 1, biased variance and no affine are the released code's.
Prefix and suffix tokens take part in the norm and the mixer; convolutions see the grid alone. The paper's vision transformers
have none; here every window sees them too, and with `outside` "exact" their own outputs are softmax's on the raw q, k, v, linear
in N as they are few: in ViTs they are attention's sinks, and docs/calibration.md says what this is worth.

Legend: B batch, H heads, N tokens, D head dim, C = H·D channels, h×w grid.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from lineate.kernels import cpu
from lineate.layout import TokenLayout
from lineate.mixers import MIXERS, MixerConfig
from lineate.mixers.base import Frozen
from lineate.mixers.local import Window, attend_outside
from lineate.mixers.ttt import TTT, TTTConfig
from lineate.ops.aligned import aligned_ttt, say
from lineate.ops.depthwise import depthwise
from lineate.ops.neighborhood import neighborhood_attention
from lineate.ops.norm import KeyNorm, normalise_keys

Locality = Literal["dwc-qk", "dwc-v", "cpe", "none"]


class Neighborhood(Frozen):
    """A neighborhood-attention branch: `window` is odd; `mix` is the paper's one half, or a weight learned per head."""

    window: Window = 5
    mix: Literal["half", "learned"] = "half"


class CoreConfig(Frozen):
    """What a core is made of; `Conversion` adds where it goes. Defaults are the paper's T⁵.

    `outside` says who answers the tokens off the grid (class, register, text): the mixer, or exact softmax attention.
    `key_norm_scope` says over which tokens a key norm takes its statistics: all, or those of the image and of the text (what
    stands before or after the grid) each for themselves; norms within a token do not care.
    `qk_affine` gives the mixer's queries and keys, before the key norm, a scale and an offset per channel, as the released DiT⁵
    has them; instance norm takes the keys' offset away again.
    """

    mixer: MixerConfig = TTTConfig()
    key_norm: KeyNorm = "instance"
    key_norm_eps: float = Field(1.0, gt=0)
    key_norm_scope: Literal["all", "modality"] = "all"
    qk_affine: bool = False
    locality: Locality = "dwc-qk"
    neighborhood: Neighborhood | None = None
    outside: Literal["mixer", "exact"] = "mixer"


def _depthwise(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels)


class CoreAttention(nn.Module):
    """The replacement for a host's attention core, built from a `CoreConfig` for `heads` heads of `head_dim` channels.

    `embed(x, layout)` is called by the host before its projections (it is CPE's place, and returns x itself otherwise);
    `forward(q, k, v, layout)` takes and returns (B, H, N, D).
    """

    def __init__(self, config: CoreConfig, heads: int, head_dim: int, channels: int | None = None) -> None:
        """`channels` are those of the host's tokens, which CPE convolves; heads · head_dim where not said."""
        super().__init__()
        self.config, self.heads = config, heads
        width = heads * head_dim
        self.mixer = MIXERS[config.mixer.name](config.mixer, heads, head_dim)
        if config.qk_affine:
            self.q_scale, self.k_scale = (nn.Parameter(torch.ones(heads, head_dim)) for _ in "qk")
            self.q_offset, self.k_offset = (nn.Parameter(torch.zeros(heads, head_dim)) for _ in "qk")
        if config.locality == "dwc-qk":
            self.q_conv, self.k_conv = _depthwise(width), _depthwise(width)
        elif config.locality == "dwc-v":
            self.v_conv = _depthwise(width)
        elif config.locality == "cpe":
            self.x_conv = _depthwise(channels or width)
        learned = config.neighborhood is not None and config.neighborhood.mix == "learned"
        self.mix_logit = nn.Parameter(torch.zeros(heads)) if learned else None
        # What a CPU's kernel takes whole, where the mixer is TTT and inputs allow it.
        known = config.key_norm in ("instance", "none") and config.key_norm_scope == "all" and config.locality != "dwc-v"
        self.simple = known and not config.qk_affine

    def embed(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Give x + DWC(x) on the grid tokens of x (B, N, C) with locality "cpe"; x itself otherwise."""
        if self.config.locality != "cpe":
            return x
        return x + self._convolved(self.x_conv, x.unsqueeze(1), layout).squeeze(1)

    def _convolved(self, conv: nn.Conv2d, x: Tensor, layout: TokenLayout) -> Tensor:
        return depthwise(x, conv.weight, conv.bias, layout.height, layout.width, layout.prefix)

    def forward(
        self, q: Float[Tensor, "B H N D"], k: Float[Tensor, "B H N D"], v: Float[Tensor, "B H N D"], layout: TokenLayout
    ) -> Float[Tensor, "B H N D"]:
        """Scale and offset, key norm, locality, mixer, neighborhood branch; the module docstring has the equations."""
        layout.check(k.shape[-2])
        whole = self._in_one(q, k, v, layout)
        return self._attend(q, k, v, layout) if whole is None else whole

    def _in_one(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor | None:
        """All of it by one kernel, which a CPU has where nothing learns; else None."""
        config, mixer = self.config, self.mixer
        if torch.is_grad_enabled() or q.device.type != "cpu" or not self.simple or not isinstance(mixer, TTT):
            return None
        taps, (window, exact) = self._taps(), self._branches(layout)
        fits = q.shape == k.shape == v.shape and not (exact and layout.prefix + layout.suffix > cpu.FEW)
        if not fits or cpu.refusal((q, k, v, *mixer.weights, *taps), mixer.config.inner) is not None:
            return None
        if not torch.compiler.is_compiling():
            say("one kernel of all", "this is a CPU with compiled kernels, and nothing learns")
        eps, place = config.key_norm_eps if config.key_norm == "instance" else None, (layout.height, layout.width, layout.prefix)
        return cpu.core(q, k, v, taps, mixer.weights, eps, place, mixer.config.loss == "l2", self.mix_logit, window, exact)

    def _taps(self) -> list[Tensor]:
        """Weight and bias of the queries' convolution and of the keys', where there are some."""
        convolutions = (self.q_conv, self.k_conv) if self.config.locality == "dwc-qk" else ()
        return [getattr(conv, name) for conv in convolutions for name in ("weight", "bias")]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        mixed_q, mixed_k = q, k
        if self.config.qk_affine:
            mixed_q = q * self.q_scale[:, None] + self.q_offset[:, None]
            mixed_k = k * self.k_scale[:, None] + self.k_offset[:, None]
        out = self._mix(mixed_q, mixed_k, v, layout)
        if self.config.locality == "dwc-v":
            out = out + self._convolved(self.v_conv, v, layout)
        return self._join(out, q, k, v, layout)

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        """Key norm, DWC-QK and mixer, in one operator where there is one for them."""
        norm, eps, local = self.config.key_norm, self.config.key_norm_eps, self.config.locality == "dwc-qk"
        if self.config.key_norm_scope == "modality" and layout.grid_tokens < layout.tokens:
            parts = k.split((layout.prefix, layout.grid_tokens, layout.suffix), dim=-2)
            k, norm = torch.cat([normalise_keys(part, norm, eps) for part in parts if part.shape[-2]], dim=-2), "none"
        if isinstance(self.mixer, TTT) and norm in ("instance", "none"):
            return aligned_ttt(
                q, k, v, self.mixer.weights, layout.height, layout.width, layout.prefix, convolutions=self._taps() or None,
                eps=eps if norm == "instance" else None, model=self.mixer.config.inner, loss=self.mixer.config.loss,
            )  # fmt: skip
        k = normalise_keys(k, norm, eps)
        if local:
            q = q + self._convolved(self.q_conv, q, layout)
            k = k + self._convolved(self.k_conv, k, layout)
        out: Tensor = self.mixer(q, k, v, layout)
        return out

    def _branches(self, layout: TokenLayout) -> tuple[int, bool]:
        """The neighborhood branch's window, or 0, and whether tokens off the grid are answered exactly."""
        branch, outside = self.config.neighborhood, layout.prefix + layout.suffix
        return 0 if branch is None else branch.window, self.config.outside == "exact" and outside > 0

    def _join(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> Tensor:
        """Mix neighborhood attention into the grid tokens, and answer the tokens outside exactly, where the config says so."""
        (window, exact), outside = self._branches(layout), layout.prefix + layout.suffix
        if not window and not exact:
            return out
        if q.shape[-2] == layout.tokens and cpu.joins((out, q, k, v), outside if exact else 0):
            place = (layout.height, layout.width, layout.prefix)
            mixed, of_q, of_k, of_v = (x.transpose(1, 2) for x in (out, q, k, v))
            return cpu.joined(mixed, of_q, of_k, of_v, self.mix_logit, place, window, exact).transpose(1, 2)
        sizes = (layout.prefix, out.shape[-2] - outside, layout.suffix)
        first, grid, last = out.split(sizes, dim=-2)
        if window:
            mix = 0.5 if self.mix_logit is None else self.mix_logit.sigmoid().view(-1, 1, 1).to(out.dtype)
            near = self._near(q.split(sizes, dim=-2)[1], k, v, layout, window)
            grid = torch.lerp(grid, near.to(out.dtype), mix)
        if exact:
            first, last = (x.to(out.dtype) for x in self._outside(q, k, v, layout))
        # Laid out as the host reads it: tokens before heads.
        return torch.cat([x.transpose(1, 2) for x in (first, grid, last)], dim=1).transpose(1, 2) if outside else grid

    def _near(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout, window: int) -> Tensor:
        """What the windows answer the grid's queries (B, H, h·w, D)."""
        return neighborhood_attention(q, k, v, layout.height, layout.width, window, layout.prefix)

    def _outside(self, q: Tensor, k: Tensor, v: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """What softmax attention answers the tokens before the grid, and those behind it."""
        return attend_outside(q, k, v, layout)
