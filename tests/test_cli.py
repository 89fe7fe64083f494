"""The command line: results, and one-line errors that leave nothing behind."""

import os
import random
import signal
import subprocess
import sys
import tempfile

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import ExifTags, Image, ImageCms
from safetensors.torch import load_file, save_file

import dfsq
from dfsq.cli import main
from dfsq.sr.models.edsr import EDSR
from dfsq.sr.zoo import WEIGHTS_FOLDER
from dfsq.study.benchmark import Bench, Cell, Store
from dfsq.study.yardstick import OnnxNetwork

QUICK = ["--crops", "1"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def photo(folder):
    """An RGB photograph of 40x24 pixels."""
    Image.fromarray(dfsq.sr.photograph("chelsea")[100:124, 100:140]).save(folder / "photo.png")
    return folder / "photo.png"


@pytest.fixture
def tiny(monkeypatch):
    """A tiny network in the place of all others, and one calibration image."""
    torch.manual_seed(0)
    net = EDSR(2, 1, 8).eval()
    crop = (255 * torch.rand(96, 96, 3)).byte().numpy()
    monkeypatch.setattr("dfsq.sr.load_model", lambda name, value_range=None: net)
    monkeypatch.setattr("dfsq.sr.calibration_crops", lambda *args, **options: [crop])
    return net


def read(path):
    with Image.open(path) as image:
        image.load()
        return image


def error(capsys, *arguments):
    """The message of a command that must fail with one line."""
    assert main([str(a) for a in arguments]) == 2
    text = capsys.readouterr().err
    lines = [line for line in text.splitlines() if line.startswith("dfsq: error: ")]
    assert len(lines) == 1
    assert text.rstrip().endswith(lines[0])
    return lines[0].removeprefix("dfsq: error: ")


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "1"])
def test_upscale_keeps_the_mode(photo, folder, mode):
    image = read(photo)
    if mode.endswith("A"):
        image.putalpha(image.convert("L"))
    image.convert(mode).save("other.png")
    assert main(["upscale", "other.png", "--bits", "32", "--out", "out"]) == 0
    result = read(folder / "out" / "other_x2_w32a32.png")
    assert result.size == (80, 48)
    assert result.mode == {"P": "RGB", "1": "L"}.get(mode, mode)


def test_upscale_float_is_the_network(photo, folder):
    assert main(["upscale", str(photo), "--bits", "32"]) == 0
    result = np.asarray(read("photo_x2_w32a32.png"))
    net = dfsq.sr.load_model("edsr-x2")
    x = torch.tensor(np.array(read(photo))).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        expected = (net(x)[0].permute(1, 2, 0).clamp(0, 1) * 255).round().numpy()
    assert np.abs(result - expected).max() <= 1  # one at most, at a tie of the rounding


def test_upscale_in_strips_where_a_photograph_is_large(photo, folder, monkeypatch):
    assert main(["upscale", str(photo), "--bits", "32", "--out", "a"]) == 0
    monkeypatch.setattr("dfsq.study.large.LARGE", 100)
    monkeypatch.setattr("dfsq.study.large.STRIP", 200)
    monkeypatch.setattr("dfsq.sr.upscaling.upscale", None)  # not this one
    assert main(["upscale", str(photo), "--bits", "32", "--out", "b"]) == 0
    a, b = (np.asarray(read(f"{x}/photo_x2_w32a32.png")).astype(int) for x in "ab")
    assert np.abs(a - b).max() <= 1


def test_quantize_and_upscale_with_the_file(photo, folder, capsys):
    quick = [*QUICK, "--method", "dfsq-subset"]
    assert main(["quantize", "--bits", "3", "--out", "q.safetensors", *quick]) == 0
    assert "body.15.body.2" in capsys.readouterr().out  # the table of layers
    assert main(["upscale", str(photo), "--quantized", "q.safetensors", "--out", "a"]) == 0
    assert main(["upscale", str(photo), "--bits", "3", "--out", "b", *quick]) == 0
    a, b = (np.asarray(read(f"{x}/photo_x2_w3a3.png")) for x in "ab")
    assert np.array_equal(a, b)


def test_bad_images(photo, folder, capsys):
    (folder / "text.png").write_text("not an image")
    (folder / "cut.png").write_bytes(photo.read_bytes()[:600])
    Image.new("RGB", (1, 1)).save("one.png")
    Image.fromarray(np.zeros((20, 20), np.uint16)).save("deep.png")
    assert "text.png is not a readable image" in error(capsys, "upscale", "text.png")
    assert "cut.png is not a readable image" in error(capsys, "upscale", "cut.png")
    assert "1x1 pixels; 8x8 at least" in error(capsys, "upscale", "one.png")
    assert "8 bits" in error(capsys, "upscale", "deep.png")
    assert "no such image: gone.png" in error(capsys, "upscale", "gone.png")
    assert f"{folder} is not a readable image (Is a directory)" in error(capsys, "upscale", folder)
    # one bad image among good ones: found before any work
    assert "text.png" in error(capsys, "upscale", photo, "text.png", "--out", "out")
    assert not (folder / "out").exists()


def test_images_that_a_network_does_not_take(tiny, photo, folder, capsys, monkeypatch):
    forward = EDSR.forward

    def picky(self, x):
        if x.shape[3] % 16:
            raise RuntimeError("the width must be a multiple of 16\nin a layer")
        return forward(self, x)

    monkeypatch.setattr(EDSR, "forward", picky)
    message = "the network fails on {}, of {} pixels: the width must be a multiple of 16"
    whole, half = message.format(photo, "40x24"), message.format("photo", "20x12")
    assert error(capsys, "upscale", photo, "--bits", "32") == whole
    assert error(capsys, "compare", ".", "--out", "out") == half
    assert error(capsys, "bench", "--datasets", ".", "--methods", "float", "--out", "r") == half

    def asserts(self, x):
        assert x.shape[3] % 1000 == 0, "the width must be a multiple of 16"

    monkeypatch.setattr(EDSR, "forward", asserts)
    assert error(capsys, "upscale", photo, "--bits", "32") == whole
    message = "the network does not take an image of shape (1, 3, 96, 96): the width must be"
    assert message in error(capsys, "upscale", photo, *QUICK)
    monkeypatch.setattr(EDSR, "forward", lambda self, x: x.shape["width"])
    with pytest.raises(TypeError):  # a mistake in a network's code is shown where it is
        main(["upscale", str(photo), "--bits", "32"])


@pytest.mark.parametrize("bits", [0, 1, 9, 33])
def test_bad_bits(photo, capsys, bits):
    message = error(capsys, "upscale", photo, "--bits", bits)
    assert f"--bits must be of 2 to 8, or 32 for the float network, not {bits}" in message


def test_bad_crops(photo, capsys):
    assert "--crops must be at least 1, not 0" in error(capsys, "upscale", photo, "--crops", 0)


def test_bad_models(photo, folder, capsys):
    assert "there are edsr-x2" in error(capsys, "upscale", photo, "--model", "edsr")
    (folder / "net.py").touch()
    assert "or FILE.py:FUNCTION" in error(capsys, "upscale", photo, "--model", "net.py")
    whole = WEIGHTS_FOLDER / "edsr-x2.safetensors"
    (folder / "cut.safetensors").write_bytes(whole.read_bytes()[:100_000])
    assert "cut.safetensors is damaged" in error(
        capsys, "upscale", photo, "--model", "cut.safetensors"
    )
    state = load_file(whole)
    state["head.0.weight"][0, 0, 0, 0] = float("nan")
    save_file(state, "nan.safetensors")
    message = error(capsys, "upscale", photo, "--model", "nan.safetensors")
    assert "'head.0.weight' hold NaN" in message
    torch.manual_seed(0)
    save_file(EDSR(2, 1, 8).state_dict(), "untrained.safetensors")
    message = error(capsys, "upscale", photo, "--model", "untrained.safetensors")
    assert "value_range" in message
    assert "bicubic" in message


def test_bad_output(photo, folder, capsys):
    (folder / "file").write_text("")
    assert "cannot write to file" in error(capsys, "upscale", photo, "--out", "file")
    assert ".safetensors" in error(capsys, "quantize", "--out", "q.pt")
    for command, name in (("quantize", "q.safetensors"), ("export", "q.onnx")):
        (folder / name).mkdir()
        message = f"--out must be a file, and {name} is a folder; name a file in it"
        assert message == error(capsys, command, "--out", name)
        (folder / name).rmdir()
    assert "quantize nothing" in error(capsys, "quantize", "--bits", "32", "--out", "q.safetensors")
    assert sorted(p.name for p in folder.iterdir()) == ["file", "photo.png"]


def test_two_images_of_one_name(photo, folder, capsys):
    (folder / "sub").mkdir()
    (folder / "sub" / "photo.png").write_bytes(photo.read_bytes())
    assert "two images are called photo" in error(capsys, "upscale", photo, "sub/photo.png")


def test_nothing_takes_the_place_of_what_was_given(tiny, photo, folder, capsys):
    """Neither a strip that of its photograph, nor codes that of the float weights."""
    (folder / "HR").mkdir()
    photo.rename(folder / "HR" / photo.name)
    before = (folder / "HR" / photo.name).read_bytes()
    message = "--out is where the images are"
    assert message in error(capsys, "compare", folder, "--out", folder / "HR", *QUICK)
    assert message in error(capsys, "compare", folder / "HR", "--out", "HR/../HR", *QUICK)
    assert (folder / "HR" / photo.name).read_bytes() == before
    weights = folder / "mine.safetensors"
    save_file(tiny.state_dict(), weights)
    before = weights.read_bytes()
    message = error(capsys, "quantize", "--model", weights, "--out", weights, *QUICK)
    assert "--out is the float network itself" in message
    assert weights.read_bytes() == before


@pytest.mark.parametrize("bits", ["1", "9", "32"])
def test_widths_of_a_benchmark(folder, capsys, bits):
    message = error(capsys, "bench", "--models", "edsr-x2", "--bits", "4", bits, "--out", "rows")
    assert f"--bits must be of 2 to 8, not 4 {bits}" in message
    assert not list(folder.iterdir())


def test_upscale_keeps_a_profile_of_the_same_colours(photo, folder):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = read(photo)
    for mode in ("RGB", "L", "CMYK"):
        image.convert(mode).save(folder / f"{mode}.tif", icc_profile=profile)
    files = [str(folder / f"{mode}.tif") for mode in ("RGB", "L", "CMYK")]
    assert main(["upscale", *files, "--model", "edsr-x2", "--bits", "32", "--out", "up"]) == 0
    kept = {path.name[0]: read(path).info.get("icc_profile") for path in folder.glob("up/*.png")}
    assert kept == {"R": profile, "L": None, "C": profile}


def test_upscale_turns_a_photograph_upright(photo, folder):
    image = read(photo).crop((0, 0, 24, 16))
    exif = image.getexif()
    exif[ExifTags.Base.Orientation] = 6  # held to the right
    image.save(folder / "turned.png", exif=exif)
    image.transpose(Image.Transpose.ROTATE_270).save(folder / "upright.png")
    files = [str(folder / f"{name}.png") for name in ("turned", "upright")]
    assert main(["upscale", *files, "--model", "edsr-x2", "--bits", "32", "--out", "up"]) == 0
    turned, upright = (read(path) for path in sorted(folder.glob("up/*.png")))
    assert turned.size == (32, 48)
    assert turned.tobytes() == upright.tobytes()


def test_export(tiny, folder, capsys, monkeypatch):
    assert main(["quantize", "--bits", "3", "--out", "q.safetensors"]) == 0
    for out, options in (("a", ["--quantized", "q.safetensors"]), ("b", ["--bits", "3"])):
        assert main(["export", "--out", f"{out}.onnx", *options]) == 0
        assert f"{out}.onnx" in capsys.readouterr().out
    x = torch.rand(1, 3, 24, 32)
    a, b = (OnnxNetwork(f"{name}.onnx", 2)(x) for name in "ab")
    assert torch.equal(a, b)
    assert (a - dfsq.load("q.safetensors", tiny)(x)).abs().mean() < 1e-5
    before = sorted(folder.iterdir())
    assert "must be an .onnx file, not 'c.pt'" in error(capsys, "export", "--out", "c.pt")
    (folder / "file").write_text("")
    assert "cannot write to file" in error(capsys, "export", "--out", "file/c.onnx")
    (folder / "file").unlink()
    monkeypatch.setattr("dfsq.export.find_spec", lambda name: None)
    assert "pip install 'dfsq[onnx]'" in error(capsys, "export", "--out", "c.onnx")
    assert sorted(folder.iterdir()) == before


def test_compare(tiny, photo, folder, capsys):
    arguments = ["--bits", "3", "--layers", "all"]
    assert main(["quantize", "--out", "q.safetensors", *arguments]) == 0
    capsys.readouterr()
    for out, options in (("a", ["--quantized", "q.safetensors"]), ("b", arguments)):
        assert main(["compare", ".", "--out", out, *options]) == 0
        assert sorted(p.name for p in (folder / out).iterdir()) == ["comparison.csv", "photo.png"]
        mean = capsys.readouterr().out.splitlines()[-2].split()
        assert mean[0] == "mean"
        assert len(mean) == 8  # PSNR of three and the loss, SSIM of three
    assert (folder / "a/comparison.csv").read_text() == (folder / "b/comparison.csv").read_text()


def test_compare_refuses_and_leaves_nothing_behind(folder, capsys):
    (folder / "empty").mkdir()
    for name, size in (("small", (30, 14)), ("good", (40, 24))):
        (folder / name).mkdir()
        Image.new("RGB", size).save(folder / name / "x.png")
    (folder / "twice").mkdir()
    for suffix in ("png", "bmp"):
        Image.new("RGB", (40, 24)).save(folder / "twice" / f"x.{suffix}")
    (folder / "file").write_text("")
    net = EDSR(2, 1, 8)
    dfsq.save(dfsq.quantize(net, [torch.rand(3, 9, 9)], progress=False), folder / "q.safetensors")
    before = sorted(folder.rglob("*"))
    capsys.readouterr()

    def refused(images, *options, out="out"):
        return error(capsys, "compare", images, "--out", out, *options)

    assert "unknown data set 'gone'" in refused("gone")
    assert "empty holds no image (.png, " in refused("empty")
    assert "x has 30x14 pixels; 16x16 at least are needed to measure at x2" in refused("small")
    assert "two images are called x" in refused("twice")
    assert "cannot write to file" in refused("good", out="file")
    assert "limit must be at least 1, not 0" in refused("good", "--limit", "0")
    assert "unknown model 'edsr'" in refused("good", "--model", "edsr")
    assert "there is no file my.py" in refused("good", "--model", "my.py:build")
    assert "unknown preset 'best'; there are float, " in refused("good", "--method", "best")
    assert "of 2 to 8, or 32 for the float network, not 9" in refused("good", "--bits", "9")
    assert "quantize nothing" in refused("good", "--bits", "32")
    assert "quantize nothing" in refused("good", "--method", "float")
    message = "q.safetensors does not fit: layer 'body.0.body.0' has 64 to 64 channels"
    assert message in refused("good", "--quantized", "q.safetensors")
    assert "no such file: gone.safetensors" in refused("good", "--quantized", "gone.safetensors")
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("layers", ["body", "all"])
def test_layers(tiny, folder, layers):
    arguments = ["--bits", "3", "--layers", layers, "--out", "q.safetensors"]
    assert main(["quantize", *arguments]) == 0
    table = dfsq.summary(dfsq.load("q.safetensors", tiny)).set_index("layer")
    body = table.index.str.startswith("body.0")
    assert set(table[body].weight_bits) | set(table[body].act_bits) == {3}
    assert (~body).any() == (layers == "all")
    assert set(table[~body].weight_bits) | set(table[~body].act_bits) <= {8}


def test_run(folder, capsys):
    notebook = nbformat.v4.new_notebook()
    parameters = nbformat.v4.new_code_cell("bits: int = 4  # width of a code")
    parameters.metadata.tags = ["parameters"]
    notebook.cells = [parameters, nbformat.v4.new_code_cell("print(2**bits)\nassert bits < 8")]
    notebook.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": "P"}
    nbformat.write(notebook, "n.ipynb")
    assert main(["run", "n.ipynb", "--list"]) == 0
    assert "bits: int = 4  # width of a code" in capsys.readouterr().out
    assert main(["run", "n.ipynb", "-p", "bits", "3"]) == 0
    assert nbformat.read("n-run.ipynb", 4).cells[-1].outputs[0].text == "8\n"
    assert "bits" in error(capsys, "run", "n.ipynb", "-p", "bitz", "3")
    assert "AssertionError" in error(
        capsys, "run", "n.ipynb", "-p", "bits", "9", "--out", "o.ipynb"
    )
    assert not (folder / "o.ipynb").exists()


def test_bench_resumes(photo, folder, capsys, monkeypatch):
    arguments = ["bench", "--datasets", ".", "--methods", "bicubic", "float", "--out", "results"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("photo") == 0  # the data set is "."
    before = (folder / "results" / "results.csv").read_text()
    monkeypatch.setattr("dfsq.study.benchmark.evaluate", None)  # nothing is computed again
    assert main(arguments) == 0
    assert (folder / "results" / "results.csv").read_text() == before


def test_bench_fills_in_what_the_projects_rows_lack(photo, folder, capsys, monkeypatch):
    """Into another folder too: a row that stands in the project's own is not computed again."""
    cells = [Cell("edsr-x2", ".", method, 32) for method in ("bicubic", "float")]
    Bench(Store(folder / "own"), device="cpu").run(cells[:1], progress=False)
    own = {path: path.read_bytes() for path in (folder / "own").iterdir()}
    monkeypatch.setattr("dfsq.study.benchmark.RESULTS_FOLDER", folder / "own")
    monkeypatch.setattr("dfsq.study.benchmark.standard_grid", lambda: cells)
    assert main(["bench", "--standard", "--out", "others", "--device", "cpu"]) == 0
    assert list(pd.read_csv("others/results.csv").method) == ["float"]
    shown = capsys.readouterr().out
    assert "bicubic" in shown
    assert "float" in shown
    assert {path: path.read_bytes() for path in (folder / "own").iterdir()} == own


def test_bench_refuses_images_before_any_work(tiny, photo, folder, capsys, monkeypatch):
    monkeypatch.setattr("dfsq.study.benchmark.calibrate", None)
    monkeypatch.setattr("dfsq.study.benchmark.evaluate", None)
    arguments = ["bench", "--datasets", ".", "--bits", "4", "--out", "results"]
    Image.new("RGB", (14, 14)).save("tiny.png")
    assert "tiny has 14x14 pixels; 16x16 at least" in error(capsys, *arguments)
    (folder / "tiny.png").unlink()
    Image.new("RGB", (40, 24)).save("photo.bmp")
    assert "two images are called photo; rename one" in error(capsys, *arguments)


def test_bench_takes_a_method_of_the_users(tiny, photo, folder, capsys):
    """Its rows are keyed by the file's content."""
    method = folder / "mine.py"
    source = """
import copy

def quantize(model, images, bits, seed):
    assert images[0].shape == (96, 96, 3)
    made = copy.deepcopy(model)
    made.body[0].body[0].weight.data *= 1 - FACTOR * bits - seed
    return made
"""
    arguments = ["bench", "--datasets", ".", "--methods", "mine.py:quantize", "float", "--out", "r"]

    def rows(factor, *options):
        method.write_text(source.replace("FACTOR", str(factor)))
        assert main([*arguments, "--bits", "4", *options]) == 0
        table = pd.read_csv("r/results.csv").set_index("config_digest", drop=False)
        return table[table.method == "mine.py:quantize"]

    assert len(rows(0)) == 1
    same = pd.read_csv("r/results.csv").set_index("method").psnr
    assert same["mine.py:quantize"] == same["float"]
    assert len(rows(0)) == 1
    assert len(rows(0.1)) == 2
    assert len(rows(0.1)) == 2
    table = rows(0.1, "--seeds", "0", "1")
    assert len(table) == 3
    assert table.config_digest.nunique() == 2
    assert table.psnr.nunique() == 3
    method.write_text("def quantize(model, images, bits, seed):\n    return 4")
    assert "mine.py:quantize must return a network (nn.Module), not int" in error(
        capsys, *arguments
    )


def test_a_reader_that_has_seen_enough():
    command = [sys.executable, "-m", "dfsq.cli", "fetch"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (1, b"")


# --- training ---


@pytest.fixture
def photos(folder, monkeypatch):
    """Six photographs of 36x32 pixels, and no benchmark set to compare them with."""
    monkeypatch.setenv("DFSQ_CACHE", str(folder / "cache"))
    monkeypatch.delenv("DFSQ_DATA", raising=False)
    (folder / "photos").mkdir()
    whole = dfsq.sr.photograph("coffee")
    for i in range(6):
        part = whole[50 * i : 50 * i + 64, 80 * i : 80 * i + 72]
        Image.fromarray(part[::2, ::2]).save(folder / "photos" / f"{i}.png")
    return folder / "photos"


TRAIN = ["train", "edsr-x2", "--data", "photos", "-p", "patch", "8", "-p", "batch", "1"]


def test_train_lowers_the_loss(photos, folder, capsys):
    """The recipe's own network, on small patches."""
    assert main([*TRAIN, "--steps", "50", "--save-every", "10"]) == 0
    told = capsys.readouterr().out
    assert "step 50/50" in told
    assert "min left" in told
    table = pd.read_csv("runs/edsr-x2/log.csv")
    assert list(table.step) == [10, 20, 30, 40, 50]
    assert table.loss.iloc[-1] < 0.8 * table.loss.iloc[0]
    assert main([*TRAIN, "--steps", "51"]) == 0
    assert "step 50 of 51" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_train_killed_and_resumed(photos, folder):
    """A process killed at a random step: the loss curve of an unbroken run, to the last digit."""
    arguments = [*TRAIN, "--float32", "--steps", "12", "--save-every", "3"]
    command = [sys.executable, "-m", "dfsq.cli", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    at = random.SystemRandom().randrange(4, 12)
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as run:
        assert any(line.startswith(f"step {at}/12 ") for line in run.stdout)
        run.kill()
    left = torch.load("runs/edsr-x2/checkpoint.pt", weights_only=True)["step"]
    assert left >= at - 3, at  # no more than that is lost
    for out in ("runs/edsr-x2", "unbroken"):
        assert main([*arguments, "--out", out]) == 0
    curves, states = [], []
    for out in ("runs/edsr-x2", "unbroken"):
        curves.append(pd.read_csv(f"{out}/log.csv", dtype=str).drop(columns="seconds"))
        states.append(torch.load(f"{out}/checkpoint.pt", weights_only=True)["model"])
    assert curves[0].equals(curves[1]), at
    assert list(curves[0].step) == ["3", "6", "9", "12"]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items()), at


@pytest.mark.usefixtures("one_thread")
def test_train_told_to_end(photos, folder):
    """By SIGTERM, at some step: it is saved, and the run goes on from there."""
    command = [sys.executable, "-m", "dfsq.cli", *TRAIN, "--float32", "--steps", "5000"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as run:
        assert any(line.startswith("step 50/5000 ") for line in run.stdout)
        run.terminate()
        told = run.stdout.read().splitlines()
    assert run.returncode == 128 + signal.SIGTERM
    step = torch.load("runs/edsr-x2/checkpoint.pt", weights_only=True)["step"]
    assert told[-1] == f"step {step}: saved; the same command goes on from here"
    files = {p.name for p in (folder / "runs/edsr-x2").iterdir()}
    assert files - {".lock"} == {"checkpoint.pt", "log.csv", "recipe.json"}


def test_sigterm_removes_temporary_folders(folder, monkeypatch):
    """As Ctrl-C does; the handler before is put back."""
    before = signal.getsignal(signal.SIGTERM)

    def work(options):
        with tempfile.TemporaryDirectory(dir=folder):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("dfsq.cli._fetch", work)
    with pytest.raises(SystemExit) as left:
        main(["fetch"])
    assert left.value.code == 128 + signal.SIGTERM
    assert not list(folder.iterdir())
    assert signal.getsignal(signal.SIGTERM) is before


def test_train_and_publish(photos, folder, capsys, monkeypatch):
    pairs = dfsq.sr.load_dataset("photos", 4, limit=1)  # instead of the benchmark sets
    monkeypatch.setattr("dfsq.study.publishing.load_dataset", lambda name, scale: pairs)
    arguments = ["--data", "photos", "-p", "patch", "8", "-p", "batch", "1", "--steps", "1"]
    # at x4 from x2's weights, and anew
    assert main(["train", "edsr-x4", *arguments, "--float32"]) == 0
    told = capsys.readouterr().out
    assert "edsr-x2.safetensors: 72 tensors taken" in told
    assert "not found there: tail.0.2.weight, tail.0.2.bias" in told
    assert "in float32" in told
    assert main(["publish", "edsr-x4", "--out", "published"]) == 0
    told = capsys.readouterr().out
    assert "published/edsr-x4.safetensors  3.0 MB" in told
    assert "Not measured" not in (folder / "published" / "edsr-x4.md").read_text()
    assert main(["publish", "edsr-x4", "--out", "published", "--sets", "Set5", "B100"]) == 0
    card = (folder / "published" / "edsr-x4.md").read_text()
    assert "Not measured when published: Set14, Urban100." in card
    capsys.readouterr()
    monkeypatch.setattr("dfsq.study.publishing.LARGEST", 1000)
    assert main(["publish", "edsr-x4", "--out", "published"]) == 0
    told = capsys.readouterr().out
    assert "by their file: dfsq bench --models runs/edsr-x4/edsr-x4.safetensors" in told
    arguments += ["--out", "anew"]
    assert main(["train", "edsr-x4", *arguments, "--initial", "none"]) == 0
    told = capsys.readouterr().out
    assert "tensors taken" not in told
    assert "no weights" not in told


def test_train_says_that_there_are_no_weights_to_start_from(photos, folder, capsys, monkeypatch):
    monkeypatch.setattr("dfsq.study.recipes.WEIGHTS_FOLDER", folder)
    arguments = ["--data", "photos", "-p", "patch", "8", "-p", "batch", "1", "--steps"]
    message = f"no weights of edsr-x2 to start from in {folder} or runs/edsr-x2: starting without"
    for name in ("edsr-x4", "edsr-long-x2"):
        for steps, says in (("1", True), ("2", False)):  # the second goes on
            assert main(["train", name, *arguments, steps]) == 0
            assert (message in capsys.readouterr().out) == says


def test_train_goes_on_from_the_projects_weights(photos, folder, capsys):
    weights = WEIGHTS_FOLDER / "edsr-x2.safetensors"
    steps = int(pd.read_csv(weights.with_suffix(".csv")).step.iloc[-1])
    arguments = [*TRAIN, "--initial", str(weights)]
    message = error(capsys, *arguments, "--steps", steps)
    assert f"it must be more than {steps}, not {steps}" in message
    assert main([*arguments, "--steps", str(steps + 1)]) == 0
    message = error(capsys, *TRAIN, "--initial", "none", "--steps", steps + 2)
    assert "began with weights of edsr-x2, not with none; leave --initial away, or" in message
    assert list(pd.read_csv("runs/edsr-x2/log.csv").step)[-2:] == [steps, steps + 1]


def test_train_lists_the_recipes(capsys):
    assert main(["train", "--list"]) == 0
    told = capsys.readouterr().out
    for name in ("edsr-x2", "edsr-x4", "srresnet-x2", "srresnet-x4", "rdn-x4", "rdn-small-x2"):
        assert f"{name} " in told
    assert "22.27 M" in told


def test_train_refuses(photos, folder, capsys, monkeypatch):
    (folder / "empty").mkdir()
    (folder / "one").mkdir()
    (folder / "one" / "0.png").write_bytes((photos / "0.png").read_bytes())
    torch.manual_seed(0)
    save_file(EDSR(2, 1, 8).state_dict(), "tiny.safetensors")

    def refused(*arguments):
        return error(capsys, *arguments)

    assert "NAME is missing; there are edsr-x2, " in refused("train")
    assert "there is no recipe 'edsr'; there are edsr-x2, " in refused("train", "edsr")
    assert "empty holds no image" in refused("train", "edsr-x2", "--data", "empty")
    small = ["-p", "patch", "8"]
    message = refused("train", "edsr-x2", "--data", "one", *small)
    assert "1 of 1 images to train on, and at least 2 are needed" in message
    message = refused("train", "edsr-x2", "--data", "photos")
    assert "0 of 6 images to train on" in message
    assert "6 smaller than 96x96 pixels" in message
    assert "no folder 'gone'" in refused("train", "edsr-x2", "--data", "gone")
    assert "a recipe has no 'blocks' to change" in refused(*TRAIN, "-p", "blocks", "1")
    assert "'head.0.weight' is (8, 3, 3, 3) there" in refused(
        *TRAIN, "--initial", "tiny.safetensors"
    )
    assert "no such file of initial weights: gone" in refused(*TRAIN, "--initial", "gone")
    assert "steps must be at least 1, not 0" in refused(*TRAIN, "--steps", "0")
    assert "device must be cpu" in refused(*TRAIN, "--device", "abacus")
    (folder / "file").touch()
    assert "cannot write to file" in refused(*TRAIN, "--out", "file")
    assert "there is no recipe 'x'" in refused("publish", "x")
    assert "train first: `dfsq train rdn-x2`" in refused("publish", "rdn-x2")
    monkeypatch.setattr(dfsq.study.training.functional, "l1_loss", lambda a, b: 0 * a.sum() / 0)
    assert "the loss is nan at step 0" in refused(*TRAIN, "--steps", "1")
    assert not list(folder.rglob("checkpoint.pt"))


def test_a_network_that_is_not_trained_yet(photo, capsys, monkeypatch, tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "edsr-x2.safetensors").touch()
    monkeypatch.setattr("dfsq.sr.zoo.WEIGHTS_FOLDER", tmp_path / "weights")
    message = error(capsys, "upscale", photo, "--model", "rdn-x4")
    assert "not trained yet" in message
    assert "`dfsq train rdn-x4`, then `dfsq publish rdn-x4`" in message
    assert "in place of the name, runs/rdn-x4/rdn-x4.safetensors" in message
    message = error(capsys, "upscale", photo, "--model", "nothing")
    assert "there are edsr-x2, edsr-baseline-x2" in message  # no name without weights
