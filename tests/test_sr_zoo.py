"""Networks by name and from files, and what is refused."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from dfsq.sr import zoo
from dfsq.sr.datasets import load_dataset
from dfsq.sr.imaging import imresize, psnr_y, to_image, to_tensor
from dfsq.sr.models.edsr import EDSR
from dfsq.sr.userfiles import user_function, user_sources
from dfsq.sr.zoo import edsr_from_state, load_model, model_names, read_weights


@pytest.fixture(scope="module")
def embedded():
    return load_model("edsr-x2")


@pytest.fixture
def image():
    return torch.rand(1, 3, 12, 10, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def run(model, x):
    return model(x)


def random_state(**options):
    torch.manual_seed(0)
    return EDSR(**({"blocks": 2, "features": 4} | options)).state_dict()


def official(model):
    """The same network with the weights' range and the extra layers of the official files."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["head.0.weight"] /= 255
    state["tail.1.weight"] *= 255
    state["tail.1.bias"] *= 255
    for shift in ("sub_mean", "add_mean"):
        state[f"{shift}.weight"] = torch.eye(3).view(3, 3, 1, 1)
        state[f"{shift}.bias"] = torch.ones(3)
    return state


# --- the embedded network ---


def test_embedded_network(embedded):
    assert model_names()[0] == "edsr-x2"
    assert not embedded.training
    assert (embedded.scale, embedded.value_range) == (2, 1)
    assert {p.dtype for p in embedded.parameters()} == {torch.float32}
    # stored in half precision, rounded once
    assert all(torch.equal(p, p.half().float()) for p in embedded.parameters())
    assert embedded.state_dict().keys() == EDSR().state_dict().keys()


def test_embedded_network_beats_bicubic_on_the_test_photographs(embedded):
    gains = {}
    for pair in load_dataset():
        network = psnr_y(to_image(run(embedded, to_tensor(pair.lr))), pair.hr, 2)
        gains[pair.name] = network - psnr_y(imresize(pair.lr, 2), pair.hr, 2)
    assert min(gains.values()) > 1, gains
    assert np.mean(list(gains.values())) > 2, gains


def test_weights_that_are_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(zoo, "WEIGHTS_FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"'edsr-x2' are not installed at .*pip install -e"):
        load_model("edsr-x2")


# --- files ---


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_official_files(embedded, image, tmp_path, suffix):
    path = tmp_path / f"edsr.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(official(embedded), path)
    model = load_model(path)
    assert (model.scale, model.value_range, model.training) == (2, 255, False)
    torch.testing.assert_close(run(model, image), run(embedded, image), rtol=0, atol=1e-5)


def test_a_wrong_value_range_is_refused_and_named(embedded, tmp_path):
    torch.save(official(embedded), tmp_path / "official.pt")
    message = r"value_range=1 gives .* dB .*, bicubic .* dB: .* give value_range=255"
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "official.pt", value_range=1)
    save_file(embedded.state_dict(), tmp_path / "ours.safetensors")
    with pytest.raises(ValueError, match=r"value_range=255 gives .* give value_range=1"):
        load_model(tmp_path / "ours.safetensors")
    assert load_model(tmp_path / "ours.safetensors", value_range=1).value_range == 1


def test_a_file_says_its_value_range(embedded, tmp_path):
    path = tmp_path / "ours.safetensors"
    save_file(embedded.state_dict(), path, {"value_range": "1"})
    assert load_model(path).value_range == 1
    with pytest.raises(ValueError, match=r"value_range=255 gives .* give value_range=1"):
        load_model(path, value_range=255)  # what is given counts
    for text in ("wide", "0", "nan"):
        save_file(embedded.state_dict(), path, {"value_range": text})
        message = rf"metadata of .*ours\.safetensors must be a positive .* not '{text}'"
        with pytest.raises(ValueError, match=message):
            load_model(path)
        assert load_model(path, value_range=1).value_range == 1


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_an_untrained_network_is_refused(tmp_path, scale):
    torch.save(random_state(scale=scale), tmp_path / "edsr.pt")
    with pytest.raises(ValueError, match=r"with value_range=255 gives .* these weights do not fit"):
        load_model(tmp_path / "edsr.pt")
    with pytest.raises(ValueError, match=r"value_range must be positive, .* not 0"):
        load_model(tmp_path / "edsr.pt", value_range=0)


@pytest.mark.parametrize(
    "form",
    [
        {"scale": 2},
        {"scale": 3},
        {"scale": 4},
        {"blocks": 1, "features": 12},
        {"blocks": 32, "features": 3},
    ],
)
def test_depth_width_and_scale_are_read_from_the_weights(form, image):
    state = random_state(**form)
    model = edsr_from_state(state, value_range=1)
    expected = EDSR(**({"blocks": 2, "features": 4} | form)).eval()
    expected.load_state_dict(state)
    assert model.scale == expected.scale
    assert len(model.body) == len(expected.body)
    assert torch.equal(run(model, image), run(expected, image))


def test_residual_scale_of_the_large_network():
    assert edsr_from_state(random_state(blocks=1)).body[0].residual_scale == 1
    large = random_state(blocks=1, features=256)
    assert edsr_from_state(large).body[0].residual_scale == 0.1
    assert edsr_from_state(large, residual_scale=1).body[0].residual_scale == 1


def test_weights_of_half_precision(tmp_path):
    state = {key: value.half() for key, value in random_state().items()}
    save_file(state, tmp_path / "half.safetensors")
    read = read_weights(tmp_path / "half.safetensors")
    assert all(value.dtype == torch.float32 for value in read.values())
    assert all(torch.equal(read[key], state[key].float()) for key in state)


# --- what is refused ---


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.99])
def test_truncated_files(tmp_path, suffix, part):
    path = tmp_path / f"edsr.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(random_state(), path)
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    with pytest.raises(ValueError, match="is damaged, cut short, or no file of weights"):
        load_model(path)


@pytest.mark.parametrize("text", ["no weights", "hello world\n", ""])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_text_file(tmp_path, suffix, text):
    (tmp_path / f"edsr.{suffix}").write_text(text)
    with pytest.raises(ValueError, match="is damaged, cut short, or no file of weights"):
        load_model(tmp_path / f"edsr.{suffix}")


class NotPlain:
    """An object that loading would have to run code for."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds no state dict"),
        ({"state_dict": {}}, "holds no state dict"),
        (NotPlain(), "is damaged, cut short, or no file of weights"),
        ({"conv.weight": torch.zeros(3)}, r"not EDSR's weights: 'head\.0\.weight' is missing"),
    ],
    ids=["list", "nested", "object", "another network"],
)
def test_files_of_other_things(tmp_path, content, message):
    torch.save(content, tmp_path / "edsr.pt")
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "edsr.pt")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite(tmp_path, bad):
    state = random_state()
    state["body.1.body.2.weight"][0, 0, 1, 1] = bad
    torch.save(state, tmp_path / "edsr.pt")
    with pytest.raises(ValueError, match=r"'body\.1\.body\.2\.weight' hold NaN or infinity"):
        load_model(tmp_path / "edsr.pt")


def test_weights_of_another_form():
    for key, message in (
        ("body.1.body.0.weight", r"Missing key.*body\.1\.body\.0\.weight"),
        ("tail.1.weight", r"'tail\.1\.weight' is missing"),
    ):
        state = random_state()
        del state[key]
        with pytest.raises(ValueError, match=f"(?s)these are not EDSR's weights: .*{message}"):
            edsr_from_state(state)
    state = random_state() | {"tail.0.0.weight": torch.zeros(5 * 4, 4, 3, 3)}
    with pytest.raises(ValueError, match="scale must be 2, 3 or 4"):
        edsr_from_state(state)


def test_weights_of_an_unknown_network(tmp_path):
    torch.save({"conv.weight": torch.zeros(3, 3, 3, 3)}, tmp_path / "other.pth")
    with pytest.raises(
        ValueError, match=r"these are not EDSR's weights: 'head\.0\.weight' is missing"
    ):
        load_model(tmp_path / "other.pth")


def test_unknown_names(tmp_path):
    with pytest.raises(
        ValueError, match=r"unknown model 'edsr-x9'; there are edsr-x2, .*, or give a file"
    ):
        load_model("edsr-x9")
    with pytest.raises(ValueError, match=r"unknown model"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="value_range goes with a file"):
        load_model("edsr-x2", value_range=255)


# --- functions of the user's ---

USERS = """
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from neighbour import SHARPNESS


@dataclass
class Options:
    scale: int = 2


class Sharpened(nn.Module):
    def __init__(self, sharpness=SHARPNESS):
        super().__init__()
        self.scale = Options().scale
        self.edges = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        weight = torch.zeros(3, 3, 3, 3)
        weight[range(3), range(3)] = torch.tensor([[-1.0, -2, -1], [-2, 12, -2], [-1, -2, -1]])
        self.edges.weight.data = sharpness * weight

    def forward(self, x):
        x = functional.interpolate(x, scale_factor=2, mode="bicubic")
        return x + self.edges(x)


def build():
    return Sharpened()
"""


@pytest.fixture
def users(tmp_path, own_modules):
    """A function to write a file of a user's, beside a file that it imports."""
    (tmp_path / "neighbour.py").write_text("SHARPNESS = 0.05")

    def write(text, name="mine.py"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_a_network_of_the_users(users, image):
    name = f"{users(USERS)}:build"
    model = load_model(name)
    assert (type(model).__name__, model.scale, model.training) == ("Sharpened", 2, False)
    assert run(model, image).shape == (1, 3, 24, 20)
    with pytest.raises(ValueError, match="value_range goes with a file of weights"):
        load_model(name, value_range=255)


def test_a_users_file_hides_no_module(users, monkeypatch):
    users("raise RuntimeError('not meant')", "colorsys.py")
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    load_model(f"{users(USERS)}:build")
    import colorsys

    assert colorsys.rgb_to_hsv(0, 0, 0) == (0, 0, 0)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("build = 3", r"mine\.py has no function 'build'"),
        ("del build", r"mine\.py has no function 'build'"),
        ("raise KeyError('x')", r"mine\.py does not run: KeyError: 'x'"),
        ("import sys; sys.exit(0)", r"mine\.py does not run: SystemExit: 0"),
        ("def build(): raise SystemExit(0)", r"mine\.py:build fails: SystemExit: 0"),
        ("(", r"mine\.py does not run: SyntaxError"),
        ("import nothing_of_this_name", r"mine\.py does not run: ModuleNotFoundError"),
        ("def build(x): pass", r"mine\.py:build fails: TypeError: build\(\) missing 1 required"),
        ("def build(): return 3", r"mine\.py:build must return an nn\.Module, not int"),
        ("def build(): return nn.Conv2d(3, 3, 3)", r"scale of 2, 3, 4 or 8, not None"),
        ("Options = partial(Options, 5)", r"scale of 2, 3, 4 or 8, not 5"),
        ("build = lambda: Sharpened(9)", r"gives .* bicubic .* trained too little, .* 0\.\.1"),
        (
            "def build():\n m = Sharpened(1)\n nn.init.constant_(next(m.parameters()), torch.nan)\n"
            " return m",
            r"the network of .*mine\.py:build: the weights '.*' hold NaN or infinity",
        ),
        (
            "Options = partial(Options, 4)",
            r"makes an image of shape \(96, 96, 3\) of one of \(48, 48, 3\), .* \(192, 192, 3\)",
        ),
        (
            "Sharpened.forward = lambda self, x: x.view(3)",
            r"fails on an RGB image in 0\.\.1, a tensor of shape \(1, 3, 96, 96\): RuntimeError"
        ),
        ("def build():\n m = nn.Identity()\n m.scale = 2\n return m", r"has no nn\.Conv2d"),
    ],
)  # fmt: skip
def test_networks_of_the_users_that_are_refused(users, added, message):
    with pytest.raises(ValueError, match=message):
        load_model(f"{users(USERS + added)}:build")


def test_neighbours_of_a_users_file_are_read_again(users, tmp_path):
    name = f"{users(USERS)}:build"
    before = run(load_model(name), image := torch.rand(1, 3, 12, 10))
    assert {*user_sources(name)} == {"__main__", "neighbour"}
    (tmp_path / "neighbour.py").write_text("SHARPNESS = 0.03  # less")
    assert not torch.equal(run(load_model(name), image), before)


def test_each_file_has_the_neighbours_of_its_own_folder(tmp_path, own_modules, image):
    """Those that it imports only as it is called, too."""
    names = []
    for version, sharpness in (("v1", 0.05), ("v2", 0.01)):
        (tmp_path / version / "parts").mkdir(parents=True)  # a package without an __init__.py
        (tmp_path / version / "parts" / "late.py").write_text(f"SHARPNESS = {sharpness}")
        (tmp_path / version / "neighbour.py").write_text("SHARPNESS = 9")
        text = USERS.replace(
            "    return Sharpened()",
            "    from parts.late import SHARPNESS\n    return Sharpened(SHARPNESS)",
        )
        file = tmp_path / version / "mine.py"
        file.write_text(text)
        names.append(f"{file}:build")
        assert {*user_sources(names[-1])} == {"__main__", "neighbour", "parts.late"}
    first, second = (user_function(name) for name in names)
    results = [run(build(), image) for build in (first, second, first)]
    assert not torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_neighbour_with_the_name_of_another_module(users):
    users("x = 1", "colorsys.py")
    with pytest.raises(ValueError, match=r"mine\.py imports 'colorsys' and gets .*not its neigh"):
        load_model(f"{users('import colorsys')}:build")


def test_sources_are_those_that_are_imported(users, tmp_path):
    users("import neighbour\n", "between.py")
    users("", "unused.py")
    (tmp_path / "parts").mkdir()
    users("from . import sub\n", "parts/__init__.py")
    users("", "parts/sub.py")
    text = "import torch, between\ndef f():\n    import parts\n"
    name = f"{users(text)}:f"
    found = {module: str(path.relative_to(tmp_path)) for module, path in user_sources(name).items()}
    assert found == {
        "__main__": "mine.py",
        "between": "between.py",
        "neighbour": "neighbour.py",
        "parts": "parts/__init__.py",
        "parts.sub": "parts/sub.py",
    }


def test_this_package_is_no_neighbour(users, tmp_path):
    """Imported again beside what was made of it, its classes would be others."""
    (tmp_path / "dfsq").symlink_to(Path(zoo.__file__).parents[1])
    name = f"{users('import dfsq.sr, neighbour')}:f"
    assert {*user_sources(name)} == {"__main__", "neighbour"}


def test_a_users_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.py:build: there is no file .*gone\.py$"):
        load_model(tmp_path / "gone.py:build")


# --- SRResNet with the key names of DFSQ's authors ---


def srresnet_state(scale, blocks=3, features=8):
    """Random weights under the names of their file."""
    generator = torch.Generator().manual_seed(0)

    def conv(out, size, into=features):
        return torch.randn(out, into, size, size, generator=generator) / (size * into**0.5)

    def norm(name):
        for part in ("weight", "running_var"):
            state[f"{name}.{part}"] = 0.5 + torch.rand(features, generator=generator)
        for part in ("bias", "running_mean"):
            state[f"{name}.{part}"] = torch.randn(features, generator=generator)
        state[f"{name}.num_batches_tracked"] = torch.tensor(1000)

    state = {"conv_input.weight": conv(features, 9, 3), "relu.weight": torch.tensor([0.2])}
    for i in range(blocks):
        for n in (1, 2):
            state[f"residual.{i}.conv{n}.weight"] = conv(features, 3)
            norm(f"residual.{i}.in{n}")
        state[f"residual.{i}.relu.weight"] = torch.tensor([0.1 * i])
    state["conv_mid.weight"] = conv(features, 3)
    norm("bn_mid")
    for n in range(scale // 2):
        state[f"upscale.{3 * n}.weight"] = conv(4 * features, 3)
        state[f"upscale.{3 * n + 2}.weight"] = torch.tensor([0.3])
    state["conv_output.weight"] = conv(3, 9)
    return state


def literal_srresnet(state, x, scale, blocks):
    """Their network, written with functions; RGB 0..255."""

    def conv(x, name):
        weight = state[f"{name}.weight"]
        return functional.conv2d(x, weight, padding=weight.shape[-1] // 2)

    def norm(x, name):
        parts = ("running_mean", "running_var", "weight", "bias")
        return functional.batch_norm(x, *(state[f"{name}.{part}"] for part in parts))

    def prelu(x, name):
        return torch.where(x > 0, x, state[f"{name}.weight"] * x)

    head = x = prelu(conv(x, "conv_input"), "relu")
    for block in (f"residual.{i}" for i in range(blocks)):
        y = prelu(norm(conv(x, f"{block}.conv1"), f"{block}.in1"), f"{block}.relu")
        x = x + norm(conv(y, f"{block}.conv2"), f"{block}.in2")
    x = head + norm(conv(x, "conv_mid"), "bn_mid")
    for n in range(scale // 2):
        x = functional.pixel_shuffle(conv(x, f"upscale.{3 * n}"), 2)
        x = prelu(x, f"upscale.{3 * n + 2}")
    return conv(x, "conv_output")


@pytest.mark.parametrize(("scale", "blocks"), [(2, 3), (4, 16)])
@pytest.mark.parametrize("value_range", [None, 1])
def test_srresnet_of_the_authors(scale, blocks, value_range, image):
    state = srresnet_state(scale, blocks)
    model = zoo.from_state(state, value_range)
    value_range = value_range or 255
    assert (model.scale, len(model.blocks), model.value_range) == (scale, blocks, value_range)
    expected = literal_srresnet(state, value_range * image, scale, blocks) / value_range
    torch.testing.assert_close(run(model, image), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"residual.1.conv2.weight": torch.zeros(8, 8, 5, 5)}, r"size mismatch.*blocks\.1\.conv2"),
        ({"upscale.0.weight": torch.zeros(72, 8, 3, 3)}, r"size mismatch.*upsampler\.0"),
        ({"residual.1.in2.bias": None}, r"Missing key.*blocks\.1\.bn2\.bias"),
        ({"relu.weight": None}, r"'head\.1\.weight' is missing"),
        ({"residual.0.in3.weight": torch.zeros(8)}, r"Unexpected key.*blocks\.0\.in3\.weight"),
    ],
)
def test_weights_that_are_not_the_authors_srresnet(changed, message):
    state = srresnet_state(2) | changed
    with pytest.raises(ValueError, match=f"(?s){message}"):
        zoo.from_state({key: value for key, value in state.items() if value is not None})


def test_a_checkpoint_of_training(tmp_path, embedded, image):
    checkpoint = {"epoch": 3, "state_dict": official(embedded), "optimizer": {"lr": 0.1}}
    torch.save(checkpoint, tmp_path / "model_best.pth.tar")
    model = load_model(tmp_path / "model_best.pth.tar")
    torch.testing.assert_close(run(model, image), run(embedded, image), rtol=0, atol=1e-5)


def test_an_untrained_srresnet_is_refused(tmp_path):
    torch.save({"state_dict": srresnet_state(2)}, tmp_path / "model.pth.tar")
    with pytest.raises(ValueError, match=r"value_range=255 gives .* these weights do not fit"):
        load_model(tmp_path / "model.pth.tar")


@pytest.mark.parametrize("key", ["fea_conv.weight", "block_1.esa.conv1.weight"])
def test_a_part_of_the_weights(key):
    with pytest.raises(ValueError, match=r"not whole: 'upsampler\.0\.weight' is missing"):
        zoo.from_state({key: torch.zeros(1)})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"c1.weight": (3,)}, r"'head\.0\.weight' is missing, there is c1\.weight"),
        ({"RDBs.x.convs.0.weight": (3,)}, "invalid literal"),
        ({"conv_input.weight": ()}, "out of range"),
        ({"block_1.esa.conv1.weight": (3,), "upsampler.0.weight": (3,)}, "not enough values"),
    ],
)
def test_weights_of_no_network_that_is_known(state, message, tmp_path):
    """In one line, with the file and the way out."""
    path = tmp_path / "net.pt"
    torch.save({key: torch.zeros(shape) for key, shape in state.items()}, path)
    pattern = rf"net\.pt: .*{message}.*; known are .* EDSR, RDN, .*given as FILE\.py:FUNCTION"
    with pytest.raises(ValueError, match=pattern) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)
