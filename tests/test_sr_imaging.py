"""MATLAB's bicubic to the last pixel; PSNR and SSIM against computations by hand."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from dfsq.sr.datasets import image_files
from dfsq.sr.imaging import (
    crop_to_multiple,
    imresize,
    luma,
    psnr_y,
    ssim_y,
    to_image,
    to_tensor,
)
from dfsq.sr.upscaling import Bicubic


def random_image(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


# --- bicubic ---


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("name", ["Set5", "Set14"])
def test_matlabs_own_images(dfsq_data, name, scale):
    """Both folders are in the order of the images' names; some are greyscale."""
    results = image_files(dfsq_data / "matlab_lr" / name / f"x{scale}")
    sources = image_files(dfsq_data / name)
    assert len(results) == len(sources) == {"Set5": 5, "Set14": 14}[name]
    for source, result in zip(sources, results, strict=True):
        with Image.open(source) as image, Image.open(result) as matlab:
            assert image.mode == matlab.mode
            ours = imresize(crop_to_multiple(np.asarray(image), scale), 1 / scale)
            assert ours.shape == np.shape(matlab), source.name
            assert np.count_nonzero(ours != np.asarray(matlab)) == 0, source.name


@pytest.mark.parametrize(
    ("scale", "digest"),
    [
        (1 / 2, "f76d79d41fca5f18"),
        (1 / 3, "8d5f3ec492b0f3b1"),
        (1 / 4, "193ce9419d38d8ab"),
        (2, "6b0827aa25b16303"),
        (3, "ca9d047c5a19de98"),
    ],
)
def test_result_stays_what_was_compared_with_matlab(scale, digest):
    """For machines without MATLAB's images: a digest of the result on random pixels."""
    result = imresize(random_image(36, 48, 3), scale)
    assert hashlib.sha256(result.tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize(
    ("shape", "scale", "expected"),
    [
        ((10, 14, 3), 1 / 2, (5, 7, 3)),
        ((11, 13), 1 / 2, (6, 7)),  # MATLAB rounds up
        ((9, 12, 3), 1 / 3, (3, 4, 3)),
        ((10, 14, 4), 2, (20, 28, 4)),
        ((5, 6), 1.5, (8, 9)),
        ((7, 100), 0.07, (1, 7)),
    ],
)
def test_shapes(shape, scale, expected):
    assert imresize(random_image(*shape), scale).shape == expected


def test_identity():
    image = random_image(13, 17, 3)
    assert np.array_equal(imresize(image, 1), image)


@pytest.mark.parametrize("scale", [1, 2, 4, 1 / 2, 1 / 4])
def test_one_pixel(scale):
    image = np.full((1, 1, 3), 77, np.uint8)
    result = imresize(image, scale)
    assert result.shape == (max(1, scale), max(1, scale), 3)
    assert (result == 77).all()


@pytest.mark.parametrize("scale", [2, 1 / 2, 1 / 3])
@pytest.mark.parametrize("value", [0, 128, 255])
def test_constant_image(scale, value):
    assert (imresize(np.full((12, 12), value, np.uint8), scale) == value).all()


def test_channels_flips_and_rotations_do_not_meet():
    image = random_image(12, 20, 3)
    half = imresize(image, 1 / 2)
    for c in range(3):
        assert np.array_equal(half[..., c], imresize(image[..., c], 1 / 2))
    assert np.array_equal(imresize(image[::-1], 1 / 2), half[::-1])
    assert np.array_equal(imresize(image[:, ::-1], 1 / 2), half[:, ::-1])


def test_rounded_between_the_passes():
    """A row and a column of weights, computed by hand with a rounding after the first."""
    image = random_image(2, 2)

    def double(a, b):
        """Two pixels to four: u = 0.75 .. 2.25, the pixels mirrored at the border."""
        lines = []
        for u in (0.75, 1.25, 1.75, 2.25):
            x = np.abs(u - np.arange(-1, 5))
            near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
            kernel = np.where(x <= 1, near, np.where(x <= 2, far, 0))
            line = sum(k * v for k, v in zip(kernel, (b, a, a, b, b, a), strict=True))
            lines.append(np.floor(np.clip(line, 0, 255) + 0.5))
        return np.array(lines)

    rows = double(image[0].astype(float), image[1].astype(float))
    expected = double(rows[:, 0], rows[:, 1]).T
    assert np.array_equal(imresize(image, 2), expected)


@pytest.mark.parametrize(
    ("image", "scale", "message"),
    [
        (np.zeros((4, 4)), 2, r"must be uint8 .* not float64 of shape \(4, 4\)"),
        (np.zeros(4, np.uint8), 2, r"of shape \(4,\)"),
        (np.zeros((4, 4), np.uint8), 0, "scale must be positive, not 0"),
        (np.zeros((4, 4), np.uint8), float("nan"), "scale must be positive, not nan"),
    ],
)
def test_bad_input(image, scale, message):
    with pytest.raises(ValueError, match=message):
        imresize(image, scale)


def test_crop_to_multiple():
    image = random_image(11, 14, 3)
    assert np.array_equal(crop_to_multiple(image, 4), image[:8, :12])
    assert crop_to_multiple(image, 1).shape == image.shape
    with pytest.raises(ValueError, match="14x3 pixels is too small for x4"):
        crop_to_multiple(image[:3], 4)


# --- PSNR and SSIM ---


def test_luma_is_bt601_in_studio_swing():
    corners = np.array([[[0, 0, 0], [255, 255, 255]], [[255, 0, 0], [0, 0, 255]]], np.uint8)
    expected = [[16, 235], [81.481, 40.966]]
    np.testing.assert_allclose(luma(corners), expected, rtol=0, atol=1e-12)
    assert luma(np.full((1, 1, 3), 100)).item() == pytest.approx(
        16 + 219 * 100 / 255
    )  # no rounding


def test_psnr_by_hand():
    a = np.full((12, 12, 3), 100, np.uint8)
    b = a + np.uint8(10)
    expected = 20 * np.log10(255 / (10 * 219 / 255))
    assert psnr_y(a, b, 2) == pytest.approx(expected, abs=1e-10)
    one = a.copy()
    one[5, 5] = 0, 100, 100  # one pixel of 64, in red
    error = (65.481 * 100 / 255) ** 2 / 64
    assert psnr_y(one, a, 2) == pytest.approx(10 * np.log10(255**2 / error), abs=1e-10)
    assert psnr_y(a, a, 2) == float("inf")


def test_border_is_shaved_off_each_side():
    a = random_image(12, 14, 3)
    b = a.copy()
    b[:2], b[-2:], b[:, :2], b[:, -2:] = 0, 0, 0, 0
    assert psnr_y(a, b, 2) == float("inf")
    assert psnr_y(a, b, 1) < 20
    assert psnr_y(a, b, 0) < psnr_y(a, b, 1)


def ssim_by_hand(a, b):
    """Wang et al. 2004: Gaussian window of 11x11 pixels, sigma 1.5, wherever it fits in whole."""
    g = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(g, g) / g.sum() ** 2
    x, y = (np.lib.stride_tricks.sliding_window_view(v, (11, 11)) for v in (a, b))

    def mean(v):
        return (v * window).sum((-1, -2))

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    result = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return result.mean()


def test_ssim_by_hand():
    a = imresize(random_image(8, 9, 3), 4)
    b = np.clip(a + np.random.default_rng(1).normal(0, 8, a.shape), 0, 255).astype(np.uint8)
    expected = ssim_by_hand(luma(a)[4:-4, 4:-4], luma(b)[4:-4, 4:-4])
    assert ssim_y(a, b, 4) == pytest.approx(expected, abs=1e-7)
    assert 0.5 < expected < 0.99
    assert ssim_y(a, a, 4) == pytest.approx(1)


@pytest.mark.parametrize("measure", [psnr_y, ssim_y])
def test_images_that_cannot_be_compared(measure):
    a = random_image(12, 12, 3)
    for other, border, message in (
        (a[:-1], 0, r"one shape \(H, W, 3\), not \(12, 12, 3\) and \(11, 12, 3\)"),
        (a, 6, "border must be at least 0 and leave pixels"),
        (a, -1, "border must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            measure(a, other, border)
    with pytest.raises(ValueError, match=r"one shape \(H, W, 3\)"):
        measure(a[..., 0], a[..., 0], 0)
    for pair in ((a / 255, a / 255), (a, a.astype(float)), (a.astype(np.uint16), a)):
        with pytest.raises(ValueError, match="both images must be uint8, not"):
            measure(*pair, 0)


def test_ssim_needs_eleven_pixels():
    a = random_image(14, 15, 3)
    with pytest.raises(ValueError, match=r"needs 11 pixels .* not \(10, 11\)"):
        ssim_y(a, a, 2)
    assert ssim_y(a, a, 1) == pytest.approx(1)


# --- tensors ---


def test_every_pixel_value_survives_the_tensor():
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    tensor = to_tensor(image)
    assert tensor.shape == (1, 3, 16, 16)
    assert (tensor.min(), tensor.max()) == (0, 1)
    assert np.array_equal(to_image(tensor), image)
    read_only = image.copy()
    read_only.setflags(write=False)
    assert torch.equal(to_tensor(read_only[:, ::-1]), tensor.flip(3))


def test_output_is_clipped_and_rounded():
    tensor = torch.tensor([-0.1, 1.2, 0.5 / 255, 0.499 / 255, 254.6 / 255, 1.0]).view(1, 1, 2, 3)
    expected = [[0, 255, 1], [0, 255, 255]]
    assert to_image(tensor.expand(1, 3, 2, 3))[..., 0].tolist() == expected


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_image(value):
    with pytest.raises(ValueError, match=r"one image has shape .* not \(2, 3, 4, 4\)"):
        to_image(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="the image holds NaN or infinity"):
        to_image(torch.full((1, 3, 4, 4), value))


@pytest.mark.parametrize("image", [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8)])
def test_what_is_no_image_to_upscale(image):
    with pytest.raises(
        ValueError, match=r"must be uint8 of shape \(H, W, 3\), not (float64|uint8)"
    ):
        to_tensor(image)


def test_bicubic_of_a_batch():
    x = torch.rand(3, 3, 8, 6)
    y = Bicubic(2)(x)
    assert y.shape == (3, 3, 16, 12)
    assert torch.equal(y[2:], Bicubic(2)(x[2:]))
