"use strict";

// Every text goes into the page as a text node: what a passage holds is never markup.

const NAMES = {
  before: ["Before", "step 0 over its own targets"],
  stale: ["Stale", "trained queries over the cache"],
  corrected: ["Corrected", "trained queries over h(cache)"],
  final: ["Final", "trained queries over fresh targets"],
};
const VIEWS = [
  ["all", "all", ["before", "stale", "corrected", "final"]],
  ["both", "before and final", ["before", "final"]],
  ["cache", "stale, corrected, final", ["stale", "corrected", "final"]],
  ["before", "before", ["before"]],
  ["stale", "stale", ["stale"]],
  ["corrected", "corrected", ["corrected"]],
  ["final", "final", ["final"]],
];

const at = (id) => document.getElementById(id);
let about = null;
let answer = null;
let asked = 0;

function make(tag, name, ...children) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.append(...children);
  return element;
}

function view() {
  const chosen = document.querySelector("input[name=view]:checked");
  const [, , models] = VIEWS.find(([key]) => chosen && key === chosen.value) || VIEWS[0];
  return models.filter((model) => about.models.includes(model));
}

function rankWords(hit, model) {
  return view()
    .filter((other) => other !== model)
    .map((other) => `${other} ${hit.ranks[other] || `> ${about.depth}`}`)
    .join(" · ");
}

function card(hit, model) {
  const item = make("li", hit.relevant ? "relevant" : "");
  item.dataset.target = hit.target;
  const head = make("p", "head", make("b", "", `${hit.rank}. `), make("span", "id", hit.target));
  head.title = hit.target;
  if (hit.relevant) head.append(make("span", "badge", "known positive"));
  head.append(make("span", "score", hit.score.toFixed(3)));
  const words = make("p", "snippet");
  for (const [text, marked] of hit.snippet) words.append(marked ? make("mark", "", text) : text);
  item.append(head, words);
  const ranks = rankWords(hit, model);
  if (ranks) item.append(make("p", "ranks", `rank: ${ranks}`));
  item.append(make("details", "", make("summary", "", "whole text"), make("pre", "", hit.text)));
  for (const [kind, on] of [["mouseenter", true], ["mouseleave", false]]) {
    item.addEventListener(kind, () => same(hit.target, on));
  }
  return item;
}

function same(target, on) {
  for (const item of document.querySelectorAll("#columns li")) {
    item.classList.toggle("same", on && item.dataset.target === target);
  }
}

function show() {
  const columns = [];
  for (const model of answer ? view() : []) {
    const { hits, milliseconds } = answer.models[model];
    const [name, what] = NAMES[model];
    const time = make("span", "time", `${milliseconds.toFixed(1)} ms`);
    const list = make("ol", "", ...hits.map((hit) => card(hit, model)));
    const column = make("section", "", make("h2", "", name, time), make("p", "what", what), list);
    column.dataset.model = model;
    columns.push(column);
  }
  at("columns").replaceChildren(...columns);
}

function say(text, wrong = false) {
  at("status").textContent = text;
  at("status").classList.toggle("wrong", wrong);
}

async function search(query) {
  const turn = ++asked;
  const began = performance.now();
  say("Searching…");
  let found;
  try {
    const reply = await fetch(`search?query=${encodeURIComponent(query)}`);
    const busy = { error: "too many are asking: try again in a moment" };
    found = reply.status === 503 ? busy : await reply.json();
  } catch {
    found = { error: "the server does not answer: was it stopped?" };
  }
  if (turn !== asked) return; // somebody typed on meanwhile
  answer = found.error ? null : found;
  show();
  if (found.error) {
    say(`${found.error}.`, true);
  } else {
    const seconds = (performance.now() - began) / 1000;
    say(`${about.targets.toLocaleString("en")} targets ranked by ${about.models.length} models, ` +
      `answered in ${seconds.toFixed(2)} s.`);
  }
}

function remember() {
  const chosen = document.querySelector("input[name=view]:checked");
  const state = new URLSearchParams({ query: at("query").value, view: chosen.value });
  history.replaceState(null, "", `#${state}`);
}

function offer(state) {
  for (const [key, words, models] of VIEWS) {
    if (!models.every((model) => about.models.includes(model)) && key !== "all") continue;
    const input = make("input", "");
    Object.assign(input, { type: "radio", name: "view", value: key, id: `view-${key}` });
    input.checked = key === (state.get("view") || "all");
    input.addEventListener("change", () => { show(); remember(); });
    const label = make("label", "", words);
    label.htmlFor = input.id;
    at("views").append(input, label);
  }
  if (!document.querySelector("input[name=view]:checked")) at("view-all").checked = true;
  for (const text of about.examples) {
    const button = make("button", "example", text);
    button.type = "button";
    button.addEventListener("click", () => {
      at("query").value = text;
      remember();
      search(text);
    });
    at("examples").append(button);
  }
}

async function start() {
  about = await (await fetch("about")).json();
  const count = (number) => number.toLocaleString("en");
  at("about").textContent =
    `${about.data} · ${count(about.targets)} targets · strategy ${about.strategy} · ` +
    `step ${count(about.step)}`;
  const state = new URLSearchParams(location.hash.slice(1));
  offer(state);
  at("form").addEventListener("submit", (event) => {
    event.preventDefault();
    remember();
    search(at("query").value);
  });
  at("query").value = state.get("query") || "";
  if (at("query").value) search(at("query").value);
}

start().catch(() => say("The server does not answer: was it stopped?", true));
