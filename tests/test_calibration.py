"""Calibration sees what it should, forgets nothing, and leaves the network as it was."""

import copy
import gc
import tempfile

import numpy as np
import pytest
import torch
from torch import nn

from dfsq.activations import center_max
from dfsq.calibration import (
    as_batches,
    calibrate,
    digest_of,
    find_layers,
    float_digest,
    needs_inputs,
)
from dfsq.config import Config
from dfsq.histogram import DYADIC_EDGES, Histogram, edges_for
from dfsq.universal import universal_set

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """Head, a residual block with a ReLU, a branch that is not run, tail."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(3, 6, 3, padding=1)
        self.body = nn.Sequential(
            nn.Conv2d(6, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 6, 3, padding=1)
        )
        self.norm = nn.BatchNorm2d(6)
        self.spare = nn.Conv2d(6, 6, 1)
        self.tail = nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x):
        x = self.head(x)
        return self.tail(x + self.norm(self.body(x)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, 12, 10 + 2 * i, generator=generator) for i in range(3)]


BODY = {"layers": ("head", "body.*", "tail"), "universal": "dfsq"}


def run(net, images, keep_inputs=None, **fields):
    config = Config(**(BODY | fields))
    return calibrate(net, images, config, keep_inputs=keep_inputs, progress=False)


def layer_inputs(net, images, name):
    """Inputs of a layer, recorded without the package."""
    seen = []
    hook = net.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0].clone()))
    with torch.no_grad():
        for image in images:
            net(image[None])
    hook.remove()
    return seen


def same(a, b):
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("count", "total", "squares"))


# --- what it remembers ---


@pytest.mark.parametrize("words", [3, 4])
def test_histograms_are_of_the_normalized_inputs(net, images, words):
    calibration = run(net, images, words=words, error_units="normalized")
    assert calibration.error_units == "normalized"
    edges = edges_for(universal_set(words=words))
    assert np.array_equal(calibration.edges, edges)
    assert calibration.images == 3
    for name, layer in calibration.layers.items():
        expected = Histogram(layer.histogram.channels, edges)
        for x in layer_inputs(net, images, name):
            expected.add(center_max(x, layer.non_negative)[0])
        assert same(layer.histogram, expected)
        assert layer.histogram.count.sum(axis=1).tolist() == [12 * (10 + 12 + 14)] * len(
            layer.histogram.count
        )


@pytest.mark.parametrize("stacked", [False, True])
def test_histograms_in_units_of_the_output(net, images, stacked):
    """Each map's samples count with the square of its range, also of images run together."""
    images = [image[:, :, :10] for image in images] if stacked else images
    calibration = run(net, images)
    assert calibration.error_units == "output"
    for name, layer in calibration.layers.items():
        expected = np.zeros((3, *layer.histogram.count.shape))
        for x in layer_inputs(net, images, name):
            z, _, scale = center_max(x, layer.non_negative)
            for c in range(x.shape[1]):
                own = Histogram.of(z[0, c].numpy())
                weight = float(scale[0, c]) ** 2
                expected[:, c] += weight * np.stack([own.count, own.total, own.squares])[:, 0]
        found = np.stack([getattr(layer.histogram, n) for n in ("count", "total", "squares")])
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
        assert layer.values_seen == sum(image[0].numel() for image in images)
        # so that the error of any points is that of the maps themselves
        points = np.array([-1, -0.25, 0, 0.5, 1])
        error = 0.0
        for x in layer_inputs(net, images, name):
            z, _, scale = (a.double()[0, 0] for a in center_max(x, layer.non_negative))
            off = (z[..., None] - torch.from_numpy(points)).abs().amin(-1) * scale
            error += float(off.square().sum())
        assert layer.histogram.squared_error(points) == pytest.approx(error, rel=1e-6)


def test_the_images_are_remembered(net, images):
    calibration = run(net, images)
    assert calibration.images == 3
    assert all(torch.equal(b[0], i) for b, i in zip(calibration.batches, images, strict=True))
    assert calibration.digest == digest_of(as_batches(images))


def test_layers_in_the_order_of_the_network(net, images):
    assert list(run(net, images).layers) == ["head", "body.0", "body.2", "tail"]


@pytest.mark.parametrize("cell", ["samples", "values"])
def test_spilled_inputs(net, images, cell):
    calibration = run(net, images, keep_inputs=True)
    assert calibration.keeps_inputs
    for name, layer in calibration.layers.items():
        inputs = layer_inputs(net, images, name)
        if cell == "samples":
            inputs = [center_max(x, layer.non_negative)[0] for x in inputs]
        expected = torch.cat([x[0].flatten(1) for x in inputs], dim=1).numpy()
        assert np.array_equal(getattr(layer, cell)(), expected)


def test_a_layers_name_is_no_path(images):
    net = nn.Sequential()
    net.add_module("a/b", nn.Conv2d(3, 3, 3))
    calibration = calibrate(net, images, Config.preset("dfsq"), progress=False)
    assert calibration.layers["a/b"].values().shape == (3, 12 * (10 + 12 + 14))


@pytest.mark.parametrize("most", [5000, 2500, 1250])
def test_thinned_values_are_of_all_columns(most):
    """Also where one value of as many is taken as the maps are wide, or twice as many."""
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False)).eval()
    columns = torch.linspace(0, 1, 24).expand(8, 1, 40, 24)
    config = Config(layers="0", normalization="static-tensor", static_range="mse")
    layer = calibrate(net, columns, config, keep_inputs=True, progress=False).layers["0"]
    thinned = layer.values(most)
    assert most / 2 < thinned.size <= most
    assert len(np.unique(thinned)) == 24
    for thousandths in (100, 500, 900):
        expected = np.quantile(columns, thousandths / 1000)
        assert np.quantile(thinned, thousandths / 1000) == pytest.approx(expected, abs=0.05)


def test_values_are_thinned_evenly(net, images):
    layer = run(net, images, keep_inputs=True).layers["tail"]
    everything = layer.values()
    thinned = layer.values(most=everything.size // 4)
    assert thinned.shape == (6, everything.shape[1] // 4)
    for i in range(30):  # one of each four in a row, the same of all channels
        stretch = everything[:, 4 * i : 4 * i + 4]
        assert (stretch == thinned[:, i : i + 1]).all(axis=0).sum() == 1
    assert np.array_equal(layer.values(most=everything.size), everything)


def test_extremes_are_of_all_values(net, images):
    """Also of those that thinning leaves out, and of a layer that is seen again as a signed one."""
    images = [images[0], images[1] - 0.5, images[2]]
    for name, layer in run(net, images).layers.items():
        inputs = torch.cat([x[0].flatten(1) for x in layer_inputs(net, images, name)], dim=1)
        assert np.array_equal(layer.low, inputs.amin(1).numpy())
        assert np.array_equal(layer.high, inputs.amax(1).numpy())
        assert layer.low.dtype == layer.high.dtype == np.float32


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, False),
        ({"selector": "kmeans"}, True),
        ({"selector": "kmeans-hist"}, False),
        ({"selector": "kmeans", "act_bits": 32}, False),
        ({"normalization": "minmax", "selector": "kmeans"}, False),
        ({"normalization": "static-tensor"}, False),
        ({"normalization": "static-tensor", "static_range": "percentile"}, True),
        ({"normalization": "static-channel", "static_range": "mse"}, True),
        ({"overrides": (("tail", {"selector": "kmeans"}),)}, True),
    ],
)
def test_inputs_are_kept_where_they_are_needed(net, images, fields, kept):
    calibration = run(net, images, **fields)
    assert calibration.keeps_inputs == kept
    assert all(bool(layer.inputs) == kept for layer in calibration.layers.values())
    if "overrides" not in fields:
        assert needs_inputs(Config(**fields)) == kept


def test_spilled_inputs_go_with_the_last_layer(net, images, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    layer = run(net, images, keep_inputs=True).layers["tail"]
    gc.collect()
    assert len(list(tmp_path.glob("*/*.npy"))) == 4 * 3
    assert layer.values().shape == (6, 432)
    del layer
    gc.collect()
    assert not list(tmp_path.iterdir())


# --- non-negative inputs ---


def flags(calibration):
    return {name: layer.non_negative for name, layer in calibration.layers.items()}


def test_non_negative_inputs_are_found(net, images):
    found = flags(run(net, images))
    assert found == {"head": True, "body.0": False, "body.2": True, "tail": False}


@pytest.mark.parametrize("keep_inputs", [False, True])
def test_a_layer_that_is_non_negative_on_the_first_image_only(net, images, keep_inputs):
    """It is signed, on all of the images; the other layers are as without it."""
    shifted = [images[0], images[1] - 0.5, images[2]]
    calibration = run(net, shifted, keep_inputs)
    assert flags(calibration) == {"head": False, "body.0": False, "body.2": True, "tail": False}
    stated = run(net, shifted, keep_inputs, non_negative=("body.2",))
    for name, layer in calibration.layers.items():
        assert same(layer.histogram, stated.layers[name].histogram)
        assert len(layer.inputs) == (3 if keep_inputs else 0)
        if keep_inputs:
            assert np.array_equal(layer.samples(), stated.layers[name].samples())


def test_stated_flags_are_taken_as_they_are(net, images):
    fields = {"non_negative": ("head", "tail"), "error_units": "normalized"}
    calibration = run(net, [i - 0.5 for i in images], **fields)
    assert flags(calibration) == {"head": True, "body.0": False, "body.2": False, "tail": True}
    expected = Histogram(3)
    for image in images:
        expected.add(center_max(image[None] - 0.5, non_negative=True)[0])
    assert same(calibration.layers["head"].histogram, expected)
    assert not any(flags(run(net, images, non_negative=())).values())


# --- which layers ---


def names(model, **fields):
    return list(find_layers(model, Config(**fields)))


def test_patterns(net):
    assert names(net) == ["head", "body.0", "body.2", "spare", "tail"]
    assert names(net, layers="body.*") == ["body.0", "body.2"]
    assert names(net, layers=("tail", "body.?")) == ["body.0", "body.2", "tail"]
    assert names(net, exclude=("body.*", "spare")) == ["head", "tail"]
    net.body_layers = ("body.*",)
    assert names(net) == ["body.0", "body.2"]
    assert names(net, exclude="body.2") == ["body.0"]
    assert names(net, layers="*", exclude="*e*") == ["body.0", "body.2", "tail"]


@pytest.mark.parametrize(
    "fields",
    [
        {"layers": ("body.*", "trunk.*")},
        {"exclude": ("trunk.*",)},
        {"non_negative": ("trunk.*",)},
        {"overrides": (("trunk.*", {"act_bits": 8}),)},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_pattern_that_matches_nothing_lists_what_there_is(net, fields):
    message = rf"{next(iter(fields))}: 'trunk\.\*' matches no convolution .* head, body.0, body.2"
    with pytest.raises(ValueError, match=message):
        names(net, **fields)


def test_networks_without_a_layer_to_quantize(net):
    with pytest.raises(ValueError, match="exclude leaves no convolution"):
        names(net, exclude="*")
    with pytest.raises(ValueError, match=r"no nn\.Conv2d"):
        names(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"put it into an nn\.Sequential"):
        names(net.head)


# --- the network is left untouched ---


class InterruptError(BaseException):  # as KeyboardInterrupt
    pass


def raise_on_call(number):
    """A forward hook that raises on its so manieth call."""
    calls = []

    def hook(*_):
        calls.append(None)
        if len(calls) == number:
            raise InterruptError

    return hook


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_network_is_left_untouched(net, images, training, fails, tmp_path, monkeypatch):
    """State, hooks, and the mode of each module, which need not be that of the whole."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    net.train(training)
    net.norm.train(not training)
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    if fails:
        hook = net.tail.register_forward_hook(raise_on_call(2))
        with pytest.raises(InterruptError):
            run(net, images, keep_inputs=True)
        hook.remove()
        assert not list(tmp_path.iterdir())
    else:
        run(net, images, keep_inputs=True)
    after = net.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert [m.training for m in net.modules()] == modes
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())
    assert not any(p.grad is not None for p in net.parameters())


# --- images ---


def test_forms_of_images():
    generator = np.random.default_rng(0)
    arrays = generator.integers(0, 256, (2, 8, 9, 3), np.uint8)
    floats = torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255
    forms = [list(arrays), arrays, list(floats), floats, [floats], iter(floats)]
    for form in forms:
        batches = as_batches(form)
        assert [tuple(b.shape) for b in batches] == [(1, 3, 8, 9)] * 2
        assert torch.equal(torch.cat(batches), floats)
    grey = as_batches([arrays[0, :, :, 0]])[0]
    assert torch.equal(grey, floats[:1, :1])


def test_digest_is_of_pixels_and_shapes(images):
    digest = digest_of(as_batches(images))
    assert digest == digest_of(as_batches([i.clone() for i in images]))
    changed = [images[0].clone(), *images[1:]]
    changed[0][0, 0, 0] += 1e-6
    others = [changed, images[::-1], images[:2], [i.transpose(1, 2) for i in images]]
    others.append([i.reshape(i.shape[0], i.shape[2], i.shape[1]) for i in images])  # same values
    assert len({digest, *(digest_of(as_batches(o)) for o in others)}) == 6


def test_digest_of_a_network_is_of_its_buffers_too(net):
    before = float_digest(net)
    net.norm.running_mean[0] += 1
    assert float_digest(net) != before


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "no calibration images; give at least one"),
        (["a.png"], "calibration image 0: .* not str"),
        ([np.zeros((8, 8, 3), np.float32)], "uint8 arrays .* not float32"),
        ([torch.zeros(3, 8, 8, dtype=torch.uint8)], r"not torch\.uint8"),
        ([torch.zeros(8, 8)], r"must be \(C, H, W\) or \(N, C, H, W\), .* not \(8, 8\)"),
        ([torch.zeros(3, 0, 8)], r"not \(1, 3, 0, 8\)"),
        (
            np.zeros((9, 8, 3), np.uint8),
            r"several, not one of shape \(9, 8, 3\); put it into a list",
        ),
        (np.zeros((9, 8), np.uint8), r"several, not one of shape \(9, 8\)"),
        (torch.rand(3, 9, 8), r"several, not one of shape \(3, 9, 8\)"),
        ([np.zeros((2, 9, 8, 3), np.uint8)], r"\(H, W, C\) or \(H, W\), not \(2, 9, 8, 3\)"),
        ([np.zeros(9, np.uint8)], r"calibration image 0: .* not \(9,\)"),
        ([torch.rand(3, 8, 8), torch.full((3, 8, 8), np.nan)], "calibration image 1 holds NaN"),
    ],
)
def test_bad_images(net, bad, message):
    with pytest.raises(ValueError, match=message):
        run(net, bad)


@pytest.mark.parametrize("value", [16, nn.ModuleList(), None])
def test_body_layers_that_are_no_patterns(net, value):
    net.body_layers = value
    message = "layers, or the network's body_layers, must be name patterns, such as .*, not"
    with pytest.raises(ValueError, match=message):
        find_layers(net, Config())
    del net.body_layers
    net.body_layers = "body.*"
    assert list(find_layers(net, Config())) == ["body.0", "body.2"]


@pytest.mark.parametrize("shape", [(1, 9, 9), (4, 9, 9)])
def test_wrong_channel_count(net, images, shape):
    with pytest.raises(ValueError, match=r"does not take an image of shape \(1, \d, 9, 9\)"):
        run(net, [*images, torch.rand(shape)])


@pytest.mark.parametrize("call", [lambda conv, x: conv(input=x), lambda conv, x: conv(x[0])[None]])
def test_convolutions_that_are_called_in_other_ways(call):
    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x):
            return call(self.conv, x)

    message = r"layer 'conv' must be called with one map of shape \(N, C, H, W\)"
    with pytest.raises(ValueError, match=message):
        calibrate(Called(), torch.rand(2, 3, 8, 8), Config(), progress=False)


def test_image_smaller_than_the_kernel():
    net = nn.Sequential(nn.Conv2d(3, 4, 5))
    with pytest.raises(ValueError, match=r"image of shape \(1, 3, 4, 4\): .*[Kk]ernel"):
        calibrate(net, [torch.rand(3, 4, 4)], Config(), progress=False)


def test_a_layer_that_is_not_run(net, images):
    with pytest.raises(ValueError, match=r"layer 'spare' was not run .* exclude it"):
        run(net, images, layers="*")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite(net, images, bad):
    net.body[2].weight.data[0, 0, 0, 0] = bad
    with pytest.raises(ValueError, match=r"layer 'body\.2': its weight holds NaN or infinity"):
        run(net, images)


def test_an_input_that_is_not_finite(net, images):
    net.head.bias.data[1] = np.inf
    with pytest.raises(ValueError, match=r"layer 'body\.0': its input holds NaN or infinity"):
        run(net, images)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions(net, images, dtype):
    """Samples of float32, so that statistics are the same for a network of any precision."""
    calibration = run(net.to(dtype), images, keep_inputs=True)
    assert calibration.layers["tail"].samples().dtype == np.float32
    assert calibration.layers["head"].histogram.edges is DYADIC_EDGES
