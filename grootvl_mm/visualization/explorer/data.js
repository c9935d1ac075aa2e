/** Decodes the data of the page; encoding.py is the encoder and documents the format. */

import { parentsFromDirections, pathTree, ScanTree } from "explorer/tree.js";

/** Unpack the bytes of an image's blocks. */
export async function unpack(base64) {
  const packed = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Decode numbers stored as byte planes, the lowest bytes of all numbers first. */
function fromPlanes(bytes, offset, count, planes) {
  const values = new Uint32Array(count);
  for (let plane = 0; plane < planes; plane++) {
    for (let i = 0; i < count; i++) values[i] |= bytes[offset + plane * count + i] << (8 * plane);
  }
  return values;
}

/** Decode 16-bit numbers stored as differences. */
function fromDifferences(bytes, offset, count) {
  const values = fromPlanes(bytes, offset, count, 2);
  for (let i = 1; i < count; i++) values[i] = (values[i] + values[i - 1]) & 0xffff;
  return values;
}

/** The number of edges of a block's trees, without those at ignored padding, which come last. */
export const edgesOf = ({ valid: [rows, columns] }) => rows * columns - 1;

/** One block of the backbone; its trees and decays are decoded on first use. */
export class Block {
  constructor(info, bytes) {
    Object.assign(this, info); // the metadata from encoding.py
    this.bytes = bytes;
    this.size = info.rows * info.columns;
    this.edges = edgesOf(info);
    this.rankPlanes = this.size > 0x10000 ? 3 : 2;
    this.decoded = new Map();
  }

  once(key, make) {
    if (!this.decoded.has(key)) this.decoded.set(key, make());
    return this.decoded.get(key);
  }

  get treeBytes() {
    return Math.ceil(this.size / 4) + this.rankPlanes * this.size + 2 * (this.size - 1);
  }

  /** The minimum spanning tree of a metric. */
  tree(metric) {
    return this.once(`tree ${metric}`, () => {
      const start = this.startOf(metric);
      const packed = this.bytes.subarray(start, start + Math.ceil(this.size / 4));
      return new ScanTree(parentsFromDirections(packed, this.rows, this.columns, this.root), this.root);
    });
  }

  /** The positions, except for the root and ignored padding, ordered by the weights of the edges to their parents. */
  sequence(metric) {
    return this.once(`sequence ${metric}`, () => {
      const start = this.startOf(metric) + Math.ceil(this.size / 4);
      const rank = fromPlanes(this.bytes, start, this.size, this.rankPlanes);
      const sequence = new Int32Array(this.size);
      for (let v = 0; v < this.size; v++) sequence[rank[v]] = v;
      return sequence.subarray(0, this.edges); // ignored padding and the root come last
    });
  }

  /** The weights of the tree's edges in ascending order, quantized to 1/65535 of their range. */
  weights(metric) {
    return this.once(`weights ${metric}`, () => {
      const start = this.startOf(metric) + this.treeBytes - 2 * (this.size - 1);
      const { low, high } = this.trees.find((tree) => tree.metric === metric);
      const levels = fromDifferences(this.bytes, start, this.size - 1);
      return Float32Array.from(levels, (level) => low + ((high - low) * level) / 0xffff);
    });
  }

  startOf(metric) {
    return this.offset + this.treeBytes * this.trees.findIndex((tree) => tree.metric === metric);
  }

  /** -ln of the decays of a channel, or of the geometric mean over all channels. */
  cost(channel) {
    return this.once(`cost ${channel}`, () => {
      const start = this.offset + this.treeBytes * this.trees.length + 2 * this.size * channel;
      const { low, step } = this.channels[channel];
      const levels = fromDifferences(this.bytes, start, this.size);
      return Float32Array.from(levels, (level) => Math.exp(low + step * level));
    });
  }

  /** The positions of ignored padding. */
  get padding() {
    return this.once("padding", () => {
      const inside = (v) => Math.floor(v / this.columns) < this.valid[0] && v % this.columns < this.valid[1];
      return Int32Array.from({ length: this.size }, (_, v) => v).filter((v) => !inside(v));
    });
  }

  /** The paths of the raster and cross scans. */
  path(byColumns) {
    return this.once(`path ${byColumns}`, () => pathTree(this.rows, this.columns, this.valid, this.root !== 0, byColumns));
  }
}

/** The three scans of a block, for a metric and a channel. */
export class Scans {
  constructor(block, metric, channel) {
    this.block = block;
    this.cost = block.cost(channel);
    this.trees = {
      tree: [block.tree(metric)],
      raster: [block.path(false)],
      cross: [block.path(false), block.path(true)],
    };
    this.half = new Float32Array(block.size);
  }

  /** How much every position contributes at `source`; for the cross scan, the mean of its two paths. */
  affinity(scan, source, out) {
    const [first, second] = this.trees[scan];
    first.affinity(this.cost, source, this.block.propagation, out);
    if (second) {
      second.affinity(this.cost, source, this.block.propagation, this.half);
      for (let v = 0; v < out.length; v++) out[v] = (out[v] + this.half[v]) / 2;
    }
    return out;
  }

  /** The paths between two positions: one, or two for the cross scan. */
  paths(scan, from, to) {
    return this.trees[scan].map((tree) => tree.path(from, to));
  }
}
