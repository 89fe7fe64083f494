"""On the embedded network's own activations, the exact points are never worse than K-means'."""

import numpy as np
import pytest
import torch

from dfsq.calibration import calibrate
from dfsq.config import Config
from dfsq.convert import quantize
from dfsq.selection import select_channels
from dfsq.sr import calibration_crops, load_model
from dfsq.universal import universal_set


@pytest.fixture(scope="module")
def network():
    return load_model("edsr-x2")


@pytest.fixture(scope="module")
def calibration(network):
    images = calibration_crops(scale=2, count=2, size=32)
    released = Config.preset("dfsq")
    return calibrate(network, images, released, keep_inputs=True, progress=False)


def select(layer, bits, method):
    universal = universal_set(signed=not layer.non_negative)
    data = layer.samples() if method == "kmeans" else layer.histogram
    return select_channels(data, bits, method, universal)


def test_layers_and_flags_of_the_paper(calibration):
    """The second convolution of each block is behind a ReLU; no other input is non-negative."""
    expected = {f"body.{i}.body.{j}": j == 2 for i in range(16) for j in (0, 2)}
    assert {name: c.non_negative for name, c in calibration.layers.items()} == expected
    assert sum(c.histogram.channels for c in calibration.layers.values()) == 2048


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_exact_is_never_worse_than_kmeans(calibration, bits):
    total = {"exact": 0.0, "kmeans": 0.0}
    for name, layer in calibration.layers.items():
        exact, kmeans = (select(layer, bits, method) for method in total)
        for channel, (a, b) in enumerate(zip(exact, kmeans, strict=True)):
            assert a.sse <= b.sse + 1e-9, (name, channel)
            assert a.samples == b.samples == 2 * 32 * 32
        for method, found in (("exact", exact), ("kmeans", kmeans)):
            total[method] += sum(s.sse for s in found)
    assert total["exact"] < 0.999 * total["kmeans"]


@pytest.mark.parametrize("bits", [2, 4])
def test_free_codebooks_are_the_ceiling(calibration, bits):
    for name in ("body.0.body.0", "body.7.body.2", "body.15.body.2"):
        exact, free = (select(calibration.layers[name], bits, m) for m in ("exact", "free"))
        assert all(b.sse <= a.sse + 1e-9 for a, b in zip(exact, free, strict=True))


def test_sums_of_the_histograms_are_those_of_the_samples(calibration):
    """The errors that are compared above come from one and the other."""
    for name in ("body.3.body.0", "body.3.body.2"):
        layer = calibration.layers[name]
        samples = layer.samples().astype(np.float64)
        for channel in (0, 31, 63):
            points = select(layer, 4, "exact")[channel].points
            direct = (np.abs(samples[channel][:, None] - points).min(axis=1) ** 2).sum()
            assert layer.histogram.squared_error(points, channel) == pytest.approx(direct, rel=1e-9)


def test_more_bits_are_closer_to_the_float_network(network, calibration):
    x = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, errors = network(x), []
        for bits in (2, 4, 6):
            config = Config.preset("dfsq-points", bits)
            result = quantize(network, calibration, config, progress=False)(x)
            errors.append(float((result - expected).square().mean()))
    assert errors[0] > 4 * errors[1] > 16 * errors[2]
