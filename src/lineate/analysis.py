"""Looking inside: how far the keys are off-centre, which tokens a query draws on, and what the patch features look like.

    key shift            ‖mean_i k_i‖ / mean_i ‖k_i‖                     (equation 11: near 0 centred, near 1 one big shift)
    implicit attention   A(i, j) = ‖∂o_i/∂v_j‖_F / √D                    (equation 13, for any mixer)

For softmax attention ∂o_i/∂v_j = A_ij·I, whose Frobenius norm is √D·A_ij: hence the division, which makes the map the
attention matrix itself. Source: Li et al., arXiv 2605.02772, section 4.
Both read what really passes in a forward pass, in original, converted and partly converted models alike.

Legend: B batch, H heads, N tokens, D head dim, C = H·D channels, h×w grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lineate.convert import core_modules
from lineate.evaluate import EvaluationError, batches, evaluating
from lineate.families import Attended, detect

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def _sites(model: nn.Module) -> list[str]:
    return [site.name for site in detect(model).sites(model)]


@torch.inference_mode()
def key_shift(model: nn.Module, images: Iterable[Tensor], pooled: bool = False) -> dict[str, float]:
    """Key-shift ratio of every attention site, a mean over `images`: (3, h, w) or (B, 3, h, w), normalised, of any shapes.

    Equation 11: k_i is a grid token's whole key, all heads side by side (C), after the host's own key norm if it has one and
    rotary positions, and before a core's. Class and register tokens are left out. Raises `EvaluationError` if there are no
    images, `UnsupportedModelError` for an attention that hides its keys. `pooled`, which the paper does not speak of, takes one
    mean over the keys of all images in the place of each image's own: the part of the shift that they have in common.
    """
    family = detect(model)
    means: dict[str, list[Tensor]] = {site: [] for site in _sites(model)}
    sizes: dict[str, list[Tensor]] = {site: [] for site in means}
    prefix, run = family.geometry(model).prefix, family.runner(model)

    def note(site: str, attended: Attended) -> None:
        keys = attended.k[:, :, prefix:].transpose(1, 2).flatten(2).double()
        means[site] += keys.mean(dim=1)
        sizes[site] += keys.norm(dim=-1).mean(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)

    with evaluating(model), family.watch(model, means.keys(), note):
        for batch in batches(images, model):
            run(batch)
    return {site: _shift(torch.stack(means[site]), torch.stack(sizes[site]), pooled) for site in means}


def _shift(means: Tensor, sizes: Tensor, pooled: bool) -> float:
    """Of every image's mean key (B, C) and mean size of a key (B,)."""
    return float(means.mean(dim=0).norm() / sizes.mean()) if pooled else float((means.norm(dim=-1) / sizes).mean())


def _attended(model: nn.Module, image: Tensor, site: str) -> Attended:
    """What passes at a site in a forward pass over one picture."""
    (batch,) = batches([image], model)
    if len(batch) != 1:
        raise EvaluationError(f"an implicit attention map is of one picture, got a batch of {len(batch)}")
    family = detect(model)
    seen: list[Attended] = []
    watching = family.watch(model, [site], lambda _, attended: seen.append(attended))
    with torch.no_grad(), evaluating(model), watching:  # not inference_mode: autograd goes on from what is captured here
        family.runner(model)(batch)
    return seen[-1]


def _output(model: nn.Module, site: str, attended: Attended, query: int) -> Callable[[Tensor], Tensor]:
    """The function from values (1, H, N, D) to the query's output (H, D) at a site, with q and k held still."""
    q, k, core = attended.q, attended.k, core_modules(model).get(site)
    if core is not None:
        layout = cast(Any, model.get_submodule(site)).tracker.layout
        return lambda values: core(q, k, values, layout)[0, :, query]
    row = q[:, :, query : query + 1]  # softmax answers each query alone, so one row is all it takes
    return lambda values: F.scaled_dot_product_attention(row, k, values)[0, :, 0]


def implicit_attention(model: nn.Module, image: Tensor, site: str, query: int) -> Float[Tensor, "H N"]:
    """How much each token's value weighs in one query's output at `site`: A(query, j) for every head and token j, (H, N).

    `image` is (3, h, w) or (1, 3, h, w), normalised; `query` a token's index, class and register tokens first. One backward pass
    through the core for each of D output channels. Raises `EvaluationError` for an unknown site or a query that is not there.
    """
    if site not in (sites := _sites(model)):
        raise EvaluationError(f"no attention site {site!r}; sites: {', '.join(sites)}")
    attended = _attended(model, image, site)
    tokens = attended.v.shape[-2]
    if not 0 <= query < tokens:
        raise EvaluationError(f"query {query} is not a token: the picture has tokens 0 to {tokens - 1}")
    output = _output(model, site, attended, query)
    with torch.enable_grad():
        v = attended.v.detach().requires_grad_()
        out = output(v)
        squares = torch.zeros(v.shape[1:3], dtype=torch.float64, device=v.device)
        for channel in range(out.shape[-1]):  # heads do not mix in a core, so one pass serves them all
            (gradient,) = torch.autograd.grad(out[:, channel].sum(), v, retain_graph=True)
            squares += gradient[0].double().square().sum(dim=-1)
    return (squares / out.shape[-1]).sqrt().float()


def pca_basis(features: Float[Tensor, "N C"]) -> tuple[Float[Tensor, " C"], Float[Tensor, "C 3"]]:
    """The mean and the three leading principal directions of `features`, orthonormal columns, in fp64.

    A direction's sign is free: its largest entry is made positive, so that maps do not flip colours from run to run.
    """
    if min(features.shape) < 3:
        raise EvaluationError(f"three principal components need at least 3 tokens and 3 channels, got {tuple(features.shape)}")
    wide = features.detach().cpu().double()
    mean = wide.mean(dim=0)
    basis = torch.linalg.svd(wide - mean, full_matrices=False).Vh[:3].mT
    sign = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True)).sign()
    return mean, basis * sign


def pca_rgb(
    features_a: Float[Tensor, "N C"], features_b: Float[Tensor, "N C"], grid: tuple[int, int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two (h, w, 3) pictures in [0, 1] of patch features (h·w, C), comparable: basis and colour range are fitted on a alone.

    The range is a's 1st to 99th percentile of each component; what lies outside is clipped. Raises `EvaluationError` on shapes.
    """
    height, width = grid
    for features in (features_a, features_b):
        if features.ndim != 2 or len(features) != height * width:
            raise EvaluationError(f"features of shape {tuple(features.shape)} are not (h·w, C) for a {height}×{width} grid")
    mean, basis = pca_basis(features_a)
    maps = [(features.detach().cpu().double() - mean) @ basis for features in (features_a, features_b)]
    low, high = torch.quantile(maps[0], torch.tensor([0.01, 0.99], dtype=torch.float64), dim=0)
    span = (high - low).clamp_min(torch.finfo(torch.float64).tiny)
    a, b = (((m - low) / span).clamp(0, 1).unflatten(0, grid).numpy() for m in maps)
    return a, b
