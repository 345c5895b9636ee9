"""What is minimised: functions (model, batch) -> {"loss": ..., and what else is to be shown}, each a scalar.

    classification   cross entropy, or binary cross entropy, with timm's mixup, cutmix and label smoothing
    distillation     labels·classification + logits·T²·KL(original ‖ model)/B + features·(1 - cosine of patch tokens)

The loop seeds every generator before it asks, from the step alone, so an objective may draw as it likes.
Source of the KL term: Hinton et al., arXiv 1503.02531.

Legend: B batch, N tokens, C channels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from lineate.families import detect
from lineate.train import TrainError
from lineate.train.config import TrainConfig
from lineate.train.data import Batch

Objective = Callable[[nn.Module, Any], dict[str, Tensor]]


def objective(config: TrainConfig, classes: int, original: nn.Module | None = None) -> Objective:
    """What `config` says: classification, or distillation from `original` where one of its terms is on.

    Raises `TrainError` if distillation is asked for and there is no original.
    """
    labels = classification(config, classes)
    if not (config.distill.logits or config.distill.features):
        return labels
    if original is None:
        raise TrainError("distill: the original model is needed to learn from, and there is none")
    return distillation(config, labels, original)


class Labels:
    """Classification of `classes` classes: mixes the batch, asks the model, and compares."""

    def __init__(self, config: TrainConfig, classes: int) -> None:
        augment = config.augment
        self.mixup = (
            Mixup(
                mixup_alpha=augment.mixup, cutmix_alpha=augment.cutmix, prob=augment.mix_prob, switch_prob=augment.mix_switch,
                label_smoothing=augment.smoothing, num_classes=classes,
            )
            if augment.mixes
            else None
        )  # fmt: skip
        self.criterion: nn.Module
        if config.loss == "bce":
            self.criterion = BinaryCrossEntropy(smoothing=0.0 if augment.mixes else augment.smoothing)
        else:
            self.criterion = SoftTargetCrossEntropy() if augment.mixes else LabelSmoothingCrossEntropy(augment.smoothing)

    def mix(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Pictures and targets: mixed pictures and (B, K), or those of the batch and (B,)."""
        if self.mixup is None:
            return batch.images, batch.labels
        images, targets = self.mixup(batch.images.clone(), batch.labels)  # it mixes in place
        return images, targets

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """{"loss"}."""
        images, targets = self.mix(batch)
        return {"loss": self.criterion(logits(model(images)), targets)}


def classification(config: TrainConfig, classes: int) -> Labels:
    """The objective of labels alone."""
    return Labels(config, classes)


def distillation(config: TrainConfig, labels: Labels, original: nn.Module) -> Objective:
    """The objective of labels and `original`, which is put in eval mode and learns nothing; it goes where the batch is."""
    weights = config.distill
    original.requires_grad_(False).eval()

    def compare(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        images, targets = labels.mix(batch)
        original.to(images.device)
        with _last_tokens(model) as ours, _last_tokens(original) as theirs:
            with torch.no_grad():
                expected = logits(original(images))
            found = logits(model(images))
        terms: dict[str, Tensor] = {}
        if weights.labels:
            terms["labels"] = weights.labels * labels.criterion(found, targets)
        if weights.logits:
            terms["logits"] = weights.logits * divergence(found, expected, weights.temperature)
        if weights.features:
            off = 1 - F.cosine_similarity(ours[0].float(), theirs[0].float(), dim=-1)
            terms["features"] = weights.features * off.mean()
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}

    return compare


def divergence(found: Tensor, expected: Tensor, temperature: float) -> Tensor:
    """T²·KL(expected ‖ found) of classes (B, K) at temperature T, mean over the batch."""
    ours, theirs = (F.log_softmax(x.float() / temperature, dim=-1) for x in (found, expected))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


def logits(output: Any) -> Tensor:
    """(B, K) of a model's output, a tensor or transformers' with `.logits`."""
    found: Tensor = getattr(output, "logits", output)
    return found


@contextmanager
def _last_tokens(model: nn.Module) -> Iterator[list[Tensor]]:
    """The last block's output tokens (B, N, C) of a forward pass inside."""
    inner: nn.Module = extract_model_from_parallel(model)
    last = detect(inner).blocks(inner)[-1]
    found: list[Tensor] = []
    handle = last.register_forward_hook(lambda module, args, out: found.append(out[0] if isinstance(out, tuple) else out))
    try:
        yield found
    finally:
        handle.remove()
