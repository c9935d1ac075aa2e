/** Colours of affinities, edges and segments. */

const AFFINITY = [
  [0.0, 10, 12, 34, 0.52],
  [0.2, 56, 28, 104, 0.6],
  [0.45, 142, 41, 118, 0.68],
  [0.7, 231, 84, 88, 0.74],
  [0.88, 251, 166, 96, 0.8],
  [1.0, 253, 238, 176, 0.86],
];
const EDGES = [
  [0.0, 94, 234, 212, 1],
  [0.5, 250, 240, 150, 1],
  [1.0, 255, 94, 58, 1],
];
/** Range of the logarithmic scale: affinities from 1e-6 to 1. */
export const DECADES = 6;

function blend(stops, value) {
  const upper = Math.max(1, stops.findIndex(([at]) => at >= value));
  const [low, high] = [stops[upper - 1], stops[upper]];
  const share = (value - low[0]) / (high[0] - low[0]);
  return [1, 2, 3, 4].map((i) => low[i] + (high[i] - low[i]) * share);
}

const css = ([r, g, b, a]) => `rgb(${Math.round(r)} ${Math.round(g)} ${Math.round(b)} / ${a.toFixed(3)})`;

/** 256 colours as 32-bit numbers in the byte order of ImageData. */
const AFFINITY_TABLE = new Uint32Array(
  Uint8ClampedArray.from(
    Array.from({ length: 256 }, (_, i) => blend(AFFINITY, i / 255).map((part, j) => (j === 3 ? 255 * part : part))).flat(),
  ).buffer,
);

/** Colour affinities into the pixels of an ImageData. */
export function paintAffinity(affinity, scale, pixels) {
  if (scale === "log") {
    const factor = 255 / (DECADES * Math.LN10);
    for (let v = 0; v < affinity.length; v++) {
      const level = 255 + factor * Math.log(affinity[v]);
      pixels[v] = AFFINITY_TABLE[level > 0 ? level | 0 : 0];
    }
  } else {
    for (let v = 0; v < affinity.length; v++) pixels[v] = AFFINITY_TABLE[(255 * affinity[v]) | 0];
  }
}

/** A CSS gradient of the affinity colours on mid grey, for the legend. */
export function affinityGradient() {
  const stops = AFFINITY.map(([at, r, g, b, a]) => {
    const onGrey = [r, g, b].map((part) => part * a + 128 * (1 - a));
    return `${css([...onGrey, 1])} ${100 * at}%`;
  });
  return `linear-gradient(to right, ${stops.join(", ")})`;
}

/** The colour of an edge, from the most similar (0) to the least similar (1). */
export const edgeColor = (share) => css(blend(EDGES, share));

/** A CSS gradient of the edge colours. */
export const edgeGradient = () =>
  `linear-gradient(to right, ${EDGES.map(([at, ...color]) => `${css(color)} ${100 * at}%`).join(", ")})`;

/** The colour of a segment, [r, g, b]; the golden ratio spreads hues, so that adjacent segments rarely look alike. */
export function segmentColor(leader) {
  const hue = (leader * 0.6180339887498949) % 1;
  const light = 0.6 + 0.16 * (((leader * 0.7548776662466927) % 1) - 0.5);
  const strength = 0.62 * Math.min(light, 1 - light);
  return [0, 8, 4].map((shift) => {
    const k = (shift + hue * 12) % 12;
    return 255 * (light - strength * Math.max(-1, Math.min(k - 3, 9 - k, 1)));
  });
}
