"""diffusers' DiT and PixArt as hosts: identity, reloading, the text attention left alone, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn

from lineate.checkpoint import load, save
from lineate.convert import Conversion, convert, core_modules, record
from lineate.families import UnsupportedModelError, detect
from lineate.families.base import Attended

from ..tiny import softmax_twin

SMALL = {
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "in_channels": 3,
    "out_channels": 6,
    "num_layers": 2,
    "sample_size": 8,
}
Maker = Callable[[], nn.Module]


def dit() -> nn.Module:
    return DiTTransformer2DModel(**SMALL, num_embeds_ada_norm=5).eval()


def pixart() -> nn.Module:
    return PixArtTransformer2DModel(**SMALL, cross_attention_dim=24, caption_channels=10).eval()


def sigma() -> nn.Module:
    """PixArt-Σ: positions at half the distance, and no conditions on the picture's size, at any size."""
    changes = {"interpolation_scale": 2, "use_additional_conditions": False}
    return PixArtTransformer2DModel(**SMALL, **changes, cross_attention_dim=24, caption_channels=10).eval()


def run(model: nn.Module, height: int = 8, width: int = 8, **also: Any) -> Tensor:
    generator = torch.Generator().manual_seed(height)
    latents = torch.randn(2, 3, height, width, generator=generator)
    if isinstance(model, DiTTransformer2DModel):
        return model(latents, timestep=torch.tensor([3, 977]), class_labels=torch.tensor([4, 5]), **also).sample
    text = torch.randn(2, 7, 10, generator=generator)
    return model(latents, encoder_hidden_states=text, timestep=torch.tensor([3, 977]), **also).sample


hosts = pytest.mark.parametrize("make", [dit, pixart, sigma])


@hosts
def test_identity_conversion_is_bit_identical_in_outputs_and_gradients(make: Maker) -> None:
    softmax_twin(make(), run)


@hosts
def test_every_self_attention_is_replaced_and_all_else_inherited(make: Maker) -> None:
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    convert(model, "dit5")
    assert list(core_modules(model)) == ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    kept = [isinstance(block.attn2, Attention) for block in model.transformer_blocks]
    assert all(kept) == isinstance(model, PixArtTransformer2DModel)
    run(model).square().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".core." in name)


@hosts
def test_inheriting_the_mlps_alone_keeps_the_feed_forward_layers(make: Maker) -> None:
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    convert(model, Conversion(inherit="mlp"))
    after, block = model.state_dict(), "transformer_blocks.0."
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith(f"{block}ff."))
    drawn = f"{block}attn1.to_q.weight"
    assert drawn in record(model).names("new") and not torch.equal(after[drawn], before[drawn])


def test_any_grid_where_the_host_takes_it() -> None:
    model = convert(pixart(), "dit5")
    assert run(model, 4, 12).shape == (2, 6, 4, 12)
    assert run(convert(dit(), "dit5"), 12, 12).shape == (2, 6, 12, 12)


@hosts
@pytest.mark.parametrize("delta", [False, True])
def test_save_and_load(make: Maker, delta: bool, tmp_path: Path) -> None:
    original = make()
    model = convert(copy.deepcopy(original), "dit5").eval()
    save(model, tmp_path / "saved", delta=delta)
    again = load(tmp_path / "saved", base=copy.deepcopy(original) if delta else None)
    assert torch.equal(run(again), run(model))
    assert record(again) == record(model)


@hosts
def test_checkpointed_gradients_equal_plain_ones_with_two_grids_under_way(make: Maker) -> None:
    model = convert(make(), "dit5").train()
    for block in model.transformer_blocks:
        block.norm1.training = False  # labels are not dropped at random
        for module in block.norm1.modules():
            module.training = False
    gradients = []
    for enable in (False, True):
        (model.enable_gradient_checkpointing if enable else model.disable_gradient_checkpointing)()
        loss = torch.stack([run(model, side, side).square().sum() for side in (8, 12)]).sum()
        gradients.append(torch.autograd.grad(loss, tuple(model.parameters()), allow_unused=True))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None)


@hosts
def test_what_passes_at_a_site_can_be_watched_on_host_and_converted_model_alike(make: Maker) -> None:
    model, site = make(), "transformer_blocks.1.attn1"
    seen: list[tuple[str, Attended]] = []
    for m in (model, convert(copy.deepcopy(model), "softmax")):
        with detect(m).watch(m, [site], lambda name, attended: seen.append((name, attended))):
            run(m)
    (name, host), (_, ours) = seen
    assert name == site
    assert host.q.shape == (2, 3, 16, 8)
    assert all(torch.equal(getattr(host, x), getattr(ours, x)) for x in ("q", "k", "v", "out"))


def test_a_mask_is_refused_when_it_arrives() -> None:
    with pytest.raises(ValueError, match="cannot honour attention_mask; call"):
        run(convert(pixart(), "softmax"), attention_mask=torch.ones(2, 16))


def test_fused_projections_are_refused_before_and_after_conversion() -> None:
    model = pixart()
    model.requires_grad_(False).fuse_qkv_projections()
    with pytest.raises(UnsupportedModelError, match=r"transformer_blocks\.0\.attn1 cannot .* projections were fused; load"):
        convert(model, "dit5")
    converted = convert(pixart(), "dit5").requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match=r"cannot fuse_qkv_projections\(\): it would change some"):
        converted.fuse_qkv_projections()


def test_setting_processors_keeps_the_cores() -> None:
    model = convert(pixart(), "dit5")
    before = run(model)
    model.set_attn_processor(AttnProcessor())
    torch.testing.assert_close(run(model), before)
    assert len(core_modules(model)) == 2


def test_attentions_with_more_in_them_are_refused_by_name() -> None:
    model = dit()
    model.transformer_blocks[1].attn1 = Attention(24, heads=3, dim_head=8, added_kv_proj_dim=24)
    with pytest.raises(UnsupportedModelError, match=r"transformer_blocks\.1\.attn1 cannot be converted: it has add_k_proj"):
        convert(model, "t5")
    assert convert(model, Conversion(sites=("transformer_blocks.0.*",))) is model


@hosts
def test_what_is_asked_about_pictures_is_refused(make: Maker) -> None:
    model = make()
    for ask in (detect(model).runner, lambda m: detect(m).features(m, torch.zeros(1, 3, 8, 8))):
        with pytest.raises(UnsupportedModelError, match="is a denoiser: it takes latents"):
            ask(model)
