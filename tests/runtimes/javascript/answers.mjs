// What transformers.js answers, in the form of `Exported.expected` of tests/runtimes/models.py. The same file runs in
// Node and in a page.

/** The answers to every input of a job, or why there are none: one that fails does not end the others. */
export async function answer(transformers, { task, model, dtype, device, inputs, new_tokens }) {
  const options = { max_new_tokens: new_tokens, do_sample: false };
  try {
    const pipe = await transformers.pipeline(task, model, { dtype, device, local_files_only: true });
    const answers = [];
    for (const input of inputs) answers.push(await ASK[kind(task)](pipe, input, options, transformers));
    await pipe.dispose();
    return { answers };
  } catch (error) {
    return { error: error.stack ?? String(error) };
  }
}

function kind(task) {
  return task === "token-classification" || task === "text-classification" ? "label" : task;
}

const numbers = (tensor) => tensor.tolist()[0].map(plain);
const plain = (value) => (Array.isArray(value) ? value.map(plain) : Number(value));

// `said` is what a user of the pipeline gets, `ids` and `output` are what the tokenizer and the model gave.
const ASK = {
  "text-generation": async (pipe, text, options) => {
    const encoded = pipe.tokenizer(text);
    const ids = numbers(encoded.input_ids);
    const { logits } = await pipe.model(encoded);
    const tokens = numbers(await pipe.model.generate({ ...encoded, ...options })).slice(ids.length);
    const [{ generated_text }] = await pipe(text, { ...options, return_full_text: false });
    return { ids, output: numbers(logits).at(-1), tokens, said: generated_text };
  },
  "text2text-generation": async (pipe, text, options, { Tensor }) => {
    const encoded = pipe.tokenizer(text);
    const start = BigInt(pipe.model.config.decoder_start_token_id);
    const decoder_input_ids = new Tensor("int64", [start], [1, 1]);
    const { logits } = await pipe.model({ ...encoded, decoder_input_ids });
    const tokens = numbers(await pipe.model.generate({ ...encoded, ...options })).slice(1);
    const [{ generated_text }] = await pipe(text, options);
    return { ids: numbers(encoded.input_ids), output: numbers(logits).at(-1), tokens, said: generated_text };
  },
  "automatic-speech-recognition": async (pipe, wave, options) => {
    const samples = Float32Array.from(wave);
    const { input_features } = await pipe.processor(samples);
    const all = numbers(await pipe.model.generate({ inputs: input_features, ...options }));
    const { text } = await pipe(samples, options);
    return { tokens: all.slice(all.length - options.max_new_tokens), said: text };
  },
  label: async (pipe, text) => {
    const encoded = pipe.tokenizer(text);
    const { logits } = await pipe.model(encoded);
    const options = pipe.task === "text-classification" ? { top_k: null } : { ignore_labels: [] };
    return { ids: numbers(encoded.input_ids), output: numbers(logits), said: await pipe(text, options) };
  },
  "fill-mask": async (pipe, text) => {
    const encoded = pipe.tokenizer(text);
    const ids = numbers(encoded.input_ids);
    const { logits } = await pipe.model(encoded);
    const output = numbers(logits)[ids.indexOf(pipe.tokenizer.mask_token_id)];
    return { ids, output, said: await pipe(text, { top_k: 3 }) };
  },
  "question-answering": async (pipe, [question, context]) => {
    const encoded = pipe.tokenizer(question, { text_pair: context });
    const { start_logits, end_logits } = await pipe.model(encoded);
    const output = [numbers(start_logits), numbers(end_logits)];
    return { ids: numbers(encoded.input_ids), output, said: await pipe(question, context) };
  },
  "feature-extraction": async (pipe, text) => {
    const ids = numbers(pipe.tokenizer(text).input_ids);
    return { ids, output: numbers(await pipe(text, { pooling: "mean" })) };
  },
  "image-classification": async (pipe, rows, _, { RawImage }) => {
    const image = new RawImage(Uint8ClampedArray.from(rows.flat(2)), rows[0].length, rows.length, 3);
    const { logits } = await pipe.model(await pipe.processor([image]));
    return { output: numbers(logits), said: await pipe(image, { top_k: null }) };
  },
};
