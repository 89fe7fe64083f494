"""From float to quantized."""

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import dfsq
from dfsq.activations import CodebookQuantizer, center_max, static_range
from dfsq.calibration import Calibration, calibrate
from dfsq.config import PRESETS, Config
from dfsq.convert import QuantConv2d
from dfsq.selection import select_channels
from dfsq.universal import universal_set
from dfsq.weights import quantize_weight

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """A residual block between head and tail."""

    body_layers = ("body.*",)

    def __init__(self, channels=3, features=6, body=None):
        super().__init__()
        self.head = nn.Conv2d(channels, features, 3, padding=1)
        self.body = body or nn.Sequential(
            nn.Conv2d(features, features, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(features, features, 3, padding=1),
        )
        self.tail = nn.Conv2d(features, channels, 3, padding=1)

    def forward(self, x):
        x = self.head(x)
        return self.tail(x + self.body(x))


@pytest.fixture
def net():
    return make_net()


def make_net(seed=0, **options):
    torch.manual_seed(seed)
    return Net(**options).eval()


def make_images(channels=3, count=2):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, channels, 16, 12, generator=generator)


IMAGES = make_images()


def quantize(net, config=None, images=IMAGES):
    return dfsq.quantize(net, images, config, progress=False)


@torch.no_grad()
def run(net, images=IMAGES):
    return net(images)


# --- what a quantized network computes ---


def test_convolution_by_convolution(net):
    """Against the parts, put together here."""
    config = Config.preset("dfsq-subset", 3)
    with torch.no_grad():
        head = net.head(IMAGES)
        inputs = [head, net.body[0](head).relu()]
        x = head
        for conv, seen, non_negative in (
            (net.body[0], inputs[0], False),
            (net.body[2], inputs[1], True),
        ):
            samples = [center_max(i[None], non_negative)[0][0].flatten(1) for i in seen]
            found = select_channels(
                torch.cat(samples, dim=1).numpy(),
                3,
                "exact",
                universal_set(signed=not non_negative),
            )
            quantizer = CodebookQuantizer([s.points for s in found], non_negative=non_negative)
            weight = quantize_weight(conv.weight, 3, "subset").dequantize()
            x = functional.conv2d(quantizer(x), weight, conv.bias, padding=1)
            x = x.relu() if conv is net.body[0] else x
        expected = net.tail(head + x)
    assert torch.equal(run(quantize(net, config)), expected)


@pytest.mark.parametrize("config", ["dfsq", {"act_bits": 4}])
def test_a_configuration_that_is_none(net, config):
    with pytest.raises(ValueError, match=r"must be a dfsq.Config, such as .*preset\('dfsq'\), not"):
        dfsq.quantize(net, make_images(), config)


def test_float_is_the_network_itself(net):
    assert torch.equal(run(quantize(net, Config.preset("float"))), run(net))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("suffix", ["-w", "-a"])
def test_weights_only_and_activations_only(net, name, suffix):
    quantized = quantize(net, Config.preset(name + suffix, 4))
    for layer, conv in ((f"body.{i}", quantized.body[i]) for i in (0, 2)):
        original = net.get_submodule(layer)
        assert (conv.activation is not None) == (suffix == "-a" and name != "float")
        assert (conv.codes is not None) == (suffix == "-w" and name != "float")
        fitted = name in ("dfsq-exact", "dfsq-budget")
        assert conv.fitted == ((("bias",) if suffix == "-w" else ("bias", "weight")) * fitted)
        if not fitted:  # to which the float weight may be the best fit
            assert torch.equal(conv.weight, original.weight) == (conv.codes is None)
        assert torch.equal(conv.bias, original.bias) == (not fitted)


@pytest.mark.parametrize("bits", [2, 8])
def test_number_of_levels(net, bits):
    quantized = quantize(net, Config(bits, bits))
    seen = {}
    for i in (0, 2):
        conv = quantized.body[i]
        assert all(len(channel.unique()) <= 2**bits for channel in conv.weight)
        conv.activation.register_forward_hook(lambda _, x, y, i=i: seen.update({i: y}))
    run(quantized)
    for maps in seen.values():
        assert all(len(plane.unique()) <= 2**bits for plane in maps.flatten(0, 1))


def test_eight_bits_are_closer_than_two(net):
    expected = run(net)
    errors = [(run(quantize(net, Config(b, b))) - expected).abs().mean() for b in (2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 10


def test_overrides(net):
    config = Config(4, 4, overrides={"body.0": {"weight_bits": 8, "act_bits": 32}})
    quantized = quantize(net, config)
    rows = dfsq.summary(quantized).set_index("layer")
    assert rows.weight_bits.to_dict() == {"body.0": 8, "body.2": 4}
    assert rows.act_bits.to_dict() == {"body.0": 32, "body.2": 4}
    assert quantized.body[0].activation is None
    assert quantized.body[0].points.shape == (6, 256)
    assert quantized.body[0].codes.max() > 15


# --- the float network stays as it was ---


@pytest.mark.parametrize("training", [False, True])
def test_float_network_is_left_untouched(net, training):
    net.train(training)
    before, modules = copy.deepcopy(net.state_dict()), list(net.modules())
    quantized = quantize(net)
    assert list(net.modules()) == modules
    assert all(torch.equal(net.state_dict()[k], v) for k, v in before.items())
    assert all(m.training == training for m in net.modules())
    assert not any(m.training for m in quantized.modules())
    # nothing is shared: a change of one is not seen in the other
    with torch.no_grad():
        for tensor in quantized.state_dict().values():
            tensor.zero_()
    assert all(torch.equal(net.state_dict()[k], v) for k, v in before.items())


@pytest.mark.parametrize("name", PRESETS)
def test_modes_and_hooks_stay_with_every_preset(net, name):
    net.train()
    before = copy.deepcopy(net.state_dict())
    quantized = quantize(net, Config.preset(name, 3))
    assert all(m.training for m in net.modules())
    assert all(torch.equal(net.state_dict()[k], v) for k, v in before.items())
    for model in (net, quantized):
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_an_error_on_the_way_names_the_layer_and_leaves_the_network(net):
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="Use method='exact'"):
        quantize(net, Config(selector="exhaustive"))
    calibration = calibrate(net, IMAGES, Config(), progress=False)
    net.body[2].weight.data[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"layer 'body\.2': the weight holds NaN"):
        quantize(net, images=calibration)
    net.body[2].weight.data[0, 0, 0, 0] = before["body.2.weight"][0, 0, 0, 0]
    net.body[0].bias.data[1] = np.inf
    with pytest.raises(ValueError, match=r"layer 'body\.0': the bias holds NaN or infinity"):
        quantize(net, images=calibration)
    net.body[0].bias.data[1] = before["body.0.bias"][1]
    assert type(net.body[0]) is nn.Conv2d
    assert all(torch.equal(net.state_dict()[k], v) for k, v in before.items())


# --- one calibration, several configurations ---


def test_calibration_serves_several_configurations(net):
    calibrations = {
        units: calibrate(net, IMAGES, Config(error_units=units), keep_inputs=True, progress=False)
        for units in ("normalized", "output")
    }
    for name in PRESETS:
        if name in ("float", "sq"):
            continue
        config = Config.preset(name, 3)
        calibration = calibrations[config.error_units]
        reused = quantize(net, config, calibration)
        assert torch.equal(run(reused), run(quantize(net, config)))
        assert reused.quantization.calibration_digest == calibration.digest


def test_weights_only_need_no_layer_in_the_calibration(net):
    for name in ("dfsq-w", "dfsq-exact-w"):
        config = Config.preset(name)
        calibration = calibrate(net, IMAGES, replace(config, layers="head"), progress=False)
        assert torch.equal(run(quantize(net, config, calibration)), run(quantize(net, config)))
    # the released method's weights need no image either
    calibration = Calibration({}, [], None)
    config = Config.preset("dfsq-w")
    assert torch.equal(run(quantize(net, config, calibration)), run(quantize(net, config)))
    with pytest.raises(ValueError, match="compensation and bias_correction need calibration imag"):
        quantize(net, Config.preset("dfsq-exact-w"), calibration)


def test_calibrations_that_do_not_fit(net):
    calibration = calibrate(net, IMAGES, Config(), progress=False)
    with pytest.raises(ValueError, match=r"'body\.0': kmeans needs .* keep_inputs=True"):
        quantize(net, Config(selector="kmeans"), calibration)
    with pytest.raises(ValueError, match=r"'body\.0': static-tensor needs"):
        quantize(net, Config(normalization="static-tensor", static_range="mse"), calibration)
    with pytest.raises(ValueError, match=r"'body\.0': .* do not fit the universal set; calibrate"):
        quantize(net, Config(words=3), calibration)
    with pytest.raises(ValueError, match="layer 'head' is not in the calibration"):
        quantize(net, Config(layers="*"), calibration)
    with pytest.raises(ValueError, match=r"layer 'body\.0' has 8 input .* 6; calibrate this"):
        quantize(make_net(features=8), None, calibration)
    with pytest.raises(ValueError, match="of a network of other weights; calibrate this one"):
        quantize(make_net(seed=1), None, calibration)


def test_a_calibration_of_other_signs(net):
    calibration = calibrate(net, IMAGES, Config(), progress=False)
    for stated, found in (((), True), (("body.*",), False)):
        config = Config(non_negative=stated)
        layer = "body.2" if found else "body.0"
        with pytest.raises(ValueError, match=rf"{layer!r} has the input non_negative={found} in"):
            quantize(net, config, calibration)
        weights_only = replace(config, act_bits=32)
        assert torch.equal(
            run(quantize(net, weights_only, calibration)), run(quantize(net, weights_only))
        )
    same = Config(non_negative=("body.2",))
    assert torch.equal(run(quantize(net, same, calibration)), run(quantize(net)))


@pytest.mark.parametrize("grain", ["tensor", "channel"])
def test_static_ranges_of_all_values(net, grain):
    """An outlier that thinning skips is within the range by MinMax, and unknown to the others."""
    images = torch.rand(1, 3, 450, 450, generator=torch.Generator().manual_seed(2))
    images[0, 1, 0, 1] = 50.0  # every second value is looked at
    net = nn.Sequential(net.head).eval()
    name = f"static-{grain}"
    calibration = calibrate(
        net, images, Config.preset(f"{name}-mse", 4), keep_inputs=True, progress=False
    )
    thinned = calibration.layers["0"].values()
    assert thinned.max() < 50
    exact = quantize(net, Config.preset(f"{name}-minmax", 4), images)[0].activation
    values = [images.flatten()] if grain == "tensor" else images[0].flatten(1)
    assert torch.equal(exact.low.flatten(), torch.stack([v.min() for v in values]))
    assert torch.equal(exact.high.flatten(), torch.stack([v.max() for v in values]))
    for method in ("percentile", "mse"):
        config = Config.preset(f"{name}-mse", 4, static_range=method)
        made = quantize(net, config, calibration)[0].activation
        rows = [thinned.ravel()] if grain == "tensor" else thinned
        expected = np.float32([static_range(row, 4, method) for row in rows])
        found = np.stack([made.low.flatten(), made.high.flatten()], axis=1)
        assert np.array_equal(found, expected)


# --- networks of all kinds ---

CONVOLUTIONS = {
    "groups": {"groups": 2},
    "depthwise": {"groups": 6},
    "stride": {"stride": 2},
    "dilation": {"dilation": 2, "padding": 2},
    "no padding": {"padding": 0},
    "same": {"padding": "same"},
    "reflect": {"padding_mode": "reflect"},
    "circular": {"padding_mode": "circular", "padding": (2, 1)},
    "no bias": {"bias": False},
    "1x1": {"kernel_size": 1, "padding": 0},
    "1x3": {"kernel_size": (1, 3), "padding": (0, 1)},
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_kinds_of_convolutions(kind, tmp_path):
    torch.manual_seed(0)
    options = {"kernel_size": 3, "padding": 1} | CONVOLUTIONS[kind]
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, **options)).eval()
    quantized = quantize(net, Config(8, 8))
    expected = run(net)
    assert run(quantized).shape == expected.shape
    assert (run(quantized) - expected).abs().max() < 0.1 * expected.abs().max()
    for config in (Config(8, 8), Config.preset("dfsq-subset", 8)):
        conv, reference = quantize(net, config)[1], copy.deepcopy(net[1])
        reference.weight.data = quantize_weight(net[1].weight, 8).dequantize()
        if config.compensation:
            levels = conv.quantized_weight.levels.gather(1, conv.codes.flatten(1).long())
            reference.weight.data = levels.view(conv.weight.shape)
            reference.bias = conv.bias
        x = run(quantized[0])
        with torch.no_grad():
            assert torch.equal(conv(x), reference(conv.activation(x)))
    dfsq.save(quantized, tmp_path / "net.safetensors")
    assert torch.equal(run(dfsq.load(tmp_path / "net.safetensors", net)), run(quantized))


def test_greyscale_network(tmp_path):
    net = make_net(channels=1)
    arrays = np.random.default_rng(0).integers(0, 256, (2, 16, 16), np.uint8)
    quantized = quantize(net, Config(layers="*"), list(arrays))
    assert run(quantized, make_images(1)).shape == (2, 1, 16, 12)
    dfsq.save(quantized, tmp_path / "grey.safetensors")
    loaded = dfsq.load(tmp_path / "grey.safetensors", net)
    assert torch.equal(run(loaded, make_images(1)), run(quantized, make_images(1)))
    with pytest.raises(ValueError, match="layer 'head' takes 1 channels, not 3"):
        run(quantized)


def test_a_convolution_used_in_two_places(tmp_path):
    """It is replaced in both, and a file brings both back."""
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 6, 3, padding=1)
    net = make_net(body=nn.Sequential(conv, nn.ReLU(), conv, nn.Sequential(conv)))
    quantized = quantize(net)
    assert quantized.body[0] is quantized.body[2] is quantized.body[3][0]
    assert isinstance(quantized.body[0], QuantConv2d)
    assert [r.layer for r in quantized.quantization.layers] == ["body.0"]
    dfsq.save(quantized, tmp_path / "net.safetensors")
    assert torch.equal(run(dfsq.load(tmp_path / "net.safetensors", net)), run(quantized))


class Listed(Net):
    """A network that calls its convolutions through attributes that are no modules."""

    def __init__(self):
        super().__init__()
        first, relu, second = self.body
        self.called = {"first": [(first, relu)], "second": second}
        self.called["itself"] = self.called

    def forward(self, x):
        y = x = self.head(x)
        for part in (*self.called["first"][0], self.called["second"]):
            y = part(y)
        return self.tail(x + y)


def test_states_that_are_no_tensors():
    class Counting(Net):
        def get_extra_state(self):
            return {"steps": 3}

        def set_extra_state(self, state):
            pass

    assert dfsq.summary(quantize(Counting())).layer.tolist() == ["body.0", "body.2"]


@pytest.mark.parametrize("name", ["dfsq-points", "dfsq-exact", "dfsq-budget"])
def test_convolutions_in_plain_containers(net, name, tmp_path):
    own = Listed().eval()
    own.load_state_dict(net.state_dict())
    config = Config.preset(name, 2)
    quantized = quantize(own, config)
    assert torch.equal(run(quantized), run(quantize(net, config)))
    assert not torch.equal(run(quantized), run(own))
    dfsq.save(quantized, tmp_path / "net.safetensors")
    assert torch.equal(run(dfsq.load(tmp_path / "net.safetensors", own)), run(quantized))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("words", [3, 4])
def test_other_precisions(net, dtype, words):
    quantized = quantize(net.to(dtype), Config(8, 8, words=words))
    result, expected = run(quantized, IMAGES.to(dtype)), run(net, IMAGES.to(dtype))
    assert result.dtype == dtype
    assert (result - expected).abs().max() < 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        Config(8, 8),
        Config(8, 8, words=3),
        Config.preset("dfsq-points", 8),
        Config.preset("static-tensor-minmax", 8),
    ],
    ids=["exact", "off the grid", "minmax weights", "static"],
)
def test_a_quantized_network_that_is_cast(net, dtype, config):
    """Weights are rounded to the type, what they and the inputs are quantized by is not."""
    quantized = quantize(net, config)
    before, expected = copy.deepcopy(quantized.state_dict()), run(quantized)
    result = run(quantized.to(dtype), IMAGES.to(dtype))
    assert result.dtype == dtype
    assert (result - expected).abs().max() < 0.1
    for key, value in quantized.state_dict().items():
        if key.endswith((".weight", ".bias")):
            assert value.dtype == dtype
        else:
            assert torch.equal(value, before[key])
            assert value.dtype == before[key].dtype


class Gained(nn.Conv2d):
    """A convolution whose weight is scaled."""

    def forward(self, x):
        return functional.conv2d(x, 2 * self.weight, self.bias, padding=1)


class Turned(nn.Conv2d):
    """A convolution of the map upside down."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x.flip(2), weight, bias)


class Named(nn.Conv2d):
    """A subclass that computes what its parent does."""


@pytest.mark.parametrize("kind", [Gained, Turned])
def test_convolutions_with_a_forward_pass_of_their_own(net, kind, tmp_path):
    dfsq.save(quantize(net), tmp_path / "net.safetensors")
    own = make_net()
    own.body[2] = kind(6, 6, 3, padding=1)
    own.load_state_dict(net.state_dict())
    message = rf"layer 'body\.2' is a {kind.__name__} with a (_conv_)?forward of its own"
    with pytest.raises(ValueError, match=message):
        quantize(own)
    with pytest.raises(ValueError, match=message):
        quantize(own, images=calibrate(own, IMAGES, Config(), progress=False))
    with pytest.raises(ValueError, match=message):
        dfsq.load(tmp_path / "net.safetensors", own)
    assert isinstance(quantize(own, Config(exclude="body.2")).body[2], kind)


class Holder:
    """An object that is no module, and calls one."""

    def __init__(self, conv):
        self.conv = conv

    def __call__(self, x):
        return self.conv(x)


HIDDEN = {
    "partial": partial,
    "lambda": lambda conv: lambda x: conv(x),
    "list": lambda conv: [lambda x: conv(x)],
    "object": Holder,
}


@pytest.mark.parametrize("preset", ["uniform-minmax", "dfsq-exact", "dfsq-exact-w"])
@pytest.mark.parametrize("also_called", [False, True])
@pytest.mark.parametrize("kind", HIDDEN)
def test_a_layer_that_is_called_where_it_cannot_be_replaced(kind, also_called, preset):
    """There it would stay in float, and the network be called quantized."""

    class Hiding(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
            self.hidden = HIDDEN[kind](self.last)

        def forward(self, x):
            call = self.hidden[0] if isinstance(self.hidden, list) else self.hidden
            x = self.head(x)
            return call(self.last(x) if also_called else x)

    hiding = Hiding()
    with pytest.raises(
        ValueError, match=r"layer 'last' cannot be replaced: .* call it as self\.last"
    ):
        quantize(hiding, Config.preset(preset))
    assert not hiding.last._forward_pre_hooks
    made = quantize(hiding, Config.preset(preset, exclude="last"))
    assert [layer.layer for layer in made.quantization.layers] == ["head"]


def test_a_layer_that_no_image_reaches(net):
    net.unused = nn.Conv2d(3, 3, 3)
    calibration = calibrate(net, IMAGES, Config(layers="body.*"), progress=False)
    for images in (IMAGES, calibration):
        for preset in ("dfsq-points", "dfsq-points-w"):
            with pytest.raises(ValueError, match=r"'unused' was not run on the calibration images"):
                quantize(net, Config.preset(preset, layers=("body.*", "unused")), images)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch.compile imports
def test_what_is_no_network(net):
    with pytest.raises(ValueError, match=r"must be an nn\.Module, .* not 'edsr-x2'"):
        dfsq.quantize("edsr-x2", IMAGES)
    with pytest.raises(ValueError, match="the network is compiled; give the one that"):
        quantize(torch.compile(net))


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_convolutions_with_hooks(net, kind, tmp_path):
    dfsq.save(quantize(net), tmp_path / "net.safetensors")
    hook = getattr(net.body[2], kind)(lambda *_: None)
    message = r"layer 'body\.2' has a forward hook, .*; remove it, or exclude the layer"
    with pytest.raises(ValueError, match=message):
        quantize(net)
    with pytest.raises(ValueError, match=message):
        dfsq.load(tmp_path / "net.safetensors", net)
    quantize(net, Config(exclude="body.2"))
    hook.remove()
    quantize(net)


@pytest.mark.parametrize("method", ["forward", "_conv_forward"])
def test_a_convolution_whose_forward_pass_is_replaced(net, method):
    setattr(net.body[2], method, getattr(net.body[2], method))
    with pytest.raises(
        ValueError, match=rf"layer 'body\.2' is a Conv2d with a {method} of its own"
    ):
        quantize(net)


def test_convolutions_that_are_plain_ones_by_another_name(net):
    expected = run(quantize(net))
    own = make_net()
    own.body[2] = Named(6, 6, 3, padding=1)
    own.load_state_dict(net.state_dict())
    assert torch.equal(run(quantize(own)), expected)
    parametrizations.weight_norm(own.body[0])
    assert (run(quantize(own)) - expected).abs().max() < 0.1


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_weights_that_a_hook_computes(net, tmp_path):
    dfsq.save(quantize(net), tmp_path / "net.safetensors")
    message = r"layer 'body\.0' computes its weight in a hook, .*remove_weight_norm"
    nn.utils.weight_norm(net.body[0])
    with pytest.raises(ValueError, match=message):
        quantize(net)
    with pytest.raises(ValueError, match=message):
        dfsq.load(tmp_path / "net.safetensors", net)
    quantize(net, Config(exclude="body.0"))  # there it may stay
    nn.utils.remove_weight_norm(net.body[0])
    quantize(net)
    # and in a layer that stays in float, also of a network that has not run yet
    a, b = make_net(seed=1), make_net(seed=2)
    for model in (a, b):
        nn.utils.weight_norm(model.head)
    b.load_state_dict(a.state_dict())
    quantized = quantize(a)
    dfsq.save(quantized, tmp_path / "net.safetensors")
    assert torch.equal(run(dfsq.load(tmp_path / "net.safetensors", b)), run(quantized))


def test_networks_that_cannot_be_quantized(net):
    with pytest.raises(ValueError, match="quantized already; give the float one"):
        quantize(quantize(net))
    with pytest.raises(ValueError, match=r"layer '0\.body\.0' is quantized already; give"):
        quantize(nn.Sequential(quantize(net)), Config(layers="0.body.*"))
    # others of such a network may be quantized
    rest = quantize(nn.Sequential(quantize(net)), Config(layers="0.head"))
    assert isinstance(rest[0].head, QuantConv2d)
    with pytest.raises(ValueError, match=r"no nn\.Conv2d"):
        quantize(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"put it into an nn\.Sequential"):
        quantize(nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match="no calibration images"):
        quantize(net, images=[])


# --- the record ---


def test_summary(net):
    rows = dfsq.summary(quantize(net, Config.preset("dfsq", 4, layers="*")))
    assert rows.layer.tolist() == ["head", "body.0", "body.2", "tail"]
    assert rows.inputs.tolist() == [3, 6, 6, 6]
    assert rows.outputs.tolist() == [6, 6, 6, 3]
    assert rows.non_negative.tolist() == [True, False, True, False]
    assert rows.samples.tolist() == [2 * 16 * 12] * 4
    assert (rows.points + rows.duplicates / rows.inputs == 16).all()
    assert rows.relative_error.between(0, 0.1).all()
    with pytest.raises(ValueError, match=r"not made by dfsq\.quantize or dfsq\.load"):
        dfsq.summary(net)


def test_relative_error_is_that_of_the_samples(net):
    row = dfsq.summary(quantize(net, Config.preset("dfsq-points", 3))).iloc[0]
    with torch.no_grad():
        z, _, _ = center_max(net.head(IMAGES))
        quantized = quantize(net, Config.preset("dfsq-points", 3)).body[0].activation
        levels = torch.stack([quantized.levels[c][quantized.codes(z)[:, c]] for c in range(6)], 1)
    expected = (levels - z).square().sum() / z.square().sum()
    assert row.relative_error == pytest.approx(float(expected), rel=1e-4)


def test_relative_error_of_the_released_method_in_other_units(net):
    """It takes normalized samples, whatever the calibration weighs."""
    released = Config.preset("dfsq", 3)
    rows, other = (
        dfsq.summary(quantize(net, replace(released, error_units=units)))
        for units in ("normalized", "output")
    )
    np.testing.assert_allclose(other.relative_error, rows.relative_error, rtol=1e-6)


@pytest.mark.parametrize("name", ["dfsq", "dfsq-points", "dfsq-exact", "dfsq-budget"])
def test_samples_are_a_number_of_values(net, name):
    rows = dfsq.summary(quantize(net, Config.preset(name, 3)))
    assert rows.samples.tolist() == [2 * 16 * 12] * 2
    assert " 384 " in rows.to_string()  # no 384.0
    rows = dfsq.summary(quantize(net, Config.preset(f"{name}-w", 3)))
    assert rows.samples.isna().all()


def test_table_of_changed_layers_is_printed(net, capsys):
    dfsq.quantize(net, IMAGES, Config(), progress=True)
    printed = capsys.readouterr().out
    assert "in float: 2 layers with weights, head (Conv2d), tail (Conv2d)" in printed
    assert "body.0" in printed
    assert "body.2" in printed
    assert "head" not in printed.partition("in float")[0]
    dfsq.quantize(net, IMAGES, Config(), progress=False)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
