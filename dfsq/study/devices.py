"""The device that a long computation runs on."""

import torch


def choose_device(name=None):
    """``"cpu"`` or ``"cuda"``; a GPU by default, if there is one.

    On a GPU convolutions and matrix products in float32 are made to be in float32: by default they
    are in TF32, of 10 bits after the point, and what is measured would not be what its row says.

    Raises
    ------
    ValueError
        For a device that is not there.
    """
    here = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if name is not None and name not in here:
        raise ValueError(f"device must be {' or '.join(here)} on this machine, not {name!r}")
    device = name or here[-1]
    if device == "cuda":
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
    return device
