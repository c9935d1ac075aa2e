/** Reads and writes the state of the page in its address. */

/** Positions are relative to the image, so that they do not depend on the stage. */
const point = {
  read(text) {
    const [x, y, ...rest] = text.split(",").map(Number);
    return rest.length === 0 && [x, y].every((value) => value >= 0 && value <= 1) ? { x, y } : null;
  },
  write: ({ x, y }) => `${x.toFixed(5)},${y.toFixed(5)}`,
};
const whole = {
  read: (text) => (/^\d{1,9}$/.test(text) ? Number(text) : null),
  write: String,
};
const choice = (...allowed) => ({
  read: (text) => (allowed.includes(text) ? text : null),
  write: String,
});
const name = { read: (text) => text || null, write: String };

const FIELDS = {
  image: whole,
  stage: whole,
  block: whole,
  metric: name,
  channel: whole,
  show: choice("affinity", "segments", "image"),
  lines: choice("on", "off"),
  scale: choice("linear", "log"),
  overlay: name,
  edges: whole,
  a: point,
  b: point,
};

/** The fields of a hash such as `#stage=1&a=0.5,0.25`; invalid ones are ignored. */
export function readHash(hash) {
  const found = {};
  for (const [key, text] of new URLSearchParams(hash.replace(/^#/, ""))) {
    const value = Object.hasOwn(FIELDS, key) ? FIELDS[key].read(text) : null;
    if (value !== null) found[key] = value;
  }
  return found;
}

/** The hash of a state, without fields that have no value. */
export function writeHash(state) {
  const parts = Object.entries(FIELDS)
    .filter(([key]) => state[key] !== null && state[key] !== undefined)
    .map(([key, field]) => `${key}=${encodeURIComponent(field.write(state[key])).replaceAll("%2C", ",")}`);
  return `#${parts.join("&")}`;
}
