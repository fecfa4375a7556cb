"use strict";
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const plots = [...document.querySelectorAll(".plot")];
  const drawn = new Map();

  const wrapped = (text, letters) => text.split(" ").reduce((lines, word) => {
    const last = lines[lines.length - 1];
    return last && (last + word).length < letters ? [...lines.slice(0, -1), last + " " + word] : [...lines, word];
  }, []).join("<br>");

  const draw = (plot, light) => {
    const night = dark.matches && !light;
    const ink = night ? "#e8eaed" : "#1a1c20";
    const grid = night ? "#363b44" : "#e3e6ea";
    const text = document.getElementById("figure" + plot.dataset.figure).textContent;
    const colours = new Set(["color"]);
    const { data, layout } = JSON.parse(text, function (key, value) {
      if (colours.has(key) && value === "black") return ink;
      if (colours.has(key) && Array.isArray(value)) return value.map((one) => (one === "black" ? ink : one));
      return value;
    });
    data.forEach((trace) => { trace.visible = !(drawn.get(plot) || new Set()).has(trace.legendgroup); });
    for (const axis of [layout.xaxis, layout.yaxis]) {
      Object.assign(axis, { gridcolor: grid, zerolinecolor: grid, linecolor: grid });
    }
    const letters = Math.max(16, Math.floor((plot.clientWidth - 170) / 6.2));
    layout.xaxis.title.text = wrapped(layout.xaxis.title.text, letters);
    layout.yaxis.title.text = wrapped(layout.yaxis.title.text, Math.floor((layout.height - 70) / 6.5));
    layout.modebar = { bgcolor: "rgba(0,0,0,0)", color: night ? "#8b919b" : "#7b828c", activecolor: ink };
    const font = { color: ink, family: 'system-ui, "Segoe UI", "DejaVu Sans", sans-serif', size: 12 };
    Object.assign(layout, { font, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true });
    Plotly.react(plot, data, layout, {
      responsive: true, displaylogo: false, displayModeBar: "hover",
      modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
    });
  };
  const drawAll = (light) => plots.forEach((plot) => draw(plot, light));
  if (plots.length) {
    drawAll(false);
    dark.addEventListener("change", () => drawAll(false));
    let waiting = 0;
    addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(() => drawAll(false), 200); });
    addEventListener("beforeprint", () => { drawAll(true); plots.forEach((plot) => Plotly.Plots.resize(plot)); });
    addEventListener("afterprint", () => { drawAll(false); plots.forEach((plot) => Plotly.Plots.resize(plot)); });
  }

  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(shown));
      for (const plot of button.closest("figure, .group").querySelectorAll(".plot")) {
        const hidden = drawn.get(plot) || new Set();
        hidden[shown ? "delete" : "add"](button.dataset.series);
        drawn.set(plot, hidden);
        draw(plot, false);
      }
    });
  }

  for (const button of document.querySelectorAll("thead button")) {
    button.addEventListener("click", () => {
      const head = button.closest("th");
      const place = head.cellIndex;
      const body = head.closest("table").tBodies[0];
      const rows = [...body.rows];
      const numbers = rows.some((row) => row.cells[place].dataset.value !== undefined);
      const start = numbers ? "descending" : "ascending";
      const order = head.getAttribute("aria-sort") === start
        ? (start === "ascending" ? "descending" : "ascending") : start;
      const sign = order === "ascending" ? 1 : -1;
      const value = (row) => {
        const cell = row.cells[place];
        return numbers ? (cell.dataset.value === undefined ? NaN : Number(cell.dataset.value)) : cell.textContent.trim();
      };
      rows.sort((a, b) => {
        const x = value(a), y = value(b);
        if (!numbers) return sign * x.localeCompare(y);
        if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
        return sign * (x - y);
      });
      head.parentElement.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
      body.append(...rows);
    });
  }
})();
