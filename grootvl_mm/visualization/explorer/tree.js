/**
 * Trees over the positions of a feature map: affinities, paths and segments. Independent of the page.
 *
 * A position is its index in row-major order, `row * columns + column`. The cost of a position is -ln of its decay, and
 * belongs to the edge to its parent: the affinity of two positions is exp(-(sum of the costs on the path between them)).
 */

/** Decode the parents of a tree, stored as two bits per position: 0 up, 1 down, 2 left, 3 right. */
export function parentsFromDirections(packed, rows, columns, root) {
  const steps = [-columns, columns, -1, 1];
  const parent = new Int32Array(rows * columns);
  for (let v = 0; v < parent.length; v++) parent[v] = v + steps[(packed[v >> 2] >> (2 * (v & 3))) & 3];
  parent[root] = root;
  return parent;
}

/**
 * The path through all positions, row by row or column by column, as a tree whose root is its first position, or its
 * last one if `fromLast`. Ignored padding, outside the `valid` rows and columns, is at the other end.
 */
export function pathTree(rows, columns, valid, fromLast, byColumns) {
  const inside = [];
  const outside = [];
  const [lines, length] = byColumns ? [columns, rows] : [rows, columns];
  for (let line = 0; line < lines; line++) {
    for (let i = 0; i < length; i++) {
      const [row, column] = byColumns ? [i, line] : [line, i];
      (row < valid[0] && column < valid[1] ? inside : outside).push(row * columns + column);
    }
  }
  if (fromLast) [inside, outside].forEach((part) => part.reverse());
  const order = inside.concat(outside);
  const parent = new Int32Array(order.length);
  order.forEach((v, i) => (parent[v] = order[Math.max(0, i - 1)]));
  return new ScanTree(parent, order[0]);
}

export class ScanTree {
  /** @param {Int32Array} parent parent of each position; the root is its own parent */
  constructor(parent, root) {
    this.parent = parent;
    this.root = root;
    this.size = parent.length;
    this.order = topologicalOrder(parent, root);
    this.depth = new Int32Array(this.size);
    this.below = new Int32Array(this.size).fill(1); // size of the subtree, including the position itself
    for (const v of this.order) if (v !== root) this.depth[v] = this.depth[parent[v]] + 1;
    for (let i = this.size - 1; i > 0; i--) this.below[parent[this.order[i]]] += this.below[this.order[i]];
    this.isAbove = new Uint8Array(this.size);
  }

  /**
   * How much every position contributes to the scan's result at `source`.
   *
   * @param {Float32Array} cost cost of each position
   * @param {"all" | "up" | "down"} propagation which positions contribute: all, those in the subtree of the source, or
   *   those on its path to the root
   * @param {Float32Array} out output: the affinities
   */
  affinity(cost, source, propagation, out) {
    const { parent, root, order, isAbove } = this;
    const fromAbove = propagation === "up" ? Infinity : 0;
    const fromBelow = propagation === "down" ? Infinity : 0;
    // `out` first holds the sums. The error of float32 sums of a few hundred costs is about 1e-5.
    let sum = 0;
    for (let v = source; ; v = parent[v]) {
      isAbove[v] = 1;
      out[v] = v === source ? 0 : sum + fromAbove;
      if (v === root) break;
      sum += cost[v];
    }
    for (let i = 0; i < order.length; i++) {
      const v = order[i];
      if (isAbove[v] === 0) out[v] = out[parent[v]] + cost[v] + fromBelow;
    }
    for (let v = source; ; v = parent[v]) {
      isAbove[v] = 0;
      if (v === root) break;
    }
    for (let v = 0; v < out.length; v++) out[v] = Math.exp(-out[v]);
  }

  /** The positions on the path between two, inclusive. */
  path(from, to) {
    const { parent, depth } = this;
    const ahead = [from];
    const back = [to];
    while (from !== to) {
      if (depth[from] >= depth[to]) ahead.push((from = parent[from]));
      else back.push((to = parent[to]));
    }
    back.pop();
    return ahead.concat(back.reverse());
  }
}

/** All positions in breadth-first order. */
function topologicalOrder(parent, root) {
  const start = new Int32Array(parent.length + 1);
  for (let v = 0; v < parent.length; v++) if (v !== root) start[parent[v] + 1]++;
  for (let v = 0; v < parent.length; v++) start[v + 1] += start[v];
  const next = start.slice();
  const children = new Int32Array(parent.length - 1);
  for (let v = 0; v < parent.length; v++) if (v !== root) children[next[parent[v]]++] = v;
  const order = new Int32Array(parent.length);
  order[0] = root;
  let length = 1;
  for (let i = 0; i < length; i++) {
    for (let j = start[order[i]]; j < start[order[i] + 1]; j++) order[length++] = children[j];
  }
  return order;
}

/** The segments formed by the first edges of a tree: incremental union-find. Positions that no edge joins do not count. */
export class Segments {
  /** @param {Int32Array} sequence the positions, except for the root, in the order of the edges to their parents */
  constructor(parent, sequence) {
    this.parent = parent;
    this.sequence = sequence;
    this.leader = new Int32Array(parent.length);
    this.members = new Int32Array(parent.length);
    this.restart();
  }

  restart() {
    this.joined = 0;
    this.members.fill(1);
    for (let v = 0; v < this.leader.length; v++) this.leader[v] = v;
  }

  /** Number of segments. */
  get count() {
    return this.sequence.length + 1 - this.joined;
  }

  /** Join exactly the first `edges` edges. */
  moveTo(edges) {
    if (edges < this.joined) this.restart();
    for (; this.joined < edges; this.joined++) {
      const v = this.sequence[this.joined];
      let [a, b] = [this.find(v), this.find(this.parent[v])];
      if (this.members[a] < this.members[b]) [a, b] = [b, a];
      this.leader[b] = a;
      this.members[a] += this.members[b];
    }
  }

  /** The representative of the segment of `v`; when two segments merge, that of the larger one. */
  find(v) {
    const { leader } = this;
    while (leader[v] !== v) {
      leader[v] = leader[leader[v]];
      v = leader[v];
    }
    return v;
  }
}
