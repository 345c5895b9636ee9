"""Scores by tag: means as defined, intervals that do not flatter, and two models compared prompt by prompt."""

from __future__ import annotations

import numpy as np
import pytest

from lineate.evaluate import EvaluationError
from lineate.evaluate.tally import Judged, compare, tally
from lineate.statistics import wilson


def prompts(**tags: list[tuple[float, ...]]) -> list[Judged]:
    return [Judged(tag=tag, prompt=f"{tag} {k}", scores=scores) for tag, group in tags.items() for k, scores in enumerate(group)]


def test_overall_is_the_mean_of_tags_however_many_prompts_each_has() -> None:
    found = tally(prompts(a=[(1, 1), (0, 1), (1, 0), (0, 0)], b=[(1, 1), (1, 0)]))
    assert (found.prompts, found.pictures) == (6, 12)
    assert list(found.tags) == ["a", "b"]
    assert found.tags["a"].value == 0.5 and found.tags["b"].value == 0.75 and found.overall.value == 0.625
    assert found.tags["a"].low < 0.5 < found.tags["a"].high


def test_all_right_is_not_certainty_and_one_prompt_tells_little() -> None:
    found = tally(prompts(a=[(1, 1)] * 8, b=[(0, 1)]))
    assert found.tags["a"] == wilson(8, 8)
    assert (found.tags["b"].value, found.tags["b"].low, found.tags["b"].high) == (0.5, 0, 1)
    assert found.overall.value == 0.75


def test_pictures_of_one_prompt_do_not_narrow_the_interval() -> None:
    """Four pictures that are always alike tell no more than one."""
    draw = np.random.default_rng(0).integers(0, 2, 60).tolist()
    one, four = tally(prompts(a=[(k,) for k in draw])), tally(prompts(a=[(k,) * 4 for k in draw]))
    assert one.overall == four.overall


def test_a_difference_is_found_where_prompts_agree_on_it() -> None:
    draw = np.random.default_rng(1)
    base = draw.uniform(0.2, 0.6, 50)
    first = prompts(a=[(v,) for v in base], b=[(v,) for v in base])
    second = prompts(a=[(v + 0.1,) for v in base], b=[(v,) for v in draw.permutation(base)])
    found = compare(first, second)
    assert found.tags["a"].value.value == pytest.approx(0.1) and found.tags["a"].p == pytest.approx(2e-4)  # 1e-4, twice by Holm
    assert found.tags["b"].value.low < 0 < found.tags["b"].value.high and found.tags["b"].p > 0.05
    assert found.overall.value.value == pytest.approx(0.05) and found.overall.value.low < 0.05 < found.overall.value.high
    assert compare(first, first).overall.p == 1.0
    assert compare(second, first).overall.p == pytest.approx(found.overall.p)


def test_only_the_same_prompts_are_compared() -> None:
    with pytest.raises(EvaluationError, match="prompt 0 is 'a 0' here and 'b 0' there"):
        compare(prompts(a=[(1,)]), prompts(b=[(1,)]))
    with pytest.raises(EvaluationError, match="1 prompts here and 2 there"):
        compare(prompts(a=[(1,)]), prompts(a=[(1,), (0,)]))
    with pytest.raises(EvaluationError, match="no prompts"):
        tally([])
