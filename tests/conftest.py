"""What several test modules need."""

import os
import shutil
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numba
import pytest
import torch

from dfsq.threads import start_threads

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    share = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    start_threads()
    numba.set_num_threads(min(share, numba.get_num_threads()))
    torch.set_num_threads(share)


@pytest.fixture(scope="session")
def repository():
    """The root of the checkout."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def dfsq_data():
    """Folder of benchmark images and published weights, named by ``DFSQ_DATA``.

    Without the variable its tests are skipped; with ``DFSQ_REQUIRE_DATA=1`` they fail, so that a
    machine that should have the data cannot pass by missing it.
    """
    folder = os.environ.get("DFSQ_DATA")
    if folder and Path(folder).is_dir():
        return Path(folder)
    reason = f"DFSQ_DATA names no folder: {folder}" if folder else "DFSQ_DATA is not set"
    if os.environ.get("DFSQ_REQUIRE_DATA") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_session(tmp_path_factory):
    """Selections are remembered in a folder of this run, not in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DFSQ_CACHE", str(tmp_path_factory.mktemp("dfsq-cache")))
        yield


@pytest.fixture
def own_modules(tmp_path, monkeypatch):
    """Modules whose files a test has written, and the path to them, are forgotten after it.

    ``sys.modules`` stays the same dict: with another in its place, imports within imports fail.
    """
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name, module in [*sys.modules.items()]:
        file = getattr(module, "__file__", None)
        if file and Path(file).is_relative_to(tmp_path):
            del sys.modules[name]


@pytest.fixture(scope="module")
def one_thread():
    """For modules of tiny networks, where waiting for a second thread on a busy machine is all."""
    threads = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    yield
    torch.set_num_threads(threads[0])
    numba.set_num_threads(threads[1])


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium of the system's, driven by playwright.

    Without one its tests are skipped; with ``DFSQ_REQUIRE_BROWSER=1`` they fail.
    """
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        reason = f"no browser is installed: none of {', '.join(names)} is on the path"
        if os.environ.get("DFSQ_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        # Containers forbid the sandbox; the pages are the project's own.
        found = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="session")
def watched():
    """A function that notes a page's troubles: scripts that fail, requests that leave the machine.

    It takes the page and a function of an address, whether that is of this machine.
    """

    def watch(page, is_local):
        page.troubles = []

        def local_only(route):
            if is_local(route.request.url):
                route.continue_()
            else:
                page.troubles.append(f"leaves the machine: {route.request.url}")
                route.abort()

        page.route("**/*", local_only)
        page.on("pageerror", lambda error: page.troubles.append(f"script: {error}"))

    return watch


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="session")
def book(repository):
    """Address of the built book, served on this machine; ``make test-book`` builds it first."""
    folder = repository / "_build" / "html"
    if not (folder / "index.html").is_file():
        pytest.fail(f"there is no built book in {folder}: make book")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=folder))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()
