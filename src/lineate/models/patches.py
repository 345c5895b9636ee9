"""An autoencoder that is one linear layer a patch, with the interface of diffusers' AutoencoderKL, fitted in closed form.

    latent = (V·(patch + 1) - m) / s       patch = Vᵀ·(latent·s + m) - 1

V are the first principal directions of the patches it was fitted to, measured from black, which is -1; m and s are mean and
standard deviation along each, so a latent channel has mean 0 and deviation 1. Where the patches span no more directions than
there are channels, as those of drawn shapes in the cells of a grid, nothing is lost.

Legend: B batch, C latent channels, p side of a patch in px.
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn

SURE = -30.0  # the logarithm of a latent's variance where diffusers cuts it off


class PatchAutoencoder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """(B, 3, h, w) in [-1, 1] <-> (B, C, h/p, w/p); p = 2^(len(block_out_channels) - 1), as diffusers' pipelines have it."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        latent_channels: int = 12,
        block_out_channels: tuple[int, ...] = (12, 12, 12, 12),
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ) -> None:
        super().__init__()
        self.patch = 2 ** (len(block_out_channels) - 1)
        self.directions = nn.Parameter(torch.zeros(latent_channels, 3, self.patch, self.patch))
        self.mean, self.std = nn.Parameter(torch.zeros(latent_channels)), nn.Parameter(torch.ones(latent_channels))

    @classmethod
    @torch.no_grad()
    def fitted(cls, pictures: Tensor, patch: int, channels: int) -> Self:
        """One for patches of `patch` px, a power of 2, of these pictures (n, 3, h, w)."""
        made: Self = cls(channels, (channels,) * patch.bit_length())
        patches = F.unfold(pictures.double() + 1, patch, stride=patch).transpose(1, 2).flatten(0, 1)
        _, vectors = torch.linalg.eigh(patches.T @ patches)  # in order of rising eigenvalues
        made.directions.copy_(vectors[:, -channels:].T.view_as(made.directions))
        along = patches @ vectors[:, -channels:]
        made.mean.copy_(along.mean(0))
        made.std.copy_(along.std(0))
        made.eval()
        return made

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Latents that are certain, as a distribution."""
        along = F.conv2d(x + 1, self.directions, stride=self.patch)
        latents = (along - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)
        found = DiagonalGaussianDistribution(torch.cat((latents, torch.full_like(latents, SURE)), 1))
        return AutoencoderKLOutput(latent_dist=found) if return_dict else (found,)

    def decode(self, z: Tensor, return_dict: bool = True, generator: object = None) -> DecoderOutput | tuple[Tensor]:
        """Pixels of latents."""
        along = z * self.std.view(-1, 1, 1) + self.mean.view(-1, 1, 1)
        pixels = F.conv_transpose2d(along, self.directions, stride=self.patch) - 1
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)
