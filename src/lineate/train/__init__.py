"""Training: what is converted learns from labels or from its original, in one loop for every kind of model.

Import from the modules: `lineate.train.loop.fit`, `lineate.train.config.TrainConfig`, `lineate.train.objectives`,
`lineate.train.data`; for generative models `lineate.train.diffusion` and `lineate.train.latents`. `lineate.recipes` names whole
configurations.
"""

from __future__ import annotations


class TrainError(ValueError):
    """Training that cannot begin, go on or be resumed; the message names the value, and what was kept."""
