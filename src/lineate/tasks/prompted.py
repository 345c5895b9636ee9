"""Learning to draw what a text says, from captioned pictures: a Stable Diffusion 3 pipeline's transformer, all else frozen."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from lineate import checkpoint
from lineate.convert import Conversion, convert
from lineate.evaluate import Progress
from lineate.tasks.base import Say, Task, TrainPlan
from lineate.text2image.captioned import open_captioned
from lineate.text2image.pipelines import encoders, load_pipeline, put_aside
from lineate.train import TrainError
from lineate.train.config import Distill
from lineate.train.loop import FitResult, Lesson
from lineate.train.pairs import PairBatches, cache_pairs, check_unvaried, find_sizes
from lineate.train.rectified import rectified_flow


class Prompted(Task):
    """A text-to-image model; it is measured by its pictures, with `lineate generate --prompts`."""

    unfit = (
        "held_out", "held_out_split", "image_column", "label_column", "labels_by_number", "photographs", "stream",
        "vae", "scratch", "strict",
    )  # fmt: skip

    def __init__(self, plan: TrainPlan, say: Say) -> None:
        """Open the pictures."""
        super().__init__(plan, say)
        if plan.train.distill != Distill():
            raise TrainError("distill is for classifiers; train.denoise.taught is for what a denoiser learns from its original")
        check_unvaried(plan.train)
        self.data = open_captioned(plan.data)
        self.data = self.data if plan.limit is None else self.data.first(plan.limit)
        self.folder = plan.cache or plan.out.with_name(f"{plan.out.name}.cache")

    def load(self) -> None:
        """The pipeline, its transformer converted; and a copy of the original where that is learned from."""
        plan = self.plan
        self.pipe = load_pipeline(plan.source)
        model: nn.Module = self.pipe.transformer
        converted = getattr(model, "lineate_record", None) is not None
        self.teacher = None
        if plan.train.denoise.taught:
            self.teacher = copy.deepcopy(checkpoint.original_of(model) if converted else model)
        self.model = model if converted else convert(model, plan.conversion or Conversion())
        self.name = plan.source

    def check(self, processes: int) -> None:
        """By the sizes that the transformer has positions for, too."""
        find_sizes(self.pipe, self.image_size)
        super().check(processes)

    @property
    def pictures(self) -> int:
        """All, whatever their sizes."""
        return len(self.data)

    @property
    def image_size(self) -> int:
        """As asked, or what the model was made for; pictures of other aspects have about as many pixels."""
        return self.plan.image_size or int(self.pipe.transformer.config.sample_size * self.pipe.vae_scale_factor)

    def lesson(self, together: Any, progress: Progress) -> Lesson:
        """Rectified flow on the cache, which is made here where it is not there."""
        pipe, config = self.pipe, self.plan.train
        self.say(f"making {len(self.data)} captioned pictures ready in {self.folder}, as far as they are not")
        place = next(self.model.parameters()).device
        for part in encoders(pipe):
            part.to(place)
        cache_pairs(self.data, self.folder, pipe, side=self.image_size, accelerator=together, say=self.say, progress=progress)
        put_aside(pipe)
        batches = PairBatches(self.folder, config)
        objective = rectified_flow(
            batches.empty, shift=float(pipe.scheduler.config.shift), dropout=config.denoise.dropout, teacher=self.teacher,
            taught=config.denoise.taught,
        )  # fmt: skip
        self.say(f"training on {len(self.data)} captioned pictures of {len(batches.sizes)} sizes")
        return Lesson(batches, objective)

    def told(self, result: FitResult, figures: Any) -> dict[str, Any]:
        """The pictures and where they are kept."""
        if result.skipped:
            self.say(f"skipped {len(result.skipped)} unreadable: {', '.join(result.skipped)}")
        return {
            "data": {"train": self.plan.data, "cache": str(self.folder)},
            "images": {"train": len(self.data), "skipped": result.skipped},
        }
