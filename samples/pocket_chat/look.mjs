// Opens the page at `origin` in a headless Chromium, talks to both models as a person would, and takes a picture.
// node look.mjs ORIGIN CHROMIUM MODULES PICTURE; answers, and into how many pieces each came, go to standard output.
import { createRequire } from "node:module";

const [origin, executablePath, modules, picture] = process.argv.slice(2);
const { chromium } = createRequire(`${modules}/`)("playwright-core");

const TALK = [
  ["SmolLM2", ["Do you like cheese?"]],
  ["Mog", ["Do you like cheese?", "What is the capital of Germany?", "What is a tree?"]],
];

const browser = await chromium.launch({ executablePath, args: ["--headless", "--no-sandbox", "--disable-gpu"] });
try {
  const page = await browser.newPage({ viewport: { width: 760, height: 900 }, deviceScaleFactor: 2 });
  page.setDefaultTimeout(300_000);
  await page.goto(origin);
  await settled(page);
  const answers = [];
  for (const [name, questions] of TALK) {
    const choice = page.locator("#who label", { hasText: name });
    if (!(await choice.locator("input").isChecked())) {
      await choice.click();
      await page.waitForSelector("body[data-state=loading]");
      await settled(page);
    }
    for (const question of questions) answers.push({ name, question, ...(await say(page, question)) });
  }
  await page.screenshot({ path: picture });
  process.stdout.write(JSON.stringify(answers));
} finally {
  await browser.close();
}

async function settled(page) {
  await page.waitForSelector("body[data-state=ready], body[data-state=error]");
  const wrong = await page.locator(".turn.wrong").allInnerTexts();
  if (wrong.length) throw new Error(wrong.join("\n"));
}

/** Type `question`, and watch the answer come. */
async function say(page, question) {
  await page.evaluate(() => {
    globalThis.pieces = new Set();
    const last = () => [...document.querySelectorAll(".turn.it p")].pop()?.textContent;
    new MutationObserver(() => globalThis.pieces.add(last())).observe(document.querySelector("#talk"), {
      childList: true, subtree: true,
    });
  });
  await page.fill("#say", question);
  await page.click("#go");
  await page.waitForSelector("body[data-state=busy]");
  await settled(page);
  return page.evaluate(() => ({
    answer: [...document.querySelectorAll(".turn.it p")].pop().textContent,
    below: [...document.querySelectorAll(".turn.it small")].pop().textContent,
    pieces: globalThis.pieces.size,
  }));
}
