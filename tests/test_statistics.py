"""Intervals cover what they promise, and tests agree with published values and with their definitions."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from lineate.statistics import Interval, bootstrap, holm, mcnemar, mean_interval, sign_flip, wilson


def test_wilson_equals_the_published_example() -> None:
    # Newcombe, "Two-sided confidence intervals for the single proportion", 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29
    published = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0, 0.1611), (1, 29): (0.0061, 0.1718)}
    for (successes, n), ends in published.items():
        found = wilson(successes, n)
        assert (found.low, found.high) == pytest.approx(ends, abs=5e-5)
        assert found.value == successes / n


def test_wilson_is_where_the_score_test_turns() -> None:
    found = wilson(30, 100)
    for end in (found.low, found.high):
        assert abs(found.value - end) / math.sqrt(end * (1 - end) / 100) == pytest.approx(1.959964, rel=1e-6)
    assert wilson(30, 100, level=0.99).low < found.low < wilson(30, 100, level=0.5).low
    turned = wilson(70, 100)
    assert (1 - turned.high, 1 - turned.low) == pytest.approx((found.low, found.high))


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_wilson_covers_what_it_promises(share: float) -> None:
    n = 60
    chances = [math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n + 1)]
    covered = sum(chance for k, chance in enumerate(chances) if wilson(k, n).low <= share <= wilson(k, n).high)
    assert 0.92 < covered < 0.98


def test_mcnemar_is_the_chance_of_a_split_as_uneven() -> None:
    def by_counting(a: int, b: int) -> float:
        n = a + b
        sides = [sum(throw) for throw in product((0, 1), repeat=n)]
        return sum(abs(2 * heads - n) >= abs(a - b) for heads in sides) / 2**n

    for a, b in [(0, 5), (1, 8), (6, 6), (10, 3)]:
        assert mcnemar(a, b) == mcnemar(b, a) == pytest.approx(by_counting(a, b))
    assert mcnemar(0, 0) == 1
    assert mcnemar(10, 20) == pytest.approx(0.0987, abs=5e-5)  # R: binom.test(10, 30)


def test_mean_interval_equals_students() -> None:
    # Student's own data ("The probable error of a mean", 1908): extra sleep with one drug over the other, 10 patients.
    found = mean_interval([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])
    assert (found.value, found.low, found.high) == pytest.approx((1.58, 0.7001142, 2.4598858))


def test_mean_interval_covers_what_it_promises() -> None:
    draws = np.random.default_rng(0).normal(3.0, 2.0, (1000, 4))
    covered = [found.low <= 3 <= found.high for found in (mean_interval(list(row)) for row in draws)]
    assert 0.93 < sum(covered) / 1000 < 0.97


def test_bootstrap_of_a_mean_agrees_with_students_and_repeats() -> None:
    values = np.random.default_rng(1).normal(10, 3, 200).tolist()
    found, student = bootstrap(values), mean_interval(values)
    assert (found.value, found.low, found.high) == pytest.approx((student.value, student.low, student.high), abs=0.06)
    assert bootstrap(values) == found != bootstrap(values, seed=1)


def test_pairing_takes_out_what_both_share() -> None:
    draw = np.random.default_rng(2)
    shared = draw.normal(0, 10, 100)
    better, worse = shared + 1 + draw.normal(0, 0.1, 100), shared

    def difference(a: np.ndarray, b: np.ndarray, axis: int) -> np.ndarray:
        return a.mean(axis) - b.mean(axis)

    paired = bootstrap(better, worse, statistic=difference, paired=True, resamples=999)
    apart = bootstrap(better, worse, statistic=difference, resamples=999)
    assert 0.9 < paired.low < 1 < paired.high < 1.1
    assert apart.low < 0 < 2 < apart.high


def test_values_all_alike_have_no_width() -> None:
    assert bootstrap([2.0, 2.0, 2.0]) == mean_interval([2.0, 2.0, 2.0]) == Interval(value=2.0, low=2.0, high=2.0)


def test_sign_flips_give_the_share_of_all_flips() -> None:
    def by_counting(values: list[float]) -> float:
        sums = [
            abs(sum(sign * value for sign, value in zip(signs, values, strict=True)))
            for signs in product((-1, 1), repeat=len(values))
        ]
        return sum(found >= abs(sum(values)) - 1e-12 for found in sums) / len(sums)

    for values in ([1.0, 2.0, 3.0, 4.0, 5.0], [0.5, -0.25, 1.0, 0.75, -0.5, 0.5]):
        assert sign_flip(values) == pytest.approx(by_counting(values), abs=0.02)
    assert sign_flip([0.0, 0.0]) == 1 and sign_flip([1.0] * 40) == 1e-4
    # a mean over groups: the first group's single difference weighs as much as all of the second's together
    assert sign_flip([8.0], [1.0] * 8) == pytest.approx(by_counting([8.0] + [1 / 8] * 8), abs=0.02)
    with pytest.raises(ValueError, match="in every group"):
        sign_flip([1.0], [])


def test_holm_equals_its_definition() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # R: p.adjust(..., "holm")
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2] and holm([]) == []


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="got 4 of 3"):
        wilson(4, 3)
    with pytest.raises(ValueError, match="got 0 of 0"):
        wilson(0, 0)
    with pytest.raises(ValueError, match="got 95"):
        wilson(1, 3, level=95)
    with pytest.raises(ValueError, match="got -1 and 2"):
        mcnemar(-1, 2)
    for interval in (mean_interval, bootstrap):
        with pytest.raises(ValueError, match="at least 2 values, got 1"):
            interval([1.0])
