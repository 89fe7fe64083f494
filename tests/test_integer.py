"""Quantized convolutions in integers."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from test_convert import make_images, make_net, quantize, run
from torch import nn

from dfsq.config import Config
from dfsq.integer import IntegerConv2d, fixed_point, to_integer, write_vectors

pytestmark = pytest.mark.usefixtures("one_thread")

VECTORS = Path(__file__).resolve().parents[1] / "data" / "integer_vectors.json"


def by_specification(v):
    """Codes, fixed point, accumulators and outputs, in plain numbers, one at a time."""
    x, points, weight = np.array(v["x"], np.float32), v["points"], v["weight"]
    images, channels, height, width = x.shape
    outputs, share = len(weight), len(weight[0])
    codes, sums, y = [], [], []
    for n in range(images):
        scale, offset = (np.array(v[k][n], np.float32) for k in ("scale", "offset"))
        a = np.empty(x.shape[1:], int)
        for c in range(channels):
            distinct = sorted(set(points[c]))
            thresholds = [p + q for p, q in pairwise(distinct)]  # of 2^-11
            for h in range(height):
                for w in range(width):
                    z = (x[n, c, h, w] - offset[c]) / scale[c]
                    cell = min(max(int(np.floor(np.float32(2048) * z)), -2048), 2047)
                    a[c, h, w] = sum(t <= cell for t in thresholds)
        largest = float(max(max(scale), max(abs(offset))))
        f = 0
        while largest * 2.0**f < 2**23:
            f += 1
        while largest * 2.0**f >= 2**24:
            f -= 1
        s = [round(float(value) * 2.0**f) for value in scale]
        m = [round(float(value) * 2.0**f) for value in offset]
        codes.append(a.tolist())
        assert [s, m, f] == [v["S"][n], v["M"][n], v["F"][n]]
        (sy, sx), (py, px), (dy, dx) = v["stride"], v["padding"], v["dilation"]
        size = len(v["accumulators"][n][0]), len(v["accumulators"][n][0][0])
        for o in range(outputs):
            first = o // (outputs // v["groups"]) * share
            for i in range(size[0]):
                for j in range(size[1]):
                    total = 0
                    for c in range(share):
                        product = inside = 0
                        for u, row in enumerate(weight[o][c]):
                            for t, tap in enumerate(row):
                                h, w = i * sy - py + u * dy, j * sx - px + t * dx
                                if 0 <= h < height and 0 <= w < width:
                                    product += tap * points[first + c][a[first + c, h, w]]
                                    inside += tap
                        total += s[first + c] * product + 1024 * m[first + c] * inside
                    sums.append(total)
                    y.append(total * (v["weight_scale"][o] * 2.0 ** (-10 - f)) + v["bias"][o])
    return codes, sums, np.array(y, np.float32)


@pytest.mark.parametrize("name", json.loads(VECTORS.read_text()))
def test_vectors_follow_the_specification(name):
    v = json.loads(VECTORS.read_text())[name]
    codes, sums, y = by_specification(v)
    assert codes == v["codes"]
    assert sums == np.ravel(v["accumulators"]).tolist()
    assert np.array_equal(y, np.ravel(v["y"]).astype(np.float32))


def test_the_package_gives_the_committed_vectors(tmp_path):
    write_vectors(tmp_path / "vectors.json")
    assert json.loads((tmp_path / "vectors.json").read_text()) == json.loads(VECTORS.read_text())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("preset", ["dfsq", "dfsq-subset", "dfsq-exact", "dfsq-budget"])
def test_a_layer_agrees_with_the_emulation(preset, bits):
    net = make_net()
    quantized = quantize(net, Config.preset(preset, bits))
    integer = to_integer(quantized)
    generator = torch.Generator().manual_seed(2)
    for layer, relu in (("body.0", False), ("body.2", True)):
        x = 3 * torch.randn(2, 6, 11, 12, generator=generator) + 1
        x = x.relu() if relu else x
        expected, found = (run(m.get_submodule(layer), x) for m in (quantized, integer))
        assert isinstance(integer.get_submodule(layer), IntegerConv2d)
        assert (found - expected).abs().max() <= 3e-6 * expected.abs().max()
    assert (run(integer) - run(quantized)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_float_layers_behind_keep_their_type(dtype):
    net = make_net().to(dtype)
    quantized = quantize(net, Config.preset("dfsq-subset", 4))
    x = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(3)).to(dtype)
    expected, found = run(quantized, x), run(to_integer(quantized), x)
    assert found.dtype == expected.dtype == dtype
    assert (found - expected).abs().max() <= 4 * max(torch.finfo(dtype).eps, 1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "padding": (2, 0)},
        {"dilation": (1, 2)},
        {"groups": 3, "padding": 1},
        {"kernel_size": 1},
        {"kernel_size": (1, 5), "padding": (0, 2), "bias": False},
    ],
    ids=str,
)
def test_any_geometry(options):
    torch.manual_seed(0)
    options = {"in_channels": 3, "out_channels": 6, "kernel_size": 3} | options
    net = nn.Sequential(nn.Conv2d(**options))
    quantized = quantize(net, Config.preset("dfsq-subset", 4), make_images())
    expected, found = run(quantized), run(to_integer(quantized))
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 3e-6 * expected.abs().max()


def test_borders_get_less_of_the_means():
    """A constant map: all codes are of the point 0, and only the means are left."""
    net = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, bias=False))
    nn.init.ones_(net[0].weight)
    quantized = quantize(net, Config.preset("dfsq-subset", 4), make_images(channels=1))
    x = torch.full((1, 1, 9, 9), 0.25)
    assert torch.allclose(run(to_integer(quantized), x), run(quantized, x))
    assert run(to_integer(quantized), x)[0, 0, 0, 0] == pytest.approx(4 * 0.25)
    assert run(to_integer(quantized), x)[0, 0, 4, 4] == pytest.approx(9 * 0.25)


@pytest.mark.parametrize("scale", [1e-8, 0.3, 1.0, 7e30])
def test_fixed_point_takes_all_bits(scale):
    S, M, _ = fixed_point(np.float32([[scale, scale / 3]]), np.float32([[0, -scale / 7]]))  # noqa: N806
    assert 2**23 <= S.max() <= 2**24
    assert M.min() == pytest.approx(-S.max() / 7, abs=1)


def test_the_float_network_is_refused():
    with pytest.raises(ValueError, match=r"not made by dfsq\.quantize"):
        to_integer(make_net())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config.preset("dfsq-subset-w", 4), "must both be quantized"),
        (Config.preset("dfsq-points-a", 4), "must both be quantized"),
        (Config.preset("uniform-minmax", 4), "by codebooks"),
        (Config.preset("free", 4), "not multiples"),
        (Config.preset("dfsq-subset", 4, words=3), "not multiples"),
    ],
)
def test_what_has_no_integer_points_is_named(config, message):
    with pytest.raises(ValueError, match=rf"layer 'body\.0': .*{message}"):
        to_integer(quantize(make_net(), config))


def test_other_padding_is_refused():
    net = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(ValueError, match="only zero padding"):
        to_integer(quantize(net, Config.preset("dfsq-subset", 4)))


def test_nan_is_refused():
    integer = to_integer(quantize(make_net(), Config.preset("dfsq-subset", 4)))
    with pytest.raises(ValueError, match=r"layer 'body\.0': its input holds NaN"):
        run(integer, torch.full((1, 3, 16, 16), float("nan")))


def test_a_map_smaller_than_the_kernel():
    quantized = quantize(nn.Sequential(nn.Conv2d(3, 3, 5)), Config.preset("dfsq-subset", 4))
    with pytest.raises(ValueError, match="a map of 4x20 is smaller than the kernel"):
        run(to_integer(quantized), torch.rand(1, 3, 4, 20))


def test_a_batch_of_no_images():
    quantized = quantize(make_net(), Config.preset("dfsq-subset", 4))
    none = torch.rand(0, 3, 16, 16)
    assert run(to_integer(quantized), none).shape == run(quantized, none).shape
