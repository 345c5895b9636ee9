"""Learning to denoise pictures of classes, as latents or as pixels, that are made ready once and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lineate.convert import Conversion, convert
from lineate.data import open_data
from lineate.evaluate import Progress
from lineate.families import detect
from lineate.generation.classes import denoiser, remember
from lineate.labels import is_numbered, match_classes
from lineate.sources import load_denoiser
from lineate.tasks.base import Say, Task, TrainPlan
from lineate.text2image.autoencoder import GenerateError, load_autoencoder, pixels_a_latent
from lineate.train import TrainError
from lineate.train.config import Distill
from lineate.train.diffusion import denoising
from lineate.train.latents import CachedBatches, cache, check_flips
from lineate.train.loop import FitResult, Lesson
from lineate.train.randomness import HOST, derive, left_alone, seed_all

LATENTS_OF_PX = 256  # the pictures that a DiT drawn anew learns through an autoencoder, where nothing else is said


class Denoising(Task):
    """A class-conditional denoiser; it is measured by its pictures, with `lineate generate` and `lineate fid`."""

    unfit = ("held_out", "held_out_split", "photographs", "stream", "limit")

    def __init__(self, plan: TrainPlan, say: Say) -> None:
        """Open pictures and autoencoder."""
        super().__init__(plan, say)
        if plan.train.distill != Distill():
            raise TrainError("distill is for classifiers; leave it out")
        if plan.train.denoise.taught:
            raise TrainError("denoise.taught is for pipelines of text to image; leave it out")
        self.data = open_data(
            plan.data, split="train", image_column=plan.image_column, label_column=plan.label_column, strict=plan.strict
        )
        self.vae: Any = load_autoencoder(plan.vae) if plan.vae is not None else None
        self.folder = plan.cache or plan.out.with_name(f"{plan.out.name}.cache")

    def load(self) -> None:
        """Denoiser and conversion; from scratch, the same weights in every process."""
        plan = self.plan
        with left_alone():
            seed_all(derive(HOST, plan.train.seed))
            model = load_denoiser(plan.source, drawn=self._arguments() if plan.scratch else None)
        if getattr(model, "lineate_record", None) is None:
            model = convert(model, plan.conversion or Conversion())
        self.model, self.name, self.made_by = model, plan.source, denoiser(model)
        side = self.image_size // self._factor
        self.made_by = denoiser(model, (side, side))
        remember(model, plan.train.denoise.objective, (side, side))
        family = detect(model)
        names = self.data.classes if plan.scratch else family.class_names(model)
        self.data = match_classes(self.data, self.made_by.classes, names, by_number=plan.labels_by_number, say=self.say)
        if not is_numbered(self.data.classes):
            family.name_classes(model, self.data.classes)
        channels = self.made_by.shape[0]
        if channels != self._channels:
            through = "the autoencoder" if self.vae is not None else "pixels, without --vae,"
            raise GenerateError(f"the model denoises {channels} channels, and {through} gives {self._channels}")
        if self.made_by.null is None and plan.train.denoise.dropout:
            raise TrainError("denoise.dropout needs a model with a null label; choices here: 0")

    def _arguments(self) -> dict[str, Any]:
        """What the data and the objective say of a DiT that is drawn."""
        plan, config = self.plan, self.plan.train.denoise
        side = plan.image_size or (LATENTS_OF_PX if self.vae is not None else None)
        if side is None:
            raise TrainError("a DiT of pixels that is drawn anew needs the side of its pictures; give --image-size")
        return {
            "input_size": side // self._factor,
            "in_channels": self._channels,
            "num_classes": len(self.data.classes),
            "class_dropout_prob": config.dropout,
            "learn_sigma": config.objective == "ddpm",
        }

    @property
    def _channels(self) -> int:
        return 3 if self.vae is None else int(self.vae.config.latent_channels)

    @property
    def _factor(self) -> int:
        return pixels_a_latent(self.vae)

    @property
    def image_size(self) -> int:
        """As asked, or what the model was made for."""
        return self.plan.image_size or self.made_by.shape[-1] * self._factor

    @property
    def pictures(self) -> int:
        """All of the split."""
        return len(self.data)

    def check(self, processes: int) -> None:
        """By how pictures are varied, too."""
        check_flips(self.plan.train)
        super().check(processes)

    def lesson(self, together: Any, progress: Progress) -> Lesson:
        """Noise or velocity on the cache, which is made here where it is not there."""
        plan, data = self.plan, self.data
        self.say(f"making {len(data)} pictures of {len(data.classes)} classes ready in {self.folder}, as far as they are not")
        device = next(self.model.parameters()).device
        vae = self.vae.to(device) if self.vae is not None else None
        cache(
            data, self.folder, size=self.image_size, vae=vae, workers=plan.train.workers, accelerator=together, say=self.say,
            progress=progress,
        )  # fmt: skip
        self.vae = vae.cpu() if vae is not None else None
        batches = CachedBatches(self.folder, plan.train)
        data.note(batches.skipped)
        return Lesson(batches, denoising(self.made_by.null, plan.train.denoise))

    def told(self, result: FitResult, figures: Any) -> dict[str, Any]:
        """The pictures and where they are kept."""
        plan, skipped = self.plan, result.skipped
        if skipped:
            self.say(f"skipped {len(skipped)} unreadable: {', '.join(skipped)}")
        vae: Path | None = plan.vae
        return {
            "data": {"train": plan.data, "cache": str(self.folder), "autoencoder": str(vae) if vae else None},
            "images": {"train": len(self.data), "skipped": skipped},
        }
