"""Where commands send events, and what signs them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clerk_sync.clerk import signature

if TYPE_CHECKING:
    from standardwebhooks import Webhook

    from clerk_sync.settings import Settings


def here(settings: Settings) -> str:
    """The webhook's URL of the service on this machine."""
    return f"http://127.0.0.1:{settings.port}{settings.webhook_path}"


def signers_of(settings: Settings) -> tuple[Webhook, ...]:
    """The signers of settings that have a signing secret."""
    assert settings.signing_secret is not None
    return signature.signers(settings.signing_secret.read())
