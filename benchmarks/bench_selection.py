"""Selection of one channel's points: the released loop and three better K-means, and the optimum.

All on the same samples: a channel of EDSR over the 32 calibration crops.
"""

import numpy as np
import pytest
from sklearn.cluster import KMeans

import dfsq
from dfsq.histogram import Histogram

UNIVERSAL = dfsq.universal_set()
K, RESTARTS, ITERATIONS, TOLERANCE = 16, 5, 100, 1e-3

EXACT = "exact, 4 bits, with its histogram"
LOOP = "released loop, one iteration"
LOOPS = f"{LOOP}, times the iterations that the next line's took"
VECTORIZED = "Lloyd by broadcast argmin"
SORTED = "Lloyd on sorted samples, sorting included"
SCIKIT = "scikit-learn's KMeans"

#: The first, at most so many times the second; of several the fastest.
RATIOS = [
    ((EXACT,), (LOOP,), 1.0),
    ((EXACT,), (LOOPS,), 1 / 5000),
    ((EXACT,), (VECTORIZED,), 1 / 50),
    ((EXACT,), (SORTED,), 1.0),
    ((EXACT,), (SCIKIT,), 1.0),
    (("exact, 8 bits, of a histogram",), ("exact, 4 bits, of a histogram",), 1.5),
    (("exact, 8 bits, with its histogram",), (EXACT,), 1.5),
]


@pytest.fixture(scope="module")
def samples():
    """Normalized inputs of one channel, float32, shape (294912,)."""
    net = dfsq.sr.load_model("edsr-x2")
    config = dfsq.Config.preset("dfsq", layers=("body.7.body.0",))
    seen = dfsq.calibrate(net, dfsq.sr.calibration_crops(scale=2), config, progress=False)
    found = seen.layers["body.7.body.0"].samples()[0]
    assert found.shape == (294_912,)
    return found


@pytest.fixture(scope="module")
def error(samples):
    """Squared error of the samples, with the points that serve them."""
    histogram = Histogram.of(samples)
    return lambda points: histogram.squared_error(points)


@pytest.fixture(scope="module")
def best(samples):
    return dfsq.select(samples, 4)


def snapped(centres):
    return UNIVERSAL[np.unique(np.abs(UNIVERSAL - np.reshape(centres, (-1, 1))).argmin(1))]


def start(samples, generator):
    return np.append(generator.choice(samples, K - 1), 0).astype(np.float64)


def test_released_loop(samples, measure):
    """An iteration as it is written, sample by sample; the whole takes some 50 of them."""
    centres = start(samples, np.random.default_rng(0))

    def iterate():
        clusters = [[] for _ in centres]
        for x in samples:
            clusters[np.argmin(np.abs(x - centres))].append(x)
        return [np.mean(c) if c else samples[0] for c in clusters]

    assert len(measure(LOOP, iterate, rounds=1, warmup_rounds=0)) == K


def lloyd(samples):
    """K-means as released with whole arrays; the snapped points of each run, and all iterations."""
    generator, done, runs = np.random.default_rng(0), 0, []
    for _ in range(RESTARTS):
        centres = start(samples, generator)
        for _ in range(ITERATIONS):
            done += 1
            nearest = np.abs(samples[:, None] - centres).argmin(1)
            count, total = np.bincount(nearest, minlength=K), np.bincount(nearest, samples, K)
            drawn = generator.choice(samples, K)
            updated = np.where(count > 0, total / np.maximum(count, 1), drawn)
            updated[-1] = 0
            if np.abs(updated - centres).max() < TOLERANCE:
                break
            centres = updated
        runs.append(snapped(centres))
    return runs, done


def test_vectorized(samples, measure, seconds, best, error):
    runs, done = measure(VECTORIZED, lambda: lloyd(samples), rounds=1, warmup_rounds=0)
    assert best.sse <= min(map(error, runs)) * (1 + 1e-12)
    if LOOP in seconds:
        seconds[LOOPS] = seconds[LOOP] * done
        print(f"\n{done} iterations in {RESTARTS} restarts")


def test_sorted(samples, measure, best):
    released = measure(SORTED, lambda: dfsq.select(samples, 4, "kmeans"))
    assert best.sse <= released.sse * (1 + 1e-12)


def test_scikit_learn(samples, measure, best, error):
    column = samples[:, None]
    found = measure(SCIKIT, lambda: KMeans(K, n_init=RESTARTS, random_state=0).fit(column), 2)
    assert best.sse <= error(snapped(found.cluster_centers_)) * (1 + 1e-12)


@pytest.mark.parametrize("bits", [4, 8])
def test_exact(samples, measure, best, error, bits):
    found = measure(
        f"exact, {bits} bits, with its histogram", lambda: dfsq.select(samples, bits), 20
    )
    assert found.sse == pytest.approx(error(found.points), rel=1e-12)
    assert found.sse <= best.sse


@pytest.mark.parametrize("bits", [4, 8])
def test_exact_of_a_histogram(samples, measure, best, bits):
    histogram = Histogram.of(samples)
    found = measure(f"exact, {bits} bits, of a histogram", lambda: dfsq.select(histogram, bits), 20)
    assert found.sse <= best.sse
