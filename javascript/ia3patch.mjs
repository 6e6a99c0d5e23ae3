// Applies .ia3patch files, as docs/patch.md specifies them, to bytes in memory. For browsers and Node 18 or newer; no dependencies.
//
//   const patch = await readPatch(bytesOfThePatch);
//   const graph = await applyFile(patch, "onnx/model.onnx", bytesOfTheBase);
//
// A patch comes from elsewhere: nothing in it is believed before it is checked, and no bytes are given back whose SHA-256
// is not the one that the patch names.

const SCHEMA = "ia3-export/patch/1";
const KEY = "ia3-export";
const DIGEST = "ia3-export-sha256";
const LARGEST_HEADER = 100_000_000;
const LARGEST_STRIDE = 65536;
const WIDTH = { F64: 8, F32: 4, F16: 2, BF16: 2 };

/**
 * What is wrong with a patch, or with the bytes that it was to be applied to. `code` is one of
 *
 *   "damaged"          the patch contradicts itself or is cut short: fetch it again
 *   "unsupported"      it is no patch, or one of another version
 *   "already-patched"  the bytes are those that the patch makes
 *   "other-bytes"      the patch was made for other bytes, or a file is missing or in the way
 *   "failed"           there is too little memory, or no SHA-256 here
 */
export class PatchError extends Error {
  constructor(code, message) {
    super(message);
    this.name = "PatchError";
    this.code = code;
  }
}

/**
 * @typedef {{path: string, size: number, sha256: string}} FileState
 * @typedef {{kind: string, length: number, offset?: number, tensor?: string, dtype?: string, round?: string, to?: string,
 *   stride?: number, at?: number[], vector?: string, inner?: number}} Piece
 * @typedef {{path: string, from: FileState | null, to: FileState, pieces: Piece[]}} FileChange
 * @typedef {{tool: string, files: FileChange[], kept: FileState[], removed: FileState[],
 *   tensors: Map<string, {dtype: string, data: Uint8Array}>}} Patch
 */

/**
 * The patch in `bytes`, every rule of its format checked.
 *
 * @param {Uint8Array | ArrayBuffer} bytes kept, not copied: do not change them
 * @returns {Promise<Patch>}
 */
export async function readPatch(bytes) {
  const { metadata, tensors } = readContainer(asBytes(bytes, "the patch"));
  const text = metadata[KEY];
  if (text === undefined) throw new PatchError("unsupported", "this is a safetensors file, but no patch");
  if (metadata[DIGEST] !== (await sha256(new TextEncoder().encode(text)))) {
    throw damaged("its document does not have the SHA-256 that stands beside it");
  }
  const document = parse(text, "its document");
  if (document.schema !== SCHEMA) {
    const said = say(document.schema);
    throw new PatchError("unsupported", `this is no patch of this version: its schema is ${said}, not "${SCHEMA}"`);
  }
  const patch = {
    tool: textOf(document, "tool"),
    files: rowsOf(document, "files").map((row) => readChange(row, tensors)),
    kept: rowsOf(document, "kept").map((row) => readState(row)),
    removed: rowsOf(document, "removed").map((row) => readState(row)),
    tensors,
  };
  checkNames(patch);
  return patch;
}

/**
 * The new bytes of the file `path` alone: entries of a patch do not depend on each other.
 *
 * @param {Patch} patch
 * @param {string} path a file that the patch makes
 * @param {Uint8Array | ArrayBuffer | null} [oldBytes] the bytes of its `from` file, usually the one of that name; left as they
 *   are; nothing for a file that is new
 * @returns {Promise<Uint8Array>} with the size and the SHA-256 that the patch names
 */
export async function applyFile(patch, path, oldBytes = null) {
  const change = patch.files.find((entry) => entry.path === path);
  if (change === undefined) throw new PatchError("other-bytes", `the patch does not change ${path}`);
  if (change.from === null) return build(patch, change, null);
  if (oldBytes === null) throw new PatchError("other-bytes", `the bytes of ${change.from.path} are missing`);
  const old = asBytes(oldBytes, change.from.path);
  const found = { size: old.length, sha256: await sha256(old) };
  if (same(found, change.from)) return build(patch, change, old);
  if (same(found, change.to)) throw new PatchError("already-patched", `${path} is already patched`);
  throw new PatchError("other-bytes", `the patch is for other bytes: ${describe(change.from, found)}`);
}

/**
 * All files of the patched folder. Every file that the patch names is verified before the first is made; what the patch
 * does not name is not in the result.
 *
 * @param {Patch} patch
 * @param {Map<string, Uint8Array | ArrayBuffer>} files the folder's by path, parts joined by "/"
 * @returns {Promise<Map<string, Uint8Array>>} those that stay are the given ones, not copies
 */
export async function applyFolder(patch, files) {
  const before = statesBefore(patch);
  const after = new Map([...patch.files.map(({ to }) => to), ...patch.kept].map((state) => [state.path, state]));
  const given = new Map();
  const found = new Map();
  for (const path of new Set([...before.keys(), ...after.keys()])) {
    if (!files.has(path)) continue;
    given.set(path, asBytes(files.get(path), path));
    found.set(path, { path, size: given.get(path).length, sha256: await sha256(given.get(path)) });
  }
  checkBefore(patch, before, after, found);
  const made = new Map();
  for (const change of patch.files) {
    made.set(change.path, await build(patch, change, change.from && given.get(change.from.path)));
  }
  for (const { path } of patch.kept) made.set(path, given.get(path));
  return made;
}

// --- what is there ---

function statesBefore(patch) {
  const olds = patch.files.map((change) => change.from).filter((state) => state !== null);
  return new Map([...olds, ...patch.removed, ...patch.kept].map((state) => [state.path, state]));
}

function checkBefore(patch, before, after, found) {
  const is = (state) => found.has(state.path) && same(found.get(state.path), state);
  const wrong = [...before.values()].filter((state) => !is(state));
  const taken = [...after.values()].filter((state) => !before.has(state.path) && found.has(state.path) && !is(state));
  if (!wrong.length && !taken.length) return;
  if ([...after.values()].every(is) && patch.removed.every(({ path }) => !found.has(path))) {
    throw new PatchError("already-patched", "these files are already patched");
  }
  if (!wrong.length) {
    throw new PatchError("other-bytes", `there is another ${taken[0].path}, which the patch would make`);
  }
  const other = wrong.filter((state) => !(after.has(state.path) && is(after.get(state.path))));
  if (!other.length) {
    throw new PatchError("other-bytes", `these files are patched in part: ${wrong[0].path} is what the patch makes of it`);
  }
  // the largest says most: a graph rather than a card
  const worst = other.reduce((most, state) => (state.size > most.size ? state : most));
  if (!found.has(worst.path)) throw new PatchError("other-bytes", `there is no ${worst.path}, which the patch was made for`);
  throw new PatchError("other-bytes", `the patch is for other files: ${describe(worst, found.get(worst.path))}`);
}

function same(found, state) {
  return found.size === state.size && found.sha256 === state.sha256;
}

function describe(state, found) {
  if (found.size !== state.size) return `${state.path} has ${found.size} bytes, not ${state.size}`;
  return `${state.path} has the SHA-256 ${found.sha256}, not ${state.sha256}`;
}

function asBytes(data, name) {
  if (data instanceof ArrayBuffer) return new Uint8Array(data);
  if (data instanceof Uint8Array) return data;
  throw new TypeError(`${name}: give a Uint8Array or an ArrayBuffer`);
}

async function sha256(bytes) {
  const digest = new Uint8Array(await (await subtleCrypto()).digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function subtleCrypto() {
  if (globalThis.crypto?.subtle) return globalThis.crypto.subtle;
  if (globalThis.process?.versions?.node) {
    const module = "node:crypto"; // Node 18; a name that bundlers for browsers do not look for
    return (await import(module)).webcrypto.subtle;
  }
  throw new PatchError("failed", "browsers compute SHA-256 in secure contexts alone: serve the page by https, or from localhost");
}

// --- the new bytes ---

async function build(patch, change, old) {
  if (new Uint8Array(new Uint16Array([1]).buffer)[0] !== 1) throw new PatchError("failed", "this machine is big-endian");
  const made = allocate(change.to);
  let done = 0;
  for (const piece of change.pieces) {
    const target = made.subarray(done, (done += piece.length));
    if (piece.kind === "copy") target.set(old.subarray(piece.offset, piece.offset + piece.length));
    else if (piece.kind === "raw") target.set(patch.tensors.get(piece.tensor).data);
    else if (piece.kind === "zlib") await inflate(patch.tensors.get(piece.tensor).data, target, piece.tensor);
    else fold(piece, vectorOf(patch, piece.vector), old.subarray(piece.offset), target);
  }
  const digest = await sha256(made);
  if (digest !== change.to.sha256) {
    throw damaged(`${change.path} did not become what it says: SHA-256 ${digest}, not ${change.to.sha256}`);
  }
  return made;
}

function allocate({ path, size }) {
  try {
    return new Uint8Array(size);
  } catch (error) {
    throw new PatchError("failed", `there is no memory for the ${size} bytes of ${path} (${error.message})`);
  }
}

function vectorOf(patch, name) {
  return new Float32Array(patch.tensors.get(name).data.slice().buffer); // a copy: the patch's bytes may lie unaligned
}

/** Fill `target` with the zlib stream `packed`, which must give as many bytes and end there. */
async function inflate(packed, target, name) {
  const wrong = (why) => damaged(`${name} does not decompress to ${target.length} bytes (${why})`);
  if (packed.length < 8) throw wrong("it is cut short");
  const stream = new DecompressionStream("deflate");
  const reader = stream.readable.getReader();
  // a little at a time, each when what came before has been read: a browser decompresses what it is given as a whole
  const feed = async () => {
    const writer = stream.writable.getWriter();
    for (let start = 0; start < packed.length; start += 4096) await writer.write(packed.slice(start, start + 4096));
    await writer.close();
  };
  const fed = feed().catch((error) => error);
  let done = 0;
  try {
    for (let block = await reader.read(); !block.done; block = await reader.read()) {
      if (done + block.value.length > target.length) throw new Error("it is longer");
      target.set(block.value, done);
      done += block.value.length;
    }
  } catch (error) {
    reader.cancel().catch(() => {});
    throw wrong(error.message);
  }
  const failed = await fed;
  if (failed !== undefined) throw wrong(failed.message);
  // Node does not mind bytes behind the stream, so its checksum must be the last four; the file has a digest in any case
  const last = new DataView(packed.buffer, packed.byteOffset + packed.length - 4);
  if (done !== target.length || last.getUint32(0) !== adler32(target)) throw wrong("it ends elsewhere");
}

function adler32(bytes) {
  let [low, high] = [1, 0];
  for (let start = 0; start < bytes.length; start += 2048) {
    const end = Math.min(start + 2048, bytes.length); // so few that the sums stay below 2^31
    for (let i = start; i < end; i++) high += low += bytes[i];
    low %= 65521;
    high %= 65521;
  }
  return high * 65536 + low;
}

// --- numbers in records ---

const BLOCK = 8192; // numbers at a time, which stay in the processor's cache
const STORED = new Uint8Array(8 * BLOCK); // the numbers as they are in the file, in its order of bytes
const HALVES = new Uint16Array(STORED.buffer);
const WORDS = new Uint32Array(STORED.buffer);
const LONGS = new Float64Array(STORED.buffer);
const FLOATS = new Float32Array(BLOCK); // the numbers and their products; those of F64 in DOUBLES
const BITS = new Uint32Array(FLOATS.buffer);
const DOUBLES = new Float64Array(BLOCK);
/** Bits of precision, the exponent of the smallest number, and from where on all is infinite. */
const NARROW = { F16: [11, -24, 65520], BF16: [8, -133, 2 ** 128 - 2 ** 119] };

/** Fill `made` with the records at the start of `old`, their numbers multiplied by `vector`. */
function fold(piece, vector, old, made) {
  const { dtype, round, to, at, inner } = piece;
  const read = { stride: piece.stride, width: WIDTH[dtype] };
  const written = { stride: madeStride(piece), width: WIDTH[to] };
  const records = made.length / written.stride;
  if (read.stride > read.width) made.set(old.subarray(0, made.length)); // what lies between the numbers
  for (const offset of at) {
    for (let first = 0; first < records; first += BLOCK) {
      const count = Math.min(BLOCK, records - first);
      gather(old, first * read.stride + offset, read, count);
      widen(dtype, count);
      multiply(dtype === "F64" ? DOUBLES : FLOATS, count, first, vector, inner);
      if (dtype === "F64") narrowDoubles(round, to, count);
      else roundFloats(round, to, count);
      store(dtype, to, count);
      scatter(made, first * written.stride + offset, written, count);
    }
  }
}

function madeStride({ dtype, to, stride }) {
  return WIDTH[dtype] === WIDTH[to] ? stride : WIDTH[to];
}

function gather(bytes, start, { stride, width }, count) {
  if (stride === width) {
    STORED.set(bytes.subarray(start, start + count * width));
    return;
  }
  for (let i = 0, from = start, k = 0; i < count; i++, from += stride) {
    for (let j = 0; j < width; j++) STORED[k++] = bytes[from + j];
  }
}

function scatter(bytes, start, { stride, width }, count) {
  if (stride === width) {
    bytes.set(STORED.subarray(0, count * width), start);
    return;
  }
  for (let i = 0, target = start, k = 0; i < count; i++, target += stride) {
    for (let j = 0; j < width; j++) bytes[target + j] = STORED[k++];
  }
}

function widen(dtype, count) {
  if (dtype === "F64") DOUBLES.set(LONGS.subarray(0, count));
  else if (dtype === "F32") BITS.set(WORDS.subarray(0, count));
  else if (dtype === "BF16") for (let i = 0; i < count; i++) BITS[i] = HALVES[i] << 16;
  else {
    const wide = wideHalves();
    for (let i = 0; i < count; i++) BITS[i] = wide[HALVES[i]];
  }
}

/** Of records from `first` on. Two float32 numbers have an exact product in float64, which is rounded where it is stored. */
function multiply(values, count, first, vector, inner) {
  let channel = Math.floor(first / inner) % vector.length;
  let left = inner - (first % inner);
  let factor = vector[channel];
  for (let i = 0; i < count; i++) {
    values[i] *= factor;
    if (--left === 0) {
      left = inner;
      if (++channel === vector.length) channel = 0;
      factor = vector[channel];
    }
  }
}

/** Make FLOATS numbers of `round`, where storing them as `to` will not; what is no number has the bits of the quiet NaN. */
function roundFloats(round, to, count) {
  for (let i = 0; i < count; i++) if ((BITS[i] & 0x7fffffff) > 0x7f800000) BITS[i] = 0x7fc00000;
  if (round === to) return;
  if (round === "BF16") for (let i = 0; i < count; i++) BITS[i] = bfloat16(BITS[i]) << 16;
  else if (round === "F16") {
    const wide = wideHalves();
    for (let i = 0; i < count; i++) BITS[i] = wide[float16(BITS[i])];
  }
}

/** Make DOUBLES numbers of `round` and then of `to`; those that are not float64 go to FLOATS, which holds them exactly. */
function narrowDoubles(round, to, count) {
  for (let i = 0; i < count; i++) {
    const value = nearest(nearest(DOUBLES[i], round), to);
    if (to === "F64") DOUBLES[i] = value;
    else if (value === value) FLOATS[i] = value;
    else BITS[i] = 0x7fc00000;
  }
}

function store(dtype, to, count) {
  if (to === "F32") WORDS.set(BITS.subarray(0, count));
  else if (to === "BF16") for (let i = 0; i < count; i++) HALVES[i] = bfloat16(BITS[i]);
  else if (to === "F16") for (let i = 0; i < count; i++) HALVES[i] = float16(BITS[i]);
  else {
    const values = dtype === "F64" ? DOUBLES : FLOATS;
    for (let i = 0; i < count; i++) {
      LONGS[i] = values[i];
      if (values[i] !== values[i]) [WORDS[2 * i], WORDS[2 * i + 1]] = [0, 0x7ff80000];
    }
  }
}

/** The bits of a float32, not a NaN with a payload, to bfloat16. */
function bfloat16(bits) {
  return (bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16;
}

/** The bits of a float32 to float16. */
function float16(bits) {
  const sign = (bits >>> 16) & 0x8000;
  const size = bits & 0x7fffffff;
  if (size > 0x7f800000) return 0x7e00;
  if (size >= 0x477ff000) return sign | 0x7c00; // 65520 and more
  if (size >= 0x38800000) return sign | ((size - 0x38000000 + 0xfff + ((size >>> 13) & 1)) >>> 13);
  if (size < 0x33000000) return sign; // less than half of the smallest
  const shift = 126 - (size >>> 23);
  const whole = (size & 0x7fffff) | 0x800000;
  const count = whole >>> shift;
  const rest = whole & ((1 << shift) - 1);
  const half = 1 << (shift - 1);
  return sign | (count + (rest > half || (rest === half && count & 1) ? 1 : 0));
}

let wideTable;

/** The bits of the float32 of every float16. */
function wideHalves() {
  if (wideTable !== undefined) return wideTable;
  const table = new Float32Array(65536);
  for (let half = 0; half < 65536; half++) {
    const [sign, exponent, rest] = [half & 0x8000 ? -1 : 1, (half >>> 10) & 31, half & 1023];
    if (exponent === 31) table[half] = rest ? NaN : sign * Infinity;
    else table[half] = sign * (exponent ? (1024 + rest) * 2 ** (exponent - 25) : rest * 2 ** -24);
  }
  wideTable = new Uint32Array(table.buffer);
  return wideTable;
}

const ONE = new Float64Array(1);
const ONE_WORDS = new Uint32Array(ONE.buffer);

/** A float64 to the nearest number of `dtype`, ties to even. */
function nearest(value, dtype) {
  if (dtype === "F64") return value;
  if (dtype === "F32") return Math.fround(value);
  const [precision, least, limit] = NARROW[dtype];
  const size = Math.abs(value);
  if (!(size < limit)) return value === value ? Math.sign(value) * Infinity : NaN;
  ONE[0] = size;
  const unit = Math.max((ONE_WORDS[1] >>> 20) - 1022 - precision, least);
  ONE_WORDS[0] = 0;
  ONE_WORDS[1] = (unit + 52 + 1023) << 20; // 2 ** (unit + 52): numbers from there on are whole multiples of 2 ** unit
  const rounded = size + ONE[0] - ONE[0];
  return value < 0 || Object.is(value, -0) ? -rounded : rounded;
}

// --- the patch file ---

function damaged(what) {
  return new PatchError("damaged", `the patch is damaged: ${what}`);
}

function parse(text, name) {
  let value;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw damaged(`${name} is no JSON (${error.message})`);
  }
  if (!isObject(value)) throw damaged(`${name} is no JSON object`);
  return value;
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** Metadata and tensors of a safetensors file, whose data must tile it without holes or overlap. */
function readContainer(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  if (bytes.length < 8) throw damaged(`it has ${bytes.length} bytes: was the download cut off?`);
  const length = view.getUint32(0, true) + view.getUint32(4, true) * 2 ** 32;
  if (length < 2 || length > LARGEST_HEADER || 8 + length > bytes.length) {
    throw damaged(`its header would be ${length} bytes, it has ${bytes.length}: was the download cut off?`);
  }
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes.subarray(8, 8 + length));
  } catch {
    throw damaged("its header is no UTF-8");
  }
  const header = parse(text, "its header");
  if (countKeys(header) !== countColons(text)) throw damaged("a name occurs twice in its header");
  const metadata = Object.hasOwn(header, "__metadata__") ? header.__metadata__ : {};
  if (!isObject(metadata) || !Object.values(metadata).every((value) => typeof value === "string")) {
    throw damaged("its __metadata__ is not a table of strings");
  }
  const rows = Object.entries(header).filter(([name]) => name !== "__metadata__").map(([name, row]) => readTensor(name, row));
  rows.sort((one, other) => one.begin - other.begin || one.end - other.end);
  let end = 0;
  for (const row of rows) {
    if (row.begin !== end) throw damaged(`tensor ${row.name} overlaps the one before it, or leaves a hole`);
    end = row.end;
  }
  const start = 8 + length;
  if (start + end !== bytes.length) throw damaged(`its tensors end at ${start + end}, it at ${bytes.length} bytes`);
  const data = (row) => ({ dtype: row.dtype, data: bytes.subarray(start + row.begin, start + row.end) });
  return { metadata, tensors: new Map(rows.map((row) => [row.name, data(row)])) };
}

function readTensor(name, row) {
  const [count, begin, end] = [row?.shape?.[0], row?.data_offsets?.[0], row?.data_offsets?.[1]];
  const width = { F32: 4, U8: 1 }[row?.dtype];
  const whole = [count, begin, end].every((number) => Number.isSafeInteger(number) && number >= 0);
  if (!whole || width === undefined || row.shape.length !== 1 || row.data_offsets.length !== 2) {
    throw damaged(`tensor ${name} is no vector of F32 and no bytes`);
  }
  if (end - begin !== count * width) throw damaged(`tensor ${name} has ${count} elements, but ${end - begin} bytes`);
  return { name, dtype: row.dtype, begin, end };
}

/** Names in a JSON value, however deep. */
function countKeys(value) {
  let count = 0;
  for (const left = [value]; left.length; ) {
    const each = left.pop();
    if (typeof each !== "object" || each === null) continue;
    if (!Array.isArray(each)) count += Object.keys(each).length;
    for (const below of Object.values(each)) left.push(below);
  }
  return count;
}

/** Colons of a JSON text outside of its strings. */
function countColons(text) {
  let [count, quoted] = [0, false];
  for (let i = 0; i < text.length; i++) {
    const letter = text.charCodeAt(i);
    if (letter === 34) quoted = !quoted;
    else if (letter === 92) i++; // a backslash
    else if (letter === 58 && !quoted) count++;
  }
  return count;
}

/** A JSON value for a message. */
function say(value) {
  return typeof value === "object" && value !== null ? "a list or an object" : JSON.stringify(value);
}

function textOf(row, key) {
  if (typeof row[key] !== "string") throw damaged(`${key} is ${say(row[key])}, no text`);
  return row[key];
}

function rowsOf(row, key) {
  if (!Array.isArray(row[key]) || !row[key].every(isObject)) throw damaged(`${key} is no list of objects`);
  return row[key];
}

function wholeNumber(value, key, least = 0) {
  if (!Number.isSafeInteger(value) || value < least) throw damaged(`${key} is ${say(value)}`);
  return value;
}

function readState(row, path = textOf(row, "path")) {
  if (!path.split("/").every(isPlain)) {
    throw damaged(`it names ${JSON.stringify(path)}, which is no plain path inside a folder`);
  }
  const sha256 = textOf(row, "sha256");
  if (!/^[0-9a-f]{64}$/.test(sha256)) throw damaged(`the sha256 of ${path} is ${JSON.stringify(sha256)}`);
  return { path, size: wholeNumber(row.size, "size"), sha256 };
}

/** Whether a part of a path means the same on every system. */
function isPlain(part) {
  const forbidden = /[\u0000-\u001f<>:"|?*\\]|[. ]$|\p{Surrogate}/u; // without a part of its own: ".", "..", and ""
  return part !== "" && !forbidden.test(part) && new TextEncoder().encode(part).length <= 255;
}

function readChange(row, tensors) {
  if (!(row.from === null || isObject(row.from)) || !isObject(row.to)) throw damaged("an entry of files has no from or to");
  const from = row.from === null ? null : readState(row.from);
  const to = readState(row.to, textOf(row, "path"));
  const pieces = rowsOf(row, "pieces").map((piece) => readPiece(piece, from, to.path, tensors));
  if (pieces.reduce((sum, { length }) => sum + length, 0) !== to.size) {
    throw damaged(`the pieces of ${to.path} do not add up to its ${to.size} bytes`);
  }
  return { path: to.path, from, to, pieces };
}

function readPiece(row, from, path, tensors) {
  const kind = textOf(row, "kind");
  const length = wholeNumber(row.length, "length", 1);
  if (kind === "zlib" || kind === "raw") {
    const name = textOf(row, "tensor");
    const tensor = tensors.get(name);
    const held = tensor?.dtype === "U8" ? tensor.data.length : 0;
    // deflate never makes more than 1032 bytes of one
    if (!held || (kind === "raw" && held !== length) || length > 1032 * held) {
      throw damaged(`${path}: ${name} does not decompress to ${length} bytes, or does not hold them`);
    }
    return { kind, length, tensor: name };
  }
  if (kind !== "copy" && kind !== "fold") {
    throw new PatchError("unsupported", `the patch has a piece of the unknown kind ${JSON.stringify(kind)}`);
  }
  const offset = wholeNumber(row.offset, "offset");
  const piece = kind === "copy" ? { kind, length, offset } : readFold(row, path, { kind, length, offset }, tensors);
  const taken = kind === "copy" ? length : (length / madeStride(piece)) * piece.stride;
  if (from === null || offset + taken > from.size) throw damaged(`${path}: a piece reads past the end of the old file`);
  return piece;
}

function readFold(row, path, place, tensors) {
  const [dtype, round, to, vector] = ["dtype", "round", "to", "vector"].map((key) => textOf(row, key));
  const [stride, inner] = [wholeNumber(row.stride, "stride", 1), wholeNumber(row.inner, "inner", 1)];
  if (![dtype, round, to].every((name) => Object.hasOwn(WIDTH, name))) {
    throw damaged(`${path}: ${dtype} to ${to}, rounded to ${round}, is no fold`);
  }
  const at = Array.isArray(row.at) ? row.at.map((number) => wholeNumber(number, "at")) : [];
  const fits = at.every((start, i) => start + WIDTH[dtype] <= (at[i + 1] ?? stride));
  if (!at.length || !fits || stride > LARGEST_STRIDE) {
    throw damaged(`${path}: numbers at ${at} do not fit records of ${stride} bytes`);
  }
  if (WIDTH[dtype] !== WIDTH[to] && stride !== WIDTH[dtype]) throw damaged(`${path}: ${dtype} to ${to} among other bytes`);
  const tensor = tensors.get(vector);
  if (tensor?.dtype !== "F32" || !tensor.data.length) throw damaged(`${path}: ${vector} is no vector`);
  const piece = { ...place, dtype, round, to, stride, at, vector, inner };
  if (place.length % madeStride(piece)) throw damaged(`${path}: ${place.length} bytes are no records of ${madeStride(piece)}`);
  return piece;
}

/**
 * No file twice, none that is a folder too, also where a system takes large letters for small ones; what is there before
 * and after comes from itself.
 */
function checkNames(patch) {
  const before = statesBefore(patch);
  const news = patch.files.map((change) => change.path);
  const [kept, removed] = [patch.kept, patch.removed].map((states) => states.map(({ path }) => path));
  for (const { path, from } of patch.files) {
    if (from !== null && !same(before.get(from.path), from)) throw damaged(`${from.path} has two digests`);
    if (before.has(path) && from?.path !== path) throw damaged(`${path} is replaced by another file`);
  }
  const after = new Set([...news, ...kept]);
  const gone = new Set([...before.keys()].filter((path) => !after.has(path)));
  if (gone.size !== new Set(removed).size || !removed.every((path) => gone.has(path))) {
    throw damaged("what it removes is not what is there before and not after");
  }
  for (const listed of [[...before.keys()], [...removed, ...kept], [...news, ...kept]]) {
    const names = listed.map((path) => path.toUpperCase().toLowerCase());
    const known = new Set(names);
    if (known.size !== names.length) throw damaged("a name occurs twice");
    for (const name of names) {
      for (let end = name.indexOf("/"); end !== -1; end = name.indexOf("/", end + 1)) {
        if (known.has(name.slice(0, end))) throw damaged(`${name.slice(0, end)} is a file and a folder`);
      }
    }
  }
}
