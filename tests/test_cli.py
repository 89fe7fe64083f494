"""The command line: results, and one-line errors that leave nothing behind."""

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import dfsq
from dfsq.cli import main
from dfsq.sr.models.edsr import EDSR
from dfsq.sr.zoo import WEIGHTS_FOLDER

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


def test_quantize_and_upscale_with_the_file(photo, folder, capsys):
    assert main(["quantize", "--bits", "3", "--out", "q.safetensors", *QUICK]) == 0
    assert "body.15.body.2" in capsys.readouterr().out  # the table of layers
    assert main(["upscale", str(photo), "--quantized", "q.safetensors", "--out", "a"]) == 0
    assert main(["upscale", str(photo), "--bits", "3", "--out", "b", *QUICK]) == 0
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
    # one bad image among good ones: found before any work
    assert "text.png" in error(capsys, "upscale", photo, "text.png", "--out", "out")
    assert not (folder / "out").exists()


@pytest.mark.parametrize("bits", [0, 1, 9, 33])
def test_bad_bits(photo, capsys, bits):
    message = error(capsys, "upscale", photo, "--bits", bits)
    assert f"one of 2, 3, 4, 5, 6, 7, 8, 32, not {bits}" in message


def test_bad_models(photo, folder, capsys):
    assert "there are edsr-x2" in error(capsys, "upscale", photo, "--model", "edsr")
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
    assert "quantize nothing" in error(capsys, "quantize", "--bits", "32", "--out", "q.safetensors")
    assert sorted(p.name for p in folder.iterdir()) == ["file", "photo.png"]


def test_two_images_of_one_name(photo, folder, capsys):
    (folder / "sub").mkdir()
    (folder / "sub" / "photo.png").write_bytes(photo.read_bytes())
    assert "two images are called photo" in error(capsys, "upscale", photo, "sub/photo.png")


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
