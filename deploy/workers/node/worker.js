// A worker for prism-relay: saves the body of each event as OUT/<message_id>.json. SIGTERM or Ctrl-C ends it.
//
// Needs Node 18.17 or later, and amqplib (npm install). Change save() and the handlers; kit.js does the rest.
// @ts-check
'use strict';

const { randomBytes } = require('node:crypto');
const { existsSync } = require('node:fs');
const { open, rename, rm } = require('node:fs/promises');
const path = require('node:path');
const { run } = require('./kit');

/** @typedef {InstanceType<typeof import('./kit').Message>} Message */

const { AMQP_URL = 'amqp://guest:guest@127.0.0.1:5672/%2f', QUEUE = 'prism.scan', OUT = './out' } = process.env;
const PREFETCH = Number(process.env.PREFETCH ?? 20);

/** @param {string} id */
const file = (id) => path.join(OUT, `${id}.json`);

// The store of this example: a message is done when its file exists, so work and record are one step.
const files = {
  /** @param {string} id */
  isDone: (id) => existsSync(file(id)),
  markDone: () => {},
};

/** @param {Message} message */
async function onScan(message) {
  const scan = message.scan(); // typed: scan.scanId, scan.state; a new state is a string like the others
  await save(message);
}

/** @param {Message} message */
async function onPrediction(message) {
  const prediction = message.prediction();
  await save(message);
}

/**
 * Writes a temporary file and renames it, so that the file is complete or absent.
 * @param {Message} message
 */
async function save(message) {
  const temporary = path.join(OUT, `${message.id}.${randomBytes(8).toString('hex')}.tmp`);
  try {
    await withFile(temporary, 'wx', async (handle) => {
      await handle.writeFile(message.body);
      await handle.sync();
    });
    await rename(temporary, file(message.id));
  } finally {
    await rm(temporary, { force: true });
  }
  await withFile(OUT, 'r', (folder) => folder.sync()); // so that the new name survives a power loss
}

/**
 * @param {string} name
 * @param {string} flags
 * @param {(handle: import('node:fs/promises').FileHandle) => Promise<void>} use
 */
async function withFile(name, flags, use) {
  const handle = await open(name, flags);
  try {
    await use(handle);
  } finally {
    await handle.close();
  }
}

// By type, or by its first words. Any other type becomes a dead letter, where a person sees it.
const handlers = new Map([['scan.processing', onScan], ['body_shape_prediction.processing', onPrediction]]);

run({ handlers, store: files, url: AMQP_URL, queue: QUEUE, prefetch: PREFETCH });
