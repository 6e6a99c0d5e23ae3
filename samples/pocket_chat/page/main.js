// A chat with the models that the server has, one at a time. Everything comes from the server of this page.
import {
  InterruptableStoppingCriteria, TextStreamer, env, pipeline,
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
const NEW_TOKENS = 80;
const REMEMBERED = 7; // messages, if any: all of them are read again for every answer
const IDEAS = ["Who are you?", "What is a tree?", "I had a bad day.", "How do I make coffee?"];

let models = [];
let current; // { model, pipe, messages }
let turn = Promise.resolve(); // one thing at a time: a session runs no two

/** What the page is doing: loading, ready, busy or error. */
function state(name) {
  document.body.dataset.state = name;
  page.progress.hidden = name !== "loading";
  page.go.textContent = name === "busy" ? "Stop" : "Send";
}

/** A bubble of `who`; the paragraph for its text and the line below it. */
function addTurn(who, text = "") {
  const bubble = page.talk.appendChild(document.createElement("div"));
  bubble.className = `turn ${who}`;
  const paragraph = bubble.appendChild(document.createElement("p"));
  paragraph.append(text);
  const below = bubble.appendChild(document.createElement("small"));
  page.talk.scrollTop = page.talk.scrollHeight;
  return [paragraph, below];
}

function showError(error) {
  console.error(error);
  addTurn("wrong", error.message);
  state("error");
}

function showTraffic() {
  const urls = performance.getEntriesByType("resource").map(({ name }) => new URL(name));
  const away = urls.filter(({ protocol, origin }) => protocol.startsWith("http") && origin !== location.origin);
  page.traffic.textContent = `${away.length} requests left this machine`;
}

/** Load the chosen model in the chosen precision, in place of the one before. */
async function load() {
  const model = models.find(({ name }) => name === page.who.querySelector(":checked").value);
  state("loading");
  page.about.textContent = `loading ${model.title} …`;
  await current?.pipe.dispose();
  current = undefined;
  const sizes = new Map();
  const start = performance.now();
  const pipe = await pipeline("text-generation", `/models/${model.name}`, {
    dtype: page.dtype.value,
    device: "wasm",
    progress_callback: ({ status, file, loaded, total }) => {
      if (status === "progress") sizes.set(file, [loaded, total]);
      const [done, all] = [...sizes.values()].reduce(([a, b], [c, d]) => [a + c, b + d], [0, 0]);
      page.progress.value = all ? (100 * done) / all : 0;
    },
  });
  // transformers.js looks into tokenizer_config.json alone, and transformers 5 writes a file of its own
  pipe.tokenizer.chat_template ??= model.chat_template;
  current = { model, pipe, messages: [] };
  const megabytes = [...sizes.values()].reduce((sum, [, total]) => sum + total, 0) / 1e6;
  const seconds = ((performance.now() - start) / 1000).toFixed(1);
  page.about.textContent = `${model.title}, ${megabytes.toFixed(0)} MB, loaded in ${seconds} s`;
  showTraffic();
  state("ready");
}

/** Ask the model that is loaded, and show its answer as it comes. */
async function ask(question) {
  const { model, pipe, messages } = current;
  state("busy");
  addTurn("you", question);
  const [answer, below] = addTurn("it");
  below.textContent = model.title;
  messages.push({ role: "user", content: question });
  let tokens = 0;
  let first;
  const streamer = new TextStreamer(pipe.tokenizer, {
    skip_prompt: true,
    skip_special_tokens: true,
    callback_function: (piece) => {
      answer.append(piece);
      page.talk.scrollTop = page.talk.scrollHeight;
    },
    token_callback_function: () => {
      first ??= performance.now();
      tokens += 1;
      const rate = ((tokens - 1) * 1000) / (performance.now() - first);
      below.textContent = `${model.title} · ${tokens} tokens${tokens > 1 ? ` · ${rate.toFixed(1)} tokens/s` : ""}`;
    },
  });
  stopper.reset();
  // messages, not a text: transformers.js puts them into the chat template
  await pipe(messages.slice(page.remember.checked ? -REMEMBERED : -1), {
    max_new_tokens: NEW_TOKENS, do_sample: false, streamer, stopping_criteria: stopper,
  });
  messages.push({ role: "assistant", content: answer.textContent });
  showTraffic();
  state("ready");
}

/** Queue `step` behind what is going on. */
function queue(step) {
  turn = turn.then(step).catch(showError);
}

function reload() {
  stopper.interrupt();
  queue(load);
}

page.ask.addEventListener("submit", (event) => {
  event.preventDefault();
  const question = page.say.value.trim();
  if (document.body.dataset.state === "busy") return stopper.interrupt();
  if (question === "") return;
  page.say.value = "";
  queue(() => ask(question));
});
page.dtype.addEventListener("change", reload);
page.who.addEventListener("change", reload);

queue(async () => {
  models = await (await fetch("models.json")).json();
  for (const [number, model] of models.entries()) {
    model.title = model.name.split("/").pop();
    const label = page.who.appendChild(document.createElement("label"));
    const input = label.appendChild(document.createElement("input"));
    Object.assign(input, { type: "radio", name: "who", value: model.name, checked: number === 0 });
    label.append(model.title);
  }
  const common = models[0].dtypes.filter((name) => models.every(({ dtypes }) => dtypes.includes(name)));
  page.dtype.replaceChildren(...common.map((name) => new Option(name)));
  for (const idea of IDEAS) {
    const button = page.ideas.appendChild(document.createElement("button"));
    button.textContent = idea;
    button.addEventListener("click", () => document.body.dataset.state === "ready" && queue(() => ask(idea)));
  }
  await load();
});
