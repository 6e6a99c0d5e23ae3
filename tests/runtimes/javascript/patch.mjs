// Applies patches with javascript/ia3patch.mjs: the jobs on standard input, each a patch and a folder or one file of it.
// What was made is written to `output`; a PatchError's code and message go to standard output, anything else is thrown.
import { mkdirSync, readFileSync, readdirSync, writeFileSync } from "node:fs";
import { dirname, join, relative, sep } from "node:path";

const { module, jobs } = JSON.parse(readFileSync(0, "utf8"));
const { applyFile, applyFolder, PatchError, readPatch } = await import(module);

const results = [];
for (const job of jobs) {
  const start = performance.now();
  try {
    const made = await act(job);
    const milliseconds = performance.now() - start;
    for (const [path, bytes] of made) write(join(job.output, path), bytes);
    results.push({ files: made.size, milliseconds });
  } catch (error) {
    if (!(error instanceof PatchError)) throw error;
    results.push({ code: error.code, message: error.message });
  }
}
process.stdout.write(JSON.stringify(results));

async function act({ patch: file, folder, path, old }) {
  // at an odd address, as a part of a download may lie
  const whole = readFileSync(file);
  const moved = new Uint8Array(whole.length + 1).subarray(1);
  moved.set(whole);
  const patch = await readPatch(moved);
  if (path === undefined) return applyFolder(patch, read(folder));
  return new Map([[path, await applyFile(patch, path, old === null ? null : new Uint8Array(readFileSync(old)))]]);
}

function read(folder) {
  const entries = readdirSync(folder, { recursive: true, withFileTypes: true }).filter((entry) => entry.isFile());
  const paths = entries.map((entry) => join(entry.parentPath ?? entry.path, entry.name));
  return new Map(paths.map((path) => [relative(folder, path).split(sep).join("/"), new Uint8Array(readFileSync(path))]));
}

function write(path, bytes) {
  mkdirSync(dirname(path), { recursive: true });
  writeFileSync(path, bytes);
}
