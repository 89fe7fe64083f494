"""Energy of hypothetical hardware: counted by hand, and bounded on both sides."""

import numpy as np
import pandas as pd
import pytest

from dfsq import cost
from dfsq.study import hardware

LAYERS = pd.DataFrame(
    {
        "layer": ["a", "b"],
        "macs": [9000, 9000],
        "partial_sums": [1000, 1000],
        "inputs": [100, 100],
        "outputs": [100, 100],
        "weights": [90, 90],
        "non_negative": [False, True],
    }
)


def counts(name, part=None):
    table = hardware.arithmetic(hardware.SCHEMES[name], LAYERS, 2.5, 1.5)
    return table if part is None else table[table.part == part]


def bits(name, wide_bits=16):
    table = hardware.traffic(hardware.SCHEMES[name], LAYERS, wide_bits)
    return table.set_index("part").bits.to_dict()


def test_every_energy_has_a_source():
    table = pd.read_csv(hardware.ENERGY_FILE)
    assert table.operation.is_unique
    assert (table.picojoules > 0).all()
    for column in ("what", "process", "source", "citation"):
        assert (table[column].str.len() > 0).all(), column


@pytest.mark.parametrize("name", hardware.SCHEMES)
@pytest.mark.parametrize("memory", hardware.MEMORIES)
def test_every_scheme_can_be_priced(name, memory):
    scheme = hardware.SCHEMES[name]
    for table in (counts(name), hardware.traffic(scheme, LAYERS, 16, memory)):
        found = cost.energy(table, hardware.energies())
        assert (found["least"] <= found["most"]).all()
        assert found["most"].sum() > 0


def test_each_product_is_accumulated_once():
    for name in hardware.SCHEMES:
        table = counts(name)
        sums = table[table.part == "accumulation"]["count"].sum()
        scaled = table[table.part == "scaling of partial sums"]
        assert sums + scaled["count"].sum() / 2 == 18000, name


def test_only_scales_of_channels_reach_the_partial_sums():
    scaled = {
        name: counts(name, "scaling of partial sums")["count"].sum() for name in hardware.SCHEMES
    }
    assert scaled["uniform 8, static"] == scaled["float 32"] == 0
    assert scaled["uniform 4, static channels"] == 4000
    assert scaled["uniform 4, dynamic"] == scaled["DFSQ 4, multiplier"] == 4000
    assert scaled["DFSQ 4, scales in weights"] == 0
    folded = counts("DFSQ 4, scales in weights", "scaling of weights")
    assert folded["count"].tolist() == [180]


def test_shifts_and_adds_by_hand():
    part = cost.energy(counts("DFSQ 4, shifts and adds", "multiplications"), {"add-16": 0.05})
    assert part["least"].sum() == pytest.approx(18000 * 1.5 * 0.05e-12)
    assert part["most"].sum() == pytest.approx(18000 * 4 * 0.05e-12)


def test_dynamic_maps_move_unquantized():
    # the stream: written for the skip, read for it, read for the layer; the other: written, read
    assert bits("float 32") == {"maps": 32 * 300, "skip connections": 6400, "weights": 5760}
    assert bits("DFSQ 4, multiplier") == {
        "maps": 16 * 300, "skip connections": 3200, "weights": 720,
    }  # fmt: skip
    assert bits("uniform 4, static")["maps"] == 4 * 400
    assert bits("uniform 4, static channels") == bits("uniform 4, static")
    assert bits("DFSQ 4, multiplier", 32)["maps"] == bits("float 32")["maps"]


def test_accesses_are_of_64_bits():
    scheme = hardware.SCHEMES["uniform 8, static"]
    table = hardware.traffic(scheme, LAYERS, 16, "cache-1M")
    found = cost.energy(table, hardware.energies())
    assert np.allclose(found["least"], table.bits / 64 * 100e-12)


def test_an_unknown_memory_is_refused():
    scheme = hardware.SCHEMES["float 32"]
    with pytest.raises(ValueError, match="memory must be one of dram, cache-1M, not 'disk'"):
        hardware.traffic(scheme, LAYERS, 16, "disk")
