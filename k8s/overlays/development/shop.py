"""An app for the example: it shows its users, whom it asks clerk-sync for.

A real app reads them from its own database. This one would need a driver for it.
"""

from __future__ import annotations

import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import urlopen

CLERK_SYNC = os.environ.get("CLERK_SYNC_URL", "http://localhost:18081")
PORT = int(os.environ.get("PORT", "8080"))


class Shop(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/healthz":
            self._answer(200, "ok")
            return
        try:
            with urlopen(f"{CLERK_SYNC}/profiles", timeout=5) as response:
                users = json.load(response)
        except OSError as error:
            self._answer(503, f"There are no users to show: {error}")
        else:
            self._answer(200, "\n".join([f"Users: {len(users)}", *map(line_of, users)]))

    def _answer(self, status: int, text: str) -> None:
        body = f"{text}\n".encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def line_of(user: dict[str, object]) -> str:
    return " ".join(str(user[column] or "-") for column in ("clerk_id", "full_name", "email"))


if __name__ == "__main__":
    ThreadingHTTPServer(("", PORT), Shop).serve_forever()
