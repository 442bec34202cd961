"""Settings from the environment; each secret also from a mounted file, read again as it changes."""

from __future__ import annotations

import difflib
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from clerk_sync.database.url import InvalidDatabaseUrl, Target, mysql_target, target_of
from clerk_sync.mapping.loader import PRESETS

_FILE_CHECK_SECONDS: Final = 1.0


class InvalidSettings(Exception):
    """What is wrong with the settings: one message per variable, none with a secret in it."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(faults))


class Secret:
    """One secret, from a variable or from a file; `read` gives it as it is now."""

    def __init__(self, name: str, *, value: str = "", path: Path | None = None) -> None:
        self.name = name
        self._value = value.strip()  # a Secret made by `echo` ends with a newline
        self.path = path
        # What is wrong with the file now, so that the last value from it stays; else empty.
        self.fault = ""
        self._stamp: tuple[int, int, int] | None = None
        self._checked = 0.0

    def __repr__(self) -> str:
        return f"Secret({self.name})"

    def read(self) -> str:
        """The value. A file that is gone for a moment, as while it is rotated, keeps its last.

        Raises InvalidSettings when there has never been one.
        """
        now = time.monotonic()
        if self.path is None or (self._value and now - self._checked < _FILE_CHECK_SECONDS):
            return self._value
        self._checked = now
        try:
            status = self.path.stat()
            stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
            if stamp != self._stamp:
                text = self.path.read_text().strip()
                self._stamp, self.fault = stamp, "" if text else "is empty"
                self._value = text or self._value
        except (OSError, UnicodeDecodeError) as error:
            self._stamp = None  # it may come back as it was
            what = error.strerror if isinstance(error, OSError) else "not text"
            self.fault = what or type(error).__name__
        if not self._value:
            raise InvalidSettings([f"{self.name}_FILE: {self.path}: {self.fault}"])
        return self._value


class _Secrets(EnvSettingsSource):
    """Fields of type Secret: `NAME`, or the path of a file in `NAME_FILE`."""

    def __call__(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for field in self.settings_cls.model_fields.values():
            name = str(field.validation_alias)
            if field.annotation != Secret | None:
                continue
            value, path = self.env_vars.get(name), self.env_vars.get(f"{name}_FILE")
            if value and path:
                found[name] = ValueError(f"is set, and so is {name}_FILE: keep one of them")
            elif value:
                found[name] = Secret(name, value=value)
            elif path:
                found[name] = Secret(name, path=Path(path))
        return found

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        raise NotImplementedError  # the base class's hook for one field; __call__ does them all


def _without_service_link(default: int) -> BeforeValidator:
    """Kubernetes gives every pod `CLERK_SYNC_PORT=tcp://…` for a Service named clerk-sync."""
    return BeforeValidator(
        lambda value: default if isinstance(value, str) and value.startswith("tcp://") else value
    )


def _absolute(path: str) -> str:
    if not re.fullmatch(r"/[A-Za-z0-9/_.~-]*", path):
        raise ValueError("must begin with / and hold plain characters, such as /webhooks/clerk")
    return path


def _seconds(text: object) -> object:
    """A span of time such as 6h, in seconds; 0 and `off` are none."""
    if not isinstance(text, str):
        return text
    if text in ("off", "0"):
        return None
    found = re.fullmatch(r"([1-9]\d{0,6})([smhd]?)", text)
    if found is None:
        raise ValueError("must be a time such as 90s, 30m, 6h or 1d, or off")
    return int(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


Port = Annotated[int, Field(ge=0, le=65535)]


class Settings(BaseSettings):
    """All settings, by their environment variables' names."""

    model_config = SettingsConfigDict(
        frozen=True,
        env_ignore_empty=True,
        case_sensitive=True,
        arbitrary_types_allowed=True,
        hide_input_in_errors=True,
        extra="ignore",
    )
    DEFAULT_DATABASE: ClassVar[str] = "sqlite:///clerk-sync.db"

    database_url: Secret | None = Field(default=None, validation_alias="DATABASE_URL")
    database_host: Secret | None = Field(default=None, validation_alias="DATABASE_HOST")
    database_port: Secret | None = Field(default=None, validation_alias="DATABASE_PORT")
    database_name: Secret | None = Field(default=None, validation_alias="DATABASE_NAME")
    database_username: Secret | None = Field(default=None, validation_alias="DATABASE_USERNAME")
    database_password: Secret | None = Field(default=None, validation_alias="DATABASE_PASSWORD")
    database_tls: Literal["verify", "verify-ca", "disable"] | None = Field(
        default=None, validation_alias="DATABASE_TLS"
    )
    database_tls_ca: str | None = Field(default=None, validation_alias="DATABASE_TLS_CA")
    signing_secret: Secret | None = Field(
        default=None, validation_alias="CLERK_WEBHOOK_SIGNING_SECRET"
    )
    secret_key: Secret | None = Field(default=None, validation_alias="CLERK_SECRET_KEY")
    api_key: Secret | None = Field(default=None, validation_alias="CLERK_API_KEY")
    app_token: Secret | None = Field(default=None, validation_alias="CLERK_SYNC_APP_TOKEN")
    api_url: str = Field(default="https://api.clerk.com/v1", validation_alias="CLERK_API_URL")
    instance_id: str | None = Field(default=None, validation_alias="CLERK_INSTANCE_ID")
    config: str = Field(default=PRESETS[0], validation_alias="CLERK_SYNC_CONFIG")
    host: str | None = Field(default=None, validation_alias="CLERK_SYNC_HOST")
    """Where both listeners are. None, or empty: on every address, of IPv4 and of IPv6."""
    port: Annotated[Port, _without_service_link(8080)] = Field(
        default=8080, validation_alias="CLERK_SYNC_PORT"
    )
    internal_port: Annotated[Port, _without_service_link(8081)] = Field(
        default=8081, validation_alias="CLERK_SYNC_INTERNAL_PORT"
    )
    webhook_path: Annotated[str, AfterValidator(_absolute)] = Field(
        default="/webhooks/clerk", validation_alias="CLERK_SYNC_WEBHOOK_PATH"
    )
    pool_size: int = Field(default=4, ge=1, le=100, validation_alias="CLERK_SYNC_POOL_SIZE")
    writers: int = Field(default=2, ge=1, le=16, validation_alias="CLERK_SYNC_WRITERS")
    batch_limit: int = Field(default=256, ge=1, le=2000, validation_alias="CLERK_SYNC_BATCH_LIMIT")
    queue_limit: int = Field(default=1000, ge=1, validation_alias="CLERK_SYNC_QUEUE_LIMIT")
    # Svix waits 15 seconds; the answer has to be well inside that.
    deadline_seconds: float = Field(
        default=5, ge=0.1, le=14, validation_alias="CLERK_SYNC_DEADLINE_SECONDS"
    )
    # Svix's own retries end after 28 hours, replays by hand reach back 90 days.
    ledger_days: int = Field(default=100, ge=2, validation_alias="CLERK_SYNC_LEDGER_DAYS")
    quarantine_days: int = Field(default=30, ge=1, validation_alias="CLERK_SYNC_QUARANTINE_DAYS")
    # Clerk's limit is shared with the customer's own app.
    clerk_share: float = Field(default=0.2, gt=0, le=1, validation_alias="CLERK_SYNC_CLERK_SHARE")
    reconcile_interval: Annotated[int | None, BeforeValidator(_seconds)] = Field(
        default=None, validation_alias="CLERK_SYNC_RECONCILE_INTERVAL"
    )
    breaker_percent: float = Field(
        default=5, ge=0, le=100, validation_alias="CLERK_SYNC_BREAKER_PERCENT"
    )
    # A trigger may do what no rollback undoes.
    probe_rows: Annotated[
        Literal["true", "false"], BeforeValidator(lambda text: str(text).lower())
    ] = Field(default="true", validation_alias="CLERK_SYNC_PROBE_ROWS")
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        BeforeValidator(lambda text: str(text).lower()),
    ] = Field(default="info", validation_alias="LOG_LEVEL")
    log_format: Literal["json", "console"] | None = Field(
        default=None, validation_alias="LOG_FORMAT"
    )

    @field_validator("*", mode="before")
    @classmethod
    def _raise_source_error(cls, value: object) -> object:
        """Make a source's error the field's, so that it is reported with all others."""
        if isinstance(value, ValueError):
            raise value
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, _Secrets(settings_cls), env_settings

    def warnings(self, environ: Mapping[str, str]) -> list[str]:
        """What in the environment is probably a mistake: a misspelt name, no database."""
        found = []
        known = {str(field.validation_alias) for field in type(self).model_fields.values()}
        known |= {f"{name}_FILE" for name in known}
        for name in sorted(environ.keys() - known):
            # Kubernetes makes such names for a Service called clerk-sync.
            ours = name.startswith("CLERK_SYNC_") and not re.search(r"_(SERVICE|PORT)_", name)
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.6 if ours else 0.85)
            if ours or (near and name.startswith(("CLERK_", "DATABASE_"))):
                hint = f"; did you mean {near[0]}?" if near else ""
                found.append(f"{name} is no setting of clerk-sync{hint}")
        if self.reconcile_interval is not None and self.clerk_key is None:
            found.append(
                "CLERK_SYNC_RECONCILE_INTERVAL is set, but CLERK_SECRET_KEY is not: "
                "nothing will be reconciled"
            )
        if self.database_url is None and self.database_host is None:
            found.append(f"DATABASE_URL is not set: the embedded {self.DEFAULT_DATABASE} is used")
        return found

    @property
    def secrets(self) -> dict[str, Secret]:
        """Every secret that is given, by its field."""
        values = {field: getattr(self, field) for field in type(self).model_fields}
        return {field: value for field, value in values.items() if isinstance(value, Secret)}

    @property
    def clerk_key(self) -> Secret | None:
        """Clerk's secret key, by either of its names."""
        return self.secret_key or self.api_key

    def locate(self) -> Target:
        """Where the database is now. Raises InvalidSettings."""
        if self.database_url is None and self.database_host is None:
            for piece in (self.database_name, self.database_username, self.database_password):
                if piece is not None:
                    raise InvalidSettings([f"DATABASE_HOST: is not set, although {piece.name} is"])
        if self.database_url is not None or self.database_host is None:
            url = self.database_url.read() if self.database_url else self.DEFAULT_DATABASE
            try:
                return target_of(url)
            except InvalidDatabaseUrl as error:
                raise InvalidSettings([f"DATABASE_URL: {error}"]) from None
        pieces = {
            name: piece.read() if piece else ""
            for name, piece in (
                ("host", self.database_host),
                ("name", self.database_name),
                ("username", self.database_username),
                ("password", self.database_password),
            )
        }
        port = self.database_port.read() if self.database_port else "3306"
        if not re.fullmatch(r"[0-9]{1,5}", port):
            raise InvalidSettings(["DATABASE_PORT: must be a number, such as 3306"])
        try:
            return mysql_target(
                **pieces, port=int(port), tls=self.database_tls, tls_ca=self.database_tls_ca
            )
        except InvalidDatabaseUrl as error:
            raise InvalidSettings([f"DATABASE_*: {error}"]) from None


def load() -> tuple[Settings, list[str]]:
    """The settings of this environment, and every fault in them.

    Faulty ones have their defaults, so that whoever asks can go on to find what else is wrong.
    """
    try:
        return Settings(), []
    except ValidationError as error:
        faults = error.errors()
    defaults = {
        str(field.validation_alias): field.default for field in Settings.model_fields.values()
    }
    faulty = {str(fault["loc"][0]) for fault in faults}
    settings = Settings(**{name: defaults[name] for name in faulty})
    return settings, [f"{fault['loc'][0]}: {_readable(str(fault['msg']))}" for fault in faults]


def _readable(message: str) -> str:
    return message.removeprefix("Value error, ").replace("Input should be", "must be")
