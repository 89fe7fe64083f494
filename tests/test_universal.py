"""Universal sets: their size, grid and density, and how a point is written as shifts and adds."""

from fractions import Fraction
from itertools import product
from math import log2

import numpy as np
import pytest

from dfsq.universal import shifts_and_adds, universal_set, universal_words


def test_the_papers_set():
    points, positive = universal_set("dfsq"), universal_set("dfsq", signed=False)
    assert (len(points), len(positive)) == (377, 189)
    assert points.dtype == np.float64
    assert np.all(points * 1024 == np.round(points * 1024))
    assert np.array_equal(points, -points[::-1])
    assert np.array_equal(points[points >= 0], positive)
    assert (positive[0], positive[-1]) == (0, 1)
    assert not np.signbit(positive[0])


def test_density_and_largest_gap():
    positive = universal_set("dfsq", signed=False)
    quarters = np.histogram(positive, [0, 0.25, 0.5, 0.75, 1.1])[0]
    assert quarters.tolist() == [81, 65, 33, 10]
    gaps = np.diff(positive)
    assert gaps.max() == 0.125
    assert positive[np.argmax(gaps)] == 0.875


@pytest.mark.parametrize("words", [1, 2, 3, 4])
def test_number_of_words(words):
    """Against the definition, in exact fractions."""
    combinations = product(
        *([1, Fraction(1, 2**i), Fraction(1, 2 ** (i + 4)), 0] for i in range(1, words + 1))
    )
    expected = {sum(c) / Fraction(words) for c in combinations}
    expected = sorted(expected | {-p for p in expected})
    points = universal_set("dfsq", words=words)
    assert len(points) == len(expected)
    np.testing.assert_allclose(points, [float(p) for p in expected], rtol=0, atol=1e-16)
    assert np.all(np.diff(points) > 0)


def test_sq():
    sq = universal_set("sq", signed=False)
    expected = {(a + b) / 2 for a in (1, 1 / 2, 1 / 8, 0) for b in (1, 1 / 4, 1 / 16, 0)}
    assert sq.tolist() == sorted(expected)
    two_words = universal_set("dfsq", words=2, signed=False)
    assert len(sq) == len(two_words) == 15
    assert not np.array_equal(sq, two_words)


def test_words_of_ones_own():
    words = [[1, 0], [0.5, 0.25, 0]]
    assert universal_words(words) == ((1.0, 0.0), (0.5, 0.25, 0.0))
    assert universal_set(words, signed=False).tolist() == [0, 0.125, 0.25, 0.5, 0.625, 0.75]
    named = [[1, 2**-i, 2 ** -(i + 4), 0] for i in range(1, 5)]
    assert np.array_equal(universal_set(named), universal_set("dfsq"))


@pytest.mark.parametrize(
    ("universal", "words", "message"),
    [
        ("dfsq", 0, "words must be 1, 2, 3 or 4, not 0"),
        ("dfsq", 5, "not 5"),
        ("sq", 2, "words=2 goes with universal='dfsq' only"),
        ("paper", None, "one of dfsq, sq or a list of words, not 'paper'"),
        ([], None, "at least one word"),
        ([[1, 0], []], None, "each word a value"),
        ([[1, 0.3]], None, "0.3, which is neither 0 nor a power of two"),
        ([[1, float("nan")]], None, "nan, which is neither"),
        ([[float("inf")]], None, "inf, which is neither"),
        ([[2, 0]], None, "values must lie in -1..1"),
        ([1, 0], None, "each a list of numbers"),
        (7, None, "a list of words"),
    ],
)
def test_bad_words(universal, words, message):
    with pytest.raises(ValueError, match=message):
        universal_set(universal, words)


@pytest.mark.parametrize(
    ("universal", "words"), [("dfsq", 1), ("dfsq", 2), ("dfsq", 3), ("dfsq", 4), ("sq", None)]
)
def test_every_point_is_its_shifts_and_adds(universal, words):
    choices = universal_words(universal, words)
    for point in universal_set(universal, words):
        terms = shifts_and_adds(point, universal, words)
        assert len(terms) <= len(choices)
        assert all(log2(abs(term)).is_integer() for term in terms)
        assert all(np.sign(term) == np.sign(point) for term in terms)
        assert list(map(abs, terms)) == sorted(map(abs, terms), reverse=True)
        # with three words the division is rounded, so compare after it, not before
        assert sum(terms) / len(choices) == point


def test_shifts_and_adds_takes_as_few_terms_as_can_be():
    assert shifts_and_adds(0) == ()
    assert shifts_and_adds(0.25) == (1.0,)  # not 1/2 + 1/4 + 1/4
    assert shifts_and_adds(-0.25) == (-1.0,)
    assert shifts_and_adds(2**-10) == (2**-8,)
    assert shifts_and_adds(0.5, [[1, 0.5, 0], [0.5, 0]]) == (1.0,)  # not 1/2 + 1/2
    fewest = {}
    for combination in product(*universal_words("dfsq")):
        value, terms = sum(combination) / 4, sum(p != 0 for p in combination)
        fewest[value] = min(terms, fewest.get(value, 4))
    assert {p: len(shifts_and_adds(p)) for p in universal_set(signed=False)} == fewest


def test_a_point_that_is_not_in_the_set_names_its_neighbour():
    with pytest.raises(ValueError, match=r"the nearest is 0\.875"):
        shifts_and_adds(0.9)
