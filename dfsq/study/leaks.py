"""No benchmark image among those trained on: images compared by thumbnail.

A thumbnail is 16x16 grey values. Two are alike as far as both their correlation and that of their
Laplacians go, that is by the smaller of the two: the former alone is high wherever a bright sky
stands over dark ground, the latter where upright edges stand in one place. A thumbnail is taken of
the whole image and of windows that leave out 0, 5 or 10% at each side, on either side of the
comparison, and in all eight orientations. So an image is recognised after resizing, recompression,
greyscale, flips, rotations by right angles, and cuts of up to a tenth at each side; a small part
of it is not.

Between BSDS500's ``train`` and ``test`` and the four benchmark sets no two images are alike by
more than 0.5; benchmark images at 0.3 to 1.3 times their size, cut by random tenths, mirrored and
saved as JPEG of quality 40 still are by 0.6. The threshold stands between.
"""

from itertools import product

import numpy as np
from PIL import Image

from ..sr.datasets import BENCHMARK_SETS, TEST_PHOTOGRAPHS, photograph, read_image
from ..sr.fetch import files_of, local

SIDE = 16
THRESHOLD = 0.55
CUTS = (0, 0.05, 0.1)

#: Windows as (left, top, right, bottom) in parts of the image; the first is the whole.
WINDOWS = tuple((x, y, 1 - r, 1 - b) for x, y, r, b in product(CUTS, repeat=4))


def thumbnails(image, windows=WINDOWS):
    """Thumbnails of windows of an image.

    Parameters
    ----------
    image : uint8 array, shape (H, W, 3)

    Returns
    -------
    float32 array, shape (windows, SIDE, SIDE)
    """
    # First to a size at which 81 windows cost little.
    small = Image.fromarray(image).convert("L").resize((128, 128), Image.Resampling.BOX)
    made = [
        small.resize((SIDE, SIDE), Image.Resampling.BOX, tuple(128 * edge for edge in window))
        for window in windows
    ]
    return np.stack([np.asarray(thumbnail, np.float32) for thumbnail in made])


def _laplacian(thumbnails):
    around = np.pad(thumbnails, ((0, 0), (1, 1), (1, 1)), "edge")
    vertical = around[:, :-2, 1:-1] + around[:, 2:, 1:-1]
    return 4 * thumbnails - vertical - around[:, 1:-1, :-2] - around[:, 1:-1, 2:]


def _normalized(thumbnails):
    """Rows of mean 0 and length 1, whose products are correlations; 0 for a flat image."""
    rows = thumbnails.reshape(len(thumbnails), -1)
    rows = rows - rows.mean(1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def _features(thumbnails):
    """What is correlated: the thumbnails and their Laplacians."""
    return _normalized(thumbnails), _normalized(_laplacian(thumbnails))


def _likeness(some, others):
    """The smaller of the two correlations, of each with each."""
    return np.minimum(*(a @ b.T for a, b in zip(some, others, strict=True)))


def _orientations(thumbnails):
    """All eight, one after the other."""
    turned = [np.rot90(thumbnails, turns, (1, 2)) for turns in range(4)]
    return np.concatenate([t for one in turned for t in (one, one[:, :, ::-1])])


class Guard:
    """Recognises the images that must not be trained on.

    Parameters
    ----------
    images : dict of str to uint8 array
        Names, and images of shape (H, W, 3).
    """

    def __init__(self, images):
        self.names = tuple(images)
        windows = [thumbnails(image) for image in images.values()]
        self._whole = _features(np.stack([w[0] for w in windows]))
        self._windows = _features(np.concatenate(windows))

    def nearest(self, image):
        """The name of the image that this one is most alike, and how much, at most 1."""
        mine = thumbnails(image)
        windows, whole = (_features(_orientations(t)) for t in (mine, mine[:1]))
        as_part = _likeness(windows, self._whole).max(0)
        as_whole = _likeness(whole, self._windows).max(0).reshape(len(self.names), -1).max(1)
        found = np.maximum(as_part, as_whole)
        best = int(found.argmax())
        return self.names[best], float(found[best])

    def match(self, image):
        """The name of the image that this one shows, or None."""
        name, likeness = self.nearest(image)
        return name if likeness > THRESHOLD else None


def benchmark_guard():
    """A guard against the embedded test photographs, and the benchmark sets that are here.

    Returns
    -------
    guard : Guard
    compared : dict of str to int
        Number of images of each set that are here; nothing is downloaded for this.
    """
    images = {f"the photograph {name}": photograph(name) for name in TEST_PHOTOGRAPHS}
    compared = {"photographs": len(images)}
    for name in BENCHMARK_SETS:
        here = {file: local(file) for file in files_of(name)}
        here = {file: read_image(path) for file, path in here.items() if path is not None}
        images |= here
        compared[name] = len(here)
    return Guard(images), compared


def not_compared(compared):
    """What of the benchmark sets was not there to be compared with.

    Parameters
    ----------
    compared : dict of str to int
        Of :func:`benchmark_guard`.

    Returns
    -------
    list of str
        Names of sets, and ``4 of the 5 images of Set5`` where some of one were there.
    """
    wanting = {name: (len(files_of(name)), compared[name]) for name in BENCHMARK_SETS}
    return [
        f"{known - here} of the {known} images of {name}" if here else name
        for name, (known, here) in wanting.items()
        if here < known
    ]
