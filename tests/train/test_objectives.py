"""The objectives against their equations, written out."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineate.train import TrainError
from lineate.train.config import Augment, Distill, TrainConfig
from lineate.train.data import Batch
from lineate.train.objectives import classification, divergence, objective

Models = Callable[..., nn.Module]
Small = Callable[..., TrainConfig]


@pytest.fixture
def batch() -> Batch:
    return Batch(torch.rand(4, 3, 32, 32), torch.tensor([0, 4, 2, 2]))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_classification_is_cross_entropy(converted: Models, small: Small, batch: Batch, smoothing: float) -> None:
    model = converted()
    loss = classification(small(augment=Augment(smoothing=smoothing)), 5)(model, batch)["loss"]
    torch.testing.assert_close(loss, F.cross_entropy(model(batch.images), batch.labels, label_smoothing=smoothing))


def test_binary_classification_asks_each_class_alone(converted: Models, small: Small, batch: Batch) -> None:
    model = converted()
    loss = classification(small(loss="bce"), 5)(model, batch)["loss"]
    targets = F.one_hot(batch.labels, 5).float()
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(model(batch.images), targets))


def test_mixed_pictures_have_mixed_targets_and_the_batch_stays(small: Small, batch: Batch) -> None:
    kept = batch.images.clone()
    images, targets = classification(small(augment=Augment(mixup=1.0)), 5).mix(batch)
    assert torch.equal(batch.images, kept) and not torch.equal(images, kept)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    share = float(targets[0, 0])
    torch.testing.assert_close(images[0], share * kept[0] + (1 - share) * kept[3])


def test_divergence_is_the_scaled_kl(seed: None) -> None:
    found, expected = torch.randn(2, 6, 5)
    p, q = (expected / 3).softmax(-1), (found / 3).softmax(-1)
    torch.testing.assert_close(divergence(found, expected, 3.0), 9 * (p * (p / q).log()).sum(-1).mean())


def test_a_model_has_nothing_to_learn_from_itself(converted: Models, small: Small, batch: Batch) -> None:
    model = converted()
    terms = objective(small(distill=Distill(labels=0, logits=1, features=1)), 5, copy.deepcopy(model))(model, batch)
    assert set(terms) == {"loss", "logits", "features"}
    assert all(abs(float(value.detach())) < 1e-5 for value in terms.values())


def test_distillation_adds_its_terms_and_moves_the_model_alone(converted: Models, small: Small, batch: Batch) -> None:
    model, original = converted(), converted("softmax")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    config = small(distill=Distill(labels=0.5, logits=2, temperature=2, features=3))
    terms = objective(config, 5, original)(model, batch)
    torch.testing.assert_close(terms["labels"], 0.5 * F.cross_entropy(model(batch.images), batch.labels))
    torch.testing.assert_close(terms["logits"], 2 * divergence(model(batch.images), original(batch.images), 2.0))
    tokens: list[Tensor] = []
    for one in (model, original):
        one.blocks[-1].register_forward_hook(lambda module, args, output: tokens.append(output))  # type: ignore[union-attr,operator]
        one(batch.images)
    torch.testing.assert_close(terms["features"], 3 * (1 - F.cosine_similarity(*tokens, dim=-1).mean()))
    torch.testing.assert_close(terms["loss"], terms["labels"] + terms["logits"] + terms["features"])
    terms["loss"].backward()
    assert all(parameter.grad is None for parameter in original.parameters())
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_distillation_needs_an_original(small: Small) -> None:
    with pytest.raises(TrainError, match="the original model is needed"):
        objective(small(distill=Distill(logits=1)), 5)
