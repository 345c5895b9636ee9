"""What a training can be about, one file a task; `lineate.finetune` does with each what all have in common.

`base.py` says what a task must tell; a source says which one it is.
"""

from __future__ import annotations

from lineate.sources import is_denoiser
from lineate.tasks.base import Say, Task, TrainPlan
from lineate.text2image.pipelines import is_pipeline


def task_of(plan: TrainPlan, say: Say) -> Task:
    """The task of the plan's source, its data opened."""
    if is_pipeline(plan.source):
        from lineate.tasks.prompted import Prompted

        return Prompted(plan, say)
    if is_denoiser(plan.source):
        from lineate.tasks.denoise import Denoising

        return Denoising(plan, say)
    from lineate.tasks.classes import Classification

    return Classification(plan, say)
