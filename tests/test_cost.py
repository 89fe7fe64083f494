"""Operations, bits and shifts, counted."""

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from test_convert import make_images, make_net, quantize
from torch import nn

import dfsq
from dfsq import cost
from dfsq.activations import CodebookQuantizer, center_max
from dfsq.config import Config

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def net():
    return make_net()


def of(table, layer):
    return table.set_index("layer").loc[layer]


def test_operations_of_a_float_network(net):
    table = cost.operations(net, 10, 7)
    assert table.layer.tolist() == ["head", "body.0", "body.2", "tail"]
    assert of(table, "head").macs == 10 * 7 * 6 * 3 * 9
    assert of(table, "body.0").macs == 10 * 7 * 6 * 6 * 9
    assert of(table, "body.0").partial_sums == 10 * 7 * 6 * 6
    assert (table.outputs == 10 * 7 * np.array([6, 6, 6, 3])).all()
    assert (table.input_bits == 32).all()
    assert (table.statistics == 0).all()
    assert of(table, "tail").moved == 32 * (6 * 70 + 3 * 6 * 9)
    assert next(net.parameters()).device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_operations_are_the_same_in_any_type(net, dtype):
    for made in (net, quantize(net, Config.preset("dfsq-subset", 4))):
        expected = cost.operations(made, 10, 7)
        pd.testing.assert_frame_equal(cost.operations(made.to(dtype), 10, 7), expected)


def test_operations_are_those_on_a_colour_image():
    with pytest.raises(ValueError, match="does not take an RGB image of 7x10 pixels: "):
        cost.operations(make_net(channels=1), 10, 7)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_operations_of_a_quantized_network(net, bits):
    quantized = quantize(net, Config.preset("dfsq", bits))
    before = quantized.body[0].activation
    table = cost.operations(quantized, 10, 7)
    assert quantized.body[0].activation is before
    row = of(table, "body.0")
    assert row.weight_bits == bits
    assert row.input_bits <= bits
    assert row.statistics == 5 * 6 * 70
    assert row.moved == pytest.approx(row.input_bits * 420 + bits * 324 + 64 * 6)
    assert of(table, "tail").input_bits == 32


def test_bits_of_channels_of_different_numbers_of_points():
    """The mean of the channels' bits, not the bits of their mean; scales are of the inputs."""
    net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1)).eval()
    made = quantize(net, Config.preset("dfsq-subset", 4))
    made[0].activation = CodebookQuantizer([np.arange(k) / 16 for k in (2, 4, 16)])
    made[0].points[0, 2:] = torch.inf
    made[0].points[1, 4:] = torch.inf
    row = of(cost.operations(made, 10, 7), "0")
    assert (row.input_bits, row.weight_bits) == (pytest.approx((1 + 2 + 4) / 3), 3)
    assert row.moved == pytest.approx(7 * 70 + 3 * 135 + 64 * 3)


def test_static_ranges_need_no_statistics(net):
    made = quantize(net, Config.preset("static-tensor-minmax", 4))
    row = of(cost.operations(made, 10, 7), "body.0")
    assert row.statistics == 0
    assert row.moved == 4 * (420 + 324)


def test_grouped_and_strided():
    net = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, groups=3, padding=1))
    row = of(cost.operations(net, 8, 8), "0")
    assert row.macs == 4 * 4 * 6 * 1 * 9
    assert row.partial_sums == row.outputs == 4 * 4 * 6
    assert row.inputs == 8 * 8 * 3


def test_storage_is_what_the_codes_need(net):
    quantized = quantize(net, Config.preset("dfsq-subset", 4))
    row = of(cost.storage(quantized), "body.0")
    assert row.codes == 4 * 324
    assert row.scales == 64 * 6
    # indices into the 377 points
    assert row.codebooks == pytest.approx(6 * 16 * np.log2(377), abs=8)
    assert row["float"] == 32 * (324 + 6)
    assert row.total == row.codes + row.scales + row.codebooks + row.inputs + row.bias


def test_a_file_is_hardly_larger_than_what_is_counted(tmp_path):
    net = dfsq.sr.load_model("edsr-x2")
    quantized = dfsq.quantize(
        net, torch.rand(1, 3, 24, 24), Config.preset("dfsq-subset", 4), progress=False
    )
    dfsq.save(quantized, tmp_path / "net.safetensors")
    counted = cost.storage(quantized)
    # from first principles: 4 bits a weight, 16 points a channel, scale and bias
    least = 32 * (4 * 36864 + 2 * 64 * 16 * np.log2(189) + 64 * 64)
    assert counted.drop(columns="bias").total.sum() >= least
    biases = counted.bias.sum()  # they stay in the float network's file
    size = 8 * (tmp_path / "net.safetensors").stat().st_size
    assert size <= 1.05 * (counted.total.sum() - biases)


@pytest.mark.parametrize(
    "config",
    [
        Config.preset("dfsq-subset", 4, range_search=True),
        Config.preset("free", 3),
        Config.preset("dfsq-budget", 3),
        Config.preset("static-channel-minmax", 4),
    ],
    ids=lambda config: f"{config.selector}-{config.normalization}",
)
def test_storage_is_what_the_files_tensors_take(net, config, tmp_path):
    quantized = quantize(net, config)
    dfsq.save(quantized, tmp_path / "net.safetensors")
    tensors = load_file(tmp_path / "net.safetensors")
    counted = cost.storage(quantized).set_index("layer")
    sizes = dict.fromkeys(counted.index, 0)
    for key, tensor in tensors.items():
        layer, part = key.split("/")
        if part != "bias":  # counted whether the file holds it or the float network's does
            sizes[layer] += 8 * tensor.nbytes
    assert (counted.total - counted.bias).to_dict() == sizes


def test_only_weights(net):
    quantized = quantize(net, Config.preset("dfsq-subset-w", 4))
    row = of(cost.storage(quantized), "body.0")
    assert row.inputs == 0
    assert row.codes == 4 * 324
    with pytest.raises(ValueError, match="points of a universal set"):
        cost.shift_adds(quantized, make_images())


def test_only_activations(net):
    quantized = quantize(net, Config.preset("dfsq-points-a", 4))
    row = of(cost.storage(quantized), "body.0")
    assert row.codes == 32 * 324
    assert row.codebooks == row.scales == 0


def test_a_float_network_has_no_storage(net):
    with pytest.raises(ValueError, match=r"not made by dfsq\.quantize"):
        cost.storage(net)
    with pytest.raises(ValueError, match=r"not made by dfsq\.quantize"):
        cost.shift_adds(net, make_images())


def test_shifts_and_adds_of_the_points_that_are_taken(net):
    images = make_images()
    quantized = quantize(net, Config.preset("dfsq-points", 3))
    quantizer = quantized.body[0].activation = CodebookQuantizer([[-0.5, 0, 0.25, 1]] * 6)
    with torch.no_grad():
        z = center_max(torch.cat([net.head(image[None]) for image in images]))[0]
    codes, shifts, adds, zeros = quantizer.codes(z), [], [], 0
    for c, points in enumerate(quantizer.points):
        for code in codes[:, c].flatten().tolist():
            terms = len(dfsq.shifts_and_adds(points[code]))
            shifts.append(terms)
            adds.append(max(terms - 1, 0))
            zeros += points[code] == 0
    row = of(cost.shift_adds(quantized, images), "body.0")
    assert row.shifts == pytest.approx(np.mean(shifts))
    assert row.adds == pytest.approx(np.mean(adds))
    assert row.zeros == pytest.approx(zeros / len(shifts)) != 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_shifts_and_adds_on_a_gpu(net):
    quantized = quantize(net, Config.preset("dfsq-points", 3))
    expected = cost.shift_adds(quantized, make_images())
    found = cost.shift_adds(quantized.cuda(), make_images())
    numbers = [c for c in expected if c != "layer"]
    np.testing.assert_allclose(found[numbers], expected[numbers], rtol=1e-2)


def test_energy_is_count_times_energy_of_one():
    counts = pd.DataFrame(
        [("a", 1e6, "add", "add"), ("b", 2e6, "none", "multiply")],
        columns=["part", "count", "least", "most"],
    )
    found = cost.energy(counts, {"add": 0.5, "multiply": 3.0})
    assert found.part.tolist() == ["a", "b"]
    assert found["least"].tolist() == pytest.approx([0.5e-6, 0])
    assert found["most"].tolist() == pytest.approx([0.5e-6, 6e-6])


def test_energy_refuses_what_it_does_not_know():
    counts = pd.DataFrame({"count": [1], "least": ["add"], "most": ["shift"]})
    with pytest.raises(ValueError, match="no energy is given for shift"):
        cost.energy(counts, {"add": 0.5})
    with pytest.raises(ValueError, match="swap the bounds"):
        cost.energy(counts, {"add": 0.5, "shift": 0.1})
