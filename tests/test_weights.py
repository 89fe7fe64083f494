"""Weight quantizers, against literal loops and against every other choice."""

from itertools import combinations

import numpy as np
import pytest
import torch

from dfsq.universal import universal_set
from dfsq.weights import METHODS, quantize_weight

SHAPES = [(8, 4, 3, 3), (6, 5, 1, 1), (8, 1, 3, 3), (3, 2, 1, 5), (1, 1, 1, 1)]


@pytest.fixture
def weight():
    return random_weight((8, 4, 3, 3))


def random_weight(shape, seed=0):
    generator = np.random.default_rng(seed)
    scales = 10.0 ** generator.uniform(-4, 1, (shape[0], 1, 1, 1))
    return torch.from_numpy((generator.laplace(size=shape) * scales).astype(np.float32))


def squared_error(quantized, weight):
    return (quantized.dequantize().double() - weight.double()).square().flatten(1).sum(1)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_minmax_as_released(shape, bits):
    """Per output channel, step (max - min)/(2^bits - 1), integer zero point; value by value."""
    weight = random_weight(shape)
    result = quantize_weight(weight, bits, "minmax").dequantize()
    for channel, quantized in zip(weight.double(), result, strict=True):
        low, high = float(channel.min()), float(channel.max())
        step = (high - low) / (2**bits - 1)
        if step == 0:
            assert quantized.item() == pytest.approx(low, rel=1e-6)
            continue
        zero_point = round(low / step)
        for value, got in zip(
            channel.flatten().tolist(), quantized.flatten().tolist(), strict=True
        ):
            code = min(max(round(value / step) - zero_point, 0), 2**bits - 1)
            assert got == np.float32((code + zero_point) * step)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_levels(shape, bits, method):
    weight = random_weight(shape)
    quantized = quantize_weight(weight, bits, method)
    assert quantized.codes.dtype == torch.uint8
    assert quantized.codes.shape == weight.shape
    assert quantized.levels.dtype == torch.float32
    assert quantized.levels.shape[0] == shape[0]
    assert quantized.levels.shape[1] <= 2**bits
    assert (quantized.levels.diff(dim=1) >= 0).all()
    result = quantized.dequantize()
    for index in np.ndindex(*shape):
        assert result[index] == quantized.levels[index[0], quantized.codes[index].int()]


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_mse_is_never_worse_than_minmax(bits):
    weight = random_weight((64, 16, 3, 3), bits)
    minmax, mse = (quantize_weight(weight, bits, method) for method in ("minmax", "mse"))
    errors = squared_error(minmax, weight), squared_error(mse, weight)
    assert (errors[1] <= errors[0] * (1 + 1e-6)).all()
    assert (errors[1] < errors[0] * 0.99).any()


@pytest.mark.parametrize("universal", ["sq", [[1, 0.5, 0], [0.25, 0]]], ids=["sq", "own"])
def test_subset_is_never_worse_than_any_other(universal):
    points = universal_set(universal)
    weight = random_weight((6, 3, 3, 3))
    errors = squared_error(quantize_weight(weight, 2, "subset", points), weight)
    flat = weight.double().flatten(1).numpy()
    scale = np.abs(flat).max(axis=1)
    subsets = points[np.array(list(combinations(range(len(points)), 4)))]
    for row, s, error in zip(flat, scale, errors, strict=True):
        distances = np.abs(row[:, None, None] - subsets * s).min(axis=-1)
        best = (distances**2).sum(axis=0).min()
        # the levels are stored in float32
        assert float(error) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("words", [3, 4])
def test_subset_levels_are_points_of_the_set(words):
    universal = universal_set(words=words)
    weight = random_weight((5, 4, 3, 3))
    quantized = quantize_weight(weight, 4, "subset", universal)
    scale = weight.abs().flatten(1).amax(1).double()
    for levels, s in zip(quantized.levels.numpy(), scale.tolist(), strict=True):
        points = universal[np.abs(levels[:, None] / s - universal).argmin(1)]
        assert len(set(points)) == 16
        assert np.array_equal(levels, (points * s).astype(np.float32))
    nearest = (weight.flatten(1)[..., None] - quantized.levels[:, None]).abs().argmin(-1)
    assert torch.equal(quantized.codes.flatten(1).long(), nearest)


def test_subset_beats_minmax_at_few_bits(weight):
    for bits in (2, 3, 4):
        subset, minmax = (quantize_weight(weight, bits, m) for m in ("subset", "minmax"))
        assert squared_error(subset, weight).sum() < squared_error(minmax, weight).sum()


def test_a_set_smaller_than_the_number_of_codes():
    universal = universal_set([[1, 0]])
    quantized = quantize_weight(torch.tensor([[[[0.5, -0.1, 0.3]]]]), 4, "subset", universal)
    assert quantized.levels.tolist() == [[-0.5, 0, 0.5]]
    assert quantized.dequantize().flatten().tolist() == [0.5, 0, 0.5]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, 0.3, -7.5, 1e-12, -1e-30])
def test_constant_and_zero_channels(method, value):
    """They keep their value; the other channel is as without them."""
    other = random_weight((1, 3, 3, 3), 1)
    weight = torch.cat([torch.full_like(other, value), other])
    result = quantize_weight(weight, 4, method).dequantize()
    assert torch.allclose(result[0], weight[0], rtol=1e-6, atol=1e-9)
    assert torch.equal(result[1], quantize_weight(other, 4, method).dequantize()[0])
    if value == 0:
        assert not result[0].any()


@pytest.mark.parametrize("method", METHODS)
def test_weight_is_left_untouched(weight, method):
    before = weight.clone()
    quantize_weight(weight, 3, method)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite(weight, bad):
    weight[1, 2, 0, 0] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_weight(weight, 4)


@pytest.mark.parametrize("bits", [0, 1, 9, 33, 2.5])
def test_bits_out_of_range(weight, bits):
    with pytest.raises(ValueError, match=f"from 2 to 8, not {bits}"):
        quantize_weight(weight, bits)


def test_unknown_method(weight):
    with pytest.raises(ValueError, match="one of minmax, mse, subset, not 'gptq'"):
        quantize_weight(weight, 4, "gptq")


def test_a_weight_between_two_points_goes_to_the_upper():
    weight = torch.tensor([1.0, 0.25, -0.5, 0.75]).reshape(1, 4, 1, 1)
    quantized = quantize_weight(weight, 2, universal=np.array([-1, 0, 0.5, 1]))
    assert quantized.dequantize().flatten().tolist() == [1, 0.5, 0, 1]
