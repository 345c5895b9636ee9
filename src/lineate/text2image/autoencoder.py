"""Between pixels and latents: diffusers' AutoencoderKL as a directory, with the scale that latents are modelled in.

    latents = (moments - shift)·scale, normal with this mean and standard deviation;   pixels = decode(latents / scale + shift)

Pixels are (B, 3, h, w) in [-1, 1], as bytes clamp(127.5·x + 128), truncated (DiT's way); latents are (B, C, h/f, w/f).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class GenerateError(ValueError):
    """Pictures that cannot be made, or an autoencoder that is not what it should be; the message names the value."""


def load_autoencoder(folder: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """The AutoencoderKL that `save_pretrained` wrote into `folder`, or into its sub-folder "vae". Raises `GenerateError`."""
    from diffusers import AutoencoderKL

    found = next((path for path in (Path(folder), Path(folder) / "vae") if (path / "config.json").is_file()), None)
    if found is None:
        raise GenerateError(f"{folder} holds no config.json; expected a directory that diffusers' save_pretrained wrote")
    try:
        vae = AutoencoderKL.from_pretrained(found, local_files_only=True, use_safetensors=True)
    except Exception as error:  # whatever diffusers raises for a file that is missing, broken or another model's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise GenerateError(f"{found} holds no AutoencoderKL that can be read: {reason}") from error
    model: nn.Module = vae.eval().requires_grad_(False).to(device)
    return model


def pixels_a_latent(vae: Any) -> int:
    """Pixels that a latent stands for, either way; 1 where there is no autoencoder."""
    return 1 if vae is None else int(2 ** (len(vae.config.block_out_channels) - 1))


def scale_shift(vae: Any) -> tuple[float, float]:
    """The scale and shift of the latents; where the configuration names none, as the first ones had: 1 and 0."""
    return float(vae.config.scaling_factor or 1.0), float(vae.config.shift_factor or 0.0)


@torch.inference_mode()
def encode(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents of `pixels`, on the autoencoder's device."""
    scale, shift = scale_shift(vae)
    found = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    return (found.mean - shift) * scale, found.std * scale


@torch.inference_mode()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """The pixels of `latents`, on the autoencoder's device."""
    scale, shift = scale_shift(vae)
    found: Tensor = vae.decode((latents / scale + shift).to(vae.device, vae.dtype)).sample
    return found


def to_bytes(pixels: Tensor) -> Tensor:
    """uint8 of pixels in [-1, 1], of any shape."""
    return (127.5 * pixels.float() + 128).clamp(0, 255).to(torch.uint8)


def to_pixels(stored: Tensor) -> Tensor:
    """Pixels in [-1, 1] of uint8, of any shape."""
    return stored.float() / 127.5 - 1


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of all that `model` stores."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        stored = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {stored.dtype} {tuple(stored.shape)}\n".encode())
        digest.update(stored.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
