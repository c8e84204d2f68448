"""A kit for workers of prism-relay: takes messages, does each once, acknowledges or rejects, reconnects, stops cleanly.

Copy this file and prism_types.py into your project. Needs pika 1.2 or later. run() is all that a worker calls; settle()
is the part without RabbitMQ, for your own tests.

The order is: do the work, record it as done, acknowledge. A crash before the record repeats the work; a crash after it
repeats nothing. So a handler must bear being called twice, or record the id itself, in the transaction of its work.
"""
import concurrent.futures
import json
import logging
import random
import re
import signal
import sqlite3
import sys
import time

import pika  # type: ignore  # it has no types
from pika.exceptions import AMQPError  # type: ignore

from prism_types import BodyShapePredictionPayload, Envelope, ScanPayload

DEAD = "prism.dead"  # the exchange of dead letters
TEST = "prism-test"  # the header of messages of `prism-relay send --to-queue`
GAVE_UP = "prism-gave-up"  # the header of dead letters of a kit: the queue, and why
UUID = r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"


class GiveUp(Exception):
    """The message can never succeed. It becomes a dead letter at once; after any other exception it is retried."""


class Message:
    """One event. `event` and the payloads are plain dicts with all fields, also those that the types do not name."""

    def __init__(self, message_id, type, body, headers=None, redelivered=False):
        self.id = message_id if isinstance(message_id, str) else ""  # pika gives bytes for what is not UTF-8
        self.body = body
        self.headers = headers or {}
        self.redelivered = redelivered
        self._type = type if isinstance(type, str) else None
        self._event = None

    @property
    def event(self) -> Envelope:
        """The parsed body. Raises GiveUp if it is not an event."""
        if self._event is None:
            try:
                # Without a byte order mark, and without NaN, which is not JSON.
                event = json.loads(self.body.decode("utf-8-sig"), parse_constant=_refuse)
            except (ValueError, RecursionError):
                raise GiveUp("the body is not JSON") from None  # without the body, which contains a userToken
            if not isinstance(event, dict) or not isinstance(event.get("eventType"), str):
                raise GiveUp("the body is not an event")
            if not isinstance(event.get("payload"), dict):
                raise GiveUp("the event has no payload")
            self._event = event
        return self._event

    @property
    def type(self) -> str:
        """The event type. A type over 255 bytes is only in the body."""
        return self._type or self.event["eventType"]

    @property
    def verified(self) -> bool:
        """Whether the webhook was signed. If not, anybody may have sent it."""
        return self.headers.get("prism-verified") == "true"

    def scan(self) -> ScanPayload:
        """The payload of scan.processing.*; raises GiveUp if a documented field is missing or not a string."""
        return self._payload(ScanPayload)

    def prediction(self) -> BodyShapePredictionPayload:
        """The payload of body_shape_prediction.processing.*; raises GiveUp as scan() does."""
        return self._payload(BodyShapePredictionPayload)

    def _payload(self, shape):
        payload = self.event["payload"]
        for field in shape.__annotations__:
            if not isinstance(payload.get(field), str):
                raise GiveUp(f"the payload's {field} is missing or not a string")
        return payload


def _refuse(word):
    raise ValueError(word)


class SqliteStore:
    """Which messages are done, in a SQLite file. Any object with is_done() and mark_done() will do, such as one on your
    own database. Call purge() now and then: a duplicate comes within minutes, a redriven dead letter within days."""

    def __init__(self, path):
        self.database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self.database.execute("CREATE TABLE IF NOT EXISTS done (message_id TEXT PRIMARY KEY,"
                              " at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP)")

    def is_done(self, message_id):
        return self.database.execute("SELECT 1 FROM done WHERE message_id = ?", (message_id,)).fetchone() is not None

    def mark_done(self, message_id):
        self.database.execute("INSERT OR IGNORE INTO done (message_id) VALUES (?)", (message_id,))

    def purge(self, days):
        self.database.execute("DELETE FROM done WHERE at < datetime('now', ?)", (f"-{days} days",))


def handler_for(handlers, type):
    """The handler of the type, else of its first words: `scan.processing.started`, `scan.processing`, `scan`."""
    words = type.split(".")
    for count in range(len(words), 0, -1):
        handler = handlers.get(".".join(words[:count]))
        if handler is not None:
            return handler
    raise GiveUp("no handler for this type")


def clean(text, limit=200):
    """The text in one line of a log: without control characters, and cut."""
    return re.sub("[^ -~]", "?", str(text))[:limit]


def first_key(routing_key, type):
    """The routing key of the event. A message that returned from a retry queue has the key NAME:1 in its place; no
    event's own key has a colon."""
    if isinstance(routing_key, str) and ":" not in routing_key:
        return routing_key
    is_key = isinstance(type, str) and re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", type)
    return type if is_key else "invalid.event_type"


def settle(message, handlers, store):
    """Does the work of one message. Returns the outcome, and why it is not done: `done` and `again` are to be
    acknowledged, `failed` is to be rejected, `gave up` is a dead letter."""
    try:
        if not re.fullmatch(UUID, message.id):
            raise GiveUp("the message_id is not a UUID")  # it did not come from the relay
        if store.is_done(message.id):
            return "again", None
        message.event  # raises GiveUp if the body is not an event
        # Choose by the type, not by the routing key: a retried message comes back with another routing key.
        handler_for(handlers, message.type)(message)
        store.mark_done(message.id)
        return "done", None
    except GiveUp as reason:
        return "gave up", clean(reason)
    except Exception as reason:  # any error fails only this message
        return "failed", clean(reason) or type(reason).__name__


def run(handlers, store, url, queue, prefetch=20, metrics=lambda outcome, message, seconds: None):
    """Works until SIGTERM or Ctrl-C, which finish the current message. Returns then.

    `handlers`: a function of a Message for each type or first words of types. Handlers and the store are called on one
    thread that is not the main thread, so that the connection stays alive during long work. `metrics` is called after
    each message with its outcome (see settle()) and the seconds that it took."""
    _Worker(handlers, store, url, queue, prefetch, metrics).run()


class _Worker:
    def __init__(self, handlers, store, url, queue, prefetch, metrics):
        self.handlers, self.store, self.queue, self.prefetch, self.metrics = handlers, store, queue, prefetch, metrics
        self.stopping = False
        self.thread = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        try:
            self.parameters = pika.URLParameters(url)
        except ValueError:
            sys.exit("AMQP_URL is not an AMQP URL")  # without the value, which contains a password
        self.parameters.heartbeat = 10
        self.parameters.blocked_connection_timeout = 10
        self.parameters.client_properties = {"connection_name": f"worker {queue}"}

    def run(self):
        signal.signal(signal.SIGTERM, self.stop)
        signal.signal(signal.SIGINT, self.stop)
        logging.getLogger("pika").setLevel(logging.CRITICAL)  # consume() reports errors itself
        longest = 1.0
        while not self.stopping:
            longest = 2.0 if self.consume() else min(2 * longest, 30.0)
            # A longer pause after each failure, and random, so that many workers do not reconnect at the same time.
            end = time.monotonic() + random.uniform(1.0, longest)
            while not self.stopping and time.monotonic() < end:
                time.sleep(0.2)

    def stop(self, number, _frame):
        self.stopping = True
        signal.signal(number, signal.SIG_DFL)  # a second signal exits at once

    def consume(self):
        """Handles messages until a signal arrives or the connection fails. Returns whether consuming began."""
        in_place = False
        try:
            with pika.BlockingConnection(self.parameters) as connection:
                channel = connection.channel()
                channel.basic_qos(prefetch_count=self.prefetch)
                for method, properties, body in channel.consume(self.queue, inactivity_timeout=0.5):
                    if not in_place:
                        print(f"consuming {self.queue}", flush=True)
                        in_place = True
                    if self.stopping:
                        # An ack has no reply; the reply to this proves that the broker has it. Other messages are
                        # requeued.
                        channel.basic_cancel(channel.consumer_tags[0])
                        channel.close()
                        return True
                    if method is not None:  # None: no message for half a second
                        self.handle(connection, channel, method, properties, body)
                raise ConnectionError("the broker cancelled the consumer; the queue may be gone")
        except (AMQPError, OSError) as trouble:
            print(f"connection: {trouble!r}", file=sys.stderr, flush=True)
        return in_place

    def handle(self, connection, channel, method, properties, body):
        message = Message(properties.message_id, properties.type, body, properties.headers, method.redelivered)
        began = time.monotonic()
        work = self.thread.submit(self.work, message, method, properties)
        while not concurrent.futures.wait([work], timeout=1).done:
            try:
                connection.process_data_events(time_limit=0)  # heartbeats, which RabbitMQ waits for
            except AMQPError:
                break  # finish the work; the ack fails
        outcome = work.result()
        if outcome == "failed":
            # To the retry queue, or to prism.dead without one. True would requeue it at once, in a hot loop.
            channel.basic_reject(method.delivery_tag, requeue=False)
        else:
            channel.basic_ack(method.delivery_tag)  # only after the work: if the worker dies first, it comes again
        try:
            self.metrics(outcome, message, time.monotonic() - began)
        except Exception as trouble:
            print(f"metrics: {trouble!r}", file=sys.stderr, flush=True)

    def work(self, message, method, properties):
        outcome, reason = settle(message, self.handlers, self.store)
        id, type = (clean(name or "-", 255).replace(" ", "?") for name in (properties.message_id, properties.type))
        print(f"{outcome} {id} {type}" + (f": {reason}" if reason else ""), flush=True)
        # The tester counts rejects, and prism.dead is no place for tests.
        if outcome == "gave up" and (TEST in message.headers or not self.bury(message, method, properties, reason)):
            return "failed"
        return outcome

    def bury(self, message, method, properties, reason):
        """Publishes a copy to prism.dead, because a reject would go through all retries. Returns whether RabbitMQ
        confirmed the copy; if not, the message is rejected."""
        try:
            properties.headers = {name: value for name, value in message.headers.items() if not name.startswith("x-")}
            properties.headers[GAVE_UP] = f"{self.queue}: {reason}"
            # On a connection of its own: when RabbitMQ is short of memory or disk, it reads nothing more from a
            # connection that publishes, not even acks.
            with pika.BlockingConnection(self.parameters) as connection:
                channel = connection.channel()
                channel.confirm_delivery()
                key = first_key(method.routing_key, properties.type)
                channel.basic_publish(DEAD, key, message.body, properties, mandatory=True)
            return True
        except Exception as trouble:
            print(f"cannot publish to {DEAD}, so rejecting: {trouble!r}", file=sys.stderr, flush=True)
            return False
