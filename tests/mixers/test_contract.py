"""What every entry of MIXERS must do, and the core of every preset. A new one is tested by being listed there."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from lineate.convert import PRESETS
from lineate.core import CoreAttention
from lineate.layout import TokenLayout
from lineate.mixers import MIXERS, MixerConfig, TokenMixer
from lineate.ops.ttt import INNER, InnerLoss

HEADS, DIM = 3, 8
LAYOUTS = [
    TokenLayout(4, 4),
    TokenLayout(2, 7),
    TokenLayout(1, 1),
    TokenLayout(3, 5, prefix=1),
    TokenLayout(3, 2, prefix=5, suffix=4),
]
OPTIONS: list[dict[str, object]] = [
    *({"name": "ttt", "inner": inner, "loss": loss} for inner in INNER for loss in get_args(InnerLoss)),
    {"name": "hedgehog", "feature": "exp"},
    {"name": "hedgehog", "per_head": True},
    {"name": "clear", "radius": 2},
    {"name": "neighborhood", "window": 3},
    {"name": "swa", "window": 2},
    {"name": "hyena", "variant": "se"},
]
MADE: dict[str, Callable[[], TokenMixer | CoreAttention]] = {
    **{name: partial(cls, cls.config_type(), HEADS, DIM) for name, cls in MIXERS.items()},
    **{str(o): partial(MIXERS[o["name"]], MIXERS[o["name"]].config_type(**o), HEADS, DIM) for o in OPTIONS},
    **{f"preset {name}": partial(CoreAttention, preset.core(), HEADS, DIM) for name, preset in PRESETS.items()},
}
every_config = pytest.mark.parametrize("name", MIXERS)
every_mixer = pytest.mark.parametrize("name", MADE)


def make(name: str) -> TokenMixer | CoreAttention:
    return MADE[name]()


def qkv(layout: TokenLayout, batch: int = 2) -> list[Tensor]:
    return [torch.randn(batch, HEADS, layout.tokens, DIM) for _ in range(3)]


def test_every_mixer_has_its_config_in_the_union_under_its_own_name() -> None:
    union = get_args(get_args(MixerConfig)[0])
    assert {cls.config_type for cls in MIXERS.values()} == set(union)
    for name, cls in MIXERS.items():
        assert cls.config_type().name == name


@every_config
def test_config_is_frozen_and_strict(name: str) -> None:
    config = MIXERS[name].config_type()
    with pytest.raises(ValidationError, match="frozen"):
        config.name = "other"
    with pytest.raises(ValidationError, match="no_such_field"):
        MIXERS[name].config_type(no_such_field=1)


@every_mixer
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_any_grid_prefix_and_suffix(name: str, layout: TokenLayout) -> None:
    q, k, v = qkv(layout)
    out = make(name)(q, k, v, layout)
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    assert out.isfinite().all()


@every_mixer
def test_samples_of_a_batch_do_not_see_each_other(name: str) -> None:
    layout = TokenLayout(3, 5, prefix=1)
    mixer, inputs = make(name), qkv(layout, batch=3)
    together = mixer(*inputs, layout)
    alone = torch.cat([mixer(*(x[i : i + 1] for x in inputs), layout) for i in range(3)])
    torch.testing.assert_close(together, alone)


@every_mixer
def test_heads_do_not_see_each_other(name: str) -> None:
    layout = TokenLayout(3, 5)
    mixer, (q, k, v) = make(name), qkv(layout)
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[:, 0] += torch.randn_like(x[:, 0])
    before, after = mixer(q, k, v, layout), mixer(*changed, layout)
    torch.testing.assert_close(before[:, 1:], after[:, 1:])
    assert not torch.allclose(before[:, 0], after[:, 0])


@every_mixer
def test_gradients_reach_every_parameter_and_input(name: str) -> None:
    layout = TokenLayout(3, 5, prefix=1)
    mixer, inputs = make(name), [x.requires_grad_() for x in qkv(layout)]
    mixer(*inputs, layout).square().sum().backward()
    for label, tensor in [*mixer.named_parameters(), *zip("qkv", inputs, strict=True)]:
        assert tensor.grad is not None, label
        assert tensor.grad.isfinite().all(), label
        assert tensor.grad.abs().max() > 0, label


@every_mixer
def test_bf16_in_bf16_out_and_close_to_fp32(name: str) -> None:
    layout = TokenLayout(6, 5)
    mixer, inputs = make(name), [x.bfloat16() for x in qkv(layout)]
    exact = mixer(*(x.float() for x in inputs), layout)
    out = mixer.bfloat16()(*inputs, layout)
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).norm() < 0.02 * exact.norm()


@every_mixer
def test_deepcopy_and_state_dict_round_trip(name: str) -> None:
    layout = TokenLayout(3, 5)
    mixer, inputs = make(name), qkv(layout)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    expected = mixer(*inputs, layout)
    assert torch.equal(copy.deepcopy(mixer)(*inputs, layout), expected)
    buffer = io.BytesIO()
    torch.save(mixer.state_dict(), buffer)
    buffer.seek(0)
    fresh = make(name)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh(*inputs, layout), expected)
