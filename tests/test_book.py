"""The built book as its readers meet it: in a browser, with nothing but the book's own files.

``make test-book`` builds the book and runs these; ``make test`` leaves them out.
"""

import os
import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import nbformat
import pytest
import yaml
from axe_playwright_python.sync_playwright import Axe
from bs4 import BeautifulSoup

import dodo

ROOT = Path(__file__).resolve().parents[1]
HTML = ROOT / "_build" / "html"
CONTENTS = yaml.safe_load((ROOT / "_toc.yml").read_text())
CHAPTERS = [CONTENTS["root"]] + [c["file"] for p in CONTENTS["parts"] for c in p["chapters"]]
NOTEBOOKS = [name for name in CHAPTERS if name.startswith("notebooks/")]
PAGES = [*CHAPTERS, "genindex", "prf-prf", "py-modindex", "search"]
MEGABYTE = 1_000_000
OFF = {"enabled": False}  # a rule of axe

pytestmark = pytest.mark.browser


@cache
def soup(name):
    """A page's HTML, parsed."""
    return BeautifulSoup((HTML / f"{name}.html").read_bytes(), "html.parser")


@pytest.fixture
def visit(browser, book, watched):
    """Open a page; what went wrong while it loaded is in its attribute ``troubles``."""
    contexts = []

    def opened(name, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        watched(page, lambda address: address.startswith((book, "data:", "blob:")))
        page.on("requestfailed", lambda r: page.troubles.append(f"failed: {r.url} {r.failure}"))
        page.on("response", lambda r: r.ok or page.troubles.append(f"{r.status}: {r.url}"))
        page.on(
            "console",
            lambda m: m.type in ("error", "warning") and page.troubles.append(f"console: {m.text}"),
        )
        page.goto(f"{book}/{name}.html", wait_until="networkidle")
        page.wait_for_load_state("load")  # on a busy machine the network may be idle before
        if soup(name).select(".math"):
            page.evaluate("MathJax.startup.promise")
        return page

    yield opened
    for context in contexts:
        context.close()


def test_every_page_is_tested():
    built = {str(p.relative_to(HTML).with_suffix("")) for p in HTML.rglob("*.html")}
    assert {name for name in built if not name.startswith("_static/")} - {"index"} == set(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_loads_in_full_from_this_machine(visit, name):
    page = visit(name)
    # What loads only when it is seen is loaded too.
    page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    page.wait_for_timeout(500)
    assert not page.troubles
    broken = "[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
    assert not page.evaluate(broken)


def test_the_first_page_is_found(visit):
    page = visit("index")
    page.wait_for_url("**/book/intro.html")
    assert "Subset quantization" in page.title()


@pytest.mark.parametrize("name", CHAPTERS)
def test_mathematics_is_rendered(visit, name):
    formulas = len(soup(name).select(".bd-article .math"))
    state = visit(name).evaluate(
        r"""() => {
            const formulas = [...document.querySelectorAll('.bd-article .math')]
            const rendered = formulas.filter(f => f.querySelector('mjx-container svg'))
            const faults = [...document.querySelectorAll('[data-mjx-error], mjx-merror')]
            const article = document.querySelector('.bd-article').cloneNode(true)
            article.querySelectorAll('pre, code, script, style').forEach(e => e.remove())
            return {formulas: formulas.length, rendered: rendered.length, faults: faults.length,
                    text: article.textContent}
        }"""
    )
    assert (state["formulas"], state["rendered"], state["faults"]) == (formulas, formulas, 0)
    raw = re.findall(r".{0,30}(?:\\\(|\\\[|\$\$|\$[^$\s][^$]*\$).{0,30}", state["text"])
    assert not raw


def test_some_pages_have_mathematics():
    assert len(soup("book/method").select(".bd-article .math")) > 20


@pytest.mark.parametrize("name", CHAPTERS)
def test_formulas_can_be_read(visit, name):
    """None lies under its number, and none is cut; on narrow pages those set apart may scroll."""
    page = visit(name)
    for width in (1280, 800, 390):
        page.set_viewport_size({"width": width, "height": 900})
        faults = page.evaluate(
            """scrolling => [...document.querySelectorAll('.bd-article .math')].filter(box => {
                const formula = box.querySelector('svg').getBoundingClientRect()
                const number = box.querySelector('.eqno')?.getBoundingClientRect()
                const under = number &&
                    formula.right > number.left && formula.left < number.right &&
                    formula.bottom > number.top && formula.top < number.bottom
                const cut = formula.right > box.getBoundingClientRect().right + 1
                return under || (cut && !(scrolling && box.matches('div')))
            }).map(box => box.id || box.querySelector('mjx-assistive-mml')?.textContent)""",
            width < 1280,
        )
        assert not faults, width


def test_search_finds_a_term(visit):
    page = visit("search")
    page.goto(f"{page.url}?q=universal+set")
    page.wait_for_selector("#search-results ul.search li")
    page.wait_for_function("/found|finished/i.test(document.body.innerText)")
    links = page.locator("#search-results ul.search li a")
    found = links.evaluate_all("all => all.map(a => a.href)")
    assert any("/book/method.html" in address for address in found)
    assert not page.troubles


def grave_violations(page, options, leave_out=None):
    """What axe finds that is serious or critical."""
    return [
        f"{violation['id']}: {node['target']} {node['failureSummary']}"
        for violation in Axe().run(page, leave_out, options).response["violations"]
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]


@pytest.mark.parametrize("name", PAGES)
def test_is_accessible_and_fits_the_window(visit, name):
    page = visit(name)
    # What is folded away is read too.
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    for scheme, width in (("light", 1280), ("dark", 1280), ("light", 390), ("dark", 390)):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 844})
        page.wait_for_function(f"document.documentElement.dataset.theme == '{scheme}'")
        for _ in range(10):  # the theme finds what scrolls in its own time
            page.wait_for_timeout(500)
            if not (grave := grave_violations(page, {"rules": {"color-contrast": OFF}})):
                break
        # Half a minute on a long page, and an article's colours are the scheme's at any width.
        leave_out = {"exclude": [".bd-article"]} if width < 1280 else None
        grave += grave_violations(page, {"runOnly": ["color-contrast"]}, leave_out)
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width
        assert not grave, "\n".join([f"{scheme}, {width} px", *grave])


@pytest.mark.parametrize("name", PAGES)
def test_internal_links_lead_somewhere(name):
    here = f"{name}.html"
    lost = []
    for link in soup(name).select("a[href]"):
        target = urlsplit(urljoin(f"http://book/{here}", link["href"]))
        if target.netloc != "book":
            assert target.scheme in ("https", "mailto"), link
            continue
        path = unquote(target.path).lstrip("/")
        if not (HTML / path).is_file():
            lost.append(link["href"])
        elif target.fragment and path.endswith(".html"):
            anchor = unquote(target.fragment)
            there = soup(path.removesuffix(".html"))
            if not there.find(id=anchor) and not there.find("a", attrs={"name": anchor}):
                lost.append(link["href"])
    assert not lost


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_can_be_downloaded_and_launched(name):
    buttons = [link["href"] for link in soup(name).select(".article-header-buttons a[href]")]
    (notebook,) = [href for href in buttons if href.endswith(f"_sources/{name}.ipynb")]
    assert nbformat.read(HTML / "notebooks" / notebook, as_version=4).cells
    launching = [href for href in buttons if re.match(r"https://(mybinder|colab)\.", href)]
    address = dodo.repository(os.environ)
    owner_and_name = "/".join((address or "").split("/")[-2:])
    if address is None:
        assert not launching
        return
    assert launching
    for href in launching:
        assert f"/{owner_and_name}/" in href
        assert href.endswith(f"/{name}.ipynb")
        assert dodo.LAUNCH_BRANCH in href


@pytest.mark.parametrize("name", CHAPTERS)
def test_interactive_figures_answer(name, request):
    if not soup(name).select(".plotly-graph-div"):
        return
    page = request.getfixturevalue("visit")(name)
    figures = page.locator(".plotly-graph-div")
    for i in range(figures.count()):
        figure = figures.nth(i)
        figure.scroll_into_view_if_needed()
        assert figure.locator(".main-svg").count(), "not drawn"
        steps = figure.locator(".slider-rail-touch-rect")
        if steps.count():
            pictures = "f => [...f.querySelectorAll('.mlayer image')].map(i => i.href.baseVal)"
            before = figure.evaluate(pictures)
            box = steps.first.bounding_box()
            page.mouse.click(box["x"] + box["width"] - 2, box["y"] + box["height"] / 2)
            page.wait_for_timeout(500)
            assert figure.evaluate(pictures) != before, "the slider changes nothing"
        entries = figure.locator(".legendtoggle")
        if entries.count():
            entries.first.click()
            page.wait_for_timeout(800)  # a second click within 300 ms would be another command
            states = figure.evaluate("figure => figure.data.map(trace => trace.visible)")
            assert "legendonly" in states, "the legend switches nothing"
        assert told_by_the_pointer(page, figure), "the pointer reads nothing"
    assert not page.troubles


def told_by_the_pointer(page, figure):
    """Text that a figure shows where the pointer is, at one of many places; empty if nowhere."""
    for plot in figure.locator(".nsewdrag").all():
        box = plot.bounding_box()
        for step in range(1, 40):
            # A diagonal across the plot meets lines, bars and cells alike.
            across = step / 40
            page.mouse.move(
                box["x"] + across * box["width"], box["y"] + (1 - across) * box["height"]
            )
            page.wait_for_timeout(60)
            if text := "".join(figure.locator(".hoverlayer").all_text_contents()).strip():
                return text
    return ""


@pytest.mark.parametrize("name", CHAPTERS)
def test_pictures_have_alternative_text(name):
    article = soup(name).select_one(".bd-article")
    for picture in article.select("img"):
        text = picture.get("alt", "")
        # MyST-NB and Sphinx fall back on the name of the file.
        assert len(text) > 10, picture.get("src")
        assert not text.startswith(("../", "_images", "http")), text


@pytest.mark.parametrize("name", CHAPTERS)
def test_figures_are_captioned_and_numbered(name):
    article = soup(name).select_one(".bd-article")
    for picture in article.select("img, .plotly-graph-div"):
        figure = picture.find_parent("figure")
        what = picture.get("alt") or picture.get("id")
        assert figure, f"no figure around {what}"
        caption = figure.select_one("figcaption").get_text(strip=True)
        assert re.match(r"Fig\. \d+\S", caption), f"no number for {what}: {caption}"
        assert len(caption) > 30, what


@pytest.mark.parametrize("name", CHAPTERS)
def test_figures_open_at_full_size(visit, name):
    page = visit(name)
    page.set_viewport_size({"width": 390, "height": 844})
    for image in page.locator(".bd-article figure img").all():
        link = image.locator("xpath=ancestor::a")
        assert link.count() == 1, image.get_attribute("alt")
        if link.get_attribute("class") == "full-size":
            assert link.get_attribute("href") == image.evaluate("image => image.src")


def test_figure_numbers_are_distinct():
    numbers = [
        number.get_text(strip=True)
        for name in CHAPTERS
        for number in soup(name).select("figcaption .caption-number")
    ]
    assert len(numbers) > 10
    assert len(set(numbers)) == len(numbers)


def test_the_book_is_small():
    assert sum(p.stat().st_size for p in HTML.rglob("*") if p.is_file()) < 40 * MEGABYTE
    for page in HTML.rglob("*.html"):
        assert page.stat().st_size < 3 * MEGABYTE, page.name
