/** Starts the page. */

import { Explorer } from "explorer/explorer.js";
import { measure } from "explorer/measure.js";

const byId = (id) => document.getElementById(id);
const explorer = new Explorer(JSON.parse(byId("meta").textContent));

byId("measure").addEventListener("click", async () => {
  byId("measured").textContent = "…";
  const { fps, work, rows, columns } = await measure(explorer);
  byId("measured").textContent = `${fps.toFixed(0)} a second at ${rows} × ${columns}, ${work.toFixed(1)} ms of work each`;
});

byId("app").hidden = false;
await explorer.start();
byId("trouble").remove();
// For tests and for those who look deeper.
window.explorer = Object.assign(explorer, { measure: (seconds) => measure(explorer, seconds) });
document.documentElement.dataset.ready = "";
