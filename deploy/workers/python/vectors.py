"""Runs ../vectors through kit.settle(), with handlers as in worker.py. Copy it to test your own handlers."""
import base64
import copy
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
    """No field, state or type is lost on a round trip."""
    sent = json.loads(message.body.decode("utf-8-sig"))
    assert json.loads(json.dumps(message.event)) == sent
    assert json.loads(json.dumps(copy.copy(payload))) == sent["payload"]


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

    signatures = json.loads((VECTORS / "signatures.json").read_text())
    for vector in signatures:
        signed = f"{vector['prism-timestamp']}.{vector['body']}".encode()
        if hmac.new(vector["secret"].encode(), signed, hashlib.sha256).hexdigest() != vector["prism-signature"]:
            wrong.append(f"signature of {vector['prism-timestamp']}")
    print("\n".join(wrong) or f"{len(cases)} messages and {len(signatures)} signatures as expected")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
