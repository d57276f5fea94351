// Layers x experts on a canvas: each layer is a band of cells, one for each expert.

import { h } from "./dom.js";

const HEAT = 63; // bits of a cell, as the server sends them
const RESIDENT = 64;
const READING = 128;
const GUTTER = 30; // for the numbers of layers, CSS pixels
const LARGEST = 36; // cell, CSS pixels
const FADE_MS = 450;
const FRAME_MS = 33;
const STILL = matchMedia("(prefers-reduced-motion: reduce)");

/** "#rrggbb" as three numbers. */
function rgb(text) {
  const value = Number.parseInt(text.trim().slice(1), 16);
  return [value >> 16, (value >> 8) & 255, value & 255];
}

const mix = (a, b, share) => a.map((value, i) => value + (b[i] - value) * share);

/** How often a cell's expert was used lately, in words. */
function usage(heat) {
  if (heat === 0) return "not used lately";
  return heat < 14 ? "used lately" : heat < 36 ? "used often" : "used all the time";
}

function inWords(cell) {
  const place = cell & READING ? "being read" : cell & RESIDENT ? "in memory" : "on disk";
  return `${place}, ${usage(cell & HEAT)}`;
}

export class HeatMap {
  constructor(canvas, frame) {
    this.canvas = canvas;
    this.frame = frame;
    this.context = canvas.getContext("2d");
    this.small = document.createElement("canvas"); // one pixel a cell
    this.tip = h("div", { class: "tip", role: "status", hidden: true });
    frame.append(this.tip);
    this.layers = []; // {layer, first, count} of those with experts
    this.cells = new Uint8Array(0);
    this.at = null; // cell under pointer or cursor
    this.drawing = 0;
    this.drawn = 0;
    new ResizeObserver(() => this.resize()).observe(frame);
    for (const name of ["pointerdown", "pointermove"]) {
      canvas.addEventListener(name, (event) => this.point(this.cellAt(event.offsetX, event.offsetY)));
    }
    canvas.addEventListener("pointerleave", (event) => {
      if (event.pointerType !== "touch") this.point(null); // a finger that is lifted has still pointed
    });
    canvas.addEventListener("blur", () => this.point(null));
    canvas.addEventListener("keydown", (event) => this.key(event));
    this.takeColours();
  }

  /** Colours of the style sheet; the map is dark in a light page, too. */
  takeColours() {
    const style = getComputedStyle(this.frame);
    const [absent, cold, hot, reading, used] = ["absent", "cold", "hot", "reading", "used"].map((name) =>
      rgb(style.getPropertyValue(`--map-${name}`)),
    );
    this.colours = Array.from({ length: 256 }, (_, cell) => {
      if (cell & READING) return reading;
      const heat = (cell & HEAT) / HEAT;
      return cell & RESIDENT ? mix(cold, hot, Math.sqrt(heat)) : mix(absent, cold, 0.35 * heat);
    });
    this.flash = { reading, used };
    this.ink = style.getPropertyValue("--map-ink");
    this.paper = style.getPropertyValue("--map-paper");
  }

  /** How many experts each layer has. */
  shape(experts) {
    let first = 0;
    this.layers = [];
    experts.forEach((count, layer) => {
      if (count) this.layers.push({ layer, first, count });
      first += count;
    });
    this.cells = new Uint8Array(first);
    this.glow = new Float32Array(first); // 0..1, of what has just happened
    this.arrived = new Uint8Array(first); // whether that was a read
    this.fresh = true;
    this.at = null; // it may lie outside of what another model has
    this.tip.hidden = true;
    this.resize();
  }

  /** Show new cells; returns how many experts are in memory and being read. */
  update(cells) {
    const before = this.cells;
    const counts = { resident: 0, reading: 0, all: cells.length };
    for (let i = 0; i < cells.length; i += 1) {
      const cell = cells[i];
      const was = before[i];
      if (cell & READING) counts.reading += 1;
      else if (cell & RESIDENT) counts.resident += 1;
      if (cell === was || this.fresh) continue;
      if ((cell & HEAT) > (was & HEAT)) {
        this.glow[i] = 1;
        this.arrived[i] = was & RESIDENT ? 0 : 1; // it was not there and has been used: it was read
      } else if (cell & RESIDENT && !(was & RESIDENT)) {
        this.glow[i] = 1;
        this.arrived[i] = 1;
      }
    }
    this.fresh = false;
    this.cells = cells;
    if (STILL.matches) this.glow.fill(0);
    this.animate();
    if (this.at !== null) this.showTip();
    return counts;
  }

  /** The largest cells that fit, up to twice as long as wide; sizes in device pixels. */
  resize() {
    const scale = devicePixelRatio;
    const width = Math.floor((this.frame.clientWidth - GUTTER) * scale);
    const height = Math.floor(this.frame.clientHeight * scale);
    const most = Math.max(0, ...this.layers.map((layer) => layer.count));
    if (!most || width <= 0 || height <= 0) return;
    const gap = Math.round((this.layers.length > 24 ? 1 : 3) * scale);
    let best = { side: 0 };
    for (let rows = 1; rows <= most; rows += 1) {
      if (most % rows) continue; // a ragged last row looks like experts that are not there
      const columns = most / rows;
      const wide = Math.max(1, Math.floor(width / columns));
      const high = Math.max(1, Math.floor((height - gap * (this.layers.length - 1)) / (this.layers.length * rows)));
      const side = Math.min(wide, high);
      const longest = Math.min(2 * side, Math.ceil(LARGEST * scale));
      if (side > best.side) best = { rows, columns, side, wide: Math.min(wide, longest), high: Math.min(high, longest) };
    }
    const band = best.rows * best.high + gap;
    this.grid = { ...best, band, scale, left: Math.round(GUTTER * scale) };
    this.canvas.width = this.grid.left + best.columns * best.wide;
    this.canvas.height = band * this.layers.length - gap;
    this.canvas.style.width = `${this.canvas.width / scale}px`;
    this.canvas.style.height = `${this.canvas.height / scale}px`;
    this.small.width = best.columns;
    this.small.height = best.rows * this.layers.length;
    this.image = new ImageData(this.small.width, this.small.height);
    this.draw();
  }

  /** Draw until nothing glows any more. */
  animate() {
    if (this.drawing) return;
    this.drawn = performance.now();
    const frame = (now) => {
      this.drawing = 0;
      const passed = now - this.drawn;
      let glowing = true;
      if (passed >= FRAME_MS) {
        this.drawn = now;
        glowing = this.fade(Math.exp(-passed / FADE_MS));
        this.draw();
      }
      if (glowing) this.drawing = requestAnimationFrame(frame);
    };
    this.draw();
    this.drawing = requestAnimationFrame(frame);
  }

  fade(factor) {
    let glowing = false;
    for (let i = 0; i < this.glow.length; i += 1) {
      if (!this.glow[i]) continue;
      this.glow[i] = this.glow[i] < 0.03 ? 0 : this.glow[i] * factor;
      glowing = true;
    }
    return glowing;
  }

  draw() {
    const { context, grid, image, layers, cells, glow, arrived, colours, flash } = this;
    if (!grid || !image || !cells.length) return;
    const pixels = image.data;
    layers.forEach(({ first, count }, index) => {
      let p = 4 * index * grid.rows * grid.columns; // rows of a band follow each other, so experts do
      for (let i = first; i < first + count; i += 1, p += 4) {
        const base = colours[cells[i]];
        const share = glow[i] * (arrived[i] ? 0.95 : 0.75);
        const over = arrived[i] ? flash.reading : flash.used;
        pixels[p] = base[0] + (over[0] - base[0]) * share;
        pixels[p + 1] = base[1] + (over[1] - base[1]) * share;
        pixels[p + 2] = base[2] + (over[2] - base[2]) * share;
        pixels[p + 3] = 255;
      }
    });
    this.small.getContext("2d").putImageData(image, 0, 0);
    context.imageSmoothingEnabled = false;
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    layers.forEach((_, index) => {
      const from = [0, index * grid.rows, grid.columns, grid.rows];
      context.drawImage(this.small, ...from, grid.left, index * grid.band, grid.columns * grid.wide, grid.rows * grid.high);
    });
    this.drawLines();
    this.drawLabels();
    this.drawCursor();
  }

  /** Lines between cells that are large enough for them. */
  drawLines() {
    const { context, grid, canvas } = this;
    if (grid.side < 5) return;
    const line = Math.max(1, Math.round(grid.side / 12));
    context.fillStyle = this.paper;
    for (let x = 1; x <= grid.columns; x += 1) context.fillRect(grid.left + x * grid.wide - line, 0, line, canvas.height);
    for (let index = 0; index < this.layers.length; index += 1) {
      for (let row = 1; row < grid.rows; row += 1) {
        context.fillRect(grid.left, index * grid.band + row * grid.high - line, canvas.width, line);
      }
    }
  }

  /** Numbers of layers, as many as there is room for. */
  drawLabels() {
    const { context, grid } = this;
    const font = 10 * grid.scale;
    const step = Math.max(1, Math.ceil((1.4 * font) / grid.band));
    context.font = `${font}px system-ui, sans-serif`;
    context.fillStyle = this.ink;
    context.textAlign = "right";
    context.textBaseline = "middle";
    for (let index = 0; index < this.layers.length; index += step) {
      const middle = Math.max(font / 2, index * grid.band + (grid.rows * grid.high) / 2);
      context.fillText(this.layers[index].layer, grid.left - 6 * grid.scale, middle);
    }
  }

  drawCursor() {
    if (this.at === null) return;
    const { x, y } = this.place(this.at);
    for (const [colour, width] of [[this.paper, 5], ["#fff", 2]]) {
      this.context.strokeStyle = colour;
      this.context.lineWidth = width * this.grid.scale;
      this.context.strokeRect(x, y, this.grid.wide, this.grid.high);
    }
  }

  /** Where a cell lies on the canvas, device pixels. */
  place(at) {
    const { grid } = this;
    const { index, expert } = this.named(at);
    const row = Math.floor(expert / grid.columns);
    return { x: grid.left + (expert % grid.columns) * grid.wide, y: index * grid.band + row * grid.high };
  }

  named(at) {
    const index = this.layers.findIndex(({ first, count }) => at < first + count);
    return { index, layer: this.layers[index].layer, expert: at - this.layers[index].first };
  }

  cellAt(x, y) {
    const { grid } = this;
    if (!grid) return null;
    const column = Math.floor((x * grid.scale - grid.left) / grid.wide);
    const index = Math.floor((y * grid.scale) / grid.band);
    const row = Math.floor((y * grid.scale - index * grid.band) / grid.high);
    const layer = this.layers[index];
    const expert = row * grid.columns + column;
    const inside = layer && column >= 0 && column < grid.columns && row < grid.rows && expert < layer.count;
    return inside ? layer.first + expert : null;
  }

  /** Name a cell; null: none. */
  point(at) {
    if (at === this.at) return;
    this.at = at;
    this.tip.hidden = at === null;
    if (at !== null) this.showTip();
    this.draw();
  }

  showTip() {
    const { layer, expert } = this.named(this.at);
    const { x, y } = this.place(this.at);
    const text = `Layer ${layer}, expert ${expert}: ${inWords(this.cells[this.at])}`;
    if (this.tip.textContent !== text) this.tip.textContent = text;
    const { scale } = this.grid;
    const left = Math.min(x / scale, this.frame.clientWidth - this.tip.offsetWidth);
    const above = y / scale - this.tip.offsetHeight - 6;
    this.tip.style.left = `${Math.max(0, left)}px`;
    this.tip.style.top = `${above >= 0 ? above : (y + this.grid.high) / scale + 6}px`;
  }

  /** Arrows go from cell to cell, page keys from layer to layer. */
  key(event) {
    if (!this.grid) return;
    const last = this.cells.length - 1;
    const columns = this.grid.columns;
    const per = this.layers[0].count;
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, PageUp: -per, PageDown: per };
    if (event.key === "Escape" && this.at !== null) {
      event.stopPropagation();
      this.point(null);
    } else if (event.key in steps || event.key === "Home" || event.key === "End") {
      event.preventDefault();
      const to = event.key === "Home" ? 0 : event.key === "End" ? last : (this.at ?? 0) + (this.at === null ? 0 : steps[event.key]);
      this.point(Math.min(last, Math.max(0, to)));
    }
  }

  /** Rows of the same for those who do not look: (layer, experts, in memory, being read, used lately). */
  rows() {
    return this.layers.map(({ layer, first, count }) => {
      const own = this.cells.subarray(first, first + count);
      const counted = (test) => own.reduce((sum, cell) => sum + (test(cell) ? 1 : 0), 0);
      const reading = counted((cell) => cell & READING);
      return [layer, count, counted((cell) => cell & RESIDENT), reading, counted((cell) => cell & HEAT)];
    });
  }
}
