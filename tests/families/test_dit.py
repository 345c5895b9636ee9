"""This project's DiT as a host: identity, reloading, grids under way, and what a denoiser refuses."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lineate.checkpoint import load, original_of, save
from lineate.convert import PRESETS, convert, core_modules, record
from lineate.families import UnsupportedModelError, detect
from lineate.families.base import Attended

from ..tiny import dit as tiny


def inputs(height: int = 8, width: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(height)
    return torch.randn(2, 3, height, width, generator=generator), torch.tensor([3, 977]), torch.tensor([4, 5])


def test_identity_conversion_is_bit_identical_in_outputs_and_gradients() -> None:
    model = tiny()
    twin = convert(copy.deepcopy(model), "softmax")
    for grid in ((8, 6), (4, 12)):
        assert torch.equal(twin(*inputs(*grid)), model(*inputs(*grid)))
    gradients = [torch.autograd.grad(m(*inputs()).square().sum(), tuple(m.parameters())) for m in (model, twin)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert twin.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("preset", ["dit5", "dit5-nonat", "t5"])
def test_every_attention_is_replaced_and_all_else_inherited(preset: str) -> None:
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    convert(model, preset)
    assert list(core_modules(model)) == ["blocks.0.attn", "blocks.1.attn"]
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert record(model).names("inherited") == tuple(name for name in after if name in before)
    out = model(*inputs(4, 12))
    assert out.shape == (2, 6, 4, 12) and out.isfinite().all()
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("delta", [False, True])
def test_save_and_load(delta: bool, tmp_path: Path) -> None:
    original = tiny()
    model = convert(copy.deepcopy(original), "dit5").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".core." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    save(model, tmp_path / "saved", delta=delta)
    again = load(tmp_path / "saved", base=copy.deepcopy(original) if delta else None)
    assert torch.equal(again(*inputs()), model(*inputs()))
    assert torch.equal(original_of(model)(*inputs()), original(*inputs()))


def test_checkpointed_gradients_equal_plain_ones_with_two_grids_under_way() -> None:
    model = convert(tiny(), "dit5")
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        outputs = [model(*inputs(*grid)) for grid in ((8, 6), (4, 12))]
        loss = torch.stack([out.square().sum() for out in outputs]).sum()
        gradients.append(torch.autograd.grad(loss, tuple(model.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_what_passes_at_a_site_can_be_watched_on_host_and_converted_model_alike() -> None:
    model, seen = tiny(), []

    def note(site: str, attended: Attended) -> None:
        seen.append((site, attended))

    for m in (model, convert(copy.deepcopy(model), "softmax")):
        with detect(m).watch(m, ["blocks.1.attn"], note):
            m(*inputs())
    (site, host), (_, ours) = seen
    assert site == "blocks.1.attn"
    assert host.q.shape == (2, 3, 12, 8)
    assert all(torch.equal(getattr(host, x), getattr(ours, x)) for x in ("q", "k", "v", "out"))


def test_inheriting_the_attention_alone_draws_the_modulation_anew_at_its_zero_start() -> None:
    model = convert(tiny(), "dit5")
    assert model.blocks[0].adaLN_modulation[1].weight.any()
    redrawn = convert(tiny(), PRESETS["dit5"].model_copy(update={"inherit": "attention"}))
    assert not redrawn.blocks[0].adaLN_modulation[1].weight.any()
    assert "blocks.0.mlp.fc1.weight" in record(redrawn).names("new")
    assert "blocks.0.attn.qkv.weight" in record(redrawn).names("inherited")


def test_what_is_asked_about_pictures_is_refused() -> None:
    model = tiny()
    with pytest.raises(UnsupportedModelError, match="DiT is a denoiser"):
        detect(model).features(model, torch.zeros(1, 3, 8, 8))


def test_a_step_can_be_run_on_latents_alone() -> None:
    model = tiny()
    family = detect(model)
    latents = torch.randn(2, family.geometry(model).channels, 8, 12)
    assert family.runner(model)(latents).shape[-2:] == (8, 12)


def test_an_attention_that_is_not_timms_is_refused_by_name() -> None:
    model = tiny()
    model.blocks[1].attn = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1\.attn cannot be converted: its attention is Identity"):
        convert(model, "t5")
