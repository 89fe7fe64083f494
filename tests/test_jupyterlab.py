"""Interactive figures and widgets as JupyterLab draws them, in a browser, with a live kernel."""

import json
import os
import subprocess
import sys
import time
from urllib.parse import urlsplit

import nbformat
import pytest

pytestmark = pytest.mark.browser

TOKEN = "of-this-test"
#: Of JupyterLab: no news from the network, and every cell is drawn, whether it is seen or not.
SETTINGS = {
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
}

CELLS = {
    "data": """\
import numpy as np
import pandas as pd
import torch

import dfsq
from dfsq.study import distributions, figures, interactive, widgets

figures.use_style()
rng = np.random.default_rng(0)
torch.manual_seed(0)  # two channels all below zero would look alike after ReLU
table = pd.DataFrame(rng.normal(size=(3, 8))).rename_axis(index="layer", columns="channel")
images = {
    name: rng.integers(0, 256, (60, 90, 3), np.uint8)
    for name in ("original", "float", "4 bits", "2 bits")
}
rows = pd.DataFrame(
    [
        ("net", dataset, method, bits, psnr + offset)
        for dataset, offset in (("a", 0), ("b", 1))
        for method, bits, psnr in (
            ("float", 32, 33), ("bicubic", 32, 30), ("dfsq", 4, 32), ("dfsq", 2, 31), ("sq", 4, 31),
        )
        if (dataset, method) != ("b", "sq")
    ],
    columns=["model", "dataset", "method", "bits", "psnr"],
)
network = torch.nn.Sequential(torch.nn.Conv2d(1, 5, 3), torch.nn.ReLU(), torch.nn.Conv2d(5, 2, 3))
photographs = torch.rand(3, 1, 16, 16)
calibration = dfsq.calibrate(network, photographs, dfsq.Config(), progress=False)
maps = distributions.gather_maps(network, list(photographs), samples=64)
layers = list(maps)""",
    "heat map": 'interactive.show(interactive.heat_map(table, "unit", text="%{z}"), "a heat map")',
    "flip": 'interactive.show(interactive.flip(images, (9, 9, 32), "float", 90), "crops")',
    "lines": """\
part = rows[(rows.dataset == "a") & rows.method.isin(["dfsq", "sq"])]
interactive.show(interactive.psnr_by_bits(part, {"float": 33, "bicubic": 30}), "lines")""",
    "distributions": 'widgets.distributions(maps, ["astronaut", "coffee", "chelsea"])',
    "selection": "widgets.selection(calibration)",
    "crops": "widgets.crops(images, (9, 9, 32), 2, 90)",
    "psnr_by_bits": "widgets.psnr_by_bits(rows)",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory, repository):
    """Address of a JupyterLab of this test's own, in a folder with one notebook."""
    folder = tmp_path_factory.mktemp("lab")
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS.values()]
    (folder / "root").mkdir()
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, folder / "root" / "figures.ipynb")
    for name, settings in SETTINGS.items():
        path = folder / "settings" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
    homes = ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    own = {name: str(folder / name.lower()) for name in homes}
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port=0",
        f"--IdentityProvider.token={TOKEN}", "--LabApp.expose_app_in_browser=True",
        f"--LabApp.user_settings_dir={folder / 'settings'}",
        f"--LabApp.workspaces_dir={folder / 'workspaces'}", "--LabApp.extension_manager=readonly",
        f"--ServerApp.root_dir={folder / 'root'}",
    ]  # fmt: skip
    path = os.pathsep.join(filter(None, (str(repository), os.environ.get("PYTHONPATH"))))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=os.environ | own | {"PYTHONPATH": path}, stdout=log, stderr=log
        )
    try:
        # The port is one that was free; the server writes it into a file that is empty at first.
        files = folder / "jupyter_runtime_dir"
        found = ""
        while not found.strip().endswith("}"):
            found = "".join(file.read_text() for file in files.glob("jpserver-*.json"))
            if process.poll() is not None:
                pytest.fail((folder / "log").read_text())
            time.sleep(0.2)
        yield json.loads(found)["url"]
    finally:
        process.terminate()  # its kernel ends with it
        process.wait()


@pytest.fixture(scope="module")
def page(browser, server, watched):
    """The notebook in JupyterLab, all of its cells run."""
    context = browser.new_context(viewport={"width": 1400, "height": 1100})
    page = context.new_page()
    page.set_default_timeout(120_000)

    def is_local(address):
        parts = urlsplit(address)
        return parts.scheme in ("data", "blob") or parts.netloc == urlsplit(server).netloc

    watched(page, is_local)
    page.goto(f"{server}lab/tree/figures.ipynb?token={TOKEN}")
    page.wait_for_selector(".jp-NotebookPanel .jp-CodeCell")
    kernel = "globalThis.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel"
    page.wait_for_function(f"Boolean({kernel})")
    page.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
    ran = """count => {
        const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')]
        return prompts.filter(p => /\\[\\d+\\]/.test(p.textContent)).length == count
    }"""
    page.wait_for_function(ran, arg=len(CELLS))
    yield page
    context.close()


@pytest.fixture
def cell(page):
    """Find a cell by its name, and see that nothing went wrong while it was looked at."""

    def cell(name):
        found = page.locator(".jp-CodeCell").nth(list(CELLS).index(name))
        found.scroll_into_view_if_needed()
        return found

    yield cell
    said = "[data-mime-type$='.stderr'], [data-mime-type$='.error']"
    assert page.locator(said).all_inner_texts() == []
    assert page.troubles == []


# What is drawn in a cell: the pictures, and the lines of Plotly's figures; nothing while one is
# being drawn.
DRAWN = """cell => {
    const seen = [...cell.querySelectorAll('.jp-RenderedImage img, .js-plotly-plot')]
    const drawn = (e) => e.src ?? (e.querySelector('.main-svg') &&
        JSON.stringify(e.data.map(({ name, y, visible }) => [name, y, visible])))
    return seen.every(drawn) ? seen.map(drawn).join() : ''
}"""


def wait_until_drawn(page, cell, other_than=""):
    """What is drawn in a cell, once something is, and another thing than it was."""
    ready = f"""([cell, before]) => {{
        const now = ({DRAWN})(cell)
        return now && now != before && now
    }}"""
    return page.wait_for_function(ready, arg=[cell.element_handle(), other_than]).json_value()


def move(slider):
    """One step to the right, once the slider's range, which may follow another control, allows it.

    JupyterLab takes the keyboard for itself now and then: a press that it took is repeated.
    """

    def now():
        return float(slider.get_attribute("aria-valuenow"))

    before = now()
    for _ in range(100):
        if before < float(slider.get_attribute("aria-valuemax")):
            slider.press("ArrowRight")
        slider.page.wait_for_timeout(200)
        if now() > before:
            return
    pytest.fail(f"the slider stays at {before:g}: {slider.evaluate('e => e.outerHTML')}")


@pytest.mark.parametrize("name", ["heat map", "flip", "lines"])
def test_plotly_figures_are_drawn(page, cell, name):
    here = cell(name)
    before = wait_until_drawn(page, here)
    assert here.locator(".jp-RenderedPlotly").count() == 1  # by the extension, not from the HTML
    slider = here.locator(".slider-rail-touch-rect")
    assert slider.count() == (name == "flip")
    if name == "flip":
        box = slider.bounding_box()
        page.mouse.click(box["x"] + box["width"] - 2, box["y"] + box["height"] / 2)
        wait_until_drawn(page, here, before)


@pytest.mark.parametrize(
    ("name", "labels", "moves"),
    [
        (
            "distributions",
            ["layer", "channel", "normalization"],
            [("select", 0, "2"), ("slider", 0), ("select", 1, "per image")],
        ),
        (
            "selection",
            ["layer", "channel", "bits", "universal set"],
            [("select", 0, "2"), ("slider", 0), ("slider", 1), ("select", 1, "SQ")],
        ),
        (
            "crops",
            ["result", "x", "y", "size"],
            [("select", 0, "4 bits"), ("slider", 0), ("slider", 1), ("slider", 2)],
        ),
        (
            "psnr_by_bits",
            ["network, data set"],
            [("box", 1), ("select", 0, "net, b"), ("box", 0)],
        ),
    ],
)
def test_moving_a_control_draws_again(page, cell, name, labels, moves):
    here = cell(name)
    drawn = wait_until_drawn(page, here)
    shown = here.locator("label.widget-label").all_inner_texts()
    assert [label for label in shown if label.strip("\u200b")] == labels  # not those of boxes
    for kind, place, *value in moves:
        if kind == "select":
            here.locator("select").nth(place).select_option(*value)
        elif kind == "slider":
            move(here.locator("[role=slider]").nth(place))
        else:
            here.locator("[type=checkbox]").nth(place).click()
        drawn = wait_until_drawn(page, here, drawn)
    if name == "psnr_by_bits":  # no row of the second method stands on the second data set
        assert here.locator("[type=checkbox]").nth(1).is_disabled()
