"""Settings that do not fit together are refused when they are said."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from lineate.recipes import RECIPES
from lineate.train.config import Distill, TrainConfig


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epochs": 5, "warmup_epochs": 5}, "warmup_epochs 5 must be less than epochs 5"),
        ({"batch": 7, "augment": {"mixup": 0.8}}, "batch must be even"),
        ({"compile": True, "distill": {"features": 1.0}}, "turn one of them off"),
        ({"distill": {"labels": 0}}, "nothing would be learned"),
        ({"learning_rate": 1}, "learning_rate"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TrainConfig(**changes)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_valid_and_survive_json(name: str) -> None:
    recipe = RECIPES[name]()
    assert TrainConfig.model_validate_json(recipe.model_dump_json()) == recipe


def test_recipes_of_the_paper_share_table_8() -> None:
    """Table 8: AdamW, 30 epochs of which 5 rise, 2e-5 per 512 images to 2e-7 from 2e-8, decay 1e-8, new parameters ×20."""
    for name, protocol in (("t5", "ft"), ("t5-freeze", "freeze")):
        found = RECIPES[name]()
        assert (found.protocol, found.opt, found.epochs, found.warmup_epochs) == (protocol, "adamw", 30, 5)
        assert (found.lr, found.lr_base_size, found.min_lr, found.warmup_lr) == (2e-5, 512, 2e-7, 2e-8)
        assert (found.weight_decay, found.new_lr_multiplier) == (1e-8, 20)
        assert found.distill == Distill()
