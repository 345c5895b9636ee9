"""How sure a figure is: intervals, and tests of paired models.

    shares      Wilson's score interval: Wilson, "Probable inference, the law of succession, and statistical inference" (1927)
    pairs       McNemar's test, exact: under no difference, each image that only one of two models gets right is a fair coin;
                McNemar, "Note on the sampling error of the difference between correlated proportions" (1947)
    prompts     a test by flips of sign: under no difference, which of two models a prompt's difference favours is a fair coin
    seeds       Student's t interval of a mean over independent runs
    any figure  the bias-corrected and accelerated bootstrap: Efron, "Better bootstrap confidence intervals" (1987)
    many tests  Holm's step-down correction: Holm, "A simple sequentially rejective multiple test procedure" (1979)

A level is the share of experiments whose interval holds the truth, 0.95 where nothing else is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from lineate.mixers.base import Frozen


class Interval(Frozen):
    """A figure and the ends of its confidence interval, in the figure's own unit."""

    value: float
    low: float
    high: float


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """The share `successes / n` with Wilson's interval, which stays inside [0, 1] and holds for shares near its ends.

    Raises `ValueError` unless 0 <= successes <= n and n > 0.
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"a share needs 0 <= successes <= n and n > 0, got {successes} of {n}")
    from scipy.stats import binomtest

    interval = binomtest(successes, n).proportion_ci(_level(level), method="wilson")
    return Interval(value=successes / n, low=float(interval.low), high=float(interval.high))


def mcnemar(only_a: int, only_b: int) -> float:
    """The chance, two-sided, of as uneven a split of the images that one model alone gets right: `only_a`, `only_b`.

    Exact (binomial), so it holds for few images too; 1 if there are none.
    """
    if only_a < 0 or only_b < 0:
        raise ValueError(f"counts of images must not be negative, got {only_a} and {only_b}")
    from scipy.stats import binomtest

    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """The mean of independent runs, at least 2, with Student's interval: it takes them as drawn from a normal distribution."""
    n = _enough(values)
    from scipy.stats import t

    mean = math.fsum(values) / n
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
    reach = float(t.ppf((1 + _level(level)) / 2, n - 1)) * error
    return Interval(value=mean, low=mean - reach, high=mean + reach)


def bootstrap(
    *samples: Sequence[float],
    statistic: Callable[..., Any] | None = None,
    paired: bool = False,
    level: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Interval:
    """`statistic(*samples)` with its bootstrap interval; the mean of one sample, where none is given.

    The statistic takes arrays and `axis`, as numpy's do. `paired` draws the same positions in every sample. Values that are all
    alike have an interval without width. Raises `ValueError` for fewer than 2 values.
    """
    import numpy as np
    from scipy.stats import bootstrap as resample

    for values in samples:
        _enough(values)
    measure: Callable[..., Any] = np.mean if statistic is None else statistic
    arrays = tuple(np.asarray(values, dtype=np.float64) for values in samples)
    value = float(measure(*arrays, axis=-1))
    if all(np.ptp(array) == 0 for array in arrays):
        return Interval(value=value, low=value, high=value)
    found = resample(
        arrays, measure, paired=paired, vectorized=True, confidence_level=_level(level), n_resamples=resamples, method="BCa",
        batch=max(1, 10_000_000 // max(len(array) for array in arrays)), rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Interval(value=value, low=float(found.low), high=float(found.high))


def sign_flip(*groups: Sequence[float], flips: int = 9999, seed: int = 0) -> float:
    """The chance, two-sided, of as large a mean over groups of their mean differences, if each sign were a fair coin.

    By `flips` random draws, of which the data count as one more, so never 0. Raises `ValueError` without differences.
    """
    import numpy as np

    if not groups or not all(groups):
        raise ValueError("a test needs at least one difference in every group")
    values = np.concatenate([np.asarray(group, dtype=np.float64) / len(group) for group in groups])
    signs = np.random.default_rng(seed).integers(0, 2, (flips, len(values))) * 2.0 - 1
    extreme = int((np.abs(signs @ values) >= abs(values.sum()) - 1e-12).sum())
    return (1 + extreme) / (1 + flips)


def holm(p_values: Sequence[float]) -> list[float]:
    """Each p corrected for having looked at all of them: the chance that any true null falls below α stays α."""
    n = len(p_values)
    corrected, highest = [0.0] * n, 0.0
    for rank, index in enumerate(sorted(range(n), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (n - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def _level(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"a level lies between 0 and 1, got {level}")
    return level


def _enough(values: Sequence[float]) -> int:
    if len(values) < 2:
        raise ValueError(f"an interval needs at least 2 values, got {len(values)}")
    return len(values)
