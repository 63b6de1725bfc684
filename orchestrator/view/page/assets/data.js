// What the page knows and what is chosen in it. All text goes into the page through textContent, never as HTML.

const page = JSON.parse(document.getElementById("data").textContent);
// By names that users chose, which may be those of an object's own methods.
const bare = (object) => Object.assign(Object.create(null), object);
page.runs.forEach((one) => one.trials.forEach((trial) => {
  trial.params = bare(trial.params);
  trial.curves = bare(trial.curves);
}));
const byId = (id) => document.getElementById(id);
const MISSING = "-";
const PALETTE = {
  light: ["#2b62b0", "#c2571a", "#1e7d4f", "#8a4fb0", "#b3302a", "#0f7f8a", "#8a6d00", "#b0427c"],
  dark: ["#7fb0f5", "#f0a267", "#5fc792", "#c79bea", "#f08a82", "#5fcbd6", "#d9bf5a", "#ee9cc6"],
};
const SCALE = {
  light: ["#13386f", "#2b62b0", "#6f9ad3", "#a9bfdd", "#c9d0d8"],
  dark: ["#cfe2ff", "#7fb0f5", "#5078ad", "#3d5270", "#363f4b"],
};
const STATES = ["done", "running", "stopped", "paused", "queued", "failed"];
const MANY_TRIALS = 200;

const chosen = {
  run: 0, find: "", most: 0, states: new Set(), value: "", axis: "seconds", log: false, bestAxis: "seconds",
  trial: null, isDark: matchMedia("(prefers-color-scheme: dark)").matches,
};
const listeners = [];
const onChange = (listener) => listeners.push(listener);
const changed = () => listeners.forEach((listener) => listener());

const run = () => page.runs[chosen.run];
const sign = (one) => (one.mode === "max" ? -1 : 1);
const theme = () => (chosen.isDark ? "dark" : "light");
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function ranked(one) {
  const key = (trial) => (trial.best === null ? Infinity : sign(one) * trial.best);
  return one.trials
    .map((trial, index) => ({ trial, index }))
    .sort((a, b) => (key(a.trial) === key(b.trial) ? a.index - b.index : key(a.trial) < key(b.trial) ? -1 : 1))
    .map(({ trial }) => trial);
}

const texts = new Map();
function textOf(trial) {
  if (!texts.has(trial)) {
    const params = Object.entries(trial.params).map(([name, value]) => `${name}=${shown(value)}`);
    texts.set(trial, [trial.trial_id, trial.state, trial.why, ...params].join(" ").toLowerCase());
  }
  return texts.get(trial);
}

function visible() {
  const words = chosen.find.toLowerCase().split(/\s+/).filter(Boolean);
  const found = ranked(run()).filter(
    (trial) => chosen.states.has(trial.state) && words.every((word) => textOf(trial).includes(word)));
  return chosen.most ? found.slice(0, chosen.most) : found;
}

// Few trials have a colour each; of many, the better ones are stronger.
function colours(trials) {
  const found = new Map();
  const few = PALETTE[theme()], scale = SCALE[theme()];
  trials.forEach((trial, place) => {
    const step = Math.min(scale.length - 1, Math.floor((place / trials.length) * scale.length));
    found.set(trial, trials.length <= few.length ? few[place] : scale[step]);
  });
  return found;
}

// Numbers and words.

function shown(value) {
  if (value === null || value === undefined) return MISSING;
  if (typeof value !== "number") return String(value);
  if (value === 0 || Number.isInteger(value) && Math.abs(value) < 1e6) return String(value);
  const size = Math.abs(value);
  if (size >= 1e-3 && size < 1e6) return String(Number(value.toPrecision(4)));
  return value.toExponential(2).replace("e+", "e");
}

function shownCount(value) {
  if (value === null || value === undefined) return MISSING;
  for (const [limit, unit] of [[1e9, "G"], [1e6, "M"], [1e5, "k"]]) {
    const divisor = unit === "k" ? 1e3 : limit;
    if (Math.abs(value) >= limit) return `${Number((value / divisor).toPrecision(3))} ${unit}`;
  }
  return String(value);
}

function shownSeconds(value) {
  if (value === null || value === undefined) return MISSING;
  if (value < 10) return `${Number(value.toPrecision(2))} s`;
  if (value < 120) return `${Math.round(value)} s`;
  const minutes = Math.floor(value / 60), rest = Math.floor(value % 60);
  if (minutes < 120) return `${minutes} min ${String(rest).padStart(2, "0")} s`;
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return `${hours} h ${String(minutes % 60).padStart(2, "0")} min`;
  return `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

const shownGain = (value) =>
  value === null || value === undefined ? MISSING : `${value >= 0 ? "+" : ""}${(100 * value).toFixed(Math.abs(value) < 0.1 ? 1 : 0)} %`;
const shownBytes = (value) => (value === null || value === undefined ? MISSING : `${(value / 2 ** 30).toFixed(2)} GiB`);
const gainClass = (value) => (value === null || value === undefined ? "" : value >= 0 ? "gain" : "loss");

// Elements.

function make(tag, text = "", className = "") {
  const element = document.createElement(tag);
  if (text !== "") element.textContent = text;
  if (className) element.className = className;
  return element;
}

function fill(element, ...children) {
  element.replaceChildren(...children);
  return element;
}

function fillChoice(select, options, value) {
  fill(select, ...options.map(([key, text]) => {
    const option = make("option", text);
    option.value = key;
    return option;
  }));
  select.value = value;
}

// Rows of [text, class] cells below a head of the same form.
function fillTable(table, head, rows) {
  const line = (cells, tag) => {
    const row = make("tr");
    cells.forEach((cell) => row.append(cell instanceof Node ? cell : make(tag, String(cell[0]), cell[1] || "")));
    return row;
  };
  const top = make("thead"), body = make("tbody");
  top.append(line(head, "th"));
  rows.forEach((cells) => body.append(cells instanceof Node ? cells : line(cells, "td")));
  fill(table, top, body);
}

// Coloured dots with what they mean.
function legend(words) {
  return words.map(([word, shade]) => {
    const part = make("span"), dot = make("span", "", "dot");
    dot.style.background = shade;
    part.append(dot, word);
    return part;
  });
}

function dialColour(dials) {
  const [blue, orange, green, violet] = PALETTE[theme()];
  return (dials.length === 1 && { share: blue, batch: green, precision: violet }[dials[0]]) || orange;
}

// A tooltip: a title and lines of text.
function tip(title, lines) {
  const box = make("div", "", "tip");
  box.append(make("b", title));
  lines.filter(Boolean).forEach((text) => box.append(make("div", text)));
  return box;
}
