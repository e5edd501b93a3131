"""`python -m hub_server FOLDER`: serve until stdin closes; the first line printed says where."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .server import serve


def main() -> None:
    """Read the settings (one line of JSON) from stdin, serve, stop when the parent goes away."""
    settings = json.loads(sys.stdin.readline())
    running = serve(Path(sys.argv[1]), settings)
    print(json.dumps({"hub": running.endpoint, "storage": running.storage}), flush=True)
    sys.stdin.read()
    running.stop()


main()
