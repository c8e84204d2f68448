// Runs ../vectors through settle() of kit.js, with handlers as in worker.js. Copy it to test your own handlers.
// @ts-check
'use strict';

const assert = require('node:assert/strict');
const { createHmac } = require('node:crypto');
const { readFileSync } = require('node:fs');
const path = require('node:path');
const { Database } = require('node-sqlite3-wasm');
const { Message, SqliteStore, firstKey, settle } = require('./kit');

/** @param {string} name @returns {any[]} */
const vectors = (name) => JSON.parse(readFileSync(path.join(__dirname, '../vectors', name), 'utf8'));

/** @typedef {(message: InstanceType<typeof Message>) => void} Handler */
/** @type {Map<string, Handler>} */
const handlers = new Map([
  ['scan.processing', /** @type {Handler} */ ((message) => check(message, message.scan()))],
  ['body_shape_prediction.processing', (message) => check(message, message.prediction())],
]);

/**
 * No field, state or type is lost.
 * @param {InstanceType<typeof Message>} message
 * @param {unknown} payload
 */
function check(message, payload) {
  const sent = JSON.parse(message.body.toString().replace(/^\ufeff/, ''));
  assert.deepEqual(message.event, sent);
  assert.deepEqual(payload, sent.payload);
}

/** @param {any} fields */
function message({ message_id, type, headers, redelivered, body, body_base64, pad = 0 }) {
  const text = body?.replace('PAD', 'x'.repeat(pad));
  const bytes = text === undefined ? Buffer.from(body_base64, 'base64') : Buffer.from(text);
  return new Message(message_id, type, bytes, headers, redelivered);
}

async function main() {
  const [cases, signatures] = [vectors('messages.json'), vectors('signatures.json')];
  const wrong = /** @type {string[]} */ ([]);
  let store = new SqliteStore(new Database());
  for (const { name, message: fields, expect } of cases) {
    const got = message(fields);
    const { outcome, reason } = await settle(got, handlers, store);
    if (outcome !== expect.outcome || got.verified !== (fields.headers['prism-verified'] === 'true')) {
      wrong.push(`${name}: ${outcome}, expected ${expect.outcome} (${reason})`);
    }
  }

  // An error of the handler, which is no GiveUp, is a failure that a retry may repair, and the message is not done.
  const broken = new Map([['scan', () => { throw new Error('the disk is full'); }]]);
  store = new SqliteStore(new Database());
  const outcomes = [];
  for (const one of [broken, handlers, handlers]) {
    outcomes.push((await settle(message(cases[0].message), one, store)).outcome);
  }
  if (outcomes.join() !== 'failed,done,again') wrong.push(`a handler that fails once: ${outcomes}`);

  // What a library says goes to the log, in one line.
  const rude = new Map([['scan', () => { throw new Error(`\ud800 \x1b[31mred\ndone nothing ${'x'.repeat(300)}`); }]]);
  const { outcome, reason = '' } = await settle(message(cases[0].message), rude, new SqliteStore(new Database()));
  if (outcome !== 'failed' || reason.length !== 200 || !reason.startsWith('? ?[31mred?done nothing x')) {
    wrong.push(`the reason of a failure: ${outcome} ${JSON.stringify(reason)}`);
  }

  for (const { why, routing_key, type, first_key } of vectors('first_keys.json')) {
    const got = firstKey(routing_key, type);
    if (got !== first_key) wrong.push(`${why}: ${got}`);
  }

  const database = new Database();
  const days = new SqliteStore(database);
  days.markDone('old');
  database.exec("UPDATE done SET at = datetime('now', '-8 days')");
  days.markDone('new');
  days.purge(7);
  if (days.isDone('old') || !days.isDone('new')) wrong.push('purge');

  for (const vector of signatures) {
    const signed = `${vector['prism-timestamp']}.${vector.body}`;
    const signature = createHmac('sha256', vector.secret).update(signed).digest('hex');
    if ((signature === vector['prism-signature']) !== vector.valid) wrong.push(`signature of ${vector['prism-timestamp']}`);
  }
  const right = `${cases.length} messages and ${signatures.length} signatures as expected`;
  console.log(wrong.join('\n') || right);
  process.exitCode = wrong.length > 0 ? 1 : 0;
}

main();
