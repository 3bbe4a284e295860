// The rating page. A rating is shown as done only when the server has stored it; the next image is there before.
"use strict";

const $ = (id) => document.getElementById(id);
const pictures = new Map(); // image id -> decoded <img>
const viewer = new Viewer($("picture"), (told) => { $("seen").textContent = told; });
const same = (a, b) => a.image === b.image && a.turn === b.turn;
// A reader of a study comes by a link with a token, which says who it is.
const token = new URLSearchParams(location.search).get("token"), home = token ? `study/${encodeURIComponent(token)}` : "rate";
let who = { rater: "", modalities: [] }, grey = new Set();
// Images rated before `current`, those after it that were seen already, and those that the server has told of.
let past = [], current = null, ahead = [], upcoming = [];
let busy = false, since = 0, looked = 0; // milliseconds

function remember(name, value) {
  try { localStorage.setItem(`minim-${name}`, value); } catch { /* a frame may forbid it */ }
}

function remembered(name) {
  try { return localStorage.getItem(`minim-${name}`) || ""; } catch { return ""; }
}

async function ask(address, body) {
  let answer;
  try {
    answer = await fetch(address, body && {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ ...who, ...body }),
    });
  } catch {
    throw new Error("The server cannot be reached");
  }
  const told = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(told.error || `The server answered ${answer.status}`);
  return told;
}

function picture(item) {
  if (!pictures.has(item.image)) {
    const image = new Image();
    image.src = `${home}/image/${item.image}`;
    image.decode().catch(() => { /* told when it is shown */ });
    image.addEventListener("error", () => {
      pictures.delete(item.image);
      if (current === item) $("problem").textContent = "This image could not be loaded. Reload the page.";
    });
    pictures.set(item.image, image);
    if (pictures.size > 40) pictures.delete(pictures.keys().next().value);
  }
  return pictures.get(item.image);
}

function show(item) {
  current = item;
  $("desk").hidden = !item;
  $("finished").hidden = Boolean(item);
  document.body.classList.toggle("rating", Boolean(item));
  if (!item) {
    $("thanks").textContent = past.length ? "That was the last image. Thank you!" : "There are no images to rate here.";
    $("again").hidden = !past.length;
    $("thanks").focus();
    return;
  }
  const image = picture(item), windowed = grey.has(item.modality);
  image.alt = `${item.modality}, asked for: ${item.text}`;
  viewer.show(image, windowed);
  document.querySelector("#tools .window").hidden = !windowed;
  $("modality").textContent = item.modality;
  $("text").textContent = item.text;
  $("remark").value = item.remark || "";
  for (const button of document.querySelectorAll("[data-rating]")) {
    button.setAttribute("aria-pressed", String(Number(button.dataset.rating) === item.rating));
  }
  $("back").disabled = !past.length;
  $("forward").disabled = item.rating === null;
  [since, looked] = [performance.now(), 0];
  upcoming.forEach(picture); // the next images are on their way while this one is looked at
}

function next() {
  show(ahead.shift() || upcoming.shift() || null);
}

function take(told) {
  $("bar").max = Math.max(1, told.total);
  $("bar").value = told.done;
  $("count").textContent = `${told.done} of ${told.total}`;
  upcoming = told.next.filter((item) => !ahead.some((other) => same(item, other)));
}

async function begin() {
  $("problem").textContent = "";
  try {
    const told = await ask(`${home}/next`, {});
    if (!token) {
      remember("rater", who.rater);
      remember("modalities", who.modalities.join(" "));
    }
    $("rater").textContent = who.rater;
    $("who").hidden = true;
    [past, ahead] = [told.last, []];
    take(told);
    next();
  } catch (error) {
    $("problem").textContent = `${error.message}.`;
    leave();
  }
}

// Sends what was decided of the current image; once it is stored, the next one is shown.
async function decide(address, about, after, failed) {
  if (busy || !current) return;
  busy = true;
  const item = current;
  try {
    const told = await ask(address, { image: item.image, turn: item.turn, ...about });
    after(item);
    take(told);
    $("problem").textContent = "";
    next();
  } catch (error) {
    $("problem").textContent = `${error.message}: ${failed}`;
  }
  busy = false;
}

function rate(rating) {
  const remark = $("remark").value.trim(), seconds = (looked + lookedSince()) / 1000;
  decide(`${home}/rating`, { rating, seconds, remark }, (item) => {
    Object.assign(item, { rating, remark });
    past.push(item);
  }, "this rating is not stored, press it again.");
}

function skip() {
  if (current && current.rating !== null) forward();
  else decide(`${home}/skip`, {}, () => {}, "this image is not skipped, press it again.");
}

function back() {
  if (busy || !past.length) return;
  if (current) ahead.unshift(current);
  show(past.pop());
}

function forward() {
  if (busy || !current || current.rating === null) return;
  past.push(current);
  next();
}

// Time while the page is hidden is no time of looking.
function lookedSince() {
  return document.hidden ? 0 : performance.now() - since;
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) looked += performance.now() - since;
  since = performance.now();
});

function leave() {
  show(null);
  $("finished").hidden = true;
  $("who").hidden = false;
  $("name").focus();
}

async function enter() {
  await loaded;
  const boxes = [...$("modalities").querySelectorAll("input")], chosen = boxes.filter((box) => box.checked);
  who = { rater: $("name").value.trim(), modalities: chosen.length < boxes.length ? chosen.map((box) => box.value) : [] };
  if (boxes.length && !chosen.length) $("problem").textContent = "Choose at least one modality.";
  else if (who.rater) begin();
}

$("who").addEventListener("submit", (event) => {
  event.preventDefault();
  enter();
});
$("desk").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button?.dataset.rating) rate(Number(button.dataset.rating));
  if (button?.dataset.view) viewer.act(button.dataset.view);
});
for (const [id, act] of Object.entries({ back, forward, skip, leave, again: back, more: leave })) {
  $(id).addEventListener("click", act);
}

const KEYS = { b: back, arrowleft: back, f: forward, arrowright: forward, n: skip, r: () => $("remark").focus() };
const VIEWS = {
  "+": "in", "=": "in", "-": "out", c: "harder", v: "softer", arrowup: "brighter", arrowdown: "darker", escape: "reset",
};
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !$("who").hidden) return;
  if (event.target === $("remark")) {
    if (event.key === "Escape") $("remark").blur();
    return;
  }
  const key = event.key.toLowerCase(), view = event.shiftKey && key.startsWith("arrow") ? key.slice(5) : VIEWS[key];
  if (view && current) viewer.act(view);
  else if (event.repeat) return;
  else if (["0", "1", "2", "3"].includes(key)) rate(Number(key));
  else if (KEYS[key]) KEYS[key]();
  else return;
  event.preventDefault();
});

// The modalities to choose from, but in a study; those chosen before are chosen again.
async function load() {
  const modalities = await ask(`${home}/modalities`).catch(() => []), before = remembered("modalities").split(" ");
  grey = new Set(modalities.filter((one) => one.grey).map((one) => one.name));
  const chosen = modalities.filter((one) => before.includes(one.id));
  for (const { id, name } of modalities.length > 1 && !token ? modalities : []) {
    const box = Object.assign(document.createElement("input"), { type: "checkbox", value: id });
    box.checked = !chosen.length || chosen.some((one) => one.id === id);
    const label = document.createElement("label");
    label.append(box, ` ${name}`);
    $("modalities").append(label);
    $("modalities").hidden = false;
  }
}

// What a study asks, in the place of the page's own words.
async function loadStudy() {
  try {
    const study = await ask(`${home}/about`);
    document.title = `${study.title} - minim`;
    $("title").textContent = study.title;
    $("question").textContent = `${study.question} Some images may come twice.`;
    $("answers").setAttribute("aria-label", study.question);
    $("asks").textContent = study.question;
    study.answers.forEach(([word, help], i) => {
      const button = document.querySelector(`[data-rating="${i + 1}"]`), small = document.createElement("small");
      small.textContent = help;
      button.replaceChildren(button.querySelector("b"), ` ${word}`, small);
    });
    $("name").value = study.rater;
    $("name").readOnly = true;
    $("leave").hidden = $("more").hidden = document.querySelector("nav").hidden = true;
  } catch (error) {
    $("who").hidden = true;
    $("problem").textContent = `${error.message}.`;
  }
}

const loaded = Promise.all([load(), token && loadStudy()]);
if (!token && remembered("rater")) {
  $("name").value = remembered("rater");
  enter();
} else leave();
