"""Search of the activations' range."""

import numpy as np
import pytest
import torch
from test_convert import IMAGES, make_images, make_net

import dfsq
from dfsq import cost, integer, memory, ranges
from dfsq.activations import CodebookQuantizer, center_max
from dfsq.calibration import is_held_out
from dfsq.config import Config
from dfsq.selection import select
from dfsq.study import large
from dfsq.universal import universal_set

pytestmark = pytest.mark.usefixtures("one_thread")

SEARCHED = Config.preset("dfsq-points-a", 3, range_search=True, error_units="output")


def made(count=8):
    """Images of three channels: uniform; near both extremes, where the set is thin; constant."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, 24, 20, generator=generator)
    images[:, 0] -= 0.5
    images[:, 1, :, ::2] = 0.15 * images[:, 1, :, ::2] + 0.85
    images[:, 1, :, 1::2] = -images[:, 1, :, ::2]
    images[:, 2] = 0.25
    return images


def convolution(inputs=3):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(inputs, 4, 3)).eval()


def quantize(net, images, config=SEARCHED):
    return dfsq.quantize(net, images, config, progress=False)


def shares(quantized, layer="0"):
    return quantized.get_submodule(layer).activation.shares.flatten().numpy()


@pytest.mark.parametrize("error_units", ["output", "normalized"])
@pytest.mark.parametrize("non_negative", [False, True])
def test_the_search_on_the_samples_themselves(non_negative, error_units):
    images = made()
    images[:, 2, :, ::2] = 0.7 + 0.1 * torch.rand(8, 24, 10, generator=torch.manual_seed(0))
    images[:, 2, :, 1::2] = -images[:, 2, :, ::2]
    images[:, 2, 0, :2] = torch.tensor([1.0, -1.0])
    images = images.abs() if non_negative else images
    config = Config.preset("dfsq-points-a", 3, range_search=True, error_units=error_units)
    quantized = quantize(convolution(), images, config)
    universal = universal_set(signed=not non_negative)
    z, _, scale = center_max(images, non_negative)
    weight = scale.double().expand_as(z) ** 2 if error_units == "output" else torch.ones_like(z)
    z, weight = (part.flatten(2).numpy() for part in (z, weight))
    held_out = np.array([is_held_out(i, len(images)) for i in range(len(images))])

    def selected(c, share, part):
        samples, weights = (z[part, c] / np.float32(share)).ravel(), weight[part, c].ravel()
        return select(samples, 3, universal=universal, weights=weights).points

    def error(c, share, part, points):
        off = np.abs(z[part, c, :, None].astype(float) - share * points).min(-1)
        return float((weight[part, c] * off**2).sum())

    for c in range(3):
        points = [selected(c, share, ~held_out) for share in ranges.SHARES]
        fit, check = (
            [error(c, s, part, p) for s, p in zip(ranges.SHARES, points, strict=True)]
            for part in (~held_out, held_out)
        )
        best = int(np.argmin(fit))
        best = best if check[best] <= (1 - ranges.LEAST_GAIN) * check[0] else 0
        share = ranges.SHARES[best]
        assert shares(quantized)[c] == np.float32(share)
        expected = selected(c, share, slice(None))
        assert np.array_equal(quantized[0].activation.points[c], expected)
    if not non_negative:  # errors under two shares are compared in one unit, or one side would win
        assert shares(quantized)[0] > 1 > shares(quantized)[2]


def test_where_the_set_is_thin_another_share_has_more_points():
    net, images = convolution(), made(12)
    searched, plain = (
        quantize(net, images),
        quantize(net, images, Config.preset("dfsq-points-a", 3)),
    )
    assert shares(searched)[1] > 1
    assert shares(searched)[2] == 1
    unseen = made(13)[12:]
    found, before = (q[0].activation(unseen) - unseen for q in (searched, plain))
    assert found[:, 1].square().sum() < before[:, 1].square().sum()
    report = dfsq.summary(searched).relative_error, dfsq.summary(plain).relative_error
    assert report[0][0] < report[1][0]


@pytest.mark.parametrize("count", [1, 8])
def test_relative_error_under_shares_is_that_of_the_inputs(count):
    images, net = made(count), convolution()
    searched = quantize(net, images)
    assert (shares(searched) != 1).any()
    _, offset, _ = center_max(images)
    off = searched[0].activation(images) - images
    expected = off.double().square().sum() / (images - offset).double().square().sum()
    found = dfsq.summary(searched).relative_error[0]
    assert found == pytest.approx(float(expected), rel=1e-4)


def test_no_gain_on_held_out_images_leaves_the_range():
    """The fourth image has no values but where the others' points of the whole range are."""
    images = made(4)
    assert shares(quantize(convolution(), images))[1] > 1
    images[3, 1] = torch.where(images[3, 1] > 0, 1.0, -1.0)
    images[3, 1, ::2] *= 0.875
    assert shares(quantize(convolution(), images))[1] == 1


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("count", [1, 2])
def test_few_images_and_constant_channels(bits, count):
    config = Config.preset("dfsq-points-a", bits, range_search=True)
    quantized = quantize(convolution(), made(count), config)
    assert np.isin(shares(quantized), np.float32(ranges.SHARES)).all()
    x = torch.full((1, 3, 9, 9), 0.25)
    assert torch.allclose(quantized(x), convolution()(x), atol=1e-6)
    one = quantize(convolution(1), torch.full((count, 1, 8, 8), 0.5), config)
    assert one(torch.full((1, 1, 8, 8), 0.5)).isfinite().all()


def test_a_pixel():
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1)).eval()
    quantized = quantize(net, torch.rand(5, 2, 1, 1))
    with pytest.warns(UserWarning, match="under 64 pixels"):
        found = quantized(torch.rand(1, 2, 1, 1))
    assert found.isfinite().all()


def test_passes_in_little_memory_give_the_same(monkeypatch):
    net, passes, original = make_net(), [], ranges._gather

    def counted(model, names, *others):
        passes.append(list(names))
        return original(model, names, *others)

    monkeypatch.setattr(ranges, "_gather", counted)
    at_once = quantize(net, IMAGES)
    monkeypatch.setattr(memory, "LIMIT", 1)
    one_by_one = quantize(net, IMAGES)
    assert passes == [["body.0", "body.2"], ["body.0"], ["body.2"]]
    assert torch.equal(at_once(IMAGES), one_by_one(IMAGES))


@pytest.mark.parametrize("changes", [{"budget": True}, {"sequential": True}, {}])
def test_with_the_other_ingredients(changes):
    """The points are those of a selection under the shares, as many as the budget gives."""
    images = make_images(count=8)
    config = Config(2, 2, range_search=True, **changes)
    net, own = make_net(), Config(2, 2, **changes)
    quantized, plain = quantize(net, images, config), quantize(net, images, own)
    assert any((shares(quantized, name) != 1).any() for name in ("body.0", "body.2"))
    for name in ("body.0", "body.2"):
        counts = [q.get_submodule(name).activation.count.tolist() for q in (quantized, plain)]
        assert counts[0] == counts[1]
    assert torch.isfinite(quantized(images)).all()


def test_only_where_it_is_wanted():
    images = make_images(count=8)
    config = Config(3, 3, overrides={"body.2": {"range_search": True}})
    quantized = quantize(make_net(), images, config)
    assert quantized.body[0].activation.shares is None
    assert quantized.body[2].activation.shares is not None
    uniform = {"body.0": {"normalization": "minmax"}, "body.2": {"act_bits": 32}}
    quantized = quantize(make_net(), images, Config(3, 3, range_search=True, overrides=uniform))
    assert quantized.body[2].activation is None
    with pytest.raises(ValueError, match="range_search=True goes with selector='exact', not 'fre"):
        Config(selector="free", range_search=True)


def test_a_share_scales_the_codebook():
    torch.manual_seed(0)
    x, points = torch.randn(2, 3, 16, 12), [[-1, -0.25, 0, 0.875], [-0.5, 0.5], [0, 1]]
    plain = CodebookQuantizer(points)
    assert torch.equal(CodebookQuantizer(points, shares=[1, 1, 1])(x), plain(x))
    half = CodebookQuantizer(points, shares=[0.5, 0.25, 1])
    z, offset, scale = center_max(x)
    for c, share in enumerate((0.5, 0.25, 1)):
        levels = share * torch.tensor(points[c])
        nearest = (z[:, c, ..., None] - levels).abs().argmin(-1)
        expected = levels[nearest] * scale[:, c] + offset[:, c]
        assert torch.allclose(half(x)[:, c], expected, atol=1e-6)
    assert torch.equal(half(x), half.reference(x, *half.statistics(x)))
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        half(torch.full((1, 3, 8, 8), torch.nan))


@pytest.mark.parametrize("bad", [[1, 1], [1, 0, 1], [1, -1, 1], [1, np.nan, 1], [1, np.inf, 1]])
def test_bad_shares(bad):
    with pytest.raises(ValueError, match="shares must be 3 positive numbers"):
        CodebookQuantizer([[0, 1]] * 3, shares=bad)


def test_searched_ranges_outside_of_the_network(tmp_path, monkeypatch):
    """In a file, in integers, in strips, and in the count of shifts."""
    net, images = make_net(), make_images(count=8)
    config = Config.preset("dfsq-subset", 3, range_search=True)
    quantized = quantize(net, images, config)
    assert (shares(quantized, "body.0") != 1).any()
    dfsq.save(quantized, tmp_path / "q.safetensors")
    again = dfsq.load(tmp_path / "q.safetensors", net)
    assert torch.equal(again(images), quantized(images))
    assert np.array_equal(shares(again, "body.0"), shares(quantized, "body.0"))

    close = integer.to_integer(quantized)(images) - quantized(images)
    assert close.abs().max() < 1e-4
    monkeypatch.setattr(large, "STRIP", 24)
    with large.convolved_in_strips(quantized):
        strips = quantized(images)
    assert torch.allclose(strips, quantized(images), atol=1e-5)

    behind_relu, entered = quantized.body[2], []
    hook = behind_relu.register_forward_pre_hook(lambda _, x: entered.append(x[0]))
    quantized(images)
    hook.remove()
    zeros = cost.shift_adds(quantized, images).set_index("layer").zeros["body.2"]
    assert zeros == pytest.approx(float((behind_relu.activation(entered[0]) == 0).double().mean()))
