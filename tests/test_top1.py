"""Accuracy is what it says: every readable image counts once, in timm's preprocessing, however the work is divided."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from scipy.stats import binomtest
from torch import Tensor, nn

from lineate.data import DataError, LabelledImages, open_data
from lineate.evaluate import EvaluationError
from lineate.evaluate.top1 import Preprocessing, classes, compare, logits, prepare, processes, top_k
from lineate.sources import Source

CLASSES = 8
PREPARED = Preprocessing(
    image_size=32, crop_pct=0.9, crop_mode="center", interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)


def write(root: Path, count: int = 24, classes: int = CLASSES) -> Path:
    draw = torch.Generator().manual_seed(1)
    for i in range(count):
        folder = root / f"class{i % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (40, 48, 3), dtype=torch.uint8, generator=draw)
        Image.frombytes("RGB", (48, 40), bytes(pixels.flatten().tolist())).save(folder / f"{i:02}.png")
    return root


@pytest.fixture
def data(tmp_path: Path) -> LabelledImages:
    return open_data(write(tmp_path / "data"), split=None)


@pytest.fixture
def model(tiny_vit: Callable[..., nn.Module]) -> nn.Module:
    made = tiny_vit(num_classes=CLASSES)
    for parameter in made.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return made


def by_hand(model: nn.Module, data: LabelledImages) -> Tensor:
    transform = PREPARED.transform()
    with torch.no_grad():
        return torch.cat([model(transform(data[i][0])[None]) for i in range(len(data))]).double()


def test_figures_equal_their_definition(model: nn.Module, data: LabelledImages) -> None:
    scores, labels = by_hand(model, data), data.labels
    found = top_k(model, data, PREPARED.transform(), batch=5)
    order = scores.argsort(-1, descending=True)
    top1, top5 = int((order[:, 0] == labels).sum()), int((order[:, :5] == labels[:, None]).sum())
    assert 0 < top1 < top5 < 24
    figures = found.figures
    assert (figures.images, figures.top1.value, figures.skipped) == (24, top1 / 24, {})
    assert figures.top5 is not None and figures.top5.value == top5 / 24
    low, high = binomtest(top1, 24).proportion_ci(method="wilson")
    assert (figures.top1.low, figures.top1.high) == pytest.approx((low, high))
    picked = scores.log_softmax(-1)[torch.arange(24), labels]
    assert figures.loss == pytest.approx(-picked.mean().item(), rel=1e-5)
    assert torch.equal(found.guesses, order[:, :5]) and torch.equal(found.labels, labels)
    assert torch.equal(found.correct, order[:, 0] == labels) and found.positions.tolist() == list(range(24))


@pytest.mark.parametrize(("batch", "workers"), [(1, 0), (7, 2), (100, 1)])
def test_batches_and_workers_do_not_matter(model: nn.Module, data: LabelledImages, batch: int, workers: int) -> None:
    steps: list[tuple[int, int]] = []
    whole = top_k(model, data, PREPARED.transform(), batch=24)
    other = top_k(
        model,
        data,
        PREPARED.transform(),
        batch=batch,
        workers=workers,
        progress=lambda done, total, _: steps.append((done, total)),
    )
    assert torch.equal(whole.guesses, other.guesses) and whole.figures.top1 == other.figures.top1
    assert whole.figures.loss == pytest.approx(other.figures.loss, rel=1e-6)
    total = -(-24 // batch)
    assert steps == [(done, total) for done in range(1, total + 1)]


def test_five_guesses_of_five_say_nothing(tiny_vit: Callable[..., nn.Module], tmp_path: Path) -> None:
    data = open_data(write(tmp_path, count=10, classes=5), split=None)
    found = top_k(tiny_vit(num_classes=5), data, PREPARED.transform())
    assert found.figures.top5 is None and found.guesses.shape == (10, 5)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_counts_nowhere_but_among_the_skipped(model: nn.Module, data: LabelledImages, workers: int) -> None:
    whole = top_k(model, data, PREPARED.transform())
    paths = [data.images[position]["image"]["path"] for position in (4, 23)]
    for path in paths:
        Path(path).write_bytes(b"nonsense")
    found = top_k(model, data, PREPARED.transform(), batch=5, workers=workers)
    kept = torch.tensor([position for position in range(24) if position not in (4, 23)])
    assert found.positions.tolist() == kept.tolist() and torch.equal(found.guesses, whole.guesses[kept])
    assert found.figures.images == 22 and found.figures.top1.value == whole.correct[kept].sum() / 22
    assert sorted(found.figures.skipped) == sorted(data.skipped) == sorted(paths)
    data.strict = True
    with pytest.raises(DataError, match=r"class1/.*\.png cannot be read") as raised:
        top_k(model, data, PREPARED.transform(), batch=5, workers=workers)
    assert "Traceback" not in str(raised.value)


def test_nothing_to_read_is_an_error(model: nn.Module, tmp_path: Path) -> None:
    root = write(tmp_path, count=2)
    data = open_data(root, split=None)
    for path in root.rglob("*.png"):
        path.write_bytes(b"nonsense")
    with pytest.raises(EvaluationError, match=r"none of the 2 pictures of .* can be read; the first: .* cannot be read"):
        top_k(model, data, PREPARED.transform())


@pytest.mark.parametrize("world", [2, 3, 5])
def test_each_process_takes_its_share_and_as_many_batches(
    model: nn.Module, data: LabelledImages, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processes one after the other here, their rows put together by hand: each image once, equal work for each."""
    gathered: list[list[Tensor]] = [[], []]
    monkeypatch.setattr("accelerate.utils.gather", lambda tensor: gathered[tensor.is_floating_point()].append(tensor) or tensor)
    monkeypatch.setattr("accelerate.utils.gather_object", lambda found: found)
    small = data.limited(22)
    for rank in range(world):
        top_k(model, small, PREPARED.transform(), accelerator=SimpleNamespace(process_index=rank, num_processes=world))
    rows = torch.cat(gathered[0])
    assert {len(part) for part in gathered[0]} == {-(-22 // world)}
    held = rows[rows[:, 1] >= 0]
    assert sorted(held[:, 0].tolist()) == list(range(22)) and len(rows) - len(held) == -22 % world


def test_one_process_that_was_to_be_several_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `accelerate launch --cpu --num_processes 2` leaves the environment, and with one process."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert processes(torch.device("cpu")) is None
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(EvaluationError, match=r"starts one on CPUs; .* torchrun --nproc-per-node=N -m lineate"):
        processes(torch.device("cpu"))
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert processes(torch.device("cpu")) is None


def test_the_model_comes_back_as_it_was(model: nn.Module, data: LabelledImages) -> None:
    model.train()
    model.blocks[0].eval()
    before = [module.training for module in model.modules()]
    top_k(model, data.limited(1), PREPARED.transform())
    assert [module.training for module in model.modules()] == before


def test_what_cannot_be_measured_is_named(model: nn.Module, data: LabelledImages, tiny_vit: Callable[..., nn.Module]) -> None:
    with pytest.raises(EvaluationError, match="label 7 is beyond the 5 classes of the model"):
        top_k(tiny_vit(num_classes=5), data, PREPARED.transform())
    with pytest.raises(EvaluationError, match=r"VisionTransformer gives no logits \(B, K\), but a Tensor"):
        logits(tiny_vit(num_classes=0, global_pool=""), torch.zeros(1, 3, 32, 32))
    with torch.no_grad():
        model.head.bias[3] = float("nan")
    with pytest.raises(EvaluationError, match="not finite, first for picture 0"):
        top_k(model, data, PREPARED.transform())


def test_transformers_outputs_hold_logits_and_only_classifiers_have_classes(data: LabelledImages) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, image_size=32, patch_size=8,
        num_labels=CLASSES,
    )  # fmt: skip
    classifier = transformers.ViTForImageClassification(config).eval()
    assert classes(classifier) == CLASSES and classes(transformers.ViTModel(config)) == 0
    found = top_k(classifier, data, PREPARED.transform())
    bare = SimpleNamespace(model=classifier, head=lambda x: classifier(pixel_values=x).logits)
    assert torch.equal(found.guesses[:, 0], by_hand(bare.head, data).argmax(-1))


def test_classes_of_timm_models(tiny_vit: Callable[..., nn.Module]) -> None:
    assert classes(tiny_vit(num_classes=7)) == 7
    assert classes(tiny_vit(num_classes=0)) == classes(nn.Linear(2, 2)) == 0


def test_preprocessing_is_timms_own(data: LabelledImages) -> None:
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False)
    source = Source(model, "timm:x", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 224, 16)
    theirs = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    picture = data[0][0]
    assert torch.equal(prepare(source).transform()(picture), theirs(picture))
    assert prepare(source).crop_pct == model.pretrained_cfg["crop_pct"] == 0.9
    other = prepare(source, crop_pct=0.5)
    assert other.crop_pct == 0.5 and not torch.equal(other.transform()(picture), theirs(picture))
    with pytest.raises(EvaluationError, match=r"0 < crop_pct <= 1, got 87.5"):
        prepare(source, crop_pct=87.5)


def test_a_model_without_a_classifier_is_refused(tiny_vit: Callable[..., nn.Module]) -> None:
    source = Source(tiny_vit(num_classes=0), "timm:x", (0.5,) * 3, (0.5,) * 3, 32, 8)
    with pytest.raises(EvaluationError, match="timm:x has no classifier"):
        prepare(source)


def test_pairs_are_counted_image_by_image(model: nn.Module, data: LabelledImages) -> None:
    changed: Any = copy.deepcopy(model)
    with torch.no_grad():
        changed.head.weight += 0.5 * torch.randn_like(changed.head.weight)
    a, b = (top_k(one, data, PREPARED.transform()) for one in (model, changed))
    found = compare(a, b)
    right = [(x, y) for x, y in zip(a.correct.tolist(), b.correct.tolist(), strict=True)]
    assert (found.only_original, found.only_converted) == (right.count((True, False)), right.count((False, True)))
    assert found.only_original + found.only_converted > 0
    assert found.p == pytest.approx(binomtest(found.only_original, found.only_original + found.only_converted).pvalue)
    assert found.agreement.value == (a.guesses[:, 0] == b.guesses[:, 0]).double().mean()
    assert (found.original, found.converted) == (a.figures, b.figures)

    same = compare(a, a)
    assert (same.agreement.value, same.only_original, same.only_converted, same.p) == (1, 0, 0, 1)
    with pytest.raises(EvaluationError, match=r"different images \(24 and 12\)"):
        compare(a, top_k(model, data.limited(12), PREPARED.transform()))
