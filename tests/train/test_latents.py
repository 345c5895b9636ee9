"""The cache of pictures and latents: what it holds, that it can be gone on with, and which variant each step shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lineate.data import LabelledImages
from lineate.text2image.autoencoder import GenerateError, decode, encode, load_autoencoder, scale_shift, to_bytes, to_pixels
from lineate.train import TrainError
from lineate.train.config import Augment, TrainConfig
from lineate.train.data import Key
from lineate.train.latents import CachedBatches, Index, cache, read_index

Small = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def vae() -> nn.Module:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    made: nn.Module = AutoencoderKL(
        block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2, layers_per_block=1, latent_channels=2, shift_factor=0.3,
    ).eval()  # fmt: skip
    return made


def pixels(picture: Any) -> Tensor:
    return torch.tensor(list(picture.tobytes())).view(32, 32, 3).permute(2, 0, 1) / 127.5 - 1


def test_pixels_are_the_pictures_and_their_mirror_images(pictures: LabelledImages, small: Small, tmp_path: Path) -> None:
    cache(pictures, tmp_path, size=32, shard=16)
    assert sorted(file.name for file in tmp_path.iterdir()) == [*(f"0000{i}.safetensors" for i in range(3)), "index.json"]
    plain, mirrored = (CachedBatches(tmp_path, small(augment=Augment(flip=flip))) for flip in (0.0, 1.0))
    for index in (0, 17, 39):
        picture, label = pictures[index]
        found, found_label = plain.draw(Key(0, index, 0))
        assert int(found_label) == label
        torch.testing.assert_close(found, pixels(picture))
        torch.testing.assert_close(mirrored.draw(Key(3, index, 0))[0], pixels(picture).flip(-1))


def test_latents_are_drawn_from_the_autoencoders_distribution(
    pictures: LabelledImages, small: Small, tmp_path: Path, vae: Any
) -> None:
    cache(pictures.limited(4), tmp_path, size=32, vae=vae, batch=3)
    batches = CachedBatches(tmp_path, small(batch=2, augment=Augment(flip=1.0)))
    mean, std = encode(vae, pixels(pictures.limited(4)[2][0]).flip(-1)[None])
    drawn = torch.stack([batches.draw(Key(epoch, 2, 0))[0] for epoch in range(2000)])
    assert drawn.shape[1:] == (2, 16, 16)
    error = (drawn.mean(0) - mean[0]).abs() / std[0]
    assert float(error.max()) < 5 / 2000**0.5 + 0.01
    torch.testing.assert_close(drawn.std(0), std[0], rtol=0.1, atol=1e-3)


def test_latents_are_scaled_and_shifted_as_diffusers_pipelines_do(vae: Any) -> None:
    picture = torch.rand(1, 3, 8, 8) * 2 - 1
    scale, shift = scale_shift(vae)
    assert (scale, shift) == (0.18215, 0.3)
    plain = vae.encode(picture).latent_dist
    mean, std = encode(vae, picture)
    torch.testing.assert_close(mean, (plain.mean - 0.3) * 0.18215)
    torch.testing.assert_close(std, plain.std * 0.18215)
    torch.testing.assert_close(decode(vae, mean), vae.decode(plain.mean).sample)


def test_caching_goes_on_where_it_stopped(pictures: LabelledImages, small: Small, tmp_path: Path) -> None:
    cache(pictures, tmp_path, size=32, shard=16)
    whole = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    kept = tmp_path / "00000.safetensors"
    (tmp_path / "00001.safetensors").unlink()
    with pytest.raises(TrainError, match=r"lacks 1 of 3 files, 00001\.safetensors first"):
        CachedBatches(tmp_path, small())
    before = kept.stat().st_mtime_ns
    cache(pictures, tmp_path, size=32, shard=16)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == whole
    assert kept.stat().st_mtime_ns == before


def test_what_a_cache_will_take_is_said_before(pictures: LabelledImages, tmp_path: Path, vae: Any) -> None:
    """40 pictures: of three bytes a pixel, or of two latents' mean and deviation in two bytes; and eight bytes a label."""
    for kind, model, each in (("pixels", None, 3 * 32**2 + 8), ("latents", vae, 2 * 2 * 2 * 2 * 16**2 + 8)):
        said: list[str] = []
        cache(pictures, tmp_path / kind, size=32, shard=16, vae=model, say=said.append)
        stored = sum(file.stat().st_size for file in (tmp_path / kind).glob("*.safetensors"))
        assert 0 < stored - 40 * each < 3 * 1000
        assert f"takes {40 * each / 1e6:.1f} MB in 3 files, {40 * each / 1e6:.1f} MB in 3 of them still to be made" in said[0]


def test_another_cache_is_not_gone_on_with(pictures: LabelledImages, tmp_path: Path, vae: nn.Module) -> None:
    cache(pictures, tmp_path, size=32)
    with pytest.raises(TrainError, match="holds another cache: its size is 32, asked for is 16"):
        cache(pictures, tmp_path, size=16)
    with pytest.raises(TrainError, match="holds another cache: its autoencoder is None"):
        cache(pictures, tmp_path, size=32, vae=vae)
    other = LabelledImages(pictures.images, 4 - pictures.labels, pictures.classes, source=pictures.source, split=pictures.split)
    with pytest.raises(TrainError, match="before its pictures, labels or captions changed; give another"):
        cache(other, tmp_path, size=32)
    index = read_index(tmp_path, Index).model_copy(update={"digest": None})  # as it was written before it had one
    (tmp_path / "index.json").write_text(index.model_dump_json())
    cache(other, tmp_path, size=32)


def test_the_stream_from_a_step_is_the_rest_of_the_whole_stream(pictures: LabelledImages, small: Small, tmp_path: Path) -> None:
    cache(pictures, tmp_path, size=32)
    batches = CachedBatches(tmp_path, small())
    whole = list(batches.stream(0, 10, 0, 1))
    rest = list(batches.stream(7, 10, 0, 1))
    assert len(rest) == 3
    assert all(torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in zip(whole[7:], rest, strict=True))
    assert not torch.equal(whole[0].images, whole[5].images)


def test_other_augmentations_are_refused(pictures: LabelledImages, small: Small, tmp_path: Path) -> None:
    cache(pictures, tmp_path, size=32)
    with pytest.raises(TrainError, match="can be flipped and repeated, nothing else"):
        CachedBatches(tmp_path, small(augment=Augment(mixup=0.2)))


def test_bytes_are_truncated_as_dits_are() -> None:
    assert to_bytes(torch.tensor([-2.0, -1.0, 0.0, 0.003, 1.0, 2.0])).tolist() == [0, 0, 128, 128, 255, 255]
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(to_pixels(levels)), levels)


def test_a_folder_without_an_autoencoder_is_refused(tmp_path: Path, vae: Any) -> None:
    with pytest.raises(GenerateError, match=r"holds no config\.json"):
        load_autoencoder(tmp_path)
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    loaded = load_autoencoder(tmp_path / "pipeline")
    latents = torch.randn(1, 2, 4, 4)
    torch.testing.assert_close(decode(loaded, latents), decode(vae, latents))
    (tmp_path / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"broken")
    with pytest.raises(GenerateError, match="no AutoencoderKL that can be read"):
        load_autoencoder(tmp_path / "pipeline")
