// A worker: node worker.js --url amqp://… --federation F --id W [--shard 0/3]

import { randomUUID } from 'node:crypto';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { Final, Link } from './link.js';
import { Incoming, Malformed, pack, PROTOCOL, read, tensors } from './protocol.js';
import { Regression } from './regression.js';

const IDLE = { state: 'idle', step: 0, steps: 0, loss: undefined };

/** Whether a plan trains this tensor; its `train` lists names, and prefixes that end with *. */
const trains = ({ train }, name) => !train || train.some((pattern) => (
  pattern.endsWith('*') ? name.startsWith(pattern.slice(0, -1)) : name === pattern));

class Worker {
  constructor(options) {
    this.options = options;
    this.task = new Regression(options);
    this.session = randomUUID();
    this.run = undefined; // the run of the last welcome or work
    this.status = { ...IDLE, round: 0 }; // the state in every heartbeat
    this.link = null; // set while connected to the federation
    this.work = null; // the current work: its header, and an AbortController that ends it
    this.answered = null; // the last update, to send again if its fit comes again
    this.incoming = null; // a message whose parts are still arriving
  }

  log(...words) {
    console.log(`[${this.options.id}]`, ...words);
  }

  // --- presence ----------------------------------------------------------------------------------

  /** Stay connected, reconnecting with backoff, until the worker leaves. */
  async live() {
    const { url, heartbeat } = this.options;
    setInterval(() => this.beat(), heartbeat * 1000);
    for (let wait = 0.2, first = true; ; wait = Math.min(2 * wait, 10)) {
      const link = new Link(this.options);
      try {
        await link.open(url, first, (body) => this.receive(body), (kind) => this.returned(link, kind));
        first = false;
        wait = 0.2;
        this.link = link;
        this.log('connected');
        this.greet();
        throw await link.lost;
      } catch (why) {
        if (this.leaving) return;
        if (why instanceof Final) return this.leave(1, why.message);
        this.log('no broker:', why.message);
      }
      this.link = null;
      await link.close();
      await sleep(wait * 1000 * (0.5 + Math.random()));
    }
  }

  greet() {
    this.link?.say('hello', { ...this.presence(), protocols: [PROTOCOL], features: [] });
  }

  /** The broker returned a message, because no queue is bound for it yet; repeat a hello. */
  async returned(link, kind) {
    if (kind !== 'hello') return;
    await sleep(1000);
    if (this.link === link) this.greet();
  }

  beat() {
    this.link?.say('heartbeat', this.presence());
  }

  /** The fields of a hello and a heartbeat. */
  presence() {
    const { id, heartbeat } = this.options;
    return {
      worker: id, session: this.session, num_examples: this.task.training.length,
      task: 'y = x·w + b, in JavaScript', classes: [], heartbeat_s: heartbeat, ...this.status,
    };
  }

  async leave(code, reason) {
    if (this.leaving) return;
    this.leaving = true;
    this.work?.abort.abort();
    this.log('leaves:', reason);
    const { link } = this;
    if (link && code === 0) {
      const bye = { worker: this.options.id, session: this.session, reason };
      await Promise.race([new Promise((done) => link.say('bye', bye, done)), sleep(2000)]);
    }
    await link?.close();
    process.exit(code);
  }

  // --- messages ----------------------------------------------------------------------------------

  receive(body) {
    let header, payload;
    try {
      [header, payload] = read(body, this.options.federation);
    } catch (why) {
      if (!(why instanceof Malformed)) throw why;
      this.log('ignores a message:', why.message);
      if (why.header?.kind === 'fit') this.fail(why.header, why.message);
      return;
    }
    if (this.leaving) return;
    const { kind, session, run } = header;
    if (kind === 'welcome') {
      this.log('welcome', run);
      this.run = run;
      this.beat();
    } else if (kind === 'refusal') {
      if (session === this.session) this.leave(1, `refused: ${header.reason}`);
    } else if (kind === 'stop') {
      if ((this.run ?? run) === run) this.leave(0, `the run has ${header.outcome}`);
    } else if (kind === 'verdict') {
      this.log('verdict', header.round, header.outcome, header.reason);
      if (header.train_again && same(this.answered?.header, header)) this.answered = null;
    } else if (kind === 'part') {
      this.addPart(header, payload);
    } else {
      this.begin(header, payload);
    }
  }

  addPart(header, payload) {
    if (!this.incoming?.add(header, payload)) return;
    // The coordinator sends everything again if this stops advancing, or after another hello.
    this.status.step = this.status.steps - this.incoming.missing.size;
    if (this.incoming.missing.size > 0) return;
    const complete = this.incoming;
    this.incoming = null;
    this.start(complete.header, complete.payload);
  }

  /** Start the work that a message asks for, unless it is done or under way; end older work. */
  begin(header, payload) {
    const { kind, run, round, base, attempt = 0 } = header;
    if (kind === 'fit') {
      const work = this.work?.header;
      const busy = work?.kind === 'fit' && same(work, header) && (work.attempt ?? 0) >= attempt;
      if (busy) return this.log('is at round', round, 'already');
    }
    this.incoming = null;
    this.run = run;
    if (!header.transfer || this.hasAnswered(header)) return this.start(header, payload);
    this.work?.abort.abort();
    this.work = null;
    this.incoming = new Incoming(header);
    this.status = { ...IDLE, state: 'receiving', steps: header.transfer.parts, run, round, base };
  }

  hasAnswered(header) {
    const { answered } = this;
    return header.kind === 'fit' && answered !== null && same(answered.header, header)
      && answered.attempt >= (header.attempt ?? 0);
  }

  async start(header, payload) {
    this.work?.abort.abort();
    const { kind, run, round = 0, base } = header;
    const work = { header, abort: new AbortController() };
    this.work = work;
    this.status = { ...IDLE, run, round, base };
    const report = (changes) => { if (this.work === work) Object.assign(this.status, changes); };
    const { signal } = work.abort;
    try {
      this.log(kind, round);
      await this[kind](header, payload, report, signal);
    } catch (why) {
      if (signal.aborted) return;
      this.log('failed:', why.stack);
      await this.fail(header, why.message, signal);
    }
    report(IDLE);
    if (this.work === work) this.work = null;
  }

  // --- work --------------------------------------------------------------------------------------

  async init_request({ run, seed }, _, report, signal) {
    const { tensors: table, payload } = pack(this.task.firstWeights(seed));
    report({ state: 'sending' });
    const header = { run, worker: this.options.id, tensors: table };
    await this.deliver('first_weights', header, payload, signal);
  }

  async evaluate(header, payload, report, signal) {
    report({ state: 'evaluating' });
    const result = this.task.evaluate(tensors(header.tensors, payload));
    const { run, round, base } = header;
    const evaluation = { run, round, base, worker: this.options.id, metrics: {}, ...result };
    await this.deliver('evaluation', evaluation, undefined, signal);
  }

  async fit(header, payload, report, signal) {
    if (!this.hasAnswered(header)) {
      const { run, round, base, sequence, plan, attempt = 0 } = header;
      if (plan.extra) throw new Error('this worker makes no extra tensors');
      const weights = tensors(header.tensors, payload);
      this.task.check(weights);
      if (!weights.some(({ name }) => trains(plan, name))) {
        throw new Error(`this model has none of the tensors ${plan.train}`);
      }
      // The evaluation is sent while we train.
      const evaluated = header.evaluate
        ? this.evaluate({ ...header, round: round - 1 }, payload, report, signal) : undefined;
      evaluated?.catch(() => {});
      const began = performance.now();
      report({ state: 'training' });
      const { delta, loss } = await this.task.train(
        weights, plan,
        (step, steps, now) => report({ step, steps, loss: Number.isFinite(now) ? now : undefined }),
        signal,
      );
      await evaluated;
      const packed = pack(delta.filter(({ name }) => trains(plan, name)));
      this.answered = {
        attempt, payload: packed.payload,
        header: {
          run, round, base, sequence, worker: this.options.id,
          num_examples: this.task.training.length,
          seconds: (performance.now() - began) / 1000, metrics: { loss }, tensors: packed.tensors,
        },
      };
    }
    const { header: update, payload: bytes } = this.answered;
    report({ state: 'sending', step: 0, steps: 0 });
    await this.deliver('update', update, bytes, signal, report);
    this.log('sent', update.round);
  }

  fail({ run, round = 0 }, reason, signal = AbortSignal.timeout(60_000)) {
    const { id: worker } = this.options;
    const header = { worker, session: this.session, run, round, reason: reason.slice(0, 2000) };
    return this.deliver('failure', header, undefined, signal).catch(() => {});
  }

  /** Send a message until it is confirmed, over as many links as that takes. */
  async deliver(kind, header, payload, signal, report = () => {}) {
    const { run, round, worker, sequence } = header;
    const name = [kind, run, round, worker, sequence === round ? undefined : sequence]
      .filter((each) => each !== undefined).join('/');
    for (let wait = 0.2; ; wait = Math.min(2 * wait, 10)) {
      while (!this.link) await sleep(100, undefined, { signal });
      signal.throwIfAborted();
      try {
        const onProgress = (step, steps) => report({ step, steps });
        return await this.link.send(kind, header, payload, name, onProgress);
      } catch (why) {
        this.log(`sending ${kind} again:`, why.message);
      }
      await sleep(wait * 1000, undefined, { signal });
    }
  }
}

/** Whether two headers have the same ticket, round and base. */
function same(one, other) {
  return one !== undefined && ['run', 'round', 'base', 'sequence'].every((key) => one[key] === other[key]);
}

const { values } = parseArgs({
  options: {
    url: { type: 'string', default: 'amqp://localhost' },
    federation: { type: 'string' },
    id: { type: 'string' },
    shard: { type: 'string', default: '0/1' },
    seed: { type: 'string', default: '7' },
    heartbeat: { type: 'string', default: '2' },
    pause: { type: 'string', default: '0' }, // seconds after every step, to watch it
    'queue-type': { type: 'string', default: 'classic' },
  },
});
if (!values.federation || !values.id) {
  console.error('usage: node worker.js --url amqp://… --federation F --id W [--shard 0/3]');
  process.exit(2);
}
const [seed, heartbeat, pause] = ['seed', 'heartbeat', 'pause'].map((name) => Number(values[name]));
const worker = new Worker({ ...values, queueType: values['queue-type'], seed, heartbeat, pause });
for (const name of ['SIGINT', 'SIGTERM']) process.on(name, () => worker.leave(0, `got ${name}`));
worker.live();
