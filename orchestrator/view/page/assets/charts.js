// The charts that show all trials: curves, parameters, gains, devices, best so far.

const AXES = {
  samples: ["samples", "samples"],
  seconds: ["seconds in a slot", "seconds"],
  device_s: ["device-seconds (share x seconds)", "device_s"],
};
const charts = new Map();

function draw(id, option) {
  const element = typeof id === "string" ? byId(id) : id;
  let chart = charts.get(element);
  if (!chart) {
    chart = echarts.init(element, null, { renderer: "canvas" });
    charts.set(element, chart);
  }
  chart.setOption({ animation: false, textStyle: { fontFamily: "system-ui, sans-serif" }, ...option }, { notMerge: true });
  return chart;
}

const isNarrow = () => byId("curves").clientWidth < 560;
const hasRoom = () => ({ left: 12, right: 24, top: 34, bottom: 32, outerBoundsMode: "same", outerBoundsContain: "axisLabel" });

function axis(name, more = {}) {
  const muted = colour("muted"), line = colour("line");
  return {
    type: "value", name, nameTextStyle: { color: muted, fontSize: 12 },
    axisLabel: tickLabel(),
    axisLine: { show: true, lineStyle: { color: line } }, axisTick: { lineStyle: { color: line } },
    splitLine: { lineStyle: { color: line } }, ...more,
  };
}

const tickLabel = () => ({ color: colour("muted"), fontSize: 11, hideOverlap: true, formatter: shownTick });
const shownTick = (value) => (typeof value === "number" && Math.abs(value) >= 1e5 ? shownCount(value) : shown(value));
const bottom = (name, more = {}) =>
  axis(name, { nameLocation: "middle", nameGap: 28, splitLine: { show: false }, ...more });
const left = (name, more = {}) => axis(name, { nameLocation: "end", nameTextStyle: { color: colour("muted"), fontSize: 12, align: "left" }, ...more });

function tooltip(formatter, more = {}) {
  return {
    confine: true, backgroundColor: colour("card"), borderColor: colour("line"), extraCssText: "box-shadow:0 2px 10px rgba(0,0,0,.18)",
    textStyle: { color: colour("ink") }, formatter, ...more,
  };
}

const nothing = (text) => ({
  title: { text, left: "center", top: "middle", textStyle: { color: colour("muted"), fontSize: 14, fontWeight: "normal" } },
});

function drawCurves() {
  const trials = visible(), of = colours(trials), key = chosen.axis;
  const name = chosen.value === "" ? "training loss" : chosen.value;
  const series = trials.filter((trial) => trial.curves[chosen.value]).map((trial) => {
    const curve = trial.curves[chosen.value], isSelected = trial === chosen.trial;
    const points = curve[key].map((x, i) => [x, curve.values[i]]).filter(([, y]) => !chosen.log || y > 0);
    return {
      type: "line", name: trial.trial_id, data: points, color: of.get(trial), z: isSelected ? 5 : 2,
      showSymbol: points.length < 30, symbol: "circle", symbolSize: 5, triggerLineEvent: true, lineStyle: { width: isSelected ? 3 : 1.4 },
      emphasis: { focus: "series", lineStyle: { width: 3 } }, cursor: "pointer",
    };
  }).reverse();
  byId("curves-note").textContent = series.length
    ? `${series.length} of ${run().trials.length} trials have such a curve here. A tap on a curve selects its trial.` : "";
  const chart = draw("curves", series.length ? {
    grid: hasRoom(), series,
    xAxis: bottom(AXES[key][0], { min: 0 }),
    yAxis: left(name, { type: chosen.log ? "log" : "value", scale: true }),
    dataZoom: [{ type: "inside", zoomOnMouseWheel: "ctrl", moveOnMouseWheel: false }],
    tooltip: tooltip((point) => tip(point.seriesName, [
      `${name} ${shown(point.value[1])}`, `at ${shownTick(point.value[0])} ${AXES[key][0]}`]), { trigger: "item" }),
  } : nothing(`no trial that is shown has a value of ${name}`));
  chart.off("click");
  chart.on("click", (event) => select(run().trials.find((trial) => trial.trial_id === event.seriesName)));
}

// Parameters.

function parameterAxis(name, values, dim) {
  const known = values.filter((value) => value !== undefined), distinct = [...new Set(known)];
  const areNumbers = known.length > 0 && known.every((value) => typeof value === "number");
  const base = {
    dim, name, nameTextStyle: { color: colour("ink"), fontSize: 12, width: 90, overflow: "truncate" }, nameTruncate: { maxWidth: 90 },
    axisLine: { lineStyle: { color: colour("muted") } }, axisTick: { lineStyle: { color: colour("muted") } },
    axisLabel: { color: colour("ink"), fontSize: 11, formatter: (value) => clipped(shownTick(value), 14), showMinLabel: false, showMaxLabel: false,
      backgroundColor: colour("card"), padding: [1, 3], borderRadius: 3 }, z: 10,
  };
  if (areNumbers && (distinct.length > 6 || distinct.length * 2 > known.length || dim === run().searched.slice(0, 12).length)) {
    const low = known.reduce((a, b) => Math.min(a, b)), high = known.reduce((a, b) => Math.max(a, b));
    const isLog = low > 0 && high / low >= 100;
    return { ...base, type: isLog ? "log" : "value", scale: true, name: isLog ? `${name} (log)` : name,
      min: low === high ? low - Math.max(1e-9, Math.abs(low) / 2) : low, max: low === high ? high + Math.max(1e-9, Math.abs(high) / 2) : high };
  }
  const order = areNumbers ? distinct.sort((a, b) => a - b) : distinct.sort();
  return { ...base, type: "category", data: order.map(shown), axisLabel: { ...base.axisLabel, showMinLabel: true, showMaxLabel: true } };
}

const clipped = (text, length) => (text.length > length ? `${text.slice(0, length - 2)}..` : text);

function drawParallel() {
  const trials = visible().filter((trial) => trial.best !== null), of = colours(trials);
  const names = run().searched.slice(0, 12);
  if (!trials.length || !names.length) {
    draw("parallel", nothing(names.length ? "no trial that is shown has a value of the metric" : "no parameter is searched"));
    return;
  }
  const columns = [...names.map((name) => trials.map((trial) => trial.params[name])), trials.map((trial) => trial.best)];
  const axes = [...names, run().metric].map((name, dim) => parameterAxis(name, columns[dim], dim));
  const element = byId("parallel");
  element.style.width = `${Math.max(element.parentElement.clientWidth, 105 * axes.length)}px`;
  const cell = (value, dim) => (value === undefined ? "-" : axes[dim].type === "category" ? shown(value) : value);
  const chart = draw("parallel", {
    parallel: { left: 46, right: 64, top: 44, bottom: 26 }, parallelAxis: axes,
    series: [{
      type: "parallel", smooth: false, inactiveOpacity: 0.06, activeOpacity: 1, lineStyle: { width: 1.5, opacity: trials.length > 100 ? 0.4 : 0.8 },
      data: [...trials].reverse().map((trial) => ({
        name: trial.trial_id,
        value: axes.map((_, dim) => cell(dim < names.length ? trial.params[names[dim]] : trial.best, dim)),
        lineStyle: { color: of.get(trial), width: trial === chosen.trial ? 4 : 1.5 },
      })),
    }],
    tooltip: tooltip((item) => {
      const trial = trials.find((each) => each.trial_id === item.name);
      return tip(item.name, [...names.map((name) => `${name} ${shown(trial.params[name])}`), `${run().metric} ${shown(trial.best)}`]);
    }),
  });
  chart.resize();
}

function drawImportance() {
  const found = run().importance;
  byId("importance").hidden = !found.shares.length;
  byId("importance-note").textContent = found.shares.length ? `${found.note}, whatever is filtered. The bars add up to 1.` : `Not shown: ${found.note}.`;
  if (!found.shares.length) return;
  const rows = found.shares.slice(0, 15).reverse();
  byId("importance").style.height = `${70 + 28 * rows.length}px`;
  draw("importance", {
    grid: { ...hasRoom(), top: 8, right: 40 },
    xAxis: bottom(`share of the variance of ${run().metric}`, { min: 0, max: 1 }),
    yAxis: axis("", { type: "category", data: rows.map(([name]) => clipped(name, 24)), splitLine: { show: false } }),
    series: [{ type: "bar", data: rows.map(([, share]) => share), color: PALETTE[theme()][0], barMaxWidth: 16,
      label: { show: true, position: "right", color: colour("muted"), formatter: (bar) => bar.value.toFixed(2) } }],
  }).resize();
}

// Gains.

function median(values) {
  if (!values.length) return null;
  const sorted = [...values].sort((a, b) => a - b), middle = Math.floor(sorted.length / 2);
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

function drawDials() {
  const trials = new Set(visible().map((trial) => trial.trial_id));
  const gains = run().gains.filter((gain) => trials.has(gain.trial_id));
  const names = [...new Set([...run().dials.map((dial) => dial.name), ...gains.map((gain) => gain.dial)])];
  fillTable(byId("dials"),
    [["dial"], ["changes", "number"], ["measured", "number"], ["predicted (median)", "number"], ["realised (median)", "number"], ["that gained", "number"]],
    names.map((name) => {
      const dial = run().dials.find((one) => one.name === name), own = gains.filter((gain) => gain.dial === name);
      const realised = median(own.map((gain) => gain.realised));
      const predicted = median(own.map((gain) => gain.predicted).filter((value) => value !== null));
      const num = own.filter((gain) => gain.realised > 0).length;
      return [[dial && !dial.is_enabled ? `${name} (off)` : name, "name"], [dial ? dial.num_changes : MISSING, "number"], [own.length, "number"],
        [shownGain(predicted), "number"], [shownGain(realised), `number ${gainClass(realised)}`],
        [own.length ? `${num} of ${own.length}` : MISSING, "number"]];
    }));
  const known = gains.filter((gain) => gain.predicted !== null), unknown = gains.length - known.length;
  byId("gains").hidden = byId("gains-legend").hidden = !known.length;
  byId("gains-note").textContent = unknown ? `${unknown} of ${gains.length} gains were measured without a prediction; they are in the table only.` : "";
  if (!known.length) return;
  const kinds = [...new Set(gains.map((gain) => gain.dial))].sort();
  fill(byId("gains-legend"), ...legend(kinds.map((kind) => [kind, dialColour(kind.split("+"))])));
  const percent = (value) => `${Math.round(100 * value)} %`;
  draw("gains", {
    grid: hasRoom(),
    xAxis: bottom("predicted gain", { scale: true, axisLabel: { color: colour("muted"), fontSize: 11, hideOverlap: true, formatter: percent } }),
    yAxis: left("realised gain", { scale: true, axisLabel: { color: colour("muted"), fontSize: 11, formatter: percent } }),
    series: kinds.map((kind, place) => ({
      type: "scatter", name: kind, symbolSize: 9, color: dialColour(kind.split("+")), itemStyle: { opacity: 0.8 },
      data: known.filter((gain) => gain.dial === kind).map((gain) => ({ value: [gain.predicted, gain.realised], gain })),
      markLine: place ? undefined : { silent: true, symbol: "none", label: { show: false }, lineStyle: { color: colour("muted"), type: "dashed", width: 1 },
        data: [{ yAxis: 0 }, { xAxis: 0 }] },
    })),
    tooltip: tooltip(({ data }) => data && data.gain ? tip(`${data.gain.dial} of ${data.gain.trial_id}`, [
      `predicted ${shownGain(data.gain.predicted)}, realised ${shownGain(data.gain.realised)}`,
      `decision ${data.gain.generation}, after ${shownSeconds(data.gain.t_s)}`]) : ""),
  });
}

// Devices and runs.

function drawDevices() {
  const box = byId("devices");
  [...charts.keys()].filter((element) => box.contains(element)).forEach((element) => {
    charts.get(element).dispose();
    charts.delete(element);
  });
  if (!run().devices.length) {
    fill(box, make("p", "No device was measured yet.", "muted"));
    return;
  }
  const [blue, orange, green] = PALETTE[theme()];
  fill(box, ...run().devices.map((device) => {
    const part = make("div", "", "device");
    const total = device.memory_total ? `, ${shownBytes(device.memory_total)} memory` : "";
    const words = make("div", "", "legend");
    fill(words, ...legend([["granted to trials", blue], ["in use, measured", orange], ["memory in use", green]]));
    part.append(make("h3", `${device.device_id} (${device.kind || "device"}${total})`), words, make("div", "", "chart"));
    return part;
  }));
  run().devices.forEach((device, place) => {
    const pairs = (values, scale) => device.t_s.map((t, i) => [t, values[i] === null ? null : scale * values[i]]);
    const line = (name, values, number, more = {}) => ({
      type: "line", name, data: values, showSymbol: false, connectNulls: true, color: PALETTE[theme()][number], lineStyle: { width: 1.6 }, ...more });
    const hasMemory = device.memory_total && device.memory.some((value) => value !== null);
    draw(box.children[place].lastChild, {
      grid: hasRoom(), xAxis: bottom("seconds since the run began", { min: 0, max: Math.max(1, run().elapsed_s), axisLabel: { ...tickLabel(), showMaxLabel: false } }),
      yAxis: left("% of the device", { min: 0, max: (value) => Math.max(100, Math.ceil(value.max / 10) * 10) }),
      series: [
        line("granted to trials", pairs(device.granted, 100), 0, { step: "middle", areaStyle: { opacity: 0.12 } }),
        line("in use, measured", pairs(device.used, 100), 1),
        ...(hasMemory ? [line("memory in use", pairs(device.memory, 100 / device.memory_total), 2, { lineStyle: { width: 1.6, type: "dashed" } })] : []),
      ],
      tooltip: tooltip((points) => tip(`after ${shownSeconds(points[0].value[0])}`, points.map((point) =>
        `${point.seriesName}: ${point.value[1] === null ? MISSING : `${Math.round(point.value[1])} %`}`)), { trigger: "axis" }),
    });
  });
}

function drawBest() {
  const key = chosen.bestAxis, metrics = [...new Set(page.runs.map((one) => one.metric))];
  const name = metrics.length === 1 ? metrics[0] : "metric of each run";
  fill(byId("best-legend"), ...legend(page.runs.map((_, place) => [nameOf(place), PALETTE[theme()][place % 8]])));
  draw("best", {
    grid: hasRoom(),
    xAxis: bottom(key === "seconds" ? "seconds since the run began" : AXES.device_s[0], { scale: true, min: 0 }),
    yAxis: left(name, { scale: true }),
    series: page.runs.map((one, place) => ({
      type: "line", name: nameOf(place), color: PALETTE[theme()][place % 8], symbol: "circle", symbolSize: 5, lineStyle: { width: 2 },
      showAllSymbol: true, data: one.best_so_far[key].flatMap((x, i) => [
        ...(i ? [{ value: [x, one.best_so_far.values[i - 1]], symbol: "none" }] : []), [x, one.best_so_far.values[i]]]),
    })),
    tooltip: tooltip((point) => tip(point.seriesName, [
      `best ${shown(point.value[1])}`, `after ${shownSeconds(point.value[0])}${key === "seconds" ? "" : " of a device"}`]), { trigger: "item" }),
  });
  fillTable(byId("runs"),
    [["run"], ["state"], ["policy"], ["trials", "number"], ["failed", "number"], ["best", "number"], ["best trial"], ["parameters"], ["time", "number"], ["device time", "number"], ["decisions", "number"]],
    page.runs.map((one, place) => {
      const best = ranked(one).find((trial) => trial.best !== null);
      const params = best ? one.searched.filter((each) => each in best.params).map((each) => `${each}=${shown(best.params[each])}`).join(" ") : MISSING;
      return [[nameOf(place), "name"], [one.state, `state-${one.state}`], [one.policy], [one.trials.length, "number"],
        [one.trials.filter((trial) => trial.state === "failed").length, "number"], [best ? shown(best.best) : MISSING, "number"],
        [best ? best.trial_id : MISSING, "name"], [params, "param"], [shownSeconds(one.elapsed_s), "number"],
        [shownSeconds(one.device_s), "number"], [one.num_decisions, "number"]];
    }));
}

// Runs of the same name are told apart by their number.
function nameOf(place) {
  const name = page.runs[place].name;
  return page.runs.filter((one) => one.name === name).length > 1 ? `${name} (${place + 1})` : name;
}
