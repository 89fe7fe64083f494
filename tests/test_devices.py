"""The device of a long computation."""

import pytest
import torch

from dfsq.study.devices import choose_device

FLAGS = (torch.backends.cudnn, torch.backends.cuda.matmul)


@pytest.fixture
def gpu(monkeypatch):
    """A machine that seems to have a GPU, with TF32 allowed; both flags are put back."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = tf32()
    for flag in FLAGS:
        flag.allow_tf32 = True
    yield
    for flag, value in zip(FLAGS, before, strict=True):
        flag.allow_tf32 = value


def tf32():
    return tuple(flag.allow_tf32 for flag in FLAGS)


@pytest.mark.parametrize("name", [None, "cuda"])
def test_float32_is_float32_on_a_gpu(gpu, name):
    assert choose_device(name) == "cuda"
    assert tf32() == (False, False)


def test_a_cpu_changes_no_flag(gpu):
    assert choose_device("cpu") == "cpu"
    assert tf32() == (True, True)


def test_a_device_that_is_not_there(gpu):
    with pytest.raises(ValueError, match="device must be cpu or cuda on this machine, not 'tpu'"):
        choose_device("tpu")
