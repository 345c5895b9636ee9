"""A transformers model that answers questions about pictures, such as ViLT: for DPG-Bench where nobody else answers.

Its answers are not those of mPLUG-large, which the published figures rest on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lineate.evaluate.detectors import load

if TYPE_CHECKING:
    from PIL.Image import Image

VILT = "dandelin/vilt-b32-finetuned-vqa"


class VqaViewer:
    """A model with a class an answer, and its processor."""

    def __init__(self, model: Any, processor: Any, name: str) -> None:
        self.model, self.processor, self.name = model.eval(), processor, f"hf:{name}"

    @torch.inference_mode()
    def __call__(self, picture: Image, question: str) -> str:
        """The likeliest answer."""
        inputs = self.processor(images=picture, text=question, return_tensors="pt", truncation=True)
        inputs = inputs.to(next(self.model.parameters()).device)
        answer: str = self.model.config.id2label[int(self.model(**inputs).logits[0].argmax())]
        return answer


def load_viewer(name: str = VILT, device: torch.device | str = "cpu") -> VqaViewer:
    """The ViLT called `name`, on the hub, in its cache, or in a directory. Raises `EvaluationError`."""
    from transformers import AutoProcessor, ViltForQuestionAnswering

    return VqaViewer(load(ViltForQuestionAnswering, name).to(device), load(AutoProcessor, name), name)
