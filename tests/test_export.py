"""ONNX files, run by ONNX Runtime beside PyTorch."""

import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import dfsq
from dfsq.activations import (
    CodebookQuantizer,
    DynamicUniformQuantizer,
    StaticUniformQuantizer,
)
from dfsq.convert import QuantConv2d
from dfsq.sr.imaging import psnr_y, to_image, to_tensor
from dfsq.sr.models.edsr import EDSR

SIZES = [(1, 8, 8), (3, 21, 34), (1, 70, 60)]

pytestmark = pytest.mark.usefixtures("one_thread")


class Together(nn.Module):
    """Several modules on the parts of one input, or each on the same, their outputs as channels."""

    def __init__(self, modules, parts=1):
        super().__init__()
        self.members, self.parts = nn.ModuleList(modules), parts

    def forward(self, x):
        inputs = x.chunk(self.parts, 1) * (len(self.members) // self.parts)
        return torch.cat([m(part) for m, part in zip(self.members, inputs, strict=True)], 1)


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def both(model, run, x):
    """Outputs of PyTorch and of ONNX Runtime."""
    with torch.no_grad():
        expected = model(x)
    found = torch.from_numpy(run.run(None, {"input": x.numpy()})[0])
    assert found.shape == expected.shape
    return expected, found


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return EDSR(2, 1, 8).eval()


@pytest.fixture(scope="module")
def quantized(net):
    return dfsq.quantize(net, torch.rand(2, 3, 24, 24), progress=False)


@pytest.fixture(scope="module")
def exported(quantized, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "quantized.onnx"
    dfsq.export_onnx(quantized, path)
    return path


def test_float_network(net, tmp_path):
    net.train()
    dfsq.export_onnx(net, tmp_path / "float.onnx")
    assert net.training
    net.eval()
    run = session(tmp_path / "float.onnx")
    for batch, *size in SIZES:
        expected, found = both(net, run, torch.rand(batch, 3, *size))
        assert (found - expected).abs().max() < 1e-5
    assert [p.name for p in tmp_path.iterdir()] == ["float.onnx"]  # weights are inside


def hard_maps(channels, size, generator):
    """Maps of any magnitude, of values on the midpoints of two points, constant ones, zeros."""
    x = generator.laplace(size=(2, channels, *size)).astype(np.float32)
    x *= 10.0 ** generator.integers(-3, 3, (1, channels, 1, 1))
    x[:, 0] = generator.integers(-2048, 2049, x[:, 0].shape) / 2048
    x[:, 0, 0, :2] = -1, 1
    x[:, 0] -= x[:, 0].mean((1, 2), keepdims=True, dtype=np.float64).round(2)
    x[:, 1], x[:, 2] = 3.25, 0
    return torch.from_numpy(x)


def test_quantizers_bit_for_bit(tmp_path):
    """Given the same maps, the same codes: codebooks on the grid and off it, and the controls."""
    generator, channels = np.random.default_rng(0), 6

    def codebooks(k, **options):
        universal = dfsq.universal_set(**options)
        sizes = np.minimum(generator.integers(1, k + 1, channels), len(universal))
        return [np.sort(generator.choice(universal, size, replace=False)) for size in sizes]

    even = [np.linspace(-1, 1, 16)] * channels
    quantizers = [
        CodebookQuantizer(codebooks(16)),
        CodebookQuantizer(codebooks(256)),
        CodebookQuantizer(codebooks(256, signed=False), non_negative=True),
        CodebookQuantizer(codebooks(16, words=3)),
        CodebookQuantizer(codebooks(16), shares=np.linspace(0.5, 1.1, channels)),
        CodebookQuantizer(codebooks(256, words=3)),
        CodebookQuantizer(even),
        CodebookQuantizer([[0.5]] * channels),
        DynamicUniformQuantizer(4),
        DynamicUniformQuantizer(8, non_negative=True),
        StaticUniformQuantizer(4, [-1.0], [2.0]),
        StaticUniformQuantizer(8, -np.arange(channels), np.arange(channels)),
    ]
    fan = Together(quantizers)
    dfsq.export_onnx(fan, tmp_path / "q.onnx", channels=channels)
    run = session(tmp_path / "q.onnx")
    for _, *size in SIZES:
        x = hard_maps(channels, size, generator)
        with pytest.warns(UserWarning, match="negative") if size == [8, 8] else does_not_warn():
            expected, found = both(fan, run, x)
        for i, quantizer in enumerate(quantizers):
            own = slice(i * channels, (i + 1) * channels)
            assert torch.equal(found[:, own], expected[:, own]), (i, quantizer)


def does_not_warn():
    """Each quantizer warns once."""
    return torch.no_grad()


def test_layers_of_a_real_network(tmp_path):
    """Each convolution by itself, on the inputs that it gets in the network."""
    float_net = dfsq.sr.load_model("edsr-x2")
    names = [f"body.{block}.body.{i}" for block in (0, 9) for i in (0, 2)]
    config = dfsq.Config.preset("dfsq-points", 4, layers=tuple(names))
    crops = dfsq.sr.calibration_crops(count=2)
    net = dfsq.quantize(float_net, crops, config, progress=False)
    convs, inputs = [net.get_submodule(name) for name in names], []
    hooks = [c.register_forward_pre_hook(lambda m, given: inputs.append(given[0])) for c in convs]
    with torch.no_grad():
        net(to_tensor(crops[0]))
    for hook in hooks:
        hook.remove()
    layers = Together(convs, parts=len(convs)).eval()
    dfsq.export_onnx(layers, tmp_path / "layers.onnx", channels=64 * len(convs))
    expected, found = both(layers, session(tmp_path / "layers.onnx"), torch.cat(inputs, 1))
    assert expected.std() > 0.01
    assert (found - expected).abs().max() < 1e-5


def test_shallow_network(quantized, exported):
    """A changed last bit may change a code here and there, and nothing else."""
    assert sum(isinstance(m, QuantConv2d) for m in quantized.modules()) == 2
    for batch, *size in SIZES[1:]:
        expected, found = both(quantized, session(exported), torch.rand(batch, 3, *size))
        assert ((found - expected).abs() < 1e-5).float().mean() > 0.98
        assert (found - expected).abs().mean() < 1e-5


@pytest.mark.slow
def test_whole_network(tmp_path):
    """Pixels differ, since changed codes spread from layer to layer; the quality does not."""
    crops = dfsq.sr.calibration_crops(count=2)
    config = dfsq.Config.preset("dfsq-points", 4)
    net = dfsq.quantize(dfsq.sr.load_model("edsr-x2"), crops, config, progress=False)
    dfsq.export_onnx(net, tmp_path / "edsr4.onnx")
    run, changes = session(tmp_path / "edsr4.onnx"), []
    for pair in dfsq.sr.load_dataset():
        images = both(net, run, to_tensor(pair.lr))
        expected, found = (psnr_y(to_image(image), pair.hr, 2) for image in images)
        changes.append(found - expected)
    assert abs(np.mean(changes)) < 0.01


def test_nan_and_infinity_mark_their_image(quantized, exported):
    x = torch.rand(3, 3, 16, 16)
    x[1, 0, 3, 4], x[2, 2, 15, 15] = float("nan"), float("inf")
    (found,) = session(exported).run(None, {"input": x.numpy()})
    assert np.isfinite(found[0]).all()
    assert np.isnan(found[1:]).all()
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantized(x)


class Then(nn.Module):
    """A convolution, and a function of its output."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 4, 3, padding=1), function

    def forward(self, x):
        return self.function(self.conv(x))


@pytest.mark.parametrize("function", [lambda y: y.mean((2, 3)), lambda y: (y.argmax(1), y.sum(1))])
def test_outputs_that_are_no_map(function, tmp_path):
    """They keep their shapes; NaN marks all but whole numbers, which know none."""
    net = dfsq.quantize(Then(function).eval(), torch.rand(2, 3, 24, 24), progress=False)
    dfsq.export_onnx(net, tmp_path / "x.onnx")
    x = torch.rand(3, 3, 16, 20)
    with torch.no_grad():
        expected = net(x)
    found = session(tmp_path / "x.onnx").run(None, {"input": x.numpy()})
    for a, b in zip(found, expected if isinstance(expected, tuple) else [expected], strict=True):
        assert a.shape == b.shape
        assert np.isclose(a, b, atol=1e-4).mean() > 0.98  # a changed last bit may change a code
    x[1, 0, 3, 4] = float("nan")
    marked = session(tmp_path / "x.onnx").run(None, {"input": x.numpy()})[-1]
    assert np.isfinite(marked).reshape(3, -1).all(1).tolist() == [True, False, True]
    assert np.isnan(marked[1]).all()


def test_an_output_without_a_batch_is_refused(tmp_path):
    net = dfsq.quantize(Then(torch.mean).eval(), torch.rand(2, 3, 24, 24), progress=False)
    with pytest.raises(ValueError, match=r"an entry for each image, but one has the shape \(\)"):
        dfsq.export_onnx(net, tmp_path / "x.onnx")


def test_what_the_file_says(quantized, exported, repository):
    model = onnx.load(exported)
    onnx.checker.check_model(model, full_check=True)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert dfsq.Config.from_json(metadata.pop("dfsq.config")) == quantized.quantization.config
    assert not metadata
    assert str(repository).encode() not in exported.read_bytes()
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
    (given,) = model.graph.input
    shape = [d.dim_value or d.dim_param for d in given.type.tensor_type.shape.dim]
    assert shape == ["batch", 3, "height", "width"]


def test_quantizers_still_check_after_an_export(quantized, exported):
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantized(torch.full((1, 3, 16, 16), float("nan")))


def test_bad_paths_leave_nothing_behind(net, tmp_path):
    (tmp_path / "taken.onnx").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*gone"):
        dfsq.export_onnx(net, tmp_path / "gone" / "x.onnx")
    with pytest.raises(ValueError, match=r"must be an \.onnx file, not .*x\.pt"):
        dfsq.export_onnx(net, tmp_path / "x.pt")
    with pytest.raises(OSError, match=r"cannot write .*taken\.onnx"):
        dfsq.export_onnx(net, tmp_path / "taken.onnx")
    assert sorted(tmp_path.rglob("*")) == before


def test_networks_that_cannot_be_exported(tmp_path):
    class Branching(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(ValueError, match="PyTorch cannot export this network: "):
        dfsq.export_onnx(Branching(3, 3, 1), tmp_path / "x.onnx")
    with pytest.raises(ValueError, match=r"float32, but 'weight' is torch\.float16"):
        dfsq.export_onnx(nn.Conv2d(3, 3, 1).half(), tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def test_without_the_extra(net, tmp_path, monkeypatch):
    monkeypatch.setattr("dfsq.export.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"onnx and onnxscript, .*'dfsq\[onnx\]'"):
        dfsq.export_onnx(net, tmp_path / "x.onnx")


def test_the_package_does_not_import_onnx():
    code = "import sys, dfsq; sys.exit(bool({'onnx', 'onnxscript'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
