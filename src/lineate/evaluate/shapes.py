"""What a picture of drawn shapes shows, by rule, and whether that is what its prompt says.

    pixel      channels above 0.5 are on; on and off of the three name the colour, none of them the background
    object     4-connected pixels of one colour, at least 8
    shape      the stamp with the highest soft IoU Σ min(a, s) / Σ max(a, s) with the object's own coverage a, if above 0.5:
               all shapes of the world as drawn and blurred, in sizes up to 1 px beyond the world's, within ±1 px of the middle
    correct    GenEval's rules (`lineate.evaluate.rules`)
    strict     correct, and as many objects as the prompt names, nothing else

a is the mean of the colour's channels on the object and the pixels around it, where antialiasing leaves its edge.
On scenes as they are drawn this is never wrong, nor under blur of σ = 0.7 px; noise of σ = 0.2 misleads it in about one picture
of a thousand (`tests/test_shapes.py`).
Legend: B pictures, s their side, n objects, P side of a patch around one, K stamps.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lineate.evaluate import EvaluationError
from lineate.evaluate.rules import Found, faults
from lineate.evaluate.tally import Judged
from lineate.images import open_image
from lineate.text2image.prompts import Prompt, read_layout
from lineate.text2image.shapes import COLOURS, World, held_out, stamp

LEAST_AREA = 8
LEAST_IOU = 0.5
BLUR = 0.7  # σ in px
PARTS = {"all": (False, True), "seen": (False,), "held-out": (True,)}  # whether their prompts are held out of training
UNKNOWN = "unknown"  # an object that is like no stamp
_CHUNK = 32_000_000  # numbers at a time while stamps are compared
_CODES = {4 * r + 2 * g + b: name for name, (r, g, b) in COLOURS.items()}


def detect(pictures: Tensor, world: World) -> list[list[Found]]:
    """The objects in each of `pictures` (B, 3, s, s) in [0, 1], the likest their stamp first. Raises `EvaluationError`."""
    if pictures.ndim != 4 or pictures.shape[1:] != (3, world.side, world.side) or not pictures.is_floating_point():
        expected = f"floats (B, 3, {world.side}, {world.side})"
        raise EvaluationError(f"pictures must be {expected}, got {pictures.dtype} {tuple(pictures.shape)}")
    pictures = pictures.detach().float().cpu()
    on = pictures > 0.5
    codes = (on * torch.tensor((4, 2, 1)).view(3, 1, 1)).sum(1)
    found: list[list[Found]] = [[] for _ in pictures]
    for code, colour in _CODES.items():
        labels, boxes = _components(codes == code)
        if not boxes:
            continue
        coverage = pictures[:, [channel for channel in range(3) if COLOURS[colour][channel]]].mean(1)
        kinds = _classify(coverage, labels, boxes, world)
        for (_, picture, top, left, bottom, right), (kind, score) in zip(boxes, kinds, strict=True):
            found[picture].append(Found(kind=kind, box=(left, top, right, bottom), score=score, color=colour))
    return [sorted(things, key=lambda thing: -thing.score) for things in found]


def judge(prompt: Prompt, found: Sequence[Found]) -> tuple[bool, bool]:
    """Whether a picture is correct, and whether strictly so."""
    correct = not faults(prompt, found)
    return correct, correct and len(found) == sum(clause.count for clause in prompt.include)


def score(folder: Path, world: World, part: str = "all") -> tuple[list[Judged], list[Judged]]:
    """Each prompt of a folder of pictures with the scores of its pictures, and again with the strict ones.

    `part` is one of `PARTS`: all prompts, or those that training held out, or those that it did not. Raises `EvaluationError`,
    `PromptError`, or `ShapesError` for prompts of another world.
    """
    from torchvision.transforms.functional import pil_to_tensor

    if part not in PARTS:
        raise EvaluationError(f"unknown part {part!r}; choices: {', '.join(PARTS)}")
    correct: list[Judged] = []
    strict: list[Judged] = []
    for prompt, files in read_layout(folder):
        if held_out(world, prompt) not in PARTS[part]:
            continue
        pictures = [pil_to_tensor(open_image(file)) / 255 for file in files]
        odd = next((file for file, picture in zip(files, pictures, strict=True) if picture.shape[1:] != (world.side,) * 2), None)
        if odd is not None:
            raise EvaluationError(f"{odd} is not {world.side}x{world.side} px, as pictures of this world are")
        verdicts = [judge(prompt, found) for found in detect(torch.stack(pictures), world)]
        for scores, which in ((correct, 0), (strict, 1)):
            scores.append(
                Judged(tag=prompt.tag, prompt=prompt.prompt, scores=tuple(float(verdict[which]) for verdict in verdicts))
            )
    return correct, strict


def _components(mask: Tensor) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Labels (B, s, s) of 4-connected pixels, and (label, picture, top, left, bottom, right) of those that are large enough."""
    import numpy as np
    from scipy import ndimage

    plane = np.zeros((3, 3, 3), dtype=bool)
    plane[1] = ndimage.generate_binary_structure(2, 1)  # nothing connects one picture to the next
    labels, _ = ndimage.label(mask.numpy(), plane)
    areas = np.bincount(labels.ravel())
    slices: list[Any] = ndimage.find_objects(labels)
    boxes: list[tuple[int, ...]] = [
        (label, of.start, rows.start, columns.start, rows.stop, columns.stop)
        for label, (of, rows, columns) in enumerate(slices, start=1) if areas[label] >= LEAST_AREA
    ]  # fmt: skip
    return torch.from_numpy(labels), boxes


def _classify(coverage: Tensor, labels: Tensor, boxes: Sequence[tuple[int, ...]], world: World) -> list[tuple[str, float]]:
    """The shape of each object and its soft IoU with it."""
    names, stamps = _stamps(world)
    side = stamps.shape[-1]
    coverage, labels = (F.pad(values, (side,) * 4) for values in (coverage, labels))
    patches = torch.empty(len(boxes), side, side)
    for index, (label, picture, top, left, bottom, right) in enumerate(boxes):
        # The middle of the box, rounded down to half a pixel, is put at the middle of the patch.
        rows, columns = (slice(start, start + side) for start in ((top + bottom + side) // 2, (left + right + side) // 2))
        near = F.max_pool2d((labels[picture, rows, columns] == label)[None].float(), 3, stride=1, padding=1)[0]
        patches[index] = coverage[picture, rows, columns] * near
    patches, stamps = patches.clamp(0, 1).flatten(1), stamps.flatten(1)
    best, which = [], []
    for chunk in patches.split(max(1, _CHUNK // stamps.numel())):
        overlap = torch.minimum(chunk[:, None], stamps).sum(-1)
        iou = overlap / (chunk.sum(-1, keepdim=True) + stamps.sum(-1) - overlap)
        values, indices = iou.max(-1)
        best += values.tolist()
        which += indices.tolist()
    fits = [max(bottom - top, right - left) <= side for _, _, top, left, bottom, right in boxes]
    return [
        (names[index], score) if fit and score > LEAST_IOU else (UNKNOWN, score if fit else 0.0)
        for fit, index, score in zip(fits, which, best, strict=True)
    ]


@lru_cache
def _stamps(world: World) -> tuple[tuple[str, ...], Tensor]:
    """The names of all stamps and what they cover, (K, P, P)."""
    from scipy import ndimage

    least, most = world.sizes
    side = most + 4  # the greatest size, a px beyond on each side, and as far again that it may be shifted
    coarse = world.side // 32
    shifts = [shift * coarse / 2 for shift in range(-2 // coarse, 2 // coarse + 1)]
    choices = list(product(world.shapes, range(least - 1, most + 2, coarse), shifts, shifts))
    drawn = torch.stack([stamp(shape, size, side / 2 + dx, side / 2 + dy, side) for shape, size, dy, dx in choices])
    blurred = torch.from_numpy(ndimage.gaussian_filter(drawn.numpy(), (0, BLUR, BLUR)))
    return tuple(shape for shape, *_ in choices) * 2, torch.cat((drawn, blurred))
