"""Small pictures decoded once and kept, so that shifting and flipping a batch of them costs next to nothing.

Kept for as long as the data they come from, so one decoding serves every run of a process on it.

Legend: n pictures, B batch, s their side in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, Resize
from torchvision.transforms.functional import pil_to_tensor

from lineate.data import LabelledImages
from lineate.train.randomness import SAMPLE, derive

PAD_PX = 4
MOST_BYTES = 2**30
_KEPT: WeakKeyDictionary[LabelledImages, dict[int, Kept]] = WeakKeyDictionary()


def square(size: int) -> Compose:
    """From a PIL picture to one of `size` px either way: resized so that its short side fits, and cropped in the middle."""
    return Compose([Resize(size), CenterCrop(size)])


class Kept:
    """Pixels (n, 3, s, s) uint8 and labels (n,) of labelled images, read when they are first asked for."""

    def __init__(self, data: LabelledImages, size: int) -> None:
        self.pixels = torch.empty(len(data), 3, size, size, dtype=torch.uint8)
        self.labels = torch.empty(len(data), dtype=torch.int64)
        self.known = [False] * len(data)
        self.square = square(size)

    def take(self, data: LabelledImages, pictures: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, s, s) and labels (B,)."""
        for picture in pictures:
            if not self.known[picture]:
                example = data.take(picture)
                self.pixels[picture] = pil_to_tensor(self.square(example.image))
                self.labels[picture] = example.label
                self.known[picture] = True
        chosen = torch.tensor(pictures)
        return self.pixels[chosen], self.labels[chosen]


def keep(data: LabelledImages, size: int) -> Kept | None:
    """The pictures of `data` at `size` px, kept; None if they are too many."""
    if len(data) * 3 * size * size > MOST_BYTES:
        return None
    sizes = _KEPT.setdefault(data, {})
    if size not in sizes:
        sizes[size] = Kept(data, size)
    return sizes[size]


def shift_and_flip(pixels: Tensor, keys: Sequence[tuple[int, ...]], seed: int, flip: float) -> Tensor:
    """Pixels (B, 3, s, s), each cut out anew after `PAD_PX` of black on every side, and mirrored or not, as its key says."""
    size, places = pixels.shape[-1], 2 * PAD_PX + 1
    padded = F.pad(pixels, (PAD_PX,) * 4)
    out = torch.empty_like(pixels)
    for i, key in enumerate(keys):
        draw, x = divmod(derive(SAMPLE, seed, *key), places)
        draw, y = divmod(draw, places)
        cut = padded[i, :, y : y + size, x : x + size]
        out[i] = cut.flip(-1) if draw < flip * (2**32 // places**2) else cut
    return out
