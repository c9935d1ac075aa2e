/** Starts the page. */

import { Explorer } from "explorer/explorer.js";
import { measure } from "explorer/measure.js";

const byId = (id) => document.getElementById(id);
const explorer = new Explorer(JSON.parse(byId("meta").textContent));

byId("measure").addEventListener("click", async () => {
  byId("measured").textContent = "…";
  const { fps, work, rows, columns } = await measure(explorer);
  byId("measured").textContent = `${fps.toFixed(0)} per second at ${rows} × ${columns}, ${work.toFixed(1)} ms of work per frame`;
});

byId("app").hidden = false;
await explorer.start();
byId("trouble").remove();
// For tests and debugging.
window.explorer = Object.assign(explorer, { measure: (seconds) => measure(explorer, seconds) });
document.documentElement.dataset.ready = "";
