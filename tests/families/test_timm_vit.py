"""timm's plain vision transformers: identity, refusals, and everything torch does to a model around its forward pass."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention, AttentionRope
from timm.models import Eva, VisionTransformer
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lineate.calibrate import CalibrationConfig, calibrate
from lineate.checkpoint import CheckpointError, load, original_of, save
from lineate.convert import Conversion, convert, core_modules, record
from lineate.core import Locality
from lineate.families import FAMILIES, UnsupportedModelError, detect, family
from lineate.mixers.linear import LinearConfig
from lineate.mixers.softmax import SoftmaxConfig

from ..tiny import gradients

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
SMALL14 = SMALL | {"img_size": 42, "patch_size": 14}
NO_CLASS_TOKEN = {"class_token": False, "global_pool": "avg"}


def vit(**changes: Any) -> VisionTransformer:
    return VisionTransformer(**SMALL | changes)


def eva(architecture: str, **changes: Any) -> Eva:
    """A tiny model of one of timm's Eva architectures: two blocks of three heads, 8 channels each."""
    return timm.create_model(architecture, **SMALL | changes)


def gated() -> VisionTransformer:
    """timm's newer sigmoid gate on the attention's output, which no VisionTransformer argument asks for."""
    model = vit()
    for block in model.blocks:
        block.attn = Attention(24, num_heads=3, qkv_bias=True, gated=True)
    return model


def gated_rope() -> Eva:
    """EVA's attention with everything that no architecture of timm's asks for at once."""
    model = eva("eva02_tiny_patch14_224")
    for block in model.blocks:
        block.attn = EvaAttention(24, 3, qkv_bias_separate=True, qk_norm=True, norm_layer=nn.LayerNorm, gated=True)
    return model


# name -> (maker, whether a description must be found from which the same host can be built again)
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "vit": (vit, True),
    "deit": (lambda: timm.create_model("deit_tiny_patch16_224", **SMALL), True),
    "deit-distilled": (lambda: timm.create_model("deit_tiny_distilled_patch16_224", **SMALL), True),
    "dinov2": (lambda: timm.create_model("vit_small_patch14_dinov2", **SMALL14), True),
    "dinov2-registers": (lambda: timm.create_model("vit_small_patch14_reg4_dinov2", **SMALL14), True),
    "dinov2-swiglu": (lambda: timm.create_model("vit_giant_patch14_dinov2", **SMALL14), True),
    "qk-norm": (lambda: vit(qk_norm=True), True),
    "attention-norm": (lambda: vit(qk_norm=True, scale_attn_norm=True), True),
    "no-class-token": (lambda: vit(**NO_CLASS_TOKEN), True),
    "no-class-token-norm": (lambda: vit(**NO_CLASS_TOKEN, fc_norm=False), True),
    "registers-outside-the-position-embedding": (lambda: vit(reg_tokens=2, no_embed_class=True), True),
    "dynamic-image-size": (lambda: vit(dynamic_img_size=True), True),
    "non-square": (lambda: vit(img_size=(32, 56)), True),
    "clip": (lambda: timm.create_model("vit_base_patch16_clip_224", **SMALL), True),
    "siglip": (lambda: timm.create_model("vit_base_patch16_siglip_224", **SMALL), True),
    "post-norm": (lambda: vit(block_fn=ResPostBlock), False),
    "gate": (gated, False),
    "rope-attention-without-rope": (lambda: vit(attn_layer=AttentionRope), False),
    "eva": (lambda: eva("eva_giant_patch14_224"), True),
    "eva-post-norm": (lambda: eva("eva02_enormous_patch14_clip_224"), True),
    "eva02": (lambda: eva("eva02_tiny_patch14_224"), True),
    "eva02-separate-projections-and-norm": (lambda: eva("eva02_base_patch16_clip_224"), True),
    "dinov3": (lambda: eva("vit_small_patch16_dinov3"), True),
    "dinov3-biased": (lambda: eva("vit_small_patch16_dinov3_qkvb"), True),
    "perception-encoder": (lambda: eva("vit_pe_core_base_patch16_224"), True),
    "perception-encoder-without-class-token": (lambda: eva("vit_pe_lang_gigantic_patch14_448"), True),
    "rope": (lambda: eva("vit_base_patch16_rope_224"), True),
    "rope-learned-by-block": (lambda: eva("vit_base_patch16_rope_mixed_224"), True),
    "rope-registers": (lambda: eva("vit_base_patch16_rope_reg1_gap_256"), True),
    "rope-dynamic-non-square": (lambda: eva("vit_base_patch16_rope_224", img_size=(32, 56), dynamic_img_size=True), True),
    "rope-jittered": (lambda: eva("eva02_tiny_patch14_224", rope_rescale_coords=2.0), True),
    "grouped-keys": (lambda: eva("vit_base_patch16_sapiens2", num_kv_heads=(1, 3)), True),
    "gated-rope": (gated_rope, False),
    "eva-by-hand": (lambda: Eva(**SMALL, use_rot_pos_emb=True), False),
    "full-size-deit": (lambda: timm.create_model("deit_tiny_patch16_224"), True),
}
ROPED = ["dinov3-biased", "eva02-separate-projections-and-norm", "rope-learned-by-block", "grouped-keys", "gated-rope"]
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
PRESETS = ["softmax", "t5", "t5-plus", "t5-2layer", "linear", "projqk"]
presets = pytest.mark.parametrize("preset", PRESETS)


def make(name: str) -> nn.Module:
    """The architecture in eval mode, layer scales and the rest moved off their start so that nothing is trivially zero."""
    return perturbed(ARCHITECTURES[name][0]().eval(), 0.05)


def perturbed(model: nn.Module, scale: float = 0.2) -> nn.Module:
    """The model with noise on every parameter: start values are often so small that a core would hardly matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model


def pictures(model: nn.Module, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *model.patch_embed.img_size)


def fingerprint(model: nn.Module) -> tuple[str, int, dict[str, Tensor]]:
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return repr(model), hooks, {name: tensor.clone() for name, tensor in model.state_dict().items()}


# Identity ------------------------------------------------------------------------------------------------------------------


@every_architecture
def test_softmax_conversion_is_the_host_bit_for_bit(name: str) -> None:
    model = make(name)
    original = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    x = pictures(model)
    features, logits = model.forward_features(x), model(x)
    assert convert(model, "softmax") is model
    assert torch.equal(model.forward_features(x), features)
    assert torch.equal(model(x), logits)
    assert list(model.state_dict()) == list(original)
    assert len(core_modules(model)) == len(model.blocks)
    model.load_state_dict({key: tensor + 1 for key, tensor in original.items()}, strict=True)
    model.load_state_dict(original, strict=True)
    assert torch.equal(model(x), logits)


@every_architecture
def test_softmax_conversion_has_the_hosts_gradients_bit_for_bit(name: str) -> None:
    model = make(name).train()
    x = pictures(model)
    torch.manual_seed(1)  # some hosts jitter their rotary positions in training
    model(x).square().sum().backward()
    expected = gradients(model)
    convert(model, "softmax")
    torch.manual_seed(1)
    model(x).square().sum().backward()
    found = gradients(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@every_architecture
def test_t5_plus_keeps_every_host_tensor_and_adds_only_cores(name: str) -> None:
    model = make(name)
    original = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    x = pictures(model)
    before = model(x)
    after = convert(model, "t5-plus")(x)
    assert after.shape == before.shape
    assert after.isfinite().all()
    assert not torch.allclose(after, before)
    state = model.state_dict()
    assert [key for key in state if ".core." not in key] == list(original)
    assert all(torch.equal(state[key], tensor) for key, tensor in original.items())
    missing, unexpected = model.load_state_dict(original, strict=False)
    assert not unexpected
    assert missing == [key for key in state if ".core." in key] != []


@every_architecture
def test_the_host_can_be_built_again_from_its_description(name: str) -> None:
    model = make(name)
    owner = detect(model)
    description = owner.describe(model)
    if description is None:
        assert not ARCHITECTURES[name][1]
        return
    twin = family(owner.name).build(description)
    twin.load_state_dict(model.state_dict())
    x = pictures(model)
    assert torch.equal(twin.eval()(x), model(x))


@pytest.mark.parametrize("name", ["vit", *ROPED])
def test_a_model_trained_in_half_precision_converts_and_runs_in_it(name: str) -> None:
    model = convert(make(name).bfloat16(), "t5-plus")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    out = model(pictures(model).bfloat16())
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


@pytest.mark.parametrize("name", ["eva02", "dinov3", "gated-rope"])
def test_a_projection_with_something_around_it_is_called(name: str) -> None:
    """LoRA puts a module in the projection's place: what it adds must arrive, the biases beside it too."""
    model = convert(make(name), "softmax")
    x = pictures(model)
    expected = model(x)
    for block in model.blocks:
        block.attn.qkv = nn.Sequential(block.attn.qkv)
    torch.testing.assert_close(model(x), expected)
    for block in model.blocks:
        block.attn.qkv.append(nn.Dropout(1.0).train())
    assert not torch.allclose(model(x), expected)


@pytest.mark.parametrize("name", ["rope-registers", "grouped-keys"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_with_rotary_positions_loads_bit_for_bit(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """Its angles, and EVA's zero bias of the keys, are buffers that no state dict holds."""
    model = convert(make(name), "t5-plus").to(dtype)
    loaded = load(save(model, tmp_path / "model"))
    assert record(loaded) == record(model)
    x = pictures(model).to(dtype)
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(original_of(loaded)(x), original_of(model)(x))


@pytest.mark.parametrize("name", ["eva02", "dinov3", "rope-learned-by-block"])
@pytest.mark.parametrize("locality", ["dwc-qk", "cpe"])
def test_calibration_under_rotary_positions_starts_at_the_true_error_and_lowers_it(name: str, locality: Locality) -> None:
    """The first core's error is that of the models' own forward passes: the same positions reach it when it is fitted."""
    model = perturbed(make(name), 0.3)  # scores far enough from equal for positions to matter
    conversion = Conversion(mixer=LinearConfig(), locality=locality)
    host, converted = convert(copy.deepcopy(model), "softmax"), convert(model, conversion)
    x, outputs = pictures(model, batch=4), []
    for either in (host, converted):
        either.blocks[0].attn.core.register_forward_hook(lambda module, args, out: outputs.append(out.detach()))
        either(x)
    error = (outputs[1] - outputs[0]).norm() / outputs[0].norm()
    result = calibrate(converted, x, config=CalibrationConfig(steps=30, batch=2, pool=4))
    assert list(result.sites) == ["blocks.0.attn", "blocks.1.attn"]
    assert result.sites["blocks.0.attn"].before == pytest.approx(float(error), rel=1e-4)
    assert all(site.after < site.before for site in result.sites.values())


@presets
def test_samples_of_a_batch_do_not_see_each_other(preset: str) -> None:
    model = convert(make("dinov2-registers"), preset)
    x = pictures(model, batch=3)
    torch.testing.assert_close(model(x), torch.cat([model(x[i : i + 1]) for i in range(3)]))


def test_only_convolutions_and_windows_know_where_a_patch_lies() -> None:
    """Without position embedding, transposing the grid of patches transposes the features of softmax and linear attention."""
    model = vit(pos_embed="none", **NO_CLASS_TOKEN, dynamic_img_size=True).eval()
    wide = torch.randn(1, 3, 16, 48)
    tall = wide.unflatten(2, (2, 8)).unflatten(4, (6, 8)).permute(0, 1, 4, 3, 2, 5).flatten(4, 5).flatten(2, 3)
    for preset, transposes in (("softmax", True), ("linear", True), ("t5", False), ("t5-plus", False)):
        converted = perturbed(convert(copy.deepcopy(model), preset))
        features = converted.forward_features(wide).unflatten(1, (2, 6))
        transposed = converted.forward_features(tall).unflatten(1, (6, 2)).transpose(1, 2)
        assert torch.allclose(features, transposed, atol=1e-4) == transposes, preset


# The class token -----------------------------------------------------------------------------------------------------------

GAP = Conversion(mixer=SoftmaxConfig(), key_norm="none", locality="none", class_token="drop")


def without_class_token(model: nn.Module, row: int = 1) -> dict[str, Tensor]:
    """The host's tensors without the class token and the first `row` rows of the position embedding."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "cls_token"}
    return state | {"pos_embed": state["pos_embed"][:, row:]} if "pos_embed" in state else state


# name -> (arguments of the class-token host, those of the same host without, rows of the position embedding that go)
DROPPABLE: dict[str, tuple[Callable[..., nn.Module], dict[str, Any], dict[str, Any], int]] = {
    "deit": (vit, {}, {"class_token": False, "global_pool": "avg", "fc_norm": False}, 1),
    "norm-after-the-mean": (vit, {"global_pool": "avg"}, {"class_token": False}, 1),
    "tokens-out": (vit, {"global_pool": "", "num_classes": 0}, {"class_token": False}, 1),
    "registers": (vit, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg", "fc_norm": False}, 1),
    "no-position": (vit, {"no_embed_class": True}, {"class_token": False, "global_pool": "avg", "fc_norm": False}, 0),
    "eva02": (partial(eva, "eva02_tiny_patch14_224"), {"num_classes": 5}, {"class_token": False}, 1),
    "dinov3": (partial(eva, "vit_small_patch16_dinov3"), {}, {"class_token": False}, 0),
    "rope": (
        partial(eva, "vit_base_patch16_rope_224"),
        {},
        {"class_token": False, "global_pool": "avg", "use_fc_norm": False},
        0,
    ),
}
droppable = pytest.mark.parametrize("name", DROPPABLE)


@droppable
def test_dropping_the_class_token_gives_the_host_that_never_had_one(name: str) -> None:
    build, arguments, changes, row = DROPPABLE[name]
    model, expected = perturbed(build(**arguments).eval(), 0.05), build(**arguments | changes).eval()
    expected.load_state_dict(without_class_token(model, row), strict=True)
    kept, names = tuple(model.cls_token.shape), list(model.state_dict())
    convert(model, GAP)
    x = pictures(model)
    torch.testing.assert_close(model.forward_features(x), expected.forward_features(x))
    torch.testing.assert_close(model(x), expected(x))
    assert list(model.state_dict()) == [name for name in names if name != "cls_token"]
    gone = {tensor.name: tensor.shape for tensor in record(model).tensors if tensor.status == "dropped"}
    assert gone == {"cls_token": kept} | ({"pos_embed[:, :1]": (1, 1, 24)} if row else {})


@droppable
def test_a_saved_model_without_its_class_token_loads_and_still_says_what_went(name: str, tmp_path: Path) -> None:
    build, arguments, _, _ = DROPPABLE[name]
    model = perturbed(convert(build(**arguments).eval(), Conversion(class_token="drop")), 0.05)
    loaded = load(save(model, tmp_path / "model"))
    assert record(loaded) == record(model)
    assert "cls_token" in record(loaded).names("dropped")
    x = pictures(model)
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(CheckpointError, match="class_token='drop' changed the host"):
        save(model, tmp_path / "delta", delta=True)


def test_the_softmax_host_of_a_model_without_its_class_token_has_none_either() -> None:
    model = perturbed(convert(vit().eval(), GAP))
    x = pictures(model)
    assert torch.equal(original_of(model)(x), model(x))


@pytest.mark.parametrize("name", ["no-class-token", "siglip", "perception-encoder-without-class-token"])
def test_there_is_nothing_to_drop_twice(name: str) -> None:
    model = make(name)
    x = pictures(model)
    expected = model(x)
    convert(model, GAP)
    assert torch.equal(model(x), expected)
    assert record(model).names("dropped") == ()


def test_only_some_sites_converted_the_others_turn_the_right_tokens() -> None:
    """Rotary positions begin after the prefix, which is shorter now, in attentions that stay the host's too."""
    build, arguments, changes, row = DROPPABLE["eva02"]
    model, expected = perturbed(build(**arguments).eval(), 0.05), build(**arguments | changes).eval()
    expected.load_state_dict(without_class_token(model, row))
    convert(model, GAP.model_copy(update={"sites": ("blocks.1.*",)}))
    x = pictures(model)
    torch.testing.assert_close(model(x), expected(x))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: timm.create_model("deit_tiny_distilled_patch16_224", **SMALL), "head_dist: .* distillation token"),
        (lambda: vit(global_pool="prr"), "attn_pool: global_pool='prr'"),
    ],
    ids=["distilled", "class-token-asks"],
)
def test_a_class_token_that_must_stay_is_refused_before_anything_changes(build: Callable[[], nn.Module], reason: str) -> None:
    model = build()
    before = fingerprint(model)
    with pytest.raises(UnsupportedModelError, match=reason):
        convert(model, GAP)
    after = fingerprint(model)
    assert after[:2] == before[:2]
    assert all(torch.equal(after[2][key], tensor) for key, tensor in before[2].items())
    assert not hasattr(model, "lineate_record")


# Grids ---------------------------------------------------------------------------------------------------------------------

SQUARE, WIDE = (32, 32), (16, 64)  # 4×4 and 2×8 patches: the same number of tokens, so that only the grid tells them apart


ANY_GRID: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: vit(dynamic_img_size=True),
    "dinov3": lambda: eva("vit_small_patch16_dinov3"),
    "rope": lambda: eva("eva02_tiny_patch14_224", dynamic_img_size=True),
    "rope-learned-by-block": lambda: eva("vit_base_patch16_rope_mixed_224", dynamic_img_size=True),
}
any_grid = pytest.mark.parametrize("host", ANY_GRID)


def dynamic(preset: str = "t5-plus", host: str = "vit") -> nn.Module:
    return perturbed(convert(ANY_GRID[host]().eval(), preset))


@any_grid
def test_two_aspect_ratios_in_one_process(host: str) -> None:
    model = dynamic(host=host)
    square, wide = torch.randn(1, 3, *SQUARE), torch.randn(1, 3, *WIDE)
    first = model(square), model(wide)
    assert torch.equal(model(square), first[0])
    assert torch.equal(model(wide), first[1])


@any_grid
def test_a_deep_copy_follows_its_own_grid(host: str) -> None:
    """A copy (an EMA, say) that sees another shape in the middle of the model's forward pass changes nothing."""
    model = dynamic(host=host)
    square, wide = torch.randn(1, 3, *SQUARE), torch.randn(1, 3, *WIDE)
    expected = model(square)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(square), expected)
        handle = model.blocks[0].register_forward_hook(lambda *_, other=other: (other(wide), None)[1])
        assert torch.equal(model(square), expected)
        handle.remove()


@any_grid
def test_pickle_keeps_weights_record_and_behaviour(host: str) -> None:
    model = dynamic(host=host)
    loaded = pickle.loads(pickle.dumps(model))
    assert record(loaded) == record(model)
    for size in (SQUARE, WIDE):
        x = torch.randn(1, 3, *size)
        assert torch.equal(loaded(x), model(x))


def test_attention_without_a_picture_says_that_the_grid_is_unknown() -> None:
    with pytest.raises(ValueError, match="no picture has passed the patch embedding"):
        dynamic().blocks[0](torch.randn(1, 17, 24))


# Gradient checkpointing ----------------------------------------------------------------------------------------------------


def two_grids_before_backward(model: nn.Module, forward: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(1)
    square = torch.randn(2, 3, *SQUARE, requires_grad=True)
    wide = torch.randn(2, 3, *WIDE, requires_grad=True)
    first, second = forward(square), forward(wide)
    (first.square().sum() + second.square().sum()).backward()
    return gradients(model) | {"square": square.grad, "wide": wide.grad}


def by_blocks(model: nn.Module, every: int, use_reentrant: bool = False) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        for start in range(0, len(model.blocks), every):
            x = checkpoint(nn.Sequential(*model.blocks[start : start + every]), x, use_reentrant=use_reentrant)
        return model.forward_head(model.norm(x))

    return forward


def whole(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: checkpoint(model, x, use_reentrant=False)


def timms_own(model: nn.Module) -> Callable[[Tensor], Tensor]:
    model.set_grad_checkpointing(True)
    return model


@pytest.mark.parametrize("preset", ["t5", "t5-plus"])
@pytest.mark.parametrize(
    "wrap",
    [timms_own, lambda m: by_blocks(m, 1), lambda m: by_blocks(m, 2), whole],
    ids=["timm", "each block", "pairs of blocks", "whole model"],
)
def test_checkpointed_gradients_equal_plain_ones_with_two_grids_under_way(
    preset: str, wrap: Callable[[nn.Module], Callable[[Tensor], Tensor]]
) -> None:
    model = dynamic(preset).train()
    expected = two_grids_before_backward(model, model)
    for _ in range(2):  # a second step: nothing of the first backward pass stays behind
        found = two_grids_before_backward(model, wrap(model))
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")


@any_grid
@pytest.mark.parametrize("wrap", [timms_own, whole], ids=["timm", "whole model"])
def test_checkpointing_keeps_each_hosts_own_arguments(host: str, wrap: Callable[[nn.Module], Callable[[Tensor], Tensor]]) -> None:
    model = dynamic(host=host).train()
    expected = two_grids_before_backward(model, model)
    found = two_grids_before_backward(model, wrap(model))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_reentrant_checkpointing_is_refused_with_the_remedy() -> None:
    model = dynamic().train()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        two_grids_before_backward(model, by_blocks(model, 1, use_reentrant=True))


# Compilation and precision -------------------------------------------------------------------------------------------------


AHEAD = {"softmax", "t5-plus", "linear", "projqk", "hedgehog", "lit", "clear", "hyena-x"}  # of every kind of operator one


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("preset", "host"), [*((preset, "vit") for preset in PRESETS), ("t5", "dinov3"), ("t5", "rope-learned-by-block")]
)
def test_compiles_to_one_full_graph_for_several_grids(preset: str, host: str) -> None:
    """aot_eager traces the backward pass too, for several times as long; neither needs a C++ compiler."""
    torch.compiler.reset()
    model = dynamic(preset, host).train()
    if host == "vit":
        del model.blocks[1:]  # they would be traced as the first is
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager" if preset in AHEAD else "eager")
    for size in (WIDE, (40, 24)):
        x = torch.randn(2, 3, *size)
        results = []
        for run in (model, compiled):
            out = run(x)
            out.square().sum().backward()
            results.append({"out": out.detach()} | gradients(model))
        for name in results[0]:
            torch.testing.assert_close(results[1][name], results[0][name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("preset", "name"), [(p, "dinov2") for p in PRESETS] + [("t5-plus", name) for name in ROPED[:3]])
def test_amp_bf16_trains_fp32_weights(preset: str, name: str) -> None:
    model = convert(make(name), preset)
    x = pictures(model)
    exact = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
        out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).norm() < 0.05 * exact.norm()
    for name, gradient in gradients(model).items():
        assert gradient.dtype == torch.float32, name
        assert gradient.isfinite().all(), name


# Refusals ------------------------------------------------------------------------------------------------------------------

REFUSALS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "attention dropout": (lambda: vit(attn_drop_rate=0.1), r"blocks\.0\.attn .*attn_drop=0\.1"),
    "patch dropout": (lambda: vit(patch_drop_rate=0.1), "patch_drop: .*patch_drop_rate=0"),
    "differential attention": (
        lambda: timm.create_model("vit_tiny_patch16_224", attn_layer="diff"),
        r"blocks\.0\.attn .*DiffAttention",
    ),
    "parallel block": (lambda: vit(block_fn=ParallelScalingBlock), r"blocks\.0 .*ParallelScalingBlock"),
    "parallel branches": (lambda: vit(block_fn=ParallelThingsBlock), r"blocks\.0 .*ParallelThingsBlock"),
    "differential parallel block": (lambda: vit(block_fn=DiffParallelScalingBlock), r"blocks\.0 .*DiffParallelScalingBlock"),
    "windows": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", embed_dim=24),
        r"SwinTransformer .*layers\.0.* windows",
    ),
    "relative positions": (
        lambda: timm.create_model("vit_relpos_small_patch16_224", depth=2),
        r"VisionTransformerRelPos .*blocks\.0\.attn .*relative-position bias",
    ),
    "beit": (lambda: timm.create_model("beit_base_patch16_224", depth=1), r"Beit .*blocks\.0\.attn .*relative-position bias"),
    "attention dropout under rope": (
        lambda: eva("eva02_tiny_patch14_224", attn_drop_rate=0.1),
        r"blocks\.0\.attn .*attn_drop=0\.1",
    ),
    "patch dropout under rope": (lambda: eva("eva02_tiny_patch14_224", patch_drop_rate=0.1), "patch_drop: .*patch_drop_rate=0"),
    "naflex": (lambda: timm.create_model("naflexvit_base_patch16_gap", depth=1), "NaFlexVit .*attention mask"),
    "no transformer": (lambda: timm.create_model("resnet18"), r"ResNet .*supported library \(timm"),
    "no host library": (lambda: nn.Sequential(nn.Linear(3, 3)), r"Sequential .*supported library \(timm"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_a_core_cannot_honour_is_refused_by_site_and_reason_and_left_as_it_was(case: str) -> None:
    build, reason = REFUSALS[case]
    model = build()
    before = fingerprint(model)
    with pytest.raises(UnsupportedModelError, match=reason):
        convert(model, "t5")
    after = fingerprint(model)
    assert after[:2] == before[:2]
    assert all(torch.equal(after[2][key], tensor) for key, tensor in before[2].items())
    assert not hasattr(model, "lineate_record")


def test_a_site_that_is_refused_can_be_left_out() -> None:
    model = vit()
    model.blocks[1].attn.attn_drop.p = 0.1
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1\.attn"):
        convert(model, Conversion())
    convert(model, Conversion(sites=("blocks.0.*",)))
    assert list(core_modules(model)) == ["blocks.0.attn"]


@pytest.mark.parametrize("arguments", [{"attn_mask": torch.ones(17, 17, dtype=torch.bool)}, {"is_causal": True}])
def test_masks_are_refused_when_they_arrive(arguments: dict[str, Any]) -> None:
    model = convert(vit(), "softmax")
    model(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="attn_mask or is_causal"):
        model.blocks[0].attn(torch.randn(1, 17, 24), **arguments)


def test_every_family_is_there_under_its_own_name() -> None:
    assert all(family(name).name == name for name in FAMILIES)
    with pytest.raises(UnsupportedModelError, match="unknown family 'tim'; choices: timm"):
        family("tim")
