"""Networks by name and from files, and what is refused."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dfsq.sr import zoo
from dfsq.sr.datasets import load_dataset
from dfsq.sr.imaging import imresize, psnr_y, to_image, to_tensor
from dfsq.sr.models.edsr import EDSR
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


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_text_file(tmp_path, suffix):
    (tmp_path / f"edsr.{suffix}").write_text("no weights")
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
