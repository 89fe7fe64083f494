"""Energy that hardware would take for a network's quantized layers, in bounds.

A scheme is counted by what it does to one image. Every operation is priced by a published figure;
where there is none, by two between which it is taken to lie.
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

ENERGY_FILE = Path(__file__).resolve().parents[2] / "data" / "energy.csv"

#: Bounds of a read or write of 64 bits, by where the maps lie; a write is priced as a read.
MEMORIES = {"dram": ("dram-least", "dram-most"), "cache-1M": ("cache-1M", "cache-1M")}
ACCESS = 64
HALF_OR_SINGLE = {
    "multiply": ("float-multiply-16", "float-multiply-32"),
    "add": ("float-add-16", "float-add-32"),
}


@dataclass(frozen=True)
class Scheme:
    """How a datapath multiplies, and what it does around that.

    Attributes
    ----------
    bits : int
        Of a value that is multiplied.
    multiply : pair of str, optional
        Bounds of one multiplication; without them, shifts and additions of universal points.
    add : pair of str
        Bounds of one accumulation.
    dynamic : bool
        Statistics of each map at run time, as in DFSQ.
    codebook : bool
        Codes are looked up in tables.
    scales : {"layer", "channel", "weights"}
        One scale for a layer's inputs; one for each input channel, by which partial sums are
        multiplied; or these multiplied into weights of 16 bits, for each image anew.
    """

    bits: int
    multiply: tuple | None = None
    add: tuple = ("add-32", "add-32")
    dynamic: bool = False
    codebook: bool = False
    scales: str = "layer"

    @property
    def is_float(self):
        """Whether nothing is quantized."""
        return self.add[0].startswith("float")


#: By name. A multiplication by 4 bits lies between one addition, as 4 bits with sign are at most
#: two signed powers of two, and 8 by 8 bits, with more one-bit products than 4 by 4 or 4 by 11.
SCHEMES = {
    "float 32": Scheme(32, ("float-multiply-32",) * 2, ("float-add-32",) * 2),
    "float 16": Scheme(16, ("float-multiply-16",) * 2, HALF_OR_SINGLE["add"]),
    "uniform 8, static": Scheme(8, ("multiply-8",) * 2),
    "uniform 4, static": Scheme(4, ("add-8", "multiply-8")),
    "uniform 4, static channels": Scheme(4, ("add-8", "multiply-8"), scales="channel"),
    "uniform 4, dynamic": Scheme(4, ("add-8", "multiply-8"), dynamic=True, scales="channel"),
    "DFSQ 4, multiplier": Scheme(
        4, ("add-16", "multiply-8"), dynamic=True, codebook=True, scales="channel"
    ),
    "DFSQ 4, shifts and adds": Scheme(4, dynamic=True, codebook=True, scales="channel"),
    "DFSQ 4, scales in weights": Scheme(4, dynamic=True, codebook=True, scales="weights"),
}  # fmt: skip


def energies():
    """Published picojoules of one operation, by name.

    Returns
    -------
    dict of str to float
        Each with its source in ``data/energy.csv``.
    """
    return pd.read_csv(ENERGY_FILE).set_index("operation").picojoules.to_dict()


def arithmetic(scheme, layers, shifts, adds):
    """Operations of a scheme on one image.

    Parameters
    ----------
    scheme : Scheme
    layers : pandas.DataFrame
        Rows of :func:`dfsq.cost.operations`.
    shifts, adds : float
        A multiplication by a universal point, on average.

    Returns
    -------
    pandas.DataFrame
        ``part``, ``count``, ``least`` and ``most``, as :func:`dfsq.cost.energy` takes them.
    """
    total = layers[["macs", "partial_sums", "inputs", "outputs", "weights"]].sum()
    rows = []

    def row(part, count, least, most):
        rows.append({"part": part, "count": float(count), "least": least, "most": most})

    if scheme.multiply:
        row("multiplications", total.macs, *scheme.multiply)
    else:  # a shift by a variable amount is a multiplexer: less than an addition of its width
        width = "add-32" if scheme.scales == "weights" else "add-16"
        row("multiplications", adds * total.macs, width, width)
        row("multiplications", shifts * total.macs, "none", width)
    scaled = total.partial_sums if scheme.scales == "channel" else 0
    row("accumulation", total.macs - scaled, *scheme.add)
    if scheme.is_float:
        return pd.DataFrame(rows)
    if scaled:
        row("scaling of partial sums", scaled, *HALF_OR_SINGLE["multiply"])
        row("scaling of partial sums", scaled, *HALF_OR_SINGLE["add"])
    if not scheme.dynamic:
        row("scaling of outputs", total.outputs, "multiply-32", "multiply-32")
        row("scaling of outputs", total.outputs, "add-32", "add-32")
        return pd.DataFrame(rows)
    if scheme.scales == "weights":
        row("scaling of weights", total.weights, *HALF_OR_SINGLE["multiply"])
    row("scaling of outputs", total.outputs, *HALF_OR_SINGLE["multiply"])
    row("statistics, look-up", 3 * total.inputs, "add-32", "float-add-32")
    row("statistics, look-up", total.inputs, *HALF_OR_SINGLE["add"])
    row("statistics, look-up", total.inputs, *HALF_OR_SINGLE["multiply"])
    if scheme.codebook:  # the code's table, and the point's
        row("statistics, look-up", total.inputs, "cache-8K", "cache-8K")
        row("statistics, look-up", total.inputs, "none", "cache-8K")
    return pd.DataFrame(rows)


def traffic(scheme, layers, wide_bits, memory="dram"):
    """Reads and writes of a scheme for one image, whole maps being stored between layers.

    Parameters
    ----------
    scheme : Scheme
    layers : pandas.DataFrame
        As for :func:`arithmetic`, and with a column ``non_negative``: an input without it enters
        a residual block, and is read once more for the skip connection.
    wide_bits : int
        Of a value that is not quantized yet, or is not at all as on skip connections; float
        networks have their own width.
    memory : {"dram", "cache-1M"}

    Returns
    -------
    pandas.DataFrame
        ``part``, ``bits``; ``count``, ``least`` and ``most``, as :func:`dfsq.cost.energy` takes
        them.

    Raises
    ------
    ValueError
        For another memory.

    Notes
    -----
    A map with dynamic statistics is known only once it is complete. So it is written before it is
    quantized, and quantized as it is read; with static ranges codes are written and read.
    """
    if memory not in MEMORIES:
        raise ValueError(f"memory must be one of {', '.join(MEMORIES)}, not {memory!r}")
    wide = scheme.bits if scheme.is_float else wide_bits
    inner = layers.inputs[layers.non_negative].sum()
    stream = layers.inputs.sum() - inner
    if scheme.is_float or scheme.dynamic:
        maps = wide * (stream + 2 * inner)  # the stream is written for the skip connection
    else:
        maps = 2 * scheme.bits * (stream + inner)
    bits = {
        "maps": maps,
        "skip connections": 2 * wide * stream,
        "weights": scheme.bits * layers.weights.sum(),
    }
    table = pd.DataFrame({"part": list(bits), "bits": [float(b) for b in bits.values()]})
    least, most = MEMORIES[memory]
    return table.assign(count=table.bits / ACCESS, least=least, most=most)
