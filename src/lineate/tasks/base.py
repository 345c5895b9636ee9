"""The plan of a training, and the part of it that depends on what is learned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lineate import runs
from lineate.calibrate import CalibrationConfig
from lineate.convert import Conversion
from lineate.evaluate import Progress
from lineate.train import TrainError, protocols
from lineate.train.config import TrainConfig
from lineate.train.data import Ordered
from lineate.train.loop import FitResult, Lesson

Say = Callable[[str], None]


@dataclass(frozen=True)
class TrainPlan:
    """All that `train` needs to know. `conversion` is None for a source that is converted already.

    With `scratch` the host's weights are drawn, not pretrained: a baseline. The options at the end are for some tasks and are
    refused by the others. Of classes: `held_out`, the data to measure on where it is not a split of `data`, and `held_out_split`,
    which of its splits; `photographs`, calibrated on first; `stream`, so many pictures an epoch, read in passing. Of denoisers:
    `vae`, a folder of diffusers' AutoencoderKL, and `cache`, where pictures are kept made ready (None: beside `out`). Of texts:
    `limit`, so many pictures, the first.
    """

    source: str
    data: str
    out: Path
    conversion: Conversion | None
    train: TrainConfig
    calibration: CalibrationConfig
    scratch: bool = False
    preset: str | None = None
    recipe: str | None = None
    image_size: int | None = None
    strict: bool = False
    held_out_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    labels_by_number: bool = False
    resume: bool = False
    overwrite: bool = False
    device: str = "cpu"
    command: tuple[str, ...] = field(default_factory=lambda: tuple(runs.command_line()))
    held_out: str | None = None
    photographs: tuple[Path, ...] = ()
    stream: int | None = None
    vae: Path | None = None
    cache: Path | None = None
    limit: int | None = None


class Task(ABC):
    """What is learned, in one process of a training: the methods are called once each, in this order.

    `model` is the converted model from `load` on; `name` is that of its source.
    """

    unfit: tuple[str, ...] = ()  # the plan's options that mean nothing here
    drops_path = False  # whether train.drop_path means something here
    model: nn.Module
    name: str

    def __init__(self, plan: TrainPlan, say: Say) -> None:
        """Open the data. Raises `TrainError` for an option or a field of other tasks."""
        for option in self.unfit:
            if getattr(plan, option):
                raise TrainError(f"{option} means nothing to {type(self).__name__.lower()}; leave it out")
        if plan.train.drop_path is not None and not self.drops_path:
            raise TrainError("drop_path is for classifiers of timm's; leave it out")
        self.plan, self.say = plan, say

    @abstractmethod
    def load(self) -> None:
        """Load and convert `model`, on the CPU. Raises if it does not fit the data."""

    def check(self, processes: int) -> None:
        """Raise `TrainError` if the model cannot learn as asked, or the data do not fill one step of so many processes."""
        protocols.check(self.model, self.plan.train)
        Ordered(self.pictures, self.plan.train).steps(processes)

    @property
    @abstractmethod
    def pictures(self) -> int:
        """How many there are to learn from."""

    def calibrate(self, progress: Progress) -> dict[str, Any] | None:
        """Fit the new parameters first, where the plan asks for that; what RUN/calibration.json holds of it."""
        return None

    @abstractmethod
    def lesson(self, together: Any, progress: Progress) -> Lesson:
        """What the loop is given; `together` is accelerate's state of several processes, or None."""

    def measure(self) -> Any:
        """The trained model's figures, a pydantic model, by all processes together; None where none are taken."""
        return None

    @abstractmethod
    def told(self, result: FitResult, figures: Any) -> dict[str, Any]:
        """What run.json says of the data, once they were learned from and measured on."""

    @property
    def image_size(self) -> int:
        """Side of the pictures, px."""
        raise NotImplementedError
