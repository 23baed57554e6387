// The task: y = x·w + b by gradient descent, on one shard of data generated from a seed.

import { setImmediate, setTimeout as sleep } from 'node:timers/promises';

const SLOPES = [2.0, -3.0, 0.5];
const INTERCEPT = 4.0;
const NOISE = 0.1;
const ROWS = 300;
const ARRAYS = { float32: Float32Array, float64: Float64Array };

export class Regression {
  /** Shard `i/n` has every n-th row from i on; the last tenth of them is held out. */
  constructor({ shard, seed, pause }) {
    const [index, shards] = shard.split('/').map(Number);
    if (!(index >= 0 && index < shards && shards <= ROWS / 10)) {
      throw new Error(`--shard ${shard} is not I/N with 0 <= I < N <= ${ROWS / 10}`);
    }
    const normal = normals(seed);
    const rows = Array.from({ length: ROWS }, () => {
      const x = SLOPES.map(normal);
      return { x, y: predict(x, SLOPES, INTERCEPT) + NOISE * normal() };
    }).filter((_, n) => n % shards === index);
    const cut = Math.floor(rows.length * 0.9);
    this.training = rows.slice(0, cut);
    this.heldOut = rows.slice(cut);
    this.pause = pause;
  }

  /** Return the first weights of a run: zeros, whatever the seed. */
  firstWeights() {
    return [asTensor('slopes', [3], [0, 0, 0]), asTensor('intercept', [], [0])];
  }

  /** Throw if the weights are not finite, or not those of this model. */
  check(weights) {
    const { w, b } = find(weights);
    if (![...w, b].every(Number.isFinite)) throw new Error('the weights are not finite');
  }

  evaluate(weights) {
    const { w, b } = find(weights);
    return { num_examples: this.heldOut.length, loss: loss(this.heldOut, w, b) };
  }

  /** Train; return the delta and the loss. onStep is called after each step; signal aborts. */
  async train(weights, plan, onStep, signal) {
    const { slopes, intercept, w, b: oldB } = find(weights);
    const oldW = [...w];
    let b = oldB;
    const [epochs, size] = [plan.epochs ?? 1, plan.batch_size ?? 32];
    // The operator's `--config learning_rate=` comes in the plan's config.
    const rate = plan.learning_rate ?? Number(plan.config?.learning_rate ?? 0.1);
    const batches = Math.ceil(this.training.length / size);
    const steps = epochs * batches;
    const losses = [];
    let rested = performance.now();
    for (let step = 0; step < steps; step++) {
      const start = (step % batches) * size;
      const batch = this.training.slice(start, start + size);
      losses.push(loss(batch, w, b));
      const errors = batch.map(({ x, y }) => predict(x, w, b) - y);
      const mean = (values) => values.reduce((sum, v) => sum + v, 0) / batch.length;
      w.forEach((_, n) => { w[n] -= rate * mean(errors.map((e, row) => 2 * e * batch[row].x[n])); });
      b -= rate * mean(errors.map((e) => 2 * e));
      onStep(step + 1, steps, losses.at(-1));
      // Let heartbeats and messages through.
      if (this.pause) await sleep(this.pause * 1000, undefined, { signal });
      else if (performance.now() - rested > 20) rested = await setImmediate(performance.now());
      signal.throwIfAborted();
    }
    if (![...w, b, ...losses].every(Number.isFinite)) throw new Error('the training diverged');
    const delta = weights.map((tensor) => {
      const { name, dtype, shape, bytes, count } = tensor;
      if (tensor === slopes) return asTensor(name, shape, w.map((v, n) => v - oldW[n]), dtype);
      if (tensor === intercept) return asTensor(name, shape, [b - oldB], dtype);
      // Any other tensor stays unchanged: its delta is zero.
      const whole = /int/.test(dtype);
      return { name, dtype: whole ? 'int64' : dtype, shape,
        bytes: new Uint8Array(whole ? 8 * count : bytes.length) };
    });
    return { delta, loss: losses.reduce((sum, v) => sum + v, 0) / losses.length };
  }
}

/** Find the slopes and the intercept among a model's tensors, by their number of values. */
function find(weights) {
  const sized = (n) => weights.find(({ dtype, count }) => dtype in ARRAYS && count === n);
  const [slopes, intercept] = [sized(SLOPES.length), sized(1)];
  if (!slopes || !intercept) throw new Error('the model lacks three slopes or an intercept');
  const [w, [b]] = [slopes, intercept].map((t) => [...new ARRAYS[t.dtype](t.bytes.buffer)]);
  return { slopes, intercept, w, b };
}

function asTensor(name, shape, values, dtype = 'float64') {
  return { name, dtype, shape, bytes: new Uint8Array(ARRAYS[dtype].from(values).buffer) };
}

const predict = (x, w, b) => x.reduce((sum, v, n) => sum + v * w[n], b);
const loss = (rows, w, b) =>
  rows.reduce((sum, { x, y }) => sum + (predict(x, w, b) - y) ** 2, 0) / rows.length;

/** Return a generator of normally distributed numbers (mulberry32, Box-Muller). */
function normals(seed) {
  let state = seed >>> 0;
  const uniform = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return (((t ^ (t >>> 14)) >>> 0) + 1) / 2 ** 32;
  };
  return () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform());
}
