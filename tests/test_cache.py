"""Selections are remembered by content, and a cache that cannot be used is no error."""

import numpy as np
import pytest

from dfsq import cache, selection
from dfsq.histogram import Histogram, edges_for
from dfsq.universal import universal_set

UNIVERSAL = universal_set()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DFSQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def computed(monkeypatch):
    """Calls that were not answered from the cache."""
    calls, original = [], selection.select_channels

    def counted(*arguments, **options):
        calls.append(options)
        return original(*arguments, **options)

    monkeypatch.setattr(selection, "select_channels", counted)
    return calls


@pytest.fixture
def histogram():
    return make_histogram(0)


def make_histogram(seed, universal=UNIVERSAL):
    histogram = Histogram(3, edges_for(universal))
    histogram.add(np.random.default_rng(seed).uniform(-1, 1, (1, 3, 500)))
    return histogram


def select(data, k=4, method="exact", universal=UNIVERSAL, seed=0):
    return cache.select_channels(data, k=k, method=method, universal=universal, seed=seed)


def same(a, b):
    return all(
        np.array_equal(x.points, y.points)
        and np.array_equal(x.thresholds, y.thresholds)
        and (x.sse, x.method, x.seconds, x.duplicates) == (y.sse, y.method, y.seconds, y.duplicates)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("method", ["exact", "free", "kmeans-hist"])
def test_remembered_by_content(folder, computed, histogram, method):
    first = select(histogram, method=method)
    again = select(make_histogram(0), method=method)  # other objects, the same content
    assert len(computed) == 1
    assert same(first, again)
    direct = selection.select_channels(histogram, k=4, method=method, universal=UNIVERSAL)
    assert [s.points.tolist() for s in direct] == [s.points.tolist() for s in first]


def test_samples_are_remembered_too(folder, computed):
    samples = np.random.default_rng(0).uniform(-1, 1, (2, 300)).astype(np.float32)
    first = select(samples, method="kmeans")
    assert same(first, select(samples.copy(), method="kmeans"))
    assert len(computed) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"k": 5},
        {"method": "free"},
        {"universal": UNIVERSAL[::2]},
        {"data": make_histogram(1)},
        {"seed": 1, "method": "kmeans-hist"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_anything_else_is_computed(folder, computed, histogram, change):
    select(histogram)
    select(histogram, method="kmeans-hist")
    select(**({"data": histogram} | change))
    assert len(computed) == 3


def test_edges_are_part_of_the_key(folder, computed):
    """Two histograms of the same numbers, one edge of whose cells is another."""
    universal = universal_set(words=3)
    edges = edges_for(universal)
    low, high = edges[800:802]
    histograms = []
    for share in (0.25, 0.75):
        histogram = Histogram(3, np.sort([*edges, low + share * (high - low)]))
        for name in ("count", "total", "squares"):
            numbers = np.random.default_rng(0).uniform(size=histogram.count.shape)
            setattr(histogram, name, numbers)
        histograms.append(histogram)
    first, _ = (select(data, universal=universal) for data in histograms)
    assert len(computed) == 2
    assert same(first, select(histograms[0], universal=universal))
    assert len(computed) == 2


def test_another_version_of_the_code_computes_anew(folder, computed, histogram, monkeypatch):
    select(histogram)
    monkeypatch.setattr(cache, "_code_version", lambda: "another")
    select(histogram)
    assert len(computed) == 2


def test_no_cache_where_nothing_can_be_written(tmp_path, computed, histogram, monkeypatch):
    """The folder's place is taken by a file."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("DFSQ_CACHE", str(tmp_path / "file"))
    first, second = select(histogram), select(histogram)
    assert len(computed) == 2
    assert [s.points.tolist() for s in first] == [s.points.tolist() for s in second]


def test_errors_are_not_remembered(folder, histogram):
    for _ in range(2):
        with pytest.raises(ValueError, match="method must be one of"):
            select(histogram, method="best")


@pytest.mark.filterwarnings("ignore:.*Exception while loading results")
def test_a_damaged_entry_is_computed_anew(folder, computed, histogram):
    first = select(histogram)
    (entry,) = folder.rglob("output.pkl")
    entry.write_bytes(entry.read_bytes()[:100])
    second = select(histogram)
    assert len(computed) == 2
    assert [s.points.tolist() for s in first] == [s.points.tolist() for s in second]


def test_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("DFSQ_CACHE", str(tmp_path))
    assert cache.cache_folder() == tmp_path
    monkeypatch.delenv("DFSQ_CACHE")
    assert cache.cache_folder().name == "dfsq"
