"""EDSR's form: names, sizes, and what it computes."""

import pytest
import torch
from torch.nn import functional

from dfsq.calibration import find_layers
from dfsq.config import Config
from dfsq.sr.models.edsr import DIV2K_MEAN, EDSR


def literal_forward(state, x, blocks, steps, residual_scale, value_range):
    """EDSR-PyTorch, written with functions."""

    def conv(x, name):
        return functional.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)

    mean = value_range * torch.tensor(DIV2K_MEAN).view(1, 3, 1, 1)
    head = conv(x * value_range - mean, "head.0")
    features = head
    for i in range(blocks):
        residual = conv(features, f"body.{i}.body.0").relu()
        features = features + residual_scale * conv(residual, f"body.{i}.body.2")
    features = head + conv(features, f"body.{blocks}")
    for i, step in enumerate(steps):
        features = functional.pixel_shuffle(conv(features, f"tail.0.{2 * i}"), step)
    return (conv(features, "tail.1") + mean) / value_range


@pytest.mark.parametrize(("scale", "steps"), [(2, [2]), (3, [3]), (4, [2, 2])])
@pytest.mark.parametrize("value_range", [1.0, 255.0])
@pytest.mark.parametrize("residual_scale", [1.0, 0.1])
def test_forward(scale, steps, value_range, residual_scale):
    torch.manual_seed(0)
    model = EDSR(scale, 3, 8, residual_scale, value_range).eval()
    x = torch.rand(2, 3, 7, 9)
    with torch.no_grad():
        result = model(x)
        expected = literal_forward(model.state_dict(), x, 3, steps, residual_scale, value_range)
    assert result.shape == (2, 3, 7 * scale, 9 * scale)
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("scale", "tail"), [(2, ["0.0", "1"]), (3, ["0.0", "1"]), (4, ["0.0", "0.2", "1"])]
)
def test_names_are_those_of_edsr_pytorch(scale, tail):
    layers = ["head.0"]
    layers += [f"body.{i}.body.{j}" for i in range(5) for j in (0, 2)]
    layers += ["body.5", *(f"tail.{t}" for t in tail)]
    expected = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    assert list(EDSR(scale, 5, 4).state_dict()) == expected


def test_the_papers_network():
    model = EDSR()
    assert sum(p.numel() for p in model.parameters()) == 1_369_859
    layers = find_layers(model, Config())
    assert list(layers) == [f"body.{i}.body.{j}" for i in range(16) for j in (0, 2)]
    assert sum(layer.in_channels for layer in layers.values()) == 2048


def test_unknown_scale():
    with pytest.raises(ValueError, match="scale must be 2, 3 or 4, not 5"):
        EDSR(5)
