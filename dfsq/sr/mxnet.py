"""Reads MXNet's parameter files: a short binary list of named arrays."""

import struct
from pathlib import Path

import numpy as np
import torch

LIST_MAGIC = 0x112
ARRAY_MAGIC = 0xF993FAC9  # version 2: storage type, then 64-bit dimensions
FLOAT32 = 0


def read_mxnet(path):
    """Named arrays of an MXNet ``.params`` file.

    Parameters
    ----------
    path : path

    Returns
    -------
    dict of str to float32 tensor
        Without the prefixes ``arg:`` and ``aux:`` of the names.

    Raises
    ------
    ValueError
        If the file is damaged, cut short, or holds anything but dense float32 arrays.
    """
    data, position = Path(path).read_bytes(), 0

    def take(form):
        nonlocal position
        values = struct.unpack_from("<" + form, data, position)
        position += struct.calcsize("<" + form)
        return values if len(values) > 1 else values[0]

    try:
        magic, _, count = take("QQQ")
        if magic != LIST_MAGIC:
            raise ValueError("no list of arrays")
        arrays = []
        for _ in range(count):
            magic, storage, dimensions = take("IiI")
            if magic != ARRAY_MAGIC or storage != 0:
                raise ValueError("an array of a kind other than dense")
            shape = struct.unpack_from(f"<{dimensions}q", data, position)
            position += 8 * dimensions
            _, _, kind = take("iii")  # two words of device
            if kind != FLOAT32:
                raise ValueError("an array that is not float32")
            size = int(np.prod(shape))
            arrays.append(np.frombuffer(data, "<f4", size, position).reshape(shape))
            position += 4 * size
        names = []
        for _ in range(take("Q")):
            length = take("Q")
            names.append(data[position : position + length].decode())
            position += length
        if len(names) != count or position != len(data):
            raise ValueError("names and arrays do not match")
    except (struct.error, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or no MXNet parameter file: {error}") from None
    return {
        name.split(":", 1)[-1]: torch.from_numpy(array.copy())
        for name, array in zip(names, arrays, strict=True)
    }
