// A link to the broker, from connecting until it is lost. It has two connections: one for the inbox
// and heartbeats, one for uploads, so that a long upload does not delay the heartbeats.

import { randomUUID } from 'node:crypto';
import { setTimeout as sleep } from 'node:timers/promises';
import amqp from 'amqplib';
import { PART, split, write } from './protocol.js';

const STALLED_MS = 60_000;
const REDECLARE_MS = 5 * 60_000;
const MAX_UNCONFIRMED_PARTS = 4;
const DURABLE = new Set(['update', 'evaluation', 'first_weights', 'failure']);

/** An error that retrying cannot fix. */
export class Final extends Error {}

export class Link {
  constructor({ federation, id, queueType }) {
    Object.assign(this, { federation, id, queueType });
    [this.inbox, this.outbox] = ['inbox', 'outbox'].map((name) => `${federation}.${name}.${id}`);
    this.connections = [];
    this.timers = [];
    this.unconfirmed = new Map(); // message id -> callback for its confirmation
    this.returned = new Set(); // ids of messages that the broker returned as unroutable
    this.lost = new Promise((resolve) => { this.lose = resolve; });
    this.lost.then((why) => {
      this.timers.forEach(clearInterval);
      this.unconfirmed.forEach((settle) => settle(why));
    });
  }

  /**
   * Connect, declare the queues, consume the inbox, and wait for the federation's exchange.
   * `first` says that the process has just started: nobody else may use this id, and messages left
   * in the inbox are dropped.
   */
  async open(url, first, onMail, onReturn) {
    try {
      this.user = decodeURIComponent(new URL(url).username) || 'guest';
      this.control = await this.connect(url);
      this.upload = await this.connect(url);
      await this.declare(first);
      this.control.on('return', ({ properties }) => onReturn(properties.type));
      await this.control.consume(this.inbox, (message) => {
        if (message === null) return this.lose(new Error('the inbox is gone'));
        this.control.ack(message); // on receipt: training may take longer than consumer_timeout
        onMail(message.content);
      }, { exclusive: true });
      console.log(`[${this.id}] at the broker`);
      await Promise.race([this.federated(), this.lost.then((why) => { throw why; })]);
    } catch (why) {
      await this.close();
      const { message } = why;
      const taken = why.code === 405 || /in exclusive use/.test(message);
      // After a reconnection, the consumer may be our own earlier one, which the broker still has.
      if (taken && first) throw new Final(`another worker is called ${this.id}`);
      const refused = [403, 406].includes(why.code) || /\b403\b/.test(message);
      if (refused && !taken) throw new Final(message);
      throw why;
    }
    this.timers.push(setInterval(() => this.watch(), 1000));
    // Without use, the outbox expires even while its worker is connected. Declaring counts as use,
    // except for a quorum queue.
    this.timers.push(setInterval(() => this.declareQueues().catch(this.lose), REDECLARE_MS));
  }

  async connect(url) {
    const heartbeat = url.includes('heartbeat=') ? '' : `${url.includes('?') ? '&' : '?'}heartbeat=10`;
    const connection = await amqp.connect(url + heartbeat, { timeout: 10_000, noDelay: true });
    this.connections.push(connection);
    const lose = (why) => this.lose(why ?? new Error('the connection was closed'));
    connection.on('error', lose).on('close', lose);
    const channel = await connection.createConfirmChannel();
    channel.on('error', lose).on('close', lose);
    channel.on('return', ({ properties }) => this.returned.add(properties.messageId));
    return channel;
  }

  async declare(first) {
    if (this.queueType === 'quorum') await this.lock();
    const { consumerCount } = await this.declareQueues();
    if (first && consumerCount === 0) await this.control.purgeQueue(this.inbox);
  }

  /** Declare both queues; return what the broker says about the inbox. */
  async declareQueues() {
    const unused = { [this.inbox]: 1800000, [this.outbox]: this.queueType === 'quorum' ? 86400000 : 1800000 };
    const both = Object.entries(unused).map(([name, expires]) => this.control.assertQueue(name, {
      durable: true, arguments: { 'x-queue-type': this.queueType, 'x-expires': expires },
    }));
    return (await Promise.all(both))[0];
  }

  /** Take one of two locks, and check that nobody has the other; see the protocol document. */
  async lock() {
    const options = { exclusive: true, durable: false, arguments: { 'x-queue-type': 'classic' } };
    const declare = (name) => this.ask((channel) => channel.assertQueue(name, options));
    let [mine, other] = ['lock', 'lock2'].map((kind) => `${this.federation}.${kind}.inbox.${this.id}`);
    let code = await declare(mine);
    if (code === 405) {
      [mine, other] = [other, mine];
      code = await declare(mine);
    }
    if (!code) code = await this.ask((channel) => channel.checkQueue(other));
    if (code !== 404) throw Object.assign(new Error(`the broker refuses a lock (${code})`), { code });
  }

  /** Wait for the exchange that a coordinator declares. */
  async federated() {
    const results = `${this.federation}.results`;
    for (;;) {
      const code = await this.ask((channel) => channel.checkExchange(results));
      if (!code) return;
      if (code !== 404) throw Object.assign(new Error(`the broker refuses ${results} (${code})`), { code });
      await sleep(1000);
    }
  }

  /** Make a request on a channel of its own, which a refusal closes; return the refusal's code. */
  async ask(request) {
    const channel = await this.connections[0].createChannel();
    const failed = new Promise((resolve) => { channel.on('error', resolve); });
    try {
      await request(channel);
      await channel.close();
      return 0;
    } catch (why) {
      const { code } = await Promise.race([failed, this.lost]);
      if (!code) throw why;
      return code;
    }
  }

  /** Send a presence message without waiting for its confirmation. */
  say(kind, header, done = () => {}) {
    const id = `${kind}/${header.session}/${Date.now()}`;
    this.publish(this.control, kind, header, undefined, id).then(done, done);
  }

  /** Publish a message and wait for its confirmation; a large payload goes first, in parts. */
  async send(kind, header, payload, messageId, onProgress = () => {}) {
    let transfer;
    if (payload?.length > PART) {
      let parts;
      [transfer, parts] = split(randomUUID(), payload);
      await this.upload.purgeQueue(this.outbox);
      const pending = new Set();
      let confirmed = 0;
      for (const [partHeader, bytes] of parts) {
        const id = `part/${partHeader.transfer}/${partHeader.part}`;
        const sent = this.publish(this.upload, 'part', partHeader, bytes, id).then(() => {
          pending.delete(sent);
          onProgress(++confirmed, parts.length);
        });
        pending.add(sent);
        sent.catch(() => {}); // handled where it is awaited
        if (pending.size >= MAX_UNCONFIRMED_PARTS) await Promise.race(pending);
      }
      await Promise.all(pending);
      payload = undefined;
    }
    await this.publish(this.upload, kind, { ...header, transfer }, payload, messageId);
  }

  publish(channel, kind, header, payload, messageId) {
    const body = write(this.federation, kind, header, payload);
    const options = {
      mandatory: true, persistent: DURABLE.has(kind), contentType: 'application/msgpack',
      type: kind, messageId, userId: this.user, // which --verify-users requires
    };
    const content = Buffer.from(body.buffer, body.byteOffset, body.length);
    return new Promise((resolve, reject) => {
      const settle = (why) => {
        this.unconfirmed.delete(messageId);
        this.progressAt = performance.now();
        if (why) reject(why);
        else if (this.returned.delete(messageId)) reject(new Error('no queue is bound for it yet'));
        else resolve();
      };
      this.unconfirmed.set(messageId, settle);
      channel.publish(`${this.federation}.results`, `${kind}.${this.id}`, content, options, settle);
    });
  }

  /** Drop the link if confirmations are due, but for a while nothing was sent or confirmed. */
  watch() {
    const sent = this.connections.reduce(
      (sum, { connection: { stream } }) => sum + stream.bytesWritten - stream.writableLength, 0,
    );
    if (this.unconfirmed.size === 0 || sent !== this.sent) this.progressAt = performance.now();
    this.sent = sent;
    if (performance.now() - this.progressAt > STALLED_MS) this.lose(new Error('nothing is confirmed'));
  }

  async close() {
    this.lose(new Error('closed'));
    const closing = this.connections.map((connection) => connection.close().catch(() => {}));
    await Promise.race([Promise.all(closing), sleep(1000, undefined, { ref: false })]);
    this.connections.forEach(({ connection: { stream } }) => stream.destroy());
  }
}
