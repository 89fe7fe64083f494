"""What is kept of a network's maps, and the measures of how they differ."""

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance
from torch import nn

import dfsq
from dfsq.activations import center_max
from dfsq.study import distributions
from dfsq.study.distributions import LayerMaps, gather_maps

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3)).eval()


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    return [
        factor * torch.rand(3, 12, width, generator=generator)
        for factor, width in ((1, 14), (0.5, 20), (0.2, 14), (0.8, 9))
    ]


@pytest.fixture(scope="module")
def maps(network, images):
    return gather_maps(network, images, samples=400)


def made(values, non_negative=False):
    """Maps that hold just these values."""
    values = np.sort(np.asarray(values, np.float32), axis=2)
    statistics = (f(values.astype(float), axis=2) for f in (np.min, np.max, np.mean, np.var))
    return LayerMaps(non_negative, *statistics, values)


def test_statistics_are_those_of_the_normalization(network, images, maps):
    assert [layer.non_negative for layer in maps.values()] == [True, True]  # images are, too
    signed = gather_maps(network, [x - 0.3 for x in images])
    assert [layer.non_negative for layer in signed.values()] == [False, True]
    for layers, shift in ((maps, 0), (signed, 0.3)):
        for i, image in enumerate(images):
            x = image[None] - shift
            for name, layer in layers.items():
                entering = network[: int(name)](x).detach()
                z, offset, scale = center_max(entering, layer.non_negative)
                own = [part[i] for part in layer.statistics()]
                np.testing.assert_allclose(own[0], offset.flatten(), atol=1e-7)
                np.testing.assert_allclose(own[1], scale.flatten(), rtol=1e-6)
                there = np.isclose(
                    layer.normalized()[i][..., None], z.flatten(2)[0][:, None], atol=1e-6
                )
                assert there.any(axis=2).all()  # every value kept is one of the map's


def test_shared_statistics_cover_all_that_share_them(maps):
    for layer in maps.values():
        for own in distributions.NORMALIZATIONS.values():
            offset = layer.statistics(*own)[0]
            assert offset.shape == tuple(
                n if single else 1 for n, single in zip(layer.low.shape, own, strict=True)
            )
            assert np.abs(layer.normalized(*own)).max() <= 1 + 1e-6
    some = layer.statistics(False, True, slice(1, 3))[1]
    np.testing.assert_allclose(some[0], layer.high[1:3].max(0) + 1e-8)


def test_kurtosis_of_known_distributions(network):
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(3, 300, 300, generator=generator)
    image[1] = torch.rand(300, 300, generator=generator)
    image[2] = 0.25
    kept = gather_maps(network, [image, image])["0"].kurtosis[0]
    assert kept[:2] == pytest.approx([3, 1.8], rel=0.02)
    assert np.isnan(kept[2])
    assert distributions.kurtosis(image[0].numpy()) == pytest.approx(kept[0], rel=1e-3)


def test_decomposition_adds_up():
    generator = np.random.default_rng(0)
    table = generator.normal(size=(6, 9))
    shares = distributions.variance_shares(table)
    assert sum(shares.values()) == pytest.approx(table.var())
    rows, columns = np.arange(6.0)[:, None], np.arange(9.0) ** 2
    shares = distributions.variance_shares(rows + columns)
    expected = {"channels": columns.var(), "images": rows.var(), "residual": 0}
    assert shares == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="finite"):
        distributions.variance_shares([[1, np.nan]])


def test_ranges_of_silent_channels_are_left_out():
    values = np.random.default_rng(0).random((3, 4, 50))
    values[1, 2] = 0
    shares = distributions.range_shares(made(values, True))
    assert shares["left out"] == 1
    with pytest.raises(ValueError, match="constant"):
        distributions.range_shares(made(values[:, 2:3], True))


def test_distances_are_those_of_scipy():
    generator = np.random.default_rng(0)
    values = np.sort(generator.normal(size=(3, 4, 64)) * generator.random((3, 4, 1)), axis=2)
    found = distributions.distances(values, levels=64)

    def mean(pairs):
        return np.mean([wasserstein_distance(a, b) for a, b in pairs]) / values.std()

    channels = [(v[a], v[b]) for v in values for a in range(4) for b in range(a)]
    images = [(values[a, c], values[b, c]) for c in range(4) for a in range(3) for b in range(a)]
    assert found == pytest.approx({"channels": mean(channels), "images": mean(images)})
    # units do not matter, and maps that differ in offset and scale only are one once normalized
    again = distributions.distances(7 * values + 3, levels=64)
    assert again == pytest.approx(found)
    one = made(values[:1, :1] * np.arange(1, 5)[:, None, None] + np.arange(3)[:, None])
    assert distributions.distances(one.values)["images"] > 0.1
    assert distributions.distances(one.normalized())["images"] < 1e-5
    with pytest.raises(ValueError, match="sorted"):
        distributions.distances(values[:, :, ::-1])


def test_unseen_error_finds_the_normalization_that_is_needed():
    generator = np.random.default_rng(0)
    values = generator.uniform(-1, 1, (6, 3, 500))
    by_channel = made(values + np.array([0, 5, -20])[:, None])
    by_image = made(values * np.array([1, 1, 1, 0.1, 0.1, 0.1])[:, None, None])

    def errors(maps):
        return {
            name: distributions.unseen_error(maps, 3, *own, slice(3))
            for name, own in distributions.NORMALIZATIONS.items()
        }

    found = errors(by_channel)
    assert found["per channel"] == pytest.approx(found["both (DFSQ)"], rel=0.1)
    assert min(found["none"], found["per image"]) > 10 * found["both (DFSQ)"]
    found = errors(by_image)
    assert found["per image"] == pytest.approx(found["both (DFSQ)"], rel=0.1)
    assert min(found["none"], found["per channel"]) > 5 * found["both (DFSQ)"]


def test_unseen_error_is_that_of_the_quantizer():
    values = np.random.default_rng(0).normal(size=(4, 3, 300))
    maps = made(values)
    error = distributions.unseen_error(maps, 2, True, True, slice(2))
    z = maps.normalized().astype(float)
    scale = maps.statistics()[1][..., None]
    weights = np.repeat(scale[:2, :, 0] ** 2, 300, axis=0).T
    fitted = [
        dfsq.select_channels([z[:2, c].ravel()], 2, weights=weights[c])[0].points for c in range(3)
    ]
    nearest = [np.abs(z[2:, c, :, None] - fitted[c]).min(axis=2) * scale[2:, c] for c in range(3)]
    power = np.square(maps.values[2:] - maps.values[2:].mean(2, keepdims=True)).sum()
    assert error == pytest.approx(np.square(nearest).sum() / power, rel=1e-5)
    for images in (slice(0), slice(None)):
        with pytest.raises(ValueError, match="some images"):
            distributions.unseen_error(maps, 2, True, True, images)


def test_unseen_error_of_a_shared_codebook():
    """Channels of unlike shapes want codebooks of their own; of like shapes one will do."""
    generator = np.random.default_rng(0)
    narrow = generator.normal(0, 0.02, (4, 1, 400))
    narrow[:, :, :2] = 1, -1  # the same range
    unlike = made(np.concatenate([narrow, generator.choice([-1, 0, 1], (4, 1, 400))], axis=1))
    like = made(generator.uniform(-1, 1, (4, 2, 400)) * np.array([1, 5])[:, None])

    def errors(maps):
        return [
            distributions.unseen_error(maps, 2, True, True, slice(2), shared=shared)
            for shared in (False, True)
        ]

    own, shared = errors(like)
    assert shared == pytest.approx(own, rel=0.1)
    own, shared = errors(unlike)
    assert shared > 1.3 * own
    z, scale = unlike.normalized().astype(float), unlike.statistics()[1][..., None]
    weights = np.repeat(scale[:2] ** 2, 400, axis=2).ravel()
    points = dfsq.select_channels([z[:2].ravel()], 2, weights=[weights])[0].points
    nearest = np.abs(z[2:, ..., None] - points).min(axis=3) * scale[2:]
    power = np.square(unlike.values[2:] - unlike.values[2:].mean(2, keepdims=True)).sum()
    assert shared == pytest.approx(np.square(nearest).sum() / power, rel=1e-5)


def test_too_few_images_and_layers_that_are_not_run(network, images):
    with pytest.raises(ValueError, match="two at least"):
        gather_maps(network, images[:1])
    idle = nn.Sequential(*network)
    idle.other = nn.Conv2d(3, 3, 1)
    idle.forward = network.forward
    with pytest.raises(ValueError, match="'other' was not run"):
        gather_maps(idle, images)
    assert not network[0]._forward_pre_hooks  # none is left behind
