"""What word sets cost and leave, and the search."""

import numpy as np
import pytest

from dfsq import Histogram, select_channels, universal_set
from dfsq.calibration import LayerCalibration
from dfsq.study import wordsets
from dfsq.universal import shifts_and_adds, universal_words

pytestmark = pytest.mark.usefixtures("one_thread")

DFSQ = universal_words("dfsq")


@pytest.fixture(scope="module")
def histograms():
    generator = np.random.default_rng(0)
    signed, relu = Histogram(3), Histogram(2)
    z = generator.laplace(size=(1, 3, 4000))
    signed.add(z / np.abs(z).max())
    z = generator.exponential(size=(1, 2, 4000))
    relu.add(z / z.max())
    return {False: signed, True: relu}


@pytest.mark.parametrize("words", [DFSQ, universal_words("sq"), universal_words("dfsq", 2)])
def test_operations_are_those_of_shifts_and_adds(words):
    found = wordsets.operations(words)
    assert sorted(found) == universal_set(words, signed=False).tolist()
    for point, (additions, shifts) in found.items():
        terms = shifts_and_adds(point, words)
        assert additions == max(len(terms) - 1, 0)
        assert shifts <= sum(term != 1 for term in terms)
    assert found[0] == found[1 / len(words)] == (0, 0)


def test_a_set_is_judged_by_its_points(histograms):
    judged = wordsets.judge(DFSQ, histograms, 3)
    errors = []
    for relu, histogram in histograms.items():
        selected = select_channels(histogram, 3, universal=universal_set(signed=not relu))
        errors.append(sum(s.sse for s in selected) / histogram.squares.sum())
    assert judged.error == pytest.approx(np.sqrt(np.prod(errors)))
    again = wordsets.judge(DFSQ, histograms, 3, judged.selections)
    assert (again.error, again.additions) == (judged.error, judged.additions)
    assert judged.additions < 3


def test_cost_counts_values_not_points():
    words = ((1.0, 0.0), (0.5, 0.0))  # points 0, 0.25, 0.5, 0.75
    histogram = Histogram(1)
    histogram.add(np.array([0.0] * 5 + [0.25] * 2 + [0.5] * 2 + [0.75]).reshape(1, 1, -1))
    judged = wordsets.judge(words, {True: histogram}, 2)
    assert judged.additions == pytest.approx(0.1)  # one value in ten needs one
    assert judged.shifts == pytest.approx(0.3)
    points = np.array([0.0, 0.25, 0.5, 0.75])
    shares = wordsets.share_of_points(points, histogram, 0)
    assert shares == pytest.approx([0.5, 0.2, 0.2, 0.1])


def test_the_front_holds_what_nothing_beats(histograms):
    judged = wordsets.search([DFSQ, universal_words("sq")], histograms, 3, tries=25)
    kept = wordsets.front(judged)
    cost = [j.additions + j.shifts for j in kept]
    assert cost == sorted(cost)
    assert [j.error for j in kept] == sorted((j.error for j in kept), reverse=True)
    for one in judged:
        assert any(
            k.error <= one.error and k.additions + k.shifts <= one.additions + one.shifts
            for k in kept
        )


def test_search_stays_within_its_bounds(histograms):
    starts = [universal_words("dfsq", n) for n in (1, 2, 4)]
    judged = wordsets.search(starts, histograms, 2, tries=40, seed=3, terms=12)
    assert [j.words for j in judged[:3]] == starts
    assert 20 < len(judged) <= 43
    assert len({wordsets._key(j.words) for j in judged}) == len(judged)
    for one in judged:
        assert len(one.words) in (1, 2, 4)
        assert sum(value > 0 for word in one.words for value in word) <= 12
        points = universal_set(one.words)
        assert np.array_equal(points * 2**10, np.round(points * 2**10))
    again = wordsets.search(starts, histograms, 2, tries=40, seed=3, terms=12)
    assert [j.words for j in again] == [j.words for j in judged]
    assert min(j.error for j in judged) <= min(j.error for j in judged[:3])


def test_channels_are_the_same_for_the_same_layers():
    layers = {}
    for name, relu in (("a", False), ("b", True), ("c", False)):
        histogram = Histogram(6)
        histogram.add(np.tile(np.arange(6)[:, None] / 8, (1, 1, 4)))
        layers[name] = LayerCalibration(relu, histogram, [], 4)
    some = wordsets.some_channels(layers, 2)
    assert list(some) == [False, True]
    assert [h.channels for h in some.values()] == [4, 2]
    again = wordsets.some_channels(layers, 2)
    assert np.array_equal(some[False].total, again[False].total)
    assert wordsets.some_channels(layers, 9)[False].channels == 12
