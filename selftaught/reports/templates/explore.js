"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const tokens = [...document.querySelectorAll(".token")];
const panel = document.getElementById("panel");
const pick = document.getElementById("pick");
let pinned = null;

function line(tag, text, className) {
  const element = document.createElement(tag);
  element.textContent = text;
  if (className) element.className = className;
  return element;
}

function likely(rows, next) {
  const list = line("ol", "");
  for (const [text, chance] of rows) {
    const item = line("li", "", text === next ? "true" : "");
    item.append(line("code", text), line("span", (100 * chance).toFixed(1) + "%"));
    item.style.setProperty("--share", chance);
    list.append(item);
  }
  return list;
}

function show(index) {
  const entry = data[index];
  if (!entry) return;
  for (const token of tokens) token.removeAttribute("aria-current");
  tokens[index].setAttribute("aria-current", "true");
  const shown = pick.value === "all" ? entry.thoughts.map((_, n) => n) : [Number(pick.value)];
  panel.replaceChildren(line("h2", "Before " + JSON.stringify(entry.next)));
  if (!entry.thinks) panel.append(line("p", "The model did not think here.", "soft"));
  for (const n of shown) {
    if (!entry.thinks) break;
    panel.append(line("h3", `Thought ${n + 1}, weight ${entry.weights[n].toFixed(2)}`));
    panel.append(line("pre", entry.thoughts[n]));
  }
  const sign = entry.gain < 0 ? "−" : "+";
  panel.append(line("p", `Probability of the true token: ${(100 * entry.without).toFixed(1)}% without thoughts, ` +
    `${(100 * entry.with).toFixed(1)}% with thoughts (${sign}${Math.abs(entry.gain).toFixed(3)} nats).`));
  const pair = line("div", "", "pair");
  for (const [name, rows] of [["Without thoughts", entry.top_without], ["With thoughts", entry.top_with]]) {
    const half = document.createElement("div");
    half.append(line("h3", name), likely(rows, entry.next));
    pair.append(half);
  }
  panel.append(pair);
}

function pin(index) {
  pinned = pinned === index ? null : index;
  tokens.forEach((one, at) => one.setAttribute("aria-pressed", String(at === pinned)));
  show(index);
}

function color() {
  for (const [index, token] of tokens.entries()) {
    const entry = data[index];
    const gain = pick.value === "all" ? entry.gain : entry.gains[Number(pick.value)];
    token.style.setProperty("--gain", Math.max(-1, Math.min(1, gain)).toFixed(3));
    token.classList.toggle("hurt", gain < 0);
    token.title = `${gain < 0 ? "" : "+"}${gain.toFixed(3)} nats`;
  }
}

tokens.forEach((token, index) => {
  token.addEventListener("mouseenter", () => { if (pinned === null) show(index); });
  token.addEventListener("focus", () => show(index));
  token.addEventListener("click", () => pin(index));
});
document.getElementById("text").addEventListener("keydown", (event) => {
  const index = tokens.indexOf(document.activeElement);
  const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 }[event.key];
  if (event.key === "Escape") {
    pinned = null;
    tokens.forEach((one) => one.setAttribute("aria-pressed", "false"));
  }
  if (index >= 0 && (event.key === "Enter" || event.key === " ")) {
    event.preventDefault();
    pin(index);
    return;
  }
  const to = event.key === "Home" ? 0 : event.key === "End" ? tokens.length - 1 : index + (by ?? 0);
  if (index < 0 || (!by && to === index)) return;
  event.preventDefault();
  const target = tokens[Math.max(0, Math.min(tokens.length - 1, to))];
  tokens.forEach((one) => { one.tabIndex = -1; });
  target.tabIndex = 0;
  target.focus();
});
pick.addEventListener("change", () => {
  color();
  const current = tokens.findIndex((one) => one.hasAttribute("aria-current"));
  show(current < 0 ? 0 : current);
});
color();
if (tokens.length) show(0);
