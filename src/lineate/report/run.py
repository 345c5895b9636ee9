"""run.json as the report reads it: what `lineate linearize` leaves in RUN, checked before anything is drawn.

The writer's own classes live beside torch, which a report must do without, so the fields are named here a second time.
Unknown keys are passed over: an older report can then show a newer run. A null where a number must be is a NaN (JSON has
none); it is shown as "not finite". Units are in the names; a relative error is ‖converted - original‖ / ‖original‖.
"""

from __future__ import annotations

import json
import math
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

Number = Annotated[float, BeforeValidator(lambda value: float("nan") if value is None else value)]
Kind = Literal["pca", "attention", "saliency"]


class ReportError(ValueError):
    """The run cannot be reported; the message names the file and what is wrong with it."""


class Part(BaseModel):
    """A part of run.json: immutable, indifferent to keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class SiteError(Part):
    """Relative error of one core's output on the calibration images, before and after its fit."""

    before: Number
    after: Number


class Calibration(Part):
    """What calibration did."""

    sites: dict[str, SiteError]
    steps: int
    images: int
    seconds: Number


class Fidelity(Part):
    """Agreement of the converted model with the original on held-out images; None where the model has no such output."""

    images: int
    tokens: int
    patch_cosine: Number
    patch_cosine_worst: Number
    pooled_cosine: Number
    class_cosine: float | None = None
    agreement: float | None = None
    kl: float | None = None
    sites: dict[str, Number]


class CostRow(Part):
    """One image size: medians and interquartile ranges of a forward pass, multiply-adds, peak memory."""

    height: int = Field(gt=0)
    width: int = Field(gt=0)
    tokens: int
    repeats: int | None = None
    original_ms: Number
    converted_ms: Number
    original_iqr_ms: Number
    converted_iqr_ms: Number
    speedup: Number
    original_gmacs: float | None = None
    converted_gmacs: float | None = None
    converted_operator_gmacs: float | None = None  # what the operator needs, where the code that runs does more
    original_peak_mib: float | None = None
    converted_peak_mib: float | None = None

    @property
    def operator_runs_as_is(self) -> bool:
        """Whether the code does the operator's own multiply-adds and no more, as it shows with two decimals."""
        operator, runs = self.converted_operator_gmacs, self.converted_gmacs
        return operator is None or runs is None or abs(operator - runs) < 0.005

    @property
    def side_px(self) -> float:
        """Side of the square with as many pixels."""
        return math.sqrt(self.height * self.width)


class Cost(Part):
    """Original and converted model timed side by side."""

    rows: tuple[CostRow, ...]
    crossover_px: float | None = None
    crossover_note: str
    device: str
    dtype: str
    batch: int | None = None
    original_attention: str | None = None


class Interval(Part):
    """A share of one with the ends of its confidence interval."""

    value: Number
    low: Number
    high: Number


class Accuracy(Part):
    """One model on held-out labelled images; `loss` in nats an image."""

    images: int
    top1: Interval
    top5: Interval | None = None
    loss: Number


class Paired(Part):
    """Original and trained model on the same labelled images; `p` is McNemar's."""

    original: Accuracy
    converted: Accuracy
    agreement: Interval | None = None
    only_original: int
    only_converted: int
    p: Number


class Epoch(Part):
    """Means over the steps of an epoch of training; images and seconds count from its start."""

    epoch: Number
    images: int
    seconds: Number
    losses: dict[str, Number]
    metrics: dict[str, Number] = {}


class Training(Part):
    """What training on labels did; `learning` counts the parameters that learned."""

    history: tuple[Epoch, ...]
    steps: int
    images: int
    seconds: Number
    learning: int


class Count(Part):
    """How many tensors, and how many scalars in them."""

    tensors: int
    parameters: int


class Tensors(Part):
    """Where the converted model's tensors come from."""

    inherited: Count
    new: Count
    interpolated: Count
    dropped: Count


class Images(Part):
    """How many images were used for what, and which could not be read."""

    calibration: int
    held_out: int
    skipped: dict[str, str] = {}


class Results(Part):
    """What was measured."""

    tensors: Tensors
    sites: tuple[str, ...]
    calibration: Calibration | None = None
    fidelity_before: Fidelity | None = None
    fidelity: Fidelity
    cost: Cost | None = None
    key_shift: dict[str, Number] = {}
    training: Training | None = None
    held_out: Paired | None = None
    images: Images


class Config(Part):
    """The run's configuration, so that it can be repeated."""

    conversion: dict[str, Any]
    calibration: dict[str, Any] | None = None
    train: dict[str, Any] | None = None
    image_size: int
    sizes: tuple[tuple[int, int], ...] = ()


class Environment(Part):
    """Where the run was made."""

    python: str
    versions: dict[str, str]
    device: str
    platform: str
    commit: str | None = None
    dirty: bool | None = None


class Picture(Part):
    """A PNG below the run's folder."""

    file: str
    kind: Kind
    title: str
    caption: str


class Run(Part):
    """The whole of run.json."""

    lineate: str
    command: tuple[str, ...]
    created: datetime
    source: str
    preset: str | None
    seed: int
    config: Config
    environment: Environment
    seconds: dict[str, Number]
    results: Results
    pictures: tuple[Picture, ...] = ()

    @property
    def total_seconds(self) -> float:
        """Duration of the run; the sum of its phases where no total was noted."""
        return self.seconds.get("total", sum(self.seconds.values()))


def load_run(folder: Path) -> Run:
    """Read and check `folder`/run.json. Raises `ReportError` saying what is wrong in one line."""
    path = folder / "run.json"
    try:
        return Run.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first, others = error.errors()[0], error.error_count() - 1
        where = ".".join(map(str, first["loc"])) or "the top level"
        more = f" (and {others} more)" if others else ""
        raise ReportError(f"{path} is not a run of lineate: {where}: {first['msg']}{more}") from None
    except FileNotFoundError:
        raise ReportError(f"{folder} has no run.json; give the folder that `lineate linearize --out` wrote") from None
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ReportError(f"{path} is not JSON: {error}") from None
