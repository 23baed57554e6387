// A worker: node worker.js --url amqp://… --federation F --id W [--shard 0/3]

import { randomUUID } from 'node:crypto';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { Final, Link } from './link.js';
import { Incoming, Malformed, pack, PROTOCOL, read, tensors } from './protocol.js';
import { Regression } from './regression.js';

const IDLE = { state: 'idle', step: 0, steps: 0, loss: undefined };

/** Whether an update brings this tensor: names, or beginnings of names with a * behind them. */
const trains = ({ train }, name) => !train || train.some((one) => (
  one.endsWith('*') ? name.startsWith(one.slice(0, -1)) : name === one));

class Worker {
  constructor(options) {
    this.options = options;
    this.task = new Regression(options);
    this.session = randomUUID();
    this.run = undefined; // the run that we are in, from what came last
    this.at = { ...IDLE, round: 0 }; // what every heartbeat says
    this.link = null; // while there is one, and the federation is there
    this.work = null; // the mail that is worked on, and what ends that
    this.answered = null; // the last update, while its round may be asked for again
    this.incoming = null; // a message whose parts are still to come
  }

  log(...words) {
    console.log(`[${this.options.id}]`, ...words);
  }

  // --- being there -------------------------------------------------------------------------------

  async live() {
    const { url, heartbeat } = this.options;
    setInterval(() => this.beat(), heartbeat * 1000);
    for (let wait = 0.2, first = true; ; wait = Math.min(2 * wait, 10)) {
      const link = new Link(this.options);
      try {
        await link.open(url, first, (body) => this.receive(body), (kind) => this.unheard(link, kind));
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
    this.link?.say('hello', { ...this.life(), protocols: [PROTOCOL], features: [] });
  }

  /** A sign of life was returned: no queue is bound for it yet. */
  async unheard(link, kind) {
    if (kind !== 'hello') return;
    await sleep(1000);
    if (this.link === link) this.greet();
  }

  beat() {
    this.link?.say('heartbeat', this.life());
  }

  life() {
    const { id, heartbeat } = this.options;
    return {
      worker: id, session: this.session, num_examples: this.task.training.length,
      task: 'y = x·w + b, in JavaScript', classes: [], heartbeat_s: heartbeat, ...this.at,
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

  // --- mail --------------------------------------------------------------------------------------

  receive(body) {
    let header, payload;
    try {
      [header, payload] = read(body, this.options.federation);
    } catch (why) {
      if (!(why instanceof Malformed)) throw why;
      this.log('passes over:', why.message);
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
      this.take(header, payload);
    } else {
      this.begin(header, payload);
    }
  }

  take(header, payload) {
    if (!this.incoming?.add(header, payload)) return;
    // While this does not advance, or when we say hello again meanwhile, all of it is sent again.
    this.at.step = this.at.steps - this.incoming.missing.size;
    if (this.incoming.missing.size > 0) return;
    const whole = this.incoming;
    this.incoming = null;
    this.start(whole.header, whole.payload);
  }

  /** Begin what the mail asks for, unless that is done already or under way; it ends older work. */
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
    this.at = { ...IDLE, state: 'receiving', steps: header.transfer.parts, run, round, base };
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
    this.at = { ...IDLE, run, round, base };
    const tell = (what) => { if (this.work === work) Object.assign(this.at, what); };
    const { signal } = work.abort;
    try {
      this.log(kind, round);
      await this[kind](header, payload, tell, signal);
    } catch (why) {
      if (signal.aborted) return;
      this.log('failed:', why.stack);
      await this.fail(header, why.message, signal);
    }
    tell(IDLE);
    if (this.work === work) this.work = null;
  }

  // --- work --------------------------------------------------------------------------------------

  async init_request({ run, seed }, _, tell, signal) {
    const { tensors: table, payload } = pack(this.task.firstWeights(seed));
    tell({ state: 'sending' });
    const header = { run, worker: this.options.id, tensors: table };
    await this.deliver('first_weights', header, payload, `first_weights/${run}`, signal);
  }

  async evaluate(header, payload, tell, signal) {
    tell({ state: 'evaluating' });
    const result = this.task.evaluate(tensors(header.tensors, payload));
    const { run, round, base } = header;
    const told = { run, round, base, worker: this.options.id, metrics: {}, ...result };
    await this.deliver('evaluation', told, undefined, `evaluation/${run}/${round}`, signal);
  }

  async fit(header, payload, tell, signal) {
    if (!this.hasAnswered(header)) {
      const { run, round, base, sequence, plan, attempt = 0 } = header;
      if (plan.extra) throw new Error('this worker makes no extra tensors');
      const weights = tensors(header.tensors, payload);
      this.task.check(weights);
      // The evaluation goes while we train.
      const told = header.evaluate
        ? this.evaluate({ ...header, round: round - 1 }, payload, tell, signal) : undefined;
      told?.catch(() => {});
      const began = performance.now();
      tell({ state: 'training' });
      const { delta, loss } = await this.task.train(
        weights, plan,
        (step, steps, now) => tell({ step, steps, loss: Number.isFinite(now) ? now : undefined }),
        signal,
      );
      await told;
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
    tell({ state: 'sending', step: 0, steps: 0 });
    await this.deliver('update', update, bytes, `update/${update.run}/${update.round}`, signal, tell);
    this.log('sent', update.round);
  }

  fail({ run, round = 0 }, reason, signal = AbortSignal.timeout(60_000)) {
    const { id: worker } = this.options;
    const header = { worker, session: this.session, run, round, reason: reason.slice(0, 2000) };
    const name = `failure/${run}/${round}`;
    return this.deliver('failure', header, undefined, name, signal).catch(() => {});
  }

  /** Send a message until it is confirmed, over as many connections as that takes. */
  async deliver(kind, header, payload, messageId, signal, tell = () => {}) {
    for (let wait = 0.2; ; wait = Math.min(2 * wait, 10)) {
      while (!this.link) await sleep(100, undefined, { signal });
      signal.throwIfAborted();
      try {
        const arrived = (step, steps) => tell({ step, steps });
        const name = `${messageId}/${this.options.id}`;
        return await this.link.send(kind, header, payload, name, arrived);
      } catch (why) {
        this.log(`${kind} is sent again:`, why.message);
      }
      await sleep(wait * 1000, undefined, { signal });
    }
  }
}

/** Whether two headers are of the same ticket, from the same weights of the same round. */
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
