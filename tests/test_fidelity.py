"""Fidelity states what it says: each figure equals its definition, whatever the batching, and nothing of the models changes."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from lineate.convert import Conversion, ConversionError, convert, is_new
from lineate.evaluate import EvaluationError, evaluating
from lineate.evaluate.fidelity import fidelity

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5, "dynamic_img_size": True}


def pair(conversion: str | Conversion = "t5", **overrides: object) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    original = VisionTransformer(**SMALL | overrides).eval()
    for parameter in original.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    converted = convert(copy.deepcopy(original), conversion)
    for name, parameter in converted.named_parameters():
        if is_new(name):
            nn.init.normal_(parameter, std=0.2)
    return original, converted


def pictures(count: int = 3, size: tuple[int, int] = (32, 32)) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


def inputs_of_proj(model: nn.Module, images: list[Tensor]) -> dict[str, Tensor]:
    """What enters each output projection, all pictures flattened into one vector."""
    seen: dict[str, list[Tensor]] = {f"blocks.{i}.attn": [] for i in range(2)}
    handles = [
        model.get_submodule(f"{site}.proj").register_forward_hook(lambda m, args, out, kept=kept: kept.append(args[0].flatten()))
        for site, kept in seen.items()
    ]
    with torch.no_grad():
        for batch in images:
            model.forward_features(batch)
    for handle in handles:
        handle.remove()
    return {site: torch.cat(kept).double() for site, kept in seen.items()}


def test_the_identity_conversion_is_perfect() -> None:
    result = fidelity(*pair("softmax"), [pictures()])
    cosines = (result.patch_cosine, result.patch_cosine_worst, result.class_cosine, result.pooled_cosine)
    assert cosines == pytest.approx((1, 1, 1, 1), abs=1e-12)
    assert result.sites == {"blocks.0.attn": 0.0, "blocks.1.attn": 0.0}
    assert (result.agreement, result.kl) == (1.0, 0.0)
    assert (result.images, result.tokens) == (3, 3 * 16)


def test_cosines_equal_their_definition_over_every_token_of_every_shape() -> None:
    original, converted = pair()
    images = [pictures(2), pictures(1, (16, 48))]
    result = fidelity(original, converted, images)
    with torch.no_grad():
        features = [(original.forward_features(x).double(), converted.forward_features(x).double()) for x in images]
    cosine = torch.nn.CosineSimilarity(dim=-1)
    per_token = [cosine(a[:, 1:], b[:, 1:]) for a, b in features]
    assert result.tokens == 2 * 16 + 12
    assert result.patch_cosine == pytest.approx(torch.cat([c.flatten() for c in per_token]).mean().item())
    assert result.patch_cosine_worst == pytest.approx(torch.cat([c.mean(1) for c in per_token]).min().item())
    assert result.class_cosine == pytest.approx(torch.cat([cosine(a[:, 0], b[:, 0]) for a, b in features]).mean().item())
    pooled = torch.cat([cosine(a[:, 1:].mean(1), b[:, 1:].mean(1)) for a, b in features])
    assert result.pooled_cosine == pytest.approx(pooled.mean().item())
    assert result.patch_cosine_worst < result.patch_cosine < 1


def test_site_errors_are_relative_norms_over_all_pictures_each_model_on_its_own_stream() -> None:
    original, converted = pair()
    images = [pictures(2), 3 * pictures(1, (16, 48))]
    host, ours = inputs_of_proj(original, images), inputs_of_proj(converted, images)
    expected = {site: ((ours[site] - host[site]).norm() / host[site].norm()).item() for site in host}
    assert fidelity(original, converted, images).sites == pytest.approx(expected, rel=1e-6)


def test_a_site_left_alone_is_not_listed() -> None:
    assert list(fidelity(*pair(Conversion(sites=("blocks.1.*",))), [pictures()]).sites) == ["blocks.1.attn"]


def test_agreement_and_kl_equal_their_definition() -> None:
    original, converted = pair()
    images = pictures(16)
    result = fidelity(original, converted, [images])
    with torch.no_grad():
        p, q = original(images).double().softmax(-1), converted(images).double().softmax(-1)
    assert result.kl == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)
    assert result.agreement == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert result.kl > 0
    assert 0 < result.agreement < 1


def test_batching_does_not_matter() -> None:
    original, converted = pair()
    images = pictures(4)
    whole = fidelity(original, converted, [images]).model_dump()
    for split in (images, list(images.split(3)), (image for image in images)):
        other = fidelity(original, converted, split).model_dump()
        assert other.pop("sites") == pytest.approx(whole["sites"], rel=1e-5)
        assert other == pytest.approx({name: value for name, value in whole.items() if name != "sites"}, rel=1e-5)


def test_no_class_token_and_no_head_leave_their_figures_out() -> None:
    original, converted = pair(class_token=False, global_pool="avg", num_classes=0)
    result = fidelity(original, converted, [pictures()])
    assert (result.class_cosine, result.agreement, result.kl) == (None, None, None)


def test_register_tokens_are_not_patches() -> None:
    assert fidelity(*pair(reg_tokens=3), [pictures(1)]).tokens == 16


def test_models_come_back_as_they_were() -> None:
    original, converted = pair()
    original.train()
    converted.blocks[0].train()
    before = [[m.training for m in model.modules()] for model in (original, converted)]
    fidelity(original, converted, [pictures()])
    assert [[m.training for m in model.modules()] for model in (original, converted)] == before
    assert not any(model.get_submodule("blocks.0.attn.proj")._forward_pre_hooks for model in (original, converted))


def test_modes_are_restored_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout()).train()
    with pytest.raises(KeyError), evaluating(model):
        assert not model[0].training
        raise KeyError
    assert model.training
    assert model[0].training


def test_the_first_site_that_is_not_finite_is_named() -> None:
    original, converted = pair()
    with torch.no_grad():
        converted.blocks[1].attn.core.mixer.w1.fill_(float("nan"))
    with pytest.raises(EvaluationError, match=r"not finite; blocks\.1\.attn went first"):
        fidelity(original, converted, [pictures()])
    assert not original.blocks[0].attn.proj._forward_pre_hooks


def test_bad_input_is_named() -> None:
    original, converted = pair()
    with pytest.raises(EvaluationError, match="no images"):
        fidelity(original, converted, [])
    with pytest.raises(EvaluationError, match="got a str"):
        fidelity(original, converted, ["cat.png"])
    with pytest.raises(EvaluationError, match=r"\(32, 32\)"):
        fidelity(original, converted, [torch.zeros(32, 32)])
    with pytest.raises(ConversionError, match="not converted"):
        fidelity(original, original, [pictures()])
