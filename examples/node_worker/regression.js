// The task: y = x·w + b by gradient descent, on data that are made from a seed and shared out.

import { setImmediate, setTimeout as sleep } from 'node:timers/promises';

const SLOPES = [2.0, -3.0, 0.5];
const INTERCEPT = 4.0;
const NOISE = 0.1;
const ROWS = 300;
const ARRAYS = { float32: Float32Array, float64: Float64Array };

export class Regression {
  /** Shard `i/n` has every n-th row from i on; the last tenth of them is held out. */
  constructor({ shard, seed, pause }) {
    const [which, of] = shard.split('/').map(Number);
    if (!(which >= 0 && which < of && of <= ROWS / 10)) throw new Error(`no shard: ${shard}`);
    const normal = normals(seed);
    const rows = Array.from({ length: ROWS }, () => {
      const x = SLOPES.map(normal);
      return { x, y: predict(x, SLOPES, INTERCEPT) + NOISE * normal() };
    }).filter((_, n) => n % of === which);
    const cut = Math.floor(rows.length * 0.9);
    this.training = rows.slice(0, cut);
    this.heldOut = rows.slice(cut);
    this.pause = pause;
  }

  /** What a run begins with, where nobody has weights yet: zeros, whatever the seed. */
  firstWeights() {
    return [asTensor('slopes', [3], [0, 0, 0]), asTensor('intercept', [], [0])];
  }

  /** Refuse weights from which nothing can be learnt. */
  check(weights) {
    const { w, b } = find(weights);
    if (![...w, b].every(Number.isFinite)) throw new Error('the weights are not finite');
  }

  evaluate(weights) {
    const { w, b } = find(weights);
    return { num_examples: this.heldOut.length, loss: loss(this.heldOut, w, b) };
  }

  /** Train and return what changed. `tell` hears of each step; `signal` ends it. */
  async train(weights, plan, tell, signal) {
    const { slopes, intercept, w, b: given } = find(weights);
    const before = [...w];
    let b = given;
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
      tell(step + 1, steps, losses.at(-1));
      // Heartbeats and mail come in between.
      if (this.pause) await sleep(this.pause * 1000, undefined, { signal });
      else if (performance.now() - rested > 20) rested = await setImmediate(performance.now());
      signal.throwIfAborted();
    }
    if (![...w, b, ...losses].every(Number.isFinite)) throw new Error('the training diverged');
    const delta = weights.map((tensor) => {
      const { name, dtype, shape, bytes, count } = tensor;
      if (tensor === slopes) return asTensor(name, shape, w.map((v, n) => v - before[n]), dtype);
      if (tensor === intercept) return asTensor(name, shape, [b - given], dtype);
      // Another task's tensor stays as it is.
      const whole = /int/.test(dtype);
      return { name, dtype: whole ? 'int64' : dtype, shape,
        bytes: new Uint8Array(whole ? 8 * count : bytes.length) };
    });
    return { delta, loss: losses.reduce((sum, v) => sum + v, 0) / losses.length };
  }
}

/** Find the slopes and the intercept among a model's tensors, by their size. */
function find(weights) {
  const sized = (n) => weights.find(({ dtype, count }) => dtype in ARRAYS && count === n);
  const [slopes, intercept] = [sized(SLOPES.length), sized(1)];
  if (!slopes || !intercept) throw new Error('this is no model of three slopes and an intercept');
  const [w, [b]] = [slopes, intercept].map((t) => [...new ARRAYS[t.dtype](t.bytes.buffer)]);
  return { slopes, intercept, w, b };
}

function asTensor(name, shape, values, dtype = 'float64') {
  return { name, dtype, shape, bytes: new Uint8Array(ARRAYS[dtype].from(values).buffer) };
}

const predict = (x, w, b) => x.reduce((sum, v, n) => sum + v * w[n], b);
const loss = (rows, w, b) =>
  rows.reduce((sum, { x, y }) => sum + (predict(x, w, b) - y) ** 2, 0) / rows.length;

/** Normally distributed numbers, always the same from one seed (mulberry32, Box-Muller). */
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
