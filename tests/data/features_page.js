// Runs a page of features against a stand-in for a browser's document: node features_page.js PAGE STEPS
// Each step sets controls; printed is what the page then shows.
"use strict";
const fs = require("fs");
const [page, steps] = [fs.readFileSync(process.argv[2], "utf8"), JSON.parse(process.argv[3])];

class Node {
  constructor(tag) { Object.assign(this, { tag, children: [], own: "", listeners: {}, value: "" }); }
  get textContent() { return this.own + this.children.map((c) => c.textContent).join(" "); }
  set textContent(text) { this.own = String(text); this.children = []; }
  append(...nodes) { this.children.push(...nodes.map((n) => (typeof n === "string" ? Object.assign(new Node("#text"), { own: n }) : n))); }
  replaceChildren(...nodes) { this.children = []; this.append(...nodes); }
  addEventListener(kind, act) { this.listeners[kind] = act; }
  all(tag) { return [...(this.tag === tag ? [this] : []), ...this.children.flatMap((c) => c.all(tag))]; }
  getContext() { return new Proxy({}, { get: () => () => {}, set: () => true }); }
  remove() {}
  scrollIntoView() {}
}
const nodes = new Map();
for (const [, id, text] of page.matchAll(/<script type="[a-z/]+" id="([\w-]+)">(.*?)<\/script>/gs))
  nodes.set(id, Object.assign(new Node("script"), { own: text }));
const known = new Set([...page.matchAll(/ id="([\w-]+)"/g)].map((m) => m[1]));
globalThis.document = {
  getElementById: (id) => {
    if (!known.has(id)) return null;
    if (!nodes.has(id)) nodes.set(id, new Node(id));
    return nodes.get(id);
  },
  createElement: (tag) => new Node(tag),
};
globalThis.Option = class extends Node { constructor(text, value) { super("option"); this.own = text; this.value = value; } };
globalThis.window = { matchMedia: () => new Node("media"), devicePixelRatio: 1 };
globalThis.getComputedStyle = () => ({ getPropertyValue: () => "#102030" });

const $ = document.getElementById;
const options = (id) => [...page.match(new RegExp(`<select id="${id}">(.*?)</select>`, "s"))[1].matchAll(/value="([^"]*)"/g)].map((m) => m[1]);
const start = { sort: options("sort")[0], order: options("order")[0], filter: options("filter")[0], search: "" };
for (const [id, value] of Object.entries(start)) $(id).value = value;
(0, eval)(page.match(/<script>\n"use strict";(.*?)<\/script>/s)[1]);
const shown = steps.map((step) => {
  for (const [id, value] of Object.entries({ ...start, ...step })) $(id).value = value;
  $("sort").listeners.input();
  const list = $("features");
  return {
    features: list.all("b").map((b) => +b.textContent.replace("Feature ", "")),
    pictures: list.all("img").filter((i) => i.src.length > "data:image/jpeg;base64,".length).length,
    count: $("count").textContent,
    text: list.textContent,
  };
});
console.log(JSON.stringify(shown));
