"""How close a converted model stays to its host, on pictures that calibration did not see.

    features   cosine of the two models' final features: every patch token, the class token, the mean of the patch tokens
    sites      ‖o - o*‖ / ‖o*‖ over all pictures: o enters a site's output projection in the converted model, o* in the host,
               each model on its own stream, so that a site's figure carries the errors of the sites before it
    head       where both have a classifier: share of equal top-1 predictions, and KL(host ‖ converted) in nats

One pass over the pictures, one batch in memory, any picture shapes. Sums are taken in fp64.

Legend: B batch, N tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineate.convert import record
from lineate.evaluate import EvaluationError, batches, evaluating
from lineate.families import Attended, Features, Geometry, detect
from lineate.mixers.base import Frozen


class Fidelity(Frozen):
    """Agreement of a converted model with its host; cosines are means, 1 is perfect. See the module docstring.

    `tokens` counts the patch tokens compared. `patch_cosine_worst` is that of the picture that fared worst. `class_cosine` is
    None without a class token; `agreement` and `kl` (nats a picture) are None without a classifier.
    """

    images: int
    tokens: int
    patch_cosine: float
    patch_cosine_worst: float
    class_cosine: float | None
    pooled_cosine: float
    sites: dict[str, float]
    agreement: float | None
    kl: float | None


class _SiteErrors:
    """Squared error and squared size of what enters each site's output projection, summed over all that the two models saw."""

    def __init__(self, sites: tuple[str, ...]) -> None:
        self.expected: dict[str, Tensor] = {}
        self.error, self.size = dict.fromkeys(sites, 0.0), dict.fromkeys(sites, 0.0)

    def host(self, site: str, attended: Attended) -> None:
        """Note what the host has there."""
        self.expected[site] = attended.out

    def converted(self, site: str, attended: Attended) -> None:
        """Compare what the converted model has there."""
        host = self.expected.pop(site).double()
        error = float((attended.out.double() - host).square().sum())
        if not error < float("inf"):
            raise EvaluationError(f"the converted model's activations are not finite; {site} went first")
        self.error[site] += error
        self.size[site] += float(host.square().sum())

    def relative(self) -> dict[str, float]:
        """Relative error at each site."""
        tiny = torch.finfo(torch.float64).tiny
        return {site: (self.error[site] / max(self.size[site], tiny)) ** 0.5 for site in self.error}


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a.double(), b.double(), dim=-1)


def _compare_heads(host: Tensor, ours: Tensor) -> dict[str, Tensor]:
    """Top-1 agreement (0 or 1) and KL in nats for each picture, from the two models' logits (B, classes)."""
    host, ours = host.double().log_softmax(-1), ours.double().log_softmax(-1)
    kl = F.kl_div(ours, host, log_target=True, reduction="none").sum(-1)
    return {"agreement": (host.argmax(-1) == ours.argmax(-1)).double(), "kl": kl}


def _compare(a: Features, b: Features, geometry: Geometry) -> dict[str, Tensor]:
    """Every figure for one batch, (B,) each, and `patches` (B, patch tokens); `a` is the host's."""
    patches_a, patches_b = a.tokens[:, geometry.prefix :], b.tokens[:, geometry.prefix :]
    found = {"patches": _cosine(patches_a, patches_b), "pooled": _cosine(patches_a.double().mean(1), patches_b.double().mean(1))}
    if geometry.class_token:
        found["class"] = _cosine(a.tokens[:, 0], b.tokens[:, 0])
    if a.logits is not None and b.logits is not None:
        found |= _compare_heads(a.logits, b.logits)
    return found


@torch.inference_mode()
def fidelity(original: nn.Module, converted: nn.Module, images: Iterable[Tensor]) -> Fidelity:
    """Compare `converted` with `original`, its host, on `images`: normalised (3, h, w) or (B, 3, h, w) tensors of any shapes.

    Both models run in eval mode, which is restored. Raises `ConversionError` if `converted` is not, `EvaluationError` if there
    are no images or if the converted model's activations are not finite (the first such site is named).
    """
    tokens, count, worst = 0, 0, float("inf")
    totals: dict[str, float] = {}
    done = record(converted)
    host, ours = detect(original), detect(converted)
    geometry, sites = host.geometry(original), _SiteErrors(done.sites)
    watching = host.watch(original, done.sites, sites.host), ours.watch(converted, done.sites, sites.converted)
    with evaluating(original, converted), watching[0], watching[1]:
        for batch in batches(images, original):
            found = _compare(host.features(original, batch), ours.features(converted, batch), geometry)
            count += len(batch)
            tokens += found["patches"].numel()
            worst = min(worst, float(found["patches"].mean(1).min()))
            for name, figures in found.items():
                totals[name] = totals.get(name, 0.0) + float(figures.sum())
    means = {name: total / (tokens if name == "patches" else count) for name, total in totals.items()}
    return Fidelity(
        images=count,
        tokens=tokens,
        patch_cosine=means["patches"],
        patch_cosine_worst=worst,
        class_cosine=means.get("class"),
        pooled_cosine=means["pooled"],
        sites=sites.relative(),
        agreement=means.get("agreement"),
        kl=means.get("kl"),
    )
