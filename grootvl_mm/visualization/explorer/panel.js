/** One panel: the image with affinities or segments, lines, and marked positions. */

import { paintAffinity, edgeColor, segmentColor } from "explorer/colors.js";

const WEIGHT_CLASSES = 24;
const WIDTH_CLASSES = 4;
const MARK = { a: "#ffffff", b: "#ffd166" };

const MOST_PIXELS = 16384; // browsers draw nothing on a canvas that is higher

export class Panel {
  /** @param {string} scan tree, raster or cross */
  constructor(scan, title, listen) {
    this.scan = scan;
    this.element = document.createElement("figure");
    this.element.className = `panel ${scan}`;
    this.element.innerHTML = `
      <canvas id="${scan}" tabindex="0" role="application" aria-roledescription="interactive image"
        aria-describedby="${scan}-value ${scan}-note"></canvas>
      <figcaption><span class="name"></span><output id="${scan}-value" aria-live="off"></output><span class="note"
        id="${scan}-note"></span></figcaption>`;
    this.canvas = this.element.querySelector("canvas");
    this.canvas.setAttribute("aria-label", `${title}: arrow keys move the position, Enter holds it, Escape releases it`);
    this.element.querySelector(".name").textContent = title;
    this.value = this.element.querySelector("output");
    this.note = this.element.querySelector(".note");
    this.context = this.canvas.getContext("2d");
    this.under = new OffscreenCanvas(1, 1);
    this.over = new OffscreenCanvas(1, 1);
    this.heat = new OffscreenCanvas(1, 1);
    listen(this);
  }

  /** Set the image and block. */
  setGrid(image, block) {
    this.image = image;
    this.block = block;
    this.canvas.style.aspectRatio = `${image.width} / ${image.height}`;
    this.affinity = new Float32Array(block.size);
    this.heat.width = block.columns;
    this.heat.height = block.rows;
    this.pixels = new ImageData(block.columns, block.rows);
    this.colors = new Uint32Array(this.pixels.data.buffer);
    this.fit();
  }

  /** Match the canvas to its size on the screen; return whether it has changed. */
  fit() {
    const density = Math.min(window.devicePixelRatio || 1, 2);
    const wished = this.canvas.clientWidth * density;
    const scale = Math.min(1, (MOST_PIXELS * this.image.width) / (wished * this.image.height || 1));
    const width = Math.max(1, Math.floor(wished * scale));
    const height = Math.min(MOST_PIXELS, Math.max(1, Math.round((width * this.image.height) / this.image.width)));
    if (width === this.canvas.width && height === this.canvas.height) return false;
    for (const canvas of [this.canvas, this.under, this.over]) {
      canvas.width = width;
      canvas.height = height;
    }
    return true;
  }

  /** Pixels of the canvas per pixel of the image. */
  get zoom() {
    return this.canvas.width / this.image.width;
  }

  /** Pixels of the canvas per position. */
  get cell() {
    return this.zoom * this.block.stride;
  }

  center(v) {
    const { columns } = this.block;
    return [((v % columns) + 0.5) * this.cell, (Math.floor(v / columns) + 0.5) * this.cell];
  }

  /** The position at client coordinates. */
  positionAt(clientX, clientY) {
    const box = this.canvas.getBoundingClientRect();
    const scale = this.image.width / box.width / this.block.stride;
    const clamp = (value, count) => Math.max(0, Math.min(count - 1, Math.floor(value * scale)));
    return clamp(clientY - box.top, this.block.rows) * this.block.columns + clamp(clientX - box.left, this.block.columns);
  }

  /** Draw the layer below the affinities: the image, almost grey below other colours, and the segments. */
  drawUnder(state, segments) {
    const context = this.under.getContext("2d");
    const { width, height } = this.under;
    context.clearRect(0, 0, width, height);
    context.imageSmoothingEnabled = true;
    context.imageSmoothingQuality = "high";
    context.filter = state.show === "image" ? "none" : "grayscale(0.85)";
    context.drawImage(this.image.picture, 0, 0, width, height);
    context.filter = "none";
    if (segments) this.drawSegments(context, segments);
  }

  drawSegments(context, segments) {
    const { rows, columns } = this.block;
    const { data } = this.pixels;
    const known = new Map();
    const leaders = new Int32Array(rows * columns);
    for (let v = 0; v < leaders.length; v++) {
      const leader = (leaders[v] = segments.find(v));
      if (!known.has(leader)) known.set(leader, segmentColor(leader));
      data.set(known.get(leader), 4 * v);
      // Single positions are not filled, and the opacity decreases with the size of the segment.
      const members = segments.members[leader];
      data[4 * v + 3] = members === 1 ? 0 : 150 - (90 * members) / leaders.length;
    }
    this.heat.getContext("2d").putImageData(this.pixels, 0, 0);
    this.drawCells(context, this.heat);
    context.beginPath();
    const differ = (v, w) => leaders[v] !== leaders[w] && segments.members[leaders[v]] > 1 && segments.members[leaders[w]] > 1;
    for (let v = 0; v < leaders.length; v++) {
      const [x, y] = [(v % columns) * this.cell, Math.floor(v / columns) * this.cell];
      if (v % columns > 0 && differ(v, v - 1)) context.rect(x - 0.5, y, 1, this.cell);
      if (v >= columns && differ(v, v - columns)) context.rect(x, y - 0.5, this.cell, 1);
    }
    context.fillStyle = `rgb(255 255 255 / ${segments.count > 2000 ? 0.25 : 0.7})`;
    context.fill();
  }

  /** Draw the layer above the affinities: the edges of a tree, and ground truth or predictions. */
  drawOver(tree, sequence, overlay) {
    const context = this.over.getContext("2d");
    context.clearRect(0, 0, this.over.width, this.over.height);
    if (tree) this.drawTree(context, tree, sequence);
    if (overlay) this.drawOverlay(context, overlay);
  }

  /** Draw the edges from the positions in `sequence` to their parents, coloured by their order. */
  drawTree(context, tree, sequence) {
    const paths = new Map();
    const widest = Math.log2(tree.size);
    for (let i = 0; i < sequence.length; i++) {
      const v = sequence[i];
      const shade = Math.floor((WEIGHT_CLASSES * i) / this.block.edges);
      const width = Math.floor((WIDTH_CLASSES * Math.log2(tree.below[v])) / (widest + 1));
      const key = width * WEIGHT_CLASSES + shade;
      if (!paths.has(key)) paths.set(key, new Path2D());
      paths.get(key).moveTo(...this.center(v));
      paths.get(key).lineTo(...this.center(tree.parent[v]));
    }
    context.lineCap = "round";
    for (const key of [...paths.keys()].sort((a, b) => a - b)) {
      const width = Math.floor(key / WEIGHT_CLASSES);
      context.lineWidth = Math.min(this.cell * 0.6, (0.7 + 0.75 * width) * Math.max(1, Math.sqrt(this.cell / 8)));
      context.strokeStyle = edgeColor((key % WEIGHT_CLASSES) / (WEIGHT_CLASSES - 1));
      context.globalAlpha = 0.7 + 0.1 * width;
      context.stroke(paths.get(key));
    }
    context.globalAlpha = 1;
  }

  drawOverlay(context, overlay) {
    const { zoom } = this;
    const [width, height] = this.image.content;
    if (overlay.picture) context.drawImage(overlay.picture, 0, 0, width * zoom, height * zoom);
    const size = Math.round(11 * Math.min(window.devicePixelRatio || 1, 2));
    context.font = `600 ${size}px system-ui, sans-serif`;
    context.textBaseline = "middle";
    for (const { x, y, width: w, height: h, text, color, ink } of overlay.boxes) {
      context.strokeStyle = color;
      context.lineWidth = size / 6;
      context.strokeRect(x * zoom, y * zoom, w * zoom, h * zoom);
      const length = context.measureText(text).width + size * 0.8;
      const left = Math.max(0, Math.min(x * zoom, this.over.width - length));
      const top = Math.max(0, y * zoom - 1.4 * size);
      context.fillStyle = color;
      context.fillRect(left, top, length, 1.4 * size);
      context.fillStyle = ink;
      context.fillText(text, left + size * 0.4, top + 0.75 * size);
    }
  }

  drawCells(context, canvas) {
    context.imageSmoothingEnabled = false;
    context.drawImage(canvas, 0, 0, canvas.width * this.cell, canvas.height * this.cell);
  }

  /** Draw all layers. `paths` are lists of positions, `marks` ({a, b, here}) positions or null. */
  draw({ showAffinity, scale, paths, marks }) {
    const { context } = this;
    context.drawImage(this.under, 0, 0);
    if (showAffinity) {
      paintAffinity(this.affinity, scale, this.colors);
      for (const v of this.block.padding) this.colors[v] = 0;
      this.heat.getContext("2d").putImageData(this.pixels, 0, 0);
      this.drawCells(context, this.heat);
    }
    context.drawImage(this.over, 0, 0);
    for (const path of paths) this.drawPath(path);
    if (marks.here !== null) this.drawCell(marks.here);
    if (marks.a !== null) this.drawMark(marks.a, "A", MARK.a);
    if (marks.b !== null) this.drawMark(marks.b, "B", MARK.b);
  }

  drawPath(path) {
    const { context } = this;
    const density = Math.min(window.devicePixelRatio || 1, 2);
    const isTree = this.scan === "tree";
    context.beginPath();
    for (const v of path) context.lineTo(...this.center(v));
    context.lineJoin = context.lineCap = "round";
    // The paths of raster and cross scans fill the picture, so draw them thin, and fainter the denser they are.
    const faint = Math.min(0.45, this.cell / density / 30);
    const lines = isTree ? [["rgb(0 0 0 / 0.65)", 4.5], ["#ffffff", 2]] : [[`rgb(255 255 255 / ${faint})`, 1]];
    for (const [style, width] of lines) {
      context.strokeStyle = style;
      context.lineWidth = width * density;
      context.stroke();
    }
  }

  drawCell(v) {
    const { context, cell } = this;
    const [x, y] = this.center(v);
    const side = Math.max(cell, 7);
    for (const [style, grow] of [["rgb(0 0 0 / 0.7)", 1.5], ["#ffffff", 0]]) {
      context.strokeStyle = style;
      context.lineWidth = 1.5;
      context.strokeRect(x - side / 2 - grow, y - side / 2 - grow, side + 2 * grow, side + 2 * grow);
    }
  }

  drawMark(v, letter, color) {
    const { context } = this;
    const [x, y] = this.center(v);
    const radius = 8 * Math.min(window.devicePixelRatio || 1, 2);
    context.beginPath();
    context.arc(x, y, radius, 0, 2 * Math.PI);
    context.fillStyle = color;
    context.fill();
    context.strokeStyle = "rgb(0 0 0 / 0.75)";
    context.lineWidth = radius / 6;
    context.stroke();
    context.fillStyle = "#16181a";
    context.font = `700 ${1.3 * radius}px system-ui, sans-serif`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.fillText(letter, x, y + radius * 0.08);
    context.textAlign = "start";
  }
}
