"""Runs ../vectors through kit.settle(), with handlers as in worker.py. Copy it to test your own handlers."""
import base64
import hashlib
import hmac
import json
import sys
from pathlib import Path

import kit

VECTORS = Path(__file__).resolve().parent.parent / "vectors"
HANDLERS = {
    "scan.processing": lambda message: check(message, message.scan()),
    "body_shape_prediction.processing": lambda message: check(message, message.prediction()),
}


def check(message, payload):
    """No field, state or type is lost."""
    sent = json.loads(message.body.decode("utf-8-sig"))
    assert message.event == sent and payload == sent["payload"]


def message(fields):
    if "body_base64" in fields:
        body = base64.b64decode(fields["body_base64"])
    else:
        body = fields["body"].replace("PAD", "x" * fields.get("pad", 0)).encode()
    names = fields.get("message_id"), fields.get("type")
    return kit.Message(*names, body, fields["headers"], fields.get("redelivered", False))


def main():
    wrong, store = [], kit.SqliteStore(":memory:")
    cases = json.loads((VECTORS / "messages.json").read_text())
    for case in cases:
        got = message(case["message"])
        outcome, reason = kit.settle(got, HANDLERS, store)
        verified = case["message"]["headers"]["prism-verified"] == "true"
        if outcome != case["expect"]["outcome"] or got.verified != verified:
            wrong.append(f"{case['name']}: {outcome}, expected {case['expect']['outcome']} ({reason})")

    # An error of the handler, which is no GiveUp, is a failure that a retry may repair, and the message is not done.
    def broken(_message):
        raise OSError("the disk is full")

    first = message(cases[0]["message"])
    store = kit.SqliteStore(":memory:")
    outcomes = [kit.settle(first, handlers, store)[0] for handlers in ({"scan": broken}, HANDLERS, HANDLERS)]
    if outcomes != ["failed", "done", "again"]:
        wrong.append(f"a handler that fails once: {outcomes}")

    # What a library says goes to the log, in one line.
    def rude(_message):
        raise OSError("\ud800 \x1b[31mred\ndone nothing " + 300 * "x")

    outcome, reason = kit.settle(message(cases[0]["message"]), {"scan": rude}, kit.SqliteStore(":memory:"))
    if outcome != "failed" or len(reason) != 200 or not reason.startswith("? ?[31mred?done nothing x"):
        wrong.append(f"the reason of a failure: {outcome} {reason!r}")

    keys = json.loads((VECTORS / "first_keys.json").read_text())
    for vector in keys:
        got = kit.first_key(vector["routing_key"], vector.get("type"))
        if got != vector["first_key"]:
            wrong.append(f"{vector['why']}: {got}")

    store = kit.SqliteStore(":memory:")
    store.mark_done("old")
    store.database.execute("UPDATE done SET at = datetime('now', '-8 days')")
    store.mark_done("new")
    store.purge(7)
    if store.is_done("old") or not store.is_done("new"):
        wrong.append("purge")

    signatures = json.loads((VECTORS / "signatures.json").read_text())
    for vector in signatures:
        signed = f"{vector['prism-timestamp']}.{vector['body']}".encode()
        right = hmac.new(vector["secret"].encode(), signed, hashlib.sha256).hexdigest()
        if hmac.compare_digest(right, vector["prism-signature"]) != vector["valid"]:
            wrong.append(f"signature of {vector['prism-timestamp']}")
    print("\n".join(wrong) or f"{len(cases)} messages and {len(signatures)} signatures as expected")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
