"""What quantization costs at run time, in calibration and in emulation."""

import numpy as np
import pytest
import torch

import dfsq
from dfsq.activations import CodebookQuantizer, center_max
from dfsq.calibration import as_batches
from dfsq.memory import freed_memory_kept

LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
EAGER = tuple(f"float network, {layout}" for layout in LAYOUTS)
COMPILED = tuple(f"{name}, compiled" for name in EAGER)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within torch.compile

#: The first, at most so many times the second; of several the fastest.
RATIOS = [
    (("quantizer by look-up",), ("quantizer by broadcast argmin",), 1 / 20),
    (("quantizer by look-up",), ("quantizer by broadcast argmin, channel by channel",), 1 / 20),
    (("calibration",), ("float pass over the calibration images",), 3.0),
    (("quantized network",), EAGER, 2.5),
    (("quantized network, compiled",), EAGER + COMPILED, 1.75),
]


@pytest.fixture(scope="module", autouse=True)
def _memory_and_no_gradients():
    with freed_memory_kept(), torch.no_grad():
        yield


@pytest.fixture(scope="module")
def net():
    return dfsq.sr.load_model("edsr-x2")


@pytest.fixture(scope="module")
def crops():
    return dfsq.sr.calibration_crops(scale=2, count=8)


@pytest.fixture(scope="module")
def quantized(net, crops):
    return dfsq.quantize(net, crops, dfsq.Config.preset("dfsq-subset"), progress=False)


@pytest.fixture(scope="module")
def image():
    """LR, shape (1, 3, 192, 192)."""
    (pair,) = dfsq.sr.load_dataset("photographs", 2, limit=1)
    return as_batches([pair.lr[:192, :192]])[0]


@pytest.fixture(scope="module")
def maps():
    """Shape (1, 64, 192, 192), signed."""
    generator = np.random.default_rng(0)
    return torch.from_numpy(generator.laplace(size=(1, 64, 192, 192)).astype(np.float32))


def argmin_quantizer(points, by_channel):
    """Tensor operations throughout, with all distances of a map at once or of a channel.

    The latter stay within the cache.
    """
    points = torch.from_numpy(np.stack(points)).float()

    def nearest(z, own):
        return own.expand(*z.shape, -1).gather(
            -1, (z[..., None] - own).abs().argmin(-1, keepdim=True)
        )[..., 0]

    def quantize(x):
        offset = x.mean((2, 3), keepdim=True, dtype=torch.float64).float()
        scale = (x - offset).abs().amax((2, 3), keepdim=True) + 1e-8
        z = (x - offset) / scale
        if by_channel:
            q = torch.stack([nearest(z[:, c], own) for c, own in enumerate(points)], 1)
        else:
            q = nearest(z, points[:, None, None])
        return q * scale + offset

    return quantize


@pytest.mark.parametrize(
    "how", ["look-up", "broadcast argmin", "broadcast argmin, channel by channel"]
)
def test_quantizer(measure, maps, how):
    channels = center_max(maps)[0][0].flatten(1).numpy()
    points = [found.points for found in dfsq.select_channels(channels, 4)]
    looked_up = function = CodebookQuantizer(points)
    if how != "look-up":
        function = argmin_quantizer(points, by_channel="channel" in how)
    found = measure(f"quantizer by {how}", lambda: function(maps), 20)
    # distances are rounded, a table is not
    assert (found == looked_up(maps)).float().mean() > 0.9999


def test_float_pass(measure, net, crops):
    batches = as_batches(crops)
    measure("float pass over the calibration images", lambda: [net(x) for x in batches])


def test_calibration(measure, net, crops):
    config = dfsq.Config.preset("dfsq-subset")
    measure("calibration", lambda: dfsq.calibrate(net, crops, config, progress=False))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("compiled", [False, True])
def test_float_network(measure, net, image, layout, compiled):
    model, x = (part.to(memory_format=LAYOUTS[layout]) for part in (net, image))
    name = f"float network, {layout}"
    if compiled:
        model, name = torch.compile(model), f"{name}, compiled"
    measure(name, lambda: model(x))


@pytest.mark.parametrize("compiled", [False, True])
def test_quantized_network(measure, quantized, image, compiled):
    model, name = quantized, "quantized network"
    if compiled:
        model, name = torch.compile(model), f"{name}, compiled"
    measure(name, lambda: model(image))
