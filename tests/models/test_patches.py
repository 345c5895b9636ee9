"""The linear autoencoder loses nothing that its channels span, its latents have mean 0 and deviation 1, and it is saved."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lineate.models.patches import PatchAutoencoder
from lineate.text2image.autoencoder import decode, encode


def pictures(count: int = 40, directions: int = 5) -> Tensor:
    """Pictures of 8×8 px whose patches of 4×4 are mixtures of a few patterns, above black."""
    draw = torch.Generator().manual_seed(0)
    patterns = torch.rand(directions, 3, 4, 4, generator=draw)
    shares = torch.rand(count, directions, 2, 2, generator=draw)
    return torch.nn.functional.conv_transpose2d(shares, patterns, stride=4) - 1


def test_what_the_channels_span_comes_back() -> None:
    shown = pictures()
    vae = PatchAutoencoder.fitted(shown, patch=4, channels=5)
    latents, spread = encode(vae, shown)
    assert latents.shape == (40, 5, 2, 2) and float(spread.max()) < 1e-6
    torch.testing.assert_close(decode(vae, latents), shown, atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(5), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(5), atol=0.01, rtol=0)


def test_fewer_channels_lose_something() -> None:
    shown = pictures()
    vae = PatchAutoencoder.fitted(shown, patch=4, channels=2)
    assert float((decode(vae, encode(vae, shown)[0]) - shown).abs().max()) > 0.01


def test_it_is_saved_and_loaded_as_any_of_diffusers(tmp_path: Path) -> None:
    vae = PatchAutoencoder.fitted(pictures(), patch=4, channels=5)
    vae.save_pretrained(tmp_path)
    again = PatchAutoencoder.from_pretrained(tmp_path)
    assert again.config.block_out_channels == [5, 5, 5]  # 2^2 px a latent, to diffusers' pipelines
    assert torch.equal(encode(again, pictures())[0], encode(vae, pictures())[0])
