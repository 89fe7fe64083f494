"""Budgeted widths: the error curves, the allocation, the plan of a network."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

import dfsq
from dfsq import budget
from dfsq.budget import allocate, plan, sensitivities
from dfsq.calibration import Calibration, calibrate
from dfsq.histogram import Histogram
from dfsq.selection import error_curves, select_channels

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("signed", [True, False])
def test_error_curves_are_the_errors_of_exact_selection(signed):
    generator = np.random.default_rng(0)
    samples = np.clip(generator.laplace(0, 0.2, (4, 300)), -1, 1)
    samples = samples if signed else np.abs(samples)
    weights = generator.uniform(0, 2, 300)
    universal = dfsq.universal_set("dfsq", signed=signed)
    curves = error_curves(samples, 40, universal, weights=weights)
    assert curves.shape == (4, 40)
    assert (np.diff(curves, axis=1) <= 1e-12).all()
    for k in (1, 2, 3, 5, 16, 40):
        found = select_channels(samples, k=k, universal=universal, weights=weights)
        np.testing.assert_allclose(curves[:, k - 1], [s.sse for s in found], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("spread", [1, 1e-3])
def test_error_curves_are_flat_beyond_the_points_of_use(spread):
    """What rounding adds there differs between machines, and would decide on numbers of points."""
    generator = np.random.default_rng(0)
    samples = spread * np.clip(generator.laplace(0, 0.2, (8, 40)), -1, 1)
    weights = generator.uniform(0, 2, 40)
    universal = dfsq.universal_set()
    curves = error_curves(samples, 256, universal, weights=weights)
    nearest = np.abs(samples[..., None] - universal).argmin(axis=2)
    for curve, points in zip(curves, nearest, strict=True):
        used = len(np.unique(points))
        assert (curve[used - 1 :] == curve[-1]).all()
        assert curve[used - 2] > curve[used - 1]


def test_error_curves_end_with_the_universal_set():
    curves = error_curves(np.linspace(-1, 1, 50)[None], 10_000, dfsq.universal_set("sq"))
    assert curves.shape[1] == len(dfsq.universal_set("sq"))


def test_curves_of_constant_and_empty_channels():
    curves = error_curves(np.zeros((2, 9)), 4)
    assert (curves == 0).all()
    histogram = Histogram(2)
    histogram.add(np.array([0.5, -0.25]).reshape(1, 2, 1))
    histogram.merge(histogram, weights=np.array([0, -1]))  # the second channel's samples go
    with pytest.raises(ValueError, match="no samples to select points for, in channel 1"):
        error_curves(histogram, 4)
    with pytest.raises(ValueError, match="no samples to select points for"):
        error_curves(np.zeros((2, 0)), 4)
    with pytest.raises(ValueError, match="NaN"):
        error_curves(np.array([[np.nan, 0.0]]), 4)


def brute(errors, sizes, bits):
    width = np.log2(np.arange(2, errors.shape[1] + 1))
    best = np.inf
    for chosen in product(range(len(width)), repeat=len(errors)):
        chosen = np.array(chosen)
        if sizes @ width[chosen] <= bits * sizes.sum() * (1 + 1e-12):
            best = min(best, errors[np.arange(len(errors)), chosen + 1].sum())
    return best


@pytest.mark.parametrize("seed", range(20))
def test_allocation_keeps_to_the_budget_and_is_near_the_optimum(seed):
    generator = np.random.default_rng(seed)
    power = generator.uniform(0.01, 3, 4)
    # as of quantization: a convex curve, the inverse square of the number of points
    errors = power[:, None] / np.arange(1, 9.0) ** 2
    sizes = generator.choice([10.0, 20, 30], 4)
    bits = generator.uniform(1.2, 2.8)
    points = allocate(errors, sizes, bits)
    assert sizes @ np.log2(points) <= bits * sizes.sum() * (1 + 1e-9)
    assert (points >= 2).all()
    found = errors[np.arange(4), points - 1].sum()
    # the optimum of the relaxed problem is at most one step of one channel away
    assert brute(errors, sizes, bits) <= found + 1e-12
    assert found <= brute(errors, sizes, bits) + np.max(errors[:, 1] - errors[:, 2])


def test_allocation_beats_equal_widths():
    generator = np.random.default_rng(1)
    errors = np.exp(generator.normal(0, 2, 50))[:, None] / np.arange(1, 65.0) ** 2
    points = allocate(errors, np.ones(50), 3)
    assert np.log2(points).mean() <= 3 + 1e-9
    assert errors[np.arange(50), points - 1].sum() < 0.8 * errors[:, 7].sum()


def test_equal_channels_get_equal_widths():
    points = allocate(np.ones((6, 1)) / np.arange(1, 65.0) ** 2, np.ones(6), 4)
    assert (points == 16).all()


def test_a_channel_without_error_gets_little():
    errors = np.stack([np.zeros(64), 1 / np.arange(1, 65.0) ** 2])
    points = allocate(errors, np.ones(2), 3)
    assert points[0] == 2
    assert points[1] == 32


def test_all_points_where_the_budget_allows():
    assert (allocate(1 / np.arange(1, 9.0)[None] ** 2, np.ones(1), 8) == 8).all()


@pytest.mark.parametrize(
    ("errors", "sizes", "bits"),
    [
        (np.ones((2, 4)), np.ones(3), 2),
        (np.ones(4), np.ones(4), 2),
        (np.ones((2, 4)), np.ones(2), 0),
        (np.array([[4, 2, 1], [np.nan, np.nan, np.nan]]), np.ones(2), 2),
    ],
)
def test_bad_allocations(errors, sizes, bits):
    with pytest.raises(ValueError, match=r"do not fit|at least 1|must be finite"):
        allocate(errors, sizes, bits)


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=2)]
    net = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1)).eval()
    for p in net.parameters():
        p.requires_grad_(False)
    return net


def images(count=4, side=24):
    noise = torch.rand(count, 3, side // 4, side // 4, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(noise, scale_factor=4, mode="bicubic").clamp(0, 1)


def test_sensitivity_of_a_linear_network_is_its_gain():
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 1, 1, bias=False))
    net[0].weight.data.fill_(1.0)
    net[1].weight.data.fill_(3.0)
    gains = sensitivities(net, ["0", "1"], [torch.rand(1, 1, 9, 9)])
    assert gains["0"] == pytest.approx(9, rel=1e-3)
    assert gains["1"] == pytest.approx(1, rel=1e-3)
    assert not any(module._forward_hooks for module in net.modules())


def two_resolutions():
    """A convolution at full resolution, and one at a quarter of it."""
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.AvgPool2d(4), nn.Conv2d(8, 8, 3, padding=1)]
    torch.manual_seed(0)
    return nn.Sequential(*layers, nn.Upsample(scale_factor=4), nn.Conv2d(8, 3, 3, padding=1)).eval()


def test_sensitivity_counts_the_pixels_of_a_layer():
    """An error a pixel weighs the same at a quarter of the resolution, brought up again."""
    first, second = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)
    second.weight.data.fill_(2.0)
    net = nn.Sequential(first, nn.AvgPool2d(4), second, nn.Upsample(scale_factor=4))
    gains = sensitivities(net, ["0", "2"], [torch.rand(1, 1, 160, 160)])
    assert gains["0"] == pytest.approx(2**2 / 16, rel=0.2)
    assert gains["2"] == pytest.approx(1, rel=1e-3)


def test_predicted_errors_of_two_resolutions_are_in_one_unit():
    net, x = two_resolutions(), images(4, 32)
    config = dfsq.Config.preset("dfsq-points-a", 4, error_units="output")
    calibration = calibrate(net, x, config, progress=False)
    gains = sensitivities(net, list(calibration.layers), calibration.batches)
    ratios = []
    for name, layer in calibration.layers.items():
        made = dfsq.quantize(net, calibration, replace(config, layers=(name,)), progress=False)
        points = made.get_submodule(name).activation.points
        error = [layer.histogram.squared_error(p, c) for c, p in enumerate(points)]
        norms = net.get_submodule(name).weight.square().sum((0, 2, 3)).numpy(force=True)
        predicted = gains[name] * (norms @ error) / layer.values_seen
        with torch.no_grad():
            ratios.append(float((made(x) - net(x)).square().sum()) / predicted)
    assert max(ratios) < 3 * min(ratios)  # of 16 times as many pixels


def test_errors_are_those_at_the_networks_output(monkeypatch):
    """By hand: an input's by all weights that it meets, a weight's by the power of its input."""
    net = network_of_groups()
    config, seen = dfsq.Config.preset("dfsq-budget", 2), []
    calibration = calibrate(net, images(), config, progress=False)
    monkeypatch.setattr(budget, "allocate", lambda *a: seen.append(a[0]) or allocate(*a))
    plan(net, dict.fromkeys("02", config), calibration)
    gain, conv = sensitivities(net, ["0", "2"], calibration.batches)["2"], net[2]
    with torch.no_grad():
        x = net[:2](images()).double().numpy()
    weight = conv.weight.detach().double().numpy()
    k = 4
    for c, points in enumerate(select_channels(calibration.layers["2"].histogram, k=k)):
        scale = np.abs(x[:, c]).max((1, 2), keepdims=True) + 1e-8
        off = np.abs((x[:, c] / scale)[..., None] - points.points).min(-1) * scale
        group = slice(3 * (c // 2), 3 * (c // 2) + 3)
        expected = gain * np.square(weight[group, c % 2]).sum() * np.square(off).mean()
        assert seen[0][3 + c, k - 1] == pytest.approx(expected, rel=1e-5, abs=1e-12)
    power = np.square(x).mean((0, 2, 3))
    assert (power[:2] == 0).all()  # the first group's count like average ones
    for o, row in enumerate(weight.reshape(6, -1)):
        moments = np.repeat(power[2:] if o > 2 else [power.mean()] * 2, 9)
        scale = np.abs(row).max()
        (points,) = select_channels([row / scale], k=k, weights=moments)
        off = np.abs(row[:, None] - scale * points.points).min(-1)
        assert seen[1][4 + o, k - 1] == pytest.approx(gain * moments @ off**2, rel=1e-5)


def network_of_groups():
    """A grouped convolution behind a ReLU, whose first group sees zeros."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2)).eval()
    net[0].bias.data = torch.tensor([-9.0, -9.0, 0.2, 0.2])
    return net


def test_a_layer_without_spread_has_a_gain():
    """An output of one value, and one that is constant; both have no standard deviation."""
    net = nn.Sequential(nn.Conv2d(1, 1, 3, bias=False), nn.Conv2d(1, 1, 1, bias=False))
    net[1].weight.data.fill_(3.0)
    for side in (3, 5):
        gains = sensitivities(net, ["0", "1"], [torch.ones(1, 1, side, side)])
        assert gains == pytest.approx({"0": 9, "1": 1}, rel=1e-3)


def test_sensitivities_are_drawn_on_the_cpu():
    """The same under another default device, and repeated."""
    net, batches = network(), list(images().split(1))
    expected = sensitivities(net, ["0", "2"], batches)
    with torch.device("meta"):
        assert sensitivities(net, ["0", "2"], batches) == expected


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x):
        return self.conv(x), x


def test_a_network_that_returns_no_tensor():
    config = dfsq.Config.preset("dfsq-budget", 3)
    with pytest.raises(ValueError, match=r"a network that returns one tensor, .* not a tuple"):
        dfsq.quantize(Pair(), images(), config, progress=False)


@pytest.mark.parametrize("suffix", ["", "-w"])
def test_a_calibration_without_what_the_budget_needs(suffix):
    config = dfsq.Config.preset(f"dfsq-budget{suffix}", 3)
    calibration = calibrate(network(), images(), dfsq.Config(layers=("0", "2")), progress=False)
    with pytest.raises(ValueError, match="layer '4' is not in the calibration"):
        dfsq.quantize(network(), calibration, config, progress=False)
    with pytest.raises(ValueError, match="layer '0' is not in the calibration"):
        dfsq.quantize(network(), Calibration({}, [], None), config, progress=False)
    calibration = calibrate(network(), images(), config, progress=False)
    calibration.batches = []
    with pytest.raises(ValueError, match=r"budget, .* need calibration images"):
        dfsq.quantize(network(), calibration, config, progress=False)


def depthwise_network(dead):
    """A depthwise convolution that sees a constant in some channels."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 3, 1)).eval()
    net[0].weight.data[:dead] = 0
    net[0].bias.data[:dead] = -0.5
    return net


@pytest.mark.parametrize("dead", [1, 6])
def test_constant_channels_of_a_depthwise_convolution(dead):
    net, config = depthwise_network(dead), dfsq.Config.preset("dfsq-budget", 3)
    calibration = calibrate(net, images(), config, progress=False)
    inputs, outputs = plan(net, dict.fromkeys("012", config), calibration)["1"]
    assert (inputs[:dead] == 2).all()
    assert (outputs >= 2).all()
    # the weights of a constant channel are treated like the others, those of a dead layer are not
    assert (outputs[:dead] > 2).all() == (dead < 6)
    made = dfsq.quantize(net, calibration, config, progress=False)
    x = images()
    assert torch.isfinite(made(x)).all()
    assert (made(x) - net(x)).abs().max() < 0.5 * net(x).abs().max()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_plan_keeps_to_both_budgets(bits):
    net, config = network(), dfsq.Config.preset("dfsq-budget", bits)
    calibration = calibrate(net, images(), config, progress=False)
    points = plan(net, {name: config for name in ("0", "2", "4")}, calibration)
    for side, sizes in ((0, None), (1, [27, 36, 72])):
        chosen = [points[name][side] for name in ("0", "2", "4")]
        weights = [1] * 3 if sizes is None else sizes
        total = sum(size * np.log2(k).sum() for size, k in zip(weights, chosen, strict=True))
        count = sum(size * len(k) for size, k in zip(weights, chosen, strict=True))
        assert total / count <= bits + 1e-9
        assert total / count > bits - 0.2
    assert [len(points[name][0]) for name in ("0", "2", "4")] == [3, 8, 8]
    assert [len(points[name][1]) for name in ("0", "2", "4")] == [8, 8, 3]


def test_sets_of_different_sizes_in_one_budget():
    """A signed input has more points to choose from than one behind a ReLU."""
    net, config = network(), dfsq.Config.preset("dfsq-budget-a", 6)
    calibration = calibrate(net, images() - 0.5, config, progress=False)
    assert not calibration.layers["0"].non_negative
    points = plan(net, dict.fromkeys("024", config), calibration)
    chosen = np.concatenate([points[name][0] for name in "024"])
    assert 6 - 0.2 < np.log2(chosen).mean() <= 6 + 1e-9
    for name in "24":
        assert points[name][0].max() <= len(dfsq.universal_set(signed=False))


def test_at_8_bits_all_channels_have_all_points():
    net = network()
    budget, exact = (
        dfsq.quantize(net, images() - 0.5, dfsq.Config.preset(name, 8), progress=False)
        for name in ("dfsq-budget", "dfsq-exact")
    )
    x = images() - 0.3
    assert torch.equal(budget(x), exact(x))
    assert budget.get_submodule("0").activation.count.tolist() == [256] * 3


@pytest.mark.parametrize("normalization", ["minmax", "static-channel"])
def test_activations_without_points_keep_their_width(normalization):
    overrides = {"0": {"normalization": normalization}}
    net, config = network(), dfsq.Config.preset("dfsq-budget", 3, overrides=overrides)
    calibration = calibrate(net, images(), config, progress=False)
    points = plan(net, {name: config.for_layer(name) for name in ("0", "2", "4")}, calibration)
    assert points["0"][0] is None
    for side, names, sizes in ((0, "24", [1, 1]), (1, "024", [27, 36, 72])):
        total = sum(
            size * np.log2(points[name][side]).sum()
            for size, name in zip(sizes, names, strict=True)
        )
        count = sum(size * len(points[name][side]) for size, name in zip(sizes, names, strict=True))
        assert 3 - 0.2 < total / count <= 3 + 1e-9
    made = dfsq.quantize(net, calibration, config, progress=False)
    assert made[0].activation.bits == 3
    x = images()
    assert (made(x) - net(x)).abs().max() < 0.5 * net(x).abs().max()


def test_networks_have_the_planned_points(tmp_path):
    net = network()
    made = dfsq.quantize(net, images(), dfsq.Config.preset("dfsq-budget", 3), progress=False)
    widths = set()
    for name in ("0", "2", "4"):
        conv = made.get_submodule(name)
        levels = torch.isfinite(conv.points).sum(1)
        widths |= set(levels.tolist())
        assert (conv.codes.flatten(1).amax(1) < levels).all()
        assert torch.isfinite(conv.weight).all()
    assert len(widths) > 1
    dfsq.save(made, tmp_path / "q.safetensors")
    again = dfsq.load(tmp_path / "q.safetensors", net)
    x = torch.rand(1, 3, 20, 21)
    assert torch.equal(made(x), again(x))


def test_a_budget_leaves_less_error_than_equal_widths():
    """On a network whose channels differ a hundredfold in range and in weight."""
    net = network()
    scale = torch.logspace(-1, 1, 8)
    net[0].weight.data *= scale[:, None, None, None]
    x = images(2, 32)
    error = {}
    for preset in ("dfsq-exact", "dfsq-budget"):
        made = dfsq.quantize(net, images(), dfsq.Config.preset(preset, 2), progress=False)
        error[preset] = float((made(x) - net(x)).square().mean())
    assert error["dfsq-budget"] < error["dfsq-exact"]


@pytest.mark.parametrize(
    "changes",
    [
        {"selector": "kmeans"},
        {"weights": "minmax"},
        {"error_units": "normalized"},
        {"sequential": True},
    ],
)
def test_what_a_budget_goes_with(changes):
    field, value = next(iter(changes.items()))
    with pytest.raises(ValueError, match=rf"budget=True goes with {field}=.*, not {value!r}"):
        dfsq.Config.preset("dfsq-budget", **changes)
