// A worker for prism-relay: saves the body of each event as OUT/<message_id>.json. SIGTERM or Ctrl-C ends it.
//
// Needs Node 18.17 or later, and amqplib (npm install). What is yours to change is save() and HANDLERS.
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

// Writes a temporary file and renames it: the result is there whole, or not at all.
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
  await withFile(OUT, 'r', (folder) => folder.sync()); // so that the new name survives a power cut, too
}

async function withFile(name, flags, use) {
  const handle = await open(name, flags);
  try {
    await use(handle);
  } finally {
    await handle.close();
  }
}

// By the first word of the type. This example treats them alike.
const HANDLERS = new Map([['scan', save], ['body_shape_prediction', save]]);

// Does the work of one message; says whether this was the first time.
async function work(id, type, body) {
  if (!/^[0-9a-fA-F-]{36}$/.test(id)) throw new Error('the message_id is not a UUID'); // it becomes a file name
  // By the type, not by the routing key: when a message comes back for a retry, its routing key is another one.
  const handler = HANDLERS.get(type.split('.')[0]);
  if (!handler) throw new Error('no handler for this type');
  const file = path.join(OUT, `${id}.json`);
  if (existsSync(file)) return false; // a message can come twice, and its work is done once
  await handler(file, body);
  return true;
}

async function handle(channel, message) {
  const clean = (text) => (text || '-').replace(/[^!-~]/g, '?'); // nothing that could break a log line
  const [id, type] = [clean(message.properties.messageId), clean(message.properties.type)];
  let first;
  try {
    first = await work(id, type, message.content);
  } catch (reason) {
    console.log(`failed ${id} ${type}: ${reason.message}`);
    channel.reject(message, false); // to the retry queue; with true it would be back at once, in a hot loop
    return;
  }
  console.log(`${first ? 'done' : 'again'} ${id} ${type}`);
  channel.ack(message); // after the work: had we died in it, the message would come again
}

// Works until it is to stop. Throws if the connection fails.
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
      // One after the other, in the order of the queue. What was prefetched and not begun goes back to the queue.
      last = last.then(() => over || stop.signal.aborted || handle(channel, message)).catch(end);
    });
    console.log(`consuming ${QUEUE}`);
    pauseMax = FIRST_PAUSE_MAX;
    await Promise.race([trouble, stopped]);
    if (!stop.signal.aborted) throw (await trouble) ?? new Error('closed');
    await channel.cancel(consumerTag);
    await last; // what is in hand
    await channel.close(); // nothing answers an ack, but when the broker answers this, it has the last one
    await connection.close();
  } finally {
    await last;
    connection.close().catch(() => {}); // if it is open still
  }
}

async function main() {
  if (!URL.canParse(AMQP_URL)) throw new Error('AMQP_URL is no URL'); // and no more: there is a password in it
  const url = new URL(AMQP_URL);
  url.searchParams.set('heartbeat', '10');
  for (const signal of ['SIGTERM', 'SIGINT']) process.once(signal, () => stop.abort()); // a second one ends it at once
  stopped.then(() => setTimeout(() => process.exit(), 10_000).unref()); // if the broker does not answer
  while (!stop.signal.aborted) {
    await consume(url.href).catch((error) => console.error(`connection: ${error.message || error.code}`));
    // A longer pause after each failure, at random: many workers should not come back in step.
    await sleep(1_000 + Math.random() * (pauseMax - 1_000), undefined, { signal: stop.signal }).catch(() => {});
    pauseMax = Math.min(2 * pauseMax, 30_000);
  }
}

main();
