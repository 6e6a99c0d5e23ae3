// Loads a folder that `ia3-export onnx` wrote and asks it. Everything comes from the server of this page.
import {
  InterruptableStoppingCriteria, TextStreamer, cos_sim, env, pipeline,
} from "/node_modules/@huggingface/transformers/dist/transformers.min.js";

Object.assign(env, { allowRemoteModels: false, allowLocalModels: true });
Object.assign(env, { useBrowserCache: false, useWasmCache: false });
// not the build that transformers.js would take by itself: half the size, and all that the CPU needs
const runtime = new URL("/node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded", location).href;
env.backends.onnx.wasm.wasmPaths = { mjs: `${runtime}.mjs`, wasm: `${runtime}.wasm` };
// in a worker, so that the page can show a token while the next one is computed
env.backends.onnx.wasm.proxy = true;

const page = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));
const stopper = new InterruptableStoppingCriteria();
const NEW_TOKENS = 40;

const classify = {
  hint: "Answers while you type.",
  first: "wake me at six tomorrow",
  async ask(pipe, [text], { labels }) {
    const found = await pipe(text, { top_k: 5 });
    showBars(found.map(({ label, score }) => [labels?.[pipe.model.config.label2id[label]] ?? label, score]));
  },
};
const generate = {
  hint: `Greedy, up to ${NEW_TOKENS} tokens.`,
  button: "Continue",
  first: "the cat sat on",
  ask: (pipe, [text]) => write(pipe, text, pipe.task === "text-generation" ? text : ""),
};
const chat = {
  ...generate,
  button: "Ask",
  first: "What is the capital of Italy?",
  // messages, not a text: transformers.js puts them into the model's chat template
  ask: (pipe, [text]) => write(pipe, [{ role: "user", content: text }], ""),
};
const compare = {
  hint: "Answers while you type.",
  first: "the cat sat by the sea",
  second: "a kitten rests on the shore",
  async ask(pipe, texts) {
    const encoded = pipe.tokenizer(texts, { padding: true, truncation: true });
    // a sentence-transformers model was exported with its own pooling
    const { sentence_embedding } = await pipe.model(encoded);
    const [one, other] = (sentence_embedding ?? (await pipe(texts, { pooling: "mean" }))).tolist();
    showBars([["similarity", cos_sim(one, other)]], (value) => value.toFixed(3));
  },
};
const TASKS = {
  "text-classification": classify,
  "text-generation": generate,
  "text2text-generation": { ...generate, button: "Answer", first: "translate English to German: the house is small" },
  "feature-extraction": compare,
  "sentence-similarity": { ...compare, pipeline: "feature-extraction" },
};

let models = [];
let current; // { model, task, pipe }
let turn = Promise.resolve(); // one question at a time: a session runs no two

/** Bars for [name, share] pairs, the largest first. */
function showBars(rows, format = (share) => `${(share * 100).toFixed(1)}%`) {
  const list = document.createElement("ol");
  for (const [name, share] of rows) {
    const item = list.appendChild(document.createElement("li"));
    item.appendChild(document.createElement("span")).textContent = item.title = name;
    item.appendChild(document.createElement("i")).style.setProperty("--share", Math.max(0, share));
    item.appendChild(document.createElement("b")).textContent = format(share);
  }
  page.answer.replaceChildren(list);
}

/** A paragraph that starts with `given`; the element that the answer is to be appended to. */
function showText(given) {
  const paragraph = document.createElement("p");
  paragraph.className = "said";
  paragraph.append(given);
  page.answer.replaceChildren(paragraph);
  return paragraph.appendChild(document.createElement("mark"));
}

/** Show `shown` and, as it comes, what the model writes after `given`. */
async function write(pipe, given, shown) {
  const said = showText(shown);
  const streamer = new TextStreamer(pipe.tokenizer, {
    skip_prompt: true,
    skip_special_tokens: true,
    callback_function: (piece) => said.append(piece),
  });
  stopper.reset();
  await pipe(given, { max_new_tokens: NEW_TOKENS, do_sample: false, streamer, stopping_criteria: stopper });
}

function showError(error) {
  console.error(error);
  showText("").textContent = error.message;
  page.answer.firstChild.classList.add("wrong");
  state("error");
}

/** What the page is doing: loading, ready, busy or error. */
function state(name) {
  document.body.dataset.state = name;
  page.progress.hidden = name !== "loading";
  page.go.textContent = name === "busy" ? "Stop" : current?.task.button;
}

function showTraffic() {
  const urls = performance.getEntriesByType("resource").map(({ name }) => new URL(name));
  const away = urls.filter(({ protocol, origin }) => protocol.startsWith("http") && origin !== location.origin);
  page.traffic.textContent = `${away.length} requests left this machine. The page may talk to ${location.host} only.`;
}

async function load() {
  const model = models.find(({ name }) => name === page.model.value);
  const task = model.chat_template ? chat : TASKS[model.task];
  history.replaceState(null, "", `?${new URLSearchParams({ model: model.name, dtype: page.dtype.value })}`);
  page.ask.hidden = true;
  page.answer.replaceChildren();
  page.took.textContent = "";
  page.about.textContent = "loading …";
  state("loading");
  await current?.pipe.dispose();
  current = undefined;
  if (task === undefined) {
    throw new Error(`This page has no form for ${model.task}. It has: ${Object.keys(TASKS).join(", ")}.`);
  }
  const sizes = new Map();
  const start = performance.now();
  const pipe = await pipeline(task.pipeline ?? model.task, `/models/${model.name}`, {
    dtype: page.dtype.value,
    device: "wasm",
    progress_callback: ({ status, file, loaded, total }) => {
      if (status === "progress") sizes.set(file, [loaded, total]);
      const [done, all] = [...sizes.values()].reduce(([a, b], [c, d]) => [a + c, b + d], [0, 0]);
      page.progress.value = all ? (100 * done) / all : 0;
    },
  });
  // transformers.js looks into tokenizer_config.json alone, and transformers 5 writes a file of its own
  if (model.chat_template) pipe.tokenizer.chat_template ??= model.chat_template;
  current = { model, task, pipe };
  const bytes = [...sizes].reduce((sum, [file, [, total]]) => (file.includes(".onnx") ? sum + total : sum), 0);
  const size = bytes < 1e6 ? `${Math.round(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
  const seconds = ((performance.now() - start) / 1000).toFixed(1);
  page.about.textContent = `${model.task}, ${size}, loaded in ${seconds} s`;
  page.first.value = task.first;
  page.second.value = task.second ?? "";
  page.second.hidden = task.second === undefined;
  page.hint.textContent = task.hint;
  page.go.hidden = task.button === undefined;
  page.ask.hidden = false;
  state("ready");
  if (!task.button) await ask();
}

async function ask() {
  const { task, model, pipe } = current;
  const texts = [page.first, page.second].filter(({ hidden }) => !hidden).map(({ value }) => value.trim());
  if (texts.some((text) => text === "")) return;
  state("busy");
  const start = performance.now();
  await task.ask(pipe, texts, model);
  page.answer.dataset.question = texts.join("\n");
  page.took.textContent = `answered in ${Math.round(performance.now() - start)} ms`;
  showTraffic();
  state("ready");
}

/** Queue `step` behind what is going on; what is typed meanwhile is asked once. */
function queue(step) {
  turn = turn.then(step).catch(showError);
}

let asked = 0;
page.ask.addEventListener("input", () => {
  if (current?.task.button) return;
  const mine = ++asked;
  queue(() => mine === asked && ask());
});
page.ask.addEventListener("submit", (event) => {
  event.preventDefault();
  if (document.body.dataset.state === "busy") stopper.interrupt();
  else queue(ask);
});
page.first.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && current?.task.button) {
    event.preventDefault();
    page.ask.requestSubmit();
  }
});

function fillDtypes(wanted) {
  const { dtypes } = models.find(({ name }) => name === page.model.value);
  page.dtype.replaceChildren(...dtypes.map((name) => new Option(name, name, false, name === wanted)));
}
page.model.addEventListener("change", () => {
  fillDtypes();
  stopper.interrupt();
  queue(load);
});
page.dtype.addEventListener("change", () => {
  stopper.interrupt();
  queue(load);
});

queue(async () => {
  models = await (await fetch("models.json")).json();
  const query = new URLSearchParams(location.search);
  page.model.replaceChildren(...models.map(({ name }) => new Option(name, name, false, name === query.get("model"))));
  fillDtypes(query.get("dtype"));
  showTraffic();
  await load();
});
