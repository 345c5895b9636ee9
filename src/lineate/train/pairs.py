"""Captioned pictures made ready once for a text-to-image pipeline, and batches of them.

    FOLDER/index.json              what was cached: pictures, sizes, and the pipeline's autoencoder and text encoders
    FOLDER/empty.safetensors       "text" (M, E) and "pooled" (P,): the embedding of no text
    FOLDER/00000.safetensors ...   "mean", "std" (n, C, h, w) of the latents, "text" (n, M, E), "pooled" (n, P), in half precision

A shard holds pictures of one size. Sizes have about the area asked for, sides that are multiples of a stride, and aspects from
1:2 to 2:1; a picture gets the one whose aspect is nearest, is resized (bicubic, antialiased) so that it covers that, and is
cropped in the middle. Pictures are never mirrored: captions say left and right. A shard is written whole or not at all, so
caching that was killed goes on where it stopped; many processes may share the work.

    order of epoch e      pictures of each size permuted by (seed, e) and cut into batches, the batches of all sizes permuted
    latent of a picture   drawn from (seed, e, picture)

What does not fill a batch of its size is left out of that epoch. Legend: n pictures, M text tokens, E and P widths of embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from safetensors.torch import load_file
from torch import Tensor

from lineate.evaluate import Progress
from lineate.mixers.base import Frozen
from lineate.text2image.autoencoder import encode, fingerprint, to_pixels
from lineate.text2image.captioned import CaptionedImages
from lineate.text2image.texts import encode_texts
from lineate.train import TrainError
from lineate.train.config import Augment, TrainConfig
from lineate.train.latents import Cached, Say, announced, claim_index, digest, read_index, shard_name, unread, write_shard
from lineate.train.randomness import ORDER, SAMPLE, derive
from lineate.train.rectified import Pairs

EMPTY = "empty.safetensors"
PER_SHARD = 512  # of SD3.5's 333 text tokens of 4096 numbers, 1.4 GB
Size = tuple[int, int]  # height and width in px


class Shard(Frozen):
    """A file's pictures, by their places in the data, and their size."""

    size: Size
    pictures: tuple[int, ...]


class PairIndex(Cached):
    """What a cache holds; the encoders are fingerprints, and `digest` is that of pictures and captions."""

    side: int
    stride: int
    autoencoder: str
    text_encoders: tuple[str, ...]
    shards: tuple[Shard, ...]

    @property
    def count(self) -> int:
        """Over all shards."""
        return sum(len(shard.pictures) for shard in self.shards)


def cache_pairs(
    data: CaptionedImages, out: Path, pipe: Any, *, side: int, batch: int = 8, per_shard: int = PER_SHARD,
    accelerator: Any = None, say: Say | None = None, progress: Progress | None = None,
) -> PairIndex:  # fmt: skip
    """Cache the pictures of `data`, of about side² px, and their captions in `out`, through what `pipe` encodes them with.

    Shards that are there are kept; `say` is told first how much all take. `accelerator` is an `accelerate.Accelerator` or
    `PartialState` where several processes share the work; each returns once all is there. Raises `TrainError` if `out` holds
    something else, and for a side that cannot be.
    """
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator is not None else (0, 1)
    stride, sizes = find_sizes(pipe, side)
    encoders = [getattr(pipe, name) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")]
    index = PairIndex(
        source=data.source, side=side, stride=stride, autoencoder=fingerprint(pipe.vae),
        text_encoders=tuple(fingerprint(encoder) for encoder in encoders if encoder is not None),
        shards=tuple(_shards(data.sizes(), sizes, per_shard)),
        digest=digest(data.table, list(data.captions)),
    )  # fmt: skip
    claim_index(out, index)
    if rank == 0 and not (out / EMPTY).is_file():
        text, pooled = encode_texts(pipe, [""])
        write_shard(out / EMPTY, {"text": text[0].half().cpu(), "pooled": pooled[0].half().cpu()})
    if rank == 0 and say is not None:
        say(announced(out, expected_bytes(index, pipe, load_file(out / EMPTY))))
    for number in range(rank, len(index.shards), world):
        file = out / shard_name(number)
        if not file.is_file():
            write_shard(file, _tensors(data, index.shards[number], pipe, batch), data.skipped)
        if progress is not None:
            progress(number + 1, len(index.shards), "caching")
    if accelerator is not None:
        accelerator.wait_for_everyone()
    return index


class PairBatches:
    """Batches of a whole cache, each of pictures of one size.

    Files are memory-mapped, so no workers are needed. Raises `TrainError` if the cache is missing or unfinished, or if pictures
    are to be augmented.
    """

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        self.index, self.config = read_index(folder, PairIndex), config
        check_unvaried(config)
        files = [folder / shard_name(number) for number in range(len(self.index.shards))]
        missing = [file.name for file in (*files, folder / EMPTY) if not file.is_file()]
        if missing:
            raise TrainError(f"{folder} lacks {len(missing)} files, {missing[0]} first; caching was not finished")
        self.shards = [load_file(file) for file in files]
        self._skipped = unread(files)
        none = load_file(folder / EMPTY)
        self.empty = none["text"].float(), none["pooled"].float()
        self.sizes: dict[Size, list[tuple[int, int]]] = {}  # (shard, row) of each picture, by size
        for number, shard in enumerate(self.index.shards):
            self.sizes.setdefault(shard.size, []).extend((number, row) for row in range(len(shard.pictures)))

    def identity(self) -> dict[str, Any]:
        """What the cache holds."""
        return self.index.model_dump(mode="json")

    @property
    def skipped(self) -> Mapping[str, str]:
        """Those that could not be read when they were cached, by whatever process and when."""
        return self._skipped

    def steps(self, processes: int) -> int:
        """Whole steps an epoch. Raises `TrainError` if there are too few pictures for one."""
        batch, needed = self.config.batch, self.config.accumulate * processes
        batches = sum(len(places) // batch for places in self.sizes.values())
        if batches < needed:
            counts = ", ".join(f"{len(places)} of {size[0]}x{size[1]} px" for size, places in self.sizes.items())
            raise TrainError(f"a step takes {needed} batches of {batch} pictures of one size, and there are {counts}")
        return batches // needed

    def epoch(self, epoch: int) -> list[list[tuple[int, int]]]:
        """Every batch of an epoch, in order."""
        draw, batch = torch.Generator().manual_seed(derive(ORDER, self.config.seed, epoch)), self.config.batch
        batches = []
        for places in self.sizes.values():
            order = torch.randperm(len(places), generator=draw).tolist()
            batches += [[places[i] for i in order[k : k + batch]] for k in range(0, len(order) - batch + 1, batch)]
        return [batches[i] for i in torch.randperm(len(batches), generator=draw).tolist()]

    def stream(self, start: int, stop: int, process: int, processes: int) -> Iterator[Pairs]:
        """The batches of one process, in fp32."""
        per_epoch, each = self.steps(processes), self.config.accumulate * processes
        for epoch in range(start // per_epoch, -(-stop // per_epoch)):
            batches = self.epoch(epoch)
            for step in range(max(start, epoch * per_epoch), min(stop, (epoch + 1) * per_epoch)):
                first = step % per_epoch * each
                for places in batches[first + process : first + each : processes]:
                    yield Pairs(*map(torch.stack, zip(*(self.draw(epoch, *place) for place in places), strict=True)))

    def draw(self, epoch: int, shard: int, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (C, h, w) of a picture, its text (M, E), and that as a whole (P,)."""
        mean, std, text, pooled = (self.shards[shard][name][row].float() for name in ("mean", "std", "text", "pooled"))
        picture = self.index.shards[shard].pictures[row]
        draw = torch.Generator().manual_seed(derive(SAMPLE, self.config.seed, epoch, picture))
        return mean + std * torch.randn(mean.shape, generator=draw), text, pooled


def check_unvaried(config: TrainConfig) -> None:
    """Raise `TrainError` if pictures are to be augmented."""
    if config.augment != Augment(flip=0):
        raise TrainError("augment: captioned pictures are shown as they are; set train.augment.flip=0 and nothing else there")


def find_sizes(pipe: Any, side: int) -> tuple[int, list[Size]]:
    """The stride of sizes of about side² px, and those that the transformer has positions for. Raises `TrainError` for none."""
    factor, table = pipe.vae_scale_factor * pipe.patch_size, pipe.transformer.config.pos_embed_max_size
    most = table * factor
    stride = max(64 // factor, 1) * factor if min(side, most) > 128 else factor  # fewer sizes, so that more pictures share one
    found = [size for size in sizes_near(side, stride) if max(size) <= most]
    if not found:
        raise TrainError(
            f"--image-size: no pictures of about {side}x{side} px; choices: multiples of {stride} from {stride} to "
            f"{most // stride * stride}, where the transformer's positions end (pos_embed_max_size {table})"
        )
    return stride, found


def expected_bytes(index: PairIndex, pipe: Any, empty: Mapping[str, Tensor]) -> list[int]:
    """Of every file of a cache, but for its few hundred bytes of names; `empty` are the embeddings of no text."""
    said = sum(tensor.numel() for tensor in empty.values())
    channels, area = pipe.transformer.config.in_channels, pipe.vae_scale_factor**2
    numbers = [2 * channels * (math.prod(shard.size) // area) + said for shard in index.shards]  # mean and std
    return [2 * count * len(shard.pictures) for count, shard in zip(numbers, index.shards, strict=True)]


def sizes_near(side: int, stride: int) -> list[Size]:
    """The sizes of about side² px, aspects from 1:2 to 2:1, sides multiples of `stride`; each with its transpose."""
    flat = [(height, round(side * side / height / stride) * stride) for height in range(stride, side + 1, stride)]
    return sorted({size for height, width in flat if width <= 2 * height for size in ((height, width), (width, height))})


def fitted(image: Image, size: Size) -> Tensor:
    """uint8 (3, h, w): the picture resized so that it covers `size`, cropped in the middle."""
    from torchvision.transforms.functional import InterpolationMode, center_crop, pil_to_tensor, resize

    scale = max(size[0] / image.height, size[1] / image.width)
    covering = [max(of, round(scale * side)) for of, side in zip(size, (image.height, image.width), strict=True)]
    found: Tensor = pil_to_tensor(center_crop(resize(image, covering, InterpolationMode.BICUBIC), list(size)))
    return found


def _shards(pictures: Sequence[Size], sizes: Sequence[Size], most: int) -> Iterator[Shard]:
    """Pictures (height, width) by the size whose aspect is nearest, in files of at most `most`."""
    by_size: dict[Size, list[int]] = {size: [] for size in sizes}
    for place, (height, width) in enumerate(pictures):
        nearest = min(sizes, key=lambda size: abs(math.log(size[0] * width / (size[1] * height))))
        by_size[nearest].append(place)
    for size, places in by_size.items():
        for first in range(0, len(places), most):
            yield Shard(size=size, pictures=tuple(places[first : first + most]))


def _tensors(data: CaptionedImages, shard: Shard, pipe: Any, batch: int) -> dict[str, Tensor]:
    """One shard."""
    parts: dict[str, list[Tensor]] = {}
    for first in range(0, len(shard.pictures), batch):
        pictures, captions = zip(*(data[place] for place in shard.pictures[first : first + batch]), strict=True)
        mean, std = encode(pipe.vae, to_pixels(torch.stack([fitted(picture, shard.size) for picture in pictures])))
        text, pooled = encode_texts(pipe, captions)
        for name, tensor in {"mean": mean, "std": std, "text": text, "pooled": pooled}.items():
            parts.setdefault(name, []).append(tensor.half().cpu())
    return {name: torch.cat(tensors) for name, tensors in parts.items()}
