// --- heatmap browser --------------------------------------------------------------------------------------------------

class HeatmapBrowser {
  static LABEL = 18; // characters of a token beside the map; the line above it has all of them

  constructor(runs) {
    this.runs = runs;
    this.size = 16;
    this.cursor = null;
    const find = (name) => document.getElementById(`heatmap${name}`);
    this.place = find("");
    this.readout = find("-readout");
    this.selects = { run: find("-run"), example: find("-example"), attention: find("-attention") };
    this.fill(this.selects.run, runs.map((run) => run.run));
    this.selects.run.addEventListener("change", () => this.chooseRun());
    this.selects.example.addEventListener("change", () => this.chooseExample());
    this.selects.attention.addEventListener("change", () => this.draw());
    find("-smaller").addEventListener("click", () => this.zoom(-3));
    find("-larger").addEventListener("click", () => this.zoom(3));
    this.place.addEventListener("keydown", (event) => this.onKey(event));
    window.addEventListener("beforeprint", () => this.fitPaper());
    window.addEventListener("afterprint", () => { this.place.style.zoom = ""; });
    this.chooseRun();
  }

  // Keeps the choice where the new list has it, too, so that runs can be compared.
  fill(select, names) {
    const before = select.selectedIndex;
    select.replaceChildren(...names.map((name, index) => new Option(name, String(index))));
    select.selectedIndex = Math.min(Math.max(before, 0), names.length - 1);
  }

  chooseRun() {
    this.fill(this.selects.example, this.run.examples.map((example) => example.name));
    this.chooseExample();
  }

  chooseExample() {
    const fresh = this.selects.attention.length === 0;
    document.getElementById("heatmap-note").textContent = this.example.note;
    this.fill(this.selects.attention, this.example.attentions.map((attention) => attention.name));
    if (fresh) this.selects.attention.selectedIndex = this.example.attentions.length - 1;
    this.cursor = null;
    this.draw();
  }

  get run() { return this.runs[this.selects.run.selectedIndex]; }
  get example() { return this.run.examples[this.selects.example.selectedIndex]; }
  get attention() { return this.example.attentions[this.selects.attention.selectedIndex]; }

  zoom(change) {
    this.size = Math.min(Math.max(this.size + change, 7), 34);
    this.draw();
  }

  isInside(row, column) {
    const { studentChunks, teacherChunks } = this.example;
    return studentChunks[row] >= 0 && studentChunks[row] === teacherChunks[column];
  }

  // Rows in a chunk whose highest weight is outside of it; of equal weights the first counts.
  straying() {
    const { cells } = this.attention;
    const highest = new Map();
    for (let at = 0; at < cells.length; at += 3) {
      const [row, column, weight] = cells.slice(at, at + 3);
      if (!highest.has(row) || weight > highest.get(row).weight) highest.set(row, { column, weight });
    }
    const strays = ([row, { column }]) => this.example.studentChunks[row] >= 0 && !this.isInside(row, column);
    return new Set([...highest].filter(strays).map(([row]) => row));
  }

  draw() {
    const { student, teacher } = this.example;
    const chosen = Object.values(this.selects).map((select) => select.selectedOptions[0].textContent);
    document.getElementById("heatmap-title").textContent = chosen.join("; ");
    const size = this.size;
    this.weights = new Map();
    const cells = this.attention.cells;
    for (let at = 0; at < cells.length; at += 3) this.weights.set(cells[at] * teacher.length + cells[at + 1], cells[at + 2]);
    const [side, top] = [this.labelSize(student), this.labelSize(teacher)];
    const corner = this.svg("corner", side, top);
    const heading = this.svg("top", teacher.length * size + 2, top);
    const names = this.svg("side", side, student.length * size + 2);
    this.body = this.svg("body", teacher.length * size + 2, student.length * size + 2);
    this.columns = teacher.map((name, column) => {
      const [x, y] = [(column + 0.5) * size + 4, top - 5];
      return this.text(heading, name, { x, y, transform: `rotate(-90 ${x} ${y})` });
    });
    const straying = this.straying();
    this.rows = student.map((name, row) => {
      const kind = straying.has(row) ? "strays" : "";
      return this.text(names, name, { x: side - 6, y: (row + 0.5) * size + 4, "text-anchor": "end", class: kind });
    });
    for (let at = 0; at < cells.length; at += 3) {
      const isInside = this.isInside(cells[at], cells[at + 1]);
      const kind = isInside ? "cell-inside" : "cell-outside";
      const box = this.box(this.body, kind, { row: cells[at], column: cells[at + 1] });
      const weight = Math.min(cells[at + 2] / 1000, 1);
      box.setAttribute("fill-opacity", isInside ? weight : Math.sqrt(weight)); // a little outside is to be seen
    }
    this.box(this.body, "frame", { row: 0, column: 0, rows: student.length, columns: teacher.length });
    this.drawChunks();
    this.cross = ["cross", "cross", "cursor"].map((kind) => this.box(this.body, kind, { row: 0, column: 0 }));
    this.place.replaceChildren(corner, heading, names, this.body);
    this.body.addEventListener("pointermove", (event) => this.onPointer(event));
    this.body.addEventListener("pointerdown", (event) => this.onPointer(event));
    this.point(this.cursor, false);
  }

  drawChunks() {
    const { studentChunks, teacherChunks } = this.example;
    for (const chunk of new Set(studentChunks)) {
      if (chunk < 0 || !teacherChunks.includes(chunk)) continue;
      const [row, column] = [studentChunks.indexOf(chunk), teacherChunks.indexOf(chunk)];
      const [rows, columns] = [studentChunks.lastIndexOf(chunk) - row + 1, teacherChunks.lastIndexOf(chunk) - column + 1];
      this.box(this.body, "chunk", { row, column, rows, columns });
    }
  }

  // --- moving -------------------------------------------------------------------------------------------------------

  onPointer(event) {
    const frame = this.body.getBoundingClientRect();
    const row = Math.floor((event.clientY - frame.top - 1) / this.size);
    const column = Math.floor((event.clientX - frame.left - 1) / this.size);
    if (row >= 0 && column >= 0 && row < this.rows.length && column < this.columns.length) this.point({ row, column }, false);
  }

  onKey(event) {
    const moves = {
      ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
      PageUp: [-10, 0], PageDown: [10, 0], Home: [0, -Infinity], End: [0, Infinity],
    };
    const move = moves[event.key];
    if (!move || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    const { row, column } = this.cursor ?? { row: -move[0], column: -move[1] === Infinity ? 0 : -move[1] };
    const within = (value, count) => Math.min(Math.max(value, 0), count - 1);
    this.point({ row: within(row + move[0], this.rows.length), column: within(column + move[1], this.columns.length) }, true);
  }

  point(cursor, scroll) {
    for (const label of this.place.querySelectorAll(".here")) label.classList.remove("here");
    for (const shape of this.cross) shape.setAttribute("visibility", cursor ? "visible" : "hidden");
    this.cursor = cursor;
    if (!cursor) return;
    const { row, column } = cursor;
    const { student, teacher } = this.example;
    this.move(this.cross[0], { row, column: 0, columns: teacher.length });
    this.move(this.cross[1], { row: 0, column, rows: student.length });
    this.move(this.cross[2], { row, column });
    this.rows[row].classList.add("here");
    this.columns[column].classList.add("here");
    const weight = this.weights.get(row * teacher.length + column);
    const amount = weight === undefined ? "not drawn (small)" : (weight / 1000).toFixed(3);
    const where = this.isInside(row, column) ? "inside the chunk" : "outside the chunk";
    this.readout.textContent =
      `student ${row + 1} \u201c${student[row]}\u201d \u2192 teacher ${column + 1} \u201c${teacher[column]}\u201d: ${amount}, ${where}`;
    if (scroll) this.scrollTo(row, column);
  }

  scrollTo(row, column) {
    const [left, top] = [this.place.children[0].clientWidth, this.place.children[0].clientHeight];
    const fit = (at, shown, before) => {
      const start = at * this.size;
      return Math.min(Math.max(before, start + 2 * this.size - shown), Math.max(start - this.size, 0));
    };
    this.place.scrollLeft = fit(column, this.place.clientWidth - left, this.place.scrollLeft);
    this.place.scrollTop = fit(row, this.place.clientHeight - top, this.place.scrollTop);
  }

  fitPaper() {
    const width = [0, 1].reduce((sum, index) => sum + Number(this.place.children[index].getAttribute("width")), 20);
    this.place.style.zoom = String(Math.min(1, 680 / width));
  }

  // --- shapes -------------------------------------------------------------------------------------------------------

  labelSize(names) {
    const pen = document.createElement("canvas").getContext("2d");
    pen.font = "bold 11px monospace";
    return Math.ceil(Math.max(...names.map((name) => pen.measureText(this.shortened(name)).width), 20)) + 14;
  }

  shortened(name) {
    const letters = [...name];
    return letters.length <= HeatmapBrowser.LABEL ? name : `${letters.slice(0, HeatmapBrowser.LABEL - 1).join("")}\u2026`;
  }

  element(parent, tag, attributes) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (parent) parent.append(made);
    return made;
  }

  svg(kind, width, height) { return this.element(null, "svg", { class: kind, width, height }); }

  text(parent, name, place) {
    const made = this.element(parent, "text", place);
    made.textContent = this.shortened(name);
    return made;
  }

  box(parent, kind, block) { return this.move(this.element(parent, "rect", { class: kind }), block); }

  move(shape, { row, column, rows = 1, columns = 1 }) {
    const numbers = { x: column, y: row, width: columns, height: rows };
    for (const [name, value] of Object.entries(numbers)) {
      shape.setAttribute(name, value * this.size + (name === "x" || name === "y" ? 1 : 0));
    }
    return shape;
  }
}

// --- start ------------------------------------------------------------------------------------------------------------

async function start() {
  const data = JSON.parse(await unpack("data-packed"));
  if (data.heatmaps.length) new HeatmapBrowser(data.heatmaps);
  await charts.loadPlotly();
  charts.start(data.figures);
}

start().catch((error) => {
  const trouble = document.getElementById("trouble");
  trouble.textContent = `The charts cannot be drawn in this browser (${error.message}).`;
  trouble.hidden = false;
});
