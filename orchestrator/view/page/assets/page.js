// Puts the page together: the head, what can be chosen, and drawing again when something was.

function select(trial) {
  if (trial) chosen.trial = trial;
  changed();
}

// The timeline is that of a trial that is shown: the one that was chosen, or else the best.
function keepTrial() {
  const trials = visible();
  if (!trials.includes(chosen.trial)) chosen.trial = trials[0] || null;
  fillChoice(byId("trial"), trials.map((trial) => [trial.trial_id, `${trial.trial_id} (${trial.state})`]), chosen.trial ? chosen.trial.trial_id : "");
}

function beginRun(number) {
  chosen.run = number;
  open.clear();
  numRows = FIRST_ROWS;
  const trials = run().trials, present = STATES.filter((state) => trials.some((trial) => trial.state === state));
  chosen.states = new Set([...present, ...trials.map((trial) => trial.state)]);
  chosen.most = trials.length > MANY_TRIALS ? 100 : 0;
  chosen.trial = null;
  const metrics = [...new Set(trials.flatMap((trial) => Object.keys(trial.curves)))];
  const order = [run().metric, "", ...metrics.filter((name) => name !== "" && name !== run().metric).sort()];
  const values = order.filter((name) => metrics.includes(name));
  chosen.value = values.length ? values[0] : "";
  chosen.log = false;
  byId("log").checked = false;
  fillChoice(byId("value"), values.map((name) => [name, name === "" ? "training loss" : name]), chosen.value);
  fillChoice(byId("most"), [[0, "all"], [5, "5"], [10, "10"], [25, "25"], [100, "100"], [300, "300"]], String(chosen.most));
  fill(byId("states"), ...[...chosen.states].map((state) => stateChip(state, trials)));
  drawHead();
  changed();
}

function stateChip(state, trials) {
  const button = make("button", `${state} ${trials.filter((trial) => trial.state === state).length}`);
  button.type = "button";
  button.dataset.state = state;
  button.setAttribute("aria-pressed", "true");
  button.addEventListener("click", () => {
    if (chosen.states.has(state)) chosen.states.delete(state);
    else chosen.states.add(state);
    button.setAttribute("aria-pressed", String(chosen.states.has(state)));
    changed();
  });
  return button;
}

function fact(name, value, more = "") {
  const box = make("div"), shownValue = make("dd", value);
  if (more) shownValue.append(make("small", more));
  box.append(make("dt", name), shownValue);
  return box;
}

function drawHead() {
  const one = run(), best = ranked(one).find((trial) => trial.best !== null);
  const count = (state) => one.trials.filter((trial) => trial.state === state).length;
  const began = one.started_at ? new Date(1000 * one.started_at).toLocaleString() : MISSING;
  byId("title").textContent = page.runs.length > 1 ? page.runs.map((_, place) => nameOf(place)).join(", ") : one.name;
  byId("subtitle").textContent = `${page.runs.length > 1 ? `${nameOf(chosen.run)}: ` : ""}${one.state}, policy ${one.policy}, began ${began}`;
  byId("trouble").hidden = !one.trouble;
  byId("trouble").textContent = one.trouble;
  fill(byId("facts"),
    fact(`best ${one.metric}`, best ? shown(best.best) : MISSING, best ? best.trial_id : "no trial has reported it"),
    fact("trials", String(one.trials.length), [...new Set(one.trials.map((trial) => trial.state))].map((state) => `${count(state)} ${state}`).join(", ")),
    fact("time", shownSeconds(one.elapsed_s)),
    fact("device time", shownSeconds(one.device_s), "share x seconds, all trials"),
    fact("decisions", String(one.num_decisions), `${one.gains.length} gains measured${one.num_refusals ? `, ${one.num_refusals} refused` : ""}`));
}

function drawNotes() {
  byId("written").textContent = `Written ${new Date(1000 * page.written_at).toLocaleString()} by orchestrator report; of a run that goes on, write it again to see more.`;
  const points = Math.max(0, ...page.runs.flatMap((one) => one.trials.flatMap((trial) => Object.values(trial.curves).map((curve) => curve.values.length))));
  const notes = [
    `Curves of more points than a trial has room for are thinned by largest-triangle-three-buckets; the longest here has ${points} points. The training loss and the memory are those of rank 0; memory is the largest of each stretch of steps, the devices' use a mean of each stretch of time.`,
    "Charts are drawn by Apache ECharts (Apache License 2.0, copyright The Apache Software Foundation), which is part of this file.",
    ...page.runs.flatMap((one, place) => one.notes.map((note) => `${nameOf(place)}: ${note}`)),
  ];
  fill(byId("notes"), ...notes.map((note) => make("li", note)));
}

function applyTheme() {
  document.documentElement.dataset.theme = theme();
  byId("theme").textContent = chosen.isDark ? "Light" : "Dark";
}

function listen(id, event, act) {
  byId(id).addEventListener(event, () => act(byId(id)));
}

applyTheme();
fillChoice(byId("run"), page.runs.map((_, place) => [place, nameOf(place)]), "0");
byId("run-choice").hidden = page.runs.length < 2;
fillChoice(byId("axis"), Object.entries(AXES).map(([key, [text]]) => [key, text]), chosen.axis);
fillChoice(byId("best-axis"), [["seconds", "seconds since the run began"], ["device_s", AXES.device_s[0]]], "seconds");
byId("filters").addEventListener("submit", (event) => event.preventDefault());
listen("run", "change", (field) => beginRun(Number(field.value)));
listen("find", "input", (field) => { chosen.find = field.value; changed(); });
listen("most", "change", (field) => { chosen.most = Number(field.value); changed(); });
listen("value", "change", (field) => { chosen.value = field.value; drawCurves(); });
listen("axis", "change", (field) => { chosen.axis = field.value; drawCurves(); });
listen("best-axis", "change", (field) => { chosen.bestAxis = field.value; drawBest(); });
listen("log", "change", (field) => { chosen.log = field.checked; drawCurves(); });
listen("trial", "change", (field) => select(run().trials.find((trial) => trial.trial_id === field.value)));
listen("more", "click", () => { numRows += 100; drawRanking(); });
const drawRun = () => { drawImportance(); drawDevices(); drawBest(); drawNotes(); };
listen("theme", "click", () => { chosen.isDark = !chosen.isDark; applyTheme(); changed(); drawRun(); });
[keepTrial, drawRanking, drawCurves, drawParallel, drawTimeline, drawDials].forEach(onChange);
beginRun(0);
drawRun();
listen("run", "change", drawRun);
let isWaiting = false;
window.addEventListener("resize", () => {
  if (isWaiting) return;
  isWaiting = true;
  requestAnimationFrame(() => {
    isWaiting = false;
    charts.forEach((chart) => chart.resize());
    drawParallel();
  });
});
