"""CPU seconds of each contender on one thread, and at the end a table of their ratios."""

import numba
import pytest
import threadpoolctl
import torch

SECONDS = pytest.StashKey()


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    with threadpoolctl.threadpool_limits(1):
        yield


@pytest.fixture
def seconds(request):
    """CPU seconds by contender, for the table."""
    return request.config.stash.setdefault(SECONDS, {})


@pytest.fixture
def measure(benchmark, seconds):
    """Run a contender some rounds, keep the least time under its name, give what it returned."""

    def run(name, function, rounds=5, warmup_rounds=1):
        result = benchmark.pedantic(function, rounds=rounds, warmup_rounds=warmup_rounds)
        if benchmark.enabled:
            seconds[name] = benchmark.stats.stats.min
        return result

    return run


def pytest_terminal_summary(terminalreporter, config):
    from bench_network import RATIOS as NETWORK
    from bench_selection import RATIOS as SELECTION

    seconds = config.stash.get(SECONDS, {})
    terminalreporter.section("ratios of CPU time, one thread")
    for names, others, target in SELECTION + NETWORK:
        if not all(any(n in seconds for n in side) for side in (names, others)):
            continue
        name, other = (
            min((n for n in side if n in seconds), key=seconds.get) for side in (names, others)
        )
        found = seconds[name] / seconds[other]
        verdict = "met" if found <= target else "MISSED"
        terminalreporter.line(
            f"{name} {seconds[name]:.3g} s / {other} {seconds[other]:.3g} s = {written(found)}, "
            f"target {written(target)}: {verdict}"
        )


def written(ratio):
    return f"{ratio:.2f}" if ratio > 0.5 else f"1/{1 / ratio:.0f}"
