/** Synchronizes state, controls and panels. */

import { affinityGradient, DECADES, edgeGradient } from "explorer/colors.js";
import { checkBox, choices, dropDown, legend } from "explorer/controls.js";
import { Block, edgesOf, Scans, unpack } from "explorer/data.js";
import { Panel } from "explorer/panel.js";
import { readHash, writeHash } from "explorer/state.js";
import { Segments } from "explorer/tree.js";

const SCANS = { tree: "Tree", raster: "Raster", cross: "Cross" };
const METRICS = { cosine: "cosine", euclidean: "Euclidean", manhattan: "Manhattan" };
const DRAG = 8; // pixels; a longer movement is a drag, not a tap
const HASH_DELAY = 250; // milliseconds; browsers limit how often a page may change its address
const INITIAL = {
  image: 0, stage: 0, block: 0, channel: 0, show: "affinity", lines: "off", scale: "linear", overlay: "none",
  metric: null, edges: null, a: null, b: null,
};
const byId = (id) => document.getElementById(id);
const count = (number) => number.toLocaleString("en");
const counted = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
const affinityText = (value) => (value >= 0.00005 ? value.toFixed(4) : value === 0 ? "0" : value.toExponential(1));

export class Explorer {
  constructor(meta) {
    this.meta = meta;
    this.images = new Map();
    this.frame = 0;
    this.stale = new Set();
    this.here = { x: 0.5, y: 0.5 };
    this.state = { ...INITIAL };
    this.panels = Object.entries(SCANS).map(([scan, title]) => new Panel(scan, title, (panel) => this.listen(panel)));
    byId("panels").append(...this.panels.map((panel) => panel.element));
    this.makeControls();
    new ResizeObserver(() => this.redraw(["under", "over"])).observe(byId("panels"));
    matchMedia("(resolution: 1dppx)").addEventListener("change", () => this.redraw(["under", "over"]));
    window.addEventListener("hashchange", () => this.change({ ...INITIAL, ...readHash(location.hash) }));
  }

  makeControls() {
    const set = (key) => (value) => this.change({ [key]: value });
    this.controls = {
      image: dropDown("image", "Image", (value) => this.change({ image: Number(value) })),
      stage: choices("stage", "Stage", set("stage")),
      block: choices("block", "Block", set("block")),
      metric: choices("metric", "Metric of the tree", set("metric")),
      channel: dropDown("channel", "Decays", (value) => this.change({ channel: Number(value) })),
      show: choices("show", "Colours by", set("show")),
      scale: choices("scale", "Scale", set("scale")),
      overlay: choices("overlay", "Overlay", set("overlay")),
      lines: checkBox("lines", "Lines of the tree", (on) => this.change({ lines: on ? "on" : "off" })),
    };
    this.legends = { affinity: legend("affinity-legend"), lines: legend("lines-legend") };
    const { image, stage, block, ...options } = this.controls;
    byId("choose").append(image.element, stage.element, block.element);
    byId("options").append(...Object.values(options).map(({ element }) => element));
    byId("options").append(...Object.values(this.legends).map(({ element }) => element));
    const { show, scale } = this.controls;
    show.offer([["affinity", "affinity"], ["segments", "segments"], ["image", "image"]]);
    scale.offer([["linear", "linear"], ["log", "logarithmic", `from 1e-${DECADES} to 1`]]);

    for (const input of [byId("edges"), byId("edge-number")]) {
      input.addEventListener("input", () => {
        this.play(false);
        this.grow(Number(input.value));
      });
    }
    byId("play").addEventListener("click", () => this.play(!this.playing));
  }

  /** Show the state in the address. */
  async start() {
    await this.change(readHash(location.hash));
  }

  /** Change some fields of the state, adapt the others to them, and redraw. */
  async change(patch) {
    const next = { ...(this.pending?.state ?? this.state), ...patch }; // also what an image is still being loaded for
    next.image = Math.min(next.image, this.meta.images.length - 1);
    const info = this.meta.images[next.image];
    const at = { stage: next.stage, block: next.block };
    const inStage = info.blocks.filter(({ stage }) => stage === Math.min(at.stage, info.blocks.at(-1).stage));
    const blockInfo = inStage[Math.min(at.block, inStage.length - 1)];
    next.stage = blockInfo.stage;
    next.block = blockInfo.block;
    if (!blockInfo.trees.some(({ metric }) => metric === next.metric)) next.metric = blockInfo.trees[0].metric;
    next.channel = Math.min(next.channel, blockInfo.channels.length - 1);
    if (next.overlay !== "none" && !info.overlays.some(({ name }) => name === next.overlay)) next.overlay = "none";
    if (next.a === null) next.b = null;

    const all = edgesOf(blockInfo);
    const before = this.pending?.all ?? this.block?.edges ?? all;
    if (patch.edges === undefined && before !== all) {
      next.edges = Math.round((all * next.edges) / Math.max(1, before)); // the same share of another tree
    }
    next.edges = Math.min(next.edges ?? all, all);

    const pending = (this.pending = { state: next, all });
    const image = await this.open(next.image);
    if (this.pending !== pending) return; // superseded by a later change
    this.pending = null;
    this.state = next;
    this.image = image;
    this.block = image.blocks.get(blockInfo) ?? new Block(blockInfo, image.bytes);
    image.blocks.set(blockInfo, this.block);
    this.scans = this.block.once(`scans ${next.metric} ${next.channel}`, () => new Scans(this.block, next.metric, next.channel));
    this.segments = this.block.once(`segments ${next.metric}`, () => {
      return new Segments(this.block.tree(next.metric).parent, this.block.sequence(next.metric));
    });
    for (const panel of this.panels) {
      if (panel.block !== this.block || panel.image !== image) panel.setGrid(image, this.block);
    }
    this.showControls(info, blockInfo);
    this.redraw(["under", "over", "affinity"]);
    this.keepInAddress();
  }

  /** Load the picture, overlays and bytes of an image. */
  open(index) {
    if (!this.images.has(index)) {
      const info = this.meta.images[index];
      const picture = async (source) => {
        const image = new Image();
        image.src = source;
        await image.decode();
        return image;
      };
      const load = async () => ({
        ...info,
        blocks: new Map(),
        picture: await picture(info.picture),
        overlays: await Promise.all(
          info.overlays.map(async (overlay) => ({ ...overlay, picture: overlay.picture && (await picture(overlay.picture)) })),
        ),
        bytes: await unpack(byId(`data-${index}`).textContent),
      });
      this.images.set(index, load());
    }
    return this.images.get(index);
  }

  showControls(info, blockInfo) {
    const { controls, state, meta } = this;
    const stages = [...new Map(info.blocks.map((block) => [block.stage, block])).values()];
    const inStage = info.blocks.filter(({ stage }) => stage === state.stage);
    const grid = ({ rows, columns }) => `${rows} × ${columns} positions`;
    controls.image.offer(meta.images.map(({ name }, index) => [index, name]));
    controls.image.element.hidden = meta.images.length === 1;
    controls.stage.offer(stages.map((block) => [block.stage, `${block.stage}`, grid(block)]));
    controls.block.offer(inStage.map(({ block }) => [block, `${block}`]));
    const isPath = ["raster", "cross"].includes(blockInfo.scan);
    const own = isPath ? null : blockInfo.trees[0].metric;
    controls.metric.offer(
      blockInfo.trees.map(({ metric }) => [metric, METRICS[metric] ?? metric, metric === own ? "used by the layer" : "from the same features"]),
    );
    controls.channel.offer(blockInfo.channels.map(({ title }, index) => [index, title]));
    controls.overlay.offer([["none", "nothing"], ...info.overlays.map(({ name }) => [name, name])]);
    controls.overlay.element.hidden = info.overlays.length === 0;
    for (const key of ["image", "stage", "block", "metric", "channel", "show", "scale", "overlay"]) controls[key].show(state[key]);
    controls.lines.show(state.lines === "on");
    controls.scale.element.hidden = state.show === "image";
    this.legends.affinity.element.hidden = state.show === "image";
    this.legends.lines.element.hidden = state.lines === "off";
    this.legends.affinity.show(affinityGradient(), state.scale === "log" ? `1e-${DECADES}` : "0", "1");
    this.legends.lines.show(edgeGradient(), "similar", "dissimilar");
    byId("caption").textContent = info.overlays.find(({ name }) => name === state.overlay)?.caption ?? "";
    const scanned = isPath
      ? `${blockInfo.scan} scan; trees of its features`
      : `tree: ${METRICS[own] ?? own}`;
    const passes = { all: "", up: ", from the leaves to the root only", down: ", from the root to the leaves only" };
    byId("model").textContent = `${meta.title} · ${grid(blockInfo)} · ${scanned}${passes[blockInfo.propagation]}`;
    this.showEdges();
  }

  showEdges() {
    const { edges, metric } = this.state;
    const all = this.block.edges;
    for (const input of [byId("edges"), byId("edge-number")]) {
      input.max = all;
      input.value = edges;
    }
    this.segments.moveTo(edges);
    const { members, count: parts } = this.segments;
    let largest = 0;
    for (const v of this.segments.leader) largest = Math.max(largest, members[v]);
    const weight = edges > 0 ? this.block.weights(metric)[edges - 1] : null;
    const text = `${count(edges)} of ${counted(all, "edge")}, ${counted(parts, "segment")}, the largest of ${counted(largest, "position")}`;
    const shown = metric === "cosine" ? `cosine ${(-Math.log(weight)).toFixed(4)}` : `weight ${weight?.toPrecision(4)}`;
    byId("moment").textContent = weight === null ? text : `${text}; last edge: ${shown}`;
    byId("edges").setAttribute("aria-valuetext", `${counted(edges, "edge")}, ${counted(parts, "segment")}`);
  }

  /** Add the first `edges` edges; switch to segments if neither segments nor lines are shown. */
  grow(edges) {
    if (!Number.isFinite(edges)) return;
    const next = Math.max(0, Math.min(this.block.edges, Math.round(edges)));
    if (this.state.show === "affinity" && this.state.lines === "off") {
      this.change({ show: "segments", edges: next });
      return;
    }
    this.state.edges = next;
    this.showEdges();
    this.redraw(["under", "over"]);
    this.keepInAddress();
  }

  /** Animate the growing tree: fast at first, and slowly at the end, when large segments merge. */
  play(on) {
    this.playing = on;
    byId("play").setAttribute("aria-pressed", String(on));
    if (!on) return;
    if (this.state.edges === this.block.edges) this.grow(0);
    const step = () => {
      if (!this.playing) return;
      const left = this.block.edges - this.state.edges;
      this.grow(this.state.edges + Math.ceil(left / 60));
      if (left > 1) requestAnimationFrame(step);
      else this.play(false);
    };
    requestAnimationFrame(step);
  }

  keepInAddress() {
    clearTimeout(this.addressTimer);
    this.addressTimer = setTimeout(() => history.replaceState(null, "", writeHash(this.state)), HASH_DELAY);
  }

  listen(panel) {
    const { canvas } = panel;
    const point = (event) => this.pointAt(panel.positionAt(event.clientX, event.clientY));
    canvas.addEventListener("pointermove", point);
    let pressed = null;
    canvas.addEventListener("pointerdown", (event) => {
      point(event);
      pressed = event.isPrimary && event.button === 0 ? [event.clientX, event.clientY] : null;
    });
    canvas.addEventListener("pointercancel", () => (pressed = null));
    // Not "click": browsers suppress it for a tap soon after a drag.
    canvas.addEventListener("pointerup", (event) => {
      if (pressed && Math.hypot(event.clientX - pressed[0], event.clientY - pressed[1]) < DRAG) this.hold();
      pressed = null;
    });
    canvas.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || !this.onKey(event.key, event.shiftKey ? 8 : 1)) return;
      event.preventDefault();
      this.spoken = true;
    });
  }

  /** Handle a key; return false if it has no function. */
  onKey(key, far) {
    const steps = { ArrowLeft: [-far, 0], ArrowRight: [far, 0], ArrowUp: [0, -far], ArrowDown: [0, far] };
    const actions = {
      Enter: () => this.hold(),
      " ": () => this.hold(),
      Escape: () => this.letGo(),
      "[": () => this.change(this.neighbourBlock(-1)),
      "]": () => this.change(this.neighbourBlock(1)),
      "-": () => this.grow(this.state.edges - 1),
      "+": () => this.grow(this.state.edges + 1),
    };
    actions["="] = actions["+"];
    if (steps[key]) {
      const { rows, columns } = this.block;
      const v = this.positionOf(this.here);
      const clamp = (value, size) => Math.max(0, Math.min(size - 1, value));
      const [right, down] = steps[key];
      this.pointAt(clamp(Math.floor(v / columns) + down, rows) * columns + clamp((v % columns) + right, columns));
    } else if (Object.hasOwn(actions, key)) {
      actions[key]();
    } else {
      return false;
    }
    return true;
  }

  neighbourBlock(step) {
    const { blocks } = this.meta.images[this.state.image];
    const index = blocks.findIndex(({ stage, block }) => stage === this.state.stage && block === this.state.block);
    const { stage, block } = blocks[Math.max(0, Math.min(blocks.length - 1, index + step))];
    return { stage, block };
  }

  /** Convert relative image coordinates to a position of the map, and back (to its centre). */
  positionOf({ x, y }) {
    const { rows, columns, stride } = this.block;
    const cell = (share, pixels, size) => Math.max(0, Math.min(size - 1, Math.floor((share * pixels) / stride)));
    return cell(y, this.image.height, rows) * columns + cell(x, this.image.width, columns);
  }

  shareOf(v) {
    const { columns, stride } = this.block;
    const share = (index, pixels) => Math.min(1, ((index + 0.5) * stride) / pixels);
    return { x: share(v % columns, this.image.width), y: share(Math.floor(v / columns), this.image.height) };
  }

  pointAt(v) {
    this.here = this.shareOf(v);
    this.redraw(this.state.a === null ? ["affinity"] : []);
  }

  /** Hold the position as A, then as B; the third call starts again with A. */
  hold() {
    const { a, b } = this.state;
    const here = { ...this.here };
    if (a === null || b !== null) Object.assign(this.state, { a: here, b: null });
    else this.state.b = here;
    this.redraw(["affinity"]);
    this.keepInAddress();
  }

  letGo() {
    Object.assign(this.state, { a: null, b: null });
    this.redraw(["affinity"]);
    this.keepInAddress();
  }

  /** Draw at the next frame, after updating the given parts: under, over, affinity. */
  redraw(parts) {
    for (const part of parts) this.stale.add(part);
    if (this.frame === 0 && this.block) this.frame = requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.frame = 0;
    const { state, stale, scans, block } = this;
    if (this.panels.map((panel) => panel.fit()).some(Boolean)) stale.add("under").add("over");
    const place = (point) => (point === null ? null : this.positionOf(point));
    const marks = { a: place(state.a), b: place(state.b), here: place(this.here) };
    const source = marks.a ?? marks.here;
    const target = marks.a === null ? null : (marks.b ?? marks.here);
    if (marks.a !== null && marks.b !== null) marks.here = null;
    const overlay = this.image.overlays.find(({ name }) => name === state.overlay);
    for (const panel of this.panels) {
      const isTree = panel.scan === "tree";
      const segments = isTree && state.show === "segments" ? this.segments : null; // only the tree has segments
      const showAffinity = state.show !== "image" && !segments;
      const tree = isTree && state.lines === "on" ? block.tree(state.metric) : null;
      if (stale.has("under")) panel.drawUnder(state, segments);
      if (stale.has("over")) panel.drawOver(tree, tree && block.sequence(state.metric).subarray(0, state.edges), overlay);
      if (stale.has("affinity")) scans.affinity(panel.scan, source, panel.affinity);
      const paths = target === null ? [] : scans.paths(panel.scan, source, target);
      panel.draw({ showAffinity, scale: state.scale, paths, marks });
      this.describe(panel, target, paths);
    }
    stale.clear();
    this.speak(source, target);
  }

  describe(panel, target, paths) {
    if (target === null) {
      let sum = 0;
      for (const value of panel.affinity) sum += value;
      for (const v of this.block.padding) sum -= panel.affinity[v]; // the layer sees zeros there
      panel.value.textContent = sum.toFixed(1);
      panel.note.textContent = "sum of the affinities";
      return;
    }
    panel.value.textContent = affinityText(panel.affinity[target]);
    const [last, ...others] = paths.map((path) => path.length - 1).reverse();
    panel.note.textContent = `affinity · ${[...others.map(count), counted(last, "edge")].join(" and ")}`;
  }

  /** Announce the effect of a key to screen readers. */
  speak(source, target) {
    if (!this.spoken) return;
    this.spoken = false;
    const v = this.positionOf(this.here);
    const { columns } = this.block;
    const values = this.panels.map(({ value, note, scan }) => `${scan} ${value.textContent} ${note.textContent}`).join("; ");
    byId("spoken").textContent = `Row ${Math.floor(v / columns) + 1}, column ${(v % columns) + 1}. ${values}`;
  }
}
