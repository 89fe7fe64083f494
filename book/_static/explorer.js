// The selection explorer's view: fills the element #dfsq-explorer from dfsqHistograms
// (explorer-data.js, written by `make book`) with what dfsqSelection (selection.js) computes.
"use strict";

(() => {
  const root = document.getElementById("dfsq-explorer");
  const S = globalThis.dfsqSelection;
  const networks = globalThis.dfsqHistograms;

  const BARS = 256; // over [-1, 1], as in the book's figures
  const RUNS = 5; // of K-means, as released
  const PAUSE = 250; // milliseconds between iterations that run by themselves
  const PRESETS = {
    "Gaussian": [true, (x) => Math.exp(-((x / 0.25) ** 2) / 2)],
    "Laplace": [true, (x) => Math.exp(-Math.abs(x) / 0.12)],
    "Half-normal, behind a ReLU": [false, (x) => Math.exp(-((x / 0.3) ** 2) / 2)],
    "Exponential, behind a ReLU": [false, (x) => Math.exp(-x / 0.12)],
    "Uniform": [true, () => 0.5],
    "Two peaks": [
      true,
      (x) => Math.exp(-(((x + 0.5) / 0.1) ** 2) / 2) + 0.6 * Math.exp(-(((x - 0.3) / 0.2) ** 2) / 2),
    ],
    "Nothing: an empty sheet": [true, () => 0],
  };
  const middle = (bar) => ((bar + 0.5) * 2) / BARS - 1;

  // --- the page -------------------------------------------------------------------------------

  const options = (pairs) =>
    pairs.map(([value, text]) => `<option value="${value}">${text}</option>`).join("");
  const size = (words) => S.universalSet(words).length;

  root.innerHTML = `
    <fieldset class="explorer-controls">
      <legend>Channel and codebook</legend>
      <label>Samples of
        <select name="source">${options([
          ...networks.map(({ name }, i) => [i, `the network ${name}`]),
          ["own", "your own drawing"],
        ])}</select></label>
      <label data-for="network">Layer <select name="layer"></select></label>
      <label data-for="network">Channel <select name="channel"></select></label>
      <label data-for="own">Start from
        <select name="preset">${options(Object.keys(PRESETS).map((p) => [p, p]))}
          <option value="drawn" hidden>as drawn</option></select></label>
      <label for="explorer-bits">Bits: <output name="width"></output>
        <input id="explorer-bits" name="bits" type="range" min="2" max="8" value="4"></label>
      <label>Universal set
        <select name="words">${options([
          [4, `4 words (${size(4)} points)`],
          [3, `3 words (${size(3)} points)`],
          [2, `2 words (${size(2)} points)`],
          [1, `1 word (${size(1)} points)`],
          ["sq", `SQ (${size("sq")} points)`],
        ])}</select></label>
      <label class="explorer-check" data-for="network">
        <input name="logarithmic" type="checkbox"> Logarithmic heights</label>
      <label class="explorer-check" data-for="own">
        <input name="nonNegative" type="checkbox"> Non-negative values only</label>
    </fieldset>
    <p class="explorer-hint" data-for="own">Draw over the bars with a mouse or a finger, or with the
      arrow keys once the drawing has the focus: left and right choose a place, up and down
      change its height.</p>
    <div class="explorer-sheet">
      <div class="explorer-plot" data-plot="points"></div>
      <div class="explorer-pen" data-for="own" tabindex="0" role="application"
        aria-label="Drawing of a distribution; arrow keys draw"><i hidden></i></div>
    </div>
    <fieldset class="explorer-controls explorer-buttons">
      <legend>K-means, iteration by iteration</legend>
      <button type="button" name="step">Step</button>
      <button type="button" name="run">Run</button>
      <button type="button" name="next">New start</button>
      <button type="button" name="all">All ${RUNS} runs</button>
      <button type="button" name="reset">Reset</button>
      <label>Seed <input name="seed" type="number" min="0" max="4294967295" value="0"></label>
    </fieldset>
    <p class="explorer-status" role="status"></p>
    <div class="explorer-table">
      <table>
        <thead><tr><th scope="col">Codebook</th><th scope="col">points</th>
          <th scope="col"><abbr title="mean squared error">MSE</abbr></th>
          <th scope="col"><abbr title="signal to quantization noise ratio">SQNR</abbr>, dB</th>
          <th scope="col">error / exact</th></tr></thead>
        <tbody></tbody>
      </table>
    </div>
    <div class="explorer-pair">
      <div class="explorer-plot" data-plot="staircase"></div>
      <div class="explorer-plot" data-plot="error"></div>
    </div>
    <label class="explorer-value">Quantize the value
      <input name="value" type="range" min="-1" max="1" step="0.001" value="0.3">
      <output name="quantized"></output></label>`;

  const control = (name) => root.querySelector(`[name="${name}"]`);
  const plot = (name) => root.querySelector(`[data-plot="${name}"]`);

  // --- state ----------------------------------------------------------------------------------

  const bars = new Float64Array(BARS); // heights of the reader's own distribution, 0 to 1
  let data, universal, exact, low; // low: the least value shown
  let random, state, path, finished, best; // of K-means
  let timer = null;

  const own = () => control("source").value === "own";
  const layer = () => networks[control("source").value].layers[control("layer").value];
  const nonNegative = () => (own() ? control("nonNegative").checked : layer().nonNegative);

  function networkChannel() {
    const { values, counts } = layer().channels[control("channel").value];
    const { steps } = networks[control("source").value];
    let sum = 0;
    return S.channel(Float64Array.from(values, (difference) => (sum += difference) / steps), counts);
  }

  // Samples in the middle of each cell under a bar, 1000 a cell under the highest bars.
  function drawnChannel() {
    const cells = 4096 / BARS;
    const values = [];
    const counts = [];
    for (let bar = nonNegative() ? BARS / 2 : 0; bar < BARS; bar++) {
      const height = Math.round(1000 * bars[bar]);
      for (let cell = bar * cells; height > 0 && cell < (bar + 1) * cells; cell++) {
        values.push((cell + 0.5) / 2048 - 1);
        counts.push(height);
      }
    }
    return S.channel(Float64Array.from(values), counts);
  }

  function select() {
    low = nonNegative() ? 0 : -1;
    data = own() ? drawnChannel() : networkChannel();
    const words = control("words").value;
    universal = S.universalSet(words === "sq" ? words : Number(words), !nonNegative());
    control("width").value = `${bits()} (${2 ** bits()} codes)`;
    exact = data.values.length ? S.exact(data, universal, 2 ** bits()) : [];
    reset();
  }

  const bits = () => Number(control("bits").value);

  function reset() {
    pause();
    random = S.generator(Number(control("seed").value));
    finished = 0;
    best = null;
    begin();
  }

  function begin() {
    state = data.values.length ? S.kmeansStart(data, 2 ** bits(), random) : null;
    path = state ? [state.centres] : [];
    draw();
  }

  function step() {
    state = S.kmeansStep(data, state, random);
    if (state.iteration === path.length) path.push(state.centres);
    if (!state.done) return;
    pause();
    finished += 1;
    const points = S.snap(state.centres, universal);
    const error = S.squaredError(data, points);
    if (!best || error < best.error) best = { points, error };
  }

  function toTheEnd() {
    while (!state.done) step();
  }

  function pause() {
    clearInterval(timer);
    timer = null;
  }

  function play() {
    if (timer) return pause();
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) return toTheEnd();
    step();
    if (!state.done) {
      timer = setInterval(() => {
        step();
        draw();
      }, PAUSE);
    }
  }

  // --- drawing --------------------------------------------------------------------------------

  const MARGIN = { left: 52, right: 12 };
  const grouped = (number) => number.toLocaleString("en");
  const minus = (text) => String(text).replace("-", "−");

  // A panel: an SVG as wide as its place, in pixels, so that text keeps its size on a phone.
  function panel(name, height, title) {
    const place = plot(name);
    const width = Math.max(240, Math.floor(place.clientWidth));
    const shapes = [];
    const add = (tag, attributes, text = "") => {
      const list = Object.entries(attributes).map(([key, value]) => ` ${key}="${value}"`);
      shapes.push(`<${tag}${list.join("")}>${text}</${tag}>`);
    };
    const [left, right] = [MARGIN.left, width - MARGIN.right];
    const x = (value) => left + ((right - left) * (value - low)) / (1 - low);
    return {
      width,
      height,
      left,
      right,
      add,
      x,
      text: (x, y, text, attributes = {}) => add("text", { x, y, ...attributes }, text),
      path: (kind, d) => add("path", { d, class: kind }),
      marks: (points, y, shape) => Array.from(points, (q) => shape(x(q), y, radius())).join(""),
      tick(y, label) {
        this.path("grid", `M${left} ${y}H${right}`);
        this.text(left - 5, y + 4, label, { "text-anchor": "end" });
      },
      xAxis(y) {
        for (const value of low < 0 ? [-1, -0.5, 0, 0.5, 1] : [0, 0.25, 0.5, 0.75, 1]) {
          this.path("axis", `M${x(value)} ${y}v4`);
          this.text(x(value), y + 17, minus(value), { "text-anchor": "middle" });
        }
        this.path("axis", `M${left} ${y}H${right}`);
        this.text((left + right) / 2, y + 34, "normalized value", { "text-anchor": "middle" });
      },
      show() {
        place.innerHTML = `<svg role="img" aria-label="${title}" width="${width}" height="${height}"
          viewBox="0 0 ${width} ${height}">${shapes.join("")}</svg>`;
      },
    };
  }

  const square = (x, y, r) => `M${x - r} ${y - r}h${2 * r}v${2 * r}h${-2 * r}z`;
  const circle = (x, y, r) => `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0z`;
  const radius = () => (bits() > 6 ? 2 : bits() > 4 ? 3 : 4.5);
  const percent = (share) => `${Number((100 * share).toPrecision(2))}%`;

  function heights() {
    if (own()) return bars;
    const shares = new Float64Array(BARS);
    const total = data.N[data.N.length - 1];
    data.values.forEach((value, i) => {
      shares[Math.min(BARS - 1, Math.floor(((value + 1) * BARS) / 2))] += data.counts[i] / total;
    });
    return shares;
  }

  const HISTOGRAM = { top: 26, bottom: 156 };

  function drawHistogram(p) {
    const { top, bottom } = HISTOGRAM;
    const shares = heights();
    const most = own() ? 1 : Math.max(...shares);
    const least = 1e-5; // of a logarithmic axis
    const logarithmic = !own() && control("logarithmic").checked;
    const part = (share) =>
      logarithmic ? Math.max(0, Math.log(share / least) / Math.log(most / least)) : share / most;
    const y = (share) => bottom - (bottom - top) * part(share);
    const samples = grouped(data.N[data.N.length - 1]);
    p.text(0, 13, own() ? "height drawn" : `share of ${samples} samples (a bar is 1/128 wide)`);
    const ticks = logarithmic
      ? [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1].filter((share) => share <= most)
      : [0, most / 2, most];
    for (const share of ticks) p.tick(y(share), own() ? share : percent(share));
    let d = "";
    for (let bar = low < 0 ? 0 : BARS / 2; bar < BARS; bar++) {
      const [a, b] = [p.x((bar * 2) / BARS - 1), p.x(((bar + 1) * 2) / BARS - 1)];
      if (shares[bar] > 0) d += `M${a} ${bottom}V${y(shares[bar])}H${b}V${bottom}z`;
    }
    p.path("bars", d);
    p.path("exact faint", Array.from(exact, (q) => `M${p.x(q)} ${top}V${bottom}`).join(""));
  }

  // The centres' ways down, and from where they are now to their universal points.
  function drawCentres(p, top, bottom, snapY) {
    const last = Math.max(8, path.length - 1);
    const y = (iteration) => top + ((bottom - top) * iteration) / last;
    p.text(0, top - 12, "K-means: centres by iteration");
    for (const iteration of [0, Math.round(last / 2), last]) p.tick(y(iteration), iteration);
    const now = path.length - 1;
    const ways = state.centres.map((_, i) =>
      path.map((centres, n) => `${n ? "L" : "M"}${p.x(centres[i])} ${y(n)}`).join(""),
    );
    p.path("kmeans trace", ways.join(""));
    const falls = state.centres.map((centre) => {
      const [nearest] = S.snap([centre], universal);
      return `M${p.x(centre)} ${y(now)}L${p.x(nearest)} ${snapY}`;
    });
    p.path("kmeans fall", falls.join(""));
    p.path("kmeans open", p.marks(state.centres, y(now), square));
  }

  function drawPoints(snapped) {
    const p = panel("points", 436, "Histogram of the samples, and the points selected below it");
    drawHistogram(p);
    const [snapY, setY, exactY] = [316, 351, 386];
    if (state) drawCentres(p, 196, 282, snapY);
    p.path("set", Array.from(universal, (q) => `M${p.x(q)} ${setY - 5}v10`).join(""));
    p.path("kmeans mark", p.marks(snapped, snapY, square));
    p.path("exact mark", p.marks(exact, exactY, circle));
    p.text(0, snapY - 10, "K-means: snapped");
    p.text(0, setY - 10, `universal set: ${universal.length} points`);
    p.text(0, exactY - 12, "exact");
    p.xAxis(400);
    p.show();
  }

  // The points' values over the axis, as a line of steps.
  function stairs(points, x, y) {
    let d = `M${x(low)} ${y(points[0])}`;
    for (let i = 1; i < points.length; i++) d += `H${x((points[i - 1] + points[i]) / 2)}V${y(points[i])}`;
    return `${d}H${x(1)}`;
  }

  function drawStaircase(snapped) {
    const p = panel("staircase", 290, "What each value becomes, for both codebooks");
    const [top, bottom] = [26, 240];
    const y = (value) => bottom - ((bottom - top) * (value - low)) / (1 - low);
    p.text(0, 13, "reconstruction: what a value becomes");
    for (const value of low < 0 ? [-1, 0, 1] : [0, 0.5, 1]) p.tick(y(value), minus(value));
    p.path("grid", `M${p.x(low)} ${y(low)}L${p.x(1)} ${y(1)}`);
    if (state) {
      p.path("kmeans stairs", stairs(snapped, p.x, y));
      p.path("exact stairs", stairs(exact, p.x, y));
      p.path("cursor", `M${p.x(Number(control("value").value))} ${top}V${bottom}`);
    }
    p.xAxis(bottom);
    p.show();
  }

  // Squared error by value, in bars of twice a histogram's width; the sum is the MSE.
  function errorsByValue(points) {
    const parts = new Float64Array(BARS / 2);
    const total = data.N[data.N.length - 1];
    let i = 0;
    S.bounds(data.values, points).forEach((end, n) => {
      for (; i < end; i++) {
        const bar = Math.min(parts.length - 1, Math.floor(((data.values[i] + 1) * parts.length) / 2));
        parts[bar] += (data.counts[i] * (data.values[i] - points[n]) ** 2) / total;
      }
    });
    return parts;
  }

  function drawError(snapped) {
    const p = panel("error", 290, "Where the squared error comes from, for both codebooks");
    const [top, bottom] = [26, 240];
    p.text(0, 13, "contribution to the MSE (lower is better)");
    if (state) {
      const parts = { kmeans: errorsByValue(snapped), exact: errorsByValue(exact) };
      const most = Math.max(...parts.kmeans, ...parts.exact) || 1;
      const y = (part) => bottom - ((bottom - top) * part) / most;
      for (const part of [0, most / 2, most]) {
        p.tick(y(part), part ? minus(part.toExponential(1)) : "0");
      }
      for (const [name, errors] of Object.entries(parts)) {
        let d = `M${p.x(low)} ${bottom}`;
        for (let bar = low < 0 ? 0 : errors.length / 2; bar < errors.length; bar++) {
          d += `V${y(errors[bar])}H${p.x(((bar + 1) * 2) / errors.length - 1)}`;
        }
        p.path(`${name} area`, `${d}V${bottom}`);
      }
    }
    p.xAxis(bottom);
    p.show();
  }

  // --- numbers --------------------------------------------------------------------------------

  function row(name, kind, points, error, optimum) {
    const mean = error / data.N[data.N.length - 1];
    const ratio = optimum > 0 ? (error / optimum).toFixed(3) : error > 0 ? "∞" : "1.000";
    const sqnr = error > 0 ? (10 * Math.log10(data.squares / error)).toFixed(2) : "∞";
    const cells = [points, mean > 0 ? minus(mean.toExponential(3)) : "0", sqnr, ratio];
    return `<tr data-row="${kind}"><th scope="row"><i class="${kind}"></i>${name}</th>
      ${cells.map((cell) => `<td>${cell}</td>`).join("")}</tr>`;
  }

  function compared(ratio) {
    if (ratio >= 2) return `${grouped(Number(ratio.toPrecision(3)))} times the optimum's squared error`;
    return `${(100 * (ratio - 1)).toFixed(1)}% more squared error than the optimum`;
  }

  function writeNumbers(snapped) {
    const body = root.querySelector("tbody");
    if (!state) {
      body.innerHTML = "";
      tell("There are no samples: draw some.");
      return;
    }
    const optimum = S.squaredError(data, exact);
    const centres = Float64Array.from(new Set(state.centres)).sort();
    const now = S.squaredError(data, snapped);
    const rows = [
      row("K-means, centres", "centres", centres.length, S.squaredError(data, centres), optimum),
      row("K-means, snapped", "snapped", snapped.length, now, optimum),
    ];
    if (best) {
      const name = `K-means, best of ${finished}`;
      rows.push(row(name, "best", best.points.length, best.error, optimum));
    }
    rows.push(row("Exact", "exact", exact.length, optimum, optimum));
    body.innerHTML = rows.join("");

    const lost = 2 ** bits() - snapped.length;
    const collided = lost > 0 ? ` ${lost} of ${2 ** bits()} codes have no point of their own.` : "";
    const verdict = optimum > 0 ? ` Snapped, it has ${compared(now / optimum)}.` : "";
    const run = state.done ? finished : finished + 1;
    if (state.done) {
      tell(`Run ${run} ended after ${state.iteration} iterations.${verdict}${collided}`);
    } else if (state.iteration) {
      const moved = state.moved.toPrecision(2);
      tell(`Run ${run}, iteration ${state.iteration}: the farthest move was ${moved}.${verdict}`);
    } else {
      tell(`Run ${run}: the centres are random samples, and one stays at 0.${verdict}`);
    }
  }

  function tell(text) {
    const status = root.querySelector(".explorer-status");
    status.setAttribute("aria-live", timer ? "off" : "polite"); // not each iteration of a run
    status.textContent = text;
  }

  function writeValue(snapped) {
    const slider = control("value");
    slider.min = low;
    const value = Number(slider.value);
    const to = (points) => points[S.bounds([value], points).findIndex((end) => end > 0)];
    const sign = (x) => minus(x.toFixed(4));
    control("quantized").value = state
      ? `${sign(value)} becomes ${sign(to(exact))} (exact), ${sign(to(snapped))} (K-means)`
      : "";
  }

  function draw() {
    const snapped = state ? S.snap(state.centres, universal) : [];
    root.querySelectorAll("[data-for]").forEach((element) => {
      element.hidden = (element.dataset.for === "own") !== own();
    });
    writeValue(snapped);
    writeNumbers(snapped);
    drawPoints(snapped);
    drawStaircase(snapped);
    drawError(snapped);
    for (const name of ["step", "run"]) control(name).disabled = !state || state.done;
    for (const name of ["next", "all"]) control(name).disabled = !state || finished >= RUNS;
    control("run").textContent = timer ? "Pause" : "Run";
  }

  // --- drawing a distribution -----------------------------------------------------------------

  const pen = root.querySelector(".explorer-pen"); // over the bars
  const { top, bottom } = HISTOGRAM;
  Object.assign(pen.style, {
    left: `${MARGIN.left}px`,
    right: `${MARGIN.right}px`,
    top: `${top}px`,
    height: `${bottom - top}px`,
  });
  let place = BARS / 2; // of the keyboard's pen

  function redraw() {
    control("preset").value = "drawn";
    select();
  }

  // Bar and height under a pointer.
  function under(event) {
    const box = pen.getBoundingClientRect();
    const value = low + ((1 - low) * (event.clientX - box.left)) / box.width;
    const height = (box.bottom - event.clientY) / box.height;
    const bar = Math.floor(((value + 1) * BARS) / 2);
    return [
      Math.min(BARS - 1, Math.max(low < 0 ? 0 : BARS / 2, bar)),
      Math.min(1, Math.max(0, height)),
    ];
  }

  let stroke = null; // the last bar and height of a stroke
  let frame = null; // the next one to be drawn

  function penDown(event) {
    pen.setPointerCapture(event.pointerId);
    stroke = under(event);
    penMove(event);
  }

  function penMove(event) {
    if (!stroke) return;
    const [bar, height] = under(event);
    const [from, before] = stroke;
    const distance = Math.abs(bar - from);
    for (let n = 0; n <= distance; n++) {
      const part = distance ? n / distance : 1;
      bars[from + Math.sign(bar - from) * n] = before + (height - before) * part;
    }
    stroke = [bar, height];
    frame ??= requestAnimationFrame(() => {
      frame = null;
      redraw();
    });
  }

  function penKey(event) {
    const moves = { ArrowLeft: [-8, 0], ArrowRight: [8, 0], ArrowUp: [0, 0.05], ArrowDown: [0, -0.05] };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const [along, up] = moves[event.key];
    place = Math.min(BARS - 8, Math.max(low < 0 ? 0 : BARS / 2, place + along));
    for (let bar = place; up && bar < place + 8; bar++) {
      bars[bar] = Math.min(1, Math.max(0, bars[bar] + up));
    }
    if (up) redraw();
    const value = middle(place + 3.5).toFixed(2);
    tell(`At ${value}: height ${bars[place].toFixed(2)}`);
    const mark = pen.firstChild; // where the keyboard draws
    mark.hidden = false;
    mark.style.left = `${(100 * (middle(place - 0.5) - low)) / (1 - low)}%`;
    mark.style.width = `${(100 * 16) / BARS / (1 - low)}%`;
  }

  // --- events ---------------------------------------------------------------------------------

  function fillLayers() {
    if (own()) return;
    const { layers } = networks[control("source").value];
    const sign = ({ nonNegative }) => (nonNegative ? "behind a ReLU" : "signed");
    control("layer").innerHTML = options(layers.map((l, i) => [i, `${l.name} (${sign(l)})`]));
    fillChannels();
  }

  function fillChannels() {
    control("channel").innerHTML = options(layer().channels.map((c, i) => [i, c.index]));
  }

  function usePreset() {
    const [signed, density] = PRESETS[control("preset").value];
    control("nonNegative").checked = !signed;
    bars.forEach((_, bar) => {
      bars[bar] = Math.min(1, density(middle(bar)));
      if (!signed && bar < BARS / 2) bars[bar] = 0;
    });
  }

  const before = { source: fillLayers, layer: fillChannels, preset: usePreset };
  root.addEventListener("input", ({ target: { name } }) => {
    before[name]?.();
    if (name === "seed") reset();
    else if (name === "logarithmic" || name === "value") draw();
    else select();
  });
  const pressed = {
    step,
    run: play,
    next() {
      toTheEnd();
      if (finished < RUNS) begin();
    },
    all() {
      toTheEnd();
      while (finished < RUNS) {
        begin();
        toTheEnd();
      }
    },
    reset,
  };
  root.addEventListener("click", ({ target }) => {
    if (target.tagName !== "BUTTON") return;
    if (target.name !== "run") pause();
    pressed[target.name]();
    draw();
  });
  pen.addEventListener("pointerdown", penDown);
  pen.addEventListener("pointermove", penMove);
  for (const end of ["pointerup", "pointercancel"]) pen.addEventListener(end, () => (stroke = null));
  pen.addEventListener("keydown", penKey);
  pen.addEventListener("blur", () => (pen.firstChild.hidden = true));
  new ResizeObserver(() => draw()).observe(root);

  usePreset();
  fillLayers();
  select();
})();
