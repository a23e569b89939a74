// The session: pages asked for as the viewer nears their end, what the viewer does logged and acted on.
// Ids are 64-bit, so they stay strings. JSON is protobuf's own mapping of GetFeed and LogEvents.

import { drawCard, element } from "./card.js";
import { drawWhy } from "./why.js";

const PAGE = 6, AHEAD = 2, DAY_MS = 86_400_000;
const $ = (id) => document.getElementById(id);
const feed = $("feed"), panel = $("why"), trouble = $("trouble");
let about, session;

class Refused extends Error {}

async function call(path, body, leaving = false) {
  const headers = { "content-type": "application/json" };
  const token = sessionStorage.getItem("token");
  if (token) headers.authorization = `Bearer ${token}`;
  let response;
  try {
    response = await fetch(`api/${path}`, { method: "POST", headers, body: JSON.stringify(body), keepalive: leaving });
  } catch {
    throw new Refused("The server does not answer.");
  }
  const answer = await response.json().catch(() => ({ details: response.statusText, code: response.status }));
  if (response.ok) return answer;
  if (response.status === 401 && !leaving && (await askToken())) return call(path, body);
  throw new Refused(`${answer.details} (${answer.code})`);
}

function askToken() {
  const dialog = $("ask");
  return new Promise((answered) => {
    dialog.onclose = () => {
      const token = $("token").value;
      if (token) sessionStorage.setItem("token", token);
      answered(Boolean(token));
    };
    if (!dialog.open) dialog.showModal();
  });
}

/** A log of the past goes on where it ended when its bundle was published: by today's clock all of it would be ancient. */
function clockMs() {
  return Date.now() - ($("as-of-log").checked ? about.log_lag_ms : 0);
}

function begin(userId) {
  session = { userId, cards: [], pages: [], next: "", current: null, blocked: new Set(), loading: null, atEnd: false, turn: 0, ended: false };
  feed.replaceChildren();
  panel.replaceChildren();
  load();
}

/** One page at a time; what the viewer did meanwhile makes an answer old, and it is asked for again. */
function load() {
  const mine = session;
  mine.loading ??= fetchPage(mine).finally(() => { mine.loading = null; });
  return mine.loading;
}

async function fetchPage(mine) {
  feed.setAttribute("aria-busy", "true");
  for (let turn = -1; turn !== mine.turn && !mine.ended && session === mine;) {
    turn = mine.turn;
    const asked = { user_id: mine.userId, k: PAGE, surface: $("surface").value, page_token: mine.next, now_ms: clockMs(), blocked_author_ids: [...mine.blocked] };
    try {
      const { page, videos } = await call("GetFeed", asked);
      trouble.hidden = true;
      if (session === mine && turn === mine.turn) append(page, videos, asked);
    } catch (error) {
      complain(error, load);
      break;
    }
  }
  feed.setAttribute("aria-busy", "false");
}

function append(page, videos, asked) {
  const cards = page.items.map((item, at) => {
    const node = drawCard(item, videos[item.video_id], asked.now_ms);
    const card = { item, page, nowMs: asked.now_ms, node, watchedMs: 0, sinceMs: null, given: {}, dirty: false };
    node.setAttribute("aria-posinset", session.cards.length + at + 1);
    node.setAttribute("aria-setsize", -1);
    node.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (button) act(card, button.dataset.do);
    });
    return card;
  });
  session.pages.push({ before: asked.page_token, cards });
  session.cards.push(...cards);
  session.next = page.next_page_token;
  feed.append(...cards.map((card) => card.node));
  cards.forEach((card) => watcher.observe(card.node));
  if (!page.items.length || page.shortfall_reason) {
    session.ended = true;
    const said = page.shortfall_reason || "Nothing more is left to show.";
    const end = element("div", { className: "card end", tabIndex: 0 }, element("div", {},
      element("p", { textContent: "That is the end of this feed." }), element("p", { textContent: said })));
    feed.append(end);
    watcher.observe(end);
  }
}

/** Whoever fills most of the screen plays; its dwell is the watch time. */
const watcher = new IntersectionObserver((entries) => {
  for (const { target } of entries.filter((entry) => entry.isIntersecting)) {
    const card = session.cards.find(({ node }) => node === target);
    if (card && (card !== session.current || session.atEnd)) show(card);
    else if (target.classList.contains("end")) {
      session.atEnd = true;
      leave(session.current);
    }
  }
}, { root: feed, threshold: 0.6 });

function leave(card) {
  if (!card) return;
  stop(card);
  card.dirty = true;
  log();
}

function show(card) {
  if (!session.atEnd) leave(session.current);
  session.current = card;
  session.atEnd = false;
  card.node.classList.add("now");
  if (!document.hidden) card.sinceMs = performance.now();
  drawWhy(panel, card, () => panel.classList.remove("open"));
  if (session.cards.indexOf(card) >= session.cards.length - AHEAD) load();
}

function stop(card) {
  card.node.classList.remove("now");
  if (card.sinceMs !== null) card.watchedMs += performance.now() - card.sinceMs;
  card.sinceMs = null;
}

/** Everything not yet acknowledged goes along, so what failed is sent again; a server counts an impression once. */
async function log(leaving = false) {
  const mine = session, sent = mine.cards.filter((card) => card.dirty);
  if (!sent.length) return true;
  const events = sent.map(({ item, page, watchedMs, given, sinceMs }) => ({
    request_id: page.request_id, slot: item.slot, user_id: mine.userId, video_id: item.video_id, ts_ms: clockMs(),
    watch_ms: Math.round(watchedMs + (sinceMs === null ? 0 : performance.now() - sinceMs)),
    like: Boolean(given.like), follow: Boolean(given.follow), hate: Boolean(given.hate),
  }));
  sent.forEach((card) => { card.dirty = false; });
  try {
    await call("LogEvents", { events }, leaving);
    return true;
  } catch (error) {
    sent.forEach((card) => { card.dirty = true; });
    complain(error, log);
    return false;
  }
}

async function act(card, kind) {
  if (kind === "skip") return move(1);
  if (kind === "why") {
    panel.classList.toggle("open");
    return panel.focus();
  }
  if (!["like", "follow", "hate"].includes(kind) || card.given[kind]) return;
  card.given[kind] = card.dirty = true;
  card.node.querySelector(`[data-do=${kind}]`).setAttribute("aria-pressed", "true");
  $("said").textContent = { like: "Liked.", follow: "Following this author.", hate: "This author is hidden." }[kind];
  if (kind === "hate") session.blocked.add(card.item.author_id);
  if (await log()) await again();
  if (kind !== "hate") return;
  const after = session.cards.slice(session.cards.indexOf(card) + 1);
  drop(after.filter(({ item }) => item.author_id === card.item.author_id));
  if (session.current === card) move(1);
}

/** Pages nobody has looked into are asked for again, now that the server knows more. */
function again() {
  session.turn++;
  const seen = session.cards.slice(0, session.cards.indexOf(session.current) + 1);
  while (session.pages.length > 1 && !session.pages.at(-1).cards.some((card) => seen.includes(card))) {
    const page = session.pages.pop();
    session.next = page.before;
    session.ended = false;
    drop(page.cards);
  }
  if (!session.ended) feed.querySelectorAll(".end").forEach((node) => node.remove());
  return seen.length > session.cards.length - AHEAD ? load() : null;
}

function drop(cards) {
  for (const card of cards) {
    watcher.unobserve(card.node);
    card.node.remove();
  }
  session.cards = session.cards.filter((card) => !cards.includes(card));
}

function move(by) {
  const node = session.atEnd ? feed.lastElementChild : session.current?.node;
  const to = by > 0 ? node?.nextElementSibling : node?.previousElementSibling;
  if (!to) return;
  to.scrollIntoView({ behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "instant" : "smooth" });
  to.focus({ preventScroll: true });
}

function complain(error, retry) {
  if (!(error instanceof Refused)) throw error;
  trouble.hidden = false;
  trouble.firstElementChild.textContent = error.message;
  trouble.lastElementChild.onclick = () => {
    trouble.hidden = true;
    retry();
  };
}

const KEYS = { ArrowDown: "skip", j: "skip", l: "like", f: "follow", n: "hate", w: "why" };
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, dialog, #why")) {
    if (event.key === "Escape") panel.classList.remove("open");
    return;
  }
  if (event.key === "ArrowUp" || event.key === "k") move(-1);
  else if (KEYS[event.key] && session?.current) act(session.current, KEYS[event.key]);
  else if (event.key === "Escape") panel.classList.remove("open");
  else return;
  event.preventDefault();
});

document.addEventListener("visibilitychange", () => {
  const card = session?.current;
  if (!card || session.atEnd) return;
  if (document.hidden) {
    stop(card);
    card.dirty = true;
    log(true);
  } else {
    card.node.classList.add("now");
    card.sinceMs = performance.now();
  }
});

function options(select, values, label = String) {
  select.replaceChildren(...values.map((value) => element("option", { value, textContent: label(value) })));
}

async function start() {
  try {
    about = await call("about", {});
  } catch (error) {
    return complain(error, start);
  }
  options($("user"), [...about.users, "-1", ""], (id) => ({ "-1": "nobody known (cold start)", "": "another id…" })[id] ?? id);
  options($("surface"), about.surfaces);
  $("where").hidden = about.surfaces.length < 2;
  $("clock").hidden = about.log_lag_ms === 0;
  $("as-of-log").checked = about.log_lag_ms > DAY_MS;
  const choose = () => {
    $("other").hidden = $("user").value !== "";
    const chosen = $("user").value || ($("other-id").checkValidity() && $("other-id").value);
    if (chosen) begin(chosen);
    else $("other-id").focus();
  };
  $("who").onchange = choose;
  $("who").onsubmit = (event) => event.preventDefault();
  choose();
}

start();
