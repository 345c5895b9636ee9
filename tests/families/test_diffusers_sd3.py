"""diffusers' SD3 as host: identity, which sites a preset takes, text outside the convolutions, what composes, what is refused."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3ControlNetModel, SD3Transformer2DModel
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from peft import LoraConfig
from torch import Tensor, nn

from lineate.calibrate import CalibrationConfig, calibrate
from lineate.calls import Call, listening
from lineate.checkpoint import load, save
from lineate.convert import Conversion, ConversionError, convert, core_modules, preset, record
from lineate.families import UnsupportedModelError, detect
from lineate.families.base import Attended

from ..tiny import sd3, softmax_twin

MEDIUM = {"num_layers": 4, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}
GEOMETRIES = {
    "sd3": {"num_layers": 2},
    "sd3.5-medium": MEDIUM,
    "sd3.5-large": {"num_layers": 2, "qk_norm": "rms_norm"},
}


def medium(**changes: Any) -> SD3Transformer2DModel:
    return sd3(**MEDIUM | changes)


def run(model: nn.Module, height: int = 8, width: int = 8, text: int = 5, **also: Any) -> Tensor:
    generator = torch.Generator().manual_seed(height)

    def draw(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator, dtype=torch.float32).to(model.dtype)

    latents, prompt, pooled = draw(4, height, width), draw(text, 12), draw(10)
    return model(latents, prompt, pooled, torch.tensor([300.0, 900.0]), **also).sample


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_identity_conversion_is_bit_identical_in_outputs_and_gradients(geometry: dict[str, Any]) -> None:
    twin = softmax_twin(sd3(**geometry), run)
    assert len(record(twin).sites) == 2 + 4 * (geometry is MEDIUM)


def test_the_presets_take_the_image_only_branches_and_the_last_five_joint_attentions() -> None:
    sites = list(core_modules(convert(medium(num_layers=8), "sd35-t5")))
    block = "transformer_blocks"
    assert sites == [f"{block}.0.attn2", f"{block}.1.attn2", *(f"{block}.{i}.attn" for i in range(3, 8))]
    assert list(core_modules(convert(sd3(num_layers=7), "sd35-t5"))) == [f"{block}.{i}.attn" for i in range(2, 7)]
    assert len(core_modules(convert(medium(), "sd35-t5-all"))) == 6


def test_slices_stand_for_numbers_of_blocks() -> None:
    def chosen(*globs: str) -> list[str]:
        conversion = Conversion(sites=globs)
        return [site.removeprefix("transformer_blocks.") for site in core_modules(convert(medium(), conversion))]

    assert chosen("*.[1:3].attn") == ["1.attn", "2.attn"]
    assert chosen("*.[:1].*", "*.[3:].attn") == ["0.attn", "0.attn2", "3.attn"]
    assert chosen("*.[-1:].attn2|*.[0-1].attn") == ["0.attn", "1.attn"]
    with pytest.raises(ConversionError, match=r"no attention site matches '\*\.\[2:\]\.attn2'; sites: transformer_blocks\.0"):
        chosen("*.attn", "*.[2:].attn2")


def test_every_new_parameter_learns_and_every_old_one_is_inherited() -> None:
    model = medium()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    convert(model, "sd35-t5-all")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    run(model).square().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".core." in name)


def test_convolutions_touch_the_image_alone() -> None:
    model = convert(medium(), Conversion(mixer=preset("softmax").mixer, key_norm="none", sites=("*.2.attn",)))
    seen: list[Attended] = []
    plain: list[tuple[Tensor, ...]] = []
    core = core_modules(model)["transformer_blocks.2.attn"]
    core.mixer.register_forward_pre_hook(lambda module, args: seen.append(Attended(*args[:3], out=args[0])))
    core.register_forward_pre_hook(lambda module, args: plain.append(args[:3]))
    run(model, 8, 12, text=5)
    (mixed,), ((q, k, _),) = seen, plain
    assert q.shape == (2, 3, 4 * 6 + 5, 8)
    for raw, convolved in ((q, mixed.q), (k, mixed.k)):
        assert torch.equal(raw[:, :, 24:], convolved[:, :, 24:])
        assert not torch.isclose(raw[:, :, :24], convolved[:, :, :24]).all(dim=-1).any()


def test_any_size_aspect_and_length_of_text() -> None:
    model = convert(medium(), "sd35-t5-all")
    for height, width, text in ((8, 8, 5), (4, 12, 5), (16, 6, 9), (8, 8, 1)):
        assert run(model, height, width, text).shape == (2, 4, height, width)


def test_deepcopy_and_pickle_keep_their_own_grid() -> None:
    model = convert(medium(), "sd35-t5")
    expected = run(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        run(model, 4, 12)
        assert torch.equal(run(twin), expected)


@pytest.mark.parametrize("delta", [False, True])
def test_save_and_load(delta: bool, tmp_path: Path) -> None:
    original = medium()
    model = convert(copy.deepcopy(original), "sd35-t5")
    save(model, tmp_path / "saved", delta=delta)
    again = load(tmp_path / "saved", base=copy.deepcopy(original) if delta else None)
    assert torch.equal(run(again), run(model))
    assert record(again) == record(model)


def test_checkpointed_gradients_equal_plain_ones_with_two_grids_under_way() -> None:
    model = convert(medium(), "sd35-t5-all").train()
    gradients = []
    for enable in (False, True):
        (model.enable_gradient_checkpointing if enable else model.disable_gradient_checkpointing)()
        loss = torch.stack([run(model, side, side).square().sum() for side in (8, 12)]).sum()
        gradients.append(torch.autograd.grad(loss, tuple(model.parameters()), allow_unused=True))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None)


def test_one_graph_for_every_size_and_length_of_text(unchecked_shapes: None) -> None:
    """In the first call no two sizes agree, for torch takes them for one: 12 px would be the width of the text's embeddings."""
    model = convert(medium(num_layers=2), "sd35-t5-all")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((8, 14, 5), (16, 6, 9), (6, 20, 3), (8, 8, 5)):
            assert torch.equal(run(compiled, *size), run(model, *size))


def test_bfloat16_stays_near_float32() -> None:
    model = convert(medium(), "sd35-t5-all")
    whole = run(model)
    half = run(copy.deepcopy(model).to(torch.bfloat16)).float()
    assert (half - whole).norm() < 0.05 * whole.norm()


def test_layers_can_be_skipped() -> None:
    model = medium()
    twin = convert(copy.deepcopy(model), "softmax")
    assert torch.equal(run(twin, skip_layers=[1, 2]), run(model, skip_layers=[1, 2]))


def test_controlnet_residuals_arrive() -> None:
    model = medium()
    control = SD3ControlNetModel.from_transformer(
        model, num_layers=2, num_extra_conditioning_channels=0, load_weights_from_transformer=False
    )
    with torch.no_grad():
        control.controlnet_blocks[0].weight.normal_()
    generator = torch.Generator().manual_seed(1)
    latents, prompt, pooled = (torch.randn(2, *shape, generator=generator) for shape in ((4, 8, 8), (5, 12), (10,)))
    residuals = control(latents, latents, encoder_hidden_states=prompt, pooled_projections=pooled,
                        timestep=torch.tensor([1.0, 2.0])).controlnet_block_samples  # fmt: skip
    twin = convert(copy.deepcopy(model), "softmax")
    assert record(twin).host is None  # diffusers wrote the ControlNet's depth into the config of the model
    assert torch.equal(*(run(m, block_controlnet_hidden_states=residuals) for m in (model, twin)))
    assert not torch.equal(run(twin), run(twin, block_controlnet_hidden_states=residuals))


def test_lora_on_projections_of_converted_attentions_works_and_its_scale_arrives() -> None:
    model = convert(medium(), "sd35-t5-all")
    before = run(model)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0", "add_k_proj"], init_lora_weights=False))
    assert not torch.equal(run(model), before)
    assert torch.equal(run(model, joint_attention_kwargs={"scale": 0.0}), before)


def test_what_passes_at_a_site_can_be_watched_on_host_and_converted_model_alike() -> None:
    model, sites = medium(), ["transformer_blocks.1.attn2", "transformer_blocks.3.attn"]
    seen: list[tuple[str, Attended]] = []
    for m in (model, convert(copy.deepcopy(model), "softmax")):
        with detect(m).watch(m, sites, lambda name, attended: seen.append((name, attended))):
            run(m)
    assert [name for name, _ in seen] == sites * 2
    assert [attended.q.shape[2] for _, attended in seen] == [16, 21] * 2
    for (_, host), (_, ours) in zip(seen[:2], seen[2:], strict=True):
        assert all(torch.equal(getattr(host, x), getattr(ours, x)) for x in ("q", "k", "v", "out"))


def test_blocks_lead_from_one_to_the_next() -> None:
    """As calibration walks them."""
    model = convert(medium(), "sd35-t5-all")
    family = detect(model)
    calls: list[Call] = []
    ends: list[Tensor] = []
    model.norm_out.register_forward_pre_hook(lambda module, args: ends.append(args[0]))
    with listening([model.transformer_blocks[0]], calls.append):
        run(model)
    streams, beside = family.block_input(calls[0])
    for block in family.blocks(model):
        streams = family.run_block(block, streams, beside)
    assert torch.equal(streams[0], ends[0]) and streams[1] is None


def test_both_streams_are_calibrated() -> None:
    """Every site, joint or of the image alone, comes closer; along the converted streams and along the host's."""
    for stream in ("converted", "host"):
        model = convert(medium(), "sd35-t5-all")
        calls: list[Call] = []
        with listening([model], calls.append):
            run(model)
        config = CalibrationConfig(steps=10, batch=2, pool=2, stream=stream)
        result = calibrate(model, calls, config=config)
        assert list(result.sites) == list(record(model).sites) and result.images == 2
        assert all(error.after < error.before for error in result.sites.values())


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"attention_mask": torch.ones(2, 21)}, "attention_mask"),
        ({"ip_hidden_states": torch.ones(2, 1, 24), "temb": torch.ones(2, 24)}, "ip_hidden_states or temb"),
    ],
    ids=["mask", "ip-adapter"],
)
def test_what_only_softmax_could_honour_is_refused_when_it_arrives(said: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"a converted attention cannot honour {named}; call the model without"):
        run(convert(medium(), "sd35-t5"), joint_attention_kwargs=said)


def test_fused_projections_and_ip_adapters_are_refused_before_and_after() -> None:
    fused = medium().requires_grad_(False)
    fused.fuse_qkv_projections()
    with pytest.raises(UnsupportedModelError, match=r"transformer_blocks\.0\.attn cannot .* projections were fused; load"):
        convert(fused, "sd35-t5-all")
    adapted = medium()
    adapted.transformer_blocks[3].attn.set_processor(SD3IPAdapterJointAttnProcessor2_0(24, 24, 8, 24))
    with pytest.raises(UnsupportedModelError, match=r"transformer_blocks\.3\.attn cannot .* SD3IPAdapter"):
        convert(adapted, "sd35-t5")
    model = convert(medium(), "sd35-t5")
    for twin in (model, copy.deepcopy(model)):
        with pytest.raises(UnsupportedModelError, match=r"cannot fuse_qkv_projections\(\): it would change some"):
            twin.fuse_qkv_projections()
        with pytest.raises(UnsupportedModelError, match="_load_ip_adapter_weights"):
            twin._load_ip_adapter_weights({})


@pytest.mark.parametrize(("name", "sites"), [("sd35-t5", 18), ("sd35-t5-all", 37)])
def test_the_real_medium_gets_the_papers_sites_and_parameters(name: str, sites: int) -> None:
    """On tensors without values. A site has two matrices D×D a head, and two convolutions of nine taps and a bias a channel."""
    heads, dim, dual = 24, 64, tuple(range(13))
    with torch.device("meta"):
        model = SD3Transformer2DModel(
            num_layers=24, attention_head_dim=dim, num_attention_heads=heads, caption_projection_dim=heads * dim,
            pos_embed_max_size=384, dual_attention_layers=dual, qk_norm="rms_norm",
        )  # fmt: skip
    done = record(convert(model, name))
    assert len(done.sites) == sites
    joint = range(19, 24) if sites == 18 else range(24)
    assert set(done.sites) == {
        *(f"transformer_blocks.{i}.attn2" for i in dual),
        *(f"transformer_blocks.{i}.attn" for i in joint),
    }
    assert done.count("new") == sites * (2 * heads * dim * dim + 2 * (9 + 1) * heads * dim)
    assert done.count("dropped") == 0
