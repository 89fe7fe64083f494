// Universal sets and the selection of points, as in dfsq/universal.py and dfsq/selection.py: the
// same operations in the same order, so that points are equal and not merely close (tested).
//
// A channel is {values, counts, N, S, squares}: sorted distinct values, how many samples stand at
// each, and prefix sums of counts and of counts times values. Values are whole steps of 2^-16, so
// all sums are exact.
"use strict";

globalThis.dfsqSelection = (() => {
  const WORD = (i) => [1, 2 ** -i, 2 ** -(i + 4), 0];
  const SQ = [
    [1, 1 / 2, 1 / 8, 0],
    [1, 1 / 4, 1 / 16, 0],
  ];

  // All distinct points of a universal set, sorted; words is 1 to 4, or "sq".
  function universalSet(words, signed = true) {
    const choices = words === "sq" ? SQ : Array.from({ length: words }, (_, i) => WORD(i + 1));
    let sums = [0];
    for (const word of choices) sums = sums.flatMap((sum) => word.map((value) => sum + value));
    const points = sums.map((sum) => sum / choices.length);
    const both = signed ? points.concat(points.filter((p) => p > 0).map((p) => -p)) : points;
    return Float64Array.from(new Set(both)).sort();
  }

  // A channel from values (sorted, distinct) and counts.
  function channel(values, counts) {
    const n = values.length;
    const N = new Float64Array(n + 1);
    const S = new Float64Array(n + 1);
    let squares = 0;
    for (let i = 0; i < n; i++) {
      N[i + 1] = N[i] + counts[i];
      S[i + 1] = S[i] + counts[i] * values[i];
      squares += counts[i] * values[i] * values[i];
    }
    return { values, counts, N, S, squares };
  }

  // Number of sorted values below x, or with `through` not above x.
  function below(values, x, through = false) {
    let low = 0;
    let high = values.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (values[middle] < x || (through && values[middle] === x)) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  // For each of the sorted points, the first value beyond its own; a midpoint is the upper one's.
  function bounds(values, points) {
    const ends = Array.from(points, (p, i) => below(values, (points[i + 1] + p) / 2));
    ends[ends.length - 1] = values.length;
    return ends;
  }

  // Sum of squared distances of the samples to their nearest of the sorted points.
  function squaredError({ values, counts }, points) {
    let error = 0;
    let i = 0;
    bounds(values, points).forEach((end, p) => {
      for (; i < end; i++) error += counts[i] * (values[i] - points[p]) ** 2;
    });
    return error;
  }

  // --- exact ----------------------------------------------------------------------------------

  // Optimal subset of k points by dynamic programming, the point `pin` (an index) among them
  // unless it is null: {chosen: indices, error}.
  function optimum({ N, S, squares }, u, edge, k, pin) {
    const m = u.length;
    const table = Array.from({ length: k }, () => new Float64Array(m).fill(Infinity));
    const argument = Array.from({ length: k }, () => new Int16Array(m).fill(-1));
    table[0].fill(0, 0, pin === null ? m : pin + 1);

    for (let row = 1; row < k; row++) {
      const most = m - k + row;
      let start = 0;
      for (const stop of pin === null ? [m - 1] : [pin, m - 1]) {
        // The best predecessor never moves up as j moves down, nor down from one row to the next.
        let highest = Math.min(stop, most) - 1;
        for (let j = Math.min(stop, most); j >= Math.max(start + 1, row); j--) {
          let best = Infinity;
          let where = -1;
          const lowest = Math.max(start, row - 1, argument[row - 1][j]);
          for (let i = lowest; i <= Math.min(highest, j - 1); i++) {
            const e = edge[i * m + j];
            const value =
              table[row - 1][i] + (u[j] - u[i]) * (2 * S[e] - (u[i] + u[j]) * N[e]);
            if (value < best) [best, where] = [value, i];
          }
          table[row][j] = best;
          argument[row][j] = where;
          if (where >= 0) highest = where;
        }
        start = stop;
      }
    }
    const [count, sum] = [N[N.length - 1], S[S.length - 1]];
    let error = Infinity;
    let where = -1;
    for (let j = pin ?? 0; j < m; j++) {
      const value = table[k - 1][j] + squares - 2 * u[j] * sum + u[j] * u[j] * count;
      if (value < error) [error, where] = [value, j];
    }
    const chosen = new Array(k);
    for (let row = k - 1; row >= 0; row--) {
      chosen[row] = where;
      where = argument[row][where];
    }
    return { chosen, error };
  }

  // Those of the chosen points that have samples.
  function used({ values, N }, u, chosen) {
    const ends = bounds(values, chosen.map((i) => u[i]));
    return chosen.filter((_, n) => N[ends[n]] > N[n ? ends[n - 1] : 0]);
  }

  // Points added for free: 0 first, then always the one farthest from those there.
  function fillUp(u, chosen, wanted) {
    const taken = new Set(chosen);
    const zero = u.indexOf(0);
    if (taken.size < wanted && zero >= 0) taken.add(zero);
    const distance = u.map((x) => Math.min(...Array.from(taken, (i) => Math.abs(x - u[i]))));
    while (taken.size < wanted) {
      const farthest = distance.reduce((best, d, i) => (d > distance[best] ? i : best), 0);
      taken.add(farthest);
      u.forEach((x, i) => {
        distance[i] = Math.min(distance[i], Math.abs(x - u[farthest]));
      });
    }
    return [...taken].sort((a, b) => a - b);
  }

  // The k points of a universal set with the least squared error; of equal optima one with 0, and
  // points without samples replaced by the rule of fillUp.
  function exact(data, u, k) {
    const m = u.length;
    const size = Math.min(k, m);
    const edge = new Int32Array(m * m);
    for (let i = 0; i < m; i++) {
      for (let j = i + 1; j < m; j++) edge[i * m + j] = below(data.values, (u[i] + u[j]) / 2);
    }
    let { chosen, error } = optimum(data, u, edge, size, null);
    const zero = u.indexOf(0);
    if (zero >= 0 && !chosen.includes(zero) && used(data, u, chosen).length === size) {
      const pinned = optimum(data, u, edge, size, zero);
      // equal within the rounding of the sums
      if (pinned.error <= error + 1e-15 * data.squares) chosen = pinned.chosen;
    }
    return Float64Array.from(fillUp(u, used(data, u, chosen), size), (i) => u[i]);
  }

  // --- K-means, as released -------------------------------------------------------------------

  // A random sample's value; random() is uniform in [0, 1).
  function draw({ values, N }, random) {
    const cumulative = N.subarray(1);
    const index = below(cumulative, random() * cumulative[cumulative.length - 1], true);
    return values[Math.min(index, values.length - 1)];
  }

  // First centres: k - 1 random samples, and 0, which stays.
  function kmeansStart(data, k, random) {
    const centres = Array.from({ length: k - 1 }, () => draw(data, random));
    return { centres: [...centres, 0], iteration: 0, moved: null, done: false };
  }

  // One iteration; at the end (no centre moves by 1e-3, or 100 iterations) `done` is set. The
  // released loop stops before it stores a last move that is so small.
  function kmeansStep(data, { centres, iteration }, random) {
    const { values, N, S } = data;
    const k = centres.length;
    const order = Array.from(centres.keys()).sort((a, b) => centres[a] - centres[b]);
    const count = new Float64Array(k);
    const total = new Float64Array(k);
    let start = 0;
    for (let n = 0; n < k; ) {
      // equal centres: all their samples go to the one that stands first
      const owner = order[n];
      while (++n < k && centres[order[n]] === centres[owner]);
      let stop = values.length;
      if (n < k) {
        const right = order[n];
        stop = below(values, (centres[owner] + centres[right]) / 2, owner < right);
      }
      if (stop > start) {
        count[owner] = N[stop] - N[start];
        total[owner] = S[stop] - S[start];
        start = stop;
      }
    }
    let moved = 0;
    const updated = centres.map((centre, i) => {
      if (i === k - 1) return centre;
      const next = count[i] > 0 ? total[i] / count[i] : draw(data, random);
      moved = Math.max(moved, Math.abs(next - centre));
      return next;
    });
    if (moved < 1e-3) return { centres, iteration, moved, done: true };
    return { centres: updated, iteration: iteration + 1, moved, done: iteration + 1 >= 100 };
  }

  // The nearest universal point of each centre (the lower on a tie), sorted, each once.
  function snap(centres, u) {
    const nearest = Array.from(centres, (centre) => {
      const upper = Math.min(Math.max(below(u, centre), 1), u.length - 1);
      const [right, left] = [Math.abs(u[upper] - centre), Math.abs(centre - u[upper - 1])];
      return right < left ? u[upper] : u[upper - 1];
    });
    return Float64Array.from(new Set(nearest)).sort();
  }

  // Uniform numbers in [0, 1) from a seed (mulberry32).
  function generator(seed) {
    let state = seed >>> 0;
    return () => {
      state = (state + 0x6d2b79f5) >>> 0;
      let t = Math.imul(state ^ (state >>> 15), state | 1);
      t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
      return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
    };
  }

  return {
    universalSet, channel, below, bounds, squaredError, exact, kmeansStart, kmeansStep, snap,
    generator,
  };
})();
