"""Secrets that change while the service runs: what they stand for now."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Generic, TypeVar

import structlog

from clerk_sync.clerk import signature
from clerk_sync.http import access
from clerk_sync.settings import InvalidSettings

if TYPE_CHECKING:
    from standardwebhooks import Webhook

    from clerk_sync.settings import Secret, Settings
    from clerk_sync.telemetry.metrics import Metrics

log = structlog.get_logger()

CHECK_SECONDS: Final = 1.0
UNSIGNED: Final = (
    "CLERK_WEBHOOK_SIGNING_SECRET: is not set: copy the endpoint's Signing Secret (whsec_…) from "
    "Clerk's dashboard, Webhooks; or set CLERK_WEBHOOK_SIGNING_SECRET_FILE to a file that holds it"
)

_T = TypeVar("_T")


class Rotated(Generic[_T]):
    """What a secret stands for, parsed when it changes. While it is invalid, the last one stays."""

    def __init__(
        self,
        secret: Secret,
        parse: Callable[[str], Sequence[_T]],
        on_change: Callable[[Sequence[_T], str], None],
    ) -> None:
        """`parse` raises ValueError, whose message never repeats the secret.

        `on_change` is called after each change, with what is used from now on, and with the
        error if that is the last. Raises InvalidSettings.
        """
        self.invalid = ""
        self._secret = secret
        self._parse = parse
        self._on_change = on_change
        self._text = secret.read()
        try:
            self._last = parse(self._text)
        except ValueError as error:
            raise InvalidSettings([f"{secret.name}: {error}"]) from None

    def __call__(self) -> Sequence[_T]:
        """What it stands for now."""
        text = self._secret.read()
        if text != self._text:
            self._text = text
            try:
                self._last, self.invalid = self._parse(text), ""
            except ValueError as error:
                self.invalid = str(error)
            self._on_change(self._last, self.invalid)
        return self._last


def _log_signers(signers: Sequence[Webhook], invalid: str) -> None:
    if invalid:
        log.error("signing_secret_invalid", name="CLERK_WEBHOOK_SIGNING_SECRET", error=invalid)
    else:
        log.info("signing_secret_changed", secrets=len(signers))


def _log_tokens(tokens: Sequence[bytes], invalid: str) -> None:
    if invalid:
        log.error("app_token_invalid", name="CLERK_SYNC_APP_TOKEN", error=invalid)
    else:
        log.info("app_token_changed", tokens=len(tokens))


def signing_faults(settings: Settings) -> list[str]:
    """Faults of the signing secret, for people."""
    if settings.signing_secret is None:
        return [UNSIGNED]
    try:
        signature.signers(settings.signing_secret.read())
    except signature.InvalidSecret as error:
        return [f"{settings.signing_secret.name}: {error}"]
    except InvalidSettings as error:
        return list(error.faults)
    return []


def token_faults(settings: Settings) -> list[str]:
    """Faults of the app token, if there is one."""
    if settings.app_token is None:
        return []
    try:
        access.tokens(settings.app_token.read())
    except access.InvalidToken as error:
        return [f"{settings.app_token.name}: {error}"]
    except InvalidSettings as error:
        return list(error.faults)
    return []


class Rotation:
    """The secrets of one service, as they are now. Raises InvalidSettings."""

    def __init__(self, settings: Settings) -> None:
        if settings.signing_secret is None:
            raise InvalidSettings(["CLERK_WEBHOOK_SIGNING_SECRET: is not set"])
        self.signers = Rotated(settings.signing_secret, signature.signers, _log_signers)
        self._tokens: Rotated[bytes] | None = None
        if settings.app_token is not None:
            self._tokens = Rotated(settings.app_token, access.tokens, _log_tokens)
        self._secrets = settings.secrets

    def tokens(self) -> Sequence[bytes]:
        """The app's tokens; empty where there are none."""
        return self._tokens() if self._tokens is not None else ()

    async def keep(self, metrics: Metrics) -> None:
        """Report when a secret's file cannot be read, and when it can again; until cancelled."""
        faults = dict.fromkeys(self._secrets, "")
        while True:
            for field, secret in self._secrets.items():
                fault = _fault(secret)
                if fault and not faults[field]:
                    log.error("secret_stale", name=secret.name, file=str(secret.path), error=fault)
                elif faults[field] and not fault:
                    log.info("secret_recovered", name=secret.name)
                faults[field] = fault
            self.signers()
            self.tokens()
            invalid = {
                "signing_secret": self.signers.invalid,
                "app_token": self._tokens.invalid if self._tokens is not None else "",
            }
            for field, fault in faults.items():
                metrics.secret_stale.labels(field).set(bool(fault or invalid.get(field)))
            await asyncio.sleep(CHECK_SECONDS)


def _fault(secret: Secret) -> str:
    """What is wrong with the file now."""
    with contextlib.suppress(InvalidSettings):  # there has never been one
        secret.read()
    return secret.fault
