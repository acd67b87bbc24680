// Draws the plots from the page's JSON block. Submissions are switched on and off in all plots at once by the chips.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const element = (id) => document.getElementById(id);
  const phone = () => innerWidth < 640;

  // As in display.py, which draws the same beside the names.
  const DASHES = ["solid", "6px,3px", "2px,3px", "9px,3px,2px,3px", "12px,4px"];
  const MARKERS = ["circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x"];
  // Forty submissions at once are a tangle; the reader adds what he looks for.
  const SHOWN_AT_FIRST = 10;
  const shown = new Set([...data.submissions.keys()].slice(0, SHOWN_AT_FIRST));

  // Plotly reads <b>, <a href> and entities in every text; names are not markup.
  const text = (name) => name.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const short = (name, length = 40) =>
    text(name.length > length ? `${[...name].slice(0, length - 1).join("")}…` : name);

  // The style sheet names the colours; a hidden element turns a name into what the present theme makes of it.
  const probe = document.body.appendChild(document.createElement("span"));
  probe.hidden = true;
  const colour = (name) => {
    probe.style.color = `var(${name})`;
    return getComputedStyle(probe).color;
  };
  const styleOf = (index) => {
    const style = data.submissions[index].style;
    return { colour: colour(`--c${style % 8}`), dash: DASHES[style % 5], marker: MARKERS[style % 7] };
  };

  // ---- the curves of a submission, in a script of their own that is loaded when they are first drawn

  // By place in the board, which is the style: the curves, or why there are none yet.
  const LOADING = "loading";
  const MISSING = "missing";
  const curvesOf = new Map();

  // Equal distances come in short.
  const unpack = (axis) =>
    Array.isArray(axis) ? axis : Array.from({ length: axis.count }, (_, i) => axis.first + i * axis.by);

  globalThis.pacemarkCurves = (place, curves) => {
    for (const curve of curves) {
      for (const name of ["seconds", "steps", "values"]) curve[name] = unpack(curve[name]);
    }
    curvesOf.set(place, curves);
  };

  // Several scripts arrive within a frame; one drawing shows them all.
  let isDrawingDue = false;
  const drawCurvesSoon = () => {
    if (isDrawingDue) return;
    isDrawingDue = true;
    requestAnimationFrame(() => {
      isDrawingDue = false;
      drawCurves();
    });
  };

  const load = (place) => {
    curvesOf.set(place, LOADING);
    const script = document.createElement("script");
    script.src = `curves-${place + 1}.js`;
    script.addEventListener("load", drawCurvesSoon);
    script.addEventListener("error", () => {
      curvesOf.set(place, MISSING);
      drawCurvesSoon();
    });
    document.head.append(script);
  };

  const axis = (title, more = {}) => ({
    title: { text: title, standoff: 12, font: { size: 13 } },
    gridcolor: colour("--grid"),
    linecolor: colour("--axis"),
    zeroline: false,
    automargin: true,
    ...more,
  });

  // What an empty plot says in place of its figures.
  const message = (words) => ({
    xref: "paper",
    yref: "paper",
    x: 0.5,
    y: 0.5,
    showarrow: false,
    text: words,
    font: { color: colour("--muted"), size: 14 },
  });
  const bare = { showticklabels: false, showgrid: false };

  const layout = (more) => ({
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("--ink") },
    margin: phone() ? { l: 44, r: 12, t: 12, b: 44 } : { l: 64, r: 24, t: 16, b: 56 },
    showlegend: false,
    hovermode: "closest",
    // A finger that scrolls the page must not zoom.
    dragmode: matchMedia("(pointer: fine)").matches ? "zoom" : false,
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--muted"), activecolor: colour("--ink") },
    hoverlabel: {
      bgcolor: colour("--raised"),
      bordercolor: colour("--axis"),
      font: { color: colour("--ink"), family: getComputedStyle(document.body).fontFamily },
      align: "left",
    },
    ...more,
  });

  const draw = (id, traces, more) => {
    const modeBarButtonsToRemove = ["select2d", "lasso2d", "autoScale2d"];
    Plotly.react(id, traces, layout(more), { displaylogo: false, responsive: true, modeBarButtonsToRemove });
  };

  // ---- performance profile

  const drawProfile = () => {
    const { taus, tau_max, shares } = data.profile;
    const traces = [...shown].sort((a, b) => b - a).map((index) => {
      const style = styleOf(index);
      return {
        x: taus,
        y: shares[index] ?? [],
        mode: "lines",
        line: { shape: "hv", color: style.colour, dash: style.dash, width: 2.25 },
        meta: [short(data.submissions[index].name)],
        hovertemplate: "%{meta[0]}<br>%{y:.0%} of workloads within %{x:.2f}×<extra></extra>",
      };
    });
    const empty = !traces.some((trace) => trace.y.some((share) => share !== null));
    draw("profile-plot", traces, {
      annotations: empty ? [message("No profile of the chosen submissions is on record")] : [],
      xaxis: axis("factor τ of the fastest time", { range: [1, tau_max], ticksuffix: "×" }),
      yaxis: axis("share of workloads solved", { range: [-0.02, 1.04], tickformat: ".0%" }),
    });
  };

  // ---- validation curves

  const meets = (value, { direction, target }) =>
    value !== null && target !== null && (direction === "min" ? value <= target : value >= target);

  // The neighbourhood of the target: from the best value to three tenths of the way back to where training starts, and
  // further where a curve ends short of that. A curve that blows up does not move the view.
  const view = (curves, workload) => {
    const sign = workload.direction === "min" ? 1 : -1;
    const lists = curves
      .map((curve) => curve.values.filter((value) => value !== null).map((value) => sign * value))
      .filter((list) => list.length);
    if (!lists.length) return undefined;
    const target = workload.target === null ? [] : [sign * workload.target];
    const starts = lists.map((list) => list[0]).sort((a, b) => a - b);
    const start = starts[starts.length >> 1];
    const bests = lists.map((list) => Math.min(...list));
    const best = Math.min(...bests, ...target);
    const near = (target[0] ?? best) + 0.3 * Math.max(0, start - (target[0] ?? best));
    const worst = Math.max(near, Math.min(start, Math.max(...bests)));
    const pad = 0.06 * (worst - best || Math.abs(worst) || 1);
    return sign > 0 ? [best - pad, worst + pad] : [-worst - pad, -best + pad];
  };

  const state = { workload: 0, axis: "seconds" };

  const drawCurves = () => {
    const workload = data.workloads[state.workload];
    const curves = [];
    const waiting = { [LOADING]: 0, [MISSING]: 0 };
    for (const index of [...shown].sort((a, b) => a - b)) {
      const place = data.submissions[index].style;
      if (!curvesOf.has(place)) load(place);
      const loaded = curvesOf.get(place);
      if (!Array.isArray(loaded)) waiting[loaded] += 1;
      else {
        for (const curve of loaded) {
          if (curve.workload === state.workload) curves.push({ ...curve, submission: index });
        }
      }
    }
    const traces = curves.flatMap((curve) => {
      const style = styleOf(curve.submission);
      const name = short(data.submissions[curve.submission].name);
      const where = `study ${curve.study}, trial ${curve.trial}`;
      const common = {
        meta: [`${name}<br>${text(where)}`],
        hovertemplate: `%{meta[0]}<br>%{y:.5~g} after %{x:,.6~g} ${state.axis}<extra></extra>`,
      };
      const first = curve.values.findIndex((value) => meets(value, workload));
      const line = {
        ...common,
        x: curve[state.axis],
        y: curve.values,
        mode: "lines",
        line: { color: style.colour, dash: style.dash, width: 1.6 },
      };
      const hit = {
        ...common,
        x: [curve[state.axis][first]],
        y: [curve.values[first]],
        mode: "markers",
        marker: { color: style.colour, symbol: style.marker, size: 9, line: { color: colour("--paper"), width: 1.5 } },
      };
      return first < 0 ? [line] : [line, hit];
    });
    const annotations = [];
    const shapes = [];
    if (workload.target !== null) {
      const line = { color: colour("--ink"), width: 1, dash: "4px,4px" };
      shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: workload.target, y1: workload.target, line });
      const above = workload.direction === "max";
      annotations.push({
        xref: "paper",
        x: 0.01,
        xanchor: "left",
        y: workload.target,
        yanchor: above ? "bottom" : "top",
        showarrow: false,
        text: `target ${Number(workload.target.toPrecision(5))}`,
        font: { color: colour("--ink"), size: 12 },
      });
    }
    const range = view(curves, workload);
    if (!range) {
      const words = waiting[LOADING]
        ? "Loading the curves …"
        : waiting[MISSING]
          ? "The curves need curves-….js beside this page."
          : "No curve of the chosen submissions is on record";
      annotations.splice(0, 1, message(words));
    }
    element("curves-plot").dataset.loading = waiting[LOADING];
    draw("curves-plot", traces, {
      xaxis: axis(
        state.axis === "seconds" ? "seconds on the training clock" : "steps",
        range ? { rangemode: "tozero" } : bare,
      ),
      yaxis: axis(short(workload.metric), range ? { range } : bare),
      shapes: range ? shapes : [],
      annotations,
    });
  };

  // ---- memory against time

  // Round numbers on a logarithmic axis, a few of them.
  const ticks = (low, high) => {
    const all = [1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.75, 2, 2.5, 3, 4, 5, 7, 10, 15, 20, 30, 50, 100, 200, 500, 1000];
    const room = Math.log(high / low) / (phone() ? 4 : 9);
    let last = -Infinity;
    return all.filter((tick) => {
      if (tick < low || tick > high || Math.log(tick) - last < room) return false;
      last = Math.log(tick);
      return true;
    });
  };

  const drawMemory = () => {
    const { points, front } = data.memory;
    const largest = Math.max(0, ...points.map((point) => point.bytes ?? 0));
    const [unit, size] = largest >= 2 ** 30 ? ["GiB", 2 ** 30] : ["MiB", 2 ** 20];
    const known = points.filter((point) => point.time !== null && point.bytes !== null);
    const missed = points.some((point) => point.time === null && point.bytes !== null);
    const slowest = Math.max(1.1, ...known.map((point) => point.time));
    const span = Math.log(slowest);
    // Beyond the slowest, room for those who have no time.
    const edge = Math.exp(span * 1.12);
    const side = Math.exp(span * 1.25);
    const end = missed ? Math.exp(span * 1.38) : edge;
    const traces = [];
    if (front.length) {
      const steps = front.map((index) => points[index]);
      traces.push({
        x: steps.map((point) => point.time), y: steps.map((point) => point.bytes / size),
        mode: "lines", line: { shape: "hv", color: colour("--muted"), width: 1.25, dash: "2px,3px" }, hoverinfo: "skip",
      });
    }
    for (const index of shown) {
      const point = points[index];
      if (point.bytes === null) continue;
      const style = styleOf(index);
      const best = front.includes(index);
      const name = short(data.submissions[index].name, phone() ? 14 : 24);
      const time = point.time === null ? "missed a target" : `${point.time.toFixed(2)}× the fastest time`;
      traces.push({
        x: [point.time ?? side],
        y: [point.bytes / size],
        mode: best || shown.size <= 14 ? "markers+text" : "markers",
        marker: {
          color: style.colour,
          symbol: best ? style.marker : `${style.marker}-open`,
          size: 11,
          line: { width: 2, color: style.colour },
        },
        text: name,
        textposition: point.time === null ? "top center" : "top right",
        textfont: { size: 12, color: colour(best ? "--ink" : "--muted") },
        meta: [name],
        hovertemplate: `%{meta[0]}<br>%{y:.4~g} ${unit}<br>${time}<extra></extra>`,
        cliponaxis: false,
      });
    }
    const annotations = [];
    const shapes = [];
    if (missed) {
      const band = { x0: edge, x1: end, y0: 0, y1: 1, yref: "paper", fillcolor: colour("--band") };
      shapes.push({ ...band, type: "rect", layer: "below", line: { width: 0 } });
      annotations.push({
        x: Math.log10(side),
        yref: "paper",
        y: 0.02,
        yanchor: "bottom",
        showarrow: false,
        text: "missed<br>a target",
        font: { size: 12, color: colour("--muted") },
      });
    }
    const empty = !known.length && !missed;
    if (empty) annotations.push(message("No memory is on record"));
    const low = Math.exp(-0.06 * span);
    const tickvals = ticks(low, edge);
    draw("memory-plot", traces, {
      xaxis: axis("time relative to the fastest", {
        type: "log",
        range: [Math.log10(low), Math.log10(end)],
        tickvals,
        ticktext: tickvals.map((tick) => `${tick}×`),
        ...(empty ? bare : {}),
      }),
      yaxis: axis(`peak memory (${unit})`, { range: [0, (largest / size) * 1.15 || 1], ...(empty ? bare : {}) }),
      shapes,
      annotations,
    });
  };

  // ---- tunability: a colour for each workload

  const drawTunability = () => {
    const traces = data.tunability.flatMap((curve, place) => {
      const line = { color: colour(`--c${place % 8}`), dash: DASHES[place % 5], width: 2.25 };
      const name = short(data.workloads[curve.workload].name);
      const known = curve.k.filter((_, i) => curve.score_low[i] !== null);
      const band = {
        x: [...known, ...[...known].reverse()],
        y: [...curve.score_high.slice(0, known.length), ...curve.score_low.slice(0, known.length).reverse()],
        mode: "lines", line: { width: 0 }, fill: "toself", fillcolor: line.color, opacity: 0.12, hoverinfo: "skip",
        showlegend: false,
      };
      const score = {
        x: curve.k,
        y: curve.score,
        name,
        mode: "lines+markers",
        line,
        marker: { symbol: MARKERS[place % 7], size: 8 },
        meta: [name],
        customdata: curve.reached,
        hovertemplate: "%{meta[0]}<br>%{y:.3f} with the best of %{x}<br>target met by %{customdata:.0%}<extra></extra>",
      };
      // More bands than these hide each other.
      return known.length && data.tunability.length <= 4 ? [band, score] : [score];
    });
    draw("tunability-plot", traces, {
      annotations: traces.length ? [] : [message("No study with several trials is on record")],
      xaxis: axis("trials, k", { dtick: 1 }),
      yaxis: axis("expected score", { range: [-0.02, 1.04] }),
      showlegend: true,
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", font: { color: colour("--ink") } },
    });
  };

  // ---- what the reader does

  const all = {
    "profile-plot": drawProfile, "curves-plot": drawCurves, "memory-plot": drawMemory, "tunability-plot": drawTunability,
  };
  const drawings = Object.keys(all).filter(element).map((id) => all[id]);
  const drawAll = () => {
    for (const drawing of drawings) drawing();
  };

  const showWorkload = () => {
    for (const table of document.querySelectorAll("[data-workload]")) {
      table.hidden = Number(table.dataset.workload) !== state.workload;
    }
  };

  const chips = [...document.querySelectorAll("[data-submission]")];
  const press = () => {
    for (const chip of chips) chip.setAttribute("aria-pressed", String(shown.has(Number(chip.dataset.submission))));
  };

  const listen = () => {
    for (const chip of chips) {
      chip.addEventListener("click", () => {
        const index = Number(chip.dataset.submission);
        if (!shown.delete(index)) shown.add(index);
        press();
        drawAll();
      });
    }
    for (const button of document.querySelectorAll("[data-show]")) {
      button.addEventListener("click", () => {
        shown.clear();
        if (button.dataset.show === "all") for (const index of data.submissions.keys()) shown.add(index);
        press();
        drawAll();
      });
    }
    element("workload")?.addEventListener("change", (event) => {
      state.workload = Number(event.target.value);
      showWorkload();
      drawCurves();
    });
    for (const radio of document.querySelectorAll("input[name=axis]")) {
      radio.addEventListener("change", () => {
        state.axis = radio.value;
        drawCurves();
      });
    }
    document.addEventListener("themechange", drawAll);
  };

  if (!globalThis.Plotly) {
    for (const plot of document.querySelectorAll(".plot")) {
      plot.textContent = "The plots need plotly.min.js beside this page.";
    }
    return;
  }
  // A browser that comes back to the page keeps what was chosen.
  if (element("workload")) state.workload = Number(element("workload").value);
  state.axis = document.querySelector("input[name=axis]:checked")?.value ?? "seconds";
  press();
  showWorkload();
  listen();
  drawAll();
})();
