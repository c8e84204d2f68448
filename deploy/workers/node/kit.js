// A kit for workers of prism-relay: takes messages, does each once, acknowledges or rejects, reconnects, stops cleanly.
//
// Copy this file and types.d.ts into your project. Needs Node 18.17 or later, and amqplib. run() is all that a worker
// calls; settle() is the part without RabbitMQ, for your own tests.
//
// The order is: do the work, record it as done, acknowledge. A crash before the record repeats the work; a crash after
// it repeats nothing. So a handler must bear being called twice, or record the id itself, in the transaction of its
// work.
// @ts-check
'use strict';

const { once } = require('node:events');
const { setTimeout: sleep } = require('node:timers/promises');
const amqp = require('amqplib');

/** @typedef {import('./types').Envelope} Envelope */
/** @typedef {import('./types').ScanPayload} ScanPayload */
/** @typedef {import('./types').BodyShapePredictionPayload} BodyShapePredictionPayload */
/** @typedef {'done' | 'again' | 'failed' | 'gave up'} Outcome */
/** @typedef {(message: Message) => unknown} Handler May return a promise. */
/** @typedef {{ isDone(id: string): boolean | Promise<boolean>, markDone(id: string): unknown }} Store */

const DEAD = 'prism.dead'; // the exchange of dead letters
const TEST = 'prism-test'; // the header of messages of `prism-relay send --to-queue`
const FIRST_PAUSE_MAX = 2_000; // milliseconds
const GAVE_UP = 'prism-gave-up'; // the header of dead letters of a kit: the queue, and why
const REPLY_MAX = 10_000; // milliseconds, for what RabbitMQ has to answer

/** The message can never succeed. It becomes a dead letter at once; after any other error it is retried. */
class GiveUp extends Error {}

/** One event. `event` and the payloads have all fields, also those that the types do not name. */
class Message {
  /**
   * @param {string | undefined} id
   * @param {string | undefined} type
   * @param {Buffer} body
   * @param {Record<string, unknown>} [headers]
   * @param {boolean} [redelivered]
   */
  constructor(id, type, body, headers = {}, redelivered = false) {
    this.id = id ?? '';
    this.body = body;
    this.headers = headers;
    this.redelivered = redelivered;
    /** @private */ this.property = type;
    /** @private @type {Envelope | undefined} */ this.parsed = undefined;
  }

  /** The parsed body. Throws GiveUp if it is not an event. */
  get event() {
    this.parsed ??= parse(this.body);
    return this.parsed;
  }

  /** The event type. A type over 255 bytes is only in the body. */
  get type() {
    return this.property || this.event.eventType;
  }

  /** Whether the webhook was signed. If not, anybody may have sent it. */
  get verified() {
    return this.headers['prism-verified'] === 'true';
  }

  /** The payload of scan.processing.*; throws GiveUp if a documented field is missing or not a string. */
  scan() {
    return /** @type {ScanPayload} */ (this.fields(['scanId', 'userId', 'userToken', 'state']));
  }

  /** The payload of body_shape_prediction.processing.*; throws GiveUp as scan() does. */
  prediction() {
    const names = ['bodyShapePredictionId', 'scanId', 'userId', 'userToken', 'state'];
    return /** @type {BodyShapePredictionPayload} */ (this.fields(names));
  }

  /** @private @param {string[]} names */
  fields(names) {
    const { payload } = this.event;
    for (const name of names) {
      if (typeof payload[name] !== 'string') throw new GiveUp(`the payload's ${name} is missing or not a string`);
    }
    return payload;
  }
}

/** @param {Buffer} body @returns {Envelope} */
function parse(body) {
  let event;
  try {
    event = JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(body)); // drops a byte order mark
  } catch {
    throw new GiveUp('the body is not JSON'); // without the body, which contains a userToken
  }
  if (typeof event?.eventType !== 'string') throw new GiveUp('the body is not an event');
  const { payload } = event;
  if (typeof payload !== 'object' || payload === null || Array.isArray(payload)) {
    throw new GiveUp('the event has no payload');
  }
  return event;
}

/**
 * Which messages are done, in a SQLite database of node:sqlite (Node 22.13), better-sqlite3 or node-sqlite3-wasm. Any
 * object with isDone() and markDone() will do, such as one on your own database. Call purge() now and then: a duplicate
 * comes within minutes, a redriven dead letter within days.
 */
class SqliteStore {
  /** @param {{ exec(sql: string): unknown, prepare(sql: string): any }} database */
  constructor(database) {
    database.exec('PRAGMA busy_timeout = 5000'); // milliseconds to wait for another worker that writes
    database.exec('CREATE TABLE IF NOT EXISTS done (message_id TEXT PRIMARY KEY,'
      + ' at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP)');
    this.select = database.prepare('SELECT 1 AS found FROM done WHERE message_id = ?');
    this.insert = database.prepare('INSERT OR IGNORE INTO done (message_id) VALUES (?)');
    this.remove = database.prepare("DELETE FROM done WHERE at < datetime('now', ?)");
  }

  /** @param {string} id */
  isDone(id) {
    return Boolean(this.select.get(id));
  }

  /** @param {string} id */
  markDone(id) {
    this.insert.run(id);
  }

  /** @param {number} days */
  purge(days) {
    this.remove.run(`-${days} days`);
  }
}

/**
 * The handler of the type, else of its first words: `scan.processing.started`, `scan.processing`, `scan`.
 * @param {Map<string, Handler>} handlers
 * @param {string} type
 */
function handlerFor(handlers, type) {
  for (let words = type.split('.'); words.length > 0; words.pop()) {
    const handler = handlers.get(words.join('.'));
    if (handler) return handler;
  }
  throw new GiveUp('no handler for this type');
}

/**
 * The text in one line of a log: without control characters, and cut.
 * @param {unknown} text
 */
const clean = (text, limit = 200) => String(text).replace(/[^ -~]/g, '?').slice(0, limit);

/**
 * The routing key of the event. A message that returned from a retry queue has the key NAME:1 in its place; no event's
 * own key has a colon.
 * @param {string} routingKey
 * @param {string | undefined} type
 */
function firstKey(routingKey, type = '') {
  if (!routingKey.includes(':')) return routingKey;
  return /^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$/.test(type) ? type : 'invalid.event_type';
}

/**
 * Does the work of one message. Returns the outcome, and why it is not done: `done` and `again` are to be acknowledged,
 * `failed` is to be rejected, `gave up` is a dead letter.
 * @param {Message} message
 * @param {Map<string, Handler>} handlers
 * @param {Store} store
 * @returns {Promise<{ outcome: Outcome, reason?: string }>}
 */
async function settle(message, handlers, store) {
  try {
    if (!/^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i.test(message.id)) {
      throw new GiveUp('the message_id is not a UUID'); // it did not come from the relay
    }
    if (await store.isDone(message.id)) return { outcome: 'again' };
    void message.event; // throws GiveUp if the body is not an event
    // Choose by the type, not by the routing key: a retried message comes back with another routing key.
    await handlerFor(handlers, message.type)(message);
    await store.markDone(message.id);
    return { outcome: 'done' };
  } catch (error) {
    const reason = clean(error instanceof Error ? error.message || error.name : error);
    return { outcome: error instanceof GiveUp ? 'gave up' : 'failed', reason }; // any error fails only this message
  }
}

/**
 * Works until SIGTERM or Ctrl-C, which finish the current message.
 *
 * `handlers`: a function of a Message for each type or first words of types. `metrics` is called after each message
 * with its outcome (see settle()) and the seconds that it took.
 * @param {{ handlers: Map<string, Handler>, store: Store, url: string, queue: string, prefetch?: number,
 *   metrics?: (outcome: Outcome, message: Message, seconds: number) => void }} options
 */
async function run({ handlers, store, url, queue, prefetch = 20, metrics = () => {} }) {
  const stop = new AbortController();
  const stopped = once(stop.signal, 'abort');
  let last = /** @type {Promise<void>} */ (Promise.resolve()); // the end of the current message
  let pauseMax = FIRST_PAUSE_MAX;
  if (!URL.canParse(url)) throw new Error('AMQP_URL is no URL'); // without the value, which contains a password
  const parsed = new URL(url);
  parsed.searchParams.set('heartbeat', '10');
  for (const signal of ['SIGTERM', 'SIGINT']) process.once(signal, () => stop.abort()); // a second signal exits at once
  // Exit anyway if the broker does not reply; the work takes as long as it takes.
  stopped.then(() => last).then(() => setTimeout(() => process.exit(), REPLY_MAX).unref());
  while (!stop.signal.aborted) {
    await consume().catch((error) => console.error(`connection: ${error.message || error.code}`));
    // A longer pause after each failure, and random, so that many workers do not reconnect at the same time.
    await sleep(1_000 + Math.random() * (pauseMax - 1_000), undefined, { signal: stop.signal }).catch(() => {});
    pauseMax = Math.min(2 * pauseMax, 30_000);
  }

  /** @param {string} name */
  function connect(name) {
    const clientProperties = { connection_name: `${name} ${queue}` };
    return amqp.connect(parsed.href, { timeout: REPLY_MAX, clientProperties });
  }

  // Handles messages until a signal arrives. Throws if the connection fails.
  async function consume() {
    const connection = await connect('worker');
    let over = false;
    /** @type {(error?: Error) => void} */
    let end = () => {};
    /** @type {Promise<Error | undefined>} */
    const trouble = new Promise((resolve) => { end = resolve; });
    trouble.then(() => { over = true; });
    connection.on('error', end).on('close', end);
    try {
      const channel = await connection.createChannel();
      channel.on('error', end);
      await channel.prefetch(prefetch);
      const { consumerTag } = await channel.consume(queue, (delivery) => {
        if (delivery === null) return end(new Error('the broker cancelled the consumer; the queue may be gone'));
        // One at a time, in the order of the queue. Prefetched messages that were not started return to the queue.
        last = last.then(() => (over || stop.signal.aborted ? undefined : handle(channel, delivery)));
        last = last.catch(end);
      });
      console.log(`consuming ${queue}`);
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

  /** @param {amqp.Channel} channel @param {amqp.ConsumeMessage} delivery */
  async function handle(channel, delivery) {
    const { messageId, type, headers } = delivery.properties;
    const message = new Message(messageId, type, delivery.content, headers, delivery.fields.redelivered);
    const began = performance.now();
    let { outcome, reason } = await settle(message, handlers, store);
    const [id, kind] = [messageId, type].map((name) => clean(name || '-', 255).replaceAll(' ', '?'));
    console.log(`${outcome} ${id} ${kind}${reason === undefined ? '' : `: ${reason}`}`);
    if (outcome === 'gave up' && !(await bury(delivery, reason))) outcome = 'failed';
    if (outcome === 'failed') {
      // To the retry queue, or to prism.dead without one; true would requeue it at once, in a hot loop.
      channel.reject(delivery, false);
    } else {
      channel.ack(delivery); // only after the work: if the worker dies first, the broker delivers it again
    }
    try {
      metrics(outcome, message, (performance.now() - began) / 1_000);
    } catch (error) {
      console.error(`metrics: ${error}`);
    }
  }

  /**
   * Publishes a copy to prism.dead, because a reject would go through all retries. Returns whether RabbitMQ confirmed
   * the copy; if not, the message is rejected.
   * @param {amqp.ConsumeMessage} delivery @param {string | undefined} reason
   */
  async function bury({ properties, fields, content }, reason) {
    const all = Object.entries(properties.headers ?? {}).filter(([name]) => !name.startsWith('x-'));
    // The tester counts rejects, and prism.dead is no place for tests.
    if (all.some(([name]) => name === TEST)) return false;
    const headers = { ...Object.fromEntries(all), [GAVE_UP]: `${queue}: ${reason}` };
    const key = firstKey(fields.routingKey, properties.type);
    /** @type {any} */
    let connection;
    try {
      // On a connection of its own: when RabbitMQ is short of memory or disk, it reads nothing more from a connection
      // that publishes, not even acks.
      connection = await connect('give-up');
      connection.on('error', () => {}); // the pending call throws as well
      const channel = await connection.createConfirmChannel();
      /** @type {Promise<never>} */
      const refused = new Promise((_, reject) => {
        connection.on('error', reject);
        channel.on('error', reject).on('return', () => reject(new Error('no queue takes it')));
        setTimeout(() => reject(new Error('no confirm in time')), REPLY_MAX).unref();
      });
      channel.publish(DEAD, key, content, { ...properties, headers, mandatory: true });
      await Promise.race([channel.waitForConfirms(), refused]);
      connection.close().catch(() => {});
      return true;
    } catch (error) {
      console.error(`cannot publish to ${DEAD}, so rejecting: ${error instanceof Error ? error.message : error}`);
      connection?.connection.stream.destroy(); // close() waits for an answer that a blocked connection does not get
      return false;
    }
  }
}

module.exports = { GiveUp, Message, SqliteStore, firstKey, run, settle };
