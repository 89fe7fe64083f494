"""Large photographs in strips, statistics over the whole."""

import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from test_convert import make_images, quantize
from torch import nn

from dfsq.cli import main
from dfsq.config import Config
from dfsq.sr.models import edsr, imdn, rdn, rlfn, srresnet
from dfsq.sr.upscaling import upscale
from dfsq.study import large

pytestmark = pytest.mark.usefixtures("one_thread")

NETWORKS = {
    "edsr x2": lambda: edsr.EDSR(2, blocks=2, features=8),
    "edsr x3": lambda: edsr.EDSR(3, blocks=1, features=8),
    "edsr x4": lambda: edsr.EDSR(4, blocks=1, features=8),
    "srresnet x4": lambda: srresnet.SRResNet(4, blocks=2, features=8),
    "imdn x2": lambda: imdn.IMDN(2, blocks=2, features=16),
    "rlfn x4": lambda: rlfn.RLFN(4, features=16),
    "rdn x2": lambda: rdn.RDN(2, blocks=2, layers=2, growth=8, features=8),
}


@pytest.fixture
def photograph():
    return np.random.default_rng(0).integers(0, 256, (61, 40, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("strip", [1, 40, 400, 10**6])
def test_the_float_networks_in_strips(photograph, monkeypatch, name, strip):
    monkeypatch.setattr(large, "STRIP", strip)
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    found, expected = large.upscale_large(model, photograph), upscale(model, photograph)
    assert found.shape == expected.shape
    # a value on the edge between two grey levels may fall to either
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert (found != expected).mean() < 0.001


@pytest.mark.parametrize("preset", ["dfsq-subset", "uniform-minmax", "static-tensor-minmax"])
def test_a_quantized_network_in_strips(photograph, monkeypatch, preset):
    monkeypatch.setattr(large, "STRIP", 200)
    model = edsr.EDSR(2, blocks=1, features=8)
    quantized = quantize(model, Config.preset(preset, 4), make_images())
    found, expected = large.upscale_large(quantized, photograph), upscale(quantized, photograph)
    assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 5, "padding": (2, 0)},
        {"kernel_size": 3, "padding": 0},
        {"kernel_size": (3, 1), "padding": (4, 1)},
        {"kernel_size": 3, "dilation": (2, 1), "padding": (1, 1)},
        {"kernel_size": 3, "groups": 2, "bias": False},
        {"kernel_size": 3, "stride": 2},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    ],
    ids=str,
)
@pytest.mark.parametrize("is_quantized", [False, True])
def test_any_convolution_in_strips(monkeypatch, options, is_quantized):
    monkeypatch.setattr(large, "STRIP", 60)
    net = nn.Sequential(nn.Conv2d(in_channels=4, out_channels=6, **options)).eval()
    x = torch.randn(2, 4, 23, 19)
    if is_quantized:
        net = quantize(net, Config.preset("dfsq-subset", 3), x)
    with torch.no_grad():
        expected = net(x)
        with large.convolved_in_strips(net):
            found = net(x)
        assert torch.allclose(found, expected, atol=1e-5)
        assert "forward" not in vars(net[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("words", [3, 4])
def test_other_precisions_in_strips(monkeypatch, dtype, words):
    """Statistics and codes are in float32 here, too."""
    monkeypatch.setattr(large, "STRIP", 60)
    net, x = nn.Sequential(nn.Conv2d(4, 6, 3)).eval(), torch.randn(2, 4, 23, 19)
    net = quantize(net, Config.preset("dfsq-subset", 3, words=words), x).to(dtype)
    with torch.no_grad():
        expected = net(x.to(dtype))
        with large.convolved_in_strips(net):
            found = net(x.to(dtype))
    assert found.dtype == dtype
    assert torch.allclose(found, expected, atol=0.02)


@pytest.mark.parametrize(
    ("kernel", "dilation", "groups"), [(1, 1, 1), (3, 1, 1), (5, 1, 2), (3, 3, 1)]
)
@pytest.mark.parametrize("strip", [1, 60, 10**6])
@pytest.mark.parametrize("is_quantized", [False, True])
def test_a_convolution_behind_another_writes_over_its_input(
    monkeypatch, kernel, dilation, groups, strip, is_quantized
):
    monkeypatch.setattr(large, "STRIP", strip)
    kind = {"padding": dilation * (kernel // 2), "dilation": dilation, "groups": groups}
    net = nn.Sequential(
        nn.Conv2d(4, 4, kernel, **kind), nn.ReLU(inplace=True), nn.Conv2d(4, 4, kernel, **kind)
    ).eval()
    x = torch.randn(2, 4, 23, 19)
    if is_quantized:
        net = quantize(net, Config.preset("dfsq-subset", 3), x)
    before, between = x.clone(), []
    net[1].register_forward_hook(lambda module, args, output: between.append(output.data_ptr()))
    with torch.no_grad():
        expected = net(x)
        with large.convolved_in_strips(net):
            found = net(x)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(x, before)  # the first one's input is the caller's
    assert (found.data_ptr() == between[1]) == (strip < 23 * 19)


class Kept(nn.Module):
    """Keeps what goes through it."""

    def forward(self, x):
        self.seen = x
        return x


def seen_outside(body, x):
    first = body[0](x)
    return body[1](first) + first / 2


def kept(body, x):
    return body(x) + body[1].seen


def conv():
    return nn.Conv2d(4, 4, 3, padding=1)


@pytest.mark.parametrize(
    ("modules", "forward"),
    [
        (lambda: [conv(), conv()], seen_outside),
        (lambda: [shared := conv(), nn.ReLU(), shared], lambda body, x: body(x) + x),
        (lambda: [conv(), Kept(), conv()], kept),
        (lambda: [nn.ReLU(), conv(), nn.Sigmoid(), conv()], lambda body, x: body(x) + x),
    ],
    ids=["called one by one", "used twice", "kept between", "what is not known between"],
)
def test_an_input_that_others_see_is_not_written_over(monkeypatch, modules, forward):
    monkeypatch.setattr(large, "STRIP", 60)
    body, x = nn.Sequential(*modules()).eval(), torch.randn(1, 4, 23, 19)
    before = x.clone()
    with torch.no_grad():
        expected = forward(body, x)
        with large.convolved_in_strips(body):
            found = forward(body, x)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(x, before)
    assert not body._forward_hooks
    assert not body._forward_pre_hooks


def test_inputs_are_nobodys_own_after_a_failure(monkeypatch):
    monkeypatch.setattr(large, "STRIP", 60)
    body, x = nn.Sequential(conv(), nn.ReLU(), conv()).eval(), torch.randn(1, 4, 23, 19)
    with torch.no_grad(), large.convolved_in_strips(body):
        with pytest.raises(RuntimeError):
            body(x[:, :3])
        before = x.clone()
        body[2](x)
    assert torch.equal(x, before)


def test_statistics_are_those_of_the_whole_image(photograph, monkeypatch):
    """One bright corner changes what all other strips are quantized by."""
    monkeypatch.setattr(large, "STRIP", 100)
    model = edsr.EDSR(2, blocks=1, features=8)
    quantized = quantize(model, Config.preset("dfsq-subset", 2), make_images())
    dark = photograph // 8
    bright = dark.copy()
    bright[:4, :4] = 255
    a, b = (large.upscale_large(quantized, image)[60:] for image in (dark, bright))
    assert (a != b).any()


@pytest.mark.parametrize("name", NETWORKS)
def test_progress_ends_where_the_work_does(photograph, monkeypatch, capsys, name):
    monkeypatch.setattr(large, "STRIP", 400)
    bars = []

    class Bar(large.tqdm):
        def close(self):
            bars.append((self.n, self.total))
            super().close()

    monkeypatch.setattr(large, "tqdm", Bar)
    model = NETWORKS[name]().eval()
    large.upscale_large(model, photograph, progress=True)
    ((done, total),) = set(bars)
    assert done == pytest.approx(total)
    assert "layers:" in capsys.readouterr().err
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("every", [0, 1e9])
def test_a_bar_drawn_at_each_layer_changes_nothing(photograph, monkeypatch, every):
    """Layers that take long draw it anew, quick ones do not."""
    monkeypatch.setattr(large, "tqdm", partial(large.tqdm, mininterval=every))
    model = edsr.EDSR(2, blocks=1, features=8).eval()
    plain = large.upscale_large(model, photograph)
    assert np.array_equal(large.upscale_large(model, photograph, progress=True), plain)


def test_the_network_is_as_before_when_something_fails(photograph, monkeypatch):
    model = edsr.EDSR(2, blocks=1, features=8)
    monkeypatch.setattr(model, "features", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        large.upscale_large(model, photograph)
    assert not any("forward" in vars(module) for module in model.modules())


class Classifier(nn.Module):
    """A network whose ``features`` are its layers and not a part to run alone."""

    scale = 1

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1))

    def forward(self, x):
        return self.features(x)


class Residual(edsr.EDSR):
    """Has another forward than the parts that it has inherited."""

    def forward(self, x):
        return super().forward(x) + nn.functional.interpolate(x, scale_factor=2)


class Wide(edsr.EDSR):
    """Has an upsampler of its own, and says how far that sees."""

    reach = 7

    def reconstruct(self, features):
        return super().reconstruct(nn.functional.avg_pool2d(features, 11, 1, 5))


def test_parts_are_what_a_network_states(photograph, monkeypatch):
    monkeypatch.setattr(large, "STRIP", 100)
    assert not large.has_parts(Residual(2, blocks=1, features=8))
    model = Wide(2, blocks=1, features=8).eval()
    assert large.has_parts(model)
    found, expected = large.upscale_large(model, photograph), upscale(model, photograph)
    assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("preset", ["dfsq-points", "uniform-minmax", "static-channel-minmax"])
def test_a_quantized_upsampler_takes_statistics_of_whole_maps(photograph, monkeypatch, preset):
    monkeypatch.setattr(large, "STRIP", 200)
    model = edsr.EDSR(2, blocks=1, features=8)
    quantized = quantize(model, Config.preset(preset, 4, layers="*"), make_images())
    found, expected = large.upscale_large(quantized, photograph), upscale(quantized, photograph)
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert (found != expected).mean() < 0.001


def test_networks_without_the_two_parts(photograph, tmp_path, monkeypatch):
    model = Classifier().eval()
    assert not large.has_parts(model)
    assert all(large.has_parts(make()) for make in NETWORKS.values())
    with pytest.raises(ValueError, match="Classifier does not state by an attribute reach"):
        large.upscale_large(model, photograph)
    monkeypatch.setattr("dfsq.sr.load_model", lambda name, value_range=None: model)
    monkeypatch.setattr(large, "LARGE", 100)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photograph).save("photo.png")
    assert main(["upscale", "photo.png", "--bits", "32"]) == 0
    assert (tmp_path / "photo_x1_w32a32.png").is_file()


#: A process's largest memory so far in KiB; ru_maxrss would be no less than its parent's.
PEAK = (
    "from pathlib import Path\n"
    "def peak():\n"
    "    return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
)
needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")


@pytest.mark.slow
@needs_proc
def test_memory_is_bounded():
    """Three maps of the body and little more, where the plain way takes many."""
    program = (
        "import numpy as np, torch, dfsq\n"
        "from dfsq.sr.models.edsr import EDSR\n"
        "from dfsq.study.large import upscale_large\n"
        "torch.set_num_threads(1)\n"
        "model = EDSR(2, blocks=2, features=64).eval()\n"
        "model = dfsq.quantize(model, torch.rand(1, 3, 32, 32),\n"
        "    dfsq.Config.preset('dfsq-subset', 4), progress=False)\n"
        "upscale_large(model, np.zeros((40, 40, 3), np.uint8))\n"
        "before = peak()\n"
        "upscale_large(model, np.random.default_rng(0).integers(\n"
        "    0, 256, (1000, 1200, 3), dtype=np.uint8))\n"
        "print(1024 * (peak() - before) / (4 * 64 * 1000 * 1200))\n"
    )
    command = [sys.executable, "-c", PEAK + program]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 4


@pytest.mark.slow
@needs_proc
def test_memory_of_the_quantized_forward():
    """At most half again as much as the float network's, at its peak."""
    program = (
        "import sys, torch, dfsq\n"
        "from dfsq.sr.models.edsr import EDSR\n"
        "torch.set_num_threads(1)\n"
        "model = EDSR(2, blocks=3, features=64).eval()\n"
        "if sys.argv[1] == 'quantized':\n"
        "    config = dfsq.Config.preset('dfsq-subset', 4)\n"
        "    model = dfsq.quantize(model, torch.rand(1, 3, 32, 32), config, progress=False)\n"
        "with torch.no_grad():\n"
        "    model(torch.rand(1, 3, 40, 40))\n"
        "    before = peak()\n"
        "    model(torch.rand(1, 3, 500, 600))\n"
        "print(peak() - before)\n"
    )
    peaks = []
    for kind in ("float", "quantized"):
        command = [sys.executable, "-c", PEAK + program, kind]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    assert peaks[1] <= 1.5 * peaks[0]
