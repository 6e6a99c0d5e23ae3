// Runs the jobs on standard input with transformers.js on onnxruntime-web in Chromium, then acts `scenes` on the page of
// samples/browser; answers, and every request that the browser wanted to send elsewhere, go to standard output.
import { readFileSync } from "node:fs";
import { createServer } from "node:http";
import { chromium } from "playwright-core";

const { executable, origin, jobs, scenes } = JSON.parse(readFileSync(0, "utf8"));

// Chromium asks a proxy for every address but those of this machine, so what arrives here wanted to leave it.
const requests = [];
const proxy = createServer((request, response) => {
  requests.push(request.url);
  response.writeHead(502).end();
});
proxy.on("connect", ({ url }, socket) => {
  requests.push(url);
  socket.destroy();
});
await new Promise((resolve) => proxy.listen(0, "127.0.0.1", resolve));

const browser = await chromium.launch({
  executablePath: executable,
  args: [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-quic",
    "--disable-component-update", "--disable-sync", `--proxy-server=http://127.0.0.1:${proxy.address().port}`,
  ],
});
try {
  const context = await browser.newContext();
  context.setDefaultTimeout(120_000); // busy machines
  const visited = new Set();
  context.on("request", (request) => visited.add(new URL(request.url()).host));
  const results = await answerJobs(context);
  const acted = [];
  for (const scene of scenes) acted.push(await act(await context.newPage(), scene));
  process.stdout.write(JSON.stringify({ results, acted, requests, visited: [...visited].filter(Boolean) }));
} finally {
  await browser.close();
  proxy.close();
}

/** Answers of every job, in order. */
async function answerJobs(context) {
  const pages = {};
  const results = [];
  for (const job of jobs) {
    // the build that transformers.js takes by itself
    const build = "ort-wasm-simd-threaded.asyncify";
    pages[build] ??= await open(await context.newPage(), build);
    const result = await pages[build].evaluate((given) => globalThis.answer(given), { ...job, device: "wasm" });
    results.push(result);
    if (result.error !== undefined) {
      // transformers.js waits for the session before: after a failure no other one is made in that page
      await pages[build].close();
      delete pages[build];
    }
  }
  return results;
}

/** `page` with transformers.js on that build of onnxruntime-web. */
async function open(page, build) {
  // any address of the server will do: what is needed is its origin and its headers
  await page.goto(`${origin}models.json`);
  const source = readFileSync(new URL("answers.mjs", import.meta.url), "utf8");
  const setUp = async ([text, build]) => {
    const { answer } = await import(URL.createObjectURL(new Blob([text], { type: "text/javascript" })));
    const transformers = await import("/node_modules/@huggingface/transformers/dist/transformers.min.js");
    const { env } = transformers;
    Object.assign(env, { allowRemoteModels: false, allowLocalModels: true, localModelPath: "/models/" });
    Object.assign(env, { useBrowserCache: false, useWasmCache: false });
    const path = `${location.origin}/node_modules/onnxruntime-web/dist/${build}`;
    env.backends.onnx.wasm.wasmPaths = { mjs: `${path}.mjs`, wasm: `${path}.wasm` };
    globalThis.answer = (job) => answer(transformers, job);
  };
  await page.evaluate(setUp, [source, build]);
  return page;
}

/** What a person sees who opens the page with `query`, types `texts`, and presses Stop at the first word if `stop`. */
async function act(page, { query, texts, stop }) {
  const complaints = [];
  page.on("pageerror", (error) => complaints.push(error.message));
  await page.goto(`${origin}?${new URLSearchParams(query)}`);
  await page.waitForSelector("body[data-state=ready], body[data-state=error]");
  if ((await page.getAttribute("body", "data-state")) === "ready") {
    // one after the other, as a person would
    for (const [i, text] of texts.entries()) await page.fill(["#first", "#second"][i], text);
    if (stop) await page.evaluate(stopAtFirstWord);
    if (await page.isVisible("#go")) await page.click("#go");
    const question = texts.join("\n");
    await page.waitForFunction((wanted) => {
      const { dataset } = document.querySelector("#answer");
      return dataset.question === wanted || document.body.dataset.state === "error";
    }, question);
  }
  const bars = await page.$$eval("#answer li", (rows) => rows.map((row) => [...row.children].map((c) => c.textContent)));
  const text = await page.innerText("#answer");
  const state = await page.getAttribute("body", "data-state");
  const traffic = await page.innerText("#traffic");
  await page.close();
  return { state, text, bars: bars.map(([label, , value]) => [label, value]), traffic, complaints };
}

/** In the page: press the button again as soon as there is an answer to stop. */
function stopAtFirstWord() {
  const observer = new MutationObserver(() => {
    if (!document.querySelector("#answer mark")?.textContent) return;
    observer.disconnect();
    document.querySelector("#go").click();
  });
  observer.observe(document.querySelector("#answer"), { childList: true, subtree: true });
}
