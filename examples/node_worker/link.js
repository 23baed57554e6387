// One life of a worker's connections: one for mail and signs of life, one for what is large or slow.

import { randomUUID } from 'node:crypto';
import { setTimeout as sleep } from 'node:timers/promises';
import amqp from 'amqplib';
import { PART, split, write } from './protocol.js';

const STALLED_MS = 60_000;
const USED_MS = 5 * 60_000;
const AHEAD = 4; // parts on their way at once
const DURABLE = new Set(['update', 'evaluation', 'first_weights', 'failure']);

/** What another attempt would not mend. */
export class Final extends Error {}

export class Link {
  constructor({ federation, id, queueType }) {
    Object.assign(this, { federation, id, queueType });
    [this.inbox, this.outbox] = ['inbox', 'outbox'].map((name) => `${federation}.${name}.${id}`);
    this.connections = [];
    this.timers = [];
    this.waiting = new Map(); // what to tell of each message that has no confirmation
    this.returned = new Set();
    this.lost = new Promise((resolve) => { this.lose = resolve; });
    this.lost.then((why) => {
      this.timers.forEach(clearInterval);
      this.waiting.forEach((tell) => tell(why));
    });
  }

  /**
   * Connect, declare and consume, and be ready when the federation's exchange is there.
   * `first` says that the process has just started: nobody may have this id, and old mail is dropped.
   */
  async open(url, first, onMail, onReturn) {
    try {
      this.control = await this.connect(url);
      this.upload = await this.connect(url);
      await this.declare(first);
      this.control.on('return', ({ properties }) => onReturn(properties.type));
      await this.control.consume(this.inbox, (message) => {
        if (message === null) return this.lose(new Error('the inbox is gone'));
        this.control.ack(message); // on receipt
        onMail(message.content);
      }, { exclusive: true });
      console.log(`[${this.id}] at the broker`);
      await Promise.race([this.federated(), this.lost.then((why) => { throw why; })]);
    } catch (why) {
      await this.close();
      const { message } = why;
      const taken = why.code === 405 || /in exclusive use/.test(message);
      // After a reconnection it may be our own former connection that the broker still holds.
      if (taken && first) throw new Final(`another worker is called ${this.id}`);
      const refused = [403, 406].includes(why.code) || /\b403\b/.test(message);
      if (refused && !taken) throw new Final(message);
      throw why;
    }
    this.timers.push(setInterval(() => this.watch(), 1000));
    // An outbox that nobody fetches from expires, also while its worker is there.
    this.timers.push(setInterval(() => this.use().catch(this.lose), USED_MS));
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
    if (this.queueType === 'quorum') {
      const lock = `${this.federation}.lock.inbox.${this.id}`;
      const how = { 'x-queue-type': 'classic' };
      await this.control.assertQueue(lock, { exclusive: true, durable: false, arguments: how });
    }
    const { consumerCount } = await this.use();
    if (first && consumerCount === 0) await this.control.purgeQueue(this.inbox);
  }

  /** Declare both queues, which counts as a use of them. */
  async use() {
    const how = { durable: true, arguments: { 'x-queue-type': this.queueType, 'x-expires': 1800000 } };
    const both = [this.inbox, this.outbox].map((name) => this.control.assertQueue(name, how));
    return (await Promise.all(both))[0];
  }

  /** Wait for the exchange that a coordinator declares; asking in vain costs a channel. */
  async federated() {
    for (;;) {
      const channel = await this.connections[0].createChannel();
      const gone = new Promise((resolve) => { channel.on('error', resolve); });
      try {
        await channel.checkExchange(`${this.federation}.results`);
        return await channel.close();
      } catch (why) {
        const { code } = await Promise.race([gone, this.lost]);
        if (code !== 404) throw why;
      }
      await sleep(1000);
    }
  }

  /** Give a sign of life, without waiting for anything. */
  say(kind, header, done = () => {}) {
    const id = `${kind}/${header.session}/${Date.now()}`;
    this.publish(this.control, kind, header, undefined, id).then(done, done);
  }

  /** Publish and wait for the confirmation; what is large goes in parts, and these first. */
  async send(kind, header, payload, messageId, tell = () => {}) {
    let transfer;
    if (payload?.length > PART) {
      let parts;
      [transfer, parts] = split(randomUUID(), payload);
      await this.upload.purgeQueue(this.outbox);
      const underway = new Set();
      let arrived = 0;
      for (const [which, bytes] of parts) {
        const id = `part/${which.transfer}/${which.part}`;
        const one = this.publish(this.upload, 'part', which, bytes, id).then(() => {
          underway.delete(one);
          tell(++arrived, parts.length);
        });
        underway.add(one);
        one.catch(() => {}); // it is thrown where it is waited for
        if (underway.size >= AHEAD) await Promise.race(underway);
      }
      await Promise.all(underway);
      payload = undefined;
    }
    await this.publish(this.upload, kind, { ...header, transfer }, payload, messageId);
  }

  publish(channel, kind, header, payload, messageId) {
    const body = write(this.federation, kind, header, payload);
    const options = {
      mandatory: true, persistent: DURABLE.has(kind), contentType: 'application/msgpack',
      type: kind, messageId,
    };
    const content = Buffer.from(body.buffer, body.byteOffset, body.length);
    return new Promise((resolve, reject) => {
      const told = (why) => {
        this.waiting.delete(messageId);
        this.moved = performance.now();
        if (why) reject(why);
        else if (this.returned.delete(messageId)) reject(new Error('nobody takes it yet'));
        else resolve();
      };
      this.waiting.set(messageId, told);
      channel.publish(`${this.federation}.results`, `${kind}.${this.id}`, content, options, told);
    });
  }

  /** Lose the link when nothing is confirmed although nothing more leaves. */
  watch() {
    const left = this.connections.reduce(
      (sum, { connection: { stream } }) => sum + stream.bytesWritten - stream.writableLength, 0,
    );
    if (this.waiting.size === 0 || left !== this.left) this.moved = performance.now();
    this.left = left;
    if (performance.now() - this.moved > STALLED_MS) this.lose(new Error('nothing is confirmed'));
  }

  async close() {
    this.lose(new Error('closed'));
    const closing = this.connections.map((connection) => connection.close().catch(() => {}));
    await Promise.race([Promise.all(closing), sleep(1000, undefined, { ref: false })]);
    this.connections.forEach(({ connection: { stream } }) => stream.destroy());
  }
}
