"""Error compensation, against loops, other solvers and all other choices."""

import copy
import time
from itertools import product

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional

import dfsq
from dfsq import compensation, convert, memory, ranges
from dfsq.calibration import calibrate, find_layers
from dfsq.compensation import Statistics, compensate
from dfsq.config import Config
from dfsq.selection import select_channels
from dfsq.sr.models.edsr import EDSR
from dfsq.universal import universal_set

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = {
    "least_squares": True,
    "compensation": True,
    "scale_search": True,
    "bias_correction": True,
    "damping": 0.01,
    "order": "diagonal",
}
NONE = ALL | dict.fromkeys(
    ("least_squares", "compensation", "scale_search", "bias_correction"), False
)

KINDS = {
    "plain": {},
    "stride": {"stride": 2},
    "strides": {"stride": (2, 3), "padding": 0},
    "same": {"padding": "same"},
    "same, even kernel": {"padding": "same", "kernel_size": (2, 4)},
    "reflect": {"padding_mode": "reflect", "padding": (1, 2)},
    "circular": {"padding_mode": "circular"},
    "dilation": {"dilation": 2, "padding": 2},
    "dilations": {"dilation": (1, 2), "stride": (2, 1), "padding": 0},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4},
    "1x1": {"kernel_size": 1, "padding": 0},
    "1x3": {"kernel_size": (1, 3), "padding": (0, 1)},
    "no bias": {"bias": False},
}


def make_conv(kind="plain", seed=0, outputs=8):
    torch.manual_seed(seed)
    options = {"kernel_size": 3, "padding": 1} | KINDS[kind]
    return nn.Conv2d(4, outputs, **options).requires_grad_(False)


def smooth(count, channels=4, shape=(14, 11), seed=0):
    """Images whose neighbouring pixels and channels are much alike."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 5, 4, generator=generator)
    fine = functional.interpolate(coarse, shape, mode="bicubic", align_corners=True)
    return (
        fine + 0.7 * fine.mean(1, keepdim=True) + 0.02 * torch.rand(fine.shape, generator=generator)
    )


def coarse(x, step=0.15):
    """A quantizer with a mean error of its own."""
    return torch.floor(x / step) * step


def gathered(conv, images, quantizer=coarse):
    found = Statistics(conv)
    generator = torch.Generator().manual_seed(0)
    for image in images.split(1):
        found.add(image, quantizer(image), generator)
    return found


def of_moments(conv, second, cross=None):
    """Statistics of given uncentred moments, of one group."""
    found = Statistics(conv)
    found.second, found.count = np.asarray(second)[None], 1
    found.cross = found.second if cross is None else np.asarray(cross)[None]
    return found


def linear(inputs, outputs, seed):
    """A convolution that is a matrix, with float64 weights, and correlated moments."""
    generator = np.random.default_rng(seed)
    conv = nn.Conv2d(inputs, outputs, 1, bias=False).double().requires_grad_(False)
    conv.weight.copy_(torch.from_numpy(generator.laplace(size=(outputs, inputs, 1, 1))))
    mixed = generator.normal(size=(inputs, inputs + 2)) @ np.diag(0.6 ** np.arange(inputs + 2))
    return conv, mixed @ mixed.T, generator


def literal_patches(conv, x):
    """All patches of an image of shape (C, H, W) by loops, shape (groups, patch size, places)."""
    pads = []
    for axis in (0, 1):
        if conv.padding == "same":
            total = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
            pads.append((total // 2, total - total // 2))
        else:
            pads.append((conv.padding[axis],) * 2)
    mode = {"zeros": "constant", "circular": "wrap"}.get(conv.padding_mode, conv.padding_mode)
    x = np.pad(x.double().numpy(), ((0, 0), *pads), mode=mode)
    (down, right), (high, wide) = conv.dilation, conv.kernel_size
    reach = down * (high - 1) + 1, right * (wide - 1) + 1
    patches = [
        [x[c, i : i + reach[0] : down, j : j + reach[1] : right] for c in range(conv.in_channels)]
        for i in range(0, x.shape[1] - reach[0] + 1, conv.stride[0])
        for j in range(0, x.shape[2] - reach[1] + 1, conv.stride[1])
    ]
    return np.stack([np.stack(p).reshape(conv.groups, -1) for p in patches], axis=-1)


def all_patches(conv, images):
    return np.concatenate([literal_patches(conv, image) for image in images], axis=-1)


def errors(weight, wanted, second):
    """Of each row, (v - t) H (v - t)'."""
    off = (weight - wanted).reshape(len(weight), -1)
    return ((off @ second) * off).sum(axis=1)


# --- statistics ---


@pytest.mark.parametrize("kind", KINDS)
def test_second_moments_by_loops(kind):
    conv, images = make_conv(kind), smooth(3)
    statistics = gathered(conv, images)
    before, after = (all_patches(conv, values) for values in (images, coarse(images)))
    assert statistics.count == before.shape[-1]
    close = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(statistics.second, after @ after.transpose(0, 2, 1), **close)
    np.testing.assert_allclose(statistics.cross, before @ after.transpose(0, 2, 1), **close)
    np.testing.assert_allclose(statistics.before, before.sum(-1), **close)
    np.testing.assert_allclose(statistics.after, after.sum(-1), **close)
    for group in range(conv.groups):
        second, cross, mean, mean_after = statistics.moments(group, centred=True)
        centred = after[group] - after[group].mean(-1, keepdims=True)
        size = centred.shape[-1]
        np.testing.assert_allclose(second, centred @ centred.T / size, atol=1e-5)
        np.testing.assert_allclose(cross, before[group] @ centred.T / size, atol=1e-5)
        np.testing.assert_allclose(mean, before[group].mean(-1), rtol=1e-4)
        np.testing.assert_allclose(mean_after, after[group].mean(-1), rtol=1e-4)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kind", KINDS)
def test_predicted_energy_is_that_of_the_output(kind):
    conv, images = make_conv(kind), smooth(3)
    statistics = gathered(conv, images)
    outputs = [conv(values).double() for values in (images, coarse(images))]
    if conv.bias is not None:
        outputs = [y - conv.bias.double()[:, None, None] for y in outputs]
    rows = conv.weight.double().numpy().reshape(conv.groups, 8 // conv.groups, -1)
    for name, (a, b) in {"second": (1, 1), "cross": (0, 1)}.items():
        moments = getattr(statistics, name) / statistics.count
        predicted = ((rows @ moments) * rows).sum(-1).ravel()
        expected = (outputs[a] * outputs[b]).mean((0, 2, 3))
        np.testing.assert_allclose(predicted, expected, rtol=1e-4)


def test_the_same_random_places_before_and_after(monkeypatch):
    """Some of the patches, each of them once, and as the map has them."""
    monkeypatch.setattr(compensation, "PATCHES", 20)
    conv, images = make_conv(), smooth(2)
    statistics = gathered(conv, images, lambda x: 2 * x)
    assert statistics.count == 40
    assert np.array_equal(2 * statistics.cross, statistics.second)
    assert np.array_equal(2 * statistics.before, statistics.after)
    one = gathered(conv, images[:1], lambda x: x)
    places = torch.randperm(14 * 11, generator=torch.Generator().manual_seed(0))[:20]
    patches = literal_patches(conv, images[0])[..., places.numpy()]
    np.testing.assert_allclose(one.second, patches @ patches.transpose(0, 2, 1), rtol=1e-5)


def test_random_places_under_another_default_device():
    conv, images = make_conv(), smooth(2)
    expected = gathered(conv, images)
    with torch.device("meta"):
        found = gathered(conv, images)
    assert np.array_equal(found.second, expected.second)
    assert np.array_equal(found.cross, expected.cross)


@pytest.mark.parametrize("mean", [0, 30, 3000])
def test_large_means_take_nothing_from_the_second_moments(mean):
    conv, images = make_conv("circular"), 20 * smooth(3) + mean
    statistics = gathered(conv, images, torch.round)
    before, after = (all_patches(conv, values)[0] for values in (images, torch.round(images)))
    after -= after.mean(-1, keepdims=True)
    second, cross, _, _ = statistics.moments(0, centred=True)
    off = second - after @ after.T / after.shape[1]
    assert np.abs(off).max() < 1e-5 * np.diag(second).mean()
    off = cross - before @ after.T / after.shape[1]
    assert np.abs(off).max() < 1e-5 * np.diag(second).mean()


def test_merged_is_of_both():
    conv, images = make_conv("groups"), smooth(3)
    whole, parts = gathered(conv, images), (gathered(conv, images[:2]), gathered(conv, images[2:]))
    merged = parts[0].merged(parts[1])
    for name in ("second", "cross", "before", "after", "count"):
        np.testing.assert_allclose(getattr(merged, name), getattr(whole, name), rtol=1e-5)
    assert parts[0].count == 2 * 14 * 11


# --- least squares ---


@pytest.mark.parametrize("kind", ["plain", "no bias", "stride", "groups", "depthwise", "1x1"])
def test_least_squares_is_that_of_the_patches(kind, monkeypatch):
    monkeypatch.setattr(compensation, "RIDGES", (1e-9,))
    conv = make_conv(kind)
    images = torch.rand(3, 4, 14, 11, generator=torch.Generator().manual_seed(0))
    statistics = gathered(conv, images)
    options = NONE | {"least_squares": True, "bias_correction": True}
    result = compensate(conv, statistics, statistics, **options)
    assert result.codes is result.levels is None
    before, after = (all_patches(conv, values) for values in (images, coarse(images)))
    rows = conv.weight.double().numpy().reshape(conv.groups, 8 // conv.groups, -1)
    fitted = result.weight.reshape(rows.shape)
    for x, q, w, v in zip(before, after, rows, fitted, strict=True):
        wanted = w @ x
        if conv.bias is not None:
            q, wanted = (a - a.mean(-1, keepdims=True) for a in (q, wanted))
        expected = np.linalg.lstsq(q.T, wanted.T, rcond=None)[0].T
        np.testing.assert_allclose(v, expected, rtol=1e-2, atol=1e-4)
        assert (np.square(v @ q - wanted).sum(1) < np.square(w @ q - wanted).sum(1)).all()
    if conv.bias is None:
        assert result.bias is None


def test_float_weights_stay_where_the_fit_does_not_hold_up():
    """Of each row, on the images that are held out."""
    conv, second, generator = linear(6, 40, 0)
    fit, check = (
        of_moments(conv, second, second + 0.2 * generator.normal(size=second.shape))
        for _ in range(2)
    )
    w = conv.weight.numpy().reshape(40, 6)
    v = compensate(conv, fit, check, **(NONE | {"least_squares": True})).weight.reshape(40, 6)
    kept = (v == w).all(axis=1)
    assert 0 < kept.sum() < 40

    def held_out(rows):
        return ((rows @ second - 2 * w @ check.cross[0]) * rows).sum(axis=1)

    assert (held_out(v)[~kept] < held_out(w)[~kept]).all()


def test_nothing_is_fitted_to_an_input_that_is_not_quantized():
    conv = make_conv()
    statistics = gathered(conv, smooth(3), lambda x: x)
    result = compensate(conv, statistics, statistics, **ALL)
    np.testing.assert_allclose(result.weight, conv.weight.double(), rtol=1e-9)
    np.testing.assert_allclose(result.bias, conv.bias.double(), atol=1e-9)


# --- rounding ---


def literal_rounding(target, levels, hessian, sequence):
    """One weight after the other, the others' best answer to it, and its row taken out of H."""
    rest, inverse = target.copy(), np.linalg.inv(hessian)
    codes = np.empty(len(rest), int)
    for step, i in enumerate(sequence):
        codes[i] = np.abs(levels - rest[i]).argmin()
        error = (rest[i] - levels[codes[i]]) / inverse[i, i]
        for j in sequence[step:]:
            rest[j] -= error * inverse[i, j]
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


@pytest.mark.parametrize("order", ["given", "diagonal"])
@pytest.mark.parametrize("inputs", [1, 2, 5, 12])
def test_compensated_rounding_by_loops(inputs, order):
    for seed in range(10):
        conv, second, generator = linear(inputs, 6, seed)
        hessian = second + 0.01 * np.eye(inputs)
        target = conv.weight.numpy().reshape(6, inputs)
        levels = np.sort(generator.normal(size=(6, 4)), axis=1)
        sequence = np.arange(inputs)
        if order == "diagonal":
            sequence = np.argsort(-np.diag(hessian))
        codes = compensation._compensated_rounding(hessian, order)(target, levels)
        for row in range(6):
            expected = literal_rounding(target[row], levels[row], hessian, sequence)
            assert np.array_equal(codes[row], expected)


@pytest.mark.parametrize("order", ["given", "diagonal"])
def test_nothing_to_make_up_for_between_independent_inputs(order):
    conv, _, generator = linear(12, 30, 0)
    statistics = of_moments(conv, np.diag(generator.uniform(0.1, 3, 12)))
    levels = np.sort(generator.normal(size=(30, 5)), axis=1)
    options = {"levels": levels} | NONE | {"order": order}
    plain = compensate(conv, statistics, statistics, **options)
    made_up = compensate(conv, statistics, statistics, **(options | {"compensation": True}))
    assert np.array_equal(plain.codes, made_up.codes)
    nearest = np.abs(conv.weight.numpy().reshape(30, 12, 1) - levels[:, None]).argmin(-1)
    assert np.array_equal(plain.codes.reshape(30, 12), nearest)


@pytest.mark.parametrize("order", ["given", "diagonal"])
@pytest.mark.parametrize("count", [3, 4, 16])
def test_never_worse_than_the_nearest_levels(count, order):
    total = np.zeros(2)
    for seed in range(30):
        conv, second, generator = linear(9, 16, seed)
        w = conv.weight.numpy().reshape(16, 9)
        statistics = of_moments(conv, second)
        hessian = statistics.merged(statistics).moments(0, False)[0]
        hessian = hessian + 0.01 * np.diag(hessian).mean() * np.eye(9)
        levels = np.sort(generator.normal(size=(16, count)), axis=1) * 1.5
        options = {"levels": levels} | NONE | {"order": order}
        plain, made_up = (
            errors(compensate(conv, statistics, statistics, **o).weight.reshape(16, 9), w, hessian)
            for o in (options, options | {"compensation": True})
        )
        assert (made_up <= plain * (1 + 1e-9)).all()
        total += plain.sum(), made_up.sum()
    assert total[1] < 0.9 * total[0]


def test_refinement_is_monotone_and_ends_where_no_weight_should_move(monkeypatch):
    monkeypatch.setattr(compensation, "SWEEPS", 1)
    for seed in range(20):
        conv, second, generator = linear(4, 30, seed)
        hessian = second + 0.01 * np.eye(4)
        target = conv.weight.numpy().reshape(30, 4)
        levels = np.sort(generator.normal(size=(30, 3)), axis=1)

        def error(codes, levels=levels, target=target, hessian=hessian):
            return errors(np.take_along_axis(levels, codes, 1), target, hessian)

        codes, last = generator.integers(0, 3, (30, 4)), None
        while not np.array_equal(codes, last):
            last, codes = codes, compensation._refined(target, levels, codes, hessian)
            assert (error(codes) <= error(last) + 1e-12).all()
        for i, code in product(range(4), range(3)):
            moved = codes.copy()
            moved[:, i] = code
            assert (error(codes) <= error(moved) + 1e-12).all()
        # against all 81: never better, and most often the best
        every = [error(np.tile(c, (30, 1))) for c in product(range(3), repeat=4)]
        best = np.min(every, axis=0)
        assert (error(codes) >= best - 1e-12).all()
        assert (error(codes) <= best + 1e-12).mean() > 0.5


def test_compensation_ends_where_no_weight_should_move():
    for seed in range(10):
        conv, second, generator = linear(4, 30, seed)
        statistics = of_moments(conv, second)
        levels = np.sort(generator.normal(size=(30, 3)), axis=1)
        options = {"levels": levels} | NONE | {"compensation": True}
        codes = compensate(conv, statistics, statistics, **options).codes.reshape(30, 4)
        hessian = second + 0.01 * np.diag(second).mean() * np.eye(4)
        target = conv.weight.numpy().reshape(30, 4)
        found = errors(np.take_along_axis(levels, codes, 1), target, hessian)
        for i, code in product(range(4), range(3)):
            moved = codes.copy()
            moved[:, i] = code
            other = errors(np.take_along_axis(levels, moved, 1), target, hessian)
            assert (found <= other + 1e-12).all()


# --- levels ---


def with_points(conv, fit, check, bits, **options):
    points = np.full(conv.out_channels, 2**bits)
    return compensate(conv, fit, check, points=points, universal=universal_set(), **options)


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_levels_are_the_exact_subset_for_what_compensation_leaves(share, monkeypatch):
    """An input counts by the variance that the others do not explain; what is beyond 1, as 1."""
    conv, second, _ = linear(12, 24, 0)
    statistics = of_moments(conv, second)
    monkeypatch.setattr(compensation, "SCALES", (share,))
    options = NONE | {"compensation": True}
    result = with_points(conv, statistics, statistics, 2, **options)
    z = np.clip(conv.weight.numpy().reshape(24, 12) / result.scale, -1, 1)
    damped = statistics.second[0] / statistics.count
    damped += options["damping"] * np.diag(damped).mean() * np.eye(12)
    expected = select_channels(z, bits=2, weights=1 / np.diag(np.linalg.inv(damped)))
    for points, selection in zip(result.points, expected, strict=True):
        assert np.array_equal(points, selection.points)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_another_scale_only_where_it_is_better_on_held_out_images(bits, monkeypatch):
    """By plain rounding, so that each scale's result is seen."""
    conv, second, generator = linear(12, 12, bits)
    noise = generator.normal(size=(12, 30))
    fit, check = of_moments(conv, second), of_moments(conv, second + 0.1 * noise @ noise.T)
    w = conv.weight.numpy().reshape(12, 12)

    def found(**options):
        weight = with_points(conv, fit, check, bits, **(NONE | options)).weight
        return weight.reshape(12, 12)

    searched = found(scale_search=True)
    first = found()
    single = []
    for scale in compensation.SCALES:
        monkeypatch.setattr(compensation, "SCALES", (scale,))
        single.append(found())
    assert np.array_equal(single[0], first)
    candidates = np.array([errors(s, w, check.second[0]) for s in single])
    chosen = errors(searched, w, check.second[0])
    changed = (searched != first).any(axis=1)
    assert (chosen <= candidates.min(axis=0) * 1.01 + 1e-12).all()
    assert (chosen[changed] < candidates[0, changed]).all()
    if bits <= 4:
        assert changed.any()


def test_the_first_scale_stays_where_another_is_hardly_better(monkeypatch):
    """Or the rounding of sums would choose between them."""
    conv, second, _ = linear(12, 24, 0)
    statistics = of_moments(conv, second)
    w, scales = conv.weight.numpy().reshape(24, 12), (1.0, 1.00004)

    def found(*scales):
        monkeypatch.setattr(compensation, "SCALES", scales)
        return with_points(conv, statistics, statistics, 2, **(NONE | {"scale_search": True}))

    first, second_best = (
        errors(found(s).weight.reshape(24, 12), w, statistics.second[0]) for s in scales
    )
    hardly = (second_best < first) & (second_best > 0.9995 * first)
    assert hardly.any()
    assert np.array_equal(found(*scales).scale[hardly], found(1.0).scale[hardly])


def test_the_first_scale_stays_where_it_leaves_no_error():
    conv, second, generator = linear(12, 24, 0)
    points = np.array([-1, -0.5, 0, 0.75])
    chosen = generator.integers(0, 4, (24, 12))
    chosen[:, 0] = 0
    conv.weight.copy_(torch.from_numpy(points[chosen])[..., None, None])
    statistics = of_moments(conv, second)
    result = with_points(conv, statistics, statistics, 2, **(NONE | {"scale_search": True}))
    assert np.array_equal(result.weight, conv.weight.numpy())


def test_levels_are_points_of_the_set_under_a_scale_that_is_tried():
    conv, images = make_conv(), smooth(4)
    statistics = gathered(conv, images[:3]), gathered(conv, images[3:])
    result = with_points(conv, *statistics, 3, **ALL)
    target = compensate(conv, *statistics, **ALL).weight.reshape(8, -1)
    assert result.levels.shape == (8, 8)
    shares = np.array(compensation.SCALES)[:, None] * np.abs(target).max(axis=1)
    off = np.abs(result.scale[:, 0] / shares - 1)
    assert (off.min(axis=0) < 2**-16).all()
    assert np.array_equal(result.points * 1024, (result.points * 1024).round())
    taken = np.take_along_axis(result.levels, result.codes.reshape(8, -1), 1)
    assert np.array_equal(result.weight.reshape(8, -1), taken)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_rounding_of_sums_leaves_no_trace(bits):
    """Of sums in another order codes and scales are the same, to the last bit."""
    conv, images = make_conv(), smooth(4)
    fit, check = gathered(conv, images[:3]), gathered(conv, images[3:])
    results = [with_points(conv, fit, check, bits, **ALL)]
    generator = np.random.default_rng(0)
    for part in (fit, check):
        for sums in (part.second, part.cross):
            sums *= 1 + 1e-14 * generator.normal(size=sums.shape)
        part.second = (part.second + part.second.transpose(0, 2, 1)) / 2
    results.append(with_points(conv, fit, check, bits, **ALL))
    for name in ("codes", "points", "scale", "weight"):
        assert np.array_equal(*(getattr(result, name) for result in results)), name


def test_other_numbers_of_points_for_each_row():
    conv, images = make_conv(), smooth(2)
    statistics = gathered(conv, images[:1]), gathered(conv, images[1:])
    points = np.array([2, 3, 4, 7, 8, 16, 5, 2])
    options = {"points": points, "universal": universal_set()} | ALL
    result = compensate(conv, *statistics, **options)
    assert np.isfinite(result.weight).all()
    assert all(len(np.unique(row)) <= k for row, k in zip(result.weight, points, strict=True))
    alone = compensate(conv, *statistics, **(options | {"points": np.full(8, 7)}))
    assert np.array_equal(result.weight[3], alone.weight[3])


# --- bias ---


@pytest.mark.parametrize("kind", ["plain", "stride", "groups", "depthwise", "reflect"])
@pytest.mark.parametrize("bits", [2, 32])
def test_the_mean_error_is_gone_on_all_samples(kind, bits):
    """Of those that the weights were fitted to and those held out, all alike."""
    conv, images = make_conv(kind), smooth(5)
    statistics = gathered(conv, images[:4]), gathered(conv, images[4:])
    for options in (ALL, NONE | {"bias_correction": True}):
        if bits == 32:
            result = compensate(conv, *statistics, **options)
        else:
            result = with_points(conv, *statistics, bits, **options)
        new = copy.deepcopy(conv).double()
        new.weight.copy_(torch.from_numpy(result.weight))
        before = (new(coarse(images).double()) - conv(images)).mean((0, 2, 3)).abs()
        new.bias.copy_(torch.from_numpy(result.bias))
        after = (new(coarse(images).double()) - conv(images)).mean((0, 2, 3)).abs()
        assert before.max() > 1e-2
        assert after.max() < 1e-5


def test_no_other_bias_where_none_is_wanted():
    statistics = [gathered(make_conv(), smooth(2, seed=seed)) for seed in range(2)]
    result = with_points(make_conv(), *statistics, 4, **(ALL | {"bias_correction": False}))
    assert result.bias is None


# --- hard cases ---


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("kind", ["depthwise", "1x1", "no bias"])
@pytest.mark.parametrize("case", ["dead", "all dead", "flat", "constant rows", "zero rows"])
def test_hard_cases(case, kind, bits):
    conv, images = make_conv(kind), smooth(2)
    if case == "dead":
        images[:, 1] = 0
    elif case == "all dead":
        images *= 0
    elif case == "flat":
        images[:] = images[:, :, :1, :1]
    elif case == "constant rows":
        conv.weight[:3] = torch.tensor([0.3, -1e-20, 7.0])[:, None, None, None]
    else:
        conv.weight[:3] = 0
    fit, check = (gathered(conv, image[None]) for image in images)
    result = with_points(conv, fit, check, bits, **ALL)
    assert np.isfinite(result.weight).all()
    assert result.bias is None or np.isfinite(result.bias).all()
    assert result.levels.shape == (8, 2**bits)
    assert (np.diff(result.levels) > 0).all()
    assert result.codes.min() >= 0
    assert result.codes.max() < 2**bits
    # not much worse than without all this
    plain = with_points(conv, fit, check, bits, **(NONE | {"bias_correction": True}))
    left = []
    for found in (plain, result):
        new = copy.deepcopy(conv).double()
        new.weight.copy_(torch.from_numpy(found.weight))
        if found.bias is not None:
            new.bias.copy_(torch.from_numpy(found.bias))
        error = new(coarse(images).double()) - conv(images)
        left.append(float(error.square().mean()))
    assert left[1] <= left[0] * 1.5 + 1e-10


@pytest.mark.parametrize("kind", ["1x1", "reflect"])
@pytest.mark.parametrize("size", [1, 255])
def test_constant_inputs(kind, size):
    """There is nothing to learn from them but the means."""
    for seed in range(2):
        conv = make_conv(kind, seed)
        flat = torch.rand(2, 4, 1, 1, generator=torch.Generator().manual_seed(seed))
        statistics = [gathered(conv, x[None]) for x in size * flat.expand(2, 4, 14, 11)]
        one = with_points(conv, statistics[0], statistics[0], 4, **ALL)
        weight = compensate(conv, statistics[0], statistics[1], **ALL).weight
        assert np.array_equal(weight, conv.weight.double())
        options = NONE | {"bias_correction": True}
        plain = with_points(conv, statistics[0], statistics[0], 4, **options)
        np.testing.assert_allclose(one.weight, plain.weight, rtol=1e-9)
        with_points(conv, *statistics, 4, **ALL)


def test_one_output_channel():
    conv, images = make_conv(outputs=1), smooth(2)
    fit, check = (gathered(conv, image[None]) for image in images)
    result = with_points(conv, fit, check, 3, **ALL)
    assert result.weight.shape == (1, 4, 3, 3)
    assert result.levels.shape == (1, 8)
    assert result.bias.shape == (1,)


def test_weights_of_a_dead_input_have_no_say_in_the_levels():
    conv, second, _ = linear(12, 16, 0)
    w = conv.weight.numpy().reshape(16, 12)
    w[:, 8:] = np.sign(w[:, 8:]) * (0.2 + 0.1 * np.arange(4)) * np.abs(w[:, :8]).max(1)[:, None]
    second = 1e-4 * second  # as of inputs in 0..1
    second[8:] = second[:, 8:] = 0
    options = NONE | {"compensation": True, "damping": 1e-4}
    found = with_points(conv, *[of_moments(conv, second)] * 2, 2, **options)
    live = nn.Conv2d(8, 16, 1, bias=False).double().requires_grad_(False)
    live.weight.copy_(conv.weight[:, :8])
    alone = with_points(live, *[of_moments(live, second[:8, :8])] * 2, 2, **options)
    errors_found = errors(found.weight.reshape(16, 12), w, second)
    errors_alone = errors(alone.weight.reshape(16, 8), w[:, :8], second[:8, :8])
    assert errors_found.sum() < 1.1 * errors_alone.sum()


# --- whole networks ---


class Net(nn.Module):
    body_layers = ("body.*",)

    def __init__(self, features=8):
        super().__init__()
        self.head = nn.Conv2d(3, features, 3, padding=1)
        layers = []
        for _ in range(3):
            layers += [nn.Conv2d(features, features, 3, padding=1), nn.ReLU()]
        self.body = nn.Sequential(*layers[:-1])
        self.tail = nn.Conv2d(features, 3, 3, padding=1)

    def forward(self, x):
        x = self.head(x)
        return self.tail(x + self.body(x))


LAYERS = ("body.0", "body.2", "body.4")
IMAGES = smooth(5, 3, (20, 18), seed=1)


def make_net(seed=0):
    torch.manual_seed(seed)
    return Net().eval()


@pytest.fixture
def net():
    return make_net()


@torch.no_grad()
def run(net, images=IMAGES):
    return net(images)


def quantize(net, config=None, images=IMAGES):
    return dfsq.quantize(net, images, config, progress=False)


def same(a, b, names=LAYERS):
    """Whether layers of two networks are the same to the last bit."""
    for name in names:
        x, y = (net.get_submodule(name).state_dict() for net in (a, b))
        if x.keys() != y.keys() or not all(torch.equal(x[key], y[key]) for key in x):
            return False
    return True


def hooks_of(net):
    return [h for m in net.modules() for h in (*m._forward_pre_hooks, *m._forward_hooks)]


def test_the_default_is_the_preset():
    assert Config.preset("dfsq-exact", 4) == Config()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_less_error_than_the_released_method(bits):
    new = smooth(3, 3, (24, 20), seed=9)
    for seed in range(3):
        net = make_net(seed)
        expected = run(net, new)
        released, exact = (
            (run(quantize(net, Config.preset(name, bits)), new) - expected).square().mean()
            for name in ("dfsq", "dfsq-exact")
        )
        assert exact < 0.8 * released


@pytest.mark.parametrize(
    "field", ["least_squares", "compensation", "scale_search", "bias_correction"]
)
def test_each_part_does_something(net, field):
    """Alone, it changes the weights or the biases, and never the activations."""
    preset = "dfsq-points" if field == "bias_correction" else "dfsq-subset"
    plain = quantize(net, Config.preset(preset, 3))
    changed = quantize(net, Config.preset(preset, 3, **{field: True}))
    scales = [torch.cat([q.get_submodule(n).scale for n in LAYERS]) for q in (plain, changed)]
    if field == "scale_search":
        assert not torch.equal(*scales)
    for name in LAYERS:
        a, b = plain.get_submodule(name), changed.get_submodule(name)
        assert torch.equal(a.weight, b.weight) == (field == "bias_correction")
        assert torch.equal(a.bias, b.bias) == (field != "bias_correction")
        assert same(a, b, ["activation"])


@pytest.mark.parametrize("weights", ["minmax", "mse"])
def test_levels_of_other_quantizers_stay(net, weights):
    plain = Config.preset("dfsq-points", 3, weights=weights)
    made_up = Config.preset("dfsq-points", 3, weights=weights, compensation=True)
    a, b = (quantize(net, config) for config in (plain, made_up))
    for name in LAYERS:
        x, y = a.get_submodule(name), b.get_submodule(name)
        assert torch.equal(x.quantized_weight.levels, y.quantized_weight.levels)
        assert not torch.equal(x.codes, y.codes)


def test_a_single_image(net):
    quantized = quantize(net, Config(8, 8), IMAGES[:1])
    expected = run(net)
    assert (run(quantized) - expected).abs().max() < 0.05 * expected.abs().max()


def test_passes_in_little_memory_give_the_same(net, monkeypatch):
    at_once = quantize(net)
    passes, original = [], convert._gather

    def counted(model, names, *others):
        passes.append(list(names))
        return original(model, names, *others)

    monkeypatch.setattr(convert, "_gather", counted)
    monkeypatch.setattr(memory, "LIMIT", 1)
    one_by_one = quantize(net)
    assert passes == [[name] for name in LAYERS]
    assert same(at_once, one_by_one)
    passes.clear()
    monkeypatch.setattr(memory, "LIMIT", 4 * Statistics.bytes(net.body[0]))
    assert same(at_once, quantize(net))
    assert passes == [list(LAYERS[:2]), list(LAYERS[2:])]


#: A layer that needs no moments itself, but lies before others.
PLAIN = dict.fromkeys(("least_squares", "compensation", "bias_correction", "scale_search"), False)
PLAIN["weights"] = "minmax"
BEFORE = {"act_bits": 2}, {"act_bits": 8}, {"act_bits": 32}


def test_configurations_share_the_moments_of_the_same_inputs(net, monkeypatch):
    """Also those that a first configuration has used stay as they were."""
    passes, original = [], convert._gather

    def counted(model, names, *others):
        passes.append(list(names))
        return original(model, names, *others)

    monkeypatch.setattr(convert, "_gather", counted)
    calibration = dfsq.calibrate(net, IMAGES, Config(), progress=False)
    weights_differ = [
        Config(4, 4),
        Config(3, 4, weights="minmax"),
        Config(4, 4, least_squares=False, bias_correction=False),
        Config(4, 4, compensation=False, damping=0.1),
        Config(4, 4),
    ]
    inputs_differ = [
        Config(4, 3),
        Config(4, 3, selector="even"),
        Config(4, 4, normalization="minmax"),  # the state of a network says nothing of its bits
        Config(4, 3, normalization="minmax"),
        Config(4, 3, normalization="minmax", layers=LAYERS[:2]),
        *(Config(4, 4, normalization="minmax", overrides={LAYERS[0]: PLAIN | b}) for b in BEFORE),
    ]
    for configs, count in ((weights_differ, 1), (inputs_differ, len(inputs_differ))):
        shared = [quantize(net, config, calibration) for config in configs]
        assert len(passes) == count
        for config, one in zip(configs, shared, strict=True):
            alone = quantize(net, config)
            assert one.quantization.state_digest == alone.quantization.state_digest
        passes.clear()


def test_moments_beyond_the_memory_limit_are_not_kept_together(net, monkeypatch):
    calibration = dfsq.calibrate(net, IMAGES, Config(), progress=False)
    monkeypatch.setattr(memory, "LIMIT", 1)
    for _ in range(2):
        quantize(net, Config(), calibration)
        (names, *_), kept = calibration.moments
        assert names == list(LAYERS[-1:])
        assert list(kept) == names


@torch.no_grad()
def test_gathered_of_three_images_in_four(net):
    quantized = quantize(net, Config.preset("dfsq-points-a"))
    batches = list(IMAGES.split(1))
    (fit, check) = convert._gather(quantized, ["body.2"], batches)["body.2"]
    assert (fit.count, check.count) == (3 * 360, 2 * 360)
    x = quantized.body[:2](quantized.head(IMAGES))
    conv = quantized.body[2]
    patches = all_patches(conv, conv.activation(x[:3]))
    expected = patches @ patches.transpose(0, 2, 1)
    np.testing.assert_allclose(fit.second, expected, rtol=1e-3, atol=1e-5)
    patches = all_patches(conv, x[3:])
    np.testing.assert_allclose(check.before, patches.sum(-1), rtol=1e-3)
    (fit, check) = convert._gather(quantized, ["body.2"], batches[:1])["body.2"]
    np.testing.assert_allclose(fit.second, check.second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shown", [False, True])
def test_progress_is_shown_image_by_image_and_layer_by_layer(net, monkeypatch, shown):
    """The time of the images is none of the layers'."""
    bars, started, ended = [], {}, {}

    class Bar(convert.tqdm):
        def close(self):
            if not self.disable:
                bars.append((self.desc, self.n, self.total))
                started[self.desc], ended[self.desc] = self.start_t, time.time()
            super().close()

    for module in (convert, ranges):
        monkeypatch.setattr(module, "tqdm", Bar)
    dfsq.quantize(net, IMAGES, Config(layers=LAYERS, range_search=True), progress=shown)
    layers, images = len(LAYERS), len(IMAGES)
    expected = [
        ("taking ranges", images, images),
        ("ranging", layers, layers),
        ("quantizing", layers, layers),
        ("taking moments", images, images),
        ("compensating", layers, layers),
    ]
    assert bars == (expected if shown else [])
    for images, layers in (("taking ranges", "ranging"), ("taking moments", "compensating")):
        assert not shown or started[layers] >= ended[images]


@torch.no_grad()
def test_hooks_are_removed(net):
    assert not hooks_of(quantize(net))
    quantized = quantize(net, Config.preset("dfsq-points-a"))
    convert._gather(quantized, LAYERS, IMAGES.split(1))
    assert not hooks_of(quantized)
    with pytest.raises(RuntimeError):
        convert._gather(quantized, LAYERS, [IMAGES[:1], torch.zeros(1, 7, 4, 4)])
    assert not hooks_of(quantized)
    assert not hooks_of(net)


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_float_network_is_left_untouched(net, training, sequential):
    net.train(training)
    before = copy.deepcopy(net.state_dict())
    images = IMAGES.clone()
    quantize(net, Config(3, 3, sequential=sequential), images)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())
    assert all(m.training == training for m in net.modules())
    assert all(type(net.get_submodule(name)) is nn.Conv2d for name in LAYERS)
    assert not hooks_of(net)
    assert torch.equal(images, IMAGES)


def test_deterministic(net):
    first = quantize(net, Config(3, 3))
    torch.manual_seed(17)
    np.random.seed(17)  # noqa: NPY002
    calibration = calibrate(net, IMAGES, Config(3, 3), progress=False)
    assert same(first, quantize(net, Config(3, 3), calibration))
    assert same(first, quantize(net, Config(3, 3), calibration))


def test_sequential(net):
    config = Config(3, 3, sequential=True)
    quantized, at_once = quantize(net, config), quantize(net, Config(3, 3))
    assert same(quantized, at_once, LAYERS[:1])
    for name in LAYERS[1:]:
        assert not same(quantized, at_once, [name])
    rows = dfsq.summary(quantized)
    assert rows.non_negative.tolist() == [False, True, True]
    assert rows.layer.tolist() == list(LAYERS)
    assert same(quantized, quantize(net, config))
    # each layer's points are those of the inputs that it really gets
    partly = copy.deepcopy(net)
    partly.body[0] = quantized.body[0]
    own = Config(3, 3, layers=("body.2",))
    assert same(quantize(partly, own), quantized, ["body.2"])


def test_sequential_with_names_like_patterns():
    net = torch.nn.Sequential()
    for name in ("a[0]", "a[1]"):
        net.add_module(name, torch.nn.Conv2d(3, 3, 3))
    quantized = quantize(net, Config(3, 3, sequential=True, non_negative="*[[]0]"))
    rows = dfsq.summary(quantized)
    assert rows.layer.tolist() == ["a[0]", "a[1]"]
    assert rows.non_negative.tolist() == [True, False]


def test_sequential_keeps_what_was_stated(net):
    config = Config(3, 3, sequential=True, non_negative=("body.2",))
    assert dfsq.summary(quantize(net, config)).non_negative.tolist() == [False, True, False]


# --- what it refuses ---


class LateFirst(nn.Module):
    """Layers that run in another order than that of their names."""

    def __init__(self):
        super().__init__()
        self.last = nn.Conv2d(6, 3, 3, padding=1)
        self.first = nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, x):
        return self.last(self.first(x))


def test_sequential_goes_by_the_order_of_execution():
    torch.manual_seed(0)
    net = LateFirst().eval()
    quantized = quantize(net, Config(3, 3, sequential=True))
    assert dfsq.summary(quantized).layer.tolist() == ["first", "last"]
    # the last layer's points are those of the inputs that it really gets
    partly = copy.deepcopy(net)
    partly.first = quantized.first
    own = Config(3, 3, layers="last")
    assert same(quantize(partly, own), quantized, ["last"])
    assert not same(quantize(net, own), quantized, ["last"])
    assert not any(hooks_of(model) for model in (net, quantized))


def test_the_order_of_edsr_is_that_of_its_names():
    net = EDSR(2, blocks=2, features=8).eval()
    quantized = quantize(net, Config(3, 3, sequential=True), torch.rand(2, 3, 16, 16))
    names = list(find_layers(net, Config()))
    assert names == [f"body.{block}.body.{i}" for block in range(2) for i in (0, 2)]
    assert dfsq.summary(quantized).layer.tolist() == names


def test_a_calibration_in_other_units(net):
    calibration = calibrate(net, IMAGES, Config.preset("dfsq-points"), progress=False)
    message = (
        "calibration has error_units 'normalized', the configuration 'output'; "
        "calibrate with this configuration"
    )
    with pytest.raises(ValueError, match=message):
        quantize(net, Config(), calibration)
    calibration = calibrate(net, IMAGES, Config(), progress=False)
    with pytest.raises(ValueError, match=r"has error_units 'output', .* 'normalized'"):
        quantize(net, Config.preset("dfsq-points"), calibration)


@pytest.mark.parametrize("preset", ["dfsq-exact", "dfsq-exact-w", "dfsq-exact-a"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite(net, bad, preset):
    config = Config.preset(preset)
    calibration = calibrate(net, IMAGES, config, progress=False)
    net.body[2].weight.data[0, 0, 0, 0] = bad
    for images in (IMAGES, calibration):
        with pytest.raises(ValueError, match=r"layer 'body\.2': (the|its) weight holds NaN"):
            quantize(net, config, images)


# --- files ---


@pytest.mark.parametrize("bits", [2, 5])
@pytest.mark.parametrize(
    ("preset", "fitted"),
    [
        ("dfsq-exact", ("bias",)),
        ("dfsq-exact-w", ("bias",)),
        ("dfsq-exact-a", ("bias", "weight")),
        ("dfsq-subset", ()),
    ],
)
def test_a_file_holds_what_was_fitted(net, tmp_path, preset, fitted, bits):
    net.body[4].bias = None  # which none can be fitted to
    path = tmp_path / "net.safetensors"
    quantized = quantize(net, Config.preset(preset, bits))
    dfsq.save(quantized, path)
    with safe_open(path, framework="pt") as file:
        for name in LAYERS:
            conv = quantized.get_submodule(name)
            own = tuple(key for key in fitted if key != "bias" or conv.bias is not None)
            assert conv.fitted == own
            assert {key for key in ("bias", "weight") if f"{name}/{key}" in file.keys()} == set(own)  # noqa: SIM118
            for key in own:
                assert torch.equal(file.get_tensor(f"{name}/{key}"), getattr(conv, key))
        if fitted:
            assert not torch.equal(quantized.body[0].bias, net.body[0].bias)
    loaded = dfsq.load(path, net)
    assert same(quantized, loaded)
    assert torch.equal(run(quantized), run(loaded))
    assert all(loaded.get_submodule(n).fitted == quantized.get_submodule(n).fitted for n in LAYERS)
