"""The selection explorer: what its script computes is what the package computes."""

import numpy as np
import pytest

import dfsq
from dfsq import selection
from dfsq.study import explorer

SETS = {1: ("dfsq", 1), 2: ("dfsq", 2), 3: ("dfsq", 3), 4: ("dfsq", 4), "sq": ("sq", None)}
STEPS = explorer.STEPS


def universal(words, signed):
    return dfsq.universal_set(*SETS[words], signed=signed)


@pytest.fixture(scope="module")
def network():
    """Some channels of the embedded network, as `make book` ships them."""
    layers = ("body.7.body.0", "body.7.body.2")
    return explorer.histograms(layers=layers, channels=6, crops=2)


@pytest.fixture(scope="module")
def script(browser, repository):
    """Evaluate an expression of the script's functions; ``cases`` is handed over."""
    page = browser.new_page()
    page.add_script_tag(path=repository / "book" / "_static" / "selection.js")
    page.evaluate("globalThis.S = dfsqSelection, null")
    yield page.evaluate
    page.close()


def synthetic(rng, kind, signed):
    """Sorted distinct steps and counts of a made-up channel."""
    low = -STEPS if signed else 0
    size = int(rng.integers(200, 4000))
    if kind == "normal":
        x = rng.normal(0, rng.uniform(0.02, 0.4), size)
    elif kind == "laplace":
        x = rng.laplace(0, rng.uniform(0.01, 0.2), size)
    elif kind == "uniform":
        x = rng.uniform(low / STEPS, 1, size)
    elif kind == "symmetric":  # mirrored optima are equal
        x = rng.normal(0, 0.2, size)
        x = np.concatenate([x, -x])
    elif kind == "midpoints":  # all on the edges of cells
        x = rng.integers(low // 32, 2049, int(rng.integers(2, 60))) / 2048
    elif kind == "points":  # all on universal points, so that the least error is 0
        x = rng.choice(universal(4, signed), int(rng.integers(1, 40)))
    elif kind == "sparse":
        x = np.concatenate([np.zeros(size), rng.uniform(0, 1, int(rng.integers(1, 6)))])
    elif kind == "one cell":
        cell = rng.integers(low // 32, 2048)
        x = (cell + rng.uniform(0, 1, 20)) / 2048
    elif kind == "constant":
        x = np.full(size, rng.uniform(low / STEPS, 1))
    else:
        x = np.zeros(size)  # dead
    x = x if signed else np.abs(x)
    return np.unique(np.clip(np.floor(x * STEPS), low, STEPS).astype(int), return_counts=True)


KINDS = (
    "normal", "laplace", "uniform", "symmetric", "midpoints", "points", "sparse", "one cell",
    "constant", "dead",
)  # fmt: skip


def cases(network, count=300):
    """Channels, bits and sets of all kinds; steps as an increasing list."""
    rng = np.random.default_rng(0)
    for n in range(count):
        signed = bool(rng.integers(2))
        steps, counts = synthetic(rng, KINDS[n % len(KINDS)], signed)
        words = list(SETS)[int(rng.integers(5))] if n % 2 else 4
        bits = int(rng.integers(2, 9))
        yield steps.tolist(), counts.tolist(), bits, words, signed
    for words, bits in ((4, 2), (4, 4), (4, 6), (2, 2), ("sq", 3)):
        # as many values as codes, all on points but one, to which 0 is as near as the next below
        points = universal(words, True)
        below = points[points < 0][-1] / 2
        above = rng.choice(points[points > 0], 2**bits - 1, replace=False)
        steps = np.sort(np.append(above, below)) * STEPS
        yield steps.astype(int).tolist(), [1] * len(steps), bits, words, True
    for layer in network["layers"]:
        for channel in layer["channels"]:
            for bits in (2, 4, 8):
                steps = np.cumsum(channel["values"]).tolist()
                yield steps, channel["counts"], bits, 4, not layer["nonNegative"]


@pytest.mark.browser
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("words", SETS)
def test_universal_sets_are_equal(script, words, signed):
    found = script("([words, signed]) => [...S.universalSet(words, signed)]", [words, signed])
    assert found == universal(words, signed).tolist()


@pytest.mark.browser
def test_exact_selections_are_equal(script, network):
    sent = list(cases(network))
    found = script(
        f"""cases => cases.map(([steps, counts, bits, words, signed]) => {{
            const data = S.channel(Float64Array.from(steps, (s) => s / {STEPS}), counts);
            const points = S.exact(data, S.universalSet(words, signed), 2 ** bits);
            return [[...points], S.squaredError(data, points)];
        }})""",
        sent,
    )
    for (steps, counts, bits, words, signed), (points, error) in zip(sent, found, strict=True):
        best = dfsq.select(
            np.array(steps) / STEPS, bits, "exact", universal(words, signed), weights=counts
        )
        assert points == best.points.tolist(), (steps, counts, bits, words, signed)
        squares = np.dot(counts, (np.array(steps) / STEPS) ** 2)
        assert error == pytest.approx(best.sse, rel=1e-9, abs=1e-13 * squares)


@pytest.mark.browser
def test_errors_of_any_points_are_equal(script, network):
    rng = np.random.default_rng(1)
    sent = []
    for steps, counts, bits, _, signed in cases(network, 100):
        points = universal(4, signed)
        chosen = np.sort(rng.choice(points, min(2**bits, len(points)), replace=False))
        sent.append((steps, counts, chosen.tolist()))
    found = script(
        f"""cases => cases.map(([steps, counts, points]) => S.squaredError(
            S.channel(Float64Array.from(steps, (s) => s / {STEPS}), counts), points))""",
        sent,
    )
    for (steps, counts, points), error in zip(sent, found, strict=True):
        histogram = dfsq.Histogram.of(np.array(steps) / STEPS, weights=counts)
        assert error == pytest.approx(histogram.squared_error(points), rel=1e-9, abs=1e-12)


@pytest.mark.browser
def test_kmeans_takes_the_same_path(script, network):
    """Iteration by iteration, from the same draws, for the five runs that share a generator."""
    sent = list(cases(network, 60))
    draws = np.random.default_rng([0, 0]).random(5 * 256 * 101)  # a dead channel takes the most
    found = script(
        f"""([cases, draws]) => cases.map(([steps, counts, bits, words, signed]) => {{
            const data = S.channel(Float64Array.from(steps, (s) => s / {STEPS}), counts);
            const universal = S.universalSet(words, signed);
            let drawn = 0;
            const random = () => draws[drawn++];
            return Array.from({{ length: 5 }}, () => {{
                const states = [S.kmeansStart(data, 2 ** bits, random)];
                while (!states.at(-1).done) states.push(S.kmeansStep(data, states.at(-1), random));
                const points = S.snap(states.at(-1).centres, universal);
                const few = states.length < 10 ? states : [states[1], states[7], states.at(-1)];
                const path = few.map((s) => [s.iteration, s.centres]);
                return [path, [...points], S.squaredError(data, points)];
            }});
        }})""",
        [sent, draws.tolist()],
    )
    for (steps, counts, bits, words, signed), runs in zip(sent, found, strict=True):
        x, w, k = np.array(steps) / STEPS, np.array(counts, float), 2**bits
        sums = x, np.cumsum(w), np.cumsum(w * x), k
        for iterations, centres in runs[0][0][1:]:
            generator = np.random.default_rng([0, 0])
            expected = selection._lloyd(*sums, max(1, iterations), 1e-3, True, generator)
            assert centres == expected.tolist()
        generator = np.random.default_rng([0, 0])
        for path, *_ in runs:  # one after the other, each going on with the same draws
            assert path[-1][1] == selection._lloyd(*sums, 100, 1e-3, True, generator).tolist()
        best = dfsq.select(x, bits, "kmeans", universal(words, signed), weights=counts, seed=0)
        points, error = min((run[1:] for run in runs), key=lambda run: run[1])
        assert error == pytest.approx(best.sse, rel=1e-9, abs=1e-12)
        assert points == best.points.tolist()


def test_condensed_samples_stay_in_their_cells():
    x = np.random.default_rng(3).normal(0, 0.3, (3, 5000)).clip(-1, 1)
    x[1] = np.abs(x[1])
    x[2] = 0
    histogram = dfsq.Histogram(3)
    histogram.add(x[None])
    for channel in range(3):
        steps, counts = explorer.condensed(histogram, channel)
        assert np.all(np.diff(steps) > 0)
        again = dfsq.Histogram.of(steps / STEPS, weights=counts)
        assert np.array_equal(again.count[0], histogram.count[channel])
        off = np.abs(again.total[0] - histogram.total[channel])
        assert np.all(off <= histogram.count[channel] / STEPS)


def test_weighted_samples_are_refused():
    histogram = dfsq.Histogram.of([0.1, 0.2], weights=[0.5, 2])
    with pytest.raises(ValueError, match="not weighted"):
        explorer.condensed(histogram, 0)


def test_channels_reach_from_the_emptiest_to_the_fullest():
    histogram = dfsq.Histogram(5)
    for channel, cells in enumerate((7, 90, 3, 50, 20)):
        histogram.count[channel, :cells] = 1
    assert explorer.channels_of(histogram, 3) == [1, 2, 4]
    assert explorer.channels_of(histogram, 9) == [0, 1, 2, 3, 4]


# --- the page -----------------------------------------------------------------------------------


@pytest.fixture
def opened(browser, repository, network, tmp_path):
    """Open the explorer on a page of its own, from a folder, at some width."""
    explorer.write(tmp_path / "explorer-data.js", [network])
    static = repository / "book" / "_static"
    scripts = (tmp_path / "explorer-data.js", static / "selection.js", static / "explorer.js")
    (tmp_path / "page.html").write_text(
        f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
        <meta name="viewport" content="width=device-width">
        <link rel="stylesheet" href="{(static / "explorer.css").as_uri()}"></head>
        <body><div id="dfsq-explorer"></div>
        {"".join(f'<script src="{path.as_uri()}" defer></script>' for path in scripts)}
        </body></html>"""
    )
    contexts, troubles = [], []

    def opened(width=1000, **options):
        context = browser.new_context(viewport={"width": width, "height": 1400}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.goto((tmp_path / "page.html").as_uri())
        page.wait_for_selector("[data-row=exact]")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not troubles


def numbers(page, row):
    """What the table says: points, mean squared error, SQNR, error over the optimum's."""
    cells = page.locator(f"[data-row={row}] td").all_inner_texts()
    return [float(cell.replace("−", "-").replace("∞", "inf")) for cell in cells]


def drawn(page, kind):
    return page.locator(f"[data-plot=points] path.{kind}").get_attribute("d")


@pytest.mark.browser
def test_controls_change_what_is_shown(opened, network):
    page = opened()
    for layer in (0, 1):
        page.select_option("[name=layer]", str(layer))
        shown = network["layers"][layer]
        for channel, bits, words in ((0, 4, 4), (2, 3, "sq"), (5, 6, 3)):
            page.select_option("[name=channel]", str(channel))
            page.fill("[name=bits]", str(bits))
            page.select_option("[name=words]", str(words))
            one = shown["channels"][channel]
            x, w = np.cumsum(one["values"]) / STEPS, np.array(one["counts"])
            best = dfsq.select(x, bits, "exact", universal(words, layer == 0), weights=w)
            points, error, sqnr, ratio = numbers(page, "exact")
            assert points == len(best.points)
            assert error == pytest.approx(best.sse / w.sum(), rel=1e-3)
            assert sqnr == pytest.approx(10 * np.log10(np.dot(w, x**2) / best.sse), abs=0.006)
            assert ratio == 1
            assert page.locator("[name=width]").inner_text() == f"{bits} ({2**bits} codes)"
            assert numbers(page, "snapped")[3] >= 1
    bars = drawn(page, "bars")
    page.check("[name=logarithmic]")
    assert drawn(page, "bars") != bars
    said = page.locator("[name=quantized]").inner_text()
    page.fill("[name=value]", "0.9")
    assert page.locator("[name=quantized]").inner_text() != said


@pytest.mark.browser
def test_kmeans_is_stepped_run_and_reset(opened):
    page = opened(reduced_motion="reduce")
    status = page.locator("[role=status]")
    first = drawn(page, "open")
    for iteration in (1, 2, 3):
        before = drawn(page, "open")
        page.click("[name=step]")
        assert drawn(page, "open") != before
        assert f"Run 1, iteration {iteration}:" in status.inner_text()
    page.click("[name=run]")  # at once, as those want it who like no motion
    assert "Run 1 ended" in status.inner_text()
    assert page.locator("[name=step]").is_disabled()
    one = numbers(page, "best")
    page.click("[name=next]")
    assert "Run 2:" in status.inner_text()
    assert drawn(page, "open") != first
    page.click("[name=all]")
    assert "Run 5 ended" in status.inner_text()
    assert numbers(page, "best")[1] <= one[1]
    assert numbers(page, "best")[3] >= 1
    assert page.locator("[name=next]").is_disabled()
    page.click("[name=reset]")
    assert drawn(page, "open") == first
    page.fill("[name=seed]", "1")
    assert drawn(page, "open") != first
    assert page.locator("[data-row=best]").count() == 0


@pytest.mark.browser
def test_kmeans_runs_by_itself_and_pauses(opened):
    page = opened()
    page.click("[name=run]")
    page.wait_for_function(
        "/iteration ([3-9]|\\d\\d)/.test(document.querySelector('[role=status]').textContent)"
    )
    page.click("[name=run]")
    assert page.locator("[name=run]").inner_text() == "Run"
    said = page.locator("[role=status]").inner_text()
    page.wait_for_timeout(600)  # more than one iteration's time
    assert page.locator("[role=status]").inner_text() == said


@pytest.mark.browser
def test_a_distribution_is_drawn(opened):
    page = opened()
    page.select_option("[name=source]", "own")
    assert page.locator("[name=preset]").is_visible()
    assert not page.locator("[name=layer]").is_visible()
    seen = set()
    for preset in page.locator("[name=preset] option:not([hidden])").all_inner_texts():
        page.select_option("[name=preset]", preset)
        seen.add(drawn(page, "bars"))
    assert len(seen) == 7
    assert "no samples" in page.locator("[role=status]").inner_text()  # the empty sheet
    assert page.locator("tbody tr").count() == 0

    box = page.locator(".explorer-pen").bounding_box()
    x, y = box["x"] + box["width"] / 4, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 60, y, steps=4)
    page.mouse.up()
    page.wait_for_selector("[data-row=exact]")
    bars = drawn(page, "bars")
    assert numbers(page, "exact")[0] == 16
    page.mouse.move(x, y)  # with the button up
    assert drawn(page, "bars") == bars

    page.focus(".explorer-pen")
    page.keyboard.press("ArrowRight")
    assert drawn(page, "bars") == bars
    page.keyboard.press("ArrowUp")
    assert drawn(page, "bars") != bars
    page.keyboard.press("ArrowDown")
    assert drawn(page, "bars") == bars
    page.check("[name=nonNegative]")
    assert "189 points" in page.locator("[data-plot=points]").inner_text()


@pytest.mark.browser
def test_a_finger_draws_one_stroke(opened):
    """What is drawn again on the way must not end the touch, nor may the page scroll."""
    page = opened(width=390, has_touch=True, is_mobile=True)
    page.select_option("[name=source]", "own")
    page.select_option("[name=preset]", "Nothing: an empty sheet")
    box = page.locator(".explorer-pen").bounding_box()
    session = page.context.new_cdp_session(page)

    def touch(kind, *points):
        points = [{"x": box["x"] + x, "y": box["y"] + y} for x, y in points]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", (20, 100))
    for step in range(1, 21):
        touch("touchMove", (20 + step * (box["width"] - 40) / 20, 100 - 3 * step))
        page.evaluate("new Promise(requestAnimationFrame)")
    touch("touchEnd")
    page.wait_for_selector("[data-row=exact]")
    page.evaluate("new Promise(requestAnimationFrame)")
    assert drawn(page, "bars").count("M") > 256 * (box["width"] - 40) / box["width"] - 2
    assert page.evaluate("scrollY") == 0


@pytest.mark.browser
def test_the_page_suits_a_phone_and_names_its_controls(opened):
    page = opened(width=390)
    for source in ("0", "own"):
        page.select_option("[name=source]", source)
        assert page.evaluate("document.documentElement.scrollWidth") == 390
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, select')].filter((e) => !e.labels.length).length"
    )
    assert unnamed == 0
