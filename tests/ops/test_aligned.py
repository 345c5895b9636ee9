"""Key norm, convolutions and inner step in one operator: every backend against the single operators in a row."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from lineate.core import CoreAttention, CoreConfig
from lineate.layout import TokenLayout
from lineate.mixers.ttt import TTTConfig
from lineate.ops.ttt import InnerLoss, InnerModel, ttt

LAYOUT = TokenLayout(3, 5, prefix=2, suffix=3)


@pytest.mark.parametrize("loss", get_args(InnerLoss))
@pytest.mark.parametrize("model", get_args(InnerModel))
def test_a_core_without_norm_and_locality_is_its_inner_step(model: InnerModel, loss: InnerLoss) -> None:
    mixer = TTTConfig(inner=model, loss=loss, start_std=0.3)
    core = CoreAttention(CoreConfig(mixer=mixer, key_norm="none", locality="none"), 3, 8)
    q, k, v = torch.randn(3, 2, 3, LAYOUT.tokens, 8)
    torch.testing.assert_close(core(q, k, v, LAYOUT), ttt(q, k, v, core.mixer.weights, model, loss))
