// The page of ./run.sh serve. It talks to the server it came from and to nothing else. Text from a
// model only ever becomes text: nothing here makes HTML of strings.
"use strict";

const $ = (id) => document.getElementById(id);

// An element with a class, a text and children
function make(tag, name = "", text = "", ...children) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text) element.textContent = text;
  element.append(...children);
  return element;
}

const KNOBS = [
  // name in the protocol, what it is called, least, most, step
  ["temperature", "Temperature", 0, 2, 0.05],
  ["top_p", "Top p", 0, 1, 0.01],
  ["top_k", "Top k (0: all)", 0, 200, 1],
  ["min_p", "Min p", 0, 1, 0.01],
  ["repetition_penalty", "Repetition penalty", 0.5, 2, 0.05],
  ["no_repeat_ngram", "No-repeat n-gram (0: off)", 0, 16, 1],
  ["max_tokens", "Tokens at most", 1, 2000, 1],
];
const ALTERNATIVES = 6;
const EXAMPLES = ["def ", "import ", "The capital of France is", "Once upon a time"];

const state = {
  model: null, // as /v1/models has it
  mode: "chat",
  turns: [], // {role, content} of the conversation
  running: null, // the AbortController of an answer that is written
};

// ---------------------------------------------------------------------------------------------
// What is kept between visits; where that is not allowed, nothing is

function remember(name, value) {
  try { localStorage.setItem(`stopwatch.${name}`, JSON.stringify(value)); } catch { /* private */ }
}
function remembered(name, otherwise) {
  try { return JSON.parse(localStorage.getItem(`stopwatch.${name}`)) ?? otherwise; } catch { return otherwise; }
}

// ---------------------------------------------------------------------------------------------
// The server

class Problem extends Error {
  constructor(message, status) { super(message); this.status = status; }
}

async function call(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const key = $("key").value;
  if (key) headers.Authorization = `Bearer ${key}`;
  const options = body ? { method: "POST", body: JSON.stringify(body), headers, signal } : { headers, signal };
  let response;
  try {
    response = await fetch(path, options);
  } catch (e) {
    if (e.name === "AbortError") throw e;
    throw new Problem("The server cannot be reached. Is ./run.sh serve still running?", 0);
  }
  if (response.ok) return response;
  let message = `The server answered ${response.status}.`;
  try { message = (await response.json()).error.message; } catch { /* not in OpenAI's shape */ }
  if (response.status === 503) message = `The server is busy: ${message}.`;
  if (response.status === 401) {
    $("key-field").hidden = false;
    message = "This server asks for a key: enter it in the settings.";
  }
  throw new Problem(message, response.status);
}

// The JSON objects of a stream of server-sent events
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Problem("The connection was lost before the end.", 0);
    const parts = (waiting + value).split("\n\n");
    waiting = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const said = JSON.parse(data);
      if (said.error) throw new Problem(said.error.message, 500);
      yield said;
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Tokens and their alternatives

const encoder = new TextEncoder();

// Text, bytes, probability and alternatives of the tokens in a chunk, of either kind
function tokensOf(choice) {
  const said = choice.logprobs;
  if (!said) return [];
  if (said.content) {
    const plain = (t) => ({ bytes: new Uint8Array(t.bytes), p: Math.exp(t.logprob) });
    return said.content.map((t) => ({ ...plain(t), others: t.top_logprobs.map(plain) }));
  }
  return said.tokens.map((name, i) => ({
    bytes: bytesOf(name),
    p: Math.exp(said.token_logprobs[i] ?? 0),
    others: Object.entries(said.top_logprobs[i] ?? {}).map(([other, logprob]) => ({ bytes: bytesOf(other), p: Math.exp(logprob) })),
  }));
}

// Of a token that is no whole character the name is like bytes:\xe2\x80
function bytesOf(name) {
  if (!/^bytes:(\\x[0-9a-f]{2})+$/.test(name)) return encoder.encode(name);
  return new Uint8Array(name.slice(8).split("\\x").map((hex) => parseInt(hex, 16)));
}

// A token as it is shown in a table: white space has signs, broken characters are bytes
function shown(bytes) {
  if (!bytes.length) return "(nothing)";
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
    return text.replace(/ /g, "\u00b7").replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5").replace(/\r/g, "\u240d");
  } catch {
    return [...bytes].map((b) => b.toString(16).padStart(2, "0")).join(" ");
  }
}

function percent(p) {
  if (p < 0.0005) return "<0.1%";
  return `${(100 * p).toFixed(p < 0.0995 || (p > 0.9 && p < 0.995) ? 1 : 0)}%`;
}
const about = new WeakMap(); // span -> its token

function showAlternatives(span) {
  const token = about.get(span);
  const box = $("alternatives");
  if (!token) return hideAlternatives();
  const own = shown(token.bytes);
  const rows = token.others.map((other) => [shown(other.bytes), other.p]);
  if (!rows.some(([name]) => name === own)) rows.push([own, token.p]);
  rows.sort((a, b) => b[1] - a[1]);
  const table = make("table", "", "", make("caption", "", `${own} had ${percent(token.p)}`));
  for (const [name, p] of rows) {
    const bar = make("span");
    bar.style.width = `${(100 * p) / rows[0][1]}%`; // of the likeliest one's
    const row = make("tr", name === own ? "chosen" : "", "", make("td", "", name), make("td", "bar", "", bar), make("td", "", percent(p)));
    table.append(row);
  }
  box.replaceChildren(table);
  box.hidden = false;
  const at = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const left = Math.min(at.left, innerWidth - box.offsetWidth - 8);
  const below = at.bottom + 6 + box.offsetHeight < innerHeight;
  box.style.left = `${Math.max(8, left)}px`;
  box.style.top = `${below ? at.bottom + 6 : Math.max(8, at.top - box.offsetHeight - 6)}px`;
  span.setAttribute("aria-describedby", "alternatives");
}

function hideAlternatives() {
  $("alternatives").hidden = true;
}

function watchTokens(log) {
  const tokenAt = (e) => (e.target.classList?.contains("token") ? e.target : null);
  log.addEventListener("pointerover", (e) => (tokenAt(e) ? showAlternatives(e.target) : hideAlternatives()));
  log.addEventListener("pointerleave", hideAlternatives);
  log.addEventListener("focusin", (e) => tokenAt(e) && showAlternatives(e.target));
  log.addEventListener("focusout", hideAlternatives);
  // One stop of the tab key for an answer, arrows within it
  log.addEventListener("keydown", (e) => {
    const span = tokenAt(e);
    if (!span) return;
    const all = [...span.parentElement.querySelectorAll(".token")];
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -all.length, End: all.length }[e.key];
    if (e.key === "Escape") return hideAlternatives();
    if (!step) return;
    e.preventDefault();
    const next = all[Math.min(all.length - 1, Math.max(0, all.indexOf(span) + step))];
    span.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
  $("scroll").addEventListener("scroll", () => {
    const span = log.querySelector(".token:hover") ?? document.activeElement;
    if (span.classList.contains("token")) showAlternatives(span);
    else hideAlternatives();
  }, { passive: true });
}

// ---------------------------------------------------------------------------------------------
// An answer on the screen

class AnswerView {
  constructor(prompt) {
    this.body = make("div", "body");
    if (prompt) this.body.append(make("span", "prompt", prompt));
    this.numbers = make("span", "numbers");
    this.foot = make("div", "foot", "", this.numbers);
    this.turn = make("div", "turn answer going", "", this.body, this.foot);
    this.text = "";
    this.nTokens = 0;
    this.decoder = new TextDecoder();
    this.began = performance.now();
    this.first = null; // the time of the first text
    this.last = null;
    $("log").append(this.turn);
  }

  // Add a chunk's text, divided into its tokens
  add(text, tokens) {
    if (!text && !tokens.length) return;
    this.last = performance.now();
    this.first ??= this.last;
    this.nTokens += tokens.length;
    this.text += text;
    let left = text;
    for (const token of tokens) {
      const piece = left.slice(0, this.decoder.decode(token.bytes, { stream: true }).length);
      left = left.slice(piece.length);
      if (piece) this.addToken(piece, token);
    }
    if (left) this.body.append(left);
    this.showNumbers();
  }

  addToken(text, token) {
    const span = make("span", "token", text);
    const unsure = token.p < 0.05 ? 3 : token.p < 0.2 ? 2 : token.p < 0.5 ? 1 : 0;
    if (unsure) span.classList.add(`unsure${unsure}`);
    span.tabIndex = this.body.querySelector(".token") ? -1 : 0;
    about.set(span, token);
    this.body.append(span);
  }

  showNumbers(reason = "", usage = null) {
    const parts = [];
    if (this.nTokens) parts.push(`${this.nTokens} tokens`);
    const seconds = (this.last - this.first) / 1000;
    if (this.nTokens > 1 && seconds > 0) parts.push(`${((this.nTokens - 1) / seconds).toFixed(0)} tokens/s`);
    if (this.first) parts.push(`first after ${Math.round(this.first - this.began)} ms`);
    if (usage?.prompt_tokens_cut) parts.push(`the first ${usage.prompt_tokens_cut} tokens are out of its sight`);
    if (reason) parts.push(reason);
    this.numbers.textContent = parts.join(" \u00b7 ");
  }

  end(reason, usage, again) {
    this.turn.classList.remove("going");
    const words = { length: "ended by its length", stop: "ended by itself", stopped: "stopped", failed: "broken off" };
    this.showNumbers(words[reason] ?? "", usage);
    const copy = make("button", "plain", "Copy");
    copy.type = "button";
    copy.addEventListener("click", async () => {
      try { await navigator.clipboard.writeText(this.text); copy.textContent = "Copied"; } catch { copy.textContent = "Not allowed"; }
      setTimeout(() => (copy.textContent = "Copy"), 1500);
    });
    const retry = make("button", "plain", "Again");
    retry.type = "button";
    retry.addEventListener("click", again);
    this.foot.append(copy, retry);
    if (state.mode === "text") {
      const keep = make("button", "plain", "Go on from here");
      keep.type = "button";
      keep.addEventListener("click", () => {
        $("entry").value += this.text;
        fit();
        submit();
      });
      this.foot.append(keep);
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Asking

function settings() {
  const asked = {};
  for (const [name] of KNOBS) {
    const value = Number($(name).value);
    if ($(name).value !== "" && Number.isFinite(value)) asked[name] = value;
  }
  if (/^\d+$/.test($("seed").value)) asked.seed = Number($("seed").value);
  const stops = $("stops").value.split("\n").filter(Boolean);
  if (stops.length) asked.stop = stops.map((s) => s.replace(/\\n/g, "\n").replace(/\\t/g, "\t"));
  return asked;
}

function submit() {
  const entry = $("entry");
  const text = entry.value;
  if (state.running || (!text && state.mode === "chat")) return;
  $("welcome").hidden = true;
  if (state.mode === "chat") {
    state.turns.push({ role: "user", content: text });
    $("log").append(make("div", "turn mine", "", make("div", "body", text)));
    entry.value = "";
    fit();
    ask("/v1/chat/completions", { messages: state.turns.slice(), logprobs: true, top_logprobs: ALTERNATIVES });
  } else {
    $("log").replaceChildren();
    ask("/v1/completions", { prompt: text, logprobs: ALTERNATIVES }, text);
  }
}

async function ask(path, body, prompt = "") {
  const view = new AnswerView(prompt);
  const controller = (state.running = new AbortController());
  showRunning(true);
  hideError();
  let reason = null;
  let usage = null;
  const turns = state.turns; // another one, once this conversation is cleared
  const nTurns = turns.length;
  const again = () => {
    if (state.running) return;
    view.turn.remove();
    if (path.includes("chat")) {
      // What came after it goes, too
      turns.length = nTurns;
      while ($("log").children.length > nTurns) $("log").lastChild.remove();
    }
    ask(path, body, prompt);
  };
  try {
    const asked = { model: state.model?.id, stream: true, stream_options: { include_usage: true }, ...settings(), ...body };
    const response = await call(path, asked, controller.signal);
    for await (const chunk of events(response)) {
      usage = chunk.usage ?? usage;
      const choice = chunk.choices[0];
      if (!choice) continue;
      reason = choice.finish_reason ?? reason;
      const follow = atBottom();
      view.add(choice.text ?? choice.delta.content ?? "", tokensOf(choice));
      if (follow) toBottom();
    }
  } catch (e) {
    reason = e.name === "AbortError" ? "stopped" : "failed";
    if (reason === "failed") showError(e, again);
  }
  if (reason === "failed" && !view.text) {
    view.turn.remove();
  } else {
    view.end(reason, usage, again);
    if (path.includes("chat")) turns.push({ role: "assistant", content: view.text });
  }
  state.running = null;
  showRunning(false);
  toBottom();
}

function stop() {
  state.running?.abort();
}

// ---------------------------------------------------------------------------------------------
// What is on the screen around it

const atBottom = () => $("scroll").scrollHeight - $("scroll").scrollTop - $("scroll").clientHeight < 60;
const toBottom = () => ($("scroll").scrollTop = $("scroll").scrollHeight);

function showRunning(running) {
  const focused = document.activeElement === $("stop") || document.activeElement === $("send");
  $("send").hidden = running;
  $("stop").hidden = !running;
  $("status").textContent = running ? "writing \u2026 Esc stops" : "";
  $("log").setAttribute("aria-busy", running);
  if (focused) (running ? $("stop") : $("entry")).focus();
}

function showError(problem, again) {
  const retry = make("button", "", "Try again");
  retry.type = "button";
  retry.addEventListener("click", () => { hideError(); again(); });
  const said = problem instanceof Problem ? problem.message : `Something went wrong in this page: ${problem.message}`;
  $("error").replaceChildren(make("p", "", said), retry);
  $("error").hidden = false;
  if (problem.status === 401) { openKnobs(true); $("key").focus(); }
}

function hideError() {
  $("error").hidden = true;
}

function fit() {
  const entry = $("entry");
  entry.style.height = "auto";
  entry.style.height = `${entry.scrollHeight + 2}px`;
}

function choose(mode) {
  if (state.running) stop();
  state.mode = mode;
  document.body.classList.toggle("text", mode === "text");
  for (const name of ["chat", "text"]) {
    const tab = $(`tab-${name}`);
    tab.setAttribute("aria-selected", name === mode);
    tab.tabIndex = name === mode ? 0 : -1;
  }
  $("view").setAttribute("aria-labelledby", `tab-${mode}`);
  $("send").textContent = mode === "chat" ? "Send" : "Continue";
  $("entry-label").textContent = mode === "chat" ? "Your message" : "The text to continue";
  $("entry").placeholder = mode === "chat" ? "Write something \u2026" : "A text to continue. Ctrl+Enter continues it";
  clear();
  remember("mode", mode);
}

function clear() {
  stop();
  state.turns = [];
  $("log").replaceChildren();
  $("welcome").hidden = false;
  hideError();
  hideAlternatives();
  $("entry").value = "";
  fit();
}

function openKnobs(open) {
  $("knobs").classList.toggle("open", open);
  $("open-knobs").setAttribute("aria-expanded", open);
}

function makeKnobs() {
  const kept = remembered("knobs", {});
  for (const [name, title, least, most, step] of KNOBS) {
    const label = make("label", "", title);
    label.htmlFor = name;
    const number = make("input");
    Object.assign(number, { type: "number", id: name, min: least, max: most, step });
    const slider = make("input");
    Object.assign(slider, { type: "range", min: least, max: most, step, tabIndex: -1 });
    slider.setAttribute("aria-hidden", "true");
    const changed = () => {
      remember("knobs", Object.fromEntries(KNOBS.map(([n]) => [n, $(n).value])));
    };
    slider.addEventListener("input", () => { number.value = slider.value; changed(); });
    number.addEventListener("input", () => { slider.value = number.value; changed(); });
    number.value = kept[name] ?? "";
    $("ranges").append(make("div", "range", "", label, number, slider));
  }
}

function setDefaults(all) {
  for (const [name] of KNOBS) {
    const number = $(name);
    if (all || number.value === "") number.value = state.model?.defaults?.[name] ?? "";
    number.nextSibling.value = number.value;
  }
  if (all) {
    remember("knobs", {});
    $("seed").value = $("stops").value = "";
  }
}

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
}

async function meet() {
  try {
    const response = await call("/v1/models");
    state.model = (await response.json()).data[0];
  } catch (e) {
    showError(e, meet);
    return;
  }
  const base = state.model.kind === "base";
  $("model").textContent = state.model.id;
  document.title = `${state.model.id} \u00b7 Stopwatch`;
  document.body.classList.toggle("base", base);
  $("about").textContent = base
    ? "This model was trained on text alone: it does not answer, it continues what you write."
    : "Ask something, or give it a text to continue.";
  setDefaults(false);
}

function begin() {
  setTheme(remembered("theme", null));
  makeKnobs();
  watchTokens($("log"));
  for (const example of EXAMPLES) {
    const button = make("button", "", example);
    button.type = "button";
    button.addEventListener("click", () => { $("entry").value = example; submit(); });
    $("examples").append(make("li", "", "", button));
  }

  $("form").addEventListener("submit", (e) => { e.preventDefault(); submit(); });
  $("entry").addEventListener("input", fit);
  $("entry").addEventListener("keydown", (e) => {
    const sends = state.mode === "chat" ? !e.shiftKey : e.ctrlKey || e.metaKey;
    if (e.key === "Enter" && sends && !e.isComposing) { e.preventDefault(); submit(); }
  });
  document.addEventListener("keydown", (e) => {
    if (e.key !== "Escape") return;
    if (state.running) stop();
    openKnobs(false);
    hideAlternatives();
  });
  $("stop").addEventListener("click", stop);
  $("clear").addEventListener("click", () => { clear(); $("entry").focus(); });
  $("open-knobs").addEventListener("click", () => openKnobs(!$("knobs").classList.contains("open")));
  $("close-knobs").addEventListener("click", () => { openKnobs(false); $("open-knobs").focus(); });
  $("defaults").addEventListener("click", () => setDefaults(true));
  $("theme").addEventListener("click", () => {
    const now = document.documentElement.dataset.theme;
    const dark = now ? now === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    setTheme(dark ? "light" : "dark");
    remember("theme", dark ? "light" : "dark");
  });
  $("shade").checked = remembered("shade", false);
  const shade = () => $("log").classList.toggle("shaded", $("shade").checked);
  $("shade").addEventListener("change", () => { shade(); remember("shade", $("shade").checked); });
  shade();
  $("key").addEventListener("change", () => { hideError(); meet(); });

  const tabs = [$("tab-chat"), $("tab-text")];
  for (const tab of tabs) {
    tab.addEventListener("click", () => choose(tab.id.slice(4)));
    tab.addEventListener("keydown", (e) => {
      if (e.key !== "ArrowLeft" && e.key !== "ArrowRight") return;
      const other = tabs[1 - tabs.indexOf(tab)];
      other.focus();
      choose(other.id.slice(4));
    });
  }
  choose(remembered("mode", "chat") === "text" ? "text" : "chat");
  $("entry").focus({ preventScroll: true });
  meet();
}

begin();
