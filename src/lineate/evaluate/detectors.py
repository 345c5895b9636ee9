"""transformers' models as GenEval's eyes: Mask2Former finds objects, CLIP tells their colours.

The published evaluation's own steps, which transformers' post-processing does not take (it thinks in 384² masks, without boxes):

    picture   short side 800 px, long at most 1333, bilinear; normalised; zeros to a multiple of 32 below and on the right
    object    the 100 likeliest of query × class; its mask where the logit, brought to the padded size, cut, and brought to the
              picture's, is above 0; its score p(class) × mean sigmoid inside; its box that of the mask
    colour    the box cut out, grey (#999) wherever the mask is not; CLIP's nearest of ten, each the mean of three sentences

The weights are not those of the published detector, so what they find is labelled hf. Legend: Q queries, K classes, h×w picture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lineate.evaluate import EvaluationError
from lineate.evaluate.geneval import Sighting
from lineate.evaluate.geneval_prompts import CLASSES, COLORS
from lineate.evaluate.rules import Found

if TYPE_CHECKING:
    from PIL.Image import Image

MASK2FORMER, CLIP = "facebook/mask2former-swin-small-coco-instance", "openai/clip-vit-large-patch14"
SHORT, LONG, MULTIPLE, MOST_OBJECTS = 800, 1333, 32, 100
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY = (0x99, 0x99, 0x99)
SENTENCES = ("a photo of a {color} {kind}", "a photo of a {color}-colored {kind}", "a photo of a {color} object")


class Mask2FormerDetector:
    """A transformers Mask2Former of COCO's 80 classes. `short` and `long` are the sides in px that pictures are brought to."""

    def __init__(self, model: Any, name: str, *, short: int = SHORT, long: int = LONG) -> None:
        self.model, self.name, self.short, self.long = model.eval(), f"hf:{name}", short, long
        classes = model.config.num_labels
        if classes != len(CLASSES):
            raise EvaluationError(f"{name} tells {classes} classes apart; GenEval needs COCO's {len(CLASSES)}")

    @torch.inference_mode()
    def __call__(self, picture: Image) -> list[Sighting]:
        """The objects of a picture, the likeliest first, with their masks."""
        from torchvision.transforms.functional import pil_to_tensor

        pixels = pil_to_tensor(picture).to(next(self.model.parameters()).device)[None] / 255
        height, width = pixels.shape[-2:]
        scale = min(self.short / min(height, width), self.long / max(height, width))
        size = round(height * scale), round(width * scale)
        mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (MEAN, STD))
        x = (F.interpolate(pixels, size, mode="bilinear", align_corners=False) - mean) / std
        padded = [-(-side // MULTIPLE) * MULTIPLE for side in size]
        out = self.model(pixel_values=F.pad(x, (0, padded[1] - size[1], 0, padded[0] - size[0])))
        scores = out.class_queries_logits[0].softmax(-1)[:, :-1]
        best, indices = scores.flatten().topk(min(MOST_OBJECTS, scores.numel()))
        masks = F.interpolate(out.masks_queries_logits, padded, mode="bilinear", align_corners=False)
        masks = F.interpolate(masks[..., : size[0], : size[1]], (height, width), mode="bilinear", align_corners=False)[0]
        queries = (indices // len(CLASSES)).tolist()
        found = zip(best.tolist(), (indices % len(CLASSES)).tolist(), queries, strict=True)
        return [sighting for p, kind, query in found if (sighting := _sighting(p, CLASSES[kind], masks[query]))]


class ClipColors:
    """A transformers CLIP with its tokenizer and image processor: which of ten colours an object has."""

    def __init__(self, model: Any, tokenizer: Any, processor: Any) -> None:
        self.model, self.tokenizer, self.processor = model.eval(), tokenizer, processor
        self.known: dict[str, Tensor] = {}

    def __call__(self, picture: Image, sighting: Sighting) -> str:
        """The colour of an object in a picture."""
        return COLORS[int((self._colors(sighting.found.kind) @ self._picture(cut_out(picture, sighting))).argmax())]

    @torch.inference_mode()
    def _colors(self, kind: str) -> Tensor:
        """A unit vector a colour, (10, d)."""
        if kind not in self.known:
            texts = [sentence.format(color=color, kind=kind) for color in COLORS for sentence in SENTENCES]
            tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(self._device())
            vectors: Tensor = self.model.get_text_features(**tokens).pooler_output
            means = F.normalize(vectors, dim=-1).view(len(COLORS), len(SENTENCES), -1).mean(1)
            self.known[kind] = F.normalize(means, dim=-1)
        return self.known[kind]

    @torch.inference_mode()
    def _picture(self, picture: Image) -> Tensor:
        inputs = self.processor(images=picture, return_tensors="pt").to(self._device())
        vectors: Tensor = self.model.get_image_features(**inputs).pooler_output
        return F.normalize(vectors[0], dim=-1)

    def _device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device


def load_detector(name: str = MASK2FORMER, device: torch.device | str = "cpu") -> Mask2FormerDetector:
    """The Mask2Former called `name`, on the hub, in its cache, or in a directory. Raises `EvaluationError`."""
    from transformers import Mask2FormerForUniversalSegmentation

    return Mask2FormerDetector(load(Mask2FormerForUniversalSegmentation, name).to(device), name)


def load_colors(name: str = CLIP, device: torch.device | str = "cpu") -> ClipColors:
    """The CLIP called `name`, likewise."""
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    return ClipColors(load(CLIPModel, name).to(device), load(AutoTokenizer, name), load(AutoImageProcessor, name))


def load(kind: Any, name: str) -> Any:
    """`kind.from_pretrained(name)`. Raises `EvaluationError` if it cannot be had."""
    try:
        return kind.from_pretrained(name)
    except Exception as error:  # whatever the hub's client raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EvaluationError(f"cannot get {name}: {reason}") from error


def cut_out(picture: Image, sighting: Sighting) -> Image:
    """An object's box, grey wherever the object is not."""
    from PIL import Image as pil

    if sighting.mask is not None:
        mask = pil.fromarray(sighting.mask.cpu().numpy())
        picture = pil.composite(picture, pil.new("RGB", picture.size, GREY), mask)
    return picture.crop(sighting.found.box)


def _sighting(p: float, kind: str, logits: Tensor) -> Sighting | None:
    """An object from its class's probability and its mask's logits (h, w); None if its mask is empty."""
    mask = logits > 0
    if not bool(mask.any()):
        return None
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
    return Sighting(Found(kind=kind, box=box, score=p * float(logits[mask].sigmoid().mean())), mask)
