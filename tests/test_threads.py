"""Threads of a CPU."""

import subprocess
import sys

import pytest

FIRST_KERNELS = {
    "activations": "dfsq.activations.center_max(torch.rand(1, 2, 8, 8))",
    "histogram": "dfsq.Histogram(2).add(torch.rand(1, 2, 9))",
    "selection": "dfsq.select_channels([[0.1, 0.5], [0.2, 0.6]], bits=1)",
}


@pytest.mark.parametrize("first", FIRST_KERNELS)
def test_the_first_kernel_leaves_pytorchs_threads_alone(first):
    """As many as were asked for before, whatever numba starts."""
    script = (
        "import torch, dfsq\n"
        "count = 1 if torch.get_num_threads() > 1 else 3\n"
        "torch.set_num_threads(count)\n"
        f"{FIRST_KERNELS[first]}\n"
        "assert torch.get_num_threads() == count, torch.get_num_threads()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere OpenMP is not GNU's")
def test_a_forked_process_says_why_it_has_no_threads():
    """Rather than to be ended, for which a pool waits for ever."""
    script = (
        "import multiprocessing, numba, torch, dfsq\n"
        "x = torch.rand(1, 2, 8, 8)\n"
        "dfsq.activations.center_max(x)\n"
        "if numba.threading_layer() == 'omp':\n"
        "    with multiprocessing.get_context('fork').Pool(1) as pool:\n"
        "        try:\n"
        "            pool.apply(dfsq.activations.center_max, [x])\n"
        "        except RuntimeError as error:\n"
        "            assert \"'spawn', not 'fork'\" in str(error), error\n"
        "        else:\n"
        "            raise AssertionError('no error')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
