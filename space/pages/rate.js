// The rating page. A rating is shown as done only when the server has stored it; the next image is there before.
"use strict";

const $ = (id) => document.getElementById(id);
const pictures = new Map(); // image id -> decoded <img>
let rater = "", current = null, upcoming = [], past = [], busy = false, seen = 0;

function remember(name) {
  try { localStorage.setItem("minim-rater", name); } catch { /* a frame may forbid it */ }
}

function remembered() {
  try { return localStorage.getItem("minim-rater") || ""; } catch { return ""; }
}

async function post(address, body) {
  let answer;
  try {
    answer = await fetch(address, {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
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
    image.src = `rate/image/${item.image}`;
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
  if (!item) {
    $("thanks").textContent = past.length ? "That was the last image. Thank you!" : "There are no images to rate here.";
    $("again").hidden = !past.length;
    $("thanks").focus();
    return;
  }
  const image = picture(item);
  image.alt = `${item.modality}, asked for: ${item.text}`;
  $("picture").replaceChildren(image);
  $("modality").textContent = item.modality;
  $("text").textContent = item.text;
  for (const button of $("answers").children) {
    button.setAttribute("aria-pressed", String(Number(button.dataset.rating) === item.rating));
  }
  $("back").disabled = !past.length;
  seen = performance.now();
  upcoming.forEach(picture); // the next images are on their way while this one is looked at
}

function take(told) {
  $("bar").max = Math.max(1, told.total);
  $("bar").value = told.done;
  $("count").textContent = `${told.done} of ${told.total}`;
  upcoming = told.next;
}

async function begin(name) {
  $("problem").textContent = "";
  try {
    const told = await post("rate/next", { rater: name });
    rater = name;
    remember(name);
    $("rater").textContent = name;
    $("who").hidden = true;
    take(told);
    past = told.last;
    show(upcoming.shift() || null);
  } catch (error) {
    $("problem").textContent = `${error.message}.`;
    $("who").hidden = false;
  }
}

async function rate(rating) {
  if (busy || !current) return;
  busy = true;
  const item = current;
  try {
    const seconds = (performance.now() - seen) / 1000;
    const told = await post("rate/rating", { rater, image: item.image, turn: item.turn, rating, seconds });
    item.rating = rating;
    past.push(item);
    take(told);
    $("problem").textContent = "";
    show(upcoming.shift() || null);
  } catch (error) {
    $("problem").textContent = `${error.message}: this rating is not stored, press it again.`;
  }
  busy = false;
}

function back() {
  if (busy || !past.length) return;
  if (current) upcoming.unshift(current);
  show(past.pop());
}

$("who").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = $("name").value.trim();
  if (name) begin(name);
});
$("answers").addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) rate(Number(button.dataset.rating));
});
$("back").addEventListener("click", back);
$("again").addEventListener("click", back);
$("leave").addEventListener("click", () => { remember(""); location.reload(); });
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || !$("who").hidden) return;
  if (["1", "2", "3"].includes(event.key)) rate(Number(event.key));
  else if (["b", "B", "ArrowLeft"].includes(event.key)) back();
});

if (remembered()) begin(remembered());
else { $("who").hidden = false; $("name").focus(); }
