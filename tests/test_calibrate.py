"""Calibration fits cores and nothing else, to the host's own attention, within a bounded pool, repeatably."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lineate import PRESETS, CalibrationConfig, Conversion, calibrate, convert
from lineate.calibrate import CalibrationError, _Calibration
from lineate.calls import Call
from lineate.convert import ConversionError, is_new
from lineate.core import Neighborhood
from lineate.evaluate import EvaluationError
from lineate.generation.classes import Sampling, denoiser, trajectory
from lineate.mixers.linear import LinearConfig, ProjQKConfig
from lineate.mixers.softmax import SoftmaxConfig
from lineate.mixers.ttt import TTTConfig

from .tiny import dit

QUICK = CalibrationConfig(steps=20, batch=2, pool=8)

LEARNING = {
    "t5": Conversion(),
    "t5-2layer": Conversion(mixer=TTTConfig(inner="2layer", loss="l2")),
    "dwc-v": Conversion(locality="dwc-v"),
    "cpe": Conversion(locality="cpe"),
    "plus": Conversion(neighborhood=Neighborhood(window=3)),
    "plus-learned": Conversion(neighborhood=Neighborhood(window=3, mix="learned")),
    "projqk": Conversion(mixer=ProjQKConfig(), locality="none"),
}


def host(tiny_vit, **changes: object) -> nn.Module:
    """A random ViT whose attention is far from uniform, so that there is something to fit."""
    model = tiny_vit(**changes)
    for name, parameter in model.named_parameters():
        if "qkv.weight" in name:
            nn.init.normal_(parameter, std=0.5)
    return model


def pictures(count: int = 8, size: tuple[int, int] = (32, 32)) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", LEARNING)
def test_every_site_comes_closer_to_the_host(tiny_vit, name: str) -> None:
    model = convert(host(tiny_vit), LEARNING[name])
    result = calibrate(model, pictures(), config=QUICK)
    assert list(result.sites) == ["blocks.0.attn", "blocks.1.attn"]
    assert all(error.after < error.before for error in result.sites.values())
    assert result.images == 8 and result.steps == 2 * QUICK.steps


@pytest.mark.parametrize("name", [name for name, conversion in PRESETS.items() if conversion.inherit == "all"])
def test_presets_with_new_parameters_come_closer_and_the_others_are_left_as_they_are(tiny_vit, name: str) -> None:
    model = convert(host(tiny_vit), name)
    before = copy.deepcopy(model.state_dict())
    result = calibrate(model, pictures(), config=QUICK)
    if any(is_new(key) for key in before):
        assert all(error.after < error.before for error in result.sites.values())
    else:
        assert all(error.after == error.before for error in result.sites.values())
        assert result.steps == 0
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_only_cores_change_and_every_flag_is_restored(tiny_vit) -> None:
    model = convert(host(tiny_vit), "t5")
    model.train()
    model.get_submodule("blocks.0.mlp").eval()
    model.get_parameter("head.weight").requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    calibrate(model, pictures(), config=QUICK)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != is_new(name), name
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_two_streams_are_the_two_models(tiny_vit) -> None:
    """The stream called host ends where the original ends, the converted one where the fitted model does."""
    original = host(tiny_vit, num_classes=0, global_pool="token", class_token=True)
    model = convert(copy.deepcopy(original), "t5")
    calibration = _Calibration(model, QUICK, None)
    images = pictures(6, (32, 48))
    with torch.no_grad():
        assert calibration.fill_pool([images]) == 6
    calibration.fit_sites()
    with torch.no_grad():
        for stream, expected in (("host", original), ("converted", model)):
            hidden = torch.cat([getattr(piece, stream)[0] for piece in calibration.pieces])
            torch.testing.assert_close(expected.norm(hidden), expected.forward_features(images))


def test_softmax_has_no_error_and_nothing_to_fit(tiny_vit) -> None:
    model = convert(host(tiny_vit), Conversion(mixer=SoftmaxConfig(), key_norm="none", locality="none"))
    result = calibrate(model, pictures(), config=QUICK)
    assert result.steps == 0
    assert all(error.before == error.after == 0 for error in result.sites.values())


def test_linear_attention_has_an_error_and_nothing_to_fit(tiny_vit) -> None:
    result = calibrate(convert(host(tiny_vit), Conversion(mixer=LinearConfig(), locality="none")), pictures(), config=QUICK)
    assert result.steps == 0
    assert all(error.before == error.after > 0 for error in result.sites.values())


def test_unconverted_blocks_pass_the_stream_on(tiny_vit) -> None:
    model = convert(host(tiny_vit), Conversion(sites=("blocks.1.attn",)))
    result = calibrate(model, pictures(), config=QUICK)
    assert list(result.sites) == ["blocks.1.attn"]
    assert result.sites["blocks.1.attn"].after < result.sites["blocks.1.attn"].before


def test_equal_seeds_give_equal_weights(tiny_vit) -> None:
    model = convert(host(tiny_vit), "t5")
    twin, other = copy.deepcopy(model), copy.deepcopy(model)
    for one, config in ((model, QUICK), (twin, QUICK), (other, QUICK.model_copy(update={"seed": 1}))):
        calibrate(one, pictures(), config=config)
    weights = [one.get_parameter("blocks.1.attn.core.mixer.w1") for one in (model, twin, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_pool_bounds_what_is_taken_from_an_endless_stream(tiny_vit) -> None:
    taken = []

    def endless() -> Iterator[Tensor]:
        while True:
            taken.append(1)
            yield torch.randn(3, 3, 32, 32)

    result = calibrate(convert(host(tiny_vit), "t5"), endless(), config=QUICK)
    assert result.images == QUICK.pool
    assert len(taken) == 3  # 3 + 3 + 2 of the third batch


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11])
def test_any_number_of_steps_will_do(tiny_vit, steps: int) -> None:
    config = QUICK.model_copy(update={"steps": steps})
    assert calibrate(convert(host(tiny_vit), "t5"), pictures(), config=config).steps == 2 * steps


def test_how_the_images_arrive_does_not_matter(tiny_vit) -> None:
    model = convert(host(tiny_vit), "t5")
    twin = copy.deepcopy(model)
    calibrate(model, pictures(), config=QUICK)
    calibrate(twin, list(pictures()), config=QUICK)
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("name", ["t5", "cpe", "plus"])
def test_pictures_of_several_shapes_share_a_pool(tiny_vit, name: str) -> None:
    model = convert(host(tiny_vit), LEARNING[name])
    result = calibrate(model, [pictures(4), pictures(2, (32, 56)), pictures(1, (56, 32))[0], pictures(1)], config=QUICK)
    assert result.images == 8
    assert all(error.after < error.before for error in result.sites.values())


def test_progress_counts_every_step_once(tiny_vit) -> None:
    calls: list[tuple[int, int, str]] = []
    calibrate(convert(host(tiny_vit), "t5"), pictures(), config=QUICK, progress=lambda *call: calls.append(call))
    assert [done for done, _, _ in calls] == list(range(1, 41))
    assert {total for _, total, _ in calls} == {40}
    assert [what for _, _, what in calls] == ["blocks.0.attn"] * 20 + ["blocks.1.attn"] * 20


def test_divergence_names_the_site_and_leaves_its_core_as_it_was(tiny_vit) -> None:
    model = convert(host(tiny_vit), "t5")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CalibrationError, match=r"blocks\.0\.attn.*became"):
        calibrate(model, pictures(), config=QUICK.model_copy(update={"lr": 1e30}))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_interruption_leaves_a_valid_model(tiny_vit) -> None:
    def interrupt(done: int, total: int, what: str) -> None:
        if done == 25:
            raise KeyboardInterrupt

    model = convert(host(tiny_vit), "t5")
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, pictures(), config=QUICK, progress=interrupt)
    assert model(pictures(1)).isfinite().all()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_refusals(tiny_vit) -> None:
    with pytest.raises(ConversionError, match="not converted"):
        calibrate(host(tiny_vit), pictures())
    with pytest.raises(CalibrationError, match=r"bfloat16; calibrate it in torch\.float32"):
        calibrate(convert(host(tiny_vit).bfloat16(), "t5"), pictures())
    with pytest.raises(EvaluationError, match="no images"):
        calibrate(convert(host(tiny_vit), "t5"), [])


def test_attentions_that_were_drawn_anew_are_no_teacher(tiny_vit) -> None:
    """Their answers are noise; weights drawn anew beside an attention that was kept are none of its business."""
    for conversion in ("lit", Conversion(inherit="mlp")):
        model = convert(host(tiny_vit), conversion)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(
            CalibrationError, match=r"inherit='mlp' drew blocks\.0\.attn\.qkv\.weight and 7 other tensors of attent"
        ):
            calibrate(model, pictures(), config=QUICK)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert calibrate(convert(host(tiny_vit), Conversion(inherit="attention")), pictures(), config=QUICK).images == 8


@pytest.mark.parametrize("name", ["dit5", "hyena-y", "cpe"])
def test_a_denoiser_is_fitted_along_its_own_sampling(name: str) -> None:
    """Every site comes closer on what the host was asked while it sampled, at times of the schedule."""
    sampled = denoiser(dit())
    examples = trajectory(sampled, Sampling(scheduler="ddim", steps=10, guidance=2), 12, batch=2)
    assert len(examples) == 12 and all(len(call) == 1 for call in examples)
    x, t, y = zip(*(call.args for call in examples), strict=True)
    assert {part.shape for part in x} == {(1, 3, 8, 6)}
    assert {int(time) for time in t} <= set(range(99, 1000, 100)) and len({int(time) for time in t}) > 3
    assert 5 in {int(label) for label in y} and {int(label) for label in y} != {5}  # guidance asks for no class as well
    model = convert(sampled.model, LEARNING.get(name, name))
    result = calibrate(model, examples, config=QUICK)
    assert result.images == 8 and len(result.sites) == 2
    assert all(error.after < error.before for error in result.sites.values())


def test_every_diffusers_denoiser_can_be_fitted() -> None:
    """Blocks called by name and with conditions beside; calls of several examples are taken apart."""
    from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel

    size = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "num_layers": 2,
        "sample_size": 8,
        "patch_size": 2,
    }
    torch.manual_seed(0)
    x, t = torch.randn(6, 4, 8, 8), torch.arange(6) * 100
    dit_calls = [Call((x, t, torch.arange(6) % 3))]
    text = {
        "encoder_hidden_states": torch.randn(6, 5, 12),
        "timestep": t,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    pixart = PixArtTransformer2DModel(
        **size, out_channels=8, cross_attention_dim=16, caption_channels=12, use_additional_conditions=False
    )
    for model, calls in ((DiTTransformer2DModel(**size, num_embeds_ada_norm=3), dit_calls), (pixart, [Call((x,), text)])):
        fitted = convert(model.eval(), "dit5")
        result = calibrate(fitted, calls, config=QUICK)
        assert result.images == 6 and len(result.sites) == 2
        assert all(error.after < error.before for error in result.sites.values())


def test_on_the_hosts_stream_each_site_is_fitted_alone(tiny_vit) -> None:
    """Grafting's first stage: what the second site learns does not depend on the first, and the error may be absolute."""
    original, fitted = host(tiny_vit), []
    for skew in (0.0, 1.0):
        model = convert(copy.deepcopy(original), "t5-2layer")
        with torch.no_grad():
            model.get_submodule("blocks.0.attn.core").q_conv.bias += skew
        config = QUICK.model_copy(update={"stream": "host", "loss": "l1"})
        result = calibrate(model, pictures(), config=config)
        assert all(error.after < error.before for error in result.sites.values())
        fitted.append(model.state_dict())
    same = [name for name in fitted[0] if torch.equal(fitted[0][name], fitted[1][name])]
    assert any("blocks.1.attn.core" in name for name in same) and not any("blocks.0.attn.core" in name for name in same)


def test_a_regression_of_one_converted_block_equals_the_streams_meeting_there(tiny_vit) -> None:
    """With one site the two streams are the same up to it."""
    original, results = host(tiny_vit), []
    for stream in ("converted", "host"):
        model = convert(copy.deepcopy(original), Conversion(sites=("blocks.1.attn",)))
        calibrate(model, pictures(), config=QUICK.model_copy(update={"stream": stream}))
        results.append(model.state_dict())
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())
