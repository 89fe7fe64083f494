"""Convolutions in double precision, a few rows at a time."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from dfsq.study import double
from dfsq.study.double import convolving_in_strips


@pytest.mark.parametrize("height", [1, 3, 4, 5, 8, 23])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": 1},
        {"padding": (0, 2)},
        {"padding": "same"},
        {"padding": 2, "padding_mode": "circular"},
        {"stride": 2, "padding": 1},
        {"stride": (3, 1), "padding": 2},
        {"dilation": (2, 1), "padding": 2},
        {"groups": 2, "padding": 1},
        {"bias": False, "padding": 1},
    ],
    ids=str,
)
def test_as_a_whole(height, options):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, **options).double()
    x = torch.rand(2, 4, height, 7).double()
    try:
        whole = conv(x)
    except RuntimeError:  # smaller than the kernel
        with convolving_in_strips(), pytest.raises(RuntimeError):
            conv(x)
        assert height < 3
        return
    with convolving_in_strips():
        strips = conv(x)
    torch.testing.assert_close(strips, whole, rtol=1e-13, atol=1e-13)


def test_one_pixel():
    conv = nn.Conv2d(1, 1, 1).double()
    with convolving_in_strips():
        assert conv(torch.ones(1, 1, 1, 1).double()).item() == conv.weight.item() + conv.bias.item()


def test_only_within(monkeypatch):
    monkeypatch.setattr(double, "_in_strips", None)  # cannot be called
    conv = nn.Conv2d(1, 1, 3)
    with convolving_in_strips():
        conv(torch.rand(1, 1, 5, 5))
    conv.double()(torch.rand(1, 1, 5, 5).double())
    with convolving_in_strips(), pytest.raises(TypeError):
        conv(torch.rand(1, 1, 5, 5).double())


def test_a_lone_image_and_one_given_by_name():
    x, weight = torch.rand(3, 20, 5).double(), torch.rand(2, 3, 3, 3).double()
    whole = functional.conv2d(x, weight)
    with convolving_in_strips():
        assert torch.equal(functional.conv2d(x, weight), whole)
        assert torch.equal(functional.conv2d(input=x, weight=weight), whole)
