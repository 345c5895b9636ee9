"""transformers' vision towers: identity, refusals, and all that torch and transformers do to a model around its forward pass."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from lineate.analysis import implicit_attention, key_shift
from lineate.calibrate import CalibrationConfig, _Calibration, calibrate
from lineate.checkpoint import load, original_of, save
from lineate.convert import Conversion, convert, core_modules, preset, record
from lineate.evaluate import EvaluationError
from lineate.evaluate.cost import check_sizes, cost
from lineate.evaluate.fidelity import fidelity
from lineate.families import UnsupportedModelError, detect
from lineate.families.hf_types import HOLDERS, TOWERS, host_type

from ..tiny import PLAIN, TEXT, VISION, gradients

BOTH = {"vision_config": PLAIN, "text_config": TEXT}

# name -> (model class, config class, settings)
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTModel", "ViTConfig", PLAIN),
    "vit-classifier": ("ViTForImageClassification", "ViTConfig", PLAIN | {"num_labels": 5}),
    "deit-distilled": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", PLAIN | {"num_labels": 5}),
    "dinov2": ("Dinov2Model", "Dinov2Config", VISION),
    "dinov2-classifier": ("Dinov2ForImageClassification", "Dinov2Config", VISION | {"num_labels": 5, "use_swiglu_ffn": True}),
    "dinov2-registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", VISION),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", PLAIN | {"num_register_tokens": 4}),
    "siglip-tower": ("SiglipVisionModel", "SiglipVisionConfig", PLAIN),
    "siglip-classifier": ("SiglipForImageClassification", "SiglipConfig", BOTH | {"num_labels": 5}),
    "siglip": ("SiglipModel", "SiglipConfig", BOTH),
    "clip-tower": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", PLAIN),
    "clip-classifier": ("CLIPForImageClassification", "CLIPConfig", BOTH | {"num_labels": 5}),
    "clip": ("CLIPModel", "CLIPConfig", BOTH),
}
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
PREFIX = {"vit": 1, "deit": 2, "dinov2": 1, "dinov2-registers": 5, "dinov3": 5, "siglip": 0, "clip": 1}


def make(name: str, attention: str = "sdpa", **changes: Any) -> Any:
    """The architecture in eval mode, every parameter moved off its start so that nothing is trivially zero."""
    model, config, settings = ARCHITECTURES[name]
    host = getattr(transformers, model)(getattr(transformers, config)(**settings | changes, attn_implementation=attention)).eval()
    with torch.no_grad():
        for parameter in host.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return host


def pictures(height: int = 32, width: int = 32, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width)


def run(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Every tensor that the model gives for pictures."""
    return [x for x in detect(model).runner(model)(images).to_tuple() if isinstance(x, Tensor)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Identity ------------------------------------------------------------------------------------------------------------------


@every_architecture
def test_softmax_conversion_is_the_host_bit_for_bit(name: str) -> None:
    model = make(name)
    keys, images = list(model.state_dict()), [pictures(), pictures(16, 56)]
    expected = [run(model, x) for x in images]
    sum(x.square().sum() for x in run(model, images[0])).backward()
    slopes = gradients(model)
    assert convert(model, "softmax") is model
    assert all(same(run(model, x), y) for x, y in zip(images, expected, strict=True))
    sum(x.square().sum() for x in run(model, images[0])).backward()
    found = gradients(model)
    assert found.keys() == slopes.keys() and all(torch.equal(found[key], slopes[key]) for key in slopes)
    assert list(model.state_dict()) == keys
    assert len(core_modules(model)) == 2
    assert next(prefix for key, prefix in reversed(PREFIX.items()) if name.startswith(key)) == tracker(model).prefix


def tracker(model: nn.Module) -> Any:
    return model.get_submodule(record(model).sites[0]).tracker


@pytest.mark.parametrize("name", ["vit", "dinov3", "siglip-tower"])
def test_softmax_conversion_of_an_eager_host_differs_by_rounding_alone(name: str) -> None:
    model, x = make(name, "eager"), pictures()
    expected = run(model, x)
    for found, wanted in zip(run(convert(model, "softmax"), x), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@every_architecture
def test_t5_plus_keeps_every_host_tensor_and_adds_only_cores(name: str) -> None:
    model, x = make(name), pictures(16, 56)
    original, before = {key: tensor.clone() for key, tensor in model.state_dict().items()}, run(model, x)
    after = run(convert(model, "t5-plus"), x)
    assert all(a.isfinite().all() and a.shape == b.shape and not torch.allclose(a, b) for a, b in zip(after, before, strict=True))
    state = model.state_dict()
    assert [key for key in state if ".core." not in key] == list(original)
    assert all(torch.equal(state[key], tensor) for key, tensor in original.items())


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_the_text_tower_is_left_alone(name: str) -> None:
    model, x = make(name), pictures()
    words = torch.randint(3, 99, (2, 7))
    asked = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    text, image = model.get_text_features(**asked), model.get_image_features(x)
    convert(model, "t5-plus")
    assert torch.equal(model.get_text_features(**asked).pooler_output, text.pooler_output)
    assert not torch.allclose(model.get_image_features(x).pooler_output, image.pooler_output)
    assert all(site.startswith("vision_model.") for site in record(model).sites)
    assert model(input_ids=words, pixel_values=x).logits_per_image.isfinite().all()


def test_unconverted_sites_keep_their_implementation_and_converted_ones_cannot_be_taken_back() -> None:
    model, x = make("dinov2", "eager"), pictures()
    first, second = (site.name for site in detect(model).sites(model))
    asked: list[str] = []
    convert(model, Conversion(sites=(second,)))
    eager, converted = model.get_submodule(first), model.get_submodule(second)
    assert (eager.config._attn_implementation, converted.config._attn_implementation) == ("eager", "lineate")
    handle = converted.core.register_forward_hook(lambda *_: asked.append("core"))
    before = run(model, x)
    model.set_attn_implementation("sdpa")
    for found, wanted in zip(run(model, x), before, strict=True):
        torch.testing.assert_close(found, wanted)
    handle.remove()
    assert asked == ["core", "core"]


def test_a_config_that_two_models_share_is_changed_for_neither() -> None:
    config = transformers.Dinov2Config(**VISION)
    one, other = transformers.Dinov2Model(config).eval(), transformers.Dinov2Model(config).eval()
    before = run(other, x := pictures())
    convert(one, "t5")
    assert same(run(other, x), before)
    assert (config.model_type, config._attn_implementation, one.config.model_type) == ("dinov2", "sdpa", "lineate_dinov2")


# Refusals ------------------------------------------------------------------------------------------------------------------


def test_attention_dropout_is_refused_by_site_and_nothing_is_changed() -> None:
    model = make("dinov2", attention_probs_dropout_prob=0.1)
    before, hooks = repr(model), sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    with pytest.raises(
        UnsupportedModelError, match=r"^encoder\.layer\.0\.attention\S* cannot be converted: it drops .*dropout 0\.1"
    ):
        convert(model, "t5")
    assert repr(model) == before and model.config.model_type == "dinov2"
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert all(not module.training for module in model.modules())


@pytest.mark.parametrize(
    ("model", "settings", "reason"),
    [
        ("Beit", PLAIN | {"use_relative_position_bias": True}, "relative-position bias"),
        ("Swin", {"embed_dim": 24, "depths": [1], "num_heads": [3], "image_size": 32, "window_size": 2}, "inside windows"),
        ("VideoMAE", PLAIN | {"num_frames": 2}, "'videomae' is not one of transformers' model types"),
    ],
)
def test_unsupported_models_name_the_reason(model: str, settings: dict[str, Any], reason: str) -> None:
    host = getattr(transformers, f"{model}Model")(getattr(transformers, f"{model}Config")(**settings))
    with pytest.raises(UnsupportedModelError, match=reason):
        convert(host, "t5")


def test_what_only_softmax_could_honour_is_refused_at_run_time() -> None:
    model, x = convert(make("vit"), "t5"), pictures()
    with pytest.raises(ValueError, match="no attention weights"):
        model(x, output_attentions=True)
    with pytest.raises(ValueError, match="no attention weights"):
        convert(make("clip"), "t5").get_image_features(x, output_attentions=True)
    with pytest.raises(ValueError, match="cannot honour a mask"):
        attention = model.get_submodule(record(model).sites[0])
        attention(torch.randn(2, 17, 24), torch.zeros(2, 1, 17, 17))
    with pytest.raises(ValueError, match="it was not converted"):
        host = make("vit")
        host.set_attn_implementation("lineate")
        host(x)


# Around the forward pass ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov3", "siglip-tower"])
def test_gradient_checkpointing_keeps_two_grids_apart_and_reentrant_is_refused(name: str) -> None:
    model = convert(make(name), "t5-plus").train()
    family = detect(model)
    if name == "dinov3":  # its rotary positions are drawn anew in training, and again when a block is run again
        model.rope_embeddings.eval()
    checkpointing = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable

    def step() -> dict[str, Tensor]:
        torch.manual_seed(1)
        outs = [family.runner(model)(pictures(*size)).last_hidden_state for size in ((16, 48), (32, 24))]  # both of 12 patches
        sum(out.square().mean() for out in outs).backward()
        return gradients(model)

    plain = step()
    checkpointing({"use_reentrant": False})
    found = step()
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[key], plain[key]) for key in plain)
    checkpointing({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        step()


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_a_copy_has_a_grid_of_its_own(twin: Callable[[nn.Module], nn.Module]) -> None:
    cpe = preset("t5").model_copy(update={"locality": "cpe"})
    model = convert(make("dinov3"), cpe)
    x = pictures(16, 48)
    expected = run(model, x)
    other = twin(model)
    run(model, pictures(32, 32))
    assert same(run(other, x), expected)
    assert (tracker(model).grid, tracker(other).grid) == ((4, 4), (2, 6))


@pytest.mark.parametrize("name", ["vit", "siglip-tower"])
def test_cpe_stands_before_the_projections(name: str) -> None:
    model = convert(make(name), Conversion(mixer=preset("softmax").mixer, key_norm="none", locality="cpe"))
    attention = model.get_submodule(record(model).sites[0])
    layer = next(m for n, m in model.named_modules() if n.endswith("layers.0"))
    normed = layer.layernorm_before if name == "vit" else layer.layer_norm1
    seen: dict[str, Tensor] = {}
    normed.register_forward_hook(lambda m, args, out: seen.update(norm=out))
    attention.q_proj.register_forward_pre_hook(lambda m, args: seen.update(projected=args[0]))
    run(model, pictures(16, 48))
    prefix = tracker(model).prefix
    grid = seen["norm"][:, prefix:].transpose(1, 2).unflatten(2, (2, 6))
    conv = attention.core.x_conv
    added = F.conv2d(grid, conv.weight, conv.bias, padding=1, groups=24).flatten(2).transpose(1, 2)
    torch.testing.assert_close(seen["projected"][:, prefix:], seen["norm"][:, prefix:] + added)
    assert torch.equal(seen["projected"][:, :prefix], seen["norm"][:, :prefix])


def test_autocast_runs_in_half_precision() -> None:
    model, x = convert(make("dinov3"), "t5-plus"), pictures()
    exact = run(model, x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        rough = run(model, x)[0].float()
    assert rough.isfinite().all() and not torch.equal(rough, exact)
    assert (rough - exact).norm() < 0.1 * exact.norm()


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("name", ["vit", "dinov3", "siglip-tower"])
def test_compiles_to_one_graph_for_two_shapes(name: str) -> None:
    model = convert(make(name, num_hidden_layers=1), "t5-plus")
    torch._dynamo.reset()
    compiled = torch.compile(detect(model).runner(model), fullgraph=True, backend="eager")
    with torch.no_grad():
        for x in (pictures(), pictures(16, 48)):
            torch.testing.assert_close(compiled(x).last_hidden_state, run(model, x)[0])


@pytest.mark.parametrize("name", ["vit-classifier", "dinov3", "siglip"])
def test_a_saved_model_loads_bit_for_bit_and_its_original_is_the_host(name: str, tmp_path: Path) -> None:
    host, x = make(name), pictures(16, 56)
    before = run(host, x)
    model = convert(host, "t5")
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert same(run(loaded, x), run(model, x))
    assert record(loaded) == record(model)
    assert same(run(original_of(loaded), x), before)


# Calibration and measurements ----------------------------------------------------------------------------------------------

QUICK = CalibrationConfig(steps=15, pool=6, batch=3)


@pytest.mark.parametrize(
    ("name", "locality"), [("dinov3", "dwc-qk"), ("dinov3", "cpe"), ("siglip-tower", "cpe"), ("clip", "dwc-qk")]
)
def test_calibration_lowers_every_sites_error_and_its_streams_are_the_two_models(name: str, locality: Any) -> None:
    model = make(name)
    blocks = detect(model).blocks(model)
    images = [pictures(16, 48, 3), pictures(32, 32, 3)]
    ends: list[Tensor] = []

    def last() -> list[Tensor]:
        ends.clear()
        handle = blocks[-1].register_forward_hook(lambda m, args, out: ends.append(out))
        for x in images:
            run(model, x)
        handle.remove()
        return list(ends)

    with torch.no_grad():
        host = last()
        convert(model, preset("t5").model_copy(update={"locality": locality}))
        calibration = _Calibration(model, QUICK, None)
        calibration.fill_pool(images)
    errors = calibration.fit_sites()
    assert all(error.after < error.before for error in errors.values()) and len(errors) == 2
    with torch.no_grad():
        for piece, original, converted in zip(calibration.pieces, host, last(), strict=True):
            torch.testing.assert_close(piece.host[0], original)
            torch.testing.assert_close(piece.converted[0], converted)


def test_calibrate_leaves_only_cores_changed() -> None:
    model = convert(make("siglip"), "t5")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    calibrate(model, pictures(), config=QUICK)
    assert {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])} == {
        key for key in before if ".core." in key
    }


@pytest.mark.parametrize("name", ["dinov2-classifier", "siglip-tower", "clip"])
def test_a_softmax_conversion_is_wholly_faithful_and_another_is_not(name: str) -> None:
    host, images = make(name), [pictures(), pictures(16, 48)]
    exact = fidelity(host, convert(copy.deepcopy(host), "softmax"), images)
    assert (exact.pooled_cosine, exact.patch_cosine) == pytest.approx((1, 1)) and set(exact.sites.values()) == {0.0}
    assert (exact.images, exact.tokens) == (4, 2 * 16 + 2 * 12)
    assert (exact.class_cosine is None) == (name == "siglip-tower")
    assert exact.agreement == (1 if name == "dinov2-classifier" else None)
    rough = fidelity(host, convert(copy.deepcopy(host), "t5"), images)
    assert all(error > 0.1 for error in rough.sites.values()) and rough.patch_cosine < exact.patch_cosine


@pytest.mark.parametrize("name", ["vit", "dinov3", "siglip-tower"])
def test_softmaxs_implicit_map_is_the_attention_that_transformers_itself_tells(name: str) -> None:
    host, x = make(name, "eager"), pictures(16, 48, 1)
    weights = detect(host).runner(host)(x, output_attentions=True).attentions
    host.set_attn_implementation("sdpa")
    sites = [site.name for site in detect(host).sites(host)]
    for model in (host, convert(copy.deepcopy(host), "softmax")):
        for site, expected in zip(sites, weights, strict=True):
            assert (implicit_attention(model, x, site, 3) - expected[0, :, 3]).abs().max() < 1e-6
    assert list(key_shift(host, [x])) == sites
    with pytest.raises(EvaluationError, match="query"):
        implicit_attention(host, x, sites[0], 99)


def test_key_shift_is_of_the_patches_keys_before_a_core() -> None:
    host, x = make("dinov3", key_bias=True), pictures()
    before = key_shift(host, [x])
    converted = convert(copy.deepcopy(host), Conversion(sites=(list(before)[-1],)))
    assert key_shift(converted, [x]) == pytest.approx(before)
    with torch.no_grad():
        host.model.layer[0].attention.k_proj.weight.zero_()  # rotary positions turn the bias, which alone would be one big shift
    assert 0 < key_shift(host, [x])[next(iter(before))] < 1


def test_cost_counts_the_tokens_of_every_size() -> None:
    host = make("clip-classifier")
    found = cost(host, convert(copy.deepcopy(host), "linear"), [(32, 32), (64, 96)], repeats=3)
    assert [row.tokens for row in found.rows] == [17, 97]
    assert found.original_attention == "fused" and all(row.original_gmacs > 0 for row in found.rows)
    assert found.rows[1].converted_gmacs < found.rows[1].original_gmacs
    with pytest.raises(EvaluationError, match="8×8 px patches"):
        check_sizes(host, [(30, 32)])


def test_every_type_is_one_of_transformers() -> None:
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    assert all(host_type(known[name].model_type) == name for name in TOWERS + HOLDERS)
