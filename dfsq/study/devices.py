"""The device that a long computation runs on."""

import torch


def choose_device(name=None):
    """``"cpu"`` or ``"cuda"``; a GPU by default, if there is one.

    Raises
    ------
    ValueError
        For a device that is not there.
    """
    here = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if name is not None and name not in here:
        raise ValueError(f"device must be {' or '.join(here)} on this machine, not {name!r}")
    return name or here[-1]
