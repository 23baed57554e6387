// Checks protocol.js against docs/protocol/vectors.json: [VECTORS=path] node --test

import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import test from 'node:test';
import { decode } from '@msgpack/msgpack';
import { Malformed, open, read, write } from './protocol.js';

const path = process.env.VECTORS ?? new URL('../../docs/protocol/vectors.json', import.meta.url);
const vectors = JSON.parse(readFileSync(path, 'utf8'));
const bytes = (base64) => Uint8Array.from(Buffer.from(base64, 'base64'));
const FROM_COORDINATOR = [
  'welcome', 'refusal', 'verdict', 'init_request', 'fit', 'evaluate', 'stop', 'part',
];
// These are about fields of an update, which a worker never receives, or need a distinction between
// floats and integers, which JavaScript does not have.
const NOT_APPLICABLE = new Set([
  'a wildcard for a name', 'no base', 'a number of examples that is a float',
  'a number of examples that is a bool', 'no examples', 'a duration that is NaN',
  'a metric that is infinite', 'NaN',
]);

for (const { name, body, header, payload_bytes: size } of vectors.sound) {
  test(`sound: ${name}`, () => {
    const [{ pad, ...got }, payload] = open(bytes(body));
    assert.deepEqual(got, header);
    assert.equal(payload.length, size);
    const readIt = () => read(bytes(body), 'letters')[0].kind;
    const optional = header.critical?.includes('frozen'); // a feature that this worker lacks
    if (FROM_COORDINATOR.includes(header.kind) && !optional) assert.equal(readIt(), header.kind);
    else assert.throws(readIt, Malformed);
    assert.throws(() => read(bytes(body), 'another'), Malformed);
    const { protocol, federation, kind, ...rest } = header;
    assert.deepEqual(open(write(federation, kind, rest, payload))[0], header);
  });
}

for (const { name, body } of vectors.unsound) {
  if (NOT_APPLICABLE.has(name)) continue;
  if (name === 'an unknown key that is critical') continue; // depends on the kind; tested below
  test(`unsound: ${name}`, () => assert.throws(
    () => (/^an unknown kind|^a fit/.test(name) ? read(bytes(body), 'letters') : open(bytes(body))),
    Malformed,
  ));
}

for (const { name, body, cause } of vectors.unsound_fits) {
  // The task itself checks that weights are finite.
  if (cause === 'not_finite') continue;
  test(`unsound fit: ${name}`, () => assert.throws(() => read(bytes(body), 'letters'), Malformed));
}

const sound = (kind) => bytes(vectors.sound.find(({ header }) => header.kind === kind).body);

function changed(kind, change) {
  const [{ protocol, federation, kind: _, ...header }, payload] = decode(sound(kind));
  return write(federation, kind, { ...header, ...change }, payload);
}

test('unknown keys are ignored, unless they are critical', () => {
  const fit = (change) => () => read(changed('fit', change), 'letters');
  const plan = { epochs: 1, batch_size: 1, seed: 0, later: 1 };
  assert.equal(fit({ later: { on: [1] }, plan })()[0].kind, 'fit');
  assert.equal(fit({ critical: ['base'] })()[0].kind, 'fit');
  assert.throws(fit({ later: 1, critical: ['later'] }), (why) => why.header.kind === 'fit');
});

test('a fit with a wrong field is refused', () => {
  for (const change of [
    { base: undefined }, { round: 0 }, { round: true }, { evaluate: 1 }, { plan: { epochs: 0 } }, { run: '' },
    { attempt: -1 }, { tensors: undefined }, { tensors: [{}] },
  ]) {
    assert.throws(() => read(changed('fit', change), 'letters'), Malformed, JSON.stringify(change));
  }
});
