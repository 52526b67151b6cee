"use strict";
// Names and sentences reach the page as text nodes only: nothing that they hold becomes markup.

const byId = (id) => document.getElementById(id);
const state = { listing: null, chosen: 0, answer: null, asked: 0, images: [] };

async function ask(path, options) {
  const response = await fetch(path, options).catch(() => {
    throw new Error("no answer: is `dreamlip-train explore` still running?");
  });
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

function say(message) { byId("message").textContent = message; }

function loadPicture(index) {
  const image = new Image();
  image.onload = draw;
  image.src = `picture/${index}`;
  return image;
}

function addThumbnail(index, picture) {
  const button = document.createElement("button");
  const image = document.createElement("img");
  const cosine = document.createElement("span");
  image.src = `picture/${index}`;
  image.alt = button.title = picture.name;
  button.append(image, cosine);
  button.onclick = () => choose(index);
  byId("pictures").append(button);
}

// The pictures that the server has and this page does not: its own new one, and those of other tabs.
async function addNewPictures() {
  const { pictures } = await ask("pictures");
  for (const picture of pictures.slice(state.listing.pictures.length)) {
    state.listing.pictures.push(picture);
    addThumbnail(state.listing.pictures.length - 1, picture);
  }
}

function choose(index) {
  state.chosen = index;
  state.images[index] ??= loadPicture(index);
  state.answer = null;
  byId("examples").replaceChildren(...state.listing.pictures[index].sentences.map((sentence) => {
    const button = document.createElement("button");
    button.textContent = sentence;
    button.onclick = () => { byId("sentence").value = sentence; look(); };
    return button;
  }));
  mark();
  draw();
  look();
}

async function look() {
  const text = byId("sentence").value.trim();
  const turn = ++state.asked;
  byId("threshold-value").textContent = Number(byId("threshold").value).toFixed(2);
  if (!text || !state.listing.pictures.length) { state.answer = null; say(""); mark(); draw(); return; }
  const body = JSON.stringify({ picture: state.chosen, text, threshold: Number(byId("threshold").value) });
  try {
    const answer = await ask("look", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    if (answer.cosines.length > state.listing.pictures.length) await addNewPictures();
    if (turn !== state.asked) return;  // typed on since
    state.answer = answer;
    say("");
  } catch (error) {
    if (turn !== state.asked) return;
    state.answer = null;
    say(error.message);
  }
  mark();
  draw();
}

// The light of each patch, 0 to 1: the weights over the largest, or the similarities over their range.
function lights() {
  if (!state.answer) return null;
  const values = state.answer[byId("view").value];
  const low = byId("view").value === "weights" ? 0 : Math.min(...values);
  const high = Math.max(...values);
  return values.map((value) => (high > low ? (value - low) / (high - low) : 0));
}

function draw() {
  const canvas = byId("spotlight"), image = state.images[state.chosen];
  if (!image || !image.complete || !image.naturalWidth) return;
  const context = canvas.getContext("2d");
  const light = lights(), [rows, columns] = state.listing.grid, scale = canvas.width / state.listing.size;
  context.globalAlpha = 1;
  context.filter = light ? "grayscale(1) brightness(0.35)" : "none";
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  context.filter = "none";
  if (!light) return;
  const side = state.listing.patch;
  for (let patch = 0; patch < rows * columns; patch++) {
    const x = (patch % columns) * side, y = Math.floor(patch / columns) * side;
    context.save();
    context.beginPath();
    context.rect(x * scale, y * scale, side * scale, side * scale);
    context.clip();
    context.globalAlpha = light[patch];
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    context.restore();
  }
}

function mark() {
  const cosines = state.answer ? state.answer.cosines : [], nearest = cosines.indexOf(Math.max(...cosines));
  [...byId("pictures").children].forEach((button, index) => {
    button.classList.toggle("chosen", index === state.chosen);
    button.classList.toggle("nearest", index === nearest);
    button.lastChild.textContent = index < cosines.length ? cosines[index].toFixed(2) : "";
  });
}

function readOut(event) {
  if (!state.answer) return;
  const box = event.target.getBoundingClientRect(), { size, patch, grid: [rows, columns] } = state.listing;
  const column = Math.floor((event.clientX - box.left) / box.width * size / patch);
  const row = Math.floor((event.clientY - box.top) / box.height * size / patch);
  const index = row * columns + column;
  const inside = row >= 0 && row < rows && column >= 0 && column < columns;
  byId("readout").textContent = inside ? `row ${row + 1}, column ${column + 1}: weight ` +
    `${(100 * state.answer.weights[index]).toFixed(1)} %, similarity ${state.answer.similarities[index].toFixed(3)}`
    : "\u00a0";
}

async function addFile(event) {
  const file = event.target.files[0];
  if (!file) return;
  try {
    const headers = { "Content-Type": "application/octet-stream" };
    const path = `picture?name=${encodeURIComponent(file.name)}`;
    const { picture } = await ask(path, { method: "POST", headers, body: file });
    await addNewPictures();
    say("");
    choose(picture);
  } catch (error) { say(error.message); }
  event.target.value = "";
}

async function start() {
  state.listing = await ask("pictures");
  state.listing.pictures.forEach((picture, index) => addThumbnail(index, picture));
  byId("threshold").value = state.listing.threshold;
  let waiting;
  byId("sentence").oninput = () => { clearTimeout(waiting); waiting = setTimeout(look, 200); };
  byId("threshold").oninput = look;
  byId("view").onchange = draw;
  byId("file").onchange = addFile;
  byId("spotlight").onmousemove = readOut;
  if (state.listing.pictures.length) choose(0);
}

start().catch((error) => say(error.message));
