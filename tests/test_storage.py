"""A quantized network to a file and back."""

import os
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert import make_images, make_net, quantize, run
from torch import nn

import dfsq
from dfsq.config import PRESETS, Config
from dfsq.convert import float_digest

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def net():
    return make_net()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.safetensors"


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", PRESETS)
def test_a_file_brings_back_the_network_bit_for_bit(net, path, name, bits):
    bits = min(bits, 4) if name == "sq" else bits
    quantized = quantize(net, Config.preset(name, bits, layers="*"))
    dfsq.save(quantized, path)
    loaded = dfsq.load(path, net)
    assert torch.equal(run(loaded), run(quantized))
    new = make_images(count=1)[:, :, :9, :10] * 3 - 1  # other sizes and values
    meets_negatives = nullcontext() if name == "float" else pytest.warns(match="non-negative")
    with meets_negatives:
        assert torch.equal(run(loaded, new), run(quantized, new))
    a, b = quantized.state_dict(), loaded.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert loaded.quantization.config == quantized.quantization.config
    assert loaded.quantization.calibration_digest == quantized.quantization.calibration_digest
    assert dfsq.summary(loaded).equals(dfsq.summary(quantized))
    for report in quantized.quantization.layers:
        pair = (made.get_submodule(report.layer).activation for made in (loaded, quantized))
        flags = [getattr(quantizer, "non_negative", None) for quantizer in pair]
        assert flags[0] == flags[1]  # by which the quantizer warns


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", PRESETS)
def test_a_layer_of_one_output_channel(path, name, bits):
    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 1, 1)).eval()
    bits = min(bits, 4) if name == "sq" else bits
    quantized = quantize(net, Config.preset(name, bits))
    dfsq.save(quantized, path)
    assert torch.equal(run(dfsq.load(path, net)), run(quantized))


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.half(),
        lambda net: net.head.weight.data.mul_(2),
        lambda net: net.body[0].bias.data.add_(1),
    ],
)
def test_a_network_that_is_no_longer_as_it_was_quantized(net, path, change):
    """Its file would hold another network than it is."""
    quantized = quantize(net, Config(layers="body.*"))
    dfsq.save(quantized, path)
    before = path.read_bytes()
    for made in (quantized, dfsq.load(path, net)):
        change(made)
        with pytest.raises(ValueError, match=r"cast or its values changed .* save it first"):
            dfsq.save(made, path)
    assert path.read_bytes() == before


def test_off_grid_codebooks_in_a_file(net, path):
    quantized = quantize(net, Config(words=3))
    dfsq.save(quantized, path)
    assert torch.equal(run(dfsq.load(path, net)), run(quantized))


def test_loading_leaves_the_float_network(net, path):
    dfsq.save(quantize(net), path)
    digest = float_digest(net.train())
    loaded = dfsq.load(path, net)
    assert float_digest(net) == digest
    assert net.training
    assert not loaded.training
    assert type(net.body[0]) is nn.Conv2d


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"body": nn.Sequential(nn.Conv2d(6, 6, 3, padding=1))}, r"no convolution 'body\.2'"),
        ({"features": 8}, r"layer 'body\.0' has 8 to 8 channels, in the file 6 to 6"),
        (
            {"body": nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 1))},
            r"layer 'body\.0' has shape \(6, 6, 1, 1\), in the file \(6, 6, 3, 3\)",
        ),
        ({"body": nn.Sequential(nn.ReLU())}, r"no convolution 'body\.0'"),
        ({"seed": 1}, r"the network has other weights, .* the file was made from \(--model\)"),
    ],
    ids=["fewer layers", "wider", "smaller kernel", "no convolution", "other weights"],
)
def test_loading_into_another_network(net, path, other, message):
    dfsq.save(quantize(net), path)
    with pytest.raises(ValueError, match=message):
        dfsq.load(path, make_net(**other))


@pytest.mark.parametrize("part", [0, 4, 0.1, 0.5, 0.99])
def test_truncated_file(net, path, part):
    dfsq.save(quantize(net), path)
    content = path.read_bytes()
    path.write_bytes(content[: part if isinstance(part, int) else int(part * len(content))])
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        dfsq.load(path, net)


def test_files_of_another_kind(net, path):
    path.write_text("weights")
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        dfsq.load(path, net)
    save_file(net.state_dict(), path)
    with pytest.raises(ValueError, match=r"not a quantized network of format dfsq-4; dfsq\.save"):
        dfsq.load(path, net)
    with pytest.raises(FileNotFoundError, match="no such file"):
        dfsq.load(path.with_name("other.safetensors"), net)
    with pytest.raises(FileNotFoundError, match="no such file"):
        dfsq.load(path.parent, net)


def test_only_quantized_networks_are_saved(net, path):
    with pytest.raises(ValueError, match=r"not made by dfsq\.quantize"):
        dfsq.save(net, path)
    assert not path.exists()


def test_a_folder_that_is_not_there(net, path):
    quantized = quantize(net)
    with pytest.raises(OSError, match="there is no folder"):
        dfsq.save(quantized, path.parent / "sub" / "net.safetensors")
    path.write_text("a file")
    with pytest.raises(OSError, match="there is no folder"):
        dfsq.save(quantized, path / "net.safetensors")
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_read_only_folder(net, tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(OSError, match="cannot write"):
        dfsq.save(quantize(net), folder / "net.safetensors")
    assert not list(folder.iterdir())


@pytest.mark.parametrize("function", ["pathlib.Path.write_bytes", "dfsq.files.os.replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(net, path, monkeypatch, function):
    path.write_text("old")

    def fail(temporary, *_):
        temporary.touch()
        raise OSError("no space left")

    monkeypatch.setattr(function, fail)
    with pytest.raises(OSError, match=r"cannot write .*net\.safetensors: no space left"):
        dfsq.save(quantize(net), path)
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_file_has_the_same_bytes_each_time(net, path):
    """The library writes metadata in an order that changes."""
    quantized = quantize(net, Config(layers="*"))
    contents = set()
    for _ in range(8):
        dfsq.save(quantized, path)
        contents.add(path.read_bytes())
    assert len(contents) == 1


def test_the_file_comes_first(net, path):
    with pytest.raises(ValueError, match=r"dfsq\.load\(path, model\)"):
        dfsq.load(net, path)


def test_the_file_is_as_open_as_any_other_of_its_user(net, path):
    before = os.umask(0o027)
    try:
        dfsq.save(quantize(net), path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_codes_take_their_bits(net, path, bits):
    dfsq.save(quantize(net, Config.preset("dfsq", bits)), path)
    codes = load_file(path)["body.0/codes"]
    assert codes.nbytes == pytest.approx(6 * 6 * 9 * bits / 8, abs=1)


def test_channels_of_different_widths(net, path):
    quantized = quantize(net, Config.preset("dfsq-budget", 3))
    counts = torch.isfinite(quantized.body[0].points).sum(1)
    assert len(counts.unique()) > 1
    dfsq.save(quantized, path)
    assert load_file(path)["body.0/codes"].nbytes <= (54 * counts.log2()).sum() / 8 + 6
    loaded = dfsq.load(path, net)
    assert torch.equal(loaded.body[0].codes, quantized.body[0].codes)
    assert torch.equal(loaded.body[0].points, quantized.body[0].points)


def test_a_constant_channel_whose_zero_point_is_far_away(net, path):
    net.body[0].weight.data[2] = 12345.0
    quantized = quantize(net, Config.preset("dfsq", 4))
    dfsq.save(quantized, path)
    assert torch.equal(dfsq.load(path, net).body[0].weight, quantized.body[0].weight)


@pytest.mark.parametrize("value", [1e-6, 3e-4, 0.3])
def test_constant_inputs(path, value):
    """The one level of such a channel is the whole number 1 or a little less."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    images = torch.full((1, 3, 16, 16), value)
    quantized = quantize(net, Config.preset("free", 4), images)
    assert all(len(points) == 1 for points in quantized[0].activation.points)
    dfsq.save(quantized, path)
    loaded = dfsq.load(path, net)
    assert torch.equal(loaded[0].activation.levels, quantized[0].activation.levels)
    assert torch.equal(run(loaded, images), run(quantized, images))


@pytest.mark.parametrize("points", [[[-0.5, 0.5]], [[0.25]], [[-3.0, -2.0]], [[7.0], [8.0, 9.0]]])
def test_levels_a_step_of_one_apart(points):
    tensors, universal = {}, dfsq.universal_set("sq", signed=False) / 3
    rows = [np.array(row, np.float32) for row in points]
    entry = dfsq.storage._write_points("inputs", rows, universal, tensors)
    again = dfsq.storage._read_points("inputs", entry, universal, tensors)
    assert [row.tolist() for row in again] == points
    assert (entry[0] == "consecutive") == all(row[0] == round(row[0]) for row in points)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("codes", lambda part: part[:-1]),
        ("codes", None),
        ("scale", lambda part: part.nextafter(part + 1)),
        ("scale", lambda part: part[:, None]),
        ("inputs", lambda part: part.view(torch.int8)),
    ],
)
def test_a_tensor_that_is_damaged(net, path, key, change):
    dfsq.save(quantize(net, Config.preset("dfsq-subset", 3)), path)
    tensors = load_file(path)
    with dfsq.storage.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    part = tensors.pop(f"body.0/{key}")
    if change is not None:
        tensors[f"body.0/{key}"] = change(part)
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="is damaged"):
        dfsq.load(path, net)


def test_any_bit_that_is_flipped_is_noticed(net, path):
    """In the tensors, in their names and types, and in the metadata."""
    dfsq.save(quantize(net, Config.preset("dfsq-subset", 3)), path)
    content = bytearray(path.read_bytes())
    for place in np.random.default_rng(0).integers(8 * len(content), size=300).tolist():
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"is damaged|not a quantized network"):
            dfsq.load(path, net)
        content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)
    dfsq.load(path, net)
