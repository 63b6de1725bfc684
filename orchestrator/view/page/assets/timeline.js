// The timeline of one trial: its dials, how and where its steps ran, its memory, and each change with its reason.

const KINDS = { dials: "decision", override: "override", ranks: "ranks", paused: "pause", queued: "queue", continued: "continuation", ended: "end" };
const LANE_GAP = 36;

function lanesOf(trial) {
  const end = run().elapsed_s, finish = (stay) => (stay.end_s === null ? end : stay.end_s);
  const held = (value) => trial.dials.flatMap((each, i) => {
    const next = trial.dials[i + 1], ends = !next || next.start_s > each.end_s + 0.01;
    return [[each.start_s, value(each)], [each.end_s, value(each)], ...(ends ? [[each.end_s, null]] : [])];
  });
  const words = (spans) => spans.map((each) => [each.start_s, each.end_s, each.word]);
  const tiers = joined(trial.dials.map((each) => [each.start_s, each.end_s, each.tier]));
  const where = trial.stays.map((stay) => [stay.start_s, finish(stay),
    stay.slot + (stay.devices.length ? ` on ${[...new Set(stay.devices)].join(", ")}` : "")]);
  const lanes = [
    { name: "share of a device", height: 62, line: held((each) => each.share), axis: { min: 0, max: 1, interval: 0.5 } },
    { name: "global batch (samples)", height: 62, line: held((each) => each.global_batch), axis: { min: 0, splitNumber: 2, minInterval: 1 } },
    { name: "precision tier", height: 24, bars: tiers },
    { name: "execution of steps", height: 24, bars: words(trial.execution) },
    { name: "memory of rank 0 (GiB)", height: 62, line: trial.memory.t_s.map((t, i) => [t, trial.memory.values[i] === null ? null : trial.memory.values[i] / 2 ** 30]),
      axis: { min: 0, splitNumber: 2 } },
    { name: "where it ran", height: 24, bars: where },
  ];
  return lanes.filter((lane) => (lane.bars || lane.line.filter(([, value]) => value !== null)).length);
}

// Bars of the same word that touch become one.
function joined(bars) {
  const found = [];
  for (const [start, end, word] of bars) {
    const last = found[found.length - 1];
    if (last && last[2] === word && start - last[1] < 0.01) last[1] = end;
    else found.push([start, end, word]);
  }
  return found.filter(([start, end]) => end > start);
}

const barItem = (bars) => (params, api) => {
  const start = api.coord([api.value(0), 0]), end = api.coord([api.value(1), 0]);
  const area = params.coordSys, x = Math.max(area.x, start[0]), width = Math.min(area.x + area.width, end[0]) - x;
  if (width <= 0) return null;
  const shape = { x, y: area.y + 2, width: Math.max(1, width), height: area.height - 4, r: 3 };
  return {
    type: "rect", shape, style: { fill: api.visual("color"), opacity: 0.9 },
    textContent: width > 34 ? { type: "text", style: { text: bars[params.dataIndex][2], fill: colour("card"), fontSize: 11, width: width - 10, overflow: "truncate" } } : undefined,
    textConfig: { position: "inside" },
  };
};

function changeTip(trial, change) {
  const gains = change.predicted === null && change.realised === null ? ""
    : `gain predicted ${shownGain(change.predicted)}, realised ${shownGain(change.realised)}`;
  const place = [change.generation === null ? "" : `decision ${change.generation}`, change.step === null ? "" : `before step ${change.step}`];
  return tip(change.what, [change.reason, gains, `${KINDS[change.kind]} after ${shownSeconds(change.t_s)}`, place.filter(Boolean).join(", ")]);
}

function drawTimeline() {
  const trial = chosen.trial;
  const element = byId("timeline");
  byId("changes-box").hidden = !trial || !trial.changes.length;
  byId("trial-state").textContent = trial ? [trial.state, trial.why].filter(Boolean).join(": ") : "";
  if (!trial || (!trial.changes.length && !trial.stays.length)) {
    element.style.height = "120px";
    draw(element, nothing(trial ? "this trial has not run yet" : "no trial")).resize();
    byId("timeline-note").textContent = "";
    return;
  }
  const lanes = lanesOf(trial), grids = [], xs = [], ys = [], series = [];
  const start = Math.min(...trial.stays.map((stay) => stay.start_s), ...trial.changes.map((change) => change.t_s));
  const ends = trial.stays.map((stay) => (stay.end_s === null ? run().elapsed_s : stay.end_s));
  const end = Math.max(...ends, ...trial.changes.map((change) => change.t_s), start + 1);
  const margin = { left: 54, right: 18 };
  const colourOf = wordColours(lanes);
  let top = 24;
  const place = (name, height, y) => {
    const index = grids.length;
    grids.push({ ...margin, top, height });
    xs.push(axis("", { gridIndex: index, min: start, max: end, axisLabel: { show: false }, axisTick: { show: false }, splitLine: { show: false } }));
    ys.push({ ...axis(name, { gridIndex: index, nameLocation: "end", nameGap: 11, ...y }), nameTextStyle: { color: colour("muted"), fontSize: 12, align: "left", padding: [0, 0, 0, -margin.left + 4] } });
    top += height + LANE_GAP;
    return { xAxisIndex: index, yAxisIndex: index };
  };
  const bare = { min: 0, max: 1, axisLabel: { show: false }, axisLine: { show: false }, axisTick: { show: false }, splitLine: { show: false } };
  series.push({
    type: "scatter", symbol: "diamond", symbolSize: 13, ...place("changes", 22, bare), z: 6,
    data: trial.changes.map((change) => ({ value: [change.t_s, 0.5], change,
      itemStyle: { color: kindColour(change), borderColor: colour("card"), borderWidth: 1 } })),
    tooltip: { formatter: ({ data }) => changeTip(trial, data.change) },
  });
  lanes.forEach((lane) => {
    const at = place(lane.name, lane.height, lane.bars ? bare : lane.axis);
    if (lane.bars) {
      series.push({ type: "custom", renderItem: barItem(lane.bars), ...at, encode: { x: [0, 1] },
        data: lane.bars.map((bar) => ({ value: bar.slice(0, 2), word: bar[2], itemStyle: { color: colourOf.get(`${lane.name} ${bar[2]}`) } })),
        tooltip: { formatter: ({ value, data }) => tip(`${lane.name}: ${data.word}`, [`from ${shownSeconds(value[0])} to ${shownSeconds(value[1])}`]) } });
    } else {
      series.push({ type: "line", ...at, data: lane.line, showSymbol: lane.line.length < 60, showAllSymbol: true, symbol: "circle", symbolSize: 4, color: PALETTE[theme()][0], lineStyle: { width: 2 },
        areaStyle: { opacity: 0.1 }, connectNulls: false,
        tooltip: { formatter: ({ value }) => tip(`${lane.name}: ${shown(value[1])}`, [`after ${shownSeconds(value[0])}`]) } });
    }
  });
  const last = xs[xs.length - 1];
  Object.assign(last, bottom("seconds since the run began", { gridIndex: xs.length - 1, min: start, max: end }));
  last.axisLabel = { ...last.axisLabel, showMinLabel: false, showMaxLabel: false };
  element.style.height = `${top + 34}px`;
  draw(element, {
    grid: grids, xAxis: xs, yAxis: ys, series,
    axisPointer: { link: [{ xAxisIndex: "all" }], lineStyle: { color: colour("muted") }, label: { show: false } },
    dataZoom: [{ type: "inside", xAxisIndex: xs.map((_, i) => i), zoomOnMouseWheel: "ctrl", moveOnMouseWheel: false }],
    tooltip: tooltip(undefined, { trigger: "item" }),
  }).resize();
  byId("timeline-note").textContent = trial.num_changes > trial.changes.length
    ? `The newest ${trial.changes.length} of ${trial.num_changes} changes are shown.` : "";
  drawLegend();
  drawChanges(trial);
}

function kindColour(change) {
  if (change.kind === "override" || (change.kind === "ended" && change.what === "failed")) return colour("bad");
  if (change.kind !== "ranks" && !change.dials.length) return colour("muted");
  return dialColour(change.dials);
}

// What the colours of changes mean.
function drawLegend() {
  const dials = ["share", "batch", "precision"].map((dial) => [dial, dialColour([dial])]);
  fill(byId("timeline-legend"), ...legend([...dials, ["several dials, or ranks", dialColour([])],
    ["override or failure", colour("bad")], ["begin, pause, end", colour("muted")]]));
}

// Each lane has colours of its own; red is left to failures.
function wordColours(lanes) {
  const found = new Map(), shades = { "precision tier": [0, 2, 1, 3], "execution of steps": [5, 3, 6, 7], "where it ran": [0, 5, 3, 2] };
  lanes.filter((lane) => lane.bars).forEach((lane) => {
    const words = [...new Set(lane.bars.map(([, , word]) => word))];
    words.forEach((word, place) => found.set(`${lane.name} ${word}`, PALETTE[theme()][shades[lane.name][place % 4]]));
  });
  return found;
}

function drawChanges(trial) {
  fillTable(byId("changes"), [["after", "number"], ["what, and why"], ["predicted", "number"], ["realised", "number"], ["step", "number"]],
    trial.changes.map((change) => {
      const row = make("tr"), why = make("td", "", "reason");
      why.append(make("div", change.what), make("div", change.reason, "muted"));
      row.append(make("td", shownSeconds(change.t_s), "number"), why, make("td", shownGain(change.predicted), "number"),
        make("td", shownGain(change.realised), `number ${gainClass(change.realised)}`), make("td", shown(change.step), "number"));
      return row;
    }));
}
