// One card: drawn from what is known of the video, as there is no video file. Text is set as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";
const ICONS = {
  like: ["Like", "M12 20s-7-4.4-7-10a4 4 0 0 1 7-2.6A4 4 0 0 1 19 10c0 5.6-7 10-7 10z"],
  follow: ["Follow", "M12 5v14M5 12h14"],
  skip: ["Skip", "M6 9l6 6 6-6"],
  hate: ["Not interested", "M12 3a9 9 0 1 0 0 18 9 9 0 0 0 0-18zM5.7 5.7l12.6 12.6"],
  why: ["Why?", "M9 9a3 3 0 1 1 4 2.8c-1 .4-1 1.2-1 2.2M12 17.5v.01"],
};
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** `item` and `page` as GetFeed answered, `video` what the gateway adds: upload_ts_ms and topics. */
export function drawCard(item, video, nowMs) {
  const frame = element("div", { className: "frame" });
  const seed = hash(item.video_id), topic = hash(String(video.topics[0] ?? item.author_id));
  for (const [name, value] of [
    ["--a", topic % 360], ["--b", (topic + 280 + (seed % 50)) % 360],
    ["--x", `${15 + (seed % 70)}%`], ["--y", `${10 + ((seed >>> 7) % 45)}%`],
  ]) frame.style.setProperty(name, value);
  frame.append(rings(seed), element("span", { className: "length", textContent: clock(+item.duration_ms) }), told(item, video, nowMs));
  frame.append(buttons(item), progress(+item.duration_ms));
  const card = element("article", { className: "card", tabIndex: 0 }, frame);
  Object.assign(card.dataset, { video: item.video_id, author: item.author_id });
  card.setAttribute("aria-label", `Video ${item.video_id} by author ${item.author_id}`);
  return card;
}

function told(item, video, nowMs) {
  const tags = element("ul", {}, ...video.topics.slice(0, 4).map((t) => element("li", { textContent: `topic ${t}` })));
  const age = video.upload_ts_ms === null ? "upload time not known" : `uploaded ${ago(nowMs - video.upload_ts_ms)}`;
  return element("div", { className: "told" },
    element("h2", { textContent: `@${item.author_id}` }),
    element("p", { textContent: item.connected ? `${age}, from an author you follow` : age }),
    tags,
    element("p", { className: "reason", textContent: item.reason || item.sources[0] }));
}

function buttons(item) {
  const all = element("div", { className: "do" });
  for (const [kind, [label, path]] of Object.entries(ICONS)) {
    const icon = document.createElementNS(SVG, "svg");
    icon.setAttribute("viewBox", "0 0 24 24");
    icon.setAttribute("aria-hidden", "true");
    icon.append(document.createElementNS(SVG, "path"));
    icon.firstChild.setAttribute("d", path);
    const button = element("button", { type: "button" }, element("i", {}, icon), label);
    button.dataset.do = kind;
    if (["like", "follow", "hate"].includes(kind)) button.setAttribute("aria-pressed", "false");
    all.append(button);
  }
  return all;
}

function rings(seed) {
  const art = document.createElementNS(SVG, "svg");
  art.setAttribute("viewBox", "0 0 90 160");
  art.setAttribute("preserveAspectRatio", "xMidYMid slice");
  art.setAttribute("class", "rings");
  art.setAttribute("aria-hidden", "true");
  for (let ring = 0; ring < 5; ring++) {
    const circle = document.createElementNS(SVG, "circle");
    circle.setAttribute("cx", 15 + (seed % 61));
    circle.setAttribute("cy", 30 + ((seed >>> 5) % 71));
    circle.setAttribute("r", 8 + ring * (7 + ((seed >>> 11) % 9)));
    circle.setAttribute("stroke-width", 0.4 + ((seed >>> ring) % 3) * 0.35);
    art.append(circle);
  }
  return art;
}

function progress(durationMs) {
  const bar = element("div", { className: "bar" }, element("i"));
  bar.style.setProperty("--ms", `${Math.max(durationMs, 1000)}ms`);
  return bar;
}

function hash(text) {
  let value = 2166136261;
  for (const letter of text) value = Math.imul(value ^ letter.charCodeAt(0), 16777619) >>> 0;
  return value;
}

function clock(ms) {
  const s = Math.round(ms / 1000);
  return ms ? `${Math.floor(s / 60)}:${String(s % 60).padStart(2, "0")}` : "length not known";
}

function ago(ms) {
  for (const [unit, size] of [["day", 86_400_000], ["hour", 3_600_000], ["minute", 60_000]]) {
    const count = Math.floor(ms / size);
    if (count >= 1) return `${count} ${unit}${count > 1 ? "s" : ""} ago`;
  }
  return "just now";
}
