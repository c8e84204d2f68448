// The operators' console: shows the data of /api, and retries or removes parked events.
//
// In reading order: words (numbers and times as text), answers (the relay judges, the page only shows), page (words into
// the document), charts, actions (the dialog), feed (data from the relay), start.
//
// All data from the API is untrusted: it enters the page as text nodes only, never as markup.

/** The latest data. `ahead`: how far the relay's clock is ahead of the browser's, so that ages are right anyway. */
const facts = { status: null, points: [], ahead: 0, heardAt: null, lost: false };

/** What the charts show: the name of the range in `/api/history`, its length and the time between two points, in s. */
const shown = { range: "15min", seconds: 900, interval: 5, loadedAt: 0, rows: [] };

// ---- words ----------------------------------------------------------------------------------------------------------

const whole = new Intl.NumberFormat("en-US");
const compact = new Intl.NumberFormat("en-US", { notation: "compact", maximumFractionDigits: 1 });
const TIME = { hour: "2-digit", minute: "2-digit" };
const clockFormat = new Intl.DateTimeFormat("en-GB", { ...TIME, second: "2-digit" });
const dayFormat = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short", ...TIME });

const relayNow = () => Date.now() + facts.ahead;
const secondsSince = (time) => Math.max(0, (relayNow() - Date.parse(time)) / 1000);
const short = (number) => (number < 10000 ? whole.format(number) : compact.format(number));
const rate = (number) => (number >= 9.95 ? whole.format(Math.round(number)) : String(Math.round(number * 10) / 10));
const count = (number, one, many = one + "s") => `${whole.format(number)} ${number === 1 ? one : many}`;

/** A number and its unit, kept on one line. */
const unit = (number, name) => `${number}\u00a0${name}`;

function duration(seconds) {
  if (seconds < 1) return `less than ${unit(1, "s")}`;
  if (seconds < 100) return unit(Math.floor(seconds), "s");
  const minutes = Math.floor(seconds / 60);
  const hours = Math.floor(minutes / 60);
  if (minutes < 60) return unit(minutes, "min");
  if (hours < 10) return minutes % 60 ? `${unit(hours, "h")} ${unit(minutes % 60, "min")}` : unit(hours, "h");
  return hours < 48 ? unit(hours, "h") : unit(Math.floor(hours / 24), "days");
}

function latency(ms) {
  if (ms < 10) return unit(Math.round(ms * 10) / 10, "ms");
  if (ms < 1000) return unit(Math.round(ms), "ms");
  return ms < 10000 ? unit(Math.round(ms / 100) / 10, "s") : duration(ms / 1000);
}

function bytes(number) {
  const power = number < 1024 ? 0 : Math.min(4, Math.floor(Math.log2(number) / 10));
  const scaled = number / 1024 ** power;
  return unit(power && scaled < 10 ? scaled.toFixed(1) : Math.round(scaled), ["B", "KiB", "MiB", "GiB", "TiB"][power]);
}

function percent(share) {
  if (share > 0 && share < 0.01) return `less than ${unit(1, "%")}`;
  return unit(Math.floor(share * 100), "%"); // Rounded down, because 99.6 % is not full.
}

function clock(time) {
  const date = new Date(time);
  return date.toDateString() === new Date().toDateString() ? clockFormat.format(date) : dayFormat.format(date);
}

/** A detail of an API error as a sentence. */
const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

const agoText = (time) => (secondsSince(time) < 5 ? "just now" : `${duration(secondsSince(time))} ago`);

/** Keeps each number on one line with its unit, or with what it counts. */
const tidy = (text) => text.replace(/(\d) (?=[a-z%])/gi, "$1\u00a0");

// ---- answers --------------------------------------------------------------------------------------------------------

const fullness = ({ spool }) => (spool.max_bytes ? spool.bytes / spool.max_bytes : 0);

/** Where an answer that is not well leads to. */
const LINKS = { parked: ["#parked", "See why"], lost: ["#refusals", "See the refused webhooks"] };

/** The icon of a level; a level of another version is not known here. */
const look = (level) => ({ ok: "ok", note: "quiet", warning: "warning", problem: "problem" })[level] ?? "quiet";

// ---- page -----------------------------------------------------------------------------------------------------------

const $ = (id) => document.getElementById(id);
const svgIcon = document.createElement("template");
svgIcon.innerHTML = '<svg class="icon" aria-hidden="true"><use href="#icon-quiet"></use></svg>'; // A constant, no data.

/** Makes an element. String children become text nodes. */
function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** Sets text only when it changes, so that selections survive. */
function say(node, text) {
  const tidied = tidy(text);
  if (node.textContent !== tidied) node.textContent = tidied;
}

/** As say(), for text with commands in backticks, which can be copied. */
function explain(node, text) {
  if (node.dataset.text !== text) node.replaceChildren(...withCommands(text));
  node.dataset.text = text;
}

const withCommands = (text) =>
  text.split("`").map((part, place) => (place % 2 ? command(part) : tidy(part)));

function command(text) {
  const parts = text.split(" ").flatMap((part) => [el("span", { class: "part" }, part), " "]);
  const code = el("code", {}, ...parts.slice(0, -1));
  const button = el("button", { type: "button", class: "copy", "aria-label": `Copy ${text}` }, "Copy");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
    } catch { // Pages without TLS have no clipboard.
      getSelection().selectAllChildren(code);
      document.execCommand("copy");
    }
    say(button, "Copied");
    setTimeout(() => say(button, "Copy"), 2000);
  });
  return el("span", { class: "command" }, code, button);
}

/** Shows a link, or none. */
function link(anchor, target, label) {
  anchor.hidden = !target;
  if (target && anchor.getAttribute("href") !== target) anchor.setAttribute("href", target);
  say(anchor, label);
}

/** The page's own copy of the runbook. */
const entry = (name) => (name ? `runbook#${name.toLowerCase()}` : null);

function icon(level) {
  const made = svgIcon.content.firstChild.cloneNode(true);
  setIcon(made, level);
  return made;
}

function setIcon(svg, level) {
  svg.dataset.level = level;
  svg.firstElementChild.setAttribute("href", `#icon-${level}`);
}

/** An age that tick() keeps current. */
const ago = (time) => el("time", { datetime: time, title: time, "data-ago": time }, agoText(time));
const cell = (label, className, ...children) =>
  el("td", { role: "cell", class: className, ...(label && { "data-label": label }) }, ...children);
const row = (...cells) => el("tr", { role: "row" }, ...cells);
const mono = (text) => el("span", { class: "mono" }, text);
const second = (...children) => el("span", { class: "second" }, ...children);
const fact = (name, value) => [el("dt", {}, name), el("dd", {}, value)];

/** Makes the children of `parent` show `items`. Unchanged children stay, with focus and selection. */
function fill(parent, items, keyOf, build) {
  const before = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  const after = items.map((item) => {
    const [key, shown] = [String(keyOf(item)), JSON.stringify(item)];
    const old = before.get(key);
    if (old?.dataset.shown === shown) return old;
    const made = build(item);
    Object.assign(made.dataset, { key, shown });
    made.takesFocusFrom = old?.contains(document.activeElement) ? document.activeElement.dataset.action : undefined;
    return made;
  });
  const kept = new Set(after);
  for (const child of before.values()) if (!kept.has(child)) child.remove();
  let next = parent.firstElementChild;
  for (const child of after) {
    if (child === next) next = next.nextElementSibling;
    else parent.insertBefore(child, next);
    if (child.takesFocusFrom) child.querySelector(`[data-action="${child.takesFocusFrom}"]`)?.focus();
    child.takesFocusFrom = undefined;
  }
}

const LEVELS = { ok: "OK", quiet: "Note", warning: "Needs attention", problem: "Problem" };

function showSummary({ headline, host, listen }) {
  const { text, detail, advice } = headline;
  const level = look(headline.level);
  document.body.dataset.level = level;
  $("summary-icon").setAttribute("href", `#icon-${level}`);
  say($("summary-level"), LEVELS[level]);
  say($("summary-text"), text);
  say($("summary-detail"), detail);
  explain($("summary-advice"), advice);
  link($("summary-runbook"), entry(headline.runbook), "What to do, step by step");
  say($("where"), `${host}, ${listen}`);
  document.title = `${LEVELS[level]} - ${host}, ${listen} - prism-relay`;
  const colour = { ok: "1a7f4e", quiet: "5c6b73", warning: "d98a00", problem: "c4281e" }[level];
  const triangle = "<path d='M8 1l7 14H1z'/>";
  const square = "<path d='M1 1h14v14H1z'/>";
  const circle = "<circle cx='8' cy='8' r='7'/>";
  const shape = { ok: circle, quiet: circle, warning: triangle, problem: square }[level];
  const svg = `<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16' fill='%23${colour}'>${shape}</svg>`;
  $("favicon").href = `data:image/svg+xml,${svg}`;
  announce(`${LEVELS[level]}. ${text}`);
}

let announced = "";

/** Has screen readers read the text, unless only numbers or times in it changed. */
function announce(text) {
  const masked = text.replace(/[\d.,]+(\s?(ms|s|min|h|days?)\b)?/g, "#");
  const gist = masked.replace(/less than |just now/g, "").replace(/(#\s?)+/g, "#");
  if (gist === announced) return;
  announced = gist;
  $("announcer").textContent = text;
}

function makeAnswer({ id, question }) {
  return el("li", { class: "answer", "data-question": id },
    el("h2", {}, question), el("p", { class: "word" }, icon("quiet"), el("span", {}, "…")),
    el("p", { class: "detail" }), el("p", { class: "remedy" }),
    el("p", { class: "more" }, el("a", { hidden: "" }), " ", el("a", { hidden: "" })));
}

function showAnswers({ answers }) {
  const list = $("answer-list");
  const ids = answers.map(({ id }) => id).join();
  if (list.dataset.ids !== ids) list.replaceChildren(...answers.map(makeAnswer));
  list.dataset.ids = ids;
  answers.forEach(({ id, level, word, detail, remedy, runbook }, place) => {
    const card = list.children[place];
    card.dataset.level = look(level);
    setIcon(card.querySelector(".icon"), look(level));
    say(card.querySelector(".word span"), word);
    say(card.querySelector(".detail"), detail);
    explain(card.querySelector(".remedy"), remedy ?? "");
    const [see, steps] = card.querySelectorAll(".more a");
    link(see, ...((level !== "ok" && LINKS[id]) || [null, ""]));
    see.onclick = () => { document.querySelector(see.hash).open = true; }; // It may be folded.
    link(steps, entry(runbook), "Runbook");
  });
}

function showParked({ total, parked }) {
  // The section stays while it shows a notice, and while the dialog must return the focus to it.
  $("parked").hidden = total === 0 && !$("parked-notice").textContent;
  const kept = "RabbitMQ could not route these events or did not accept them. They stay on disk and are tried again "
    + "from time to time, until they are delivered or you remove them.";
  const more = total <= parked.length ? ""
    : ` These are the first ${parked.length} of ${whole.format(total)}; \`prism-relay spool list --parked\` lists all.`;
  explain($("parked-lead"), total === 0 ? "No event is parked any more." : kept + more);
  $("parked-rows").closest("table").hidden = total === 0;
  $("parked-all").hidden = total < 2;
  $("parked-all").dataset.total = total;
  fill($("parked-rows"), parked, (event) => event.id, parkedRow);
}

function parkedRow(event) {
  const button = (action, label) => {
    const attributes = { type: "button", "data-action": action, "aria-label": `${label} event ${event.id}` };
    const made = el("button", attributes, label);
    made.addEventListener("click", () => ask(action, event));
    return made;
  };
  return row(
    cell("", "", event.type ?? "no type", second(mono(event.subject ?? "no subject")), second(mono(event.id))),
    cell("Reason:", "", `${sentence(event.reason)} `, second(...withCommands(event.remedy))),
    cell("Accepted:", "nowrap", ago(event.accepted_at)),
    cell("Last tried:", "nowrap", event.tried_at ? ago(event.tried_at) : "not yet"),
    cell("", "", el("div", { class: "buttons" }, button("retry", "Retry…"), button("remove", "Remove…"))));
}

function showRefusals({ refusals, refusing, last }) {
  placeRefusals(refusing);
  $("refusals-table").hidden = !refusals.length;
  const latest = last.refused_at ? agoText(last.refused_at) : "long ago";
  say($("refusals-lead"), refusals.length ? `Since the start; the last one ${latest}.` : "None since the start.");
  fill($("refusals-rows"), refusals, ({ reason }) => reason, ({ reason, count: times, cause, remedy }) => row(
    cell("", "nowrap", mono(reason)),
    cell("Count:", "number", whole.format(times)),
    cell("", "", sentence(cause), " ", ...withCommands(remedy))));
}

let urgentBefore = false;

/** Moves the section up while webhooks are refused: in the document, so that the reading and tab order follow. */
function placeRefusals(urgent) {
  const section = $("refusals");
  if (urgent && section.parentElement !== $("main")) $("charts").before(section);
  if (!urgent && section.parentElement !== $("trust")) $("trust").prepend(section);
  if (urgent && !urgentBefore) section.open = true; // It is folded on a phone, also when the page is opened.
  urgentBefore = urgent;
}

function showTypes({ types }) {
  const most = Math.max(1, ...types.map((type) => type.accepted));
  $("types-table").hidden = !types.length;
  say($("types-lead"), types.length ? "Accepted since the start." : "No event since the start.");
  fill($("types-rows"), types, (type) => type.type, ({ type, accepted, last_seen: seen }) => {
    const bar = el("span", { class: "share", "aria-hidden": "true" });
    bar.style.width = `${(100 * accepted) / most}%`;
    return row(
      cell("", "", type, bar),
      cell("Accepted:", "number", whole.format(accepted)),
      cell("Last seen:", "number", ago(seen)));
  });
}

const UNEXPECTED = { event_type: "event type", field: "field", state: "state", type: "type of" };

function showUnexpected({ unexpected }) {
  $("unexpected").hidden = !unexpected.length;
  fill($("unexpected-rows"), unexpected, ({ kind, name }) => `${kind} ${name}`, (news) => row(
    cell("", "", `${UNEXPECTED[news.kind]} `, mono(news.name)),
    cell("Times:", "number", whole.format(news.count)),
    cell("First seen:", "number", ago(news.first_seen))));
}

const CONNECTION_CHANGES = {
  connected: ["ok", "Connected"], lost: ["problem", "Connection lost"],
  blocked: ["warning", "Blocked by RabbitMQ"], unblocked: ["ok", "Unblocked"],
};

function showBroker({ broker, timeline }) {
  const state = broker.blocked !== null ? `connected, but blocked: ${broker.blocked}`
    : broker.connected ? "connected" : "not connected";
  const lines = [
    ["State", state],
    ["Since", `${clock(broker.since)}, ${duration(secondsSince(broker.since))}`],
    [broker.url ? "Address" : "Configured", broker.url ?? broker.urls.join(", ")],
    ["Error", broker.error],
    ["Connections since the start", whole.format(broker.connects)],
    ["Published, not yet confirmed", whole.format(broker.in_flight)],
  ].filter(([, value]) => value);
  const list = $("broker-facts");
  const names = lines.map(([name]) => name).join();
  if (list.dataset.names !== names) list.replaceChildren(...lines.flatMap(([name]) => fact(name, "")));
  list.dataset.names = names;
  lines.forEach(([, value], place) => say(list.children[2 * place + 1], value));
  say($("timeline-lead"), timeline.length ? "" : "No change yet.");
  fill($("timeline"), timeline, (entry) => entry.at + entry.what, ({ at, what, detail }) => {
    const [level, words] = CONNECTION_CHANGES[what] ?? ["quiet", what];
    const time = el("time", { datetime: at, title: at }, clock(at));
    return el("li", {}, icon(level), el("span", {}, words, second(detail ?? "")), time);
  });
}

const DELIVERIES = { confirmed: "ok", pending: "quiet", parked: "warning", removed: "warning", gone: "quiet" };

function showEvents({ events }) {
  const find = $("find").value.trim();
  const none = find ? `None of the latest events matches “${find}”. Older events are not listed.` : "No event yet.";
  const some = find ? `${count(events.length, "event matches", "events match")} “${find}”.`
    : "Newest first. The list does not change while the pointer is over it.";
  say($("events-lead"), events.length ? some : none);
  $("events-table").hidden = !events.length;
  fill($("events-rows"), events, (event) => event.id, (event) => {
    const took = event.settled_at ? Date.parse(event.settled_at) - Date.parse(event.accepted_at) : null;
    const delivered = took === null ? "delivered" : `delivered in ${took < 1 ? "less than 1 ms" : latency(took)}`;
    const waiting = event.waits_behind ? `waits behind ${event.waits_behind}` : "waiting";
    const texts = { pending: waiting, parked: "parked", confirmed: delivered, removed: "removed by an operator",
      gone: "no longer in the spool" };
    const at = event.accepted_at;
    const state = [icon(DELIVERIES[event.status] ?? "quiet"), texts[event.status] ?? event.status];
    const prediction = event.prediction_id ? second("prediction ", mono(event.prediction_id)) : null;
    const source = event.source === "api" ? second("by Prism's API") : null;
    return row(
      cell("", "", el("time", { datetime: at, title: at, class: "nowrap" }, clock(at))),
      cell("", "", event.type, source),
      cell("", "", mono(event.scan_id || (event.subject ?? "-")), prediction),
      cell("State at Prism:", "wide", event.state ?? "-"),
      cell("", "", el("span", { class: "state" }, ...state)),
      cell("Event id:", "", mono(event.id)));
  });
}

const STEPS = { began: "Began", succeeded: "Succeeded", failed: "Failed" };

/** The steps of the scan or prediction that is searched for, with times and sources. */
function showSubjects({ subjects }) {
  $("subjects").hidden = !subjects.length;
  fill($("subjects"), subjects, ({ subject }) => subject, ({ subject, open, order, steps, tries, asked_at: asked }) => {
    const step = ({ step: name, at, source, verified }) => [
      `${STEPS[name] ?? name} `, at ? el("time", { datetime: at, title: at }, clock(at)) : "at an unknown time",
      ` by ${source === "api" ? "Prism's API" : "a webhook"}${verified ? "" : ", not verified"}. `];
    const questions = tries ? `Prism's API was asked ${count(tries, "time")}, last at ${clock(asked)}. ` : "";
    const rest = `${open ? "It has not ended. " : ""}${questions}${order ? `The order is impossible: ${order}.` : ""}`;
    const level = order ? "warning" : open ? "quiet" : "ok";
    return el("li", {}, icon(level), el("span", {}, mono(subject), second(...steps.flatMap(step), rest)));
  });
}

function secretLine({ position, last_verified_at: last }, newest, uptime) {
  const used = last ? `last used ${agoText(last)}` : `not used since the start, ${duration(uptime)} ago`;
  const name = `Secret ${position}${position === 1 ? ", the newest" : ""}`;
  if (position === 1) return [last ? "ok" : "quiet", name, `${used[0].toUpperCase()}${used.slice(1)}.`];
  if (last && secondsSince(last) < 86400) {
    return ["warning", name, `It was ${used}: Prism may still sign with it. Do not remove it yet.`];
  }
  if (!last && uptime < 86400) return ["quiet", name, `It was ${used}: too early to say whether it can be removed.`];
  if (!newest?.last_verified_at) return ["quiet", name, `It was ${used}.`];
  return ["ok", name, `It was ${used}: it can be removed.`];
}

function certificateLine(certificate) {
  if (!certificate) {
    return ["quiet", "No certificate", "The relay listens on plain HTTP. Terminate TLS in a proxy in front of it."];
  }
  const { days_left: days, expires_at: end, level } = certificate;
  const when = dayFormat.format(new Date(end));
  return [level, "Certificate", days < 0 ? `It expired on ${when}.` : `${count(days, "day")} left, until ${when}.`];
}

function showKeys({ secrets, certificate, uptime_seconds: uptime }) {
  const lines = secrets.map((secret) => secretLine(secret, secrets[0], uptime));
  if (!secrets.length) lines.push(["warning", "No secret", "Webhooks are accepted without a signature."]);
  fill($("keys"), [...lines, certificateLine(certificate)], ([, name]) => name, ([level, name, text]) =>
    el("li", {}, icon(level), el("span", {}, name, second(text))));
}

function showStatus() {
  const { status } = facts;
  showSummary(status);
  showAnswers(status);
  showRefusals(status);
  showTypes(status);
  showUnexpected(status);
  showBroker(status);
  showKeys(status);
  showFullness(status);
  const zone = Intl.DateTimeFormat().resolvedOptions().timeZone;
  const uptime = duration(status.uptime_seconds);
  say($("about"), `prism-relay ${status.version}, running for ${uptime}. Times are in ${zone}.${lastNotice(status)}`);
  $("about").dataset.level = status.notify?.last?.error ? "warning" : "ok";
}

/** Where notices go, and what became of the last one, as a sentence. */
function lastNotice({ notify }) {
  if (!notify) return "";
  if (!notify.last) return ` Notices go to ${notify.to}; none was sent yet.`;
  const { level, state, at, error } = notify.last;
  if (state === "sent") return ` Last notice (${level}) sent to ${notify.to}: ${clock(at)}.`;
  return ` The last notice (${level}) has not reached ${notify.to}: ${error}.`;
}

/** Once a second: updates the ages, and notices that the relay is silent. */
function tick() {
  for (const time of document.querySelectorAll("time[data-ago]")) say(time, agoText(time.dataset.ago));
  const silence = facts.heardAt === null ? 0 : (Date.now() - facts.heardAt) / 1000;
  if (silence > 4) facts.lost = true;
  document.body.classList.toggle("stale", facts.lost);
  $("lost").hidden = !facts.lost;
  if (!facts.lost) return say($("live"), facts.status ? `live, ${clockFormat.format(relayNow())}` : "connecting");
  say($("live"), "not live");
  if (facts.status) say($("summary-level"), `Last known status: ${LEVELS[document.body.dataset.level] ?? ""}`);
  const since = facts.heardAt === null ? "The relay cannot be reached. Trying again."
    : `Connection to the relay lost ${duration(silence)} ago; what you see is old. Trying again.`;
  say($("lost"), since);
  const where = facts.status ? `${facts.status.host}, ${facts.status.listen} - ` : "";
  document.title = `Connection lost - ${where}prism-relay`;
  announce(since);
}

// ---- charts ---------------------------------------------------------------------------------------------------------

/** Lines differ in colour and dashes. Colours are names of CSS custom properties, so they follow the colour scheme. */
const CHARTS = [
  { title: "Webhooks per second", format: rate, floor: 1, lines: [
    { name: "Accepted", key: "accepted", colour: "--accepted", fill: true },
    { name: "Confirmed", key: "confirmed", colour: "--confirmed", dash: [2, 3] },
    { name: "Refused", key: "refused", colour: "--refused", dash: [5, 4] },
  ] },
  { title: "Events waiting in the spool", format: whole.format, floor: 5, lines: [
    { name: "Waiting", key: "depth", colour: "--depth", fill: true },
  ] },
  { title: "Messages waiting in RabbitMQ", format: whole.format, floor: 5, lines: [
    { name: "For workers", key: "queued", colour: "--queued", fill: true },
    { name: "Dead or unrouted", key: "dead", colour: "--refused", dash: [5, 4] },
  ] },
  { title: "Time from accepted to confirmed", format: latency, log: true, lines: [
    { name: "Half within", key: "lag_p50_ms", colour: "--p50" },
    { name: "99 % within", key: "lag_p99_ms", colour: "--p99", dash: [5, 4] },
  ] },
];

/** What happened to the relay: a line across all charts, with a sign of its own, because colours alone say little. */
const MARKS = {
  lost: { sign: "\u2715", words: "connection lost", colour: "--problem" },
  blocked: { sign: "\u2016", words: "blocked", colour: "--warning" },
  started: { sign: "\u25b2", words: "relay started", colour: "--soft" },
};

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function makeChart(spec) {
  const keys = spec.lines.map((line) => {
    const stroke = el("i", line.dash ? { class: "dashed" } : {});
    stroke.style.borderColor = `var(${line.colour})`;
    return el("span", { class: "key" }, stroke, line.name, el("b"));
  });
  spec.values = keys.map((key) => key.lastChild);
  spec.when = el("span", { class: "when" });
  spec.plot = el("div", { class: "plot", role: "img" });
  const legend = el("p", { class: "keys-line" }, ...keys, spec.when);
  const panel = el("li", { class: "panel chart" }, el("h2", {}, spec.title), legend, spec.plot);
  $("chart-list").append(panel);
  spec.chart = new uPlot(chartOptions(spec), [[], ...spec.lines.map(() => [])], spec.plot);
  const resize = () => {
    const { clientWidth: width, clientHeight: height } = spec.plot;
    if (width > 0) spec.chart.setSize({ width, height });
  };
  new ResizeObserver(resize).observe(spec.plot);
  if (spec.lines[0].key === "depth") panel.append(makeFullness());
}

function chartOptions(spec) {
  const axis = { stroke: () => colour("--soft"), font: `12px ${colour("--text")}`, ticks: { show: false },
    grid: { stroke: () => colour("--line"), width: 1 } };
  const clocks = (_, splits) => splits.map((at) => clockFormat.format(at * 1000).slice(0, 5));
  const time = { ...axis, grid: { show: false }, space: 72, size: 26, values: clocks };
  const label = spec.log ? latency : short;
  const labels = (_, splits) => splits.map((split) => label(split));
  const value = { ...axis, size: 58, gap: 6, space: 34, values: labels };
  if (spec.log) Object.assign(value, { splits: decades, filter: (_, splits) => splits });
  const linear = { range: (_, low, high) => [0, Math.max(spec.floor, (high ?? 0) * 1.15)] };
  return {
    width: spec.plot.clientWidth,
    height: spec.plot.clientHeight,
    legend: { show: false },
    padding: [14, 18, 0, 0],
    cursor: { y: false, drag: { x: false, y: false }, sync: { key: "console" }, points: { size: 7 } },
    scales: {
      x: { range: () => [relayNow() / 1000 - shown.seconds, relayNow() / 1000] },
      y: spec.log ? { distr: 3, range: decadeRange } : linear,
    },
    axes: [time, value],
    hooks: { setCursor: [() => showKeyLine(spec)], draw: [drawMarks] },
    series: [{}, ...spec.lines.map(chartSeries)],
  };
}

function chartSeries({ colour: name, dash, fill: filled }) {
  // A line needs two points, so a single value between gaps is drawn as a dot.
  const lonely = (chart, place) => {
    const at = (i) => chart.data[place][i] ?? null;
    return [...chart.data[place].keys()].filter((i) => at(i) !== null && at(i - 1) === null && at(i + 1) === null);
  };
  return {
    stroke: () => colour(name),
    width: 1.75,
    dash,
    fill: filled ? () => `${colour(name)}22` : undefined,
    points: { show: true, size: 4, fill: () => colour(name), filter: lonely },
  };
}

/** The lag ranges from below a millisecond to hours: a logarithmic axis, with a line at each power of ten. */
function decadeRange(_, low, high) {
  const [from, to] = [Math.floor(Math.log10(low || 1)), Math.ceil(Math.log10(high || 100))];
  return [10 ** from, 10 ** Math.max(to, from + 2)];
}

function decades(chart) {
  const { min, max } = chart.scales.y;
  const [from, to] = [Math.round(Math.log10(min)), Math.round(Math.log10(max))];
  return Array.from({ length: to - from + 1 }, (_, i) => 10 ** (from + i));
}

function drawMarks({ ctx, bbox, valToPos }) {
  const scale = devicePixelRatio;
  ctx.save();
  Object.assign(ctx, { textAlign: "center", textBaseline: "bottom", font: `${10 * scale}px ${colour("--text")}` });
  ctx.setLineDash([2 * scale, 3 * scale]);
  let signed = -Infinity;
  for (const { at, marks } of shown.rows) {
    for (const { sign, colour: name } of marks.map((mark) => MARKS[mark]).filter(Boolean)) {
      const x = Math.round(valToPos(at, "x", true));
      if (x < bbox.left || x > bbox.left + bbox.width) continue;
      Object.assign(ctx, { strokeStyle: colour(name), fillStyle: colour(name), lineWidth: scale });
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      // Signs that would overlap are left out; their lines have the colour.
      if (x - signed < 9 * scale) continue;
      ctx.fillText(sign, x, bbox.top - scale);
      signed = x;
    }
  }
  ctx.restore();
}

/** The points, with an empty one in each gap, so that no line leads across a time in which the relay did not run. */
function withGaps(points) {
  const longest = Math.max(75, 2.5 * shown.interval);
  const empty = (at) => ({ at, accepted: null, refused: null, confirmed: null, depth: null, lag_p50_ms: null,
    lag_p99_ms: null, queued: null, dead: null, marks: [] });
  return points.flatMap((point, place) => {
    const before = points[place - 1]?.at ?? point.at;
    return point.at - before > longest ? [empty(before + 1), point] : [point];
  });
}

function showMarks() {
  const kinds = Object.keys(MARKS).filter((kind) => facts.points.some(({ marks }) => marks.includes(kind)));
  fill($("marks"), kinds, (kind) => kind, (kind) => {
    const sign = el("b", { "aria-hidden": "true" }, MARKS[kind].sign);
    sign.style.color = `var(${MARKS[kind].colour})`;
    return el("span", {}, sign, ` ${MARKS[kind].words}`);
  });
}

function drawCharts() {
  shown.rows = withGaps(facts.points);
  showMarks();
  const times = shown.rows.map((point) => point.at);
  for (const spec of CHARTS) {
    const valued = (value) => (spec.log && value !== null ? Math.max(0.1, value) : value);
    const columns = spec.lines.map(({ key }) => shown.rows.map((point) => valued(point[key])));
    spec.chart.setData([times, ...columns]);
    showKeyLine(spec);
    spec.plot.setAttribute("aria-label", describe(spec, columns));
  }
}

/** Shows the values under the cursor, else the latest ones. */
function showKeyLine(spec) {
  const pointed = spec.chart?.cursor.idx ?? null;
  const point = shown.rows[pointed ?? shown.rows.length - 1];
  spec.lines.forEach(({ key }, place) => {
    say(spec.values[place], point && point[key] !== null ? spec.format(point[key]) : "-");
  });
  const empty = spec.lines.every(({ key }) => shown.rows.every((each) => each[key] === null));
  const happened = (point?.marks ?? []).map((mark) => MARKS[mark]?.words ?? mark);
  const at = pointed !== null && point ? [`at ${clock(point.at * 1000)}`, ...happened].join(", ") : "";
  say(spec.when, empty ? "no data yet" : at);
}

/** The chart as text, for screen readers. */
function describe(spec, columns) {
  const sentences = spec.lines.map(({ name }, place) => {
    const values = columns[place].filter((value) => value !== null);
    if (!values.length) return `${name}: no values.`;
    const latest = columns[place].at(-1);
    const range = `lowest ${spec.format(Math.min(...values))}, highest ${spec.format(Math.max(...values))}`;
    return `${name}: now ${latest === null ? "nothing" : spec.format(latest)}, ${range}.`;
  });
  return `${spec.title}, the last ${shown.range}. ${sentences.join(" ")}`;
}

function makeFullness() {
  const meter = { role: "meter", "aria-label": "Spool", "aria-valuemin": "0", "aria-valuemax": "100" };
  const track = el("span", { class: "track", id: "fullness-track", ...meter }, el("span", { class: "level" }));
  return el("div", { class: "filled", id: "fullness" }, track, el("span"));
}

function showFullness(status) {
  const share = fullness(status);
  const words = `${bytes(status.spool.bytes)} of ${bytes(status.spool.max_bytes)} used (${percent(share)})`;
  $("fullness").dataset.level = share < 0.8 ? "ok" : "problem"; // As PrismRelaySpoolNearlyFull.
  $("fullness-track").setAttribute("aria-valuenow", String(Math.min(100, Math.floor(share * 100))));
  $("fullness-track").setAttribute("aria-valuetext", words);
  $("fullness-track").firstChild.style.width = `${Math.min(100, share * 100)}%`;
  say($("fullness").lastChild, words);
}

// ---- actions --------------------------------------------------------------------------------------------------------

const AGAIN = "sent to RabbitMQ again within about a second";

/** `proof`: what to type to confirm, if anything. `path`: below `/api/parked/`. */
const ACTIONS = {
  retry: {
    title: "Try this event again?", go: "Retry", busy: "Asking…", style: "primary", path: ({ id }) => `${id}/retry`,
    text: () => `It will be ${AGAIN}. If RabbitMQ does not accept it, it stays parked.`,
    done: ({ id }) => `Event ${id} will be ${AGAIN}. If it stays here, the cause is not fixed yet.`,
  },
  remove: {
    title: "Remove this event permanently?", go: "Remove permanently", busy: "Removing…", style: "danger",
    path: ({ id }) => `${id}/remove`, proof: ({ id }) => [id.slice(-8), "the last 8 characters of the event id"],
    text: () => "The event is deleted from disk and never delivered. Prism will not send it again.",
    done: ({ id }) => `Event ${id} was removed.`,
  },
  retryAll: {
    title: "Try all parked events again?", go: "Retry all", busy: "Asking…", style: "primary", path: () => "retry",
    text: ({ total }) => `${count(total, "event")} will be sent again. Those that RabbitMQ does not accept stay parked.`,
    done: ({ total }) => `${count(total, "event")} will be sent again. If they stay here, the cause is not fixed yet.`,
  },
  removeAll: {
    title: "Remove all parked events permanently?", go: "Remove all permanently", busy: "Removing…", style: "danger",
    path: ({ total }) => `remove?count=${total}`, proof: ({ total }) => [String(total), "the number of parked events"],
    text: ({ total }) => `${count(total, "event")} will be deleted from disk and never delivered. Prism will not send `
      + "them again.",
    done: ({ total }) => `${count(total, "event was", "events were")} removed.`,
  },
};

let asked = null;

function ask(action, event) {
  asked = { action, event };
  const { title, text, go, style, proof } = ACTIONS[action];
  say($("ask-title"), title);
  say($("ask-text"), text(event));
  $("ask-facts").replaceChildren(...(event.id ? [...fact("Event", mono(event.id)), ...fact("Type", event.type ?? "none"),
    ...fact("Subject", mono(event.subject ?? "none")), ...fact("Reason", event.reason)] : []));
  const [typed, what] = proof?.(event) ?? ["", ""];
  asked.typed = typed;
  $("ask-proof").hidden = !proof;
  say($("ask-end"), typed);
  say($("ask-what"), what);
  $("ask-typed").value = "";
  say($("ask-mistake"), "");
  Object.assign($("ask-go"), { textContent: go, className: style, disabled: false });
  $("ask").showModal();
  // A dangerous button must not have the focus first.
  (proof ? $("ask-typed") : $("ask-cancel")).focus();
}

async function act(submit) {
  submit.preventDefault();
  const { action, event, typed } = asked;
  const { busy, done, go, path } = ACTIONS[action];
  if (typed && $("ask-typed").value.trim().toLowerCase() !== typed.toLowerCase()) {
    say($("ask-mistake"), `That is not ${typed}. Nothing was removed.`);
    return $("ask-typed").focus();
  }
  Object.assign($("ask-go"), { textContent: busy, disabled: true });
  try {
    const token = document.querySelector('meta[name="prism-token"]').content;
    await api(`api/parked/${path(event)}`, { method: "POST", headers: { "X-Prism-Token": token } });
    finish(done(event));
  } catch (error) {
    if (error.status === 404) return finish(`Event ${event.id} is no longer parked: it was delivered or removed.`);
    const hint = error.status === 403 ? " If the relay was restarted, reload this page." : "";
    const silent = "No answer yet; the relay may still be working. Look at the number of parked events.";
    say($("ask-mistake"), error.name === "TimeoutError" ? silent : `Failed: ${sentence(error.message)}${hint}`);
    Object.assign($("ask-go"), { textContent: go, disabled: false });
  }
}

async function finish(notice) {
  $("ask").close();
  say($("parked-notice"), notice);
  await loadParked().catch(ignore);
  keepFocus();
}

/** Restores the keyboard focus if the button that opened the dialog was replaced or removed. */
function keepFocus() {
  if (document.activeElement !== document.body) return;
  const place = [...$("parked-rows").children].find((child) => child.dataset.key === asked.event.id);
  (place?.querySelector(`[data-action="${asked.action}"]`) ?? $("parked-title")).focus();
}

// ---- feed -----------------------------------------------------------------------------------------------------------

/** Sends a request to the relay. Goes to the log-in page if the session has ended. */
async function api(path, options = {}) {
  const seconds = options.method ? 120 : 10; // An action on many events takes long.
  const response = await fetch(path, { signal: AbortSignal.timeout(1000 * seconds), ...options });
  if (response.status === 401) location.assign("login");
  const body = await response.json().catch(() => ({}));
  if (response.ok) return body;
  throw Object.assign(new Error(body.detail ?? `the relay answered ${response.status}`), { status: response.status });
}

let finding = 0;

async function loadEvents() {
  const mine = ++finding;
  const find = encodeURIComponent($("find").value.trim());
  const [found, known] = await Promise.all([
    api(`api/events?find=${find}`), find ? api(`api/subject?find=${find}`) : { subjects: [] }]);
  // Ignore the answer if a later request was sent meanwhile.
  if (mine !== finding) return;
  showEvents(found);
  showSubjects(known);
}

let parkedAsked = 0;

async function loadParked() {
  const mine = ++parkedAsked;
  seen.parkedAt = Date.now();
  const found = await api("api/parked");
  if (mine === parkedAsked) showParked(found);
}

async function loadHistory() {
  const { range } = shown;
  shown.loadedAt = relayNow() / 1000;
  const history = await api(`api/history?range=${range}`);
  if (range !== shown.range) return; // Another button was pressed meanwhile.
  Object.assign(shown, { seconds: history.seconds, interval: history.interval_seconds });
  facts.points = history.points;
  drawCharts();
}

function hearStatus(status) {
  Object.assign(facts, { status, ahead: Date.parse(status.now) - Date.now(), heardAt: Date.now(), lost: false });
  showStatus();
  tick();
}

function showRange(range) {
  shown.range = range;
  for (const button of $("ranges").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(button.dataset.range === range));
  }
  loadHistory().catch(ignore);
}

function hearPoint(point) {
  if (point.at <= (facts.points.at(-1)?.at ?? 0)) return;
  if (shown.range !== "15min") {
    if (point.at - shown.loadedAt >= shown.interval) loadHistory().catch(ignore);
    return;
  }
  facts.points = [...facts.points.filter(({ at }) => at > point.at - shown.seconds), point];
  drawCharts();
}

/** The totals at the last fetch of each list, and the time of the fetch. */
const seen = { events: "", parked: "", eventsAt: 0, parkedAt: 0 };

const parkedTotals = ({ parked, removed }) => `${parked}/${removed}`;
const eventsTotals = (spool) => `${spool.accepted}/${spool.confirmed}/${parkedTotals(spool)}`;

/** Fetches each list again when its totals have changed; the events at most every two seconds. */
function followTotals({ spool }) {
  if (document.hidden) return;
  const [parked, events, now] = [parkedTotals(spool), eventsTotals(spool), Date.now()];
  // A failed retry changes no total, only the time of the last try, so the parked list is also fetched every 10 s.
  if (parked !== seen.parked || (spool.parked && now - seen.parkedAt >= 10_000)) {
    seen.parked = parked;
    loadParked().catch(() => { seen.parked = ""; });
  }
  if (events !== seen.events && now - seen.eventsAt >= 2000 && !$("events-list").matches(":hover, :focus-within")) {
    seen.eventsAt = now;
    loadEvents().then(() => { seen.events = events; }, ignore);
  }
}

/** For requests that the next status repeats; tick() shows that the relay is silent. */
function ignore() {}

let stream = null;

/** Follows the relay, and starts again when the stream breaks or falls silent. */
async function follow() {
  stream?.close();
  try {
    const status = await api("api/status");
    hearStatus(status);
    await Promise.all([loadHistory(), loadEvents(), loadParked()]);
    const { spool } = status;
    Object.assign(seen, { events: eventsTotals(spool), parked: parkedTotals(spool), eventsAt: Date.now() });
    showStatus();
    await listen();
  } catch (error) {
    // For any error: show that the page is outdated, then start again.
    console.warn("prism-relay:", error);
  }
  facts.lost = true;
  tick();
  setTimeout(follow, 3000);
}

/** Resolves when the stream has broken or fallen silent. */
function listen() {
  return new Promise((done) => {
    stream = new EventSource("api/stream");
    const guard = setInterval(() => Date.now() - facts.heardAt > 10_000 && end(), 1000);
    const end = () => { clearInterval(guard); stream.close(); done(); };
    stream.addEventListener("status", (message) => {
      hearStatus(JSON.parse(message.data));
      followTotals(facts.status);
    });
    stream.addEventListener("point", (message) => hearPoint(JSON.parse(message.data)));
    stream.addEventListener("error", end);
  });
}

// ---- start ----------------------------------------------------------------------------------------------------------

function start() {
  CHARTS.forEach(makeChart);
  for (const button of $("ranges").querySelectorAll("button")) {
    button.addEventListener("click", () => showRange(button.dataset.range));
  }
  for (const button of $("parked-all").querySelectorAll("button")) {
    button.addEventListener("click", () => ask(button.dataset.all, { total: Number($("parked-all").dataset.total) }));
  }
  const phone = matchMedia("(max-width: 44rem)");
  const fold = () => document.querySelectorAll("main details").forEach((each) => { each.open = !phone.matches; });
  phone.addEventListener("change", fold);
  fold();
  $("ask-form").addEventListener("submit", act);
  $("ask-cancel").addEventListener("click", () => $("ask").close());
  $("ask").addEventListener("close", keepFocus);
  const search = () => loadEvents().catch(ignore);
  $("find-form").addEventListener("submit", (submit) => { submit.preventDefault(); search(); });
  let typing;
  $("find").addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(search, 200); });
  const redraw = () => CHARTS.forEach(({ chart }) => chart.redraw());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  setInterval(tick, 1000);
  follow();
}

// The log-in page only shows whether the last attempt failed.
if ($("login")) say($("wrong"), new URLSearchParams(location.search).has("wrong") ? "Wrong token." : "");
else start();
