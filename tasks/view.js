"use strict";
// A recording is a sequence of messages (tasks/view.py says which). `receive` takes one; `show`
// puts the page at a step. Only positions that changed between two steps are painted again.
const MASK = -1;
const $ = (id) => document.getElementById(id);
let pieces, lanes, step, clock, playing = false, streaming = false, looked = null;

function reset() {
  pieces = []; lanes = []; step = 0; clock = 0; look(null);
  $("lanes").replaceChildren();
}

function receive(message) {
  pieces.push(...(message.pieces || []));
  if (message.title !== undefined) addLane(message);
  else if (message.events) addStep(lanes[message.lane], message);
}

function addLane({title, start}) {
  const article = $("lane").content.cloneNode(true).firstElementChild;
  const [heading, count] = article.querySelectorAll("h2 > *");
  const [text, spoken] = article.querySelectorAll("p");
  const spans = start.map(() => document.createElement("span"));
  const lane = {
    title, article, count, spoken, spans, shown: 0, bar: article.querySelector("i"),
    changes: start.map((piece) => [{step: 0, piece, given: piece !== MASK}]),  // of each position
    steps: [{t: 1, positions: []}], masks: [start.filter((piece) => piece === MASK).length],
  };
  heading.textContent = title;
  article.setAttribute("aria-label", title);
  spans.forEach((span, i) => { span.dataset.i = i; span.append(""); });
  text.append(...spans);
  text.classList.toggle("fading", start.length < 600);  // thousands of fading tokens are slow
  text.onclick = (e) => e.target.dataset.i && look(lane, +e.target.dataset.i);
  text.onpointerover = (e) => e.pointerType === "mouse" && text.onclick(e);
  text.onpointerleave = (e) => e.pointerType === "mouse" && look(null);
  article.onkeydown = (e) => moveLook(lane, e);
  article.onblur = () => look(null);
  $("lanes").append(article);
  lanes.push(lane);
  repaint(lane);
}

function addStep(lane, {t, events}) {
  const number = lane.steps.length;
  let masks = lane.masks[number - 1];
  for (const [i, piece = MASK, p = null, ...others] of events) {
    masks += (piece === MASK) - (lane.changes[i].at(-1).piece === MASK);
    lane.changes[i].push({step: number, t, piece, p, others});
  }
  lane.steps.push({t, positions: events.map((event) => event[0])});
  lane.masks.push(masks);
}

// What a position holds at the lane's present step.
function changeAt(lane, i) {
  const list = lane.changes[i];
  let low = 0, high = list.length;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (list[middle].step <= lane.shown) low = middle; else high = middle;
  }
  return list[low];
}

const isPart = (lane, i) => i in lane.spans && Array.isArray(pieces[changeAt(lane, i).piece]);

// Control characters become pictures; a newline takes a place, where its mask can be seen.
const clean = (text) => text.replace(/\r/g, "").replace(/\n/g, " \n")
  .replace(/[\0-\x08\x0b-\x1f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)));

// A token that is a part of a character: the character is in the span of its last part.
function joinParts(lane, i) {
  let first = i;
  while (isPart(lane, first - 1)) first--;
  const decoder = new TextDecoder(), open = isPart(lane, i + 1);
  let text = "";
  for (let j = first; j <= i; j++)
    text = decoder.decode(new Uint8Array(pieces[changeAt(lane, j).piece]), {stream: j < i || open});
  return text;
}

function setText(span, text) {  // the same text again would make the browser lay out the whole lane
  if (span.firstChild.data !== text) span.firstChild.data = text;
}

function paint(lane, i) {
  const change = changeAt(lane, i), span = lane.spans[i];
  if (change.piece === MASK) {  // as wide as the token that will be there, so that nothing moves
    const later = lane.changes[i].find((c) => c.step > change.step && c.piece !== MASK);
    const piece = later ? pieces[later.piece] : "   ";
    span.className = "mask";
    setText(span, clean(typeof piece === "string" ? piece : " ") || " ");
    return;
  }
  const when = 1 - change.t, kind = change.given ? "given" : when > 0.5 ? "late" : "early";
  span.className = kind + (change.step && change.step === lane.shown ? " new" : "");
  setText(span, isPart(lane, i) ? joinParts(lane, i) : clean(pieces[change.piece]));
  if (!change.given) {
    const unsure = change.p === null ? 0 : 1 - Math.sqrt(change.p / 1000);
    span.style.cssText = `--when:${when.toFixed(3)};--unsure:${unsure.toFixed(3)}`;
  }
}

function repaint(lane) {
  lane.spans.forEach((_, i) => paint(lane, i));
  describe(lane);
}

function showLane(lane, target) {
  if (target === lane.shown) return;
  const touched = new Set();
  const [low, high] = target < lane.shown ? [target, lane.shown] : [lane.shown, target];
  for (let s = low; s <= high; s++) for (const i of lane.steps[s].positions) touched.add(i);
  lane.shown = target;
  for (const i of [...touched])  // characters whose other parts are beside a change
    for (const way of [-1, 1]) for (let j = i + way; isPart(lane, j); j += way) touched.add(j);
  for (const i of touched) paint(lane, i);
  describe(lane);
}

function describe(lane) {
  const total = lane.spans.length, written = total - lane.masks[lane.shown];
  lane.count.textContent = `${written} of ${total} tokens`;
  lane.bar.style.width = `${100 * written / total}%`;
}

// For screen readers, when the page is at rest: the text, with masks counted.
function speak() {
  for (const lane of lanes) {
    let text = "", masks = 0;
    lane.spans.forEach((span, i) => {
      const masked = changeAt(lane, i).piece === MASK;
      if (!masked && masks) { text += ` [${masks} masked] `; masks = 0; }
      if (masked) masks++; else text += span.textContent;
    });
    lane.spoken.textContent = text + (masks ? ` [${masks} masked]` : "");
  }
  const counts = lanes.map((lane) => `${lane.title}: ${lane.count.textContent}`);
  $("status").textContent = [`Step ${step} of ${last()}`, ...counts].join(". ");
}

const last = () => Math.max(0, ...lanes.map((lane) => lane.steps.length - 1));

function show(target) {
  step = Math.max(0, Math.min(target, last()));
  for (const lane of lanes) showLane(lane, Math.min(step, lane.steps.length - 1));
  $("scrub").max = last();
  $("scrub").value = step;
  $("scrub").ariaValueText = $("count").textContent = `${step} of ${last()}`;
  if (looked) look(looked.lane, looked.i);
  if (!playing) { clearTimeout(speak.timer); speak.timer = setTimeout(speak, 300); }
}

// --- Playing: all steps in 4 to 10 seconds, whatever their number; a stream is followed.
function stepsPerSecond() {
  const expected = streaming ? Math.min(...lanes.map((lane) => lane.masks[0])) : 0;
  const steps = Math.max(last(), expected);
  return steps / Math.max(4, Math.min(10, steps / 12)) * $("speed").value;
}

function play(on = true) {
  if (on && step >= last() && !streaming) { clock = 0; show(0); }
  playing = on && lanes.length > 0;
  clock = step;
  $("play").textContent = playing ? "Pause" : "Play";
  if (playing) { play.before = performance.now(); requestAnimationFrame(tick); }
  else show(step);
}

function tick(now) {
  if (!playing) return;
  const passed = Math.max(0, Math.min(now - play.before, 100)) / 1000;
  play.before = now;
  clock = Math.min(clock + passed * stepsPerSecond(), last());
  if (Math.floor(clock) !== step || $("scrub").max != last()) show(Math.floor(clock));
  if (step >= last() && !streaming) play(false);
  else requestAnimationFrame(tick);
}

// A recording that is still being written, as an asynchronous sequence of lines.
async function follow(lines) {
  reset();
  streaming = true;
  let message = {};
  try {
    for await (const line of lines) {
      message = JSON.parse(line);
      if (message.error) throw new Error(message.error);
      receive(message);
      if (message.lane !== 0 || last() !== 1) continue;
      play();
      lanes[0].article.scrollIntoView({block: "nearest"});
    }
    if (!message.done) throw new Error("The server stopped before the end.");
  } finally {
    streaming = false;
    if (!playing) show(step);
  }
}

function jump(target) { if (playing) play(false); show(target); }

function changeSpeed(by) {
  const select = $("speed");
  select.selectedIndex = Math.max(0, Math.min(select.selectedIndex + by, select.length - 1));
}

// --- Looking at a token: its probability, its step, and what else was likely
const quote = (piece) => typeof piece === "string"
  ? JSON.stringify(piece).slice(1, -1).replace(/ /g, "·")
  : piece.map((byte) => "\\x" + byte.toString(16)).join("");
const percent = (p) => p === null ? "–" : p < 1 ? "< 0.1 %" : `${(p / 10).toFixed(1)} %`;

function facts(lane, i) {
  const change = changeAt(lane, i), all = lane.steps.length - 1;
  if (change.given) return {line: `token ${i + 1}: given`, rows: [[change.piece, null]]};
  if (change.piece === MASK) {
    const later = lane.changes[i].find((c) => c.step > lane.shown && c.piece !== MASK);
    const when = later ? `, written in step ${later.step} of ${all}` : "";
    return {line: `token ${i + 1}: masked${when}`, rows: []};
  }
  const rows = [[change.piece, change.p]];
  for (let k = 0; k < change.others.length; k += 2) rows.push(change.others.slice(k, k + 2));
  return {line: `token ${i + 1}, step ${change.step} of ${all}, t = ${change.t.toFixed(2)}`, rows};
}

function make(name, ...content) {
  const element = document.createElement(name);
  element.append(...content);
  return element;
}

function placeCard(card, box) {  // below the token, or above it where there is no room
  if (!box) return;
  const below = box.bottom + 8, above = Math.max(8, box.top - card.offsetHeight - 8);
  const left = Math.max(8, Math.min(box.left, innerWidth - card.offsetWidth - 8));
  card.style.left = `${left}px`;
  card.style.top = `${below + card.offsetHeight > innerHeight - 60 ? above : below}px`;
}

function look(lane, i) {
  if (looked) looked.lane.spans[looked.i].classList.remove("looked");
  looked = lane ? {lane, i} : null;
  const card = $("card");
  card.hidden = !lane;
  if (!lane) return;
  const {line, rows} = facts(lane, i), list = make("ul");
  lane.spans[i].classList.add("looked");
  for (const [piece, p] of rows) {
    const item = make("li", make("code", quote(pieces[piece])), make("span", percent(p)));
    item.style.setProperty("--p", p / 1000);
    list.append(item);
  }
  card.replaceChildren(make("p", line), list);
  const said = rows.map(([piece, p]) => `${quote(pieces[piece])} ${percent(p)}`);
  $("details").textContent = [line, ...said].join(", ");
  placeCard(card, [...lane.spans[i].getClientRects()].at(-1));
}

function moveLook(lane, e) {
  const way = {ArrowDown: 1, ArrowUp: -1}[e.key];
  if (e.key === "Escape") look(null);
  if (!way || !lane.spans.length) return;
  const at = looked && looked.lane === lane ? looked.i + way : way > 0 ? 0 : lane.spans.length - 1;
  look(lane, Math.max(0, Math.min(at, lane.spans.length - 1)));
  lane.spans[looked.i].scrollIntoView({block: "nearest"});
  e.preventDefault();
}

// --- Controls
const KEYS = {
  " ": () => play(!playing), t: () => $("theme").click(),
  ArrowRight: () => jump(step + 1), ArrowLeft: () => jump(step - 1),
  Home: () => jump(0), End: () => jump(last()),
  "+": () => changeSpeed(1), "-": () => changeSpeed(-1),
};
document.onkeydown = (e) => {
  const target = e.target.tagName, key = KEYS[e.key];
  const typing = /TEXTAREA|SELECT/.test(target) || target === "INPUT" && e.target.type !== "range";
  const pressed = e.key === " " && target === "BUTTON";  // the button does what it does
  if (!key || typing || pressed || e.ctrlKey || e.metaKey || e.altKey) return;
  e.preventDefault();
  key();
};
document.onpointerdown = (e) => { if (!e.target.closest(".text, #controls")) look(null); };
$("play").onclick = () => play(!playing);
$("scrub").oninput = () => jump(+$("scrub").value);
const root = document.documentElement.dataset;
$("theme").onclick = () => { root.theme = root.theme === "dark" ? "light" : "dark"; };
root.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";

reset();
const lines = $("recording").textContent.split("\n").filter(Boolean);
for (const line of lines) receive(JSON.parse(line));
lanes.forEach(repaint);
show(0);
if (matchMedia("(prefers-reduced-motion: reduce)").matches) show(last());
else if (lanes.length) setTimeout(() => playing || step || play(), 700);
