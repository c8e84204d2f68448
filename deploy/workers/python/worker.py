"""A worker for prism-relay: saves the body of each event as OUT/<message_id>.json. SIGTERM or Ctrl-C ends it.

Change save() and the handlers for your own work; kit.py does the rest."""
import os
import sys
from pathlib import Path

try:
    import pika  # type: ignore  # noqa: F401
except ImportError:
    sys.exit(f"{sys.executable} has no pika. Make an environment that has it, and run this worker with its python:\n"
             "  python3 -m venv venv && venv/bin/pip install -r deploy/workers/python/requirements.txt")

import kit

URL = os.environ.get("AMQP_URL", "amqp://guest:guest@127.0.0.1:5672/%2f")
QUEUE = os.environ.get("QUEUE", "prism.scan")
OUT = Path(os.environ.get("OUT", "./out"))
PREFETCH = int(os.environ.get("PREFETCH", "20"))


class Files:
    """The store of this example: a message is done when its file exists, so work and record are one step."""

    def is_done(self, message_id):
        return (OUT / f"{message_id}.json").exists()

    def mark_done(self, message_id):
        pass


def on_scan(message: kit.Message):
    scan = message.scan()  # typed: scan["scanId"], scan["state"]; a new state is a string like the others
    save(message)


def on_prediction(message: kit.Message):
    prediction = message.prediction()
    save(message)


def save(message: kit.Message):
    """Writes a temporary file and renames it, so that the file is complete or absent."""
    path = OUT / f"{message.id}.json"
    temporary = path.with_suffix(f".{os.urandom(8).hex()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(message.body)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # so that the new name survives a power loss
    os.close(folder)


# By type, or by its first words. Any other type becomes a dead letter, where a person sees it.
HANDLERS = {"scan.processing": on_scan, "body_shape_prediction.processing": on_prediction}

if __name__ == "__main__":
    kit.run(HANDLERS, Files(), URL, QUEUE, PREFETCH)
