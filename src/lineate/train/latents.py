"""Pictures made ready once for a generative model, as pixels or as latents, and batches of them.

    FOLDER/index.json             what was cached: the pictures, their size, the autoencoder
    FOLDER/00000.safetensors ...  "labels" (n,), and "pixels" (n, 3, h, w) uint8, or "mean" and "std" (n, 2, C, h, w) in half
                                  precision: the latents' distribution for a picture as it is and for its mirror image;
                                  in the metadata which pictures could not be read, and why

A shard is written whole or not at all, so caching that was killed goes on where it stopped; many processes may share the work.
Which mirror image and which latent of a picture an epoch shows follows from (seed, epoch, picture, repeat) alone.
Pictures are resized once (bicubic, antialiased) so that their short side fits, and cropped in the middle. ADM's crop, which DiT
and SiT were trained on, first halves a picture by averages of 2×2 px while its short side is twice the target or more: a
departure, which moves the pixels of large pictures a little.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lineate.data import LabelledImages
from lineate.evaluate import Progress
from lineate.mixers.base import Frozen
from lineate.text2image.autoencoder import encode, fingerprint, pixels_a_latent, to_pixels
from lineate.train import TrainError
from lineate.train.config import Augment, TrainConfig
from lineate.train.data import Batch, Key, Order, Ordered
from lineate.train.randomness import SAMPLE, derive

INDEX = "index.json"
SKIPPED = "skipped"  # in a shard's metadata
SAMPLED = 256  # pictures whose contents are looked at to tell one table from another
Say = Callable[[str], None]


class Cached(Frozen):
    """What every cache says of itself.

    `digest` tells whether the pictures and what is said of them are still the same; a cache of before it was kept has None.
    """

    source: str
    digest: str | None = None

    @property
    def count(self) -> int:
        """How many pictures a whole cache has."""
        raise NotImplementedError


Kind = TypeVar("Kind", bound=Cached)


class Index(Cached):
    """What a cache holds; `autoencoder` is its fingerprint, None for pixels, and `shard` the pictures a file."""

    split: str
    pictures: int
    classes: tuple[str, ...]
    size: int
    shard: int
    autoencoder: str | None

    @property
    def count(self) -> int:
        """As it says."""
        return self.pictures

    @property
    def shards(self) -> int:
        """How many files a whole cache has."""
        return -(-self.pictures // self.shard)


def cache(
    data: LabelledImages,
    out: Path,
    *,
    size: int,
    vae: nn.Module | None = None,
    batch: int = 64,
    shard: int = 8192,
    workers: int = 0,
    accelerator: Any = None,
    say: Say | None = None,
    progress: Progress | None = None,
) -> Index:
    """Cache the pictures of `data` at `size` px in `out`, through `vae` on its device if one is given; shards there are kept.

    `say` is told first how much that takes. `accelerator` is an `accelerate.Accelerator` or `PartialState` where several
    processes share the work; each returns once all is there. A picture that cannot be read is replaced by the next good one and
    noted in `data.skipped`. Raises `TrainError` if `out` holds something else.
    """
    index = Index(
        source=data.source, split=data.split, pictures=len(data), classes=data.classes, size=size, shard=shard,
        autoencoder=fingerprint(vae) if vae is not None else None, digest=digest(data.images, data.labels.tolist()),
    )  # fmt: skip
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator is not None else (0, 1)
    claim_index(out, index)
    if say is not None:
        full, rest = divmod(index.pictures, shard)
        say(announced(out, [_bytes(vae, size) * rows for rows in (*[shard] * full, *[rest] * (rest > 0))]))
    for number in range(rank, index.shards, world):
        file = out / shard_name(number)
        if not file.is_file():
            rows = range(number * shard, min((number + 1) * shard, len(data)))
            loader = DataLoader(
                _Pictures(data, size), batch, sampler=rows, num_workers=workers, collate_fn=_collate, generator=torch.Generator()
            )  # fmt: skip
            write_shard(file, _tensors(data, loader, vae), data.skipped)
        if progress is not None:
            progress(number + 1, index.shards, "caching")
    if accelerator is not None:
        accelerator.wait_for_everyone()
    return index


class CachedBatches(Ordered):
    """Batches of a whole cache; of the config's `augment` only flip and repeats mean something here.

    Files are memory-mapped, so no workers are needed. Raises `TrainError` if the cache is missing, unfinished, or another
    augmentation is asked for.
    """

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        self.index = read_index(folder, Index)
        super().__init__(self.index.pictures, config)
        check_flips(config)
        files = [folder / shard_name(number) for number in range(self.index.shards)]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise TrainError(f"{folder} lacks {len(missing)} of {len(files)} files, {missing[0]} first; caching was not finished")
        self.shards = [load_file(file) for file in files]
        self._skipped = unread(files)

    @property
    def skipped(self) -> Mapping[str, str]:
        """Those that could not be read when they were cached, by whatever process and when."""
        return self._skipped

    def identity(self) -> dict[str, Any]:
        """What the cache holds."""
        return self.index.model_dump(mode="json")

    def stream(self, start: int, stop: int, process: int, processes: int) -> Iterator[Batch]:
        """The batches of one process, pictures or latents (B, C, h, w) in fp32."""
        for keys in Order(self, start, stop, process, processes):
            shown, labels = zip(*(self.draw(key) for key in keys), strict=True)
            yield Batch(torch.stack(shown), torch.stack(labels))

    def draw(self, key: Key) -> tuple[Tensor, Tensor]:
        """One variant (C, h, w) of a picture, and its label ()."""
        stored, row = self.shards[key.picture // self.index.shard], key.picture % self.index.shard
        draw = torch.Generator().manual_seed(derive(SAMPLE, self.config.seed, *key))
        mirrored = float(torch.rand((), generator=draw)) < self.config.augment.flip
        if self.index.autoencoder is None:
            pixels = to_pixels(stored["pixels"][row])
            return pixels.flip(-1) if mirrored else pixels, stored["labels"][row]
        mean, std = (stored[name][row, int(mirrored)].float() for name in ("mean", "std"))
        return mean + std * torch.randn(mean.shape, generator=draw), stored["labels"][row]


def check_flips(config: TrainConfig) -> None:
    """Raise `TrainError` if pictures are to be varied otherwise than a cache can."""
    kept = {name: getattr(config.augment, name) for name in ("flip", "repeats", "scale", "crop", "interpolation")}
    if config.augment != Augment(**kept):
        raise TrainError("augment: pictures from a cache can be flipped and repeated, nothing else")


def read_index(folder: Path, kind: type[Kind]) -> Kind:
    """What the cache in `folder` holds. Raises `TrainError` if there is none of this kind."""
    try:
        return kind.model_validate_json((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise TrainError(f"{folder} holds no cache: {INDEX}: {str(error).splitlines()[0]}") from error


def digest(table: Any, said: Sequence[Any]) -> str:
    """SHA-256 that changes when the pictures of a table do, or what is said of each, without reading all of them.

    Of files it takes names, sizes and times; of what lies in the table itself every name and length, and `SAMPLED` contents.
    """
    rows = _held(table)
    found = hashlib.sha256(json.dumps(said).encode())
    for name, length in rows:
        at = Path(name).stat() if length is None and name and Path(name).is_file() else None
        found.update(f"{name} {length if at is None else (at.st_size, at.st_mtime_ns)}\n".encode())
    if any(length is not None for _, length in rows):
        for index in range(0, len(rows), -(-len(rows) // SAMPLED)):
            found.update(table[index]["image"]["bytes"] or b"")
    return found.hexdigest()


def _held(table: Any) -> list[tuple[str | None, int | None]]:
    """Name and length of each stored picture; the length of a file is None. Of a table on disk no content is read."""
    if isinstance(table, list):
        return [(row["image"]["path"], None if row["image"]["bytes"] is None else len(row["image"]["bytes"])) for row in table]
    import pyarrow.compute as arrow

    names, contents = (arrow.struct_field(table.data.column("image"), part) for part in ("path", "bytes"))
    held = list(zip(names.to_pylist(), arrow.binary_length(contents).to_pylist(), strict=True))
    chosen = table._indices  # of a selection; its table holds all
    return held if chosen is None else [held[index] for index in chosen.column(0).to_pylist()]


def claim_index(out: Path, index: Cached) -> None:
    """Write the index, or find that it says the same."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / INDEX).is_file():
        partial = out / f".{secrets.token_hex(4)}"
        partial.write_text(json.dumps(index.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")
        os.replace(partial, out / INDEX)
    found, asked = read_index(out, type(index)), index.model_dump()
    there = found.model_dump() if found.digest is not None else found.model_dump() | {"digest": index.digest}
    other = [name for name in asked if there[name] != asked[name]]
    if "source" not in other and found.count != index.count:
        raise TrainError(
            f"{out} holds a cache of {found.count} pictures of {found.source}, asked for are {index.count}; give another"
        )
    if set(other) - {"shards"} == {"digest"}:
        raise TrainError(f"{out} holds a cache of the same source before its pictures, labels or captions changed; give another")
    if other:
        raise TrainError(f"{out} holds another cache: its {other[0]} is {there[other[0]]!r}, asked for is {asked[other[0]]!r}")


def _bytes(vae: Any, size: int) -> int:
    """Of a picture in a shard, with its label: pixels, or mean and deviation of its latents and of its mirror image's."""
    return 8 + (3 * size**2 if vae is None else 2 * 2 * 2 * int(vae.config.latent_channels) * (size // pixels_a_latent(vae)) ** 2)


def announced(out: Path, sizes: Sequence[int]) -> str:
    """How many files of how many bytes a cache in `out` will have, what is still to be made of them, and room for it."""
    missing = [size for number, size in enumerate(sizes) if not (out / shard_name(number)).is_file()]
    todo = f"{_size(sum(missing))} in {len(missing)} of them still to be made" if missing else "all there"
    free = _size(shutil.disk_usage(out).free)
    return f"{out} takes {_size(sum(sizes))} in {len(sizes)} files, {todo}; {free} are free on that disk"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


class _Pictures(Dataset[tuple[Tensor, int, dict[str, str]]]):
    """Each picture as uint8 (3, size, size)."""

    def __init__(self, data: LabelledImages, size: int) -> None:
        from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, Resize

        self.data, self.transform = data, Compose([Resize(size, InterpolationMode.BICUBIC), CenterCrop(size), PILToTensor()])

    def __getitem__(self, index: int) -> tuple[Tensor, int, dict[str, str]]:
        example = self.data.take(index)
        return self.transform(example.image), example.label, example.skipped


def _collate(items: list[tuple[Tensor, int, dict[str, str]]]) -> tuple[Tensor, Tensor, dict[str, str]]:
    pictures, labels, skipped = zip(*items, strict=True)
    return torch.stack(pictures), torch.tensor(labels), {name: why for some in skipped for name, why in some.items()}


def _tensors(data: LabelledImages, loader: Any, vae: nn.Module | None) -> dict[str, Tensor]:
    """One shard."""
    parts: dict[str, list[Tensor]] = {}
    for pictures, labels, skipped in loader:
        data.note(skipped)
        found = {"labels": labels}
        if vae is None:
            found["pixels"] = pictures
        else:
            both = [encode(vae, pixels) for pixels in (to_pixels(pictures), to_pixels(pictures).flip(-1))]
            for name, pair in zip(("mean", "std"), zip(*both, strict=True), strict=True):
                found[name] = torch.stack(pair, 1).half().cpu()
        for name, tensor in found.items():
            parts.setdefault(name, []).append(tensor)
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def write_shard(file: Path, tensors: dict[str, Tensor], skipped: Mapping[str, str] | None = None) -> None:
    """Write a file, whole or not at all; in it too which pictures could not be read until then, and why."""
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        save_file(tensors, partial, metadata={SKIPPED: json.dumps(dict(skipped or {}))})
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def unread(files: Sequence[Path]) -> dict[str, str]:
    """What these files say of pictures that could not be read."""
    found: dict[str, str] = {}
    for file in files:
        with safe_open(file, "pt") as shard:
            found |= json.loads((shard.metadata() or {}).get(SKIPPED, "{}"))
    return found


def shard_name(number: int) -> str:
    """What a shard is called."""
    return f"{number:05}.safetensors"
