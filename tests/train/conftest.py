"""Forty small pictures in five classes, and a converted model of five classes to train on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import lineate
from lineate.data import LabelledImages, open_data
from lineate.train.config import TrainConfig
from lineate.train.data import ImageBatches
from lineate.train.loop import FitResult, fit
from lineate.train.objectives import objective

GREY = (0.5, 0.5, 0.5)


def draw_pictures(folder: Path, each: int = 8) -> Path:
    """Five classes of noise, each around a colour of its own."""
    draw = torch.Generator().manual_seed(0)
    colours = torch.tensor([[200, 0, 0], [0, 200, 0], [0, 0, 200], [200, 200, 0], [0, 200, 200]], dtype=torch.uint8)
    for label in range(5):
        (folder / f"class{label}").mkdir(parents=True)
        for i in range(each):
            pixels = torch.randint(40, (32, 32, 3), dtype=torch.uint8, generator=draw) + colours[label]
            Image.frombytes("RGB", (32, 32), bytes(pixels.flatten().tolist())).save(folder / f"class{label}" / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("pictures") / "all")


@pytest.fixture
def pictures(folder: Path) -> LabelledImages:
    return open_data(folder, split=None)


@pytest.fixture
def converted(tiny_vit: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """A maker of one and the same converted model."""

    def make(conversion: Any = "t5", **changes: Any) -> nn.Module:
        torch.manual_seed(0)
        return lineate.convert(tiny_vit(**changes), conversion)

    return make


@pytest.fixture
def small() -> Callable[..., TrainConfig]:
    """Five steps an epoch, two epochs, in this process alone."""

    def make(**changes: Any) -> TrainConfig:
        return TrainConfig(**({"epochs": 2, "batch": 8, "lr": 1e-3, "workers": 0, "tracker": "none"} | changes))

    return make


@pytest.fixture
def train(pictures: LabelledImages) -> Callable[..., FitResult]:
    """`fit` on the pictures, with the config's own objective where no other is given."""

    def run(model: nn.Module, config: TrainConfig, out: Path, **more: Any) -> FitResult:
        minimised = more.pop("objective", None) or objective(config, len(pictures.classes))
        return fit(model, ImageBatches(pictures, config, size=32, mean=GREY, std=GREY), minimised, config, out, **more)

    return run
