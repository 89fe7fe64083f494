"""Whole numbers in as few bits as their range needs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfsq.packing import BLOCK, pack, packed_bytes, unpack


@given(st.integers(1, 400), st.integers(0, 3 * BLOCK), st.integers(0, 2**32 - 1))
def test_back_again(base, count, seed):
    digits = np.random.default_rng(seed).integers(0, base, count)
    packed = pack(digits, base)
    assert packed.dtype == np.uint8
    assert len(packed) == packed_bytes(count, base)
    assert np.array_equal(unpack(packed, count, base), digits)


@pytest.mark.parametrize("base", [2, 3, 4, 11, 16, 100, 256, 377])
def test_size_is_the_entropy_but_for_a_byte_a_block(base):
    count = 10 * BLOCK + 7
    assert 0 <= packed_bytes(count, base) - count * np.log2(base) / 8 < 11


def test_one_base_takes_no_room():
    assert packed_bytes(1000, 1) == 0
    assert unpack(pack(np.zeros(1000, int), 1), 1000, 1).tolist() == [0] * 1000


def test_nothing():
    assert pack([], 16).shape == unpack([], 0, 16).shape == (0,)


@pytest.mark.parametrize("digit", [-1, 16])
def test_a_digit_out_of_range(digit):
    with pytest.raises(ValueError, match=r"digits must lie in 0\.\.15"):
        pack([3, digit], 16)


def test_another_number_of_bytes():
    with pytest.raises(ValueError, match="4 digits to base 16 take 2 bytes, not 3"):
        unpack([1, 2, 3], 4, 16)


def test_what_no_digits_give():
    with pytest.raises(ValueError, match="more than 3 digits to base 3"):
        unpack([255], 3, 3)
