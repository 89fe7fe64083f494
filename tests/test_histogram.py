"""Histograms give the exact error of every subset, whatever the data and its amount."""

import numpy as np
import pytest
import torch

from dfsq.histogram import DYADIC_EDGES, Histogram, cell_bounds, edges_for, is_dyadic
from dfsq.universal import universal_set

UNIVERSAL = universal_set()


def direct_error(samples, points, weights=None):
    distances = np.abs(np.asarray(samples, float)[:, None] - np.asarray(points)[None]).min(axis=1)
    return float(np.sum(distances**2 * (1 if weights is None else weights)))


def random_subset(generator, universal=UNIVERSAL):
    size = generator.integers(1, min(40, len(universal)))
    return np.sort(generator.choice(universal, size, replace=False))


def parts(histogram):
    return np.stack([histogram.count, histogram.total, histogram.squares])


def test_error_of_any_subset_is_exact():
    """In integers: samples and points are multiples of 2^-12, many samples lie on midpoints."""
    generator = np.random.default_rng(0)
    for _ in range(200):
        samples = generator.integers(-4096, 4097, 300)
        subset = random_subset(generator)
        scaled = (subset * 4096).astype(int)
        expected = int((np.abs(samples[:, None] - scaled[None]).min(axis=1) ** 2).sum())
        assert Histogram.of(samples / 4096).squared_error(subset) * 4096**2 == expected


@pytest.mark.parametrize("words", [1, 2, 3, 4])
def test_error_on_real_numbers(words):
    universal = universal_set(words=words)
    generator = np.random.default_rng(words)
    samples = generator.uniform(-1.2, 1.2, 5000)  # beyond the outer points as well
    histogram = Histogram.of(samples, edges_for(universal))
    for _ in range(50):
        subset = random_subset(generator, universal)
        expected = direct_error(samples, subset)
        assert histogram.squared_error(subset) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_weights():
    generator = np.random.default_rng(1)
    samples, weights = generator.uniform(-1, 1, 500), generator.uniform(0, 3, 500)
    histogram = Histogram.of(samples, weights=weights)
    subset = random_subset(generator)
    expected = direct_error(samples, subset, weights)
    assert histogram.squared_error(subset) == pytest.approx(expected, rel=1e-12)
    assert histogram.count.sum() == pytest.approx(weights.sum())


def check_cells(edges, on, below):
    """One value on each edge fills all cells but the first, one below each all but the last."""
    for values, empty in ((on, 0), (below, -1)):
        histogram = Histogram(1, edges)
        histogram.add(values[None, None])
        expected = np.ones(len(edges) + 1)
        expected[empty] = 0
        assert np.array_equal(histogram.count[0], expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_half_precision_is_exact(channels):
    half = torch.rand(2, channels, 50).half()
    expected, as_array, as_tensor, bfloat = (Histogram(channels) for _ in range(4))
    expected.add(half.double())
    as_array.add(half.numpy())
    as_tensor.add(half)
    assert np.array_equal(parts(as_array), parts(expected))
    assert np.array_equal(parts(as_tensor), parts(expected))
    bfloat.add(half.bfloat16())
    assert bfloat.total.sum() == half.bfloat16().double().sum()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cells_begin_on_their_edges(dtype):
    """A value on an edge belongs to the upper cell, the float just below it to the lower one.

    Computed by z + 1 in floating point, the latter fails near z in (-0.5, 0).
    """
    edges = DYADIC_EDGES.astype(dtype)
    check_cells(DYADIC_EDGES, edges, np.nextafter(edges, dtype(-1)))
    trap = np.float32(-0.25)
    assert np.floor(2048 * (np.nextafter(trap, np.float32(-1)) + np.float32(1))) == 1536


def test_outer_cells_are_open():
    histogram = Histogram.of([-7.0, -1.0, 1.0, 7.0])
    assert histogram.count[0, [0, -1]].tolist() == [2, 2]
    assert histogram.squared_error([-1, 1]) == 72


def test_midpoint_belongs_to_the_upper_point():
    """Not seen in the error, but in the cells that are the upper point's."""
    lower, upper = 0.25, 0.5
    (stop, _) = cell_bounds(np.array([lower, upper]), DYADIC_EDGES)
    histogram = Histogram.of([0.375])
    assert histogram.count[0, :stop].sum() == 0
    assert histogram.count[0, stop:].sum() == 1


def test_edges_for_the_grid_and_off_it():
    assert edges_for(UNIVERSAL) is DYADIC_EDGES
    assert edges_for(universal_set("sq", signed=False)) is DYADIC_EDGES
    off = universal_set(words=3)
    edges = edges_for(off)
    assert np.all(np.diff(edges) > 0)
    assert np.isin((off[:, None] + off[None]) / 2, edges).all()
    assert is_dyadic([0.5, -1, 3 / 2048])
    assert not is_dyadic([1 / 4096])
    assert not is_dyadic([1.5])


def test_off_grid_cells_begin_on_their_edges():
    edges = edges_for(universal_set(words=3))
    check_cells(edges, edges, np.nextafter(edges, -2))


def test_a_subset_that_the_cells_do_not_tell_apart_is_refused():
    histogram = Histogram.of([0.1])
    with pytest.raises(ValueError, match=r"edges_for\(universal\)"):
        histogram.squared_error(universal_set(words=3)[10:20])
    with pytest.raises(ValueError, match=r"edges_for\(universal\)"):
        histogram.squared_error([1.0, 1.5])


@pytest.mark.parametrize("words", [3, 4])
def test_merge_is_the_histogram_of_both(words):
    edges = edges_for(universal_set(words=words))
    generator = np.random.default_rng(2)
    data = generator.integers(-2048, 2049, (4, 3, 1000)) / 2048  # sums are exact in any order
    together = Histogram(3, edges)
    together.add(data)
    halves = [Histogram(3, edges), Histogram(3, edges)]
    for half, part in zip(halves, (data[:1], data[1:]), strict=True):
        half.add(part)
    halves[0].merge(halves[1])
    assert np.array_equal(parts(halves[0]), parts(together))


def test_merge_with_weights_by_channel():
    generator = np.random.default_rng(2)
    first, second = Histogram(3), Histogram(3)
    data = generator.integers(-2048, 2049, (2, 1, 3, 500)) / 2048
    first.add(data[0])
    second.add(data[1])
    expected = parts(first) + np.array([0.25, 0, 3])[:, None] * parts(second)
    first.merge(second, [0.25, 0, 3])
    assert np.array_equal(parts(first), expected)
    for channel, weight in enumerate([0.25, 0, 3]):
        subset = random_subset(generator)
        weights = np.repeat([1, weight], 500)
        samples = data[:, 0, channel].ravel()
        error = direct_error(samples, subset, weights)
        assert first.squared_error(subset, channel) == pytest.approx(error, rel=1e-12)


def test_only_equal_cells_merge():
    with pytest.raises(ValueError, match="same channels and cells"):
        Histogram(2).merge(Histogram(3))
    with pytest.raises(ValueError, match="same channels and cells"):
        Histogram(2).merge(Histogram(2, edges_for(universal_set(words=3))))


def test_fold_is_the_histogram_of_magnitudes():
    generator = np.random.default_rng(3)
    samples = generator.uniform(-1, 1, 2000)  # none on an edge
    folded, expected = Histogram.of(samples).fold(), Histogram.of(np.abs(samples))
    np.testing.assert_allclose(parts(folded), parts(expected), rtol=1e-12)
    positive = UNIVERSAL[UNIVERSAL >= 0]
    on_edges = generator.integers(-2048, 2049, 500) / 2048
    for _ in range(20):
        subset = random_subset(generator, positive)
        error = Histogram.of(on_edges).fold().squared_error(subset)
        assert error == direct_error(np.abs(on_edges), subset)


def test_fold_needs_the_dyadic_grid():
    with pytest.raises(ValueError, match="dyadic grid"):
        Histogram.of([0.1], edges_for(universal_set(words=3))).fold()


def test_any_amount_of_data_in_fixed_memory():
    generator = np.random.default_rng(4)
    histogram, samples = Histogram(2), []
    for _ in range(20):
        batch = generator.uniform(-1, 1, (3, 2, 11, 7)).astype(np.float32)
        histogram.add(torch.from_numpy(batch))
        samples.append(batch.transpose(1, 0, 2, 3).reshape(2, -1))
    assert parts(histogram).nbytes == 2 * 96 * 1024
    samples = np.concatenate(samples, axis=1)
    for channel in (0, 1):
        subset = random_subset(generator)
        expected = direct_error(samples[channel], subset)
        assert histogram.squared_error(subset, channel) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("shape", "weights", "message"),
    [
        ((1, 3, 5), None, r"shape \(N, 2, ...\), not \(1, 3, 5\)"),
        ((2, 5), None, r"not \(2, 5\)"),
        ((1, 2, 5), [1, 2], "one a sample, 5, not 2"),
        ((1, 2, 2), [1, -1], "finite and not negative"),
        ((1, 2, 2), [1, np.nan], "finite and not negative"),
    ],
)
def test_bad_samples(shape, weights, message):
    with pytest.raises(ValueError, match=message):
        Histogram(2).add(np.zeros(shape), weights)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_add_nothing(bad):
    histogram = Histogram(1)
    with pytest.raises(ValueError, match="NaN or infinity"):
        histogram.add(np.array([[[0.1, bad]]]))
    assert not parts(histogram).any()
