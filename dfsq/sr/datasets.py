"""Photographs by name: those that come with the dependencies, or a folder of the user's."""

import hashlib
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .fetch import fetch, files_of
from .imaging import crop_to_multiple, imresize

IMAGE_SUFFIXES = (".png", ".webp", ".bmp", ".jpg", ".jpeg", ".tif", ".tiff")

#: Photographs inside the wheels of scikit-image and scikit-learn. Nothing is tuned on the tests.
CALIBRATION_PHOTOGRAPHS = ("china", "coffee", "flower", "rocket")
TEST_PHOTOGRAPHS = ("astronaut", "motorcycle", "chelsea")

#: The standard benchmark sets, and the sets to calibrate and to choose on; see `dfsq fetch`.
BENCHMARK_SETS = ("Set5", "Set14", "B100", "Urban100")
CALIBRATION_SETS = ("BSDS500/train", "BSDS500/test")

#: Side of the window of SSIM, which lies inside an image less `scale` pixels at each edge.
WINDOW = 11

#: Side of a calibration crop in HR pixels.
CROP = 192


@dataclass(frozen=True)
class ImagePair:
    """A benchmark image: its name, and uint8 arrays of shape (H, W, 3)."""

    name: str
    lr: np.ndarray
    hr: np.ndarray


def read_image(path):
    """Read an image file as RGB, upright.

    Greyscale is repeated over the three channels; transparency is dropped.

    Returns
    -------
    uint8 array, shape (H, W, 3)

    Raises
    ------
    ValueError
        If the file is not an image that can be decoded whole, or has more than 8 bits a channel.
    FileNotFoundError
        If there is no such file.
    """
    return np.asarray(ImageOps.exif_transpose(open_image(path)).convert("RGB"))


def open_image(path):
    """Decode an image file whole, in its own mode; errors as for :func:`read_image`."""
    try:
        with Image.open(path) as image:
            # of colours or transparency with 16 bits Pillow keeps the upper 8, and the mode is RGB
            is_deep = re.search(";16[BLN]", str(image.tile))
            image.load()
    except FileNotFoundError:
        raise FileNotFoundError(f"no such image: {path}") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is too large: {error}") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        reason = "it is damaged or cut short" if "truncated" in str(error) else "no known format"
        reason = getattr(error, "strerror", None) or reason  # a folder, or no right to read it
        raise ValueError(f"{path} is not a readable image ({reason})") from None
    if is_deep or image.mode.startswith(("I", "F")):  # Pillow would clip the latter to 255
        raise ValueError(f"{path} has more than 8 bits a channel; save it with 8 bits first")
    return image


def image_files(folder):
    """The image files of a folder, sorted by name."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"{folder} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return files


def source_files(source, limit=None):
    """The HR images of a registered set, or of a folder.

    Parameters
    ----------
    source : str or path
        A set of ``BENCHMARK_SETS`` or ``CALIBRATION_SETS``, fetched if need be; or a
        folder, flat or with the images in ``HR/``.
    limit : int, optional
        The first so many only; no others are fetched.

    Returns
    -------
    list of paths
    """
    if source in BENCHMARK_SETS + CALIBRATION_SETS:
        return [fetch(file) for file in files_of(source)[:limit]]
    folder = image_folder(source)
    if folder is None:
        known = ", ".join(("photographs", *BENCHMARK_SETS, *CALIBRATION_SETS))
        raise ValueError(f"unknown data set {str(source)!r}; there are {known}, or give a folder")
    return image_files(folder)[:limit]


def image_folder(source):
    """Where the images of a user's folder lie.

    Parameters
    ----------
    source : str or path
        As for :func:`source_files`.

    Returns
    -------
    Path or None
        The folder, or ``HR/`` in it; None for a registered set, the photographs, or no folder.
    """
    if source in ("photographs", *BENCHMARK_SETS, *CALIBRATION_SETS):
        return None
    folder = Path(source)
    inner = folder / "HR"
    return inner if inner.is_dir() else folder if folder.is_dir() else None


def photograph(name):
    """One of the embedded photographs.

    Parameters
    ----------
    name : str
        Of ``CALIBRATION_PHOTOGRAPHS`` or ``TEST_PHOTOGRAPHS``.

    Returns
    -------
    uint8 array, shape (H, W, 3)

    Examples
    --------
    >>> photograph("motorcycle").shape
    (500, 741, 3)
    """
    if name in ("china", "flower"):
        from sklearn.datasets import load_sample_image

        return load_sample_image(f"{name}.jpg")
    import skimage.data

    if name == "motorcycle":
        return skimage.data.stereo_motorcycle()[0]
    if name in CALIBRATION_PHOTOGRAPHS + TEST_PHOTOGRAPHS:
        return getattr(skimage.data, name)()
    known = ", ".join(CALIBRATION_PHOTOGRAPHS + TEST_PHOTOGRAPHS)
    raise ValueError(f"unknown photograph {name!r}; there are {known}")


def load_dataset(name="photographs", scale=2, limit=None):
    """HR images with their bicubic LR images.

    Parameters
    ----------
    name : str or path
        ``"photographs"``, the embedded test photographs; a set of ``BENCHMARK_SETS``, see
        :mod:`dfsq.sr.fetch`; or a folder of images.
    scale : int
    limit : int, optional
        Take the first so many only.

    Returns
    -------
    list of ImagePair
        HR cropped to a multiple of the scale; LR as by MATLAB's ``imresize``.

    Raises
    ------
    ValueError
        For an unknown set, a file that is no image, an image too small to be measured, and two
        of one name.

    Examples
    --------
    >>> (pair,) = load_dataset("photographs", scale=2, limit=1)
    >>> pair.name, pair.hr.shape, pair.lr.shape
    ('astronaut', (512, 512, 3), (256, 256, 3))
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit!r}")
    if scale < 1:
        raise ValueError(f"scale must be at least 1, not {scale!r}")
    if name == "photographs":
        images = [(n, photograph(n)) for n in TEST_PHOTOGRAPHS[:limit]]
    else:
        images = [(p.stem, read_image(p)) for p in source_files(name, limit)]
    check_images(images, scale)
    pairs = []
    for image_name, image in images:
        hr = crop_to_multiple(image, scale)
        pairs.append(ImagePair(image_name, imresize(hr, 1 / scale), hr))
    return pairs


def check_images(images, scale):
    """Refuse HR images that are too small to be measured, and two of one name.

    Parameters
    ----------
    images : list of (str, array of shape (H, W, 3))
        Names and images, cropped to a multiple of the scale or not.
    scale : int

    Raises
    ------
    ValueError
        Names the image.
    """
    least = -(-(2 * scale + WINDOW) // scale) * scale  # a multiple of the scale
    seen = set()
    for name, image in images:
        height, width = image.shape[:2]
        if min(height, width) < least:
            raise ValueError(
                f"{name} has {width}x{height} pixels; {least}x{least} at least are needed to "
                f"measure at x{scale}; leave it out"
            )
        if name in seen:
            raise ValueError(f"two images are called {name}; rename one")
        seen.add(name)


def calibration_crops(source="photographs", scale=2, count=32, size=None, seed=0):
    """Random LR crops to calibrate on, flipped and rotated.

    Parameters
    ----------
    source : str or path
        ``"photographs"``, the embedded calibration photographs (none of them a test photograph),
        a set of ``CALIBRATION_SETS``, or a folder of HR images. Images smaller than a crop are
        left out, with a warning.
    scale : int
    count : int
        Number of crops.
    size : int, optional
        Side of a crop in LR pixels; 192 HR pixels by default, as in the paper.
    seed : int

    Returns
    -------
    list of uint8 arrays, shape (size, size, 3)

    Examples
    --------
    >>> crops = calibration_crops(scale=2, count=4)
    >>> len(crops), crops[0].shape, crops[0].dtype
    (4, (96, 96, 3), dtype('uint8'))
    """
    if not 1 <= scale <= CROP:
        raise ValueError(f"scale must be 1 to {CROP}, not {scale!r}")
    size = CROP // scale if size is None else size
    if count < 1 or size < 1:
        raise ValueError(f"count and size must be at least 1, not {count!r} and {size!r}")
    if source == "photographs":
        images = [photograph(name) for name in CALIBRATION_PHOTOGRAPHS]
    else:
        images = [read_image(path) for path in source_files(source)]
    large = [image for image in images if min(image.shape[:2]) // scale >= size]
    if not large:
        raise ValueError(f"no image of {source} has an LR image of {size}x{size} pixels")
    lrs = [imresize(crop_to_multiple(image, scale), 1 / scale) for image in large]
    if len(lrs) < len(images):
        warnings.warn(
            f"{len(images) - len(lrs)} of {len(images)} images of {source} are smaller than a crop "
            f"of {size * scale}x{size * scale} pixels and are left out",
            stacklevel=2,
        )
    generator, crops = np.random.default_rng(seed), []
    for _ in range(count):
        lr = lrs[generator.integers(len(lrs))]
        y, x = (generator.integers(n - size + 1) for n in lr.shape[:2])
        crop = np.rot90(lr[y : y + size, x : x + size], generator.integers(4))
        crops.append(np.ascontiguousarray(crop[:, ::-1] if generator.integers(2) else crop))
    return crops


def pixel_digest(pairs):
    """SHA-256 of the decoded pixels of a data set, LR and HR."""
    sha = hashlib.sha256()
    for pair in pairs:
        for image in (pair.lr, pair.hr):
            sha.update(str(image.shape).encode() + np.ascontiguousarray(image).tobytes())
    return sha.hexdigest()
