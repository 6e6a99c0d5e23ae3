// Opens the page at `origin` in a headless Chromium, types messages as a person would, switches tasks by patches, and reverts.
// node look.mjs ORIGIN CHROMIUM MODULES MESSAGES (a JSON array); what was answered goes to standard output.
import { createRequire } from "node:module";

const [origin, executablePath, modules, messages] = process.argv.slice(2);
const { chromium } = createRequire(`${modules}/`)("playwright-core");

const browser = await chromium.launch({ executablePath, args: ["--headless", "--no-sandbox", "--disable-gpu"] });
try {
  const page = await browser.newPage();
  page.setDefaultTimeout(120_000);
  const graphs = []; // fetched for the patches
  page.on("request", (request) => request.url().includes("/onnx/base/") && graphs.push(request.url()));
  await page.goto(origin);
  await settled(page);
  const table = { about: await about(page), answers: [] };
  for (const message of JSON.parse(messages)) table.answers.push(await say(page, message));
  await choose(page, "#form", "patches");
  const patches = [];
  for (const name of ["topic", "emotion", "request", "base", "topic"]) {
    if (patches.length) await choose(page, "#files", name);
    const seen = { name, about: await about(page), answers: [] };
    for (const message of JSON.parse(messages)) seen.answers.push(await say(page, message));
    patches.push(seen);
  }
  const traffic = await page.textContent("#traffic");
  process.stdout.write(JSON.stringify({ table, patches, traffic, graphs: graphs.length }));
} finally {
  await browser.close();
}

async function settled(page) {
  await page.waitForSelector("body[data-state=ready], body[data-state=error]");
  if ((await page.getAttribute("body", "data-state")) === "error") throw new Error(await about(page));
}

async function about(page) {
  return page.textContent("#about");
}

async function choose(page, group, value) {
  await page.evaluate(() => { document.body.dataset.state = "asked"; });
  // the button is its label; the input in it cannot be seen
  await page.locator(`${group} label`, { has: page.locator(`[value=${value}]`) }).click();
  await settled(page);
}

/** Type `message`, and read the likeliest label, with its share, of each task that answers. */
async function say(page, message) {
  await page.evaluate(() => { document.body.dataset.state = "asked"; });
  await page.fill("#say", message);
  await settled(page);
  return page.evaluate(() => Object.fromEntries([...document.querySelectorAll("#cards section:not([data-off])")].map(
    (card) => [card.dataset.task, [card.querySelector("li span").textContent, card.querySelector("li b").textContent]],
  )));
}
