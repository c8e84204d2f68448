"""A worker for prism-relay: saves the body of each event as OUT/<message_id>.json. SIGTERM or Ctrl-C ends it.

Needs pika 1.2 or later. Change save() and HANDLERS for your own work."""
import logging
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

try:
    import pika
    from pika.exceptions import AMQPError
except ImportError:
    sys.exit(f"{sys.executable} has no pika. Make an environment that has it, and run this worker with its python:\n"
             "  python3 -m venv venv && venv/bin/pip install -r deploy/workers/python/requirements.txt")

URL = os.environ.get("AMQP_URL", "amqp://guest:guest@127.0.0.1:5672/%2f")
QUEUE = os.environ.get("QUEUE", "prism.scan")
OUT = Path(os.environ.get("OUT", "./out"))
PREFETCH = int(os.environ.get("PREFETCH", "20"))
stopping = False


def save(path, body):
    """Writes a temporary file and renames it, so that the file is complete or absent."""
    temporary = path.with_suffix(f".{os.urandom(8).hex()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # so that the new name survives a power loss
    os.close(folder)


# The handler for each first word of the event type. This example handles both in the same way.
HANDLERS = {"scan": save, "body_shape_prediction": save}


def work(message_id, kind, body):
    """Does the work of one message. Returns False if it was done before."""
    if not re.fullmatch(r"[0-9a-fA-F-]{36}", message_id):  # it becomes a file name
        raise ValueError("the message_id is not a UUID")
    # Choose by the type, not by the routing key: a retried message comes back with another routing key.
    handler = HANDLERS.get(kind.split(".")[0])
    if handler is None:
        raise ValueError("no handler for this type")
    path = OUT / f"{message_id}.json"
    if path.exists():  # a message may arrive twice; do its work once
        return False
    handler(path, body)
    return True


def handle(channel, tag, names, body):
    message_id, kind = (re.sub("[^!-~]", "?", name or "-") for name in names)  # keep control characters out of the log
    try:
        first = work(message_id, kind, body)
    except Exception as reason:  # any error fails only this message
        print(f"failed {message_id} {kind}: {reason}", flush=True)
        channel.basic_reject(tag, requeue=False)  # to the retry queue; True would requeue it at once, in a hot loop
    else:
        print(f"{'done' if first else 'again'} {message_id} {kind}", flush=True)
        channel.basic_ack(tag)  # only after the work: if the worker dies first, the broker delivers it again


def consume(parameters):
    """Handles messages until a signal arrives or the connection fails. Returns whether consuming began."""
    in_place = False
    try:
        with pika.BlockingConnection(parameters) as connection:
            channel = connection.channel()
            channel.basic_qos(prefetch_count=PREFETCH)
            # No heartbeats during the work: do work of over 20 s in a thread, and ack by add_callback_threadsafe().
            for method, properties, body in channel.consume(QUEUE, inactivity_timeout=0.5):
                if not in_place:
                    print(f"consuming {QUEUE}", flush=True)
                    in_place = True
                if stopping:
                    # An ack has no reply; the reply to this proves that the broker has it. Other messages are requeued.
                    channel.basic_cancel(channel.consumer_tags[0])
                    channel.close()
                    return True
                if method is not None:  # None: no message for half a second
                    handle(channel, method.delivery_tag, (properties.message_id, properties.type), body)
            raise ConnectionError("the broker cancelled the consumer; the queue may be gone")
    except (AMQPError, OSError) as trouble:
        print(f"connection: {trouble!r}", file=sys.stderr, flush=True)
    return in_place


def main():
    def stop(number, _frame):
        global stopping
        stopping = True
        signal.signal(number, signal.SIG_DFL)  # a second signal exits at once

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    logging.getLogger("pika").setLevel(logging.CRITICAL)  # consume() reports errors itself
    try:
        parameters = pika.URLParameters(URL)
    except ValueError:
        sys.exit("AMQP_URL is not an AMQP URL")  # without the value, which contains a password
    parameters.heartbeat = 10
    parameters.client_properties = {"connection_name": f"worker {QUEUE}"}
    longest = 1.0
    while not stopping:
        longest = 2.0 if consume(parameters) else min(2 * longest, 30.0)
        # A longer pause after each failure, and random, so that many workers do not reconnect at the same time.
        end = time.monotonic() + random.uniform(1.0, longest)
        while not stopping and time.monotonic() < end:
            time.sleep(0.2)


main()
