"""Randomness without a history: each draw depends on what is drawn for, never on what was drawn before.

    sample   (seed, epoch, picture, repeat)      step   (seed, step, micro-batch among all processes')      order   (seed, epoch)

So a run that is resumed needs no generator's state, and the number of loader workers changes nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

ORDER, SAMPLE, STEP, ADAPTER, IMAGE, HOST, TRAJECTORY = range(
    7
)  # what is drawn, so that equal numbers of two kinds give unequal seeds


def derive(kind: int, *numbers: int) -> int:
    """A seed of 32 bits from the numbers, well mixed."""
    return int(np.random.SeedSequence((kind, *numbers)).generate_state(1)[0])


def seed_all(seed: int, *, cuda: bool = True) -> None:
    """Seed the generators of random, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    if cuda:
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


@contextmanager
def left_alone() -> Iterator[None]:
    """Every generator afterwards as it was before."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
