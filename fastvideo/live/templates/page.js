"use strict";
const $ = id => document.getElementById(id);
const fps = Number(document.body.dataset.fps);
const canvas = $("video"), screen2d = canvas.getContext("2d"), strip = $("strip");
const KEYS = ["digit", "colour", "direction"];
const STRIP_FRAMES = Math.round(10 * fps);
const LOG_LINES = 4;

let source = null, viewer = null, drives = false, ended = false;
let waiting = [], due = 0, full = 1, drawn = [], shownAt = [];
const marks = new Set();
let asked = {}, askedAt = 0, askedBy = null, edited = false, held = new Set(), pressing = 0;

const seconds = frames => `${(frames / fps).toFixed(1)} s`;
const frames = count => `${count} frame${count === 1 ? "" : "s"}`;
const decimals = number => number == null ? "\u2014" : number.toFixed(number < 10 ? 1 : 0);

function say(text, off = false) {
  $("status").textContent = text;
  $("status").classList.toggle("off", off);
}

function complain(text) {
  $("problem").textContent = text || "";
  $("problem").hidden = !text;
  $("prompt").setAttribute("aria-invalid", String(Boolean(text)));
}

// Connection

function connect() {
  if (source) return;
  say("Connecting \u2026");
  $("play").textContent = "Pause";
  source = new EventSource("events");
  for (const [name, react] of Object.entries(EVENTS)) source.addEventListener(name, event => react(JSON.parse(event.data)));
  source.onerror = () => {
    if (ended) return;
    setRole(false);
    say("Connection lost, trying again \u2026", true);
    if (source && source.readyState === EventSource.CLOSED) { source = null; setTimeout(() => paused || connect(), 2000); }
  };
}

function disconnect() {
  if (source) source.close();
  source = null;
  waiting = [];
  setRole(false);
}

let paused = matchMedia("(prefers-reduced-motion: reduce)").matches;

function pause(why) {
  paused = true;
  disconnect();
  $("play").textContent = "Play";
  say(why);
}

$("play").onclick = () => {
  if (!paused) return pause("Paused. The model sleeps if nobody else watches.");
  paused = ended = false;
  complain();
  connect();
};

document.addEventListener("visibilitychange", () => {
  if (paused || ended) return;
  if (document.hidden) disconnect(); else connect();
});

function setRole(mine) {
  drives = mine;
  for (const control of document.querySelectorAll(".steer :is(button, input, textarea)")) control.disabled = !mine;
}

// Events

const EVENTS = {
  hello(data) {
    viewer = data.viewer;
    ended = false;
    complain();
    asked = data.asked || {};
    askedAt = data.asked_at;
    showPrompt(data.prompt, data.asked);
  },
  role(data) {
    setRole(data.drives);
    edited = edited && data.drives;
    say(data.drives ? "Live. You drive." : "Live. Another page drives, you watch.");
    $("m-viewers").textContent = data.viewers;
  },
  async chunk(data) {
    const image = new Image();
    image.src = data.sprite;
    const chunk = { image, ready: false };
    full = Math.max(data.meters.full, 1);
    for (let i = 0; i < data.count; i++)
      waiting.push({ chunk, row: i, number: data.frame + i, read: data.read && data.read[i], latency: data.latency, asked, askedAt, askedBy });
    showMeters(data.meters);
    await image.decode();
    chunk.ready = true;
  },
  applied(data) {
    asked = data.asked || {};
    askedAt = data.frame;
    askedBy = data.id;
    showPrompt(data.prompt, data.asked);
    note(data.id, data.prompt, `applied at frame ${data.frame}, ${frames(Math.round(data.waited))} (${seconds(data.waited)}) after it was received`);
  },
  replaced(data) { note(data.id, null, "replaced by the next one before it was applied"); },
  refused(data) { note(data.id, null, "refused"); complain(data.message); },
  failed(data) { ended = true; disconnect(); $("play").textContent = "Play"; paused = true; say(`The model stopped: ${data.message}`, true); },
  bye() { ended = true; disconnect(); $("play").textContent = "Play"; paused = true; say("The server was stopped.", true); },
};

// Playing

function draw(frame) {
  const { image } = frame.chunk;
  screen2d.drawImage(image, 0, frame.row * canvas.height, canvas.width, canvas.height, 0, 0, canvas.width, canvas.height);
  $("frame").textContent = frame.number;
  if (strip) { drawn.push(frame); drawn.splice(0, drawn.length - STRIP_FRAMES); showReading(frame); drawStrip(); }
}

function tick(now) {
  requestAnimationFrame(tick);
  if (waiting.length > 4 * full) waiting.splice(0, waiting.length - full);
  const next = waiting[0];
  if (next && next.chunk.ready && now >= due) {
    // A little faster while more waits than the server makes ahead: a hiccup of this page must not delay it for ever.
    const step = 1000 / fps * (waiting.length > full ? 0.8 : 1);
    due = (now - due > step ? now : due) + step;
    draw(waiting.shift());
    shownAt.push(now);
    showBuffer();
  }
  while (shownAt.length && now - shownAt[0] > 3000) shownAt.shift();
}

function showBuffer() {
  const ready = waiting.length, bar = $("buffer");
  bar.setAttribute("aria-valuemax", full);
  bar.setAttribute("aria-valuenow", Math.min(ready, full));
  $("filled").style.width = `${100 * Math.min(1, ready / full)}%`;
  $("ready").textContent = `${frames(ready)} ahead`;
}

function showMeters(meters) {
  const span = shownAt.length > 1 ? shownAt[shownAt.length - 1] - shownAt[0] : 0;
  $("m-shown").textContent = decimals(span ? 1000 * (shownAt.length - 1) / span : null);
  $("m-able").textContent = decimals(meters.able_fps);
  $("m-chunk").textContent = decimals(meters.chunk_ms);
  $("m-parts").textContent = `ms: ${meters.parts.map(([name, ms]) => `${name} ${decimals(ms)}`).join(", ")}`;
  $("m-first").textContent = decimals(meters.first_ms);
  const mib = meters.past_bytes >= 1e6;
  $("m-past").textContent = decimals(meters.past_bytes / (mib ? 1e6 : 1e3));
  $("m-past-unit").textContent = mib ? "MB of memory" : "kB of memory";
}

// The judge

function agreement(frame, index) {
  if (!frame.read || frame.asked[KEYS[index]] == null) return null;
  return frame.read[index] === frame.asked[KEYS[index]];
}

function showReading(frame) {
  KEYS.forEach((key, index) => {
    const cell = document.querySelector(`[data-read="${key}"]`), agrees = agreement(frame, index);
    cell.querySelector("dd").textContent = frame.read ? frame.read[index] : "\u2014";
    cell.className = agrees === null ? "" : agrees ? "as-asked" : "other";
  });
  const found = frame.latency !== null && frame.number >= frame.askedAt + frame.latency - 1;
  if (found && !marks.has(frame.askedAt + frame.latency - 1)) {
    marks.add(frame.askedAt + frame.latency - 1);
    noteLatency(frame);
  }
  $("latency").classList.toggle("found", found);
  $("latency").textContent = found
    ? `Read as asked after ${frames(frame.latency)} (${seconds(frame.latency)})`
    : "Not yet as asked: nine frames are read at a time";
}

function drawStrip() {
  const style = getComputedStyle(document.documentElement), colour = name => style.getPropertyValue(name);
  const scale = devicePixelRatio || 1, width = strip.clientWidth, height = strip.clientHeight;
  if (strip.width !== Math.round(width * scale)) { strip.width = Math.round(width * scale); strip.height = Math.round(height * scale); }
  const pen = strip.getContext("2d"), cell = width / STRIP_FRAMES, row = height / 3;
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, width, height);
  drawn.forEach((frame, at) => {
    const x = width - (drawn.length - at) * cell;
    for (let index = 0; index < 3; index++) {
      const agrees = agreement(frame, index), tall = agrees === null ? 0.12 : agrees ? 0.7 : 0.35;
      pen.fillStyle = colour(agrees === null ? "--edge" : agrees ? "--accent" : "--warn");
      pen.fillRect(x, index * row + row * (0.85 - tall), cell * 0.8, row * tall);
    }
    if (frame.number === frame.askedAt && frame.number > 0) { pen.fillStyle = colour("--ink"); pen.fillRect(x - 1, 0, 2, height); }
    if (marks.has(frame.number)) drawMark(pen, x, height, colour("--mark"));
  });
}

function drawMark(pen, x, height, colour) {
  pen.fillStyle = colour;
  pen.fillRect(x - 1, 0, 2, height);
  pen.beginPath();
  for (const [right, down] of [[0, 0], [6, 6], [0, 12], [-6, 6]]) pen.lineTo(x + right, down);
  pen.fill();
}

// Steering

$("prompt").oninput = () => { edited = true; };

function showPrompt(text, words) {
  // What is being typed stays.
  if (!edited) $("prompt").value = text;
  for (const group of document.querySelectorAll("[data-word]"))
    for (const button of group.querySelectorAll("button"))
      button.setAttribute("aria-pressed", String(button.value === ((words || {})[group.dataset.word] || "")));
}

function note(id, prompt, what) {
  const log = $("log");
  let line = log.querySelector(`[data-id="${id}"]`);
  if (!line) {
    log.querySelector(".none")?.remove();
    line = document.createElement("li");
    line.dataset.id = id;
    line.append(document.createElement("b"), document.createElement("small"));
    log.prepend(line);
    while (log.children.length > LOG_LINES) log.lastChild.remove();
  }
  if (prompt) line.firstChild.textContent = prompt;
  line.lastChild.textContent = what;
  line.classList.toggle("refused", what === "refused");
}

function noteLatency(frame) {
  const line = $("log").querySelector(`[data-id="${frame.askedBy}"] small`);
  if (line) line.textContent += `; read as asked ${frames(frame.latency)} (${seconds(frame.latency)}) after that`;
}

async function ask(kind, change) {
  if (!drives) return;
  const sent = $("prompt").value, body = JSON.stringify({ viewer, prompt: sent, kind, change });
  let answer, data;
  try {
    answer = await fetch("prompt", { method: "POST", headers: { "content-type": "application/json" }, body });
    data = await answer.json();
  } catch { return complain("The server does not answer."); }
  complain(data.error);
  if (!answer.ok) return;
  if ($("prompt").value === sent) edited = false;
  showPrompt(data.prompt, data.asked);
  // The events may have come first.
  if (!$("log").querySelector(`[data-id="${data.received}"]`)) note(data.received, data.prompt, "received");
}

$("ask").onsubmit = event => {
  event.preventDefault();
  ask(event.submitter ? event.submitter.value : "switch");
};
$("prompt").onkeydown = event => {
  if (event.target.tagName === "TEXTAREA" && event.key === "Enter" && !event.shiftKey) { event.preventDefault(); ask("switch"); }
};
for (const group of document.querySelectorAll("[data-word]"))
  group.onclick = event => {
    const button = event.target.closest("button");
    if (button) ask("switch", { [group.dataset.word]: button.value || null });
  };

const VERTICAL = ["up", "down"];
const ARROWS = { ArrowUp: "up", ArrowDown: "down", ArrowLeft: "left", ArrowRight: "right" };
const steers = event => strip && drives && ARROWS[event.key] && event.target !== $("prompt") && !event.ctrlKey && !event.altKey && !event.metaKey;

document.addEventListener("keydown", event => {
  if (!steers(event)) return;
  event.preventDefault();
  if (event.repeat) return;
  held.delete(ARROWS[event.key]);
  held.add(ARROWS[event.key]);
  clearTimeout(pressing);
  pressing = setTimeout(() => {
    // Two keys held together are a diagonal; of two opposite ones the later counts.
    const words = [...held].reverse(), vertical = words.find(word => VERTICAL.includes(word));
    const horizontal = words.find(word => !VERTICAL.includes(word));
    ask("switch", { direction: [vertical, horizontal].filter(Boolean).join(" and ") });
  }, 40);
});
document.addEventListener("keyup", event => { setTimeout(() => held.delete(ARROWS[event.key]), 60); });
window.addEventListener("blur", () => held.clear());

setRole(false);
requestAnimationFrame(tick);
if (paused) pause("Paused, as your system asks for less motion."); else connect();
