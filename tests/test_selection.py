"""Selectors: against brute force written here, against each other, and against plain loops.

Wherever it says "in integers", samples are multiples of 2^-12 and points of 2^-10, so that every
sum is exact and errors are compared without tolerance.
"""

from itertools import combinations
from math import comb

import numpy as np
import pytest

from dfsq.histogram import Histogram, edges_for
from dfsq.selection import METHODS, select, select_channels
from dfsq.universal import universal_set

UNIVERSAL = universal_set()
POSITIVE = universal_set(signed=False)
UNIT = 4096


def subset_errors(samples, universal, k, pinned=(), weights=None):
    """All subsets of k points that hold the pinned ones, and the error of each."""
    size = min(k, len(universal))
    subsets = np.array(list(combinations(range(len(universal)), size)))
    for index in np.searchsorted(universal, pinned):
        subsets = subsets[(subsets == index).any(axis=1)]
    distances = (universal[:, None] - samples[None]) ** 2
    errors = distances[subsets].min(axis=1)
    return subsets, (errors * (1 if weights is None else weights)).sum(axis=1)


def direct_error(samples, points, weights=1):
    distances = np.abs(np.asarray(samples)[:, None] - np.asarray(points)[None]).min(axis=1)
    return (distances**2 * weights).sum()


def integers(points):
    """Points as whole multiples of 2^-12, checked to be that."""
    scaled = np.asarray(points) * UNIT
    assert np.array_equal(scaled, np.round(scaled))
    return scaled.astype(np.int64)


def small_case(kind, generator):
    """A random problem that can be brute-forced: samples and universal in units of 2^-12, k."""
    positive = kind == "non-negative"
    size = generator.integers(4, 10)
    pool = integers(POSITIVE if positive else UNIVERSAL)
    universal = np.sort(generator.choice(pool, size, replace=False))
    if generator.integers(2):
        universal = np.unique(np.append(universal, 0))
    count = generator.integers(1, 30)
    samples = generator.integers(0 if positive else -1.1 * UNIT, 1.1 * UNIT, count)
    if generator.integers(2):  # on points and on their midpoints
        samples = (generator.choice(universal, count) + generator.choice(universal, count)) // 2
    k = generator.integers(1, 7)
    options = {}
    if kind == "few values":
        samples = generator.choice(samples[:3], count)
        k = generator.integers(3, 7)
    elif kind == "large k":
        k = len(universal) + generator.integers(0, 3)
    elif kind == "weights":
        options["weights"] = generator.integers(0, 5, count)
        options["weights"][0] = 1
    elif kind == "pinned":
        options["pinned"] = generator.choice(universal, min(k, generator.integers(1, 4)), False)
    return samples, universal, int(k), options


@pytest.mark.parametrize("method", ["exact", "exhaustive"])
@pytest.mark.parametrize(
    "kind", ["signed", "non-negative", "few values", "large k", "weights", "pinned"]
)
def test_global_optimum_in_integers(kind, method):
    generator = np.random.default_rng(0)
    for case in range(500):
        samples, universal, k, options = small_case(kind, generator)
        subsets, errors = subset_errors(samples, universal, k, **options)
        scaled = dict(options)
        if "pinned" in scaled:
            scaled["pinned"] = scaled["pinned"] / UNIT
        found = select(samples / UNIT, k=k, method=method, universal=universal / UNIT, **scaled)
        points = integers(found.points)
        assert found.sse * UNIT**2 == errors.min(), case
        assert direct_error(samples, points, options.get("weights", 1)) == errors.min(), case
        # as many points as asked for, in order, of the set, with the pinned ones
        assert len(points) == min(k, len(universal))
        assert np.all(np.diff(points) > 0)
        assert np.isin(points, universal).all()
        assert np.isin(options.get("pinned", ()), points).all()
        # of equal optima, one with 0
        optima = universal[subsets[errors == errors.min()]]
        if (optima == 0).any():
            assert 0 in points, case


def test_global_optimum_on_real_numbers():
    """Off the dyadic grid, and with samples of any magnitude."""
    generator = np.random.default_rng(1)
    for case in range(300):
        pool = universal_set(words=3) if case % 2 else generator.normal(size=30)
        universal = np.sort(generator.choice(pool, 9, replace=False))
        samples = generator.normal(size=25) * 10.0 ** generator.integers(-3, 1)
        k = int(generator.integers(1, 7))
        best = subset_errors(samples, universal, k)[1].min()
        for method in ("exact", "exhaustive"):
            found = select(samples, k=k, method=method, universal=universal)
            assert found.sse == pytest.approx(best, rel=1e-12, abs=1e-12), (case, method)
            assert direct_error(samples, found.points) == pytest.approx(best, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("k", [3, 4, 5])
def test_exact_equals_exhaustive_on_the_sq_set(k):
    universal = universal_set("sq")
    generator = np.random.default_rng(2)
    data = [generator.laplace(scale=0.2, size=5000).clip(-1, 1) for _ in range(4)]
    exact = select_channels(data, None, "exact", universal, k=k)
    exhaustive = select_channels(data, None, "exhaustive", universal, k=k)
    for a, b in zip(exact, exhaustive, strict=True):
        assert np.array_equal(a.points, b.points)
        assert a.sse == b.sse


# --- equal optima ---


def farthest_first(used, wanted, universal):
    """The rule of equal optima: 0, then always the point farthest from those there."""
    chosen = list(used)
    if len(chosen) < wanted and 0 in universal and 0 not in chosen:
        chosen.append(0.0)
    while len(chosen) < min(wanted, len(universal)):
        chosen.append(max(universal, key=lambda p: (min(abs(p - c) for c in chosen), -p)))
    return sorted(chosen)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 16, 100])
@pytest.mark.parametrize("universal", [UNIVERSAL, POSITIVE], ids=["signed", "non-negative"])
def test_dead_channel_fills_the_largest_gaps(k, universal):
    found = select(np.zeros(50), k=k, universal=universal)
    assert found.sse == 0
    assert found.points.tolist() == farthest_first([0.0], k, universal)


@pytest.mark.parametrize("value", [0.0, 1e-9, -1e-9, 0.3, -0.7, 1.0, -1.0])
@pytest.mark.parametrize("k", [3, 4, 16])
def test_constant_channel_keeps_points_on_both_sides(value, k):
    points = select(np.full(50, value), k=k).points
    assert points[0] < 0 < points[-1]
    nearest = UNIVERSAL[np.argmin(np.abs(UNIVERSAL - value))]
    assert {0.0, nearest} <= set(points)


def test_points_without_samples_go_to_the_largest_gaps():
    values = [-0.5, 0.25, 0.75]
    for method in ("exact", "exhaustive"):
        found = select(values * 10, k=5, method=method, universal=UNIVERSAL[::24])
        assert found.sse == select(values, k=3, universal=UNIVERSAL[::24]).sse * 10
        used = {min(UNIVERSAL[::24], key=lambda p, v=v: abs(p - v)) for v in values}
        assert found.points.tolist() == farthest_first(sorted(used), 5, UNIVERSAL[::24])


# --- invariances ---


@pytest.fixture(scope="module")
def channels():
    """Activations of several shapes, as multiples of 2^-13: all their sums are exact."""
    generator = np.random.default_rng(3)
    draws = [
        generator.normal(0, 0.2, 4000),
        generator.laplace(0, 0.1, 4000),
        np.maximum(generator.normal(-0.2, 0.3, 4000), 0),
        np.where(generator.random(4000) < 0.02, generator.random(4000), 0),
        generator.uniform(-1, 1, 4000),
        generator.integers(-8, 9, 4000) / 8,  # midpoints of centres among the samples
        np.zeros(4000),
    ]
    return [np.round(d.clip(-1, 1) * 8192) / 8192 for d in draws]


def same(a, b):
    return (
        np.array_equal(a.points, b.points)
        and np.array_equal(a.thresholds, b.thresholds)
        and (a.sse, a.duplicates, a.samples) == (b.sse, b.duplicates, b.samples)
    )


@pytest.mark.parametrize(
    ("method", "universal"),
    [
        ("exact", None),
        ("free", None),
        ("uniform-mse", None),
        ("exhaustive", "sq"),
        ("symmetric", "sq"),
    ],
)
def test_all_channels_at_once_as_one_by_one(channels, method, universal):
    points = None if universal is None else universal_set(universal)
    together = select_channels(channels, 2, method, points)
    for one, channel in zip(together, channels, strict=True):
        assert same(one, select(channel, 2, method, points))


@pytest.mark.parametrize("method", ["exact", "kmeans", "kmeans-hist", "free"])
def test_order_of_the_samples_does_not_matter(channels, method):
    generator = np.random.default_rng(4)
    for channel in channels:
        assert same(select(channel, 4, method), select(generator.permutation(channel), 4, method))


@pytest.mark.parametrize("method", ["exact", "free"])
def test_samples_given_twice_change_the_error_only(channels, method):
    for channel in channels:
        once, twice = select(channel, 3, method), select(np.tile(channel, 2), 3, method)
        assert np.array_equal(once.points, twice.points)
        assert (twice.sse, twice.samples) == (2 * once.sse, 2 * once.samples)


@pytest.mark.parametrize(
    "method", ["exact", "kmeans", "kmeans-hist", "free", "uniform-mse", "exhaustive"]
)
def test_weights_are_repetitions(channels, method):
    generator = np.random.default_rng(5)
    weights = generator.integers(0, 4, 200)
    universal = UNIVERSAL[::29] if method == "exhaustive" else None
    for channel in channels[:3]:
        samples = channel[:200]
        weighted = select(samples, 2, method, universal, weights=weights)
        assert same(weighted, select(np.repeat(samples, weights), 2, method, universal))


@pytest.mark.parametrize("method", ["exact", "kmeans-hist", "free", "uniform-mse"])
def test_a_histogram_stands_for_its_samples(channels, method):
    histogram = Histogram(len(channels))
    histogram.add(np.stack(channels)[None])
    from_samples = select_channels(channels, 4, method)
    for a, b in zip(select_channels(histogram, 4, method), from_samples, strict=True):
        assert same(a, b)


def test_result(channels):
    found = select(channels[0].astype(np.float32), 4)
    assert found.method == "exact"
    assert found.samples == 4000
    assert found.duplicates == 0
    assert found.seconds > 0
    assert np.array_equal(found.thresholds, (found.points[1:] + found.points[:-1]) / 2)
    assert found.sse == direct_error(channels[0], found.points)


def test_more_points_than_the_set_has():
    assert np.array_equal(select([0.1, -0.3], 8, universal=POSITIVE).points, POSITIVE)
    assert np.array_equal(select([0.1], k=1000).points, UNIVERSAL)


def test_more_points_never_raise_the_error(channels):
    for channel in channels:
        errors = [select(channel, k=k).sse for k in (1, 2, 3, 5, 8, 13, 50, 200, 377)]
        assert errors == sorted(errors, reverse=True)


# --- pinned points ---


def test_pinned_points_are_in_the_subset_at_the_least_cost(channels):
    channel = channels[0] * 0.3 + 0.5  # far from 0
    universal = UNIVERSAL[::40]
    assert 0 not in select(channel, k=3, universal=UNIVERSAL[::40]).points
    pinned = select(channel, k=3, universal=np.unique([*universal, 0.0]), pinned=(0,))
    assert 0 in pinned.points
    rest = select(channel, k=3, universal=np.unique([*universal, 0.0]))
    assert pinned.sse >= rest.sse
    everything = select(channel, k=2, pinned=(-1.0, 1.0))
    assert everything.points.tolist() == [-1, 1]


# --- K-means ---


def plain_kmeans(samples, k, universal, generator, restarts, iterations, tolerance, pin_zero):
    """The released procedure as a literal loop, sample by sample against all centres."""
    samples = np.sort(samples)

    def draw():
        return samples[int(generator.random() * len(samples))]

    best = None
    for _ in range(restarts):
        free = k - 1 if pin_zero else k
        centres = [draw() for _ in range(free)] + [0.0] * (k - free)
        for _ in range(iterations):
            nearest = np.argmin(np.abs(samples[:, None] - np.array(centres)), axis=1)
            updated = list(centres)
            for i in range(free):
                own = samples[nearest == i]
                updated[i] = own.sum() / len(own) if len(own) else draw()
            if max((abs(a - b) for a, b in zip(updated, centres, strict=True)), default=0) < (
                tolerance
            ):
                break
            centres = updated
        points = sorted({min(universal, key=lambda p, c=c: (abs(p - c), p)) for c in centres})
        error = direct_error(samples, points)
        if best is None or error < best[1]:
            best = points, error
    return best


@pytest.mark.parametrize("universal", ["dfsq", "sq"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"restarts": 1},
        {"restarts": 2, "iterations": 1},
        {"iterations": 3, "tolerance": 0},
        {"restarts": 1, "tolerance": 0.05},
        {"restarts": 1, "tolerance": 1e9},  # the draws themselves
        {"pin_zero": False},
    ],
    ids=str,
)
def test_kmeans_is_the_released_loop(channels, universal, options):
    universal = universal_set(universal)
    settings = {"restarts": 5, "iterations": 100, "tolerance": 1e-3, "pin_zero": True} | options
    for channel in channels:
        for k, seed, samples in ((4, 0, channel[:500]), (8, 7, channel[:40]), (1, 1, channel[:9])):
            found = select(samples, None, "kmeans", universal, k=k, seed=seed, **options)
            generator = np.random.default_rng([seed, 0])
            points, error = plain_kmeans(samples, k, universal, generator, **settings)
            assert found.points.tolist() == points
            assert found.sse == error
            assert found.duplicates == k - len(points)


def test_kmeans_takes_the_first_of_equal_restarts():
    samples, seen = np.repeat([-0.5, 0.5], 10), set()
    for seed in range(8):
        found = select(samples, 1, "kmeans", seed=seed)
        first = np.random.default_rng([seed, 0]).random() < 0.5
        assert found.points.tolist() == ([-0.5, 0] if first else [0, 0.5])
        seen.add(first)
    assert seen == {True, False}


def test_kmeans_draws_differ_by_channel_and_seed():
    generator = np.random.default_rng(6)
    channel = generator.normal(0, 0.3, 3000).clip(-1, 1)
    run = {"method": "kmeans", "restarts": 1, "iterations": 1}
    first, second = select_channels([channel, channel], 4, **run)
    assert not same(first, second)
    assert same(first, select(channel, 4, **run))
    assert not same(first, select(channel, 4, seed=1, **run))


def test_kmeans_keeps_zero(channels):
    away = np.abs(channels[0]) * 0.25 + 0.75
    assert 0 in select(away, 3, "kmeans").points
    assert 0 not in select(away, 3, "kmeans", pin_zero=False).points


def test_kmeans_counts_what_collides_in_snapping():
    """64 centres among samples that four points serve."""
    generator = np.random.default_rng(7)
    found = select(generator.uniform(0.9, 1, 5000), 6, "kmeans")
    assert found.points.tolist() == [0, 0.875, 1]
    assert found.duplicates == 61


def test_kmeans_collapses_on_a_sparse_channel():
    """All centres are drawn at 0, the mean moves by less than the tolerance, nothing is stored."""
    samples = np.zeros(100_000)
    samples[:20] = 0.5
    released = select(samples, 4, "kmeans", restarts=1)
    assert released.points.tolist() == [0]
    assert released.duplicates == 15
    assert released.sse == 20 * 0.25
    assert select(samples, 4, "exact").sse == 0


def test_kmeans_on_cells_is_kmeans_where_cells_hold_one_value():
    samples = np.random.default_rng(8).integers(-2048, 2048, 3000) / 2048
    a, b = select(samples, 4, "kmeans", seed=3), select(samples, 4, "kmeans-hist", seed=3)
    assert a.points.tolist() == b.points.tolist()
    assert (a.sse, a.duplicates, a.samples) == (b.sse, b.duplicates, b.samples)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_exact_is_never_worse_than_kmeans(channels, bits):
    for universal in (UNIVERSAL, POSITIVE):
        data = [c for c in channels if universal is UNIVERSAL or (c >= 0).all()]
        exact = select_channels(data, bits, "exact", universal)
        pinned = select_channels(data, bits, "exact", universal, pinned=(0,))
        for method in ("kmeans", "kmeans-hist"):
            released = select_channels(data, bits, method, universal)
            for a, b, c in zip(exact, pinned, released, strict=True):
                assert a.sse <= c.sse + 1e-9
                assert b.sse <= c.sse + 1e-9  # K-means has a centre at 0 as well


# --- symmetric subsets ---


@pytest.mark.parametrize("k", [2, 4, 6])
def test_symmetric_is_the_best_of_all_symmetric_subsets(k):
    universal = universal_set("sq")
    magnitudes = integers(universal[universal >= 0])
    generator = np.random.default_rng(k)
    for _ in range(20):
        samples = generator.integers(-UNIT, UNIT, 60)
        samples = np.where(generator.random(60) < 0.5, samples // 8, samples)
        candidates = (
            np.concatenate([s, -s]) for s in map(np.array, combinations(magnitudes, k // 2))
        )
        best = min(direct_error(samples, candidate) for candidate in candidates)
        found = select(samples / UNIT, None, "symmetric", universal, k=k)
        assert found.sse * UNIT**2 == best
        assert np.array_equal(found.points, -found.points[::-1])
        assert len(found.points) in (k - 1, k)  # 0 has one sign only


def test_symmetric_of_a_set_without_negatives_is_exhaustive():
    universal = universal_set("sq", signed=False)
    samples = np.random.default_rng(9).uniform(0, 1, 400)
    a, b = (select(samples, 3, method, universal) for method in ("symmetric", "exhaustive"))
    assert np.array_equal(a.points, b.points)
    assert np.array_equal(select(samples, 4, "symmetric", universal).points, universal)


# --- free codebook ---


def best_partition(values, k):
    """Least error of sorted values in k runs, each about its mean, over all partitions."""
    least = np.inf
    for cuts in combinations(range(1, len(values)), k - 1):
        runs = np.split(values, cuts)
        least = min(least, sum(((run - run.mean()) ** 2).sum() for run in runs))
    return least


def test_free_is_the_best_codebook():
    generator = np.random.default_rng(10)
    for _ in range(200):
        # a value a cell: every partition of the samples is one of cells
        values = np.sort(generator.choice(np.arange(-2048, 2048), 11, replace=False)) / 2048
        k = int(generator.integers(1, 8))
        found = select(generator.permutation(values), None, "free", k=k)
        assert found.sse == pytest.approx(best_partition(values, k), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_free_is_the_ceiling_of_any_codebook(channels, bits):
    exact, free = (select_channels(channels, bits, m) for m in ("exact", "free"))
    for channel, a, b in zip(channels, exact, free, strict=True):
        assert b.sse <= a.sse + 1e-9
        assert np.isin(b.thresholds, edges_for(UNIVERSAL)).all()
        codes = np.searchsorted(b.thresholds, channel, side="right")
        means = [channel[codes == code].mean() for code in range(len(b.points))]
        np.testing.assert_allclose(b.points, means, rtol=0, atol=1e-14)
        assert np.sum((b.points[codes] - channel) ** 2) == pytest.approx(b.sse, abs=1e-11)


def test_free_with_samples_that_hardly_count():
    """Their weights are lost in the sums, so that there is no mean of theirs."""
    found = select([0.1, 0.5, 0.9], 2, "free", weights=[1.0, 1e-20, 1e-20])
    assert found.points == pytest.approx([0.1], abs=1e-12)
    assert found.sse == pytest.approx(0, abs=1e-12)


def test_free_has_no_more_levels_than_there_are_values():
    found = select([0.25, 0.25, -0.5], 4, "free")
    assert found.points.tolist() == [-0.5, 0.25]
    assert found.sse == 0


def uniform_error(samples, low, high, k):
    """Of evenly spaced levels, each sample going to the nearest."""
    step = (high - low) / (k - 1)
    codes = np.clip(np.round((samples - low) / step), 0, k - 1)
    return np.sum((low + codes * step - samples) ** 2)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("universal", [UNIVERSAL, UNIVERSAL[UNIVERSAL >= 0]])
def test_clipped_uniform_levels(channels, bits, universal):
    """Neither end can be moved for less error, nor both together."""
    shares, k = np.linspace(1, 0.05, 80), 2**bits
    for channel in channels[:4]:
        samples = channel if universal[0] < 0 else np.abs(channel)
        found = select(samples, bits, "uniform-mse", universal)
        low, high = found.points[0], found.points[-1]
        np.testing.assert_allclose(found.points, np.linspace(low, high, k), rtol=0, atol=1e-15)
        middles = (found.points[1:] + found.points[:-1]) / 2
        assert np.abs(found.thresholds - middles).max() <= 2**-12
        assert np.isin(found.thresholds, edges_for(UNIVERSAL)).all()
        codes = np.searchsorted(found.thresholds, samples, side="right")
        own = np.sum((found.points[codes] - samples) ** 2)
        assert own == pytest.approx(found.sse, abs=1e-9)
        # thresholds on the cells' edges cost next to nothing
        slack = 1e-6 * len(samples) + 1e-3 * own
        assert own == pytest.approx(uniform_error(samples, low, high, k), abs=slack)
        others = [(s * universal[0], s * universal[-1]) for s in shares]
        others += [(s * universal[0], high) for s in shares]
        others += [(low, s * universal[-1]) for s in shares]
        assert own <= min(uniform_error(samples, *ends, k) for ends in others) + slack


def test_clipped_uniform_levels_of_a_dead_channel():
    found = select(np.zeros(9), 2, "uniform-mse", UNIVERSAL[UNIVERSAL >= 0])
    assert found.points == pytest.approx([0, 1 / 3, 2 / 3, 1])  # nothing says to clip
    assert found.sse == 0


# --- what is refused ---


def test_a_search_too_large_says_how_large_and_how_long():
    with pytest.raises(ValueError, match="method='exact'") as error:
        select(np.zeros(3), 4, "exhaustive")
    assert f"16 of 377 points would try {comb(377, 16):.3g} subsets" in str(error.value)
    assert "years" in str(error.value)
    universal = universal_set("sq", signed=False)
    with pytest.raises(ValueError, match=r"try 6.44e\+03 subsets, about .* seconds"):
        select([0.1], 3, "exhaustive", universal, limit=6434)
    assert select([0.125], 3, "exhaustive", universal, limit=6435).sse == 0
    with pytest.raises(ValueError, match=r"subsets, about .* years"):  # no float holds the number
        select([0.1], k=1000, method="exhaustive", universal=np.arange(3000) / 3000)


SAMPLES = [0.1, 0.5, -0.2]


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        ([], {"bits": 2}, "no samples to select points for"),
        ([0.1, np.nan], {"bits": 2}, "NaN or infinity"),
        ([0.1, np.inf], {"bits": 2}, "NaN or infinity"),
        (SAMPLES, {"bits": 0}, "bits must be a whole number from 1 to 8, not 0"),
        (SAMPLES, {"bits": 33}, "not 33"),
        (SAMPLES, {"bits": 2.5}, "not 2.5"),
        (SAMPLES, {}, "give either bits or k"),
        (SAMPLES, {"bits": 2, "k": 4}, "give either bits or k"),
        (SAMPLES, {"k": 0}, "k must be a whole number of at least 1, not 0"),
        (SAMPLES, {"k": 1.5}, "not 1.5"),
        (SAMPLES, {"bits": 2, "universal": [0, 0.5, 0.25]}, "numpy.unique makes it so"),
        (SAMPLES, {"bits": 2, "universal": [0, 0, 0.25]}, "sorted and distinct"),
        (SAMPLES, {"bits": 2, "universal": []}, "at least one"),
        (SAMPLES, {"bits": 2, "universal": [0, np.nan]}, "finite points"),
        (SAMPLES, {"bits": 2, "weights": [1, 2]}, "one a sample, 3, not 2"),
        (SAMPLES, {"bits": 2, "weights": [1, 2, -1]}, "finite and not negative"),
        (SAMPLES, {"bits": 2, "weights": [0, 0, 0]}, "no samples to select points for"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_bad_arguments(samples, options, message, method):
    with pytest.raises(ValueError, match=message):
        select(samples, method=method, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 2, "method": "k-means"}, "one of exact, exhaustive, kmeans.*, not 'k-means'"),
        ({"bits": 2, "pinned": [0.3]}, "pinned point 0.3 is not in the universal set"),
        ({"k": 1, "pinned": [0, 1]}, "2 points are pinned, but only 1 can be selected"),
        ({"bits": 2, "pinned": [0], "method": "kmeans"}, "exact and exhaustive, not 'kmeans'"),
        ({"bits": 2, "method": "kmeans", "restarts": 0}, "at least 1"),
        ({"bits": 2, "method": "kmeans", "iterations": 0}, "at least 1"),
        ({"k": 2, "method": "symmetric", "universal": [-0.5, 0, 1]}, "both signs"),
        ({"k": 3, "method": "symmetric"}, "an even number, not 3"),
        ({"k": 1, "method": "uniform-mse"}, "at least 2 points, not 1"),
        ({"k": 2, "method": "uniform-mse", "universal": [0]}, "other than 0"),
        ({"k": 64, "method": "symmetric"}, "method='exact', which need not be symmetric"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        select(SAMPLES, **options)


def test_histograms_that_do_not_fit():
    histogram = Histogram.of(SAMPLES)
    with pytest.raises(ValueError, match="use 'kmeans-hist'"):
        select(histogram, 2, "kmeans")
    with pytest.raises(ValueError, match="already has its counts"):
        select(histogram, 2, weights=[1, 1, 1])
    with pytest.raises(ValueError, match=r"the same configuration, or .* edges_for"):
        select(histogram, 2, universal=universal_set(words=3))
    with pytest.raises(ValueError, match="one channel, not 2"):
        select(Histogram(2), 2)
    half = Histogram(2)
    half.count[0, 5] = 1
    with pytest.raises(ValueError, match=r"no samples .*, in channel 1"):
        select_channels(half, 2)
    with pytest.raises(ValueError, match="no channels"):
        select_channels([], 2)


def test_numbers_of_points_by_channel():
    """Each channel has the selection of its own number, of samples or of a histogram."""
    generator = np.random.default_rng(0)
    samples, numbers = generator.uniform(-1, 1, (4, 200)), np.array([3, 16, 3, 5])
    histogram = Histogram(4)
    histogram.add(samples[None])
    for data in (samples, list(samples), histogram):
        found = select_channels(data, k=numbers)
        for one, k, selection in zip(samples, numbers, found, strict=True):
            alone = select(one, k=int(k))
            assert np.array_equal(selection.points, alone.points)
            assert selection.sse == pytest.approx(alone.sse)
    for wrong in (numbers[:3], numbers[None]):
        with pytest.raises(ValueError, match="k must be one number, or one a channel, 4"):
            select_channels(histogram, k=wrong)
    with pytest.raises(ValueError, match="either bits or k"):
        select_channels(histogram, 4, k=numbers)
    with pytest.raises(ValueError, match="whole number of at least 1, not"):
        select_channels(histogram, k=[0, 1, 2, 3])


@pytest.mark.parametrize("k", ["a", None, np.nan, np.inf, 2.5, 0])
def test_a_number_of_points_that_is_none(k):
    with pytest.raises(ValueError, match=r"k must be a whole number|give either bits or k"):
        select([0.1, 0.2], k=k)


def test_a_universal_set_by_name_is_refused():
    with pytest.raises(ValueError, match=r"universal must be points, .* not 'dfsq'"):
        select([0.1, 0.2], 2, universal="dfsq")


@pytest.mark.parametrize(
    ("call", "shape"),
    [
        (lambda: select_channels(np.zeros(10), bits=2), r"\(\)"),
        (lambda: select_channels(np.zeros(10), bits=2, method="kmeans"), r"\(\)"),
        (lambda: select(np.zeros((3, 10)), bits=2), r"\(3, 10\)"),
    ],
)
def test_samples_of_another_shape(call, shape):
    with pytest.raises(ValueError, match=rf"must be of shape \(n,\), not {shape}; select takes"):
        call()
