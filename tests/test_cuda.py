"""What only a GPU can show; skipped where there is none (benchmarks/gpu.sh runs it)."""

from __future__ import annotations

import copy

import pytest
import torch

from lineate import PRESETS, CalibrationConfig, calibrate, convert
from lineate.ops import flex, neighborhood
from lineate.ops.local import radius_attention
from lineate.ops.neighborhood import neighborhood_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("preset", PRESETS)
def test_cuda_equals_cpu(tiny_vit, preset: str) -> None:
    here = convert(tiny_vit(), preset)
    there = copy.deepcopy(here).cuda()
    picture = torch.randn(2, 3, 48, 72)
    with torch.no_grad():
        torch.testing.assert_close(there(picture.cuda()).cpu(), here(picture), atol=2e-3, rtol=2e-3)


def test_converting_leaves_the_global_cuda_generator_alone(tiny_vit) -> None:
    model = tiny_vit().cuda()
    before = torch.cuda.get_rng_state()
    assert convert(model, "t5").get_parameter("blocks.0.attn.core.mixer.w1").is_cuda
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_calibration_runs_on_cuda(tiny_vit) -> None:
    model = convert(tiny_vit().cuda(), "t5-plus")
    result = calibrate(model, torch.randn(8, 3, 32, 32), config=CalibrationConfig(steps=20, batch=2, pool=8))
    assert all(error.after < error.before for error in result.sites.values())


def test_half_precision_is_close_to_full(tiny_vit) -> None:
    model = convert(tiny_vit(), "t5").cuda()
    picture = torch.randn(2, 3, 48, 48, device="cuda")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        half = model(picture)
    with torch.no_grad():
        torch.testing.assert_close(half.float(), model(picture), atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize(("first", "outside"), [(0, 0), (1, 1), (2, 5)])
def test_natten_equals_the_eager_reference_in_output_and_gradients(
    first: int, outside: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if neighborhood._natten() is None:
        pytest.skip("NATTEN with its kernels is not installed")
    leaves = [torch.randn(2, 3, 9 * 12 + outside, 32, device="cuda", requires_grad=True) for _ in range(3)]
    found = []
    for _ in range(2):  # by NATTEN, then eager
        q = leaves[0][:, :, first : first + 108]
        out = neighborhood_attention(q, *leaves[1:], 9, 12, 5, first)
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        monkeypatch.setattr(neighborhood, "_natten", lambda: None)
        monkeypatch.setattr(flex, "takes", lambda *_: False)
    for fused, eager in zip(*found, strict=True):
        torch.testing.assert_close(fused, eager, atol=5e-3, rtol=5e-3)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("attention", [neighborhood_attention, radius_attention])
@pytest.mark.parametrize(("first", "outside"), [(0, 0), (2, 5)])
def test_flex_attention_equals_the_eager_reference_in_output_and_gradients(
    attention, first: int, outside: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighborhood, "_natten", lambda: None)
    leaves = [torch.randn(2, 3, 18 * 24 + outside, 32, device="cuda", requires_grad=True) for _ in range(3)]
    found = []
    for _ in range(2):  # by FlexAttention, then eager
        out = attention(leaves[0][:, :, first : first + 432], *leaves[1:], 18, 24, 5, first)
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        monkeypatch.setattr(flex, "takes", lambda *_: False)
    for fused, eager in zip(*found, strict=True):
        torch.testing.assert_close(fused, eager, atol=5e-3, rtol=5e-3)
