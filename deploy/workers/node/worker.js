// A worker for prism-relay: saves the body of each event as OUT/<message_id>.json. SIGTERM or Ctrl-C ends it.
//
// Needs Node 18.17 or later, and amqplib (npm install). Change save() and HANDLERS for your own work.
'use strict';

const { randomBytes } = require('node:crypto');
const { once } = require('node:events');
const { existsSync } = require('node:fs');
const { open, rename, rm } = require('node:fs/promises');
const path = require('node:path');
const { setTimeout: sleep } = require('node:timers/promises');
const amqp = require('amqplib');

const { AMQP_URL = 'amqp://guest:guest@127.0.0.1:5672/%2f', QUEUE = 'prism.scan', OUT = './out' } = process.env;
const PREFETCH = Number(process.env.PREFETCH ?? 20);
const FIRST_PAUSE_MAX = 2_000; // milliseconds
const stop = new AbortController();
const stopped = once(stop.signal, 'abort');
let pauseMax = FIRST_PAUSE_MAX;

// Writes a temporary file and renames it, so that the file is complete or absent.
async function save(file, body) {
  const temporary = file.replace(/json$/, `${randomBytes(8).toString('hex')}.tmp`);
  try {
    await withFile(temporary, 'wx', async (handle) => {
      await handle.writeFile(body);
      await handle.sync();
    });
    await rename(temporary, file);
  } finally {
    await rm(temporary, { force: true });
  }
  await withFile(OUT, 'r', (folder) => folder.sync()); // so that the new name survives a power loss
}

async function withFile(name, flags, use) {
  const handle = await open(name, flags);
  try {
    await use(handle);
  } finally {
    await handle.close();
  }
}

// The handler for each first word of the event type. This example handles both in the same way.
const HANDLERS = new Map([['scan', save], ['body_shape_prediction', save]]);

// Does the work of one message. Returns false if it was done before.
async function work(id, type, body) {
  if (!/^[0-9a-fA-F-]{36}$/.test(id)) throw new Error('the message_id is not a UUID'); // it becomes a file name
  // Choose by the type, not by the routing key: a retried message comes back with another routing key.
  const handler = HANDLERS.get(type.split('.')[0]);
  if (!handler) throw new Error('no handler for this type');
  const file = path.join(OUT, `${id}.json`);
  if (existsSync(file)) return false; // a message may arrive twice; do its work once
  await handler(file, body);
  return true;
}

async function handle(channel, message) {
  const clean = (text) => (text || '-').replace(/[^!-~]/g, '?'); // keep control characters out of the log
  const [id, type] = [clean(message.properties.messageId), clean(message.properties.type)];
  let first;
  try {
    first = await work(id, type, message.content);
  } catch (reason) {
    console.log(`failed ${id} ${type}: ${reason.message}`);
    channel.reject(message, false); // to the retry queue; true would requeue it at once, in a hot loop
    return;
  }
  console.log(`${first ? 'done' : 'again'} ${id} ${type}`);
  channel.ack(message); // only after the work: if the worker dies first, the broker delivers it again
}

// Handles messages until a signal arrives. Throws if the connection fails.
async function consume(url) {
  const clientProperties = { connection_name: `worker ${QUEUE}` };
  const connection = await amqp.connect(url, { timeout: 10_000, clientProperties });
  let [over, end, last] = [false, undefined, Promise.resolve()];
  const trouble = new Promise((resolve) => { end = resolve; }).then((error) => { over = true; return error; });
  connection.on('error', end).on('close', end);
  try {
    const channel = await connection.createChannel();
    channel.on('error', end);
    await channel.prefetch(PREFETCH);
    const { consumerTag } = await channel.consume(QUEUE, (message) => {
      if (message === null) return end(new Error('the broker cancelled the consumer; the queue may be gone'));
      // One at a time, in the order of the queue. Prefetched messages that were not started return to the queue.
      last = last.then(() => over || stop.signal.aborted || handle(channel, message)).catch(end);
    });
    console.log(`consuming ${QUEUE}`);
    pauseMax = FIRST_PAUSE_MAX;
    await Promise.race([trouble, stopped]);
    if (!stop.signal.aborted) throw (await trouble) ?? new Error('closed');
    await channel.cancel(consumerTag);
    await last; // finish the current message
    await channel.close(); // an ack has no reply; the reply to this proves that the broker has the last ack
    await connection.close();
  } finally {
    await last;
    connection.close().catch(() => {}); // if it is still open
  }
}

async function main() {
  if (!URL.canParse(AMQP_URL)) throw new Error('AMQP_URL is no URL'); // without the value, which contains a password
  const url = new URL(AMQP_URL);
  url.searchParams.set('heartbeat', '10');
  for (const signal of ['SIGTERM', 'SIGINT']) process.once(signal, () => stop.abort()); // a second signal exits at once
  stopped.then(() => setTimeout(() => process.exit(), 10_000).unref()); // exit anyway if the broker does not reply
  while (!stop.signal.aborted) {
    await consume(url.href).catch((error) => console.error(`connection: ${error.message || error.code}`));
    // A longer pause after each failure, and random, so that many workers do not reconnect at the same time.
    await sleep(1_000 + Math.random() * (pauseMax - 1_000), undefined, { signal: stop.signal }).catch(() => {});
    pauseMax = Math.min(2 * pauseMax, 30_000);
  }
}

main();
