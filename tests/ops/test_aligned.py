"""Key norm, convolutions and inner step in one operator: what runs on this device against the single operators in a row."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import get_args

import pytest
import torch
from torch import Tensor

from lineate.layout import TokenLayout
from lineate.ops import aligned_cpu
from lineate.ops.aligned_eager import Backend, Setting, by_eager
from lineate.ops.ttt import INNER, InnerLoss, InnerModel

HEADS, DIM = 3, 8
COMBINATIONS = list(product(get_args(InnerModel), get_args(InnerLoss)))
# Pieces of one row and of several, a ragged last one, one row in all; tokens before and after the grid, more than a piece's.
LAYOUTS = [TokenLayout(7, 5, 2, 3), TokenLayout(5, 16, 1), TokenLayout(3, 2), TokenLayout(1, 9, suffix=20), TokenLayout(9, 1)]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aligned_cpu, "TOKENS", 12)


def tensors(layout: TokenLayout, model: InnerModel, dtype: torch.dtype = torch.float64, batch: int = 2) -> list[Tensor]:
    """q, k, v as views of one projection, keys off centre; weights; convolutions. All leaves but q, k, v, whose base is one."""
    base = torch.randn(batch, layout.tokens, 3, HEADS, DIM, dtype=dtype).requires_grad_()
    q, k, v = (base + torch.tensor([0.0, 4.0, 0.0], dtype=dtype)[:, None, None]).permute(2, 0, 3, 1, 4).unbind(0)
    weights = [0.3 * torch.randn(HEADS, DIM, DIM, dtype=dtype) for _ in range(INNER[model].matrices)]
    shapes = 2 * [(HEADS * DIM, 1, 3, 3), (HEADS * DIM,)]
    convolutions = [0.3 * torch.randn(shape, dtype=dtype) for shape in shapes]
    return [base, q, k, v, *(x.requires_grad_() for x in (*weights, *convolutions))]


def results(backend: Backend, given: Sequence[Tensor], setting: Setting, convolved: bool, cotangent: Tensor) -> list[Tensor]:
    base, q, k, v, *parameters = given
    weights, convolutions = parameters[:-4], parameters[-4:] if convolved else None
    out = backend(q, k, v, weights, convolutions, setting)
    used = [base, *weights, *(convolutions or ())]
    return [out, *torch.autograd.grad(out, used, cotangent, retain_graph=True)]


@pytest.mark.parametrize(("convolved", "eps"), list(product((True, False), (1.0, None))))
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("model", "loss"), COMBINATIONS)
def test_pieces_equal_the_whole_in_output_and_every_gradient(
    model: InnerModel, loss: InnerLoss, layout: TokenLayout, convolved: bool, eps: float | None
) -> None:
    given = tensors(layout, model)
    setting = Setting(layout.height, layout.width, layout.prefix, eps, model, loss)
    cotangent = torch.randn_like(given[1])
    found, expected = (results(run, given, setting, convolved, cotangent) for run in (aligned_cpu.by_pieces, by_eager))
    for a, b in zip(found, expected, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b)
