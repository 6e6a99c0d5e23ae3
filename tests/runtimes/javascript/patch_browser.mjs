// Opens patch_page.html in Chromium and does the jobs on standard input there: calls of the page's functions, in order.
// What they give, and what the page asked its server for, goes to standard output.
import { existsSync, readFileSync } from "node:fs";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { dirname, extname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { chromium } from "playwright-core";

const { executable, module, files, jobs } = JSON.parse(readFileSync(0, "utf8"));
const TYPES = { ".html": "text/html", ".mjs": "text/javascript", ".wasm": "application/wasm" };
const runtime = dirname(createRequire(import.meta.url).resolve("onnxruntime-web"));
const asked = [];

function fileOf(path) {
  if (path === "/") return fileURLToPath(new URL("patch_page.html", import.meta.url));
  if (path === "/ia3patch.mjs") return module;
  const [, place, ...parts] = path.split("/").map(decodeURIComponent);
  return join({ ort: runtime, files }[place] ?? "nowhere", ...parts);
}

const server = createServer((request, response) => {
  asked.push(request.url);
  const file = fileOf(request.url);
  if (!existsSync(file)) return response.writeHead(404).end();
  response.writeHead(200, { "Content-Type": TYPES[extname(file)] ?? "application/octet-stream" }).end(readFileSync(file));
});
await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
const browser = await chromium.launch({
  executablePath: executable,
  args: [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
  ],
});
try {
  const page = await browser.newPage();
  const complaints = [];
  page.on("pageerror", (error) => complaints.push(error.message));
  await page.goto(`http://127.0.0.1:${server.address().port}/`);
  await page.waitForSelector("body[data-state=ready]", { state: "attached", timeout: 60_000 });
  const results = [];
  for (const { call, ...given } of jobs) {
    results.push(await page.evaluate(([name, argument]) => globalThis[name](argument), [call, given]));
  }
  process.stdout.write(JSON.stringify({ results, asked, complaints }));
} finally {
  await browser.close();
  server.close();
}
