"""Normalization and activation quantizers, against brute force and literal loops."""

import numpy as np
import pytest
import torch

from dfsq.activations import (
    CodebookQuantizer,
    DynamicUniformQuantizer,
    StaticUniformQuantizer,
    center_max,
    center_max_statistics,
    static_range,
)
from dfsq.universal import universal_set

UNIVERSAL = universal_set()
OFF_GRID = universal_set(words=3)


def random_points(channels, k, generator, universal=UNIVERSAL):
    """A random codebook for each channel, of different sizes up to k."""
    sizes = np.minimum(generator.integers(max(1, k // 2), k + 1, channels), len(universal))
    sizes[0] = min(k, len(universal))
    return [np.sort(generator.choice(universal, size, replace=False)) for size in sizes]


def random_maps(shape, generator, non_negative=False):
    x = generator.laplace(size=shape) * generator.uniform(0.01, 100, (1, shape[1], 1, 1))
    if non_negative:
        x = np.maximum(x, 0)
    else:
        x += generator.normal(size=(1, shape[1], 1, 1)) * 10
    return torch.from_numpy(x.astype(np.float32))


def brute_force(x, points, non_negative):
    """The method as it is written: statistics a map, then the nearest of the points."""
    result = np.empty_like(x.numpy())
    for n, c in np.ndindex(x.shape[:2]):
        plane = x[n, c].numpy()
        mean = np.float32(0 if non_negative else plane.astype(np.float64).mean())
        scale = np.float32(np.abs(plane - mean).max() + np.float32(1e-8))
        z = ((plane - mean) / scale).astype(np.float64)
        # the last of the nearest: an exact tie goes up
        falling = points[c][::-1]
        nearest = falling[np.argmin(np.abs(z[..., None] - falling), axis=-1)]
        result[n, c] = nearest.astype(np.float32) * scale + mean
    return torch.from_numpy(result)


# --- normalization ---


def test_normalization_is_the_papers():
    x = random_maps((2, 3, 16, 16), np.random.default_rng(0))
    z, offset, scale = center_max(x)
    mean = x.double().mean((2, 3), keepdim=True)
    assert torch.equal(offset, mean.float())
    assert torch.equal(scale, (x - offset).abs().amax((2, 3), keepdim=True) + 1e-8)
    assert torch.equal(z, (x - offset) / scale)
    assert z.abs().amax() <= 1

    z, offset, scale = center_max(x.relu(), non_negative=True)
    assert not offset.any()
    assert torch.equal(scale, x.relu().amax((2, 3), keepdim=True) + 1e-8)
    assert z.min() == 0
    assert z.max() <= 1

    # stated to be non-negative, and it is not: still the largest magnitude
    z, _, scale = center_max(-x.relu(), non_negative=True)
    assert torch.equal(scale, x.relu().amax((2, 3), keepdim=True) + 1e-8)
    assert z.min() >= -1


def test_normalization_of_a_constant_map():
    x = torch.full((1, 2, 8, 8), 3.25)
    z, offset, scale = center_max(x)
    assert not z.any()
    assert torch.equal(z * scale + offset, x)
    assert not center_max(torch.zeros(1, 1, 8, 8), non_negative=True)[0].any()


@pytest.mark.parametrize("non_negative", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_normalization_of_a_constant_map_in_other_types(dtype, non_negative):
    """In float16 the 1e-8 is 0."""
    x = torch.full((1, 1, 8, 8), 0.0 if non_negative else 3.25, dtype=dtype)
    z, offset, scale = center_max(x, non_negative)
    assert not z.any()
    assert torch.equal(z * scale + offset, x)


# --- codebooks ---


@pytest.mark.parametrize("non_negative", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (3, 5, 9, 13)])
def test_nearest_point_of_each_channel(shape, bits, non_negative):
    generator = np.random.default_rng(bits)
    points = random_points(shape[1], 2**bits, generator, UNIVERSAL[188 * non_negative :])
    x = random_maps(shape, generator, non_negative)
    quantizer = CodebookQuantizer(points, non_negative=non_negative)
    assert torch.equal(quantizer(x), brute_force(x, points, non_negative))


@pytest.mark.parametrize("universal", [UNIVERSAL, UNIVERSAL[UNIVERSAL >= 0]])
def test_every_midpoint_goes_up_and_the_float_below_it_down(universal):
    """At each midpoint of each two points, the trap of z + 1 in floating point among them."""
    a, b = (p.ravel() for p in np.meshgrid(universal[::2], universal[1::3]))
    pairs = np.sort(np.stack([a, b], axis=1)[a != b], axis=1)
    quantizer = CodebookQuantizer(list(pairs))
    middle = torch.from_numpy(pairs.mean(axis=1).astype(np.float32))
    below = torch.nextafter(middle, torch.tensor(-2.0))
    z = torch.stack([middle, below], dim=1)[None, :, None]
    codes = quantizer.codes(z)[0, :, 0]
    assert torch.equal(codes, torch.tensor([1, 0]).expand(len(pairs), 2))


@pytest.mark.parametrize("non_negative", [False, True])
def test_midpoints_through_the_whole_quantizer(non_negative):
    """Maps whose scale is 1 and whose mean is 0, so that their values are normalized as is."""
    points = np.array([0, 0.25, 0.5, 1]) if non_negative else np.array([-0.75, -0.25, 0.5, 1])
    middle = (points[1:] + points[:-1]) / 2
    values = np.concatenate([middle, np.nextafter(middle.astype(np.float32), -1), [1.0]])
    values = np.resize(values, 32)
    expected = points[np.searchsorted(middle, values, side="right")]
    if not non_negative:
        values = np.concatenate([values, -values])
        expected = points[np.searchsorted(middle, values, side="right")]
    side = (1, 1, -1, 8)
    values, expected = (torch.tensor(v, dtype=torch.float32).view(side) for v in (values, expected))
    if non_negative:
        values, expected = (v.tile(1, 1, 2, 1) for v in (values, expected))
    quantizer = CodebookQuantizer([points], non_negative=non_negative)
    assert torch.equal(quantizer(values), expected)


def test_values_beyond_the_outer_points_take_these():
    quantizer = CodebookQuantizer([[-0.5, 0.25]])
    codes = quantizer.codes(torch.tensor([-1.0, -5.0, 1.0, 5.0]).view(1, 1, 1, 4))
    assert codes.flatten().tolist() == [0, 0, 1, 1]


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every second pixel": lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)[
        ..., ::2, ::2
    ],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded batch": lambda x: x[:1].expand(3, -1, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("non_negative", [False, True])
@pytest.mark.parametrize("size", [(17, 11), (70, 61)], ids=["fewer than cells", "more"])
@pytest.mark.parametrize(("bits", "channels"), [(2, 1), (2, 7), (8, 3)])
def test_one_pass_is_the_reference_bit_for_bit(bits, channels, size, non_negative, layout):
    generator = np.random.default_rng(bits)
    x = LAYOUTS[layout](random_maps((2, channels, *size), generator, non_negative))
    points = random_points(channels, 2**bits, generator)
    quantizer = CodebookQuantizer(points, non_negative=non_negative)
    before = x.clone()
    _, offset, scale = center_max(x, non_negative)
    assert torch.equal(quantizer(x), quantizer.reference(x, offset, scale))
    assert torch.equal(x, before)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e-30, 1e30])
def test_constant_map(value):
    x = torch.full((2, 2, 8, 8), value)
    quantizer = CodebookQuantizer([[-1, 0, 1]] * 2)
    _, offset, scale = center_max(x)
    assert torch.equal(quantizer(x), quantizer.reference(x, offset, scale))
    assert torch.equal(quantizer(x), x)


def test_one_pixel_warns_once():
    x = torch.tensor([0.5, -2.0]).view(1, 2, 1, 1)
    quantizer = CodebookQuantizer([[-1, 0, 1]] * 2, layer="body.3")
    with pytest.warns(UserWarning, match=r"layer 'body.3' meets a map of under 64 pixels"):
        first = quantizer(x)
    assert torch.equal(first, x)  # z is 0, and the mean carries the pixel
    assert torch.equal(quantizer(x), x)


def test_images_of_a_batch_do_not_meet():
    generator = np.random.default_rng(1)
    x = random_maps((3, 4, 12, 12), generator)
    quantizer = CodebookQuantizer(random_points(4, 16, generator))
    together = quantizer(x)
    assert all(torch.equal(together[i : i + 1], quantizer(x[i : i + 1])) for i in range(3))


@pytest.mark.parametrize("non_negative", [False, True])
def test_thresholds_off_the_grid_are_searched(non_negative):
    generator = np.random.default_rng(2)
    points = random_points(3, 16, generator, OFF_GRID)
    quantizer = CodebookQuantizer(points, non_negative=non_negative)
    assert quantizer.table is None
    x = random_maps((2, 3, 10, 10), generator, non_negative)
    z, offset, scale = center_max(x, non_negative)
    for c, p in enumerate(points):
        middle = ((p[1:] + p[:-1]) / 2).astype(np.float32)
        codes = np.searchsorted(middle, z[:, c].numpy(), side="right")
        assert np.array_equal(quantizer.codes(z)[:, c].numpy(), codes)
        on_edges = torch.from_numpy(middle).expand(1, 3, 1, -1)
        assert quantizer.codes(on_edges)[0, c, 0].tolist() == list(range(1, len(p)))
        expected = torch.from_numpy(p.astype(np.float32)[codes]) * scale[:, c] + offset[:, c]
        assert torch.equal(quantizer(x)[:, c], expected)


def test_thresholds_of_ones_own():
    quantizer = CodebookQuantizer([[-0.9, 0.123, 0.7]], [[0, 0.25]])
    z = torch.tensor([-1e-9, 0.0, 0.2499, 0.25]).view(1, 1, 1, 4)
    assert quantizer.codes(z).flatten().tolist() == [0, 1, 1, 2]
    assert np.array_equal(quantizer.points[0], np.float32([-0.9, 0.123, 0.7]))


def test_thresholds_in_the_outermost_cells():
    """As free codebooks have them; the map has scale 1 and mean 0."""
    edge = 2047 / 2048
    quantizer = CodebookQuantizer([[-0.9, 0, 0.9]], [[-edge, edge]])
    below = float(np.nextafter(np.float32(edge), np.float32(0)))
    values = torch.tensor([-1, -edge, -below, 0, 0, below, edge, 1]).view(1, 1, 1, 8)
    expected = torch.tensor([-0.9, 0, 0, 0, 0, 0, 0.9, 0.9]).view(1, 1, 1, 8)
    assert torch.equal(quantizer(values.tile(8, 1)), expected.tile(8, 1))


@pytest.mark.parametrize(
    ("points", "thresholds", "message"),
    [
        ([[0, 1], [1, 0]], None, "channel 1: points must be finite, sorted and distinct"),
        ([[0, 0]], None, "channel 0: points"),
        ([[0, np.nan]], None, "channel 0: points"),
        ([[]], None, "at least one"),
        ([[0, 1], np.arange(257) / 256], None, "at most 256 points, not 257"),
        ([[0, 0.5, 1]], [[0.5]], "channel 0: thresholds must be sorted, one fewer"),
        ([[0, 0.5, 1]], [[0.5, 0.25]], "thresholds must be sorted"),
    ],
)
def test_bad_codebooks(points, thresholds, message):
    with pytest.raises(ValueError, match=message):
        CodebookQuantizer(points, thresholds)


@pytest.mark.parametrize("others", [UNIVERSAL, OFF_GRID], ids=["on the grid", "off it"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_loaded_state_brings_its_own_codes(others, assign):
    """Also where one set of thresholds is looked up and the other searched."""
    generator = np.random.default_rng(6)
    x = random_maps((1, 3, 16, 16), generator)
    for universals in ((UNIVERSAL, others), (others, UNIVERSAL)):
        a, b = (
            CodebookQuantizer([np.sort(generator.choice(u, 8, replace=False)) for _ in range(3)])
            for u in universals
        )
        assert not torch.equal(a(x), b(x))
        a.load_state_dict(b.state_dict(), assign=assign)
        assert torch.equal(a(x), b(x))
        assert torch.equal(a(x), a.reference(x, *a.statistics(x)))


def test_thresholds_at_the_ends_are_searched():
    """The outermost cells hold values on both sides of these."""
    quantizer = CodebookQuantizer([[-1.5, 0, 1.5]], [[-1, 1]])
    codes = quantizer.codes(torch.tensor([-1.1, -1, 0.9999, 1]).view(1, 1, 1, 4))
    assert codes.flatten().tolist() == [0, 1, 1, 2]


# --- uniform controls ---


def uniform(plane, low, high, bits):
    """A map on 2^bits even levels from low to high, value by value."""
    low, high = np.float32(low), np.float32(high)
    step = np.float32((high - low) / np.float32(2**bits - 1))
    codes = np.round((plane - low) / step) if step > 0 else np.zeros_like(plane)
    return np.clip(codes, 0, 2**bits - 1) * step + low


@pytest.mark.parametrize("non_negative", [False, True])
@pytest.mark.parametrize("bits", [2, 8])
def test_dynamic_uniform(bits, non_negative):
    x = random_maps((2, 3, 9, 10), np.random.default_rng(bits), non_negative) + non_negative
    result = DynamicUniformQuantizer(bits, non_negative)(x)
    for n, c in np.ndindex(2, 3):
        plane = x[n, c].numpy()
        low, high = 0 if non_negative else plane.min(), plane.max()
        assert np.array_equal(result[n, c].numpy(), uniform(plane, low, high, bits))
        assert np.abs(result[n, c].numpy() - plane).max() <= (high - low) / (2**bits - 1) * 0.5001


def test_dynamic_uniform_of_a_constant_map():
    x = torch.full((1, 1, 8, 8), -0.3)
    assert torch.equal(DynamicUniformQuantizer(4)(x), x)


@pytest.mark.parametrize("channels", [1, 3])
def test_static_uniform(channels):
    x = random_maps((2, 3, 9, 10), np.random.default_rng(3))
    low, high = np.linspace(-8, -2, 3)[:channels], np.linspace(3, 9, 3)[:channels]
    result = StaticUniformQuantizer(3, low, high)(x)
    for n, c in np.ndindex(2, 3):
        i = c % channels
        assert np.array_equal(result[n, c].numpy(), uniform(x[n, c].numpy(), low[i], high[i], 3))


@pytest.mark.parametrize("values", [[1, 2e6, 3e9, 1e30], [-1, -2e6, -3e9, -1e30]])
def test_values_far_beyond_the_range(values):
    """They go to the outermost level, however far, and as maps with a tiny share do too."""
    z = torch.tensor([[[values]]])
    quantizer = CodebookQuantizer([[-1.0, 0.0, 1.0]])
    assert quantizer.codes(z).flatten().tolist() == [2 * (values[0] > 0)] * 4
    narrow = CodebookQuantizer([[-1.0, 0.0, 1.0]], shares=[1e-8])
    sign = torch.sign(torch.tensor(values[0]))
    x = torch.zeros(1, 1, 8, 8)
    x[..., 4:] = sign
    assert (torch.sign(narrow(x)[..., 4:]) == sign).all()


def test_static_range_of_one_value():
    x = torch.full((1, 1, 8, 8), 0.7)
    assert torch.equal(StaticUniformQuantizer(4, [0.5], [0.5])(x), torch.full_like(x, 0.5))
    with pytest.raises(ValueError, match=r"layer 'a': a static range must have low <= high"):
        StaticUniformQuantizer(4, [1], [0], layer="a")


@pytest.mark.parametrize("non_negative", [False, True])
def test_static_ranges(non_negative):
    values = np.random.default_rng(4).standard_t(3, 20_000).astype(np.float32)
    values = np.maximum(values, 0) if non_negative else values
    minmax = static_range(values, 4, "minmax")
    assert minmax == (values.min(), values.max())
    low, high = static_range(values, 4, "percentile", 99)
    assert np.mean(values > high) == pytest.approx(0.01, abs=1e-3)
    assert np.mean(values < low) == pytest.approx(0 if non_negative else 0.01, abs=1e-3)
    assert static_range(np.linspace(0, 1, 1000), 4, "percentile")[0] == 0

    def error(bounds):
        return ((uniform(values, *bounds, 4) - values).astype(np.float64) ** 2).sum()

    best = error(static_range(values, 4, "mse"))
    assert best < error(minmax)
    others = [np.multiply(minmax, shrink) for shrink in np.linspace(1, 0.05, 80)]
    assert best <= min(map(error, others)) * (1 + 1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_ends_of_a_static_range_are_found_apart(bits):
    """With one long tail a common factor cuts either too little of it or too much of the other."""
    values = np.random.default_rng(5).gamma(2, 1, 4000).astype(np.float32) - 1
    minmax, shares = static_range(values, bits, "minmax"), np.linspace(1, 0.05, 80)

    def error(bounds):
        return ((uniform(values, *bounds, bits) - values).astype(np.float64) ** 2).sum()

    low, high = static_range(values, bits, "mse")
    together = min(error(np.multiply(minmax, s)) for s in shares)
    apart = error((low, high))
    assert apart < together
    for s in shares:  # neither end alone can be bettered
        assert apart <= error((minmax[0] * s, high)) * (1 + 1e-6)
        assert apart <= error((low, minmax[1] * s)) * (1 + 1e-6)
    mirrored = static_range(-values, bits, "mse")
    assert mirrored == pytest.approx((-high, -low), rel=1e-6)


@pytest.mark.parametrize("start", [0, 0.5])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_static_range_of_one_sign(start, sign):
    values = sign * np.r_[np.linspace(start, start + 1, 200), 9].astype(np.float32)
    found, whole = (static_range(values, 2, method) for method in ("mse", "minmax"))
    assert found[0] < found[1]
    left, before = (np.square(uniform(values, *r, 2) - values).sum() for r in (found, whole))
    assert left < before


def test_static_range_of_another_name():
    with pytest.raises(ValueError, match="minmax, percentile or mse, not 'max'"):
        static_range([0, 1], 4, "max")


QUANTIZERS = {
    "codebook": lambda **options: CodebookQuantizer([[0, 0.5, 1]] * 2, **options),
    "off the grid": lambda **options: CodebookQuantizer([[0, 1 / 3, 1]] * 2, **options),
    "dynamic": lambda **options: DynamicUniformQuantizer(2, **options),
    "static": lambda **options: StaticUniformQuantizer(2, [0], [1], **options),
}


# --- types and devices ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_a_cast_leaves_the_codebooks(kind, dtype):
    quantizer, x = QUANTIZERS[kind](), torch.rand(1, 2, 9, 9)
    before, expected = {**quantizer.state_dict()}, quantizer(x)
    quantizer.to(dtype)
    after = quantizer.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(quantizer(x), expected)
    quantizer.to("meta", dtype)  # to another device they go
    for name, buffer in quantizer.named_buffers():
        assert buffer.is_meta
        assert name not in before or buffer.dtype == before[name].dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_default_type(dtype):
    points = random_points(3, 16, np.random.default_rng(0))
    expected = CodebookQuantizer(points)
    try:
        torch.set_default_dtype(dtype)
        made = CodebookQuantizer(points)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, buffer in expected.named_buffers():
        assert made.get_buffer(name).dtype == buffer.dtype
        assert torch.equal(made.get_buffer(name), buffer)


@pytest.mark.parametrize("words", [3, 4])
def test_a_batch_of_no_images(words):
    points = random_points(3, 4, np.random.default_rng(0), universal_set(words=words))
    x = torch.rand(0, 3, 8, 9)
    assert CodebookQuantizer(points)(x).shape == x.shape


@pytest.mark.parametrize("kind", ["codebook", "off the grid", "static"])
def test_another_default_device(kind):
    """A quantizer is made where its numbers are, and works on maps wherever they are."""
    x = torch.rand(1, 2, 9, 9)
    expected = QUANTIZERS[kind]()(x)
    with torch.device("meta"):
        assert torch.equal(QUANTIZERS[kind]()(x), expected)


# --- what every quantizer refuses ---


@pytest.mark.parametrize("non_negative", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_values_that_are_not_finite(kind, bad, non_negative):
    quantizer = QUANTIZERS[kind](non_negative=non_negative, layer="body.3.body.2")
    x = torch.rand(1, 2, 8, 8)
    x[0, 1, 3, 4] = bad
    with pytest.raises(ValueError, match=r"layer 'body.3.body.2': its input holds NaN or infinity"):
        quantizer(x)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_negative_value_in_a_non_negative_layer(kind):
    quantizer = QUANTIZERS[kind](non_negative=True, layer="body.2")
    x = torch.rand(1, 2, 8, 8)
    x[0, 0, 0, 0], x[0, 1, 1, 1] = -0.2, -0.9
    with pytest.warns(
        UserWarning, match=r"layer 'body.2' was calibrated on non-negative"
    ) as caught:
        first = quantizer(x)
    assert len(caught) == 1
    assert first[0, 0, 0, 0] == first[0, 1, 1, 1] == 0  # the smallest point
    assert torch.equal(quantizer(x), first)  # no second warning, which would be an error here


def test_another_number_of_channels():
    with pytest.raises(ValueError, match="layer 'tail' takes 2 channels, not 3"):
        CodebookQuantizer([[0, 1]] * 2, layer="tail")(torch.rand(1, 3, 8, 8))


def test_statistics_in_one_pass_are_those_of_tensors():
    x = random_maps((2, 3, 33, 21), np.random.default_rng(4))
    low, high, offset, scale = center_max_statistics(x)
    assert torch.equal(low, x.amin((2, 3), keepdim=True))
    assert torch.equal(high, x.amax((2, 3), keepdim=True))
    mean = x.double().mean((2, 3), keepdim=True)
    assert (offset - mean).abs().max() <= mean.abs().max() * 2**-24
    assert torch.equal(scale, (x - offset).abs().amax((2, 3), keepdim=True) + 1e-8)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, 5, 63])
def test_statistics_of_a_map_that_is_not_finite(value, where):
    x = torch.zeros(1, 2, 8, 8)
    x.view(2, -1)[1, where] = value
    scale = center_max_statistics(x)[3].flatten()
    assert torch.isfinite(scale).tolist() == [True, False]


@pytest.mark.parametrize("non_negative", [False, True])
def test_compiled_as_one_graph(non_negative):
    generator = np.random.default_rng(3)
    x = random_maps((1, 4, 16, 16), generator, non_negative)
    quantizer = CodebookQuantizer(random_points(4, 16, generator), non_negative=non_negative)
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), quantizer(x))
    with pytest.raises(ValueError, match="NaN"):
        compiled(x * float("nan"))
