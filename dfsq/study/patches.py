"""What is trained on: photographs that are found, checked and split, and patches cut from them.

The pixels of all images lie in one uint8 tensor, on the GPU where there is one and they fit, so
that a batch is two look-ups there.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..sr.datasets import (
    CALIBRATION_PHOTOGRAPHS,
    CALIBRATION_SETS,
    IMAGE_SUFFIXES,
    ImagePair,
    photograph,
    pixel_digest,
    read_image,
    source_files,
)
from ..sr.fetch import files_of, registry
from ..sr.imaging import crop_to_multiple, imresize
from .leaks import benchmark_guard

#: At most so many images are held out, and at most a fifth of all.
HELD_OUT = 50


@dataclass(frozen=True)
class TrainingImages:
    """Images to train on, images held out for validation, and what is to be told of them.

    Attributes
    ----------
    train, held_out : list of ImagePair
    facts : dict
        ``source``, ``licence``, the numbers of ``images`` trained on, ``held_out`` and
        ``too_small``, those ``left_out`` as benchmark images (name to what it shows), the sets
        ``compared`` with and how many of their images were here, and a ``digest`` of the pixels
        trained on.
    """

    train: list
    held_out: list
    facts: dict


def _found(source):
    """Names, ways to read the images, and the licence, of a source of photographs."""
    if source == "BSDS500":
        files = [file for name in CALIBRATION_SETS for file in files_of(name)]
        paths = [path for name in CALIBRATION_SETS for path in source_files(name)]
        licences = registry().loc[files, "licence"].unique()
        return dict(zip(files, paths, strict=True)), read_image, ", ".join(licences)
    if source == "photographs":
        names = {name: name for name in CALIBRATION_PHOTOGRAPHS}
        return names, photograph, "as they come with scikit-image and scikit-learn"
    folder = Path(source)
    if not folder.is_dir():
        raise ValueError(
            f"there is no folder {str(source)!r}; give BSDS500, photographs (embedded), or a folder"
        )
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(f"{folder} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    named = {path.relative_to(folder).as_posix(): path for path in paths}
    return named, read_image, "not known to this project: a folder of the user's"


def training_images(source, scale, patch, progress=True):
    """Read photographs, leave out what must not be trained on, and split them.

    Images that show one of a benchmark set are left out, see :mod:`dfsq.study.leaks`, and those
    of which no patch can be cut. Of the rest, in order of their paths, the last 50 are held out,
    or the last fifth if that is less: the last, since neighbours in a folder may show one scene.

    Parameters
    ----------
    source : str or path
        ``"BSDS500"``, its ``train`` and ``test`` (its ``val`` is B100); ``"photographs"``, the
        embedded ones to calibrate on; or a folder, which is searched with all below it.
    scale : int
    patch : int
        Side of a patch in LR pixels.

    Returns
    -------
    TrainingImages

    Raises
    ------
    ValueError
        If there is no such source, an image cannot be read, or fewer than two are left.
    FileNotFoundError
        If BSDS500 is neither here nor can be downloaded.
    """
    found, read, licence = _found(source)
    guard, compared = benchmark_guard()

    def pair(name):
        image = read(found[name])
        if min(image.shape[:2]) < patch * scale:
            return name, "too small"
        shown = guard.match(image)
        if shown is not None:
            return name, shown
        hr = crop_to_multiple(image, scale)
        return name, ImagePair(name, imresize(hr, 1 / scale), hr)

    with ThreadPoolExecutor() as pool:
        read_all = tqdm(
            pool.map(pair, found), "reading", len(found), unit="image", disable=not progress
        )
        results = dict(read_all)
    pairs = [result for result in results.values() if isinstance(result, ImagePair)]
    too_small = sum(result == "too small" for result in results.values())
    left_out = {
        name: shown
        for name, shown in results.items()
        if isinstance(shown, str) and shown != "too small"
    }
    if len(pairs) < 2:
        raise ValueError(
            f"{source} has {len(pairs)} of {len(found)} images to train on, and at least 2 are "
            f"needed, one of them to validate on: {too_small} smaller than "
            f"{patch * scale}x{patch * scale} pixels, {len(left_out)} showing a benchmark image"
        )
    held_out = max(1, min(HELD_OUT, len(pairs) // 5))
    train, held_out = pairs[:-held_out], pairs[-held_out:]
    facts = {
        "source": Path(source).resolve().name,
        "licence": licence,
        "images": len(train),
        "held_out": len(held_out),
        "too_small": too_small,
        "left_out": left_out,
        "compared": compared,
        "digest": pixel_digest(train),
    }
    return TrainingImages(train, held_out, facts)


# A patch of side s is turned by stepping through its image another way. By quarter turns: where
# its first pixel lies, in parts of s - 1, and the steps (y, x) to the next one below and beside.
_FIRST = np.array([(0, 0), (0, 1), (1, 1), (1, 0)])
_DOWN = np.array([(1, 0), (0, -1), (-1, 0), (0, 1)])
_RIGHT = np.array([(0, 1), (1, 0), (0, -1), (-1, 0)])


class Patches:
    """Random patches of images, flipped and rotated; a batch is a function of seed and step.

    Parameters
    ----------
    pairs : list of ImagePair
        Emptied, so that the pixels are in memory only once.
    scale : int
    device : str
        Where batches are wanted. The pixels are kept there too, unless they would take more than
        half of what is free on a GPU.
    """

    def __init__(self, pairs, scale, device="cpu"):
        self.scale, self.device = scale, device
        self.shapes = [pair.lr.shape[:2] for pair in pairs]
        sizes = np.array([height * width for height, width in self.shapes])
        self._starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        total = 3 * int(sizes.sum()) * (1 + scale**2)  # bytes
        fits = device == "cpu" or total < torch.cuda.mem_get_info()[0] / 2
        options = {"dtype": torch.uint8, "device": device if fits else "cpu"}
        self._lr = torch.empty(int(sizes.sum()), 3, **options)
        self._hr = torch.empty(int(sizes.sum()) * scale**2, 3, **options)
        for start, size in zip(self._starts, sizes, strict=True):
            pair = pairs.pop(0)
            for pixels, image, factor in ((self._lr, pair.lr, 1), (self._hr, pair.hr, scale**2)):
                flat = torch.from_numpy(np.array(image).reshape(-1, 3))
                pixels[start * factor : (start + size) * factor] = flat

    def __len__(self):
        return len(self.shapes)

    def batch(self, recipe, step):
        """The batch of one step.

        Returns
        -------
        lr, hr : float32 tensors in 0..1, (batch, 3, patch, patch) and scale times that
            In channels-last order.
        """
        generator = np.random.default_rng([recipe.seed, step])
        drawn = []
        for _ in range(recipe.batch):
            number = generator.integers(len(self))
            y, x = (generator.integers(n - recipe.patch + 1) for n in self.shapes[number])
            drawn.append((number, y, x, generator.integers(4), generator.integers(2)))
        drawn = np.array(drawn)
        return self._cut(self._lr, drawn, 1, recipe.patch), self._cut(
            self._hr, drawn, self.scale, recipe.patch
        )

    def _cut(self, pixels, drawn, scale, patch):
        """Patches out of the pixels of all images, whose sides are `scale` times those of LR."""
        number, *corner, turns, mirrored = drawn.T
        side = patch * scale
        first, down, right = _FIRST[turns] * (side - 1), _DOWN[turns], _RIGHT[turns].copy()
        first = first + right * (side - 1) * mirrored[:, None]
        right[mirrored == 1] *= -1
        first = first + np.stack(corner, 1) * scale
        width = np.array([self.shapes[n][1] for n in number]) * scale
        line = np.stack([width, np.ones_like(width)], 1)  # how far a step in y, in x is
        first = self._starts[number] * scale**2 + (first * line).sum(1)
        steps = np.stack([first, (down * line).sum(1), (right * line).sum(1)])
        first, down, right = torch.from_numpy(steps).to(pixels.device)[:, :, None, None]
        along = torch.arange(side, device=pixels.device)
        index = first + down * along[:, None] + right * along
        return pixels[index].to(self.device).permute(0, 3, 1, 2).float() / 255
