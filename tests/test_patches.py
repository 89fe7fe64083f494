"""What is trained on and what is held out, and batches as a function of seed and step."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dfsq.sr.datasets import (
    BENCHMARK_SETS,
    CALIBRATION_PHOTOGRAPHS,
    ImagePair,
    photograph,
    read_image,
)
from dfsq.sr.fetch import files_of, local
from dfsq.sr.imaging import imresize, to_image, to_tensor
from dfsq.study.patches import Patches, training_images
from dfsq.study.recipes import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = Recipe(patch=6, batch=2)


@pytest.fixture(autouse=True)
def _no_benchmark_sets(monkeypatch, tmp_path):
    """The embedded test photographs alone are compared with: the sets take long to read."""
    monkeypatch.setenv("DFSQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DFSQ_DATA", raising=False)


def random_image(seed, height=20, width=26):
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    return imresize(small, 4)[:height, :width]


def pairs(count=4, scale=2):
    images = [random_image(i, 20 + 2 * i, 26) for i in range(count)]
    crops = [image[: len(image) // scale * scale, : 26 // scale * scale] for image in images]
    return [ImagePair(str(i), imresize(hr, 1 / scale), hr) for i, hr in enumerate(crops)]


@pytest.fixture
def folder(tmp_path):
    """A function to write images into folders; the value is the seed or the image."""

    def write(files):
        for name, image in files.items():
            path = tmp_path / "photos" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = random_image(image) if isinstance(image, int) else image
            Image.fromarray(pixels).save(path)
        return tmp_path / "photos"

    return write


# --- images ---


def test_a_folder_with_all_below_it(folder):
    files = ["z.png", "a/2.bmp", "a/1.PNG", "a/b/c/3.webp", "b.tif"]
    source = folder({name: i for i, name in enumerate(files)})
    (source / "notes.txt").write_text("no image")
    found = training_images(source, 2, 6, progress=False)
    names = [p.name for p in found.train + found.held_out]
    assert names == ["a/1.PNG", "a/2.bmp", "a/b/c/3.webp", "b.tif", "z.png"]
    assert [p.name for p in found.held_out] == ["z.png"]
    assert np.array_equal(found.train[1].hr, random_image(1))
    assert np.array_equal(found.train[1].lr, imresize(random_image(1), 1 / 2))
    facts = found.facts
    assert (facts["source"], facts["images"], facts["held_out"]) == ("photos", 4, 1)
    assert facts["compared"] == {
        "photographs": 3, "Set5": 0, "Set14": 0, "B100": 0, "Urban100": 0
    }  # fmt: skip
    assert "not known" in facts["licence"]
    assert training_images(source, 4, 5, progress=False).train[0].hr.shape == (20, 24, 3)


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (9, 1), (10, 2), (60, 12)])
def test_the_last_are_held_out(folder, count, held_out):
    source = folder({f"{i:03}.png": i for i in range(count)})
    found = training_images(source, 2, 6, progress=False)
    assert [p.name for p in found.held_out] == [
        f"{i:03}.png" for i in range(count - held_out, count)
    ]
    assert len(found.train) == count - held_out


def test_the_digest_tells_the_images_trained_on(folder):
    source = folder({f"{i}.png": i for i in range(4)})
    digests = [training_images(source, 2, 6, progress=False).facts["digest"] for _ in "ab"]
    folder({"1.png": 9})
    digests.append(training_images(source, 2, 6, progress=False).facts["digest"])
    assert digests[0] == digests[1] != digests[2]


def test_small_images_are_counted(folder):
    shapes = [(20, 11), (12, 12), (20, 26), (11, 26)]
    source = folder({f"{i}.png": random_image(i, *shape) for i, shape in enumerate(shapes)})
    found = training_images(source, 2, 6, progress=False)
    assert [p.name for p in found.train + found.held_out] == ["1.png", "2.png"]
    assert found.facts["too_small"] == 2


def test_benchmark_images_are_left_out(folder):
    test_image = np.ascontiguousarray(np.rot90(photograph("chelsea")[:, ::-1]))
    planted = np.asarray(Image.fromarray(test_image).resize((120, 180)))
    source = folder({"a.png": 0, "b.png": planted, "c.png": 1, "d.png": 2})
    found = training_images(source, 2, 6, progress=False)
    assert [p.name for p in found.train + found.held_out] == ["a.png", "c.png", "d.png"]
    assert found.facts["left_out"] == {"b.png": "the photograph chelsea"}


def test_a_planted_image_of_each_benchmark_set(folder, dfsq_data, monkeypatch):
    monkeypatch.setenv("DFSQ_DATA", str(dfsq_data))
    files = {name: files_of(name)[2] for name in BENCHMARK_SETS}
    planted = {
        f"{name}.png": Image.fromarray(read_image(local(file))[:, ::-1]).resize((200, 160))
        for name, file in files.items()
    }
    source = folder({"a.png": 0, "b.png": 1} | {k: np.asarray(v) for k, v in planted.items()})
    found = training_images(source, 2, 6, progress=False)
    assert found.facts["left_out"] == {f"{name}.png": file for name, file in files.items()}
    assert found.facts["compared"] == {
        "photographs": 3, "Set5": 5, "Set14": 14, "B100": 100, "Urban100": 100
    }  # fmt: skip


def test_the_embedded_photographs():
    found = training_images("photographs", 2, 48, progress=False)
    assert [p.name for p in found.train + found.held_out] == list(CALIBRATION_PHOTOGRAPHS)
    assert not found.facts["left_out"]


def test_sources_that_are_refused(folder, tmp_path):
    def refused(source, message):
        with pytest.raises(ValueError, match=message):
            training_images(source, 2, 6, progress=False)

    refused(tmp_path / "gone", r"no folder '.*gone'; give BSDS500, photographs \(embedded\), or")
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    refused(tmp_path / "empty", r"empty holds no image \(\.png, ")
    one = folder({"a.png": 0})
    refused(one, r"1 of 1 images to train on, and at least 2 are needed, one of them to validate")
    folder({"b.png": random_image(0, 20, 11), "c.png": photograph("chelsea")})
    refused(one, r"1 of 3 images .*: 1 smaller than 12x12 pixels, 1 showing a benchmark image")
    (one / "d.png").write_text("no image")
    refused(one, r"d\.png is not a readable image")


@pytest.mark.slow
def test_bsds500_is_split_as_ever(dfsq_data, monkeypatch):
    """Trained on are both folders but the last 50 images of test; val is B100."""
    monkeypatch.setenv("DFSQ_DATA", str(dfsq_data))
    found = training_images("BSDS500", 2, 48, progress=False)
    assert (len(found.train), len(found.held_out)) == (349, 50)
    assert sum(p.name.startswith("BSDS500/train/") for p in found.train) == 199
    test = sorted(p.name for p in (dfsq_data / "BSDS500" / "test").iterdir())
    assert [p.name for p in found.held_out] == [f"BSDS500/test/{name}" for name in test[-50:]]
    assert not found.facts["left_out"]
    assert not found.facts["too_small"]
    assert found.facts["compared"]["B100"] == 100
    assert "BSDS500: non-commercial research" in found.facts["licence"]


# --- batches ---


def literal_batch(images, recipe, step, scale):
    """As the first run of `edsr-x2` drew them: patch by patch, with NumPy."""
    generator = np.random.default_rng([recipe.seed, step])
    lrs, hrs = [], []
    for _ in range(recipe.batch):
        pair = images[generator.integers(len(images))]
        y, x = (generator.integers(n - recipe.patch + 1) for n in pair.lr.shape[:2])
        lr = pair.lr[y : y + recipe.patch, x : x + recipe.patch]
        y, x, side = (n * scale for n in (y, x, recipe.patch))
        hr = pair.hr[y : y + side, x : x + side]
        turns, mirror = generator.integers(4), generator.integers(2)
        for image, found in ((lr, lrs), (hr, hrs)):
            turned = np.rot90(image, turns)
            found.append(to_tensor(turned[:, ::-1] if mirror else turned))
    return torch.cat(lrs), torch.cat(hrs)


@pytest.mark.parametrize("scale", [2, 4])
def test_batches_are_cut_turned_and_mirrored(scale):
    recipe = replace(RECIPE, patch=4, batch=7, seed=3, scale=scale)
    images = pairs(5, scale)
    patches = Patches(list(images), scale)
    for step in range(12):
        made, expected = patches.batch(recipe, step), literal_batch(images, recipe, step, scale)
        for a, b in zip(made, expected, strict=True):
            assert a.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(a, b)


def test_a_batch_is_a_function_of_seed_and_step():
    patches = Patches(pairs(), 2)
    lr, hr = patches.batch(RECIPE, 5)
    assert lr.shape == (2, 3, 6, 6)
    assert hr.shape == (2, 3, 12, 12)
    np.random.default_rng(0).random(7)  # draws of others do not matter
    again = patches.batch(RECIPE, 5)
    assert torch.equal(lr, again[0])
    assert torch.equal(hr, again[1])
    for other in (patches.batch(RECIPE, 6), patches.batch(replace(RECIPE, seed=1), 5)):
        assert not torch.equal(lr, other[0])


def test_lr_and_hr_fit_each_other():
    patches = Patches(pairs(), 2)
    for step in range(40):
        for lr, hr in zip(
            *(map(to_image, b[:, None]) for b in patches.batch(RECIPE, step)), strict=True
        ):
            # but for the border, where the kernel saw other pixels, and a turn's other rounding
            difference = imresize(hr, 1 / 2)[2:-2, 2:-2] - lr[2:-2, 2:-2].astype(float)
            assert np.abs(difference).max() <= 1


def test_the_images_are_in_memory_once():
    images = pairs()
    patches = Patches(images, 2)
    assert not images
    assert len(patches) == 4


def test_a_patch_as_large_as_the_image():
    image = random_image(0, 12, 12)
    patches = Patches([ImagePair("a", imresize(image, 1 / 2), image)], 2)
    lr, _ = patches.batch(RECIPE, 0)
    assert np.array_equal(np.sort(to_image(lr[:1]).ravel()), np.sort(imresize(image, 0.5).ravel()))
