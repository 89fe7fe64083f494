"""Side by side: the numbers are the benchmark's, the crop is the right one; the page on it runs."""

import re
import shlex

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import dfsq
from dfsq.cli import main
from dfsq.sr.datasets import ImagePair, load_dataset
from dfsq.sr.models.edsr import EDSR
from dfsq.sr.upscaling import Bicubic, upscale
from dfsq.study import figures
from dfsq.study.benchmark import evaluate
from dfsq.study.comparison import CROP, compare, most_different, with_mean

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def photos(tmp_path):
    """A folder of two photographs, of 90x70 and 40x24 pixels."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, height, width in (("large", 70, 90), ("little", 24, 40)):
        image = dfsq.sr.photograph("chelsea")[100 : 100 + height, 100 : 100 + width]
        Image.fromarray(image).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def networks():
    """A random network and its quantized version."""
    torch.manual_seed(0)
    net = EDSR(2, 1, 8).eval()
    return net, dfsq.quantize(net, [torch.rand(3, 20, 20)], progress=False)


def test_numbers_are_the_benchmarks(networks, photos, tmp_path):
    pairs = load_dataset(photos)
    table = compare(*networks, pairs, tmp_path / "out", progress=False)
    assert list(table.image) == ["large", "little"]
    for name, model in zip(("float", "quantized", "bicubic"), (*networks, Bicubic(2)), strict=True):
        expected = evaluate(model, pairs)
        assert list(table[f"psnr_{name}"]) == list(expected.psnr)
        assert list(table[f"ssim_{name}"]) == list(expected.ssim)
    assert (table.loss == table.psnr_float - table.psnr_quantized).all()
    written = pd.read_csv(tmp_path / "out" / "comparison.csv")
    pd.testing.assert_frame_equal(written, table, atol=1e-6)


def test_an_image_of_one_colour_leaves_the_mean_of_the_others(networks, tmp_path):
    """Its PSNR is infinite by every network, as here by bicubic."""
    pairs = load_dataset("photographs", limit=1)
    lr = pairs[0].lr[:20, :30]
    pairs = [ImagePair("photo", lr, pairs[0].hr[:40, :60])]
    black = np.zeros_like(lr)
    pairs.append(ImagePair("black", black, np.zeros_like(pairs[0].hr)))
    bicubic = Bicubic(2)
    table = compare(bicubic, bicubic, pairs, tmp_path / "out", progress=False)
    assert table.loss.tolist() == [0.0, 0.0]
    shown = with_mean(table)
    assert list(shown.index) == ["photo", "black", "mean of 1"]
    assert (shown.loc["mean of 1"] == shown.loc["photo"]).all()


def test_strips(networks, photos, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(
        "dfsq.study.comparison.figures.comparison",
        lambda images, box, draw=figures.comparison: (
            shown.append((images, box)) or draw(images, box)
        ),
    )
    pairs = load_dataset(photos)
    table = compare(*networks, pairs, tmp_path / "out", label="4 bits", progress=False)
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert files == ["comparison.csv", "large.png", "little.png"]
    for pair, (images, box), row in zip(pairs, shown, table.itertuples(), strict=True):
        size = min(2 * CROP, *pair.hr.shape[:2])
        hr, bicubic, a, b = images.values()
        assert box == most_different(a, b, size)
        assert np.array_equal(hr, pair.hr)
        for image, model in zip((bicubic, a, b), (Bicubic(2), *networks), strict=True):
            assert np.array_equal(image, upscale(model, pair.lr))
        assert list(images) == [
            "HR",
            f"bicubic\n{row.psnr_bicubic:.2f} dB",
            f"float\n{row.psnr_float:.2f} dB",
            f"4 bits\n{row.psnr_quantized:.2f} dB",
        ]
        with Image.open(tmp_path / "out" / f"{pair.name}.png") as strip:
            assert strip.width > 4 * strip.height


def test_a_network_with_itself(networks, photos, tmp_path):
    net, _ = networks
    table = compare(net, net, load_dataset(photos, limit=1), tmp_path, progress=False)
    assert list(table.loss) == [0]


def test_a_failure_leaves_the_table_as_it_was(networks, photos, tmp_path):
    net, _ = networks
    (tmp_path / "comparison.csv").write_text("old")
    with pytest.raises(RuntimeError):
        compare(net, torch.nn.Conv2d(4, 3, 1), load_dataset(photos), tmp_path, progress=False)
    assert (tmp_path / "comparison.csv").read_text() == "old"
    assert not list(tmp_path.glob("*.part"))


def test_pairs_that_are_refused(networks, tmp_path):
    def pair(name, height, width):
        image = np.zeros((height, width, 3), np.uint8)
        return ImagePair(name, image, image.repeat(2, 0).repeat(2, 1))

    for message, *pairs in (
        ("b has 18x14 pixels; 16x16 at least", pair("a", 8, 8), pair("b", 7, 9)),
        ("two images are called a; rename one", pair("a", 8, 8), pair("a", 8, 9)),
    ):
        with pytest.raises(ValueError, match=message):
            compare(*networks, pairs, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_the_smallest_images_have_an_ssim(scale, tmp_path):
    side = {2: 16, 3: 18, 4: 20}[scale]
    hr = dfsq.sr.photograph("chelsea")[:side, :side]
    pair = ImagePair("x", hr[::scale, ::scale], hr)
    table = compare(Bicubic(scale), Bicubic(scale), [pair], tmp_path, progress=False)
    assert np.isfinite(table.ssim_float).all()


def test_most_different():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (9, 12, 3)).astype(np.uint8)
    b = rng.integers(0, 256, (9, 12, 3)).astype(np.uint8)
    for size in (1, 2, 5, 9, 20):
        x, y, side = most_different(a, b, size)
        assert side == min(size, 9)
        squared = (a.astype(int) - b) ** 2
        error = {
            (i, j): squared[j : j + side, i : i + side].sum()
            for i in range(12 - side + 1)
            for j in range(9 - side + 1)
        }
        assert error[x, y] == max(error.values())


def test_with_mean(networks, photos, tmp_path):
    table = compare(*networks, load_dataset(photos), tmp_path, progress=False)
    shown = with_mean(table)
    assert list(shown.index) == ["large", "little", "mean"]
    assert shown.loc["mean", ("PSNR-Y, dB", "loss")] == table.loss.mean()
    assert shown.loc["little", ("SSIM-Y", "quantized")] == table.ssim_quantized[1]
    named = with_mean(table.assign(image=["mean", "little"]))
    assert list(named.index) == ["mean", "little", "mean"]
    assert named["PSNR-Y, dB", "loss"].tolist() == shown["PSNR-Y, dB", "loss"].tolist()


# --- the page "Add a network or a method" ---


@pytest.fixture
def page(repository, photos, tmp_path, monkeypatch, own_modules):
    """Text of the page, its files in the current folder, and beside them the photographs."""
    text = (repository / "book" / "contributing.md").read_text()
    files = re.findall(r"```\{code-block\} python\n:caption: (\S+)\n\n(.*?)```", text, re.S)
    assert [name for name, _ in files] == ["mynet.py", "mymethod.py", "wide.py"]
    for name, code in files:
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    return text


def few_crops(source="photographs", scale=2, *options, **others):
    return [pair.lr for pair in load_dataset("photos", scale)][:1]


def test_the_commands_of_the_page(page, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dfsq.sr.calibration_crops", few_crops)
    (shell,) = re.findall(r"```shell\n(.*?)```", page, re.S)
    bench, compared = (shlex.split(line) for line in shell.splitlines())
    assert (bench[0], compared[0]) == ("dfsq", "dfsq")
    assert bench[bench.index("--datasets") + 1] == "photographs"  # too large for a test
    methods = ["mymethod.py:quantize", "wide.py:quantize", "dfsq", "float", "bicubic"]
    options = ["--datasets", "photos", "--bits", "4", "--methods", *methods]
    assert main([*bench[1:], *options]) == 0
    psnr = pd.read_csv("results/results.csv").set_index("method").psnr
    assert set(psnr.index) == set(methods)
    assert psnr["float"] > psnr["bicubic"]
    assert (psnr["float"] > psnr[methods[:3]]).all()
    assert main(compared[1:]) == 0
    table = pd.read_csv("compared/comparison.csv")
    assert list(table.image) == ["large", "little"]
    assert np.isclose(table.psnr_float.mean(), psnr["float"], atol=1e-5)


def test_the_python_of_the_page(page, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("dfsq.sr.calibration_crops", few_crops)
    monkeypatch.syspath_prepend(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    names = {}
    exec(code, names)
    assert list(names["table"].image) == ["large", "little"]
    assert (names["table"].loss > 0).all()
