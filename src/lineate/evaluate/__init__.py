"""Measuring: what a conversion changed and bought, how good classifiers are, and what generators draw.

    fidelity, cost           the original against the converted model
    top1                     classifiers
    fid                      FID and its kin
    geneval, dpg, shapes     text to image: objects found by a detector, questions answered, drawn scenes judged by rule
    rules, tally             what these share: when a picture shows its prompt, and scores by tag

Import from the modules: `lineate.evaluate.fidelity` and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

Progress = Callable[[int, int, str], None]  # (done, total, what): whoever works long calls it after every step


class EvaluationError(ValueError):
    """Something that cannot be measured; the message names the value and what would do."""


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Every module of `models` in eval mode inside, and back in the mode that each one had afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def batches(images: Iterable[Tensor], model: nn.Module) -> Iterator[Tensor]:
    """`images` one batch at a time, (B, 3, h, w) on the model's device and in its dtype; a bare (3, h, w) is a batch of one.

    Raises `EvaluationError` for anything else, and if there is nothing at all.
    """
    reference = next(model.parameters())
    empty = True
    for batch in images:
        if not isinstance(batch, Tensor) or batch.ndim not in (3, 4):
            found = f"a tensor of shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else f"a {type(batch).__name__}"
            raise EvaluationError(f"images must be tensors (3, h, w) or (B, 3, h, w), got {found}")
        empty = False
        yield (batch if batch.ndim == 4 else batch.unsqueeze(0)).to(reference.device, reference.dtype)
    if empty:
        raise EvaluationError("there are no images to measure on")
