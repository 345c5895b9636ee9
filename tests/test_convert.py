"""What convert does, what it records, and how it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from timm.models import VisionTransformer
from torch import Tensor, nn

from lineate.checkpoint import CheckpointError, load, save
from lineate.convert import (
    PRESETS,
    Conversion,
    ConversionError,
    ConversionRecord,
    TensorRecord,
    convert,
    core_modules,
    is_new,
    preset,
    record,
)
from lineate.core import CoreAttention, Neighborhood
from lineate.mixers.linear import LiTConfig
from lineate.mixers.ttt import TTTConfig

Maker = Callable[..., VisionTransformer]
every_preset = pytest.mark.parametrize("name", PRESETS)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# What it does --------------------------------------------------------------------------------------------------------------


@every_preset
def test_every_preset_converts_in_place_and_calls_by_name_and_by_value_agree(name: str, tiny_vit: Maker) -> None:
    model = tiny_vit()
    twin = copy.deepcopy(model)
    assert convert(model, name) is model
    convert(twin, preset(name))
    assert equal(tensors(model), tensors(twin))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), twin(x))
    assert model(x).isfinite().all()


def test_globs_choose_the_sites(tiny_vit: Maker) -> None:
    model = convert(tiny_vit(depth=12), Conversion(sites=("blocks.1?.attn", "blocks.[0-2].*")))
    chosen = ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn", "blocks.10.attn", "blocks.11.attn"]
    assert list(core_modules(model)) == list(record(model).sites) == chosen
    assert all(isinstance(module, CoreAttention) for module in core_modules(model).values())


def test_the_same_seed_gives_the_same_new_weights_and_another_gives_others(tiny_vit: Maker) -> None:
    host = tiny_vit()
    states = []
    for seed, noise in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(noise)
        model = convert(copy.deepcopy(host), Conversion(seed=seed))
        states.append({name: t for name, t in tensors(model).items() if is_new(name)})
    assert equal(states[0], states[1])
    assert not any(torch.equal(states[0][name], states[2][name]) for name in states[0])


@pytest.mark.parametrize("inherit", ["all", "attention", "mlp"])
def test_the_global_random_state_is_not_touched(inherit: str, tiny_vit: Maker) -> None:
    model = tiny_vit()
    before = torch.get_rng_state()
    convert(model, Conversion(inherit=inherit))
    assert torch.equal(torch.get_rng_state(), before)


def test_new_weights_follow_the_hosts_device_type_and_mode(tiny_vit: Maker) -> None:
    for training in (True, False):
        model = convert(tiny_vit().double().train(training), "t5-plus")
        assert {p.dtype for p in model.parameters()} == {torch.float64}
        assert {m.training for m in model.modules() if not list(m.children())} == {training}
        assert model(torch.randn(1, 3, 32, 32, dtype=torch.float64)).dtype == torch.float64


# What it records -----------------------------------------------------------------------------------------------------------


@every_preset
def test_the_record_names_every_tensor_once_in_order(name: str, tiny_vit: Maker) -> None:
    host = tiny_vit(reg_tokens=2)
    original = tensors(host)
    done = record(convert(host, name))
    assert [(t.name, t.shape) for t in done.tensors] == [(key, tuple(t.shape)) for key, t in host.state_dict().items()]
    redrawn = [key for key in original if PRESETS[name].inherit == "mlp" and fnmatchcase(key, "blocks.*") and ".mlp." not in key]
    assert done.names("inherited") == tuple(key for key in original if key not in redrawn)
    assert done.names("new") == tuple(key for key in host.state_dict() if ".core." in key or key in redrawn)
    assert done.count("new") == sum(p.numel() for p in host.parameters()) - done.count("inherited")
    assert done.count("inherited") == sum(t.numel() for key, t in original.items() if key not in redrawn)
    assert done.conversion == PRESETS[name]
    assert done.family == "timm"
    assert done.sites == ("blocks.0.attn", "blocks.1.attn")


@pytest.mark.parametrize(("inherit", "kept"), [("attention", "blocks.?.attn.*"), ("mlp", "blocks.?.mlp.*")])
def test_what_is_not_inherited_is_drawn_anew_and_recorded_as_new(inherit: str, kept: str, tiny_vit: Maker) -> None:
    model = tiny_vit(init_values=0.1)
    with torch.no_grad():  # so that no tensor is at its start value by itself
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    original = tensors(model)
    done = record(convert(model, Conversion(inherit=inherit)))
    state = model.state_dict()
    for name, before in original.items():
        inherited = not name.startswith("blocks.") or fnmatchcase(name, kept)
        assert torch.equal(state[name], before) == inherited, name
        assert (name in done.names("inherited")) == inherited, name
        assert (name in done.names("new")) == (not inherited), name


def test_only_converted_blocks_are_drawn_anew(tiny_vit: Maker) -> None:
    model = tiny_vit()
    original = tensors(model)
    convert(model, Conversion(sites=("blocks.1.attn",), inherit="attention"))
    changed = {name.split(".")[1] for name, before in original.items() if not torch.equal(model.state_dict()[name], before)}
    assert changed == {"1"}


def test_interpolated_and_dropped_tensors_are_passed_on(tiny_vit: Maker) -> None:
    lost = TensorRecord(name="head_dist.weight", shape=(5, 24), status="dropped")
    done = record(convert(tiny_vit(), "t5", interpolated=("pos_embed",), dropped=(lost,)))
    assert done.names("interpolated") == ("pos_embed",)
    assert done.names("dropped") == ("head_dist.weight",)
    assert done.count("dropped") == 120


def test_a_head_for_other_classes_is_new_to_whoever_reads_the_record(tiny_vit: Maker, tmp_path: Path) -> None:
    model = tiny_vit()
    model.reset_classifier(7)
    done = record(convert(model, "t5", redrawn=("head.weight", "head.bias")))
    assert [name for name in done.names("new") if not is_new(name)] == ["head.weight", "head.bias"]
    loaded = load(save(model, tmp_path / "model"))
    assert record(loaded) == done
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(CheckpointError, match=r"head\.weight, head\.bias drawn anew"):
        save(model, tmp_path / "delta", delta=True)


def test_a_dropped_class_token_is_recorded_beside_what_was_dropped_before(tiny_vit: Maker) -> None:
    lost = TensorRecord(name="norm_pre.weight", shape=(24,), status="dropped")
    done = record(convert(tiny_vit(), Conversion(class_token="drop"), dropped=(lost,)))
    assert done.names("dropped") == ("norm_pre.weight", "cls_token", "pos_embed[:, :1]")
    assert done.count("dropped") == 3 * 24
    assert [t.shape for t in done.tensors if t.name == "pos_embed"] == [(1, 16, 24)]


@every_preset
def test_conversion_and_record_survive_json(name: str, tiny_vit: Maker) -> None:
    assert Conversion.model_validate_json(PRESETS[name].model_dump_json()) == PRESETS[name]
    done = record(convert(tiny_vit(), name))
    assert ConversionRecord.model_validate_json(done.model_dump_json()) == done


def test_the_record_rebuilds_the_converted_model(tiny_vit: Maker) -> None:
    """Description, conversion and state dict are enough: this is what loading does."""
    from lineate.families import family

    model = convert(tiny_vit(reg_tokens=1, qk_norm=True), "t5-plus")
    done = ConversionRecord.model_validate_json(record(model).model_dump_json())
    assert done.host is not None
    twin = convert(family(done.family).build(done.host), done.conversion).eval()
    twin.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(2, 3, 16, 48)
    assert torch.equal(twin(x), model(x))


# How it refuses ------------------------------------------------------------------------------------------------------------


def test_an_unknown_preset_is_answered_with_the_choices(tiny_vit: Maker) -> None:
    with pytest.raises(ConversionError, match=f"unknown preset 't6'; choices: {', '.join(PRESETS)}"):
        convert(tiny_vit(), "t6")


def test_a_glob_without_a_match_is_answered_with_the_sites(tiny_vit: Maker) -> None:
    model = tiny_vit()
    before = repr(model)
    with pytest.raises(ConversionError, match=r"'layer\.\*'; sites: blocks\.0\.attn, blocks\.1\.attn"):
        convert(model, Conversion(sites=("blocks.0.*", "layer.*")))
    assert repr(model) == before


@pytest.mark.parametrize("inherit", ["all", "mlp"])
def test_heads_that_do_not_divide_the_channels_are_refused_before_anything_changes(inherit: str, tiny_vit: Maker) -> None:
    model = tiny_vit()
    before, shown = tensors(model), repr(model)
    with pytest.raises(ConversionError, match=r"blocks\.0\.attn: lit cannot share 24 channels among 5 heads; choices: 1, 2,"):
        convert(model, Conversion(mixer=LiTConfig(heads=5), inherit=inherit))
    assert equal(tensors(model), before) and repr(model) == shown
    assert not model.patch_embed.proj._forward_hooks


def test_a_converted_model_is_not_converted_again(tiny_vit: Maker) -> None:
    model = convert(tiny_vit(), "t5")
    before, done = tensors(model), record(model)
    with pytest.raises(ConversionError, match="VisionTransformer is already converted"):
        convert(model, "linear")
    assert equal(tensors(model), before)
    assert record(model) is done


def test_a_model_that_was_not_converted_has_no_record(tiny_vit: Maker) -> None:
    with pytest.raises(ConversionError, match=r"VisionTransformer is not converted; call lineate\.convert"):
        record(tiny_vit())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mixr", {"name": "ttt"}),
        ("mixer", {"name": "ttt", "inner": "4layer"}),
        ("mixer", {"name": "ttt", "start_std": -1.0}),
        ("key_norm_eps", 0.0),
        ("locality", "dwc"),
        ("neighborhood", {"window": 4}),
        ("inherit", "none"),
        ("class_token", "average"),
        ("seed", "many"),
    ],
)
def test_unknown_fields_and_values_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=field):
        Conversion.model_validate({field: value})


def test_a_conversion_cannot_be_changed_after_it_was_made() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        PRESETS["t5"].seed = 1


# The paper's counts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conversion", "millions"),
    [
        (Conversion(locality="none"), 0.442),
        (Conversion(mixer=TTTConfig(inner="3layer"), locality="none"), 0.442),
        (Conversion(mixer=TTTConfig(inner="2layer"), locality="none"), 0.295),
        (Conversion(mixer=TTTConfig(inner="1layer-gate"), locality="none"), 0.295),
        (PRESETS["t5"], 0.488),
        (Conversion(neighborhood=Neighborhood(window=5)), 0.488),
        (PRESETS["projqk"], 0.295),
        (PRESETS["linear"], 0.0),
    ],
    ids=["swiglu", "3layer", "2layer", "1layer-gate", "t5", "t5-plus", "projqk", "linear"],
)
def test_new_parameters_of_deit_tiny_are_the_papers(conversion: Conversion, millions: float) -> None:
    """DeiT-T: 12 blocks, 3 heads of 64 channels (../shared/baselines.md: 5.717M -> 6.159M -> 6.205M)."""
    sites = [CoreAttention(conversion.core(), heads=3, head_dim=64) for _ in range(12)]
    assert round(sum(p.numel() for site in sites for p in site.parameters()) / 1e6, 3) == millions
