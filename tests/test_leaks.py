"""Benchmark images are recognised whatever was done to them, and ordinary ones are not."""

import io

import numpy as np
import pytest
from PIL import Image

from dfsq.sr.datasets import CALIBRATION_PHOTOGRAPHS, TEST_PHOTOGRAPHS, photograph, read_image
from dfsq.sr.fetch import files_of, local
from dfsq.study.leaks import THRESHOLD, WINDOWS, Guard, benchmark_guard, not_compared

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def guard():
    return Guard({name: photograph(name) for name in TEST_PHOTOGRAPHS})


def resized(image, scale):
    size = tuple(max(1, round(n * scale)) for n in image.shape[1::-1])
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def cut(image, left, top, right, bottom):
    height, width = image.shape[:2]
    rows = slice(round(top * height), round((1 - bottom) * height))
    return image[rows, round(left * width) : round((1 - right) * width)]


def compressed(image, quality=40):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


CHANGES = {
    "none": lambda x: x,
    "smaller": lambda x: resized(x, 0.3),
    "larger": lambda x: resized(x, 1.4),
    "LR of x4": lambda x: resized(x, 0.25),
    "mirrored": lambda x: x[:, ::-1],
    "upside down": lambda x: x[::-1],
    "turned": lambda x: np.rot90(x),
    "turned and mirrored": lambda x: np.rot90(x, 3)[:, ::-1],
    "grey": lambda x: np.asarray(Image.fromarray(x).convert("L").convert("RGB")),
    "compressed": lambda x: compressed(x, 15),
    "darker": lambda x: (x * 0.6).astype(np.uint8),
    "cut to multiples": lambda x: x[: -(len(x) % 8) or None, :-5],
    "cut": lambda x: cut(x, 0.1, 0.03, 0.0, 0.08),
    "all": lambda x: compressed(resized(cut(np.rot90(x), 0.02, 0.09, 0.06, 0.04), 0.5))[:, ::-1],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", TEST_PHOTOGRAPHS)
def test_what_is_recognised(guard, name, change):
    assert guard.match(np.ascontiguousarray(change(photograph(name)))) == name


@pytest.mark.parametrize("name", TEST_PHOTOGRAPHS)
def test_the_image_of_which_this_is_a_part(guard, name):
    """The benchmark image is cut, and a folder holds the whole."""
    part = Guard({"part": cut(photograph(name), 0.07, 0.0, 0.1, 0.05)})
    assert part.match(photograph(name)) == "part"


def test_other_photographs_are_not_recognised(guard):
    for name in CALIBRATION_PHOTOGRAPHS:
        _, likeness = guard.nearest(photograph(name))
        assert likeness < THRESHOLD - 0.1
        assert guard.match(photograph(name)) is None


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (40, 40)])
def test_flat_and_tiny_images_show_nothing(guard, shape):
    assert guard.match(np.full((*shape, 3), 200, np.uint8)) is None


def test_brightness_and_contrast_do_not_matter():
    image = np.random.default_rng(0).integers(0, 120, (64, 48, 3), np.uint8)
    assert WINDOWS[0] == (0, 0, 1, 1)
    for other in (image + np.uint8(100), image * np.uint8(2)):
        assert Guard({"it": image}).nearest(other)[1] > 0.98


def test_the_guard_takes_what_is_here(monkeypatch, tmp_path):
    monkeypatch.setenv("DFSQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DFSQ_DATA", str(tmp_path))
    _, compared = benchmark_guard()
    assert compared == {"photographs": 3, "Set5": 0, "Set14": 0, "B100": 0, "Urban100": 0}
    (tmp_path / "Set5").mkdir()
    file = files_of("Set5")[1]
    Image.fromarray(photograph("coffee")).save(tmp_path / file)
    guard, compared = benchmark_guard()
    assert compared["Set5"] == 1
    missing = ["4 of the 5 images of Set5", "Set14", "B100", "Urban100"]
    assert not_compared(compared) == missing
    assert not_compared(compared | {"Set5": 5, "B100": 100, "Urban100": 100}) == ["Set14"]
    assert guard.match(photograph("coffee")[:, ::-1]) == file
    assert guard.match(photograph("astronaut")) == "the photograph astronaut"


# --- with the benchmark sets ---


@pytest.fixture(scope="module")
def all_sets(dfsq_data):
    guard, compared = benchmark_guard()
    assert compared == {"photographs": 3, "Set5": 5, "Set14": 14, "B100": 100, "Urban100": 100}
    return guard


@pytest.mark.slow
def test_no_training_image_is_a_benchmark_image(all_sets):
    """All of BSDS500's train and test, with room to the threshold."""
    found = {}
    for name in (*files_of("BSDS500/train"), *files_of("BSDS500/test")):
        found[name] = all_sets.nearest(read_image(local(name)))[1]
    assert len(found) == 399
    assert max(found.values()) < THRESHOLD - 0.05, max(found, key=found.get)


def test_no_calibration_photograph_is_a_benchmark_image(all_sets):
    """Among them a rocket between masts, whose edges stand where those of a tower stand."""
    for name in CALIBRATION_PHOTOGRAPHS:
        assert all_sets.nearest(photograph(name))[1] < THRESHOLD - 0.05, name


def test_a_benchmark_image_of_each_set(all_sets):
    for index, name in enumerate(("Set5", "Set14", "B100", "Urban100")):
        for file in files_of(name)[index :: 1 + len(files_of(name)) // 4]:
            image = compressed(resized(read_image(local(file)), 0.6))
            assert all_sets.match(np.rot90(image, index)[:, ::-1]) == file


def test_the_image_that_bsds500_shares_with_set5(all_sets):
    """Set5's "woman" stands in BSDS500's train at 321x481 pixels, as JPEG; here it is made so."""
    woman = files_of("Set5")[4]
    image = Image.fromarray(read_image(local(woman))).resize((321, 481), Image.Resampling.BICUBIC)
    name, likeness = all_sets.nearest(compressed(np.asarray(image), 75))
    assert name == woman
    assert likeness > 0.95
