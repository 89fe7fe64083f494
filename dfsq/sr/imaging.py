"""Images as the super-resolution benchmarks treat them: MATLAB's bicubic, luma, PSNR, SSIM.

Images are NumPy arrays of shape (H, W, C) or (H, W), ``uint8`` in 0..255 unless said
otherwise.
"""

from math import ceil

import numpy as np


def _cubic(x):
    """Keys' cubic convolution kernel with a = -0.5, the one of MATLAB's ``imresize``."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))


def _contributions(in_length, out_length, scale):
    """Indices and weights, both (out_length, taps), of one output line's source pixels."""
    shrink = min(scale, 1.0)  # the kernel is widened when shrinking (antialiasing)
    width = 4.0 / shrink
    u = np.arange(1, out_length + 1) / scale + 0.5 * (1 - 1 / scale)
    left = np.floor(u - width / 2)
    index = left[:, None] + np.arange(ceil(width) + 2)
    weight = shrink * _cubic(shrink * (u[:, None] - index))
    weight /= weight.sum(axis=1, keepdims=True)
    mirror = np.concatenate([np.arange(in_length), np.arange(in_length)[::-1]])
    index = mirror[(index.astype(int) - 1) % (2 * in_length)]
    used = np.any(weight != 0, axis=0)
    return index[:, used], weight[:, used]


def _resize_rows(image, out_length, scale):
    index, weight = _contributions(image.shape[0], out_length, scale)
    result = np.zeros((out_length, *image.shape[1:]))
    for tap in range(index.shape[1]):
        factor = weight[:, tap].reshape(-1, *[1] * (image.ndim - 1))
        result += factor * image[index[:, tap]]
    return np.floor(np.clip(result, 0, 255) + 0.5).astype(np.uint8)


def imresize(image, scale):
    """Resize as MATLAB's ``imresize(image, scale, 'bicubic')`` does, bit for bit.

    Rows are resized first, then columns, and the result is rounded to ``uint8`` *between*
    the two passes, as MATLAB does for ``uint8`` input. When shrinking, the kernel is widened
    against aliasing.

    Parameters
    ----------
    image : uint8 array, shape (H, W) or (H, W, C)
    scale : float
        Output over input size; ``1/2`` makes the LR image of the x2 benchmarks.

    Returns
    -------
    uint8 array, shape (ceil(H*scale), ceil(W*scale)[, C])

    Examples
    --------
    >>> imresize(np.arange(0, 256, 16, dtype=np.uint8).reshape(4, 4), 1 / 2).tolist()
    [[37, 71], [170, 204]]
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise ValueError(
            "image must be uint8 of shape (H, W) or (H, W, C), "
            f"not {image.dtype} of shape {image.shape}"
        )
    if not scale > 0:
        raise ValueError(f"scale must be positive, not {scale!r}")
    height, width = (ceil(round(n * scale, 9)) for n in image.shape[:2])
    rows = _resize_rows(image, height, scale)
    return np.ascontiguousarray(
        np.swapaxes(_resize_rows(np.swapaxes(rows, 0, 1), width, scale), 0, 1)
    )


def crop_to_multiple(image, scale):
    """Crop an image at the bottom and right to a multiple of `scale` in both directions."""
    height, width = (n - n % scale for n in image.shape[:2])
    if not height or not width:
        raise ValueError(
            f"an image of {image.shape[1]}x{image.shape[0]} pixels is too small for x{scale}"
        )
    return image[:height, :width]


def luma(image):
    """Y of BT.601 in studio swing, 16..235, not rounded.

    Parameters
    ----------
    image : array, shape (H, W, 3), 0..255

    Returns
    -------
    float64 array, shape (H, W)
        ``16 + (65.481 R + 128.553 G + 24.966 B) / 255``

    Examples
    --------
    >>> luma(np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8)).round(1).tolist()
    [[16.0, 235.0]]
    """
    return 16 + np.asarray(image, dtype=np.float64) @ (np.array([65.481, 128.553, 24.966]) / 255)


def _luma_pair(result, target, border):
    result, target = np.asarray(result), np.asarray(target)
    if result.shape != target.shape or result.ndim != 3 or result.shape[2] != 3:
        raise ValueError(
            f"both images must have one shape (H, W, 3), not {result.shape} and {target.shape}"
        )
    if result.dtype != np.uint8 or target.dtype != np.uint8:
        raise ValueError(f"both images must be uint8, not {result.dtype} and {target.dtype}")
    if border < 0 or 2 * border >= min(result.shape[:2]):
        raise ValueError(
            f"border must be at least 0 and leave pixels of {result.shape[:2]}, not {border!r}"
        )
    inner = slice(border, -border or None)
    return luma(result)[inner, inner], luma(target)[inner, inner]


def psnr_y(result, target, border):
    """Peak signal-to-noise ratio of the luma, in dB.

    Parameters
    ----------
    result, target : uint8 array, shape (H, W, 3)
    border : int
        Pixels shaved off each side; the protocol takes the scale.

    Raises
    ------
    ValueError
        For images of other types, of two shapes, or with no pixel within the border.

    Examples
    --------
    >>> grey = np.full((20, 20, 3), 100, np.uint8)
    >>> round(psnr_y(grey, grey + np.uint8(10), border=2), 2)
    29.45
    """
    a, b = _luma_pair(result, target, border)
    error = np.mean((a - b) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def ssim_y(result, target, border):
    """Structural similarity of the luma (Wang et al. 2004), as MATLAB's reference code.

    Gaussian window of 11x11 pixels with sigma 1.5, averaged where the whole window lies inside
    the image. Parameters as for :func:`psnr_y`; at least 11 pixels must remain in each
    direction.

    Examples
    --------
    >>> noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    >>> ssim_y(noise, noise, border=2), round(ssim_y(noise, 255 - noise, border=2), 2)
    (1.0, -0.96)
    """
    from skimage.metrics import structural_similarity

    a, b = _luma_pair(result, target, border)
    if min(a.shape) < 11:
        raise ValueError(f"SSIM needs 11 pixels in each direction after the border, not {a.shape}")
    return float(
        structural_similarity(
            a,
            b,
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


def to_tensor(image):
    """uint8 (H, W, 3) in 0..255 to a float32 tensor (1, 3, H, W) in 0..1."""
    import torch

    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3:
        raise ValueError(
            f"an image must be uint8 of shape (H, W, 3), not {image.dtype} of shape {image.shape}"
        )
    return torch.tensor(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255


def to_image(tensor):
    """Tensor (1, 3, H, W) in 0..1, finite, clipped and rounded to uint8 (H, W, 3)."""
    if tensor.ndim != 4 or len(tensor) != 1:
        raise ValueError(f"one image has shape (1, 3, H, W), not {tuple(tensor.shape)}")
    if not tensor.isfinite().all():
        raise ValueError("the image holds NaN or infinity")
    array = tensor.detach()[0].permute(1, 2, 0).double().clamp(0, 1).cpu().numpy()
    return np.floor(array * 255 + 0.5).astype(np.uint8)
