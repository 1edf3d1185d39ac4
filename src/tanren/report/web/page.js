// Draws the page's figures from the JSON in it. Everything else on the page is plain HTML.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("page-data").textContent);
  const several = data.runs.length > 1;
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  let axis = "step";
  let plots = [];

  const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 2 });
  const short = (value) => {
    if (value == null) return "";
    const size = Math.abs(value);
    if (size >= 10000) return compact.format(value);
    if (size !== 0 && size < 0.0001) return value.toExponential(2).replace(/\.?0+e/, "e");
    return String(+value.toPrecision(5));
  };
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // What a step is on the axis that is shown: a straight line between the clock's known points.
  const place = (run, step) => {
    if (axis === "step") return step;
    const steps = run.clock.step, there = run.clock[axis];
    if (!steps.length) return step;
    let low = 0, high = steps.length - 1;
    if (step <= steps[0]) return axis === "tokens" ? there[0] * step / steps[0] : there[0];
    if (step >= steps[high]) return there[high];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] <= step) low = middle; else high = middle;
    }
    const share = (step - steps[low]) / (steps[high] - steps[low]);
    return there[low] + share * (there[high] - there[low]);
  };

  const series = (line) => {
    const hue = colour(`--c${(several ? line.run : line.place) % 8}`);
    const dashed = several && line.place > 0;
    const one = { label: line.label, stroke: hue, width: 2, spanGaps: true, value: (_, v) => short(v),
                  points: { show: false } };
    if (line.kind === "faint") Object.assign(one, { stroke: hue + (line.steps.length > 800 ? "30" : "66"), width: 1 });
    if (line.kind === "points") {
      const few = line.steps.length <= 60;
      Object.assign(one, { width: line.joined ? 1.5 : 0, dash: few ? [5, 4] : [],
                           points: { show: few || !line.joined, size: few ? 7 : 4,
                                     stroke: hue, fill: hue } });
    }
    if (dashed && line.kind !== "points") one.dash = [6, 4];
    // One step alone makes no line.
    if (line.steps.length === 1) one.points = { show: true, size: 8, fill: hue };
    return one;
  };

  // Where another attempt goes on.
  const starts = (plot) => {
    const { ctx, bbox } = plot;
    const drawn = new Set();
    ctx.save();
    ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
    ctx.setLineDash([4 * devicePixelRatio, 4 * devicePixelRatio]);
    data.runs.forEach((run, number) => run.starts.forEach(([attempt, step]) => {
      const x = plot.valToPos(place(run, step), "x", true);
      if (x < bbox.left || x > bbox.left + bbox.width || drawn.has(`${number} ${x}`)) return;
      drawn.add(`${number} ${x}`);
      ctx.strokeStyle = ctx.fillStyle = several ? colour(`--c${number % 8}`) : colour("--soft");
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      const text = `attempt ${attempt}`;
      const room = bbox.left + bbox.width - x > ctx.measureText(text).width + 8;
      ctx.textAlign = room ? "left" : "right";
      ctx.fillText(text, x + (room ? 4 : -4), bbox.top + 12 * devicePixelRatio);
    }));
    ctx.restore();
  };

  const draw = (chart, target) => {
    const tables = chart.lines.map((line) => {
      const run = data.runs[line.run];
      return [line.steps.map((step) => place(run, step)), line.values];
    });
    const axes = { stroke: colour("--soft"), grid: { stroke: colour("--line"), width: 1 },
                   ticks: { stroke: colour("--line"), width: 1 }, font: "12px system-ui, sans-serif" };
    const title = { step: "step", tokens: "tokens read", hours: "hours of training" }[axis];
    return new uPlot({
      width: Math.max(target.clientWidth, 200),
      height: window.innerWidth < 640 ? 220 : 280,
      padding: [10, 14, 0, 0],
      cursor: { sync: { key: "figures" }, focus: { prox: 24 } },
      focus: { alpha: 0.35 },
      // Seconds are looked at beside nothing at all.
      scales: { x: { time: false },
                ...(/^(s|GiB)/.test(chart.unit) && { y: { range: (_, __, high) => [0, 1.1 * high || 1] } }) },
      axes: [
        { ...axes, values: (_, all) => all.map(short), label: title, labelSize: 20,
          labelFont: "12px system-ui, sans-serif" },
        { ...axes, values: (_, all) => all.map(short), size: 70 },
      ],
      series: [{ label: title, value: (_, v) => short(v) }, ...chart.lines.map(series)],
      hooks: { drawAxes: [starts] },
    }, uPlot.join(tables), target);
  };

  // The first steps fall so deep that all others look flat beside them.
  const start = document.getElementById("start");
  const enlarge = () => {
    const x = plots.map((plot) => plot.data[0]);
    const last = Math.max(...x.map((one) => one[one.length - 1]));
    const first = start?.checked ? last / 50 : Math.min(...x.map((one) => one[0]));
    if (last <= first) return;
    plots.forEach((plot, at) => {
      if (data.charts[at].id !== "lr") plot.setScale("x", { min: first, max: last });
    });
  };

  const all = () => {
    plots.forEach((plot) => plot.destroy());
    plots = data.charts.map((chart) => draw(chart, document.querySelector(`#chart-${chart.id} .plot`)));
    if (plots.length) enlarge();
    // For whoever looks whether the curves are there: points that lie in the drawing.
    document.documentElement.dataset.points = plots.map((plot) => plot.series.slice(1).reduce(
      (sum, _, at) => sum + plot.data[at + 1].filter((v) => v != null).length, 0)).join(" ");
  };

  all();
  document.getElementById("axis")?.addEventListener("change", (event) => {
    if (event.target.name !== "axis") return;
    axis = event.target.value;
    all();
  });
  start?.addEventListener("change", all);
  dark.addEventListener("change", all);
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return;
    width = window.innerWidth;
    plots.forEach((plot, at) => plot.setSize({
      width: Math.max(document.querySelector(`#chart-${data.charts[at].id} .plot`).clientWidth, 200),
      height: plot.height,
    }));
  });
})();
