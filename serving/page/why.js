// Why a video is where it is, as the server says it: source, probabilities, the value and its parts, the slot's chance.

import { element } from "./card.js";

const LEVELS = {
  LEVEL_FULL: "full: every stage ran",
  LEVEL_FEATURES_MISSING: "features missing: what the viewer did lately could not be read",
  LEVEL_RETRIEVAL_ORDER: "retrieval order: the ranker did not run",
  LEVEL_POPULAR: "popular: retrieval did not run",
  LEVEL_STATIC: "static: the bundle's own list",
};
export const number = (value) => Number(value).toFixed(4);

export function drawWhy(panel, { item, page, nowMs }, onClose) {
  const close = element("button", { className: "close", type: "button", textContent: "Close", onclick: onClose });
  const others = item.sources.slice(1);
  const source = item.sources[0] + (others.length ? ` (also ${others.join(", ")})` : "");
  panel.replaceChildren(
    close,
    element("h2", { textContent: "Why this video" }),
    element("p", { textContent: item.reason }),
    facts([
      ["source", source], ["retrieval score", number(item.retrieval_score)],
      ["slot", `${item.slot + 1} of ${page.items.length}`],
      ["chance of this slot", number(item.propensity)],
      ["predicted watch", `${(item.predicted_watch_ms / 1000).toFixed(1)} s of ${(item.duration_ms / 1000).toFixed(1)} s`],
    ]),
    ...probabilities(page.tasks, item.scores),
    ...value(item),
    element("h3", { textContent: "This page" }),
    pageFacts(page, nowMs),
    ...stages(page.stages),
  );
  panel.scrollTop = 0;
}

function facts(pairs) {
  const list = element("dl");
  for (const [name, said] of pairs) {
    const described = element("dd");
    described.append(said);
    list.append(element("dt", { textContent: name }), described);
  }
  return list;
}

function pageFacts(page, nowMs) {
  const level = element("span", { className: "level", textContent: LEVELS[page.level] ?? page.level });
  level.dataset.level = page.level;
  if (page.level !== "LEVEL_FULL") level.classList.add("lower");
  const asked = element("time", { dateTime: new Date(nowMs).toISOString(), textContent: new Date(nowMs).toLocaleString() });
  const pairs = [["level", level], ["bundle", page.bundle_version], ["policy", page.policy_id], ["request", page.request_id], ["as of", asked]];
  if (page.degraded_reason) pairs.splice(1, 0, ["because", page.degraded_reason]);
  if (page.shortfall_reason) pairs.push(["fewer because", page.shortfall_reason]);
  if (page.cold) pairs.push(["viewer", "not known: a cold start"]);
  return facts(pairs);
}

function probabilities(tasks, scores) {
  if (!scores.length) return [];
  const rows = tasks.map((task, at) => bar(task, scores[at], Math.max(...scores)));
  return [element("h3", { textContent: "Probability by task" }), table("scores", rows)];
}

function value(item) {
  const terms = Object.entries(item.value_terms).sort(([, a], [, b]) => Math.abs(b) - Math.abs(a));
  const most = Math.max(...terms.map(([, worth]) => Math.abs(worth)), 1e-9);
  const total = element("tfoot", {}, bar("value", item.value, 0));
  const made = table("terms", terms.map(([name, worth]) => bar(name, worth, most)));
  made.append(total);
  return [element("h3", { textContent: "What its value is made of" }), made];
}

function stages(all) {
  const rows = all.map((stage) => element("tr", {},
    Object.assign(element("th", { textContent: stage.name }), { scope: "row" }),
    element("td", { textContent: `${(+stage.received).toLocaleString()} → ${(+stage.kept).toLocaleString()}` }),
    element("td", { textContent: `${stage.ms.toFixed(1)} ms` })));
  return [element("h3", { textContent: "How it was made" }), table("stages", rows)];
}

function table(id, rows) {
  return element("table", { id }, element("tbody", {}, ...rows));
}

function bar(name, amount, most) {
  const meter = element("i", { className: amount < 0 ? "minus" : "" });
  meter.style.width = most > 0 ? `${(100 * Math.abs(amount)) / most}%` : "0";
  const row = element("tr", {}, element("th", { textContent: name, scope: "row" }),
    element("td", { className: "meter" }, ...(most > 0 ? [meter] : [])), element("td", { textContent: number(amount) }));
  row.dataset.name = name;
  return row;
}
