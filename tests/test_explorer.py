"""The selection explorer: what its script computes is what the package computes."""

import numpy as np
import pytest

import dfsq
from dfsq import selection
from dfsq.study import explorer

SETS = {1: ("dfsq", 1), 2: ("dfsq", 2), 3: ("dfsq", 3), 4: ("dfsq", 4), "sq": ("sq", None)}
STEPS = explorer.STEPS


def universal(words, signed):
    return dfsq.universal_set(*SETS[words], signed=signed)


@pytest.fixture(scope="module")
def network():
    """Some channels of the embedded network, as `make book` ships them."""
    layers = ("body.7.body.0", "body.7.body.2")
    return explorer.histograms(layers=layers, channels=6, crops=2)


@pytest.fixture(scope="module")
def script(browser, repository):
    """Evaluate an expression of the script's functions; ``cases`` is handed over."""
    page = browser.new_page()
    page.add_script_tag(path=repository / "book" / "_static" / "selection.js")
    page.evaluate("globalThis.S = dfsqSelection, null")
    yield page.evaluate
    page.close()


def synthetic(rng, kind, signed):
    """Sorted distinct steps and counts of a made-up channel."""
    low = -STEPS if signed else 0
    size = int(rng.integers(200, 4000))
    if kind == "normal":
        x = rng.normal(0, rng.uniform(0.02, 0.4), size)
    elif kind == "laplace":
        x = rng.laplace(0, rng.uniform(0.01, 0.2), size)
    elif kind == "uniform":
        x = rng.uniform(low / STEPS, 1, size)
    elif kind == "symmetric":  # mirrored optima are equal
        x = rng.normal(0, 0.2, size)
        x = np.concatenate([x, -x])
    elif kind == "midpoints":  # all on the edges of cells
        x = rng.integers(low // 32, 2049, int(rng.integers(2, 60))) / 2048
    elif kind == "points":  # all on universal points, so that the least error is 0
        x = rng.choice(universal(4, signed), int(rng.integers(1, 40)))
    elif kind == "sparse":
        x = np.concatenate([np.zeros(size), rng.uniform(0, 1, int(rng.integers(1, 6)))])
    elif kind == "one cell":
        cell = rng.integers(low // 32, 2048)
        x = (cell + rng.uniform(0, 1, 20)) / 2048
    elif kind == "constant":
        x = np.full(size, rng.uniform(low / STEPS, 1))
    else:
        x = np.zeros(size)  # dead
    x = x if signed else np.abs(x)
    return np.unique(np.clip(np.floor(x * STEPS), low, STEPS).astype(int), return_counts=True)


KINDS = (
    "normal", "laplace", "uniform", "symmetric", "midpoints", "points", "sparse", "one cell",
    "constant", "dead",
)  # fmt: skip


def cases(network, count=300):
    """Channels, bits and sets of all kinds; steps as an increasing list."""
    rng = np.random.default_rng(0)
    for n in range(count):
        signed = bool(rng.integers(2))
        steps, counts = synthetic(rng, KINDS[n % len(KINDS)], signed)
        words = list(SETS)[int(rng.integers(5))] if n % 2 else 4
        bits = int(rng.integers(2, 9))
        yield steps.tolist(), counts.tolist(), bits, words, signed
    for layer in network["layers"]:
        for channel in layer["channels"]:
            for bits in (2, 4, 8):
                steps = np.cumsum(channel["values"]).tolist()
                yield steps, channel["counts"], bits, 4, not layer["nonNegative"]


@pytest.mark.browser
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("words", SETS)
def test_universal_sets_are_equal(script, words, signed):
    found = script("([words, signed]) => [...S.universalSet(words, signed)]", [words, signed])
    assert found == universal(words, signed).tolist()


@pytest.mark.browser
def test_exact_selections_are_equal(script, network):
    sent = list(cases(network))
    found = script(
        f"""cases => cases.map(([steps, counts, bits, words, signed]) => {{
            const data = S.channel(Float64Array.from(steps, (s) => s / {STEPS}), counts);
            const points = S.exact(data, S.universalSet(words, signed), 2 ** bits);
            return [[...points], S.squaredError(data, points)];
        }})""",
        sent,
    )
    for (steps, counts, bits, words, signed), (points, error) in zip(sent, found, strict=True):
        best = dfsq.select(
            np.array(steps) / STEPS, bits, "exact", universal(words, signed), weights=counts
        )
        assert points == best.points.tolist(), (steps, counts, bits, words, signed)
        squares = np.dot(counts, (np.array(steps) / STEPS) ** 2)
        assert error == pytest.approx(best.sse, rel=1e-9, abs=1e-13 * squares)


@pytest.mark.browser
def test_errors_of_any_points_are_equal(script, network):
    rng = np.random.default_rng(1)
    sent = []
    for steps, counts, bits, _, signed in cases(network, 100):
        points = universal(4, signed)
        chosen = np.sort(rng.choice(points, min(2**bits, len(points)), replace=False))
        sent.append((steps, counts, chosen.tolist()))
    found = script(
        f"""cases => cases.map(([steps, counts, points]) => S.squaredError(
            S.channel(Float64Array.from(steps, (s) => s / {STEPS}), counts), points))""",
        sent,
    )
    for (steps, counts, points), error in zip(sent, found, strict=True):
        histogram = dfsq.Histogram.of(np.array(steps) / STEPS, weights=counts)
        assert error == pytest.approx(histogram.squared_error(points), rel=1e-9, abs=1e-12)


@pytest.mark.browser
def test_kmeans_takes_the_same_path(script, network):
    """Iteration by iteration, from the same draws, for the five runs that share a generator."""
    sent = list(cases(network, 60))
    draws = np.random.default_rng([0, 0]).random(5 * 256 * 101)  # a dead channel takes the most
    found = script(
        f"""([cases, draws]) => cases.map(([steps, counts, bits, words, signed]) => {{
            const data = S.channel(Float64Array.from(steps, (s) => s / {STEPS}), counts);
            const universal = S.universalSet(words, signed);
            let drawn = 0;
            const random = () => draws[drawn++];
            return Array.from({{ length: 5 }}, () => {{
                const states = [S.kmeansStart(data, 2 ** bits, random)];
                while (!states.at(-1).done) states.push(S.kmeansStep(data, states.at(-1), random));
                const points = S.snap(states.at(-1).centres, universal);
                const few = states.length < 10 ? states : [states[1], states[7], states.at(-1)];
                const path = few.map((s) => [s.iteration, s.centres]);
                return [path, [...points], S.squaredError(data, points)];
            }});
        }})""",
        [sent, draws.tolist()],
    )
    for (steps, counts, bits, words, signed), runs in zip(sent, found, strict=True):
        x, w, k = np.array(steps) / STEPS, np.array(counts, float), 2**bits
        sums = x, np.cumsum(w), np.cumsum(w * x), k
        for iterations, centres in runs[0][0][1:]:
            generator = np.random.default_rng([0, 0])
            expected = selection._lloyd(*sums, max(1, iterations), 1e-3, True, generator)
            assert centres == expected.tolist()
        generator = np.random.default_rng([0, 0])
        for path, *_ in runs:  # one after the other, each going on with the same draws
            assert path[-1][1] == selection._lloyd(*sums, 100, 1e-3, True, generator).tolist()
        best = dfsq.select(x, bits, "kmeans", universal(words, signed), weights=counts, seed=0)
        points, error = min((run[1:] for run in runs), key=lambda run: run[1])
        assert error == pytest.approx(best.sse, rel=1e-9, abs=1e-12)
        assert points == best.points.tolist()
