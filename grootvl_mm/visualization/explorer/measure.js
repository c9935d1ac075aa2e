/** Measures the frame rate of the page while the pointer moves. */

const median = (values) => values.sort((a, b) => a - b)[values.length >> 1];

/**
 * Point at a different position in every frame.
 *
 * @param {import("explorer/explorer.js").Explorer} explorer
 * @param {number} seconds duration
 * @returns {Promise<{fps: number, interval: number, work: number, rows: number, columns: number}>} frames per second,
 *   and medians in milliseconds: the interval between frames, and the time for computing and drawing
 */
export async function measure(explorer, seconds = 3) {
  explorer.letGo();
  const { size, rows, columns } = explorer.block;
  const frame = () => new Promise((resolve) => requestAnimationFrame(resolve));
  const intervals = [];
  const work = [];
  const first = await frame();
  let last = first;
  for (let i = 1; last - first < 1000 * seconds; i++) {
    explorer.pointAt((i * 7919) % size); // a prime, so that the positions spread over the map
    cancelAnimationFrame(explorer.frame);
    const start = performance.now();
    explorer.draw();
    work.push(performance.now() - start);
    const now = await frame();
    intervals.push(now - last);
    last = now;
  }
  return { fps: (1000 * intervals.length) / (last - first), interval: median(intervals), work: median(work), rows, columns };
}
