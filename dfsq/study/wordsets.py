"""What universal sets cost and leave, and a search for better ones.

A word set is judged by what real channels make of it: exact selection picks the points, and the
operations are those of the points picked, counted as often as values go to them.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.stats import gmean

from ..histogram import Histogram, cell_bounds
from ..selection import select_channels
from ..universal import universal_set, universal_words

#: Smallest exponent of a word's values by the number of words, so that points are multiples of
#: 2^-10 and one histogram serves all sets. Three words are left out: no shift divides by three.
LAST_EXPONENT = {1: 10, 2: 9, 4: 8}


def operations(words):
    """Additions and shifts that a multiplication by each non-negative point takes, at the least.

    Parameters
    ----------
    words : sequence of sequences of float
        See :func:`dfsq.universal_set`. The division by their number is not counted: it is the same
        for all points and goes into the scale.

    Returns
    -------
    dict of float to (int, int)
        Of the ways to write the point, the one with the fewest additions, then the fewest shifts: a
        term of 1 takes none.
    """
    words, least = universal_words(words), {}
    for combination in product(*words):
        terms = [value for value in combination if value]
        cost = max(len(terms) - 1, 0), sum(value != 1 for value in terms)
        point = sum(combination) / len(words)
        least[point] = min(least.get(point, cost), cost)
    return least


@dataclass(frozen=True)
class Judged:
    """A word set on real channels.

    Attributes
    ----------
    words : tuple of tuples of float
    error : float
        Squared error over the samples' power; the geometric mean over signed and non-negative
        channels.
    additions, shifts : float
        A multiplication, mean over the values of a channel, then over channels.
    selections : list of lists of Selection
        For each of the histograms.
    """

    words: tuple
    error: float
    additions: float
    shifts: float
    selections: list


def judge(words, histograms, bits, selections=None):
    """Select points of a word set for channels, and say what they leave and cost.

    Parameters
    ----------
    words : sequence of sequences of float
    histograms : dict of bool to Histogram
        Channels behind a ReLU (True), and signed ones (False).
    bits : int
    selections : list of lists of Selection, optional
        Found before, on other samples of the same channels: nothing is selected anew.

    Returns
    -------
    Judged
    """
    words = universal_words(words)
    if selections is None:
        selections = [
            select_channels(histogram, bits, universal=universal_set(words, signed=not relu))
            for relu, histogram in histograms.items()
        ]
    cost = operations(words)
    errors, costs = [], []
    for histogram, found in zip(histograms.values(), selections, strict=True):
        error = sum(histogram.squared_error(s.points, c) for c, s in enumerate(found))
        errors.append(error / histogram.squares.sum())
        for c, selection in enumerate(found):
            used = share_of_points(selection.points, histogram, c)
            costs.append(used @ [cost[abs(point)] for point in selection.points.tolist()])
    additions, shifts = np.mean(costs, axis=0)
    return Judged(words, float(gmean(errors)), float(additions), float(shifts), selections)


def share_of_points(points, histogram, channel):
    """Share of a channel's samples that go to each of its points, shape (k,)."""
    count = np.concatenate([[0.0], np.cumsum(histogram.count[channel])])
    bounds = cell_bounds(points, histogram.edges)
    return np.diff(count[np.concatenate([[0], bounds])]) / count[-1]


def some_channels(layers, count, seed=0):
    """Histograms of a few channels of every layer, those behind a ReLU apart.

    Parameters
    ----------
    layers : dict of str to LayerCalibration
    count : int
        Channels of each layer, at most; the same ones for the same seed and layers.
    seed : int

    Returns
    -------
    dict of bool to Histogram
        By whether the layer's input is non-negative.
    """
    generator, parts = np.random.default_rng(seed), {}
    for layer in layers.values():
        channels = layer.histogram.channels
        chosen = np.sort(generator.permutation(channels)[:count])
        parts.setdefault(layer.non_negative, []).append(layer.histogram.only(chosen))
    return {relu: _joined(part) for relu, part in sorted(parts.items())}


def _joined(histograms):
    whole = Histogram(sum(h.channels for h in histograms), histograms[0].edges)
    for name in ("count", "total", "squares"):
        setattr(whole, name, np.concatenate([getattr(h, name) for h in histograms]))
    return whole


def front(judged):
    """Those that no other beats in error and operations at once, fewest operations first."""
    best, kept = np.inf, []
    for one in sorted(judged, key=lambda j: (j.additions + j.shifts, j.error)):
        if one.error < best:
            best = one.error
            kept.append(one)
    return kept


def search(starts, histograms, bits, tries, seed=0, terms=12):
    """Look for word sets with less error or fewer operations, by random changes of one value.

    Each try takes a set that no other found so far beats (every second time, one whose error is at
    most half as much again as the least) and moves, adds or drops one of its powers of two. What is
    found is measured; that there is nothing better is not known.

    Parameters
    ----------
    starts : sequence of sequences of sequences of float
        Word sets to begin with, of 1, 2 or 4 words.
    histograms, bits
        See :func:`judge`.
    tries : int
    seed : int
    terms : int
        Most powers of two in all words together, each of which is a shift to build; DFSQ's four
        words hold 12.

    Returns
    -------
    list of Judged
        All that were tried, the starts first.
    """
    generator = np.random.default_rng(seed)
    seen = {_key(words): judge(words, histograms, bits) for words in starts}
    for i in range(tries):
        members = front(seen.values())
        if i % 2:
            members = [m for m in members if m.error <= 1.5 * members[-1].error]
        parent = members[generator.integers(len(members))].words
        words = _changed(parent, terms, generator)
        if _key(words) not in seen:
            seen[_key(words)] = judge(words, histograms, bits)
    return list(seen.values())


def _key(words):
    """The same for sets that differ in order only."""
    return tuple(sorted(tuple(sorted(set(word), reverse=True)) for word in universal_words(words)))


def _changed(words, most, generator):
    """A copy of a word set in which one power of two is moved, added or dropped."""
    words = [sorted(set(word) - {0.0}, reverse=True) for word in words]
    word = words[generator.integers(len(words))]
    free = [2.0**-e for e in range(LAST_EXPONENT[len(words)] + 1) if 2.0**-e not in word]
    change = generator.choice(["move", "add", "drop"], p=[0.6, 0.2, 0.2])
    if change != "add" and len(word) > (change == "drop"):
        word.pop(generator.integers(len(word)))
    if change != "drop" and free and sum(map(len, words)) < most:
        word.append(free[generator.integers(len(free))])
    return tuple((*sorted(word, reverse=True), 0.0) for word in words)
