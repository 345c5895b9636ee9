"""Hosts converted by interception: identity, text before the image, the grid, refusals of whatever is not one plain call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, FluxTransformer2DModel, Lumina2Transformer2DModel, WanTransformer3DModel
from torch import Tensor, nn

from lineate.calibrate import CalibrationConfig, calibrate
from lineate.calls import Call, listening
from lineate.convert import Conversion, convert, core_modules, preset, record
from lineate.families import UnsupportedModelError
from lineate.layout import LayoutError, TokenLayout

from ..tiny import softmax_twin

HEADS = {"num_attention_heads": 3, "num_layers": 2}
T5 = {"locality": "none"}


def flux() -> nn.Module:
    return FluxTransformer2DModel(
        in_channels=4, num_single_layers=2, attention_head_dim=8, joint_attention_dim=12, pooled_projection_dim=10,
        axes_dims_rope=(2, 2, 4), **HEADS,
    ).eval()  # fmt: skip


def lumina() -> nn.Module:
    return Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=24, num_refiner_layers=1, num_kv_heads=1, multiple_of=8,
        axes_dim_rope=(4, 2, 2), axes_lens=(20, 20, 20), cap_feat_dim=12, **HEADS,
    ).eval()  # fmt: skip


def wan() -> nn.Module:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), attention_head_dim=8, in_channels=4, out_channels=4, text_dim=12, freq_dim=16, ffn_dim=24,
        rope_max_seq_len=32, **HEADS,
    ).eval()  # fmt: skip


def run(
    model: nn.Module, height: int = 4, width: int = 6, *, frames: int = 1, text: int = 5, noise: int = 0, **also: Any
) -> Tensor:
    """Of height × width tokens."""
    generator = torch.Generator().manual_seed(height + noise)

    def draw(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator)

    if isinstance(model, FluxTransformer2DModel):
        places = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in (1, height, width)), indexing="ij"), dim=-1)
        said = {"img_ids": places.view(-1, 3), "txt_ids": torch.zeros(text, 3)} | also
        return model(draw(height * width, 4), draw(text, 12), draw(10), torch.tensor([0.3, 0.9]), **said).sample
    if isinstance(model, Lumina2Transformer2DModel):
        said = {"encoder_attention_mask": torch.ones(2, text, dtype=torch.int64)} | also
        return model(draw(4, 2 * height, 2 * width), torch.tensor([0.3, 0.9]), draw(text, 12), **said).sample
    return model(draw(4, frames, 2 * height, 2 * width), torch.tensor([3, 9]), draw(text, 12), **also).sample


hosts = pytest.mark.parametrize("make", [flux, lumina, wan])
Maker = Callable[[], nn.Module]


@hosts
def test_identity_conversion_is_bit_identical_in_outputs_and_gradients(make: Maker) -> None:
    twin = softmax_twin(make(), run)
    assert len(record(twin).sites) == (4 if make is flux else 2)


@hosts
def test_cores_learn_and_see_the_text_before_the_image(make: Maker) -> None:
    model = convert(make(), "sd35-t5-all")
    layouts: list[TokenLayout] = []
    for core in core_modules(model).values():
        core.register_forward_pre_hook(lambda module, args: layouts.append(args[3]))
    run(model, 4, 6).square().sum().backward()
    assert set(layouts) == {TokenLayout(4, 6, prefix=0 if make is wan else 5)}
    assert all(p.grad is not None for name, p in model.named_parameters() if ".core." in name)
    twin = copy.deepcopy(model)
    run(model, 6, 2)
    assert torch.equal(run(twin, 4, 6), run(model, 4, 6))


def test_a_video_has_no_convolutions() -> None:
    model = wan()
    twin = convert(copy.deepcopy(model), "softmax")
    assert torch.equal(run(twin, frames=3), run(model, frames=3))
    plain = convert(copy.deepcopy(model), preset("sd35-t5-all").model_copy(update=T5))
    assert run(plain, frames=3).isfinite().all()
    with pytest.raises(ValueError, match="3 frames are no grid for convolutions or windows"):
        run(convert(model, "sd35-t5-all"), frames=3)


def test_places_that_are_no_single_image_are_refused() -> None:
    with pytest.raises(LayoutError, match="img_ids has 24 places in 4 rows and 7 columns: not one image"):
        run(convert(flux(), "softmax"), img_ids=torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(6.0) * 1.2))


def test_prompts_of_different_lengths_would_need_a_mask() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with pytest.raises(ValueError, match="cannot honour attn_mask; prompts of one length need no mask"):
        run(convert(lumina(), "softmax"), encoder_attention_mask=mask)


def test_an_attention_that_never_asks_is_an_error() -> None:
    model = convert(wan(), "softmax")
    model.blocks[0].attn1.set_processor(lambda attention, hidden_states, *rest: hidden_states)
    with pytest.raises(RuntimeError, match="called scaled_dot_product_attention 0 times, not once"):
        run(model)


def test_first_block_caching_does_with_a_converted_transformer_as_with_its_host() -> None:
    """Of Flux: with SD3's last block, which gives no text, diffusers' cache cannot do."""
    model = flux()
    twin = convert(copy.deepcopy(model), "softmax")
    outs: list[Tensor] = []
    for m in (model, twin):
        outs.append(run(m))
        m.enable_cache(FirstBlockCacheConfig(threshold=1e9))
        with torch.no_grad(), m.cache_context("cond"):
            run(m)
            outs.append(run(m, 4, 6, noise=1))
    assert torch.equal(outs[1], outs[3]) and not torch.equal(outs[0], outs[1])


@hosts
def test_calibration_walks_the_blocks(make: Maker) -> None:
    model = convert(make(), "sd35-t5-all")
    calls: list[Call] = []
    with listening([model], calls.append):
        run(model)
    result = calibrate(model, calls, config=CalibrationConfig(steps=10, batch=2, pool=2))
    assert all(error.after < error.before for error in result.sites.values())


def test_cpe_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0\.attn1 cannot have locality 'cpe'"):
        convert(wan(), Conversion(locality="cpe"))


@hosts
def test_it_reloads_bit_for_bit(make: Maker, tmp_path: Path) -> None:
    model = convert(make(), "sd35-t5-all")
    model.save_pretrained(tmp_path)
    again = type(make()).from_pretrained(tmp_path)
    again.load_state_dict({name: tensor.clone() for name, tensor in again.state_dict().items()}, assign=True)
    assert torch.equal(run(again), run(model))
