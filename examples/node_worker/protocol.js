// The messages of docs/protocol.md: reading, checking and writing them, without a broker.

import { decode, encode } from '@msgpack/msgpack';

export const PROTOCOL = 2;
export const PART = 4 * 2 ** 20;
const MODEL = 'model'; // the only group of tensors that this worker uses
const EMPTY = new Uint8Array();
const HEADER_BYTES = 64 * 2 ** 10;
const TABLE_BYTES = 16 * 2 ** 20;
const MOST_BYTES = 8 * 2 ** 30;
const SIZES = {
  bfloat16: 2, float16: 2, float32: 4, float64: 8,
  int8: 1, int16: 2, int32: 4, int64: 8, uint8: 1, uint16: 2, uint32: 4, uint64: 8,
};

/** A message to ignore. It has a `header` if only the meaning of the message is unknown. */
export class Malformed extends Error {}

function need(sound, why) {
  if (!sound) throw new Malformed(why);
}

// --- checks of values ------------------------------------------------------------------------------

const int = (least = 0, most = Number.MAX_SAFE_INTEGER) => (v) =>
  Number.isInteger(v) && v >= least && v <= most;
const text = (least, most) => (v) =>
  typeof v === 'string' && v.length >= least && [...v].length <= most;
const number = (v) => Number.isFinite(v);
const bool = (v) => typeof v === 'boolean';
const map = (v) =>
  typeof v === 'object' && v !== null && Object.getPrototypeOf(v) === Object.prototype;
const list = (most, each) => (v) => Array.isArray(v) && v.length <= most && v.every(each);
const maybe = (check) => (v) => v === undefined || v === null || check(v);
const id = text(1, 64);
const reason = text(0, 2000);
const round = int(0, 1e9);
const scalar = (v) => bool(v) || number(v) || typeof v === 'string';

const COMPRESS = {
  kind: text(1, 32), fraction: maybe((v) => number(v) && v > 0 && v < 1),
  settings: maybe(text(1, 64)),
};
const PLAN = {
  epochs: maybe(int(1)),
  batch_size: maybe(int(1)),
  learning_rate: maybe((v) => number(v) && v > 0),
  seed: maybe(int(0, 2 ** 63)), // above 2^53 it loses digits, which does no harm to a seed
  deadline_s: maybe(number),
  compress: maybe((v) => map(v) && fields(v, COMPRESS)),
  extra: maybe((v) => v === 'model' || (map(v) && Object.values(v).every(list(32, int())))),
  train: maybe(list(1000, text(1, 500))),
  config: maybe((v) => map(v) && Object.values(v).every(scalar)),
};
const TRANSFER = {
  id, parts: int(1, 1e6), nbytes: int(1, MOST_BYTES), digest: maybe(text(64, 64)),
};
const ENTRY = {
  name: text(1, 500), dtype: (v) => Object.hasOwn(SIZES, v), shape: list(32, int()),
  offset: int(), nbytes: int(), group: maybe((v) => /^[a-z][a-z0-9_-]{0,31}$/.test(v)),
};
const COMMON = {
  protocol: (v) => v === PROTOCOL,
  federation: (v) => typeof v === 'string' && /^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$/.test(v),
  kind: text(1, 64), critical: maybe(list(32, text(1, 64))), ext: maybe(map),
  key_id: maybe(text(1, 64)), signature: maybe(text(1, 2000)),
  sealed: (v) => v === undefined || v === null, // this worker cannot open sealed payloads
  pad: maybe((v) => v instanceof Uint8Array),
};
const TENSORS = { tensors: Array.isArray, transfer: maybe(map) };
/** The messages that a coordinator sends, with their fields. */
const KINDS = {
  welcome: { run: id, round, rounds: int() },
  refusal: { session: id, reason, code: maybe(text(0, 64)) },
  verdict: {
    run: id, round, base: id, outcome: text(1, 64), reason, cause: maybe(text(0, 64)),
    train_again: maybe(bool), sequence: maybe(int(1)),
  },
  init_request: { run: id, seed: int(0, 2 ** 63) },
  fit: {
    run: id, round: int(1, 1e9), base: id, evaluate: bool, plan: (v) => map(v) && fields(v, PLAN),
    sequence: maybe(int(1)), attempt: maybe(int()), ...TENSORS,
  },
  evaluate: { run: id, round, base: id, ...TENSORS },
  stop: { run: id, round, outcome: text(1, 64), reason },
  part: { transfer: id, part: int() },
};

function fields(values, checks) {
  for (const [key, check] of Object.entries(checks)) {
    need(check(Object.hasOwn(values, key) ? values[key] : undefined), `${key} is missing or wrong`);
  }
  return true;
}

// --- reading ---------------------------------------------------------------------------------------

const LIMITS = {
  maxArrayLength: 100_000,
  maxMapLength: 100_000,
  mapKeyConverter(key) {
    need(typeof key === 'string', 'a key is not a string');
    return key;
  },
  extensionCodec: {
    tryToEncode: () => null,
    decode: () => need(false, 'an ext type'),
  },
};

/** Decode a body and check what all kinds of messages have in common. */
export function open(body) {
  let document;
  try {
    document = decode(body, LIMITS);
  } catch (why) {
    throw new Malformed(`not one msgpack document: ${why.message}`);
  }
  need(Array.isArray(document) && document.length === 2, 'not an array of [header, payload]');
  const [header, payload] = document;
  need(map(header), 'the header is not a map');
  need(payload instanceof Uint8Array, 'the payload is missing');
  const limit = HEADER_BYTES + ('tensors' in header ? TABLE_BYTES : 0);
  need(body.length - payload.length <= limit, 'the header has too many bytes');
  fields(header, COMMON);
  const { transfer } = header;
  if (header.kind !== 'part' && transfer) {
    fields(transfer, TRANSFER);
    need(transfer.parts === Math.ceil(transfer.nbytes / PART), 'parts that do not match nbytes');
    need(payload.length === 0, 'a payload in addition to parts');
  }
  if (header.kind === 'part') return [header, payload];
  const bytes = transfer ? transfer.nbytes : payload.length;
  if (Array.isArray(header.tensors)) checkTable(header.tensors, bytes);
  else need(bytes === 0, 'bytes that belong to no tensor');
  return [header, payload];
}

/** Read a message of this federation's coordinator; throw Malformed if it is to be ignored. */
export function read(body, federation) {
  const [header, payload] = open(body);
  need(header.federation === federation, `the message belongs to federation ${header.federation}`);
  need(Object.hasOwn(KINDS, header.kind), `a message of kind ${header.kind}`);
  const known = { ...COMMON, ...KINDS[header.kind] };
  const unknown = (header.critical ?? []).filter((key) => !Object.hasOwn(known, key));
  fields(header, KINDS[header.kind]);
  if (unknown.length) {
    const why = new Malformed(`it depends on ${unknown}, which this worker does not know`);
    throw Object.assign(why, { header });
  }
  return [header, payload];
}

function checkTable(table, bytes) {
  const names = new Set();
  const groups = new Set();
  let last;
  let end = 0;
  for (const entry of table) {
    need(map(entry), 'an entry of tensors is not a map');
    fields(entry, ENTRY);
    need(Object.keys(entry).every((key) => Object.hasOwn(ENTRY, key)),
      'an unknown key in an entry of tensors');
    const { name, dtype, shape, offset, nbytes, group = MODEL } = entry;
    const key = `${group}:${name}`;
    need(!names.has(key), `${name} appears twice`);
    names.add(key);
    need(group === last || !groups.has(group), `the group ${group} is not in one piece`);
    groups.add(group);
    last = group;
    need(nbytes === count(shape) * SIZES[dtype], `${name} cannot have ${nbytes} bytes`);
    need(offset % 64 === 0 && offset >= end && offset - end <= 4096, `${name}: wrong offset`);
    end = offset + nbytes;
  }
  need(end === bytes, `the tensors end at byte ${end} of ${bytes}`);
}

const count = (shape) => shape.reduce((product, n) => product * n, 1);

/** The model's tensors. Each has a copy of its bytes, because typed arrays must be aligned. */
export function tensors(table, payload) {
  const model = table.filter(({ group = MODEL }) => group === MODEL);
  return model.map(({ name, dtype, shape, offset, nbytes }) => ({
    name, dtype, shape, count: count(shape),
    bytes: new Uint8Array(payload.subarray(offset, offset + nbytes)),
  }));
}

/** A payload that arrives in parts. */
export class Incoming {
  constructor(header) {
    this.header = header;
    this.payload = new Uint8Array(header.transfer.nbytes);
    this.missing = new Set(Array(header.transfer.parts).keys());
  }

  /** Store a part; return whether it is a new part of this transfer. */
  add({ transfer, part }, bytes) {
    const start = part * PART;
    const size = Math.min(PART, this.payload.length - start);
    if (transfer !== this.header.transfer.id || bytes.length !== size) return false;
    if (!this.missing.delete(part)) return false;
    this.payload.set(bytes, start);
    return true;
  }
}

// --- writing ---------------------------------------------------------------------------------------

/** Return the table and the payload of tensors, each {name, dtype, shape, bytes}. */
export function pack(arrays) {
  const table = [];
  let end = 0;
  for (const { name, dtype, shape, bytes } of arrays) {
    const offset = Math.ceil(end / 64) * 64;
    table.push({ name, dtype, shape, offset, nbytes: bytes.length });
    end = offset + bytes.length;
  }
  const payload = new Uint8Array(end);
  table.forEach(({ offset }, n) => payload.set(arrays[n].bytes, offset));
  return { tensors: table, payload };
}

/** Return the body of a message; header fields that are undefined are left out. */
export function write(federation, kind, header, payload = EMPTY) {
  const complete = { protocol: PROTOCOL, federation, kind, ...header };
  return encode([complete, payload], { ignoreUndefined: true });
}

/** Split a large payload: return the message's `transfer` field, and each part as [header, bytes]. */
export function split(transfer, payload) {
  const parts = Array.from({ length: Math.ceil(payload.length / PART) }, (_, part) => [
    { transfer, part },
    payload.subarray(part * PART, (part + 1) * PART),
  ]);
  return [{ id: transfer, parts: parts.length, nbytes: payload.length }, parts];
}
