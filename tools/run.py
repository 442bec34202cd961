"""`make run`: the service on its embedded database, with a secret made for this machine."""

from __future__ import annotations

import base64
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Final

_SECRET: Final = Path(".dev/signing-secret")
_COMMAND: Final = Path(sys.executable).parent / "clerk-sync"


def main() -> None:
    os.chdir(Path(__file__).parent.parent)
    prefix = ""
    if (
        not {"CLERK_WEBHOOK_SIGNING_SECRET", "CLERK_WEBHOOK_SIGNING_SECRET_FILE"}
        & os.environ.keys()
    ):
        make_secret()
        os.environ["CLERK_WEBHOOK_SIGNING_SECRET_FILE"] = str(_SECRET)
        prefix = f"CLERK_WEBHOOK_SIGNING_SECRET_FILE={_SECRET} "
    if not {"DATABASE_URL", "DATABASE_URL_FILE", "DATABASE_HOST"} & os.environ.keys():
        os.environ["DATABASE_URL"] = "sqlite:///.dev/clerk-sync.db"
    os.environ.setdefault("CLERK_SYNC_HOST", "127.0.0.1")  # a laptop's network is not a pod's
    migrated = subprocess.run([_COMMAND, "migrate"], check=False)
    if migrated.returncode:
        sys.exit(migrated.returncode)
    print(instructions(prefix), flush=True)
    os.execv(_COMMAND, [str(_COMMAND), "serve"])


def make_secret() -> None:
    """Write a secret of Clerk's form, once, readable by nobody else."""
    _SECRET.parent.mkdir(mode=0o700, exist_ok=True)
    if not _SECRET.exists():
        text = "whsec_" + base64.b64encode(secrets.token_bytes(24)).decode()
        with os.fdopen(os.open(_SECRET, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
            file.write(text + "\n")


def instructions(prefix: str) -> str:
    port = os.environ.get("CLERK_SYNC_PORT") or "8080"
    path = os.environ.get("CLERK_SYNC_WEBHOOK_PATH") or "/webhooks/clerk"
    webhooks = f"http://127.0.0.1:{port}{path}"
    internal = f"http://127.0.0.1:{os.environ.get('CLERK_SYNC_INTERNAL_PORT') or '8081'}"
    elsewhere = "" if webhooks.endswith(":8080/webhooks/clerk") else f" --url {webhooks}"
    command = os.path.relpath(_COMMAND)
    read = f"import urllib.request as r; print(r.urlopen('{internal}/profiles').read().decode())"
    return f"""
clerk-sync is starting. Ctrl-C stops it.

  webhooks   {webhooks}
  internal   {internal}  (/livez, /readyz, /metrics, /profiles)

Send it a signed event of Clerk's, from a second terminal in this folder:

  {prefix}{command} trigger user.created --id user_ada{elsewhere}

and look at the row that it became:

  curl {internal}/profiles

or, without curl:

  {os.path.relpath(sys.executable)} -c "{read}"
"""


if __name__ == "__main__":
    main()
