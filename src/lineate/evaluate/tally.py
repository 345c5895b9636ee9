"""Scores of pictures made from prompts, gathered by tag: means, how sure they are, and two models on the same prompts.

tag       mean over its prompts of the mean over each one's pictures; overall: the mean over tags
interval  bootstrap over prompts, each tag by itself: pictures of one prompt are alike, and do not count as independent.
          A tag where every prompt is all right or all wrong has Wilson's; one with a single prompt that is neither has none
pairs     the same of the differences prompt by prompt; p by flips of sign, over tags after Holm
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lineate.evaluate import EvaluationError
from lineate.mixers.base import Frozen
from lineate.statistics import Interval, bootstrap, holm, sign_flip, wilson


class Judged(Frozen):
    """A prompt with a score from 0 to 1 for each of its pictures."""

    tag: str
    prompt: str
    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over pictures."""
        return sum(self.scores) / len(self.scores)


class Tally(Frozen):
    """Means with their 95 % intervals."""

    prompts: int
    pictures: int
    overall: Interval
    tags: dict[str, Interval]


class Difference(Frozen):
    """Second less first; `p` is the chance of as large a difference if there were none."""

    value: Interval
    p: float


class Comparison(Frozen):
    """How two models differ on the same prompts; the p of `tags` are corrected for there being several."""

    overall: Difference
    tags: dict[str, Difference]


def tally(judged: Sequence[Judged]) -> Tally:
    """The scores by tag, in the order in which tags come."""
    groups = _by_tag(judged, [of.mean for of in judged])
    return Tally(
        prompts=len(judged), pictures=sum(len(of.scores) for of in judged), overall=_overall(groups),
        tags={tag: _interval(values) for tag, values in groups.items()},
    )  # fmt: skip


def compare(first: Sequence[Judged], second: Sequence[Judged]) -> Comparison:
    """Raises `EvaluationError` unless both were asked the same prompts in the same order."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if (one.tag, one.prompt) != (other.tag, other.prompt):
            raise EvaluationError(
                f"prompt {index} is {one.prompt!r} here and {other.prompt!r} there; only the same can be compared"
            )
    if len(first) != len(second):
        raise EvaluationError(f"{len(first)} prompts here and {len(second)} there; only the same can be compared")
    groups = _by_tag(first, [other.mean - one.mean for one, other in zip(first, second, strict=True)])
    corrected = holm([sign_flip(values) for values in groups.values()])
    tags = {tag: Difference(value=_interval(groups[tag], -1.0), p=p) for tag, p in zip(groups, corrected, strict=True)}
    return Comparison(overall=Difference(value=_overall(groups), p=sign_flip(*groups.values())), tags=tags)


def _by_tag(judged: Sequence[Judged], values: Sequence[float]) -> dict[str, list[float]]:
    if not judged:
        raise EvaluationError("there are no prompts to score")
    groups: dict[str, list[float]] = {}
    for of, value in zip(judged, values, strict=True):
        groups.setdefault(of.tag, []).append(value)
    return groups


def _interval(values: Sequence[float], least: float = 0.0) -> Interval:
    """The mean of one tag's values, which lie between `least` and 1."""
    if least == 0 and set(values) in ({0.0}, {1.0}):
        return wilson(round(sum(values)), len(values))
    return bootstrap(values) if len(values) > 1 else Interval(value=values[0], low=least, high=1.0)


def _overall(groups: dict[str, list[float]]) -> Interval:
    """The mean of the means. A tag with one prompt cannot be resampled, and counts as it is."""
    several = [values for values in groups.values() if len(values) > 1]
    single = sum(values[0] for values in groups.values() if len(values) == 1)

    def mean_of_means(*samples: Any, axis: int) -> Any:
        return (sum(sample.mean(axis) for sample in samples) + single) / len(groups)

    if not several:
        value = single / len(groups)
        return Interval(value=value, low=value, high=value)
    return bootstrap(*several, statistic=mean_of_means)
