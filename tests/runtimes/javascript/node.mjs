// Runs the jobs on standard input with transformers.js on onnxruntime-node; answers and attempted requests go to
// standard output.
import { readFileSync } from "node:fs";

const requests = [];
// before the import: transformers.js keeps the fetch it finds
globalThis.fetch = async (url) => {
  requests.push(String(url));
  throw new Error(`no network: ${url}`);
};

const transformers = await import("@huggingface/transformers");
const { answer } = await import("./answers.mjs");
const { models, jobs } = JSON.parse(readFileSync(0, "utf8"));
Object.assign(transformers.env, { allowRemoteModels: false, localModelPath: models, useFSCache: false });
const results = [];
for (const job of jobs) results.push(await answer(transformers, { ...job, device: "cpu" }));
process.stdout.write(JSON.stringify({ results, requests }));
