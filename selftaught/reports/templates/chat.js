"use strict";
const given = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const messages = [];
let running = null;

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text; // never as HTML: the text is a model's
  if (className) made.className = className;
  return made;
}

function turn(who, text) {
  const item = element("li");
  item.append(element("h2", who));
  const said = element("p", text, "said");
  item.append(said);
  at("talk").append(item);
  return { item, said };
}

function folded(item, title, before) {
  const box = element("details");
  box.append(element("summary", title));
  item.insertBefore(box, before);
  return box;
}

function gains(item, hidden) {
  const box = folded(item, `Gain of each token from its thought (${hidden.length} tokens)`, null);
  const table = element("table");
  const head = element("tr");
  for (const name of ["token", "gain (nats)", "thought"]) head.append(element("th", name));
  table.append(head);
  for (const one of hidden) {
    const row = element("tr");
    const token = element("td");
    const shown = element("span", one.token, one.gain < 0 ? "token hurt" : "token");
    shown.style.setProperty("--gain", Math.min(1, Math.abs(one.gain)));
    token.append(shown);
    row.append(token, element("td", (one.gain < 0 ? "−" : "+") + Math.abs(one.gain).toFixed(3)));
    row.append(element("td", one.thoughts.join(" | "), "text"));
    table.append(row);
  }
  const scroll = element("div", undefined, "scroll");
  scroll.append(table);
  box.append(scroll);
}

async function* events(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += decoder.decode(value, { stream: true });
    let end;
    while ((end = rest.indexOf("\n\n")) >= 0) {
      const line = rest.slice(0, end);
      rest = rest.slice(end + 2);
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

async function answer(text) {
  const headers = { "content-type": "application/json" };
  if (at("key") && at("key").value) headers.authorization = `Bearer ${at("key").value}`;
  const body = { model: given.model, stream: true, temperature: Number(at("temperature").value),
    max_tokens: Number(at("tokens").value) };
  if (given.chat) {
    if (given.oneTurn) messages.length = 0;
    messages.push({ role: "user", content: text });
    body.messages = messages;
  } else body.prompt = text;
  turn(given.chat ? "You" : "Text", text);
  const { item, said } = turn(given.model, "");
  let thinking = null;
  const hidden = [];
  const fail = (words) => item.append(element("p", words, "error"));
  try {
    const response = await fetch(given.chat ? "v1/chat/completions" : "v1/completions",
      { method: "POST", headers, body: JSON.stringify(body), signal: running.signal });
    if (!response.ok) {
      fail((await response.json()).error.message);
      if (given.chat) messages.pop();
      said.remove();
      return;
    }
    for await (const event of events(response)) {
      if (event.error) { fail(event.error.message); continue; }
      const choice = event.choices[0];
      if (!choice) continue;
      const part = choice.delta || choice;
      if (part.reasoning_content) {
        thinking = thinking || folded(item, "Thoughts", said).appendChild(element("p", "", "said"));
        thinking.textContent += part.reasoning_content;
      }
      hidden.push(...(part.hidden_thoughts || []));
      said.textContent += (given.chat ? part.content : part.text) || "";
      if (choice.finish_reason === "length") item.append(element("p", "Cut at the number of new tokens.", "soft"));
    }
  } catch (error) {
    fail(error.name === "AbortError" ? "Stopped." : `The server cannot be reached: ${error.message}`);
  }
  if (hidden.length) gains(item, hidden);
  if (given.chat) messages.push({ role: "assistant", content: said.textContent });
}

async function send() {
  const text = at("box").value;
  if (!text || running) return;
  running = new AbortController();
  at("box").value = "";
  at("send").disabled = true;
  at("stop").disabled = false;
  await answer(text);
  running = null;
  at("send").disabled = false;
  at("stop").disabled = true;
  at("box").focus();
}

at("send").addEventListener("click", send);
at("stop").addEventListener("click", () => running && running.abort());
at("clear").addEventListener("click", () => {
  if (running) running.abort();
  messages.length = 0;
  at("talk").replaceChildren();
  at("box").focus();
});
at("box").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); send(); }
});
