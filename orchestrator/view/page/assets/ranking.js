// The table of trials, best first; a row opens what is known of its trial.

const FIRST_ROWS = 15;
let numRows = FIRST_ROWS;
const open = new Set();

function drawRanking() {
  const trials = visible(), of = colours(trials), names = run().searched;
  const head = [["", "number"], ["trial"], [`best ${run().metric}`, "number"], ...names.map((name) => [name, "param"]), ["state"], ["why"],
    ["samples", "number"], ["time", "number"], ["device time", "number"]];
  const rows = trials.slice(0, numRows).flatMap((trial, place) => rowsOf(trial, place, of.get(trial), names, head.length));
  fillTable(byId("ranking"), head, rows);
  byId("more").hidden = trials.length <= numRows;
  byId("more").textContent = `Show more (${trials.length - numRows})`;
  byId("count").textContent = `${trials.length} of ${run().trials.length} trials`;
}

function rowsOf(trial, place, dotColour, names, numColumns) {
  const row = make("tr", "", `trial${trial === chosen.trial ? " selected" : ""}`);
  const name = make("td", "", "name"), dot = make("span", "", "dot"), button = make("button", trial.trial_id, "link");
  dot.style.background = dotColour;
  button.type = "button";
  button.setAttribute("aria-expanded", String(open.has(trial)));
  name.append(dot, button);
  row.append(make("td", trial.best === null ? "" : String(place + 1), "number"), name, make("td", shown(trial.best), "number"));
  names.forEach((each) => row.append(titled(shown(trial.params[each]), "param")));
  row.append(make("td", trial.state, `state-${trial.state}`), titled(trial.why, "why"), make("td", shownCount(trial.num_samples), "number"),
    make("td", shownSeconds(trial.seconds), "number"), make("td", shownSeconds(trial.device_s), "number"));
  row.addEventListener("click", () => {
    if (open.has(trial)) open.delete(trial);
    else open.add(trial);
    select(trial);
  });
  return open.has(trial) ? [row, detailOf(trial, numColumns)] : [row];
}

function titled(text, className) {
  const cell = make("td", text, className);
  if (text.length > 24) cell.title = text;
  return cell;
}

function detailOf(trial, numColumns) {
  const row = make("tr"), cell = make("td"), box = make("div", "", "detail");
  cell.colSpan = numColumns;
  if (trial.why) box.append(make("p", `${trial.state}: ${trial.why}`, `state-${trial.state}`));
  const said = (names) => names.filter((name) => name in trial.params).map((name) => `${name}=${shown(trial.params[name])}`).join("  ");
  box.append(make("p", `searched: ${said(run().searched) || MISSING}`));
  if (said(run().fixed)) box.append(make("p", `fixed: ${said(run().fixed)}`, "muted"));
  box.append(make("p", `step ${trial.step ?? MISSING}, newest ${run().metric} ${shown(trial.last)}`, "muted"));
  const link = make("button", "To its timeline", "link");
  link.type = "button";
  link.addEventListener("click", () => byId("h-timeline").scrollIntoView({ behavior: "smooth" }));
  box.append(link);
  if (trial.log.length) box.append(make("p", "The end of its log:", "muted"), make("pre", trial.log.join("\n")));
  cell.append(box);
  row.append(cell);
  return row;
}
