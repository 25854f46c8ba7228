"use strict";

async function unpack(name) {
  const packed = document.getElementById(name);
  const bytes = Uint8Array.from(atob(packed.textContent), (letter) => letter.charCodeAt(0));
  packed.remove();
  const unpacked = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(unpacked).text();
}

// --- light and dark ---------------------------------------------------------------------------------------------------

{
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  const isDark = () => (chosen === null ? system.matches : chosen === "dark");
  const name = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  button.addEventListener("click", () => {
    chosen = isDark() ? "light" : "dark";
    root.style.colorScheme = chosen;
    name();
  });
  system.addEventListener("change", name);
  name();
}

// --- tables -----------------------------------------------------------------------------------------------------------

function sortTable(table, column, direction) {
  const body = table.tBodies[0];
  const key = (row) => {
    const cell = row.cells[column];
    return cell.dataset.order === undefined ? null : Number(cell.dataset.order);
  };
  const isNumeric = [...body.rows].some((row) => key(row) !== null);
  const rows = [...body.rows].sort((one, other) => {
    if (!isNumeric) {
      return direction * one.cells[column].textContent.localeCompare(other.cells[column].textContent);
    }
    const [a, b] = [key(one), key(other)];
    if (a === null || b === null) return (a === null) - (b === null); // rows without a value stay last
    return direction * (a - b);
  });
  body.append(...rows);
}

for (const heading of document.querySelectorAll("th")) {
  heading.querySelector("button").addEventListener("click", () => {
    const row = heading.parentElement;
    const ascending = heading.getAttribute("aria-sort") !== "ascending";
    for (const other of row.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    sortTable(row.closest("table"), heading.cellIndex, ascending ? 1 : -1);
  });
}

// --- charts -----------------------------------------------------------------------------------------------------------

const charts = {
  config: {
    displaylogo: false,
    responsive: false,
    displayModeBar: "hover",
    modeBarButtons: [["toImage", "resetScale2d"]], // by default there is one that sends the chart's data to a server
  },

  async loadPlotly() {
    const script = document.createElement("script");
    script.textContent = await unpack("plotly-packed");
    document.head.append(script);
  },

  isShown(trace) {
    if (!trace.meta || trace.meta.variant === undefined) return true;
    return this.variants.get(trace.meta.variant) !== false && !(trace.meta.seed && this.seeds && !this.seeds.checked);
  },

  draw(place) {
    const figure = this.figures[place.dataset.figure];
    for (const trace of figure.data) trace.visible = this.isShown(trace);
    Plotly.react(place, figure.data, figure.layout, this.config);
    place.dataset.drawn = "yes";
  },

  // Plotly cannot measure text inside a closed <details>; opening it draws the rest.
  left() {
    return [...document.querySelectorAll(".chart:not([data-drawn])")].filter((place) => place.offsetParent);
  },

  drawAll() {
    const left = this.left();
    const next = () => {
      const place = left.shift();
      if (place) {
        this.draw(place);
        setTimeout(next);
      } else {
        document.documentElement.dataset.charts = "drawn";
      }
    };
    next();
  },

  redraw() {
    for (const place of document.querySelectorAll(".chart[data-drawn]")) this.draw(place);
  },

  start(figures) {
    this.figures = figures;
    this.seeds = document.getElementById("seeds");
    const boxes = [...document.querySelectorAll("[data-variant]")];
    this.variants = new Map(boxes.map((box) => [box.dataset.variant, box.checked]));
    for (const box of boxes) {
      box.addEventListener("change", () => {
        this.variants.set(box.dataset.variant, box.checked);
        this.redraw();
      });
    }
    if (this.seeds) this.seeds.addEventListener("change", () => this.redraw());
    const clouds = document.getElementById("cloud-run");
    if (clouds) {
      const place = document.getElementById("cloud");
      clouds.addEventListener("change", () => {
        place.dataset.figure = clouds.value;
        document.getElementById("cloud-title").textContent = clouds.selectedOptions[0].textContent;
        this.draw(place);
      });
    }
    for (const details of document.querySelectorAll("details")) {
      details.addEventListener("toggle", () => this.drawAll());
    }
    this.drawAll();
  },
};

// --- printing ---------------------------------------------------------------------------------------------------------

{
  const opened = []; // for the paper; a browser prints nothing of what is closed
  window.addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details:not([open])")) {
      details.open = true;
      opened.push(details);
    }
    if (charts.figures) for (const place of charts.left()) charts.draw(place); // the paper does not wait for drawAll
  });
  window.addEventListener("afterprint", () => {
    for (const details of opened.splice(0)) details.open = false;
  });
}
