"use strict";
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const plots = [...document.querySelectorAll(".plot")];
  const widths = { whole: 680, panel: 330 }; // in print, where the sheet is narrower than any window says
  let printing = false;

  const wrapped = (text, letters) => text.split(" ").reduce((lines, word) => {
    const last = lines[lines.length - 1];
    return last && (last + word).length < letters ? [...lines.slice(0, -1), last + " " + word] : [...lines, word];
  }, []).join("<br>");

  const hidden = (plot) => {
    const buttons = plot.closest(".group, section > figure").querySelectorAll('.legend [aria-pressed="false"]');
    return new Set([...buttons].map((button) => button.dataset.series));
  };

  const draw = (plot) => {
    const night = dark.matches && !printing;
    plot.style.width = printing ? (plot.closest(".panels") ? widths.panel : widths.whole) + "px" : "";
    const ink = night ? "#e8eaed" : "#1a1c20";
    const grid = night ? "#363b44" : "#e3e6ea";
    const text = document.getElementById("figure" + plot.dataset.figure).textContent;
    const colours = new Set(["color"]);
    const { data, layout } = JSON.parse(text, function (key, value) {
      if (colours.has(key) && value === "black") return ink;
      if (colours.has(key) && Array.isArray(value)) return value.map((one) => (one === "black" ? ink : one));
      return value;
    });
    data.filter((trace) => trace.type === "heatmap").forEach((trace) => {
      const { rows, columns } = trace.meta;
      trace.customdata = rows.map((row) => columns.map((column) => [row, column]));
    });
    const left = hidden(plot);
    data.forEach((trace) => { trace.visible = !left.has(trace.legendgroup); });
    for (const axis of [layout.xaxis, layout.yaxis]) {
      Object.assign(axis, { gridcolor: grid, zerolinecolor: grid, linecolor: grid });
    }
    const letters = Math.max(16, Math.floor((plot.clientWidth - 170) / 6.2));
    layout.xaxis.title.text = wrapped(layout.xaxis.title.text, letters);
    layout.yaxis.title.text = wrapped(layout.yaxis.title.text, Math.floor((layout.height - 70) / 6.5));
    layout.height += 16 * (layout.xaxis.title.text.split("<br>").length - 1);
    plot.style.height = layout.height + "px";
    const font = { color: ink, family: 'system-ui, "Segoe UI", "DejaVu Sans", sans-serif', size: 12 };
    Object.assign(layout, { font, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", width: plot.clientWidth });
    Plotly.react(plot, data, layout, { displayModeBar: false });
  };
  // In a closed fold a chart has no width: it is drawn when the fold opens.
  const drawAll = () => plots.filter((plot) => !plot.closest("details:not([open])")).forEach(draw);
  const print = (now) => { printing = now; drawAll(); };
  if (plots.length) {
    drawAll();
    dark.addEventListener("change", drawAll);
    let waiting = 0;
    addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(drawAll, 200); });
    document.querySelector(".behind")?.addEventListener("toggle", drawAll);
    addEventListener("beforeprint", () => print(true));
    addEventListener("afterprint", () => print(false));
  }

  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
      button.closest("figure, .group").querySelectorAll(".plot").forEach(draw);
    });
  }

  for (const table of document.querySelectorAll("table")) {
    const body = table.tBodies[0];
    const first = [...body.rows];
    for (const button of table.querySelectorAll("thead button")) {
      button.addEventListener("click", () => {
        const head = button.closest("th");
        const words = head.classList.contains("words");
        const value = (row) => {
          const cell = row.cells[head.cellIndex], text = cell.textContent.trim();
          return words ? text : Number(cell.dataset.value ?? (text || NaN));
        };
        const orders = words ? ["ascending", "descending"] : ["descending", "ascending"];
        const order = [...orders, undefined][orders.indexOf(head.getAttribute("aria-sort")) + 1];
        const sign = order === "ascending" ? 1 : -1;
        const sorted = (a, b) => {
          const x = value(a), y = value(b);
          if (words) return sign * x.localeCompare(y, undefined, { numeric: true });
          if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
          return sign * (x - y);
        };
        table.querySelectorAll("th[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
        if (order) head.setAttribute("aria-sort", order);
        body.append(...(order ? [...first].sort(sorted) : first));
      });
    }
  }
})();
