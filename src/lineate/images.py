"""Photographs from a folder as normalised tensors: random crops to calibrate on, whole pictures and centre crops to look at.

All resizing is bicubic with antialiasing. Crops are drawn from (seed, index) alone, so a run can be repeated item by item.
Legend: h×w picture in pixels, (3, h, w) float tensors, (x - mean) / std per channel with x in [0, 1].
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
RATIO = 4 / 3  # a crop's aspect is drawn from the target's divided by this to the target's times this, log-uniformly


class ImageError(ValueError):
    """No picture where one was expected; the message names the file or folder and the reason."""


def find_images(folder: str | Path) -> list[Path]:
    """Every picture file below `folder`, sorted; hidden files are left out. Raises `ImageError` if there is none."""
    root = Path(folder)
    if not root.is_dir():
        raise ImageError(f"{root} is {'not a folder' if root.exists() else 'not there'}; expected a folder of photographs")
    found = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
    if not found:
        raise ImageError(f"{root} holds no picture; endings looked for: {', '.join(SUFFIXES)}")
    return found


def open_image(file: str | Path | BinaryIO, *, name: str | None = None, upright: bool = True) -> Image:
    """The picture in `file` as RGB, turned upright unless told otherwise. Raises `ImageError` if it cannot be decoded to the end.

    Errors call it `name` (default: the path).
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(file) as stored:
            image = ImageOps.exif_transpose(stored) if upright else stored
            if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 255 rather than scale them
                image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
            return image.convert("RGB")
    except UnidentifiedImageError as error:  # Pillow's own words name an object and where it lies in memory
        raise ImageError(f"{name or file} cannot be read as a picture: it is in no format that Pillow knows") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ImageError(
            f"{name or file} cannot be read as a picture: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from error


def whole(path: str | Path, size: int, mean: Sequence[float], std: Sequence[float], multiple: int) -> Tensor:
    """The whole picture, (1, 3, h, w): its short side made `size` px, its aspect kept, both rounded to `multiple` px."""
    image = open_image(path)
    scale = size / min(image.size) / multiple
    width, height = (max(1, round(side * scale)) * multiple for side in image.size)
    return _tensor(image, (0, 0, *image.size), (height, width), mean, std)[None]


def centre_crop(path: str | Path, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The largest square in the middle of the picture, made `size` px: (1, 3, size, size)."""
    image = open_image(path)
    side = min(image.size)
    left, top = ((length - side) / 2 for length in image.size)
    return _tensor(image, (left, top, left + side, top + side), (size, size), mean, std)[None]


class Crops(Dataset[Tensor]):
    """`count` random resized crops, each flipped or not, of the pictures at `paths` in turn: item i is (3, h, w).

    `size` is a side or (h, w) in pixels, `scale` the share of a picture's area that a crop covers. `jitter` changes brightness,
    contrast and saturation by up to this share, and hue by up to a third of it, in 7 of 10 crops; 1 of 10 then turns grey.
    Item i depends on `seed` and i alone. A file that cannot be read is passed over for the next and noted in `skipped` with
    the reason (in a DataLoader's workers, in their copy). Raises `ImageError` without paths, or once none of them can be read.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        size: int | tuple[int, int],
        count: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int = 0,
        scale: tuple[float, float] = (0.2, 1.0),
        jitter: float = 0.0,
    ) -> None:
        if not paths:
            raise ImageError("no pictures to crop from: the list of paths is empty")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale must be two shares of the area, 0 < low <= high <= 1, got {scale}")
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter must be a share, 0 <= jitter < 1, got {jitter}")
        self.paths, self.count, self.seed, self.scale, self.jitter = list(paths), count, seed, scale, jitter
        self.size = (size, size) if isinstance(size, int) else size
        self.mean, self.std = mean, std
        self.skipped: dict[Path, str] = {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self.count:
            raise IndexError(f"crop {index} of {self.count}")
        image = self._open(index)
        draw = random.Random(f"{self.seed}/{index}")
        crop = _pixels(image, self._box(image.size, draw), self.size)
        if draw.random() < 0.5:
            crop = crop.flip(-1)
        return _normalise(_jitter(crop, self.jitter, draw) if self.jitter else crop, self.mean, self.std)

    def _open(self, index: int) -> Image:
        for step in range(len(self.paths)):
            path = self.paths[(index + step) % len(self.paths)]
            if path not in self.skipped:
                try:
                    return open_image(path)
                except ImageError as error:
                    self.skipped[path] = str(error)
        raise ImageError(f"none of the {len(self.paths)} pictures can be read; the first: {self.skipped[self.paths[0]]}")

    def _box(self, size: tuple[int, int], draw: random.Random) -> tuple[float, float, float, float]:
        """A random rectangle of the picture; one that would stick out is shrunk, so that its aspect stays."""
        width, height = size
        area = width * height * draw.uniform(*self.scale)
        ratio = self.size[1] / self.size[0] * RATIO ** draw.uniform(-1, 1)
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        shrink = min(1, width / w, height / h)
        w, h = min(w * shrink, width), min(h * shrink, height)
        left, top = draw.uniform(0, width - w), draw.uniform(0, height - h)
        return left, top, min(left + w, width), min(top + h, height)


def _tensor(
    image: Image, box: tuple[float, float, float, float], size: tuple[int, int], mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """The part `box` (left, top, right, bottom) of a picture, resized to (h, w) and normalised: (3, h, w)."""
    return _normalise(_pixels(image, box, size), mean, std)


def _pixels(image: Image, box: tuple[float, float, float, float], size: tuple[int, int]) -> Tensor:
    """The part `box` of a picture, resized to (h, w), in [0, 1]: (3, h, w)."""
    from PIL.Image import Resampling

    height, width = size
    resized = image.resize((width, height), Resampling.BICUBIC, box=box)
    return torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1) / 255


def _normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def _jitter(pixels: Tensor, strength: float, draw: random.Random) -> Tensor:
    """Other colours for a picture in [0, 1], drawn from `draw`."""
    from torchvision.transforms.v2 import functional as change

    if draw.random() < 0.7:
        for adjust in (change.adjust_brightness, change.adjust_contrast, change.adjust_saturation):
            pixels = adjust(pixels, draw.uniform(1 - strength, 1 + strength))
        pixels = change.adjust_hue(pixels, draw.uniform(-strength, strength) / 3)
    return change.rgb_to_grayscale(pixels, num_output_channels=3) if draw.random() < 0.1 else pixels
