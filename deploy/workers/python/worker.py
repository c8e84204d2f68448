"""A worker for prism-relay: saves the body of each event as OUT/<message_id>.json. SIGTERM or Ctrl-C ends it.

Needs pika 1.2 or later. What is yours to change is save() and HANDLERS."""
import logging
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import pika
from pika.exceptions import AMQPError

URL = os.environ.get("AMQP_URL", "amqp://guest:guest@127.0.0.1:5672/%2f")
QUEUE = os.environ.get("QUEUE", "prism.scan")
OUT = Path(os.environ.get("OUT", "./out"))
PREFETCH = int(os.environ.get("PREFETCH", "20"))
stopping = False


def save(path, body):
    """Writes a temporary file and renames it: the result is there whole, or not at all."""
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
    os.fsync(folder)  # so that the new name survives a power cut, too
    os.close(folder)


# By the first word of the type. This example treats them alike.
HANDLERS = {"scan": save, "body_shape_prediction": save}


def work(message_id, kind, body):
    """Does the work of one message; says whether this was the first time."""
    if not re.fullmatch(r"[0-9a-fA-F-]{36}", message_id):  # it becomes a file name
        raise ValueError("the message_id is not a UUID")
    # By the type, not by the routing key: when a message comes back for a retry, its routing key is another one.
    handler = HANDLERS.get(kind.split(".")[0])
    if handler is None:
        raise ValueError("no handler for this type")
    path = OUT / f"{message_id}.json"
    if path.exists():  # a message can come twice, and its work is done once
        return False
    handler(path, body)
    return True


def handle(channel, tag, names, body):
    message_id, kind = (re.sub("[^!-~]", "?", name or "-") for name in names)  # nothing that could break a log line
    try:
        first = work(message_id, kind, body)
    except Exception as reason:  # whatever it is: this message has failed, the next one may not
        print(f"failed {message_id} {kind}: {reason}", flush=True)
        channel.basic_reject(tag, requeue=False)  # to the retry queue; True would make a hot loop
    else:
        print(f"{'done' if first else 'again'} {message_id} {kind}", flush=True)
        channel.basic_ack(tag)  # after the work: had we died in it, the message would come again


def consume(parameters):
    """Works until it is to stop or the connection fails; says whether it got as far as consuming."""
    in_place = False
    try:
        with pika.BlockingConnection(parameters) as connection:
            channel = connection.channel()
            channel.basic_qos(prefetch_count=PREFETCH)
            # Heartbeats wait for the work. Work of over 20 s needs a thread, which acks by add_callback_threadsafe().
            for method, properties, body in channel.consume(QUEUE, inactivity_timeout=0.5):
                if not in_place:
                    print(f"consuming {QUEUE}", flush=True)
                    in_place = True
                if stopping:
                    # Nothing answers an ack, but the broker has it once it answers this. What is not begun goes back.
                    channel.basic_cancel(channel.consumer_tags[0])
                    channel.close()
                    return True
                if method is not None:  # else nothing came for half a second
                    handle(channel, method.delivery_tag, (properties.message_id, properties.type), body)
            raise ConnectionError("the broker cancelled the consumer; the queue may be gone")
    except (AMQPError, OSError) as trouble:
        print(f"connection: {trouble!r}", file=sys.stderr, flush=True)
    return in_place


def main():
    def stop(number, _frame):
        global stopping
        stopping = True
        signal.signal(number, signal.SIG_DFL)  # a second one ends it at once

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    logging.getLogger("pika").setLevel(logging.CRITICAL)  # consume() tells of trouble itself
    try:
        parameters = pika.URLParameters(URL)
    except ValueError:
        sys.exit("AMQP_URL is not an AMQP URL")  # without its value, which contains a password
    parameters.heartbeat = 10
    parameters.client_properties = {"connection_name": f"worker {QUEUE}"}
    longest = 1.0
    while not stopping:
        longest = 2.0 if consume(parameters) else min(2 * longest, 30.0)
        # A longer pause after each failure, at random: many workers should not come back in step.
        end = time.monotonic() + random.uniform(1.0, longest)
        while not stopping and time.monotonic() < end:
            time.sleep(0.2)


main()
