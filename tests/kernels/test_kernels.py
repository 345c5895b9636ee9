"""The Triton kernels against the eager code in fp64, in outputs and in every gradient.

On a GPU where there is one; else in Triton's interpreter (tests/conftest.py asks for it before Triton is imported). The
interpreter knows no bf16 products and no hardware tanh, and is slow: few tokens, yet not a multiple of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from lineate.kernels import launch, op
from lineate.ops.aligned_eager import Setting, by_eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(DEVICE == "cpu" and not launch.INTERPRETED, reason="Triton was imported before its interpreter"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),  # numpy's, under the interpreter: σ(-∞) is 0
]


class Case(NamedTuple):
    """One combination; the tokens are `first`, a height×width grid, and `last`."""

    dim: int
    model: str
    loss: str
    dtype: torch.dtype
    convolved: bool = True
    eps: float | None = 1.0
    height: int = 5
    width: int = 7
    first: int = 0
    last: int = 0
    batch: int = 1
    heads: int = 2

    @property
    def setting(self) -> Setting:
        return Setting(self.height, self.width, self.first, self.eps, self.model, self.loss)


# Every dimension, model and loss, with and without norm and convolution; together the combinations that the code branches on.
CASES = [
    Case(32, "2layer", "l2", torch.float32, first=1, last=2, batch=2),
    Case(64, "swiglu", "l2", torch.float16, first=3, height=3, width=11),
    Case(72, "2layer", "l2", torch.float16, height=11, width=3),
    Case(80, "swiglu", "inner-product", torch.float32, convolved=False),
    Case(96, "2layer", "inner-product", torch.float16, eps=None, last=1),
    Case(128, "swiglu", "l2", torch.float32, convolved=False, eps=None, heads=1),
]


def made(case: Case) -> tuple[list[Tensor], Tensor]:
    """Leaves (q, k, v, weights, convolutions), q, k and v views of one projection, and what to multiply the output by."""
    tokens, channels = case.first + case.height * case.width + case.last, case.heads * case.dim
    qkv = torch.randn(case.batch, tokens, 3, case.heads, case.dim).to(case.dtype)
    qkv[:, :, 1] += 2.0  # keys far from zero, which the norm takes away
    weights = [torch.randn(case.heads, case.dim, case.dim) * case.dim**-0.5 for _ in range(2 if case.model == "2layer" else 3)]
    convolutions = [x for _ in "qk" for x in (torch.randn(channels, 1, 3, 3) * 0.3, torch.randn(channels) * 0.3)]
    leaves = [*qkv.to(DEVICE).permute(2, 0, 3, 1, 4), *weights, *(convolutions if case.convolved else [])]
    return [x.to(DEVICE).requires_grad_() for x in leaves], torch.randn(case.batch, case.heads, tokens, case.dim, device=DEVICE)


def run(backend: Callable[..., Tensor], case: Case, leaves: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    """The output and the gradients of all leaves."""
    stop = -4 if case.convolved else None
    out = backend(*leaves[:3], leaves[3:stop], leaves[stop:] if stop else None, case.setting)
    return [out, *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]


def by_kernels(*arguments) -> Tensor:
    *tensors, setting = arguments
    return op.aligned_ttt(*tensors, *setting)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, so that a token, channel or matrix entry that no program writes cannot pass unseen."""
    empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.dim}-{case.model}-{case.loss}-{case.dtype}")
def test_outputs_and_every_gradient_equal_eager_in_fp64(case: Case) -> None:
    leaves, cotangent = made(case)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    found, expected = run(by_kernels, case, leaves, cotangent), run(by_eager, case, exact, cotangent)
    tolerance = 5e-6 if case.dtype == torch.float32 else 1e-2
    for result, reference in zip(found, expected, strict=True):
        assert (result.double() - reference).norm() <= tolerance * reference.norm()
    assert (found[0].double() - expected[0]).norm() <= min(tolerance, 2e-3) * expected[0].norm()


def test_tiny_gradients_are_not_lost_to_half_precision() -> None:
    """Every gradient is linear in the one that comes in, down to what fp16 cannot hold."""
    case = Case(32, "swiglu", "inner-product", torch.bfloat16, heads=1, height=3, width=4)
    leaves, cotangent = made(case)
    large, tiny = (run(by_kernels, case, leaves, cotangent * scale)[1:] for scale in (1.0, 2.0**-30))
    for a, b in zip(tiny, large, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a * 2.0**30, b)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own copies
def test_opcheck_and_vmap() -> None:
    """The operator's fake, autograd and compilation agree with it; mapped over, it gives what a loop gives."""
    case = CASES[0]._replace(batch=1, heads=1, height=2, width=3)
    (q, k, v, *_), _ = made(case)
    weights = (0.1 * torch.randn(1, 2, 32, 32, device=DEVICE)).requires_grad_()
    rest = (weights, None, None, 2, 3, 1, 1.0, True)
    torch.library.opcheck(op._forward, (q, k, v, *rest))
    several = torch.stack((q, 2 * q)).detach()
    mapped = torch.vmap(lambda x: op._forward(x, k.detach(), v.detach(), *rest)[0])(several)
    torch.testing.assert_close(mapped, torch.stack([op._forward(x, k, v, *rest)[0] for x in several]))


@pytest.mark.parametrize(
    ("dim", "model", "dtype", "why"),
    [
        (64, "2layer", torch.bfloat16, None),
        (48, "2layer", torch.bfloat16, "head dimensions 32, 64, 72, 80, 96, 128, not 48"),
        (64, "3layer", torch.bfloat16, "inner models 2layer, swiglu, not 3layer"),
        (64, "swiglu", torch.float64, "do not compute in float64"),
        (128, "swiglu", torch.bfloat16, None),
        (128, "swiglu", torch.float32, "takes 128 KiB of shared memory, and this GPU has 99"),
    ],
)
def test_what_they_cannot_do_is_said(
    dim: int, model: str, dtype: torch.dtype, why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    small = SimpleNamespace(shared_memory_per_block_optin=99 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: small)
    found = op.refusal(torch.empty(1, 2, 5, dim, dtype=dtype), model)
    assert found == why if why is None else why in found


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter has no races")
@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_results_repeat_bit_by_bit(case: Case) -> None:
    leaves, cotangent = made(case._replace(height=64, width=64))
    first, second = (run(by_kernels, case._replace(height=64, width=64), leaves, cotangent) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
