"""Key norm, convolutions and inner step in one operator: what runs on this device against the single operators in a row."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import product
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lineate.evaluate.cost import LiveTensors
from lineate.layout import TokenLayout
from lineate.ops import aligned, aligned_cpu
from lineate.ops.aligned import aligned_ttt
from lineate.ops.aligned_cpu import by_pieces
from lineate.ops.aligned_eager import Backend, Setting, by_eager
from lineate.ops.ttt import INNER, InnerLoss, InnerModel

HEADS, DIM = 3, 8
COMBINATIONS = list(product(get_args(InnerModel), get_args(InnerLoss)))
# Pieces of one row and of several, a ragged last one, one row in all; tokens before and after the grid, more than a piece's.
LAYOUTS = [TokenLayout(7, 5, 2, 3), TokenLayout(5, 16, 1), TokenLayout(3, 2), TokenLayout(1, 9, suffix=20), TokenLayout(9, 1)]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aligned_cpu, "TOKENS", 12)
    monkeypatch.setattr(aligned, "FEW", 12)
    monkeypatch.setattr(aligned, "SMALL", 200)


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


@pytest.mark.parametrize(("convolved", "eps"), [(True, 1.0), (True, None), (False, 1.0), (False, None)])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("model", "loss"), COMBINATIONS)
def test_pieces_equal_the_whole_in_output_and_every_gradient(
    model: InnerModel, loss: InnerLoss, layout: TokenLayout, convolved: bool, eps: float | None
) -> None:
    given = tensors(layout, model)
    setting = Setting(layout.height, layout.width, layout.prefix, eps, model, loss)
    cotangent = torch.randn_like(given[1])
    found, expected = (results(run, given, setting, convolved, cotangent) for run in (by_pieces, by_eager))
    for a, b in zip(found, expected, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b)


LAYOUT = LAYOUTS[0]
SETTING = Setting(LAYOUT.height, LAYOUT.width, LAYOUT.prefix, 1.0, "swiglu", "l2")


def run(q: Tensor, k: Tensor, v: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    return by_pieces(q, k, v, parameters[:3], parameters[3:], SETTING)


@pytest.mark.parametrize("learning", ["base", "w1", "w3", "q_weight", "k_bias"])
def test_each_gradient_alone_is_the_same(learning: str) -> None:
    """What needs no gradient is left out, as calibration and freezing have it; the rest must not notice."""
    base, q, k, v, *parameters = tensors(LAYOUT, "swiglu")
    named = dict(zip(["w1", "w2", "w3", "q_weight", "q_bias", "k_weight", "k_bias"], parameters, strict=True))
    together = torch.autograd.grad(run(q, k, v, parameters).square().sum(), [base, *parameters])
    expected = dict(zip(["base", *named], together, strict=True))[learning]
    if learning != "base":
        q, k, v = q.detach(), k.detach(), v.detach()
    for name, parameter in named.items():
        parameter.requires_grad_(name == learning)
    leaf = base if learning == "base" else named[learning]
    torch.testing.assert_close(torch.autograd.grad(run(q, k, v, parameters).square().sum(), leaf)[0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32_and_rounded_once(dtype: torch.dtype) -> None:
    _, q, k, v, *parameters = (x.detach().to(dtype) for x in tensors(LAYOUT, "swiglu"))
    expected = run(*(x.float() for x in (q, k, v)), [x.float() for x in parameters]).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(run(q, k, v, parameters), expected, rtol=0, atol=0)


def test_backward_under_autocast_and_of_heads_before_tokens_is_the_same() -> None:
    """Rotary positions leave q and k with heads before tokens in memory."""
    base, q, k, v, *parameters = tensors(LAYOUT, "swiglu", torch.float32)
    leaves, cotangent = [base, *parameters], torch.randn_like(q)
    expected = torch.autograd.grad(run(q, k, v, parameters), leaves, cotangent, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(run(*(x.contiguous() for x in (q, k, v)), parameters), leaves, cotangent)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_to_differentiate_twice_is_refused() -> None:
    base, q, k, v, *parameters = tensors(LAYOUT, "swiglu")
    (gradient,) = torch.autograd.grad(run(q, k, v, parameters).square().sum(), base, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_gradient_checkpointing_changes_nothing() -> None:
    base, q, k, v, *parameters = tensors(LAYOUT, "swiglu")
    leaves, cotangent = [base, *parameters], torch.randn_like(q)
    plain = torch.autograd.grad(run(q, k, v, parameters), leaves, cotangent, retain_graph=True)
    again = torch.autograd.grad(checkpoint(run, q, k, v, parameters, use_reentrant=False), leaves, cotangent)
    for a, b in zip(again, plain, strict=True):
        assert torch.equal(a, b)


def test_statistics_of_pieces_are_those_of_the_whole_far_off_centre() -> None:
    k = torch.randn(2, 300, HEADS, DIM) + torch.linspace(50, 90, 300).view(1, -1, 1, 1)
    variance, mean = torch.var_mean(k.double(), dim=1, correction=0)
    offset, scale = aligned_cpu._statistics(k, 0.1).double().unbind(1)
    torch.testing.assert_close(scale, (variance + 0.1).rsqrt(), rtol=1e-6, atol=0)
    torch.testing.assert_close(offset, -mean * (variance + 0.1).rsqrt(), rtol=1e-6, atol=0)


def peak_bytes(height: int, backend: Backend) -> int:
    layout = TokenLayout(height, 8)
    _, q, k, v, *parameters = (x.detach() for x in tensors(layout, "swiglu", torch.float32, batch=1))
    with LiveTensors([q, k, v, *parameters]) as live:
        backend(q, k, v, parameters[:3], parameters[3:], SETTING._replace(height=height, width=8, first=0))
    return live.peak


def test_memory_beyond_the_output_does_not_grow_with_the_tokens() -> None:
    grown = 4 * (80 - 20) * 8 * HEADS * DIM  # bytes of the output
    assert peak_bytes(80, by_pieces) - peak_bytes(20, by_pieces) < 1.1 * grown
    assert peak_bytes(80, by_eager) - peak_bytes(20, by_eager) > 3 * grown


def test_what_is_kept_for_backward_is_q_k_and_v() -> None:
    """Their one base, that is; and less than one more of their size for all that does not grow."""
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    _, q, k, v, *parameters = tensors(TokenLayout(40, 40), "swiglu", torch.float32, batch=1)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        by_pieces(q, k, v, parameters[:3], parameters[3:], SETTING._replace(height=40, width=40, first=0))
    base = 3 * q.numel() * q.element_size()
    assert base <= sum(kept.values()) < base * 4 / 3


def test_what_runs_is_said_once_and_why(caplog: pytest.LogCaptureFixture) -> None:
    aligned.say.cache_clear()
    _, q, k, v, *parameters = (x.detach() for x in tensors(LAYOUT, "swiglu"))
    with caplog.at_level(logging.INFO, logger="lineate"):
        for tokens in (LAYOUT.tokens, LAYOUT.tokens, 5):
            aligned_ttt(*(x[:1, :, :tokens] for x in (q, k, v)), parameters[:3], 1, 5)
    assert [record.getMessage().split(",")[0] for record in caplog.records] == ["aligned_ttt: by_pieces", "aligned_ttt: by_eager"]


def test_pieces_are_for_large_samples_whatever_their_number() -> None:
    for batch, tokens, expected in ((1, 12, by_eager), (9, 8, by_eager), (2, 9, by_pieces)):
        q = torch.empty(batch, HEADS, tokens, DIM)
        assert aligned._backend([q, q, q], "swiglu")[0] is expected


def test_transforms_of_torch_func_take_the_reference() -> None:
    _, q, k, v, *parameters = (x.detach() for x in tensors(LAYOUT, "swiglu"))

    def total(weight: Tensor) -> Tensor:
        return aligned_ttt(q, k, v, [weight, *parameters[1:3]], *LAYOUT[:3], convolutions=parameters[3:]).square().sum()

    leaf = parameters[0].clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(total)(leaf.detach()), torch.autograd.grad(total(leaf), leaf)[0])
