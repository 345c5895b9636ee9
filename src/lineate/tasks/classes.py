"""Learning classes, from labelled images; measured by top-1 on held-out ones."""

from __future__ import annotations

from typing import Any

from lineate.convert import record
from lineate.evaluate import Progress
from lineate.evaluate.top1 import Top1
from lineate.linearize import calibrated, check_readable, crops, load_pair, made_with
from lineate.tasks.base import Say, Task, TrainPlan
from lineate.train.classify import lesson, match, measure_trained, open_splits
from lineate.train.loop import FitResult, Lesson
from lineate.train.randomness import HOST, derive, left_alone, seed_all


class Classification(Task):
    """A classifier of pictures."""

    unfit = ("vae", "cache", "limit")
    drops_path = True

    def __init__(self, plan: TrainPlan, say: Say) -> None:
        """Open both splits."""
        super().__init__(plan, say)
        if plan.photographs:
            check_readable(plan.photographs)
        self.splits = open_splits(
            plan.data, plan.held_out, held_out_split=plan.held_out_split, image_column=plan.image_column,
            label_column=plan.label_column, stream=plan.stream, strict=plan.strict,
        )  # fmt: skip

    def load(self) -> None:
        """Source and conversion; from scratch, the same weights in every process."""
        plan, splits = self.plan, self.splits
        with left_alone():
            seed_all(derive(HOST, plan.train.seed))
            scratch = len(splits.train.classes) if plan.scratch else None
            options = made_with(plan.train)
            self.pair = load_pair(plan.source, plan.conversion, image_size=plan.image_size, scratch=scratch, **options)
        self.model, self.name = self.pair.converted, self.pair.source.name
        self.splits = match(splits, self.model, drawn=plan.scratch, by_number=plan.labels_by_number, say=self.say)

    @property
    def pictures(self) -> int:
        """Those of the split, or of an epoch of a stream."""
        return self.splits.pictures

    def check(self, processes: int) -> None:
        """By making the lesson, too."""
        super().check(processes)
        plan = self.plan
        distills = plan.train.distill.logits or plan.train.distill.features
        self.taught = lesson(self.pair.source, self.splits, plan.train, self.pair.original if distills else None)

    def calibrate(self, progress: Progress) -> dict[str, Any] | None:
        """On the photographs, if there are any."""
        plan = self.plan
        if not plan.photographs:
            return None
        pool = crops(self.pair.source, plan.photographs, plan.calibration, plan.calibration.seed)
        self.say(f"calibrating {len(record(self.model).sites)} sites on {pool.count} crops of {len(pool.paths)} photographs")
        done = calibrated(self.model, pool, plan.calibration, progress)
        if done["skipped"]:
            self.say(f"skipped {len(done['skipped'])} unreadable: {', '.join(done['skipped'])}")
        return done

    def lesson(self, together: Any, progress: Progress) -> Lesson:
        """Classification, or distillation from the original."""
        self.say(f"training on {self.splits.pictures} pictures of {len(self.splits.train.classes)} classes")
        return self.taught

    def measure(self) -> Top1:
        """Top-1 on the held-out pictures."""
        held_out = self.splits.held_out
        self.say(f"measuring on {len(held_out)} held-out pictures of {held_out.source}, split {held_out.split}")
        return measure_trained(self.model, self.pair.source, self.splits, self.plan.train, self.taught).figures

    def told(self, result: FitResult, figures: Any) -> dict[str, Any]:
        """Both splits."""
        plan, splits, skipped = self.plan, self.splits, result.skipped | figures.skipped
        if skipped:
            self.say(f"skipped {len(skipped)} unreadable: {', '.join(skipped)}")
        return {
            "data": {"train": plan.data, "held_out": plan.held_out or plan.data, "held_out_split": splits.held_out.split},
            "images": {"train": splits.pictures, "held_out": figures.images, "skipped": skipped},
        }

    @property
    def image_size(self) -> int:
        """That of the source."""
        return self.pair.source.image_size
