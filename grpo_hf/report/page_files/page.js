// Shows the page's data: curves, and groups of completions that one can look through. What is chosen stands in the
// address behind #, so that a link leads to the same view.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const main = document.querySelector("main");
const GROUPS_ON_A_PAGE = 10;
const MISSING = "n/a";

/** An element with attributes and children; a text is a child too. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

const number = (value, digits = 3) => (value === null || value === undefined ? MISSING : value.toFixed(digits));
const mean = (values) => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : null);
/** The least and the most of many, without those that are null. */
function extent(values) {
  const known = values.filter((value) => value !== null);
  return [known.reduce((a, b) => Math.min(a, b), Infinity), known.reduce((a, b) => Math.max(a, b), -Infinity)];
}

const rewardsOf = (group) => group.items.map((item) => item.reward).filter((reward) => reward !== null);
const outcomesOf = (item) => Object.values(item.scores).map(([, outcome]) => outcome);
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// ---- Curves

const HEIGHT = 230; // of a plot, in pixels
const FROM_ZERO = { range: (_, __, high) => [0, 1.05 * high || 1] };
let plots = [];

function drawCurves(box) {
  plots.forEach((plot) => plot.destroy());
  box.replaceChildren();
  plots = data.panels.map((panel) => drawPanel(panel, box));
}

function drawPanel(panel, box) {
  const frame = make("div", { class: "plot" });
  box.append(frame);
  const axis = { stroke: color("--ink"), grid: { stroke: color("--rule"), width: 1 }, ticks: { stroke: color("--rule") } };
  const series = [{ label: "step" }];
  const values = [panel.steps];
  let below = panel.steps.map(() => 0);
  const layers = panel.series.map((curve) => {
    if (!panel.stacked) return [curve, curve.mean];
    below = below.map((sum, i) => sum + (curve.mean[i] || 0));
    return [curve, below];
  });
  if (panel.stacked) layers.reverse(); // the highest is painted first
  for (const [curve, heights] of layers) {
    const shown = (_, __, ___, i) => (i === null ? "" : number(curve.values[i], 4));
    series.push({
      label: curve.label, stroke: curve.color, width: 2, spanGaps: true, value: shown,
      fill: panel.stacked ? curve.color : undefined, points: { show: panel.few },
    });
    values.push(heights);
  }
  if (!panel.stacked && !panel.few) { // a faint point for each step
    for (const curve of panel.series) {
      series.push({ label: "", stroke: curve.color + "66", paths: () => null, points: { show: true, size: 3 } });
      values.push(curve.values);
    }
  }
  const options = {
    title: panel.title, width: frame.clientWidth, height: HEIGHT, series, axes: [axis, { ...axis, size: 60 }],
    scales: { x: { time: false }, ...(panel.from_zero ? { y: FROM_ZERO } : {}) }, cursor: { sync: { key: "steps" } },
  };
  const plot = new uPlot(options, values, frame);
  const entries = frame.querySelectorAll(".u-series");
  for (const entry of [...entries].slice(layers.length + 1)) entry.style.display = "none"; // the points' own
  return plot;
}

// ---- Which prompts were solved when

function drawMap(canvas, history) {
  const rows = [...new Set(history.map(([, row]) => row))].sort((a, b) => a - b);
  const steps = [...new Set(history.map(([step]) => step))].sort((a, b) => a - b);
  const place = new Map(rows.map((row, i) => [row, i]));
  const column = new Map(steps.map((step, i) => [step, i]));
  const [low, high] = extent(history.map(([, , reward]) => reward));
  canvas.width = Math.max(steps.length, 1);
  canvas.height = Math.min(rows.length, 400);
  const context = canvas.getContext("2d");
  for (const [step, row, reward] of history) {
    if (reward === null) continue;
    const share = high > low ? (reward - low) / (high - low) : 1;
    context.fillStyle = `hsl(${130 * share} 55% 50%)`;
    context.fillRect(column.get(step), Math.floor((place.get(row) * canvas.height) / rows.length), 1, 1);
  }
  canvas.onclick = (event) => {
    const at = canvas.getBoundingClientRect();
    const i = Math.floor(((event.clientY - at.top) / at.height) * rows.length);
    choose({ row: rows[Math.min(i, rows.length - 1)], page: null });
  };
}

function drawLengths(canvas, groups) {
  const points = groups.flatMap((group) => group.items.map((item) => [item.length, item.reward, group.step]));
  const kept = points.filter(([, reward]) => reward !== null);
  if (!kept.length) return "no completion here has a reward";
  const spans = [0, 1, 2].map((i) => extent(kept.map((point) => point[i])));
  const share = (value, i) => (spans[i][1] > spans[i][0] ? (value - spans[i][0]) / (spans[i][1] - spans[i][0]) : 0.5);
  canvas.width = 600;
  canvas.height = 200;
  const context = canvas.getContext("2d");
  for (const [length, reward, step] of kept) {
    context.fillStyle = `hsla(${220 - 190 * share(step, 2)} 70% 50% / .5)`;
    context.fillRect(5 + 588 * share(length, 0), 195 - 188 * share(reward, 1), 3, 3);
  }
  const [tokens, rewards] = [spans[0], spans[1].map((reward) => number(reward))].map((span) => span.join(" to "));
  return `across: ${tokens} tokens; up: reward ${rewards}; blue is early, red late`;
}

// ---- What is chosen

const choice = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));

function choose(changes) {
  const next = { ...choice(), ...changes };
  for (const [name, value] of Object.entries(next)) if (value === null || value === "") delete next[name];
  location.hash = new URLSearchParams(next).toString();
}

/** Whether a completion is one that is looked for. */
function isWanted(item, group, want) {
  const between = (value, low, high) => (!low || value >= Number(low)) && (!high || value <= Number(high));
  if (want.run && data.runs[group.run] !== want.run) return false;
  if (want.row && String(group.row) !== want.row) return false;
  if (!between(group.step, want.from, want.to)) return false;
  if ((want.low || want.high) && (item.reward === null || !between(item.reward, want.low, want.high))) return false;
  if (want.cut && String(item.cut_off) !== want.cut) return false;
  if (want.outcome && !outcomesOf(item).includes(want.outcome)) return false;
  if (want.q) {
    const texts = [...group.prompt, ...item.said].map(([, text]) => text).concat(Object.values(group.columns));
    if (!texts.join("\n").toLowerCase().includes(want.q.toLowerCase())) return false;
  }
  return true;
}

const spreadOf = (group) => extent(rewardsOf(group)).reduce((low, high) => high - low);
const ORDERS = {
  newest: (a, b) => b.step - a.step,
  oldest: (a, b) => a.step - b.step,
  best: (a, b) => mean(rewardsOf(b)) - mean(rewardsOf(a)),
  worst: (a, b) => mean(rewardsOf(a)) - mean(rewardsOf(b)),
  "most unequal": (a, b) => spreadOf(b) - spreadOf(a),
};

// ---- Samples

function filters(want) {
  const field = (name, label, input) => make("label", {}, label, input);
  const typed = (name, type, more = {}) =>
    make("input", { type, name, value: want[name] ?? "", ...more, onchange: (e) => choose({ [name]: e.target.value, page: null }) });
  const picked = (name, options) =>
    make("select", { name, onchange: (e) => choose({ [name]: e.target.value, page: null }) },
      ...options.map(([value, label]) => make("option", { value, selected: (want[name] ?? "") === value }, label)));
  const outcomes = [...new Set(data.groups.flatMap((group) => group.items.flatMap(outcomesOf)))].sort();
  const any = [["", "any"]];
  return make("div", { class: "filters" },
    field("q", "text", typed("q", "search")),
    data.runs.length > 1 ? field("run", "run", picked("run", any.concat(data.runs.map((name) => [name, name])))) : null,
    field("from", "from step", typed("from", "number")), field("to", "to step", typed("to", "number")),
    field("row", "prompt (row)", typed("row", "number")),
    field("low", "reward at least", typed("low", "number", { step: "any" })),
    field("high", "at most", typed("high", "number", { step: "any" })),
    field("outcome", "outcome", picked("outcome", any.concat(outcomes.map((name) => [name, plain(name)])))),
    field("cut", "cut off", picked("cut", any.concat([["true", "yes"], ["false", "no"]]))),
    field("sort", "order", picked("sort", Object.keys(ORDERS).map((name, i) => [i ? name : "", name]))),
    make("button", { type: "button", onclick: () => { location.hash = ""; } }, "clear"));
}

const message = ([heading, text]) => [make("h4", {}, heading), make("div", { class: "text", dir: "auto" }, text)];
const conversation = (said) => said.flatMap(message);
const fact = ([name, value]) => make("span", {}, `${name} `, make("b", {}, value));
const facts = (pairs) => make("p", { class: "facts" }, ...Object.entries(pairs).map(fact));
const plain = (outcome) => outcome.replaceAll("_", " ");

const UNLIKELY = -5; // nats: a token at or below it is painted in full

/** Each token in a colour that says how unlikely it was. */
function tokenView(tokens) {
  const spans = tokens.map(([text, logprob]) => {
    const share = logprob === null ? 0 : Math.min(1, logprob / UNLIKELY);
    const title = logprob === null ? "no log-prob" : `log-prob ${logprob}`;
    return make("span", { title, style: `background: hsla(10 85% 55% / ${(0.85 * share).toFixed(2)})` }, text);
  });
  return make("details", { class: "tokens" }, make("summary", {}, "tokens by log-prob"), make("div", { class: "text" }, ...spans));
}

function completionCard(item, open) {
  const first = item.said.length ? item.said[item.said.length - 1][1] : "";
  const tags = [...new Set(outcomesOf(item).filter((outcome) => outcome !== "scored"))].concat(item.cut_off ? ["cut off"] : []);
  const scores = Object.entries(item.scores).map(([name, [value, outcome]]) =>
    [name, number(value) + (outcome === "scored" ? "" : `, ${plain(outcome)}`)]);
  const head = [
    make("span", {}, "reward ", make("b", {}, number(item.reward))),
    make("span", {}, "advantage ", make("b", {}, number(item.advantage, 2))),
    make("span", {}, `${item.length} tokens${item.turns ? `, ${item.turns} turns` : ""}`),
    ...tags.map((tag) => make("span", { class: "tag" }, plain(tag))),
    make("span", {}, first.slice(0, 80)),
  ];
  return make("details", { open, class: "completion" }, make("summary", {}, ...head),
    facts(Object.fromEntries(scores)), Object.keys(item.logged).length ? facts(item.logged) : null, ...conversation(item.said),
    item.tokens ? tokenView(item.tokens) : null);
}

function groupCard(group, want) {
  const flat = new Set(rewardsOf(group)).size < 2;
  const name = data.runs.length > 1 ? `${data.runs[group.run]}, ` : "";
  const row = group.row === null ? "" : `, prompt ${group.row}`;
  const narrowed = Object.keys(want).some((key) => !["sort", "page"].includes(key));
  return make("section", { class: "group" },
    make("h3", {}, `${name}step ${group.step}${row}: mean reward ${number(mean(rewardsOf(group)))} `,
      flat ? make("span", { class: "tag" }, "no signal") : null),
    ...conversation(group.prompt), Object.keys(group.columns).length ? facts(group.columns) : null,
    ...group.items.map((item, i) => completionCard(item, narrowed ? isWanted(item, group, want) : i === 0)));
}

/** Which verifier said what to which share of the completions that are shown, and why groups taught nothing. */
function signalTable(groups) {
  const items = groups.flatMap((group) => group.items);
  const best = items.reduce((a, item) => Math.max(a, item.reward ?? -Infinity), -Infinity);
  const flat = groups.filter((group) => new Set(rewardsOf(group)).size < 2);
  const solved = flat.filter((group) => rewardsOf(group)[0] === best).length;
  const rows = [...new Set(items.flatMap((item) => Object.keys(item.scores)))].map((name) => {
    const given = items.map((item) => item.scores[name]).filter(Boolean);
    const counts = {};
    for (const [, outcome] of given) counts[outcome] = (counts[outcome] || 0) + 1;
    const share = ([outcome, count]) => `${plain(outcome)} ${((100 * count) / given.length).toFixed(1)} %`;
    const shares = Object.entries(counts).sort((a, b) => b[1] - a[1]).map(share);
    const score = mean(given.map(([value]) => value).filter((value) => value !== null));
    return make("tr", {}, ...[name, number(score), shares.join(", ")].map((text) => make("td", {}, text)));
  });
  const cut = items.filter((item) => item.cut_off).length;
  return [
    make("p", { class: "note" }, `${flat.length} of ${groups.length} groups have no signal: in ${solved} of them all completions `
      + `earned the most, in ${flat.length - solved} all earned the same and less. ${cut} of ${items.length} completions are cut off.`),
    make("table", {}, make("tr", {}, ...["verifier", "mean score", "calls that ended as"].map((text) => make("th", {}, text))), ...rows),
  ];
}

function showSamples(box) {
  const want = choice();
  const found = data.groups.filter((group) => group.items.some((item) => isWanted(item, group, want)));
  found.sort(ORDERS[want.sort] ?? ORDERS.newest);
  const pages = Math.max(1, Math.ceil(found.length / GROUPS_ON_A_PAGE));
  const page = Math.min(pages, Math.max(1, Number(want.page) || 1));
  const shown = data.groups.reduce((sum, group) => sum + group.items.length, 0);
  const held = ` The page holds ${shown} of ${data.completions} completions: rollouts evenly spread over the run.`;
  const turn = (to, label) =>
    make("button", { type: "button", disabled: to < 1 || to > pages, onclick: () => choose({ page: to }) }, label);
  const lengths = make("canvas", { class: "map" });
  const note = make("p", { class: "note" });
  box.replaceChildren(
    make("h2", {}, "Samples"), filters(want),
    make("p", { class: "note", id: "found" }, `${found.length} of ${data.groups.length} groups.${shown < data.completions ? held : ""}`),
    make("details", {}, make("summary", {}, "why is there no signal?"), ...signalTable(found)),
    make("details", { ontoggle: () => { note.textContent = drawLengths(lengths, found); } },
      make("summary", {}, "length against reward"), note, lengths),
    ...found.slice((page - 1) * GROUPS_ON_A_PAGE, page * GROUPS_ON_A_PAGE).map((group) => groupCard(group, want)),
    make("p", {}, turn(page - 1, "back"), ` page ${page} of ${pages} `, turn(page + 1, "on")));
}

// ---- The page

const curves = make("div", { class: "curves" });
main.append(make("h2", {}, "Curves"));
if (data.panels.length) {
  const how = "Drag to zoom, double-click to zoom out, click a label to hide its curve. A faint point is one step, a line their running mean.";
  main.append(make("p", { class: "note" }, how), curves);
  drawCurves(curves);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawCurves(curves));
  const fit = (plot) => plot.setSize({ width: plot.root.parentElement.clientWidth, height: HEIGHT });
  addEventListener("resize", () => plots.forEach(fit));
} else main.append(make("p", {}, "No metric with a finite value was logged."));

data.history.forEach((history, i) => {
  if (new Set(history.map(([, row]) => row)).size === history.length) return; // no prompt came twice
  const canvas = make("canvas", { class: "map", style: "image-rendering: pixelated; height: 14rem" });
  const of = data.runs.length > 1 ? ` of ${data.runs[i]}` : "";
  const how = "A line is a prompt, across are the steps; green is the highest mean reward, red the lowest. Click one to see its samples.";
  main.append(make("h2", {}, `Prompts${of} over steps`), make("p", { class: "note" }, how), canvas);
  drawMap(canvas, history);
});

if (data.groups.length) {
  const samples = make("div", {});
  main.append(samples);
  showSamples(samples);
  addEventListener("hashchange", () => showSamples(samples));
}
