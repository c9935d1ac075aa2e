/** Form controls made of native elements, for keyboard and screen reader support. */

let groups = 0;

function labelled(legend, control) {
  const element = document.createElement("label");
  element.className = "field";
  const text = document.createElement("span");
  text.textContent = legend;
  element.append(text, control);
  return element;
}

/** A drop-down list; `show(value)` selects an option, `offer(options)` replaces the options, [value, text] pairs. */
export function dropDown(id, legend, change) {
  const select = document.createElement("select");
  select.id = id;
  select.addEventListener("change", () => change(select.value));
  const element = labelled(legend, select);
  return {
    element,
    offer(options) {
      select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
    },
    show(value) {
      select.value = String(value);
    },
  };
}

/** A choice between a few visible options: radio buttons styled as a segmented control. */
export function choices(id, legend, change) {
  const group = `choice-${groups++}`;
  const element = document.createElement("fieldset");
  element.id = id;
  const title = document.createElement("legend");
  title.textContent = legend;
  const row = document.createElement("div");
  row.className = "choices";
  element.append(title, row);
  return {
    element,
    offer(options) {
      row.replaceChildren(
        ...options.map(([value, text, hint]) => {
          const input = Object.assign(document.createElement("input"), { type: "radio", name: group, value });
          input.addEventListener("change", () => change(value));
          const label = document.createElement("label");
          const face = document.createElement("span");
          face.textContent = text;
          if (hint) label.title = hint;
          label.append(input, face);
          return label;
        }),
      );
    },
    show(value) {
      for (const input of row.querySelectorAll("input")) input.checked = input.value === String(value);
    },
  };
}

/** A check box. */
export function checkBox(id, legend, change) {
  const input = Object.assign(document.createElement("input"), { type: "checkbox", id });
  input.addEventListener("change", () => change(input.checked));
  const element = document.createElement("label");
  element.className = "check";
  const text = document.createElement("span");
  text.textContent = legend;
  element.append(input, text);
  return {
    element,
    show(value) {
      input.checked = value;
    },
  };
}

/** The legend of a colour scale. */
export function legend(id) {
  const element = document.createElement("div");
  element.className = "legend";
  element.id = id;
  const [low, ramp, high] = ["span", "i", "span"].map((tag) => document.createElement(tag));
  element.append(low, ramp, high);
  return {
    element,
    show(gradient, lowText, highText) {
      ramp.style.backgroundImage = gradient;
      low.textContent = lowText;
      high.textContent = highText;
    },
  };
}
