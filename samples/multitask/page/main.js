// Asks three tasks about a message, in two ways. Table: one graph holds all tasks, and a batch of three rows asks each. Patches:
// one graph of the base is kept in the browser's cache, and a patch of kilobytes makes the graph of a task of its bytes, before
// the session is made. Everything comes from the server of this page.
import { Tokenizer } from "/node_modules/@huggingface/tokenizers/dist/tokenizers.min.mjs";
import * as ort from "/node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";
import { applyFile, readPatch } from "/javascript/ia3patch.mjs";

// not the build that onnxruntime-web would take by itself: half the size, and all that the CPU needs
const runtime = new URL("/node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded", location).href;
ort.env.wasm.wasmPaths = { mjs: `${runtime}.mjs`, wasm: `${runtime}.wasm` };
ort.env.logLevel = "error";

const TASKS = ["topic", "emotion", "request"];
const BASE = "base";
const GRAPH = "onnx/model.onnx"; // in the folder that the patches are for
const TABLE = "run/table/onnx/model_quantized.onnx";
const LONGEST = 128; // tokens, as in the training

const page = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));
const labels = {}; // of each task
let tokenizer;
let rows; // of each task, in the tables
let patches; // of each task, when they are asked for
let current; // { session, ask }: what answers
let turn = Promise.resolve(); // one thing at a time: a session runs no two

/** What the page is doing: loading, ready, busy or error. */
function state(name) {
  document.body.dataset.state = name;
}

async function fetchBytes(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: ${response.status} ${response.statusText}`);
  return new Uint8Array(await response.arrayBuffer());
}

async function fetchJson(url) {
  return JSON.parse(new TextDecoder().decode(await fetchBytes(url)));
}

/** Bytes that are fetched once: `key` names their content, so that others are never taken for them. */
async function cachedBytes(url, key) {
  const cache = await caches.open("multitask");
  const name = `${url}?sha256=${key}`;
  if ((await cache.match(name)) === undefined) {
    for (const other of await cache.keys()) await cache.delete(other); // what an older export was
    await cache.add(name);
  }
  return new Uint8Array(await (await cache.match(name)).arrayBuffer());
}

async function sha256(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return [...digest].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

const megabytes = (bytes) => `${(bytes.length / 1e6).toFixed(1)} MB`;
const milliseconds = (start) => `${(performance.now() - start).toFixed(0)} ms`;

/** Logits, a row for each of `tasks`, of a message: all rows have its tokens. `task` are rows of tables, if there are any. */
async function run(session, text, count, task) {
  const { ids } = tokenizer.encode(text);
  const tokens = ids.length > LONGEST ? [...ids.slice(0, LONGEST - 1), ids.at(-1)] : ids;
  const dims = [count, tokens.length];
  const whole = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), dims);
  const feeds = {
    input_ids: whole(Array(count).fill(tokens).flat()),
    attention_mask: whole(Array(count * tokens.length).fill(1)),
    token_type_ids: whole(Array(count * tokens.length).fill(0)),
  };
  if (task !== undefined) feeds.task = new ort.Tensor("int64", BigInt64Array.from(task, BigInt), [count]);
  const { logits } = await session.run(feeds);
  const width = logits.dims[1];
  return Array.from({ length: count }, (_, row) => [...logits.data.slice(row * width, (row + 1) * width)]);
}

function softmax(logits) {
  const powers = logits.map((value) => Math.exp(value - Math.max(...logits)));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((value) => value / sum);
}

/** A card for each task: bars from the likeliest label on, or nothing where there are no `logits` of it. */
function showAnswers(logits) {
  for (const task of TASKS) {
    const card = document.querySelector(`#cards [data-task=${task}]`);
    card.toggleAttribute("data-off", logits[task] === undefined);
    const shares = logits[task] === undefined ? labels[task].map(() => 0) : softmax(logits[task]);
    const bars = labels[task].map((label, number) => [label, shares[number]]).sort((a, b) => b[1] - a[1]);
    card.querySelector("ol").replaceChildren(...bars.map(([label, share]) => {
      const item = document.createElement("li");
      item.appendChild(document.createElement("span")).textContent = label;
      item.appendChild(document.createElement("i")).style.setProperty("--share", share);
      item.appendChild(document.createElement("b")).textContent = logits[task] ? `${(100 * share).toFixed(1)}%` : "";
      return item;
    }));
  }
}

/** Make a session of `bytes` in place of the one before. */
async function open(bytes, ask) {
  await current?.session.release();
  current = undefined;
  current = { session: await ort.InferenceSession.create(bytes), ask };
}

/** One graph, three rows in one batch. */
async function openTable() {
  const start = performance.now();
  const bytes = await fetchBytes(TABLE);
  await open(bytes, async (session, text) => {
    const answers = await run(session, text, TASKS.length, TASKS.map((task) => rows[task]));
    return Object.fromEntries(TASKS.map((task, number) => [task, answers[number]]));
  });
  page.about.textContent = `one graph with all tasks, ${megabytes(bytes)}, ready in ${milliseconds(start)}`;
}

/** The base's graph out of the cache, made that of `task` by its patch, or left as it is. */
async function openPatched(task) {
  patches ??= Object.fromEntries(
    await Promise.all(TASKS.map(async (name) => [name, await readPatch(await fetchBytes(`run/${name}.ia3patch`))])),
  );
  const { from } = patches[TASKS[0]].files.find(({ path }) => path === GRAPH);
  const start = performance.now();
  const base = await cachedBytes(`run/onnx/base/${GRAPH}`, from.sha256);
  let said = `the base's graph, ${megabytes(base)}`;
  let bytes = base;
  if (task === BASE) said += `, SHA-256 ${await sha256(base) === from.sha256 ? "as delivered" : "WRONG"}: its head has learned nothing`;
  else {
    bytes = await applyFile(patches[task], GRAPH, base);
    said += `, patched to ${task} in ${milliseconds(start)}`;
  }
  await open(bytes, async (session, text) => {
    const [answer] = await run(session, text, 1);
    return task === BASE ? {} : { [task]: answer };
  });
  page.about.textContent = `${said}; ready in ${milliseconds(start)}`;
}

function showTraffic() {
  const urls = performance.getEntriesByType("resource").map(({ name }) => new URL(name));
  const away = urls.filter(({ protocol, origin }) => protocol.startsWith("http") && origin !== location.origin);
  page.traffic.textContent = `${away.length} requests left this machine`;
}

async function load() {
  state("loading");
  page.about.classList.remove("wrong");
  page.about.textContent = "loading …";
  const form = page.form.querySelector(":checked").value;
  page.files.hidden = form !== "patches";
  await (form === "table" ? openTable() : openPatched(page.files.querySelector(":checked").value));
  showTraffic();
  await answer();
}

async function answer() {
  const text = page.say.value.trim();
  if (current === undefined) return;
  state("busy");
  showAnswers(text === "" ? {} : await current.ask(current.session, text));
  state("ready");
}

function showError(error) {
  console.error(error);
  page.about.textContent = error.message;
  page.about.classList.add("wrong");
  state("error");
}

/** Queue `step` behind what is going on. */
function queue(step) {
  turn = turn.then(step).catch(showError);
}

page.say.addEventListener("input", () => {
  const typed = page.say.value;
  queue(() => typed === page.say.value && answer()); // only the last of the letters that came meanwhile
});
page.form.addEventListener("change", () => queue(load));
page.files.addEventListener("change", () => queue(load));

queue(async () => {
  state("loading");
  tokenizer = new Tokenizer(await fetchJson("run/table/tokenizer.json"), await fetchJson("run/table/tokenizer_config.json"));
  const manifest = await fetchJson("run/table/ia3_export.json");
  rows = Object.fromEntries(Object.entries(manifest.tasks.adapters).map(([name, { row }]) => [name, row]));
  for (const [number, name] of [BASE, ...TASKS].entries()) {
    const label = page.files.appendChild(document.createElement("label"));
    const input = label.appendChild(document.createElement("input"));
    Object.assign(input, { type: "radio", name: "file", value: name, checked: number === 1 });
    label.append(name === BASE ? "revert to the base" : name);
  }
  for (const task of TASKS) {
    labels[task] = await fetchJson(`run/adapters/${task}/labels.json`);
    const card = page.cards.appendChild(document.createElement("section"));
    card.dataset.task = task;
    card.appendChild(document.createElement("h2")).textContent = task;
    card.appendChild(document.createElement("ol"));
  }
  await load();
});
