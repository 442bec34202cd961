"""Settings: every variable, every fault at once, secrets from files that change."""

from __future__ import annotations

import os
import ssl
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from clerk_sync import settings as settings_module
from clerk_sync.database.url import InvalidDatabaseUrl, target_of
from clerk_sync.settings import InvalidSettings, Secret, Settings, load

# In a fresh clone, the first text waits until hypothesis has made its tables of characters.
patient = hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

HUNTER = "hunter2-is-the-secret"
SECRETS = {
    "DATABASE_URL": "database_url",
    "DATABASE_HOST": "database_host",
    "DATABASE_PORT": "database_port",
    "DATABASE_NAME": "database_name",
    "DATABASE_USERNAME": "database_username",
    "DATABASE_PASSWORD": "database_password",
    "CLERK_WEBHOOK_SIGNING_SECRET": "signing_secret",
    "CLERK_SECRET_KEY": "secret_key",
    "CLERK_API_KEY": "api_key",
}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("CLERK_", "DATABASE_", "LOG_")):
            monkeypatch.delenv(name)


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    return monkeypatch


@pytest.fixture
def every_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at files whenever they are asked for, instead of once a second."""
    monkeypatch.setattr(settings_module, "_FILE_CHECK_SECONDS", 0.0)


def loaded(env: pytest.MonkeyPatch, **variables: str) -> Settings:
    for name, value in variables.items():
        env.setenv(name, value)
    settings, found = load()
    assert found == []
    return settings


def faults(env: pytest.MonkeyPatch, **variables: str) -> list[str]:
    for name, value in variables.items():
        env.setenv(name, value)
    _, found = load()
    assert HUNTER not in str(found)
    return found


def located(env: pytest.MonkeyPatch, **variables: str) -> str:
    """What is wrong with where the database is."""
    settings = loaded(env, **variables)
    with pytest.raises(InvalidSettings) as caught:
        settings.locate()
    assert HUNTER not in str(caught.value)
    (fault,) = caught.value.faults
    return fault


# Every variable


def test_nothing_needs_to_be_set(env: pytest.MonkeyPatch) -> None:
    settings = loaded(env)
    assert settings.signing_secret is None
    assert settings.clerk_key is None
    assert settings.locate().path == "clerk-sync.db"
    assert (settings.host, settings.port, settings.internal_port) == (None, 8080, 8081)
    assert (settings.webhook_path, settings.config) == ("/webhooks/clerk", "mirror")
    assert settings.api_url == "https://api.clerk.com/v1"
    assert (settings.instance_id, settings.log_level, settings.log_format) == (None, "info", None)
    assert settings.deadline_seconds < 15


@pytest.mark.parametrize(
    ("name", "text", "field", "value"),
    [
        ("CLERK_API_URL", "http://127.0.0.1:9/v1", "api_url", "http://127.0.0.1:9/v1"),
        ("CLERK_INSTANCE_ID", "ins_1", "instance_id", "ins_1"),
        ("CLERK_SYNC_CONFIG", "orbytal", "config", "orbytal"),
        ("CLERK_SYNC_HOST", "::1", "host", "::1"),
        ("CLERK_SYNC_PORT", "80", "port", 80),
        ("CLERK_SYNC_PORT", "0", "port", 0),
        ("CLERK_SYNC_INTERNAL_PORT", "65535", "internal_port", 65535),
        ("CLERK_SYNC_WEBHOOK_PATH", "/hooks/clerk-1", "webhook_path", "/hooks/clerk-1"),
        ("CLERK_SYNC_POOL_SIZE", "9", "pool_size", 9),
        ("CLERK_SYNC_WRITERS", "3", "writers", 3),
        ("CLERK_SYNC_BATCH_LIMIT", "10", "batch_limit", 10),
        ("CLERK_SYNC_QUEUE_LIMIT", "5", "queue_limit", 5),
        ("CLERK_SYNC_DEADLINE_SECONDS", "2.5", "deadline_seconds", 2.5),
        ("CLERK_SYNC_LEDGER_DAYS", "200", "ledger_days", 200),
        ("CLERK_SYNC_QUARANTINE_DAYS", "7", "quarantine_days", 7),
        ("CLERK_SYNC_PROBE_ROWS", "False", "probe_rows", "false"),
        ("LOG_LEVEL", "debug", "log_level", "debug"),
        ("LOG_FORMAT", "console", "log_format", "console"),
    ],
)
def test_a_variable_sets_its_field(
    env: pytest.MonkeyPatch, name: str, text: str, field: str, value: object
) -> None:
    assert getattr(loaded(env, **{name: text}), field) == value


def test_every_variable_is_of_these_families() -> None:
    names = {str(field.validation_alias) for field in Settings.model_fields.values()}
    families = ("CLERK_", "DATABASE_", "LOG_")
    assert [name for name in names if not name.startswith(families)] == []
    assert SECRETS.keys() < names


def test_an_empty_variable_is_not_set(env: pytest.MonkeyPatch) -> None:
    empty = dict.fromkeys(
        (*SECRETS, "CLERK_SYNC_PORT", "CLERK_INSTANCE_ID", "LOG_LEVEL", "CLERK_SECRET_KEY_FILE"),
        "",
    )
    settings = loaded(env, **empty)
    assert settings == Settings()
    assert settings.port == 8080
    assert settings.signing_secret is None


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("CLERK_SYNC_PORT", HUNTER, "must be a valid integer"),
        ("CLERK_SYNC_PORT", "65536", "must be less than or equal to 65535"),
        ("CLERK_SYNC_INTERNAL_PORT", "-1", "must be greater than or equal to 0"),
        ("CLERK_SYNC_WEBHOOK_PATH", "webhooks", "must begin with / and hold plain characters"),
        ("CLERK_SYNC_WEBHOOK_PATH", "/a b", "must begin with / and hold plain characters"),
        ("CLERK_SYNC_POOL_SIZE", "0", "must be greater than or equal to 1"),
        ("CLERK_SYNC_WRITERS", "1000", "must be less than or equal to 16"),
        ("CLERK_SYNC_BATCH_LIMIT", "1.5", "must be a valid integer"),
        ("CLERK_SYNC_QUEUE_LIMIT", "0", "must be greater than or equal to 1"),
        ("CLERK_SYNC_DEADLINE_SECONDS", "15", "must be less than or equal to 14"),
        ("CLERK_SYNC_DEADLINE_SECONDS", "nan", "must be less than or equal to 14"),
        ("CLERK_SYNC_LEDGER_DAYS", "1", "must be greater than or equal to 2"),
        ("CLERK_SYNC_QUARANTINE_DAYS", "0", "must be greater than or equal to 1"),
        ("LOG_LEVEL", "loud", "must be 'debug', 'info', 'warning' or 'error'"),
        ("LOG_FORMAT", "xml", "must be 'json' or 'console'"),
    ],
)
def test_a_fault_names_its_variable_and_what_it_must_be(
    env: pytest.MonkeyPatch, name: str, text: str, fault: str
) -> None:
    (found,) = faults(env, **{name: text})
    assert found.startswith(f"{name}: {fault}")


def test_all_faults_are_told_at_once(env: pytest.MonkeyPatch) -> None:
    found = faults(
        env,
        CLERK_SYNC_PORT="http",
        CLERK_SYNC_WRITERS="0",
        LOG_LEVEL="loud",
        DATABASE_URL=HUNTER,
        DATABASE_URL_FILE="/nowhere",
        CLERK_WEBHOOK_SIGNING_SECRET=HUNTER,
        CLERK_WEBHOOK_SIGNING_SECRET_FILE="/nowhere",
    )
    assert {fault.partition(":")[0] for fault in found} == {
        "CLERK_SYNC_PORT",
        "CLERK_SYNC_WRITERS",
        "LOG_LEVEL",
        "DATABASE_URL",
        "CLERK_WEBHOOK_SIGNING_SECRET",
    }


@pytest.mark.parametrize(
    ("name", "field", "default"),
    [("CLERK_SYNC_PORT", "port", 8080), ("CLERK_SYNC_INTERNAL_PORT", "internal_port", 8081)],
)
def test_what_kubernetes_sets_for_a_service_of_our_name_is_no_port(
    env: pytest.MonkeyPatch, name: str, field: str, default: int
) -> None:
    variables = {name: "tcp://10.96.7.1:8080", "CLERK_SYNC_SERVICE_HOST": "10.96.7.1"}
    assert getattr(loaded(env, **variables), field) == default


def test_other_variables_are_none_of_ours(env: pytest.MonkeyPatch) -> None:
    assert loaded(env, CLERK_SYNC_NOTHING="x", clerk_sync_port="7", PORT="9").port == 8080


# Secrets


@pytest.mark.parametrize(("name", "field"), SECRETS.items())
def test_a_secret_comes_from_its_variable(env: pytest.MonkeyPatch, name: str, field: str) -> None:
    secret = getattr(loaded(env, **{name: HUNTER}), field)
    assert secret.read() == HUNTER


@pytest.mark.parametrize(("name", "field"), SECRETS.items())
def test_a_secret_comes_from_its_file(
    env: pytest.MonkeyPatch, tmp_path: Path, name: str, field: str
) -> None:
    (tmp_path / "secret").write_text(f"  {HUNTER}\n")
    settings = loaded(env, **{f"{name}_FILE": str(tmp_path / "secret")})
    assert getattr(settings, field).read() == HUNTER
    assert HUNTER not in repr(settings)


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_has_one_source(env: pytest.MonkeyPatch, name: str) -> None:
    (fault,) = faults(env, **{name: HUNTER, f"{name}_FILE": "/run/secret"})
    assert fault == f"{name}: is set, and so is {name}_FILE: keep one of them"


def test_no_secret_is_shown(env: pytest.MonkeyPatch) -> None:
    settings = loaded(env, **dict.fromkeys(SECRETS, HUNTER))
    for shown in (repr(settings), str(settings), f"{settings.model_dump()}"):
        assert HUNTER not in shown
    assert repr(settings.signing_secret) == "Secret(CLERK_WEBHOOK_SIGNING_SECRET)"


def test_clerks_key_has_two_names(env: pytest.MonkeyPatch) -> None:
    settings = loaded(env, CLERK_API_KEY="sk_2")
    assert settings.clerk_key is settings.api_key
    settings = loaded(env, CLERK_SECRET_KEY="sk_1")
    assert settings.clerk_key is settings.secret_key


@pytest.mark.usefixtures("every_look")
def test_a_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("one")
    secret = Secret("NAME", path=path)
    assert secret.read() == "one"
    path.write_text("the second")
    assert secret.read() == "the second"
    (tmp_path / "new").write_text("the third!")
    (tmp_path / "new").replace(path)
    assert secret.read() == "the third!"


@pytest.mark.usefixtures("every_look")
def test_a_file_of_the_same_size_and_time_is_read_again_too(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("one")
    secret = Secret("NAME", path=path)
    assert secret.read() == "one"
    status = path.stat()
    (tmp_path / "new").write_text("two")
    os.utime(tmp_path / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
    (tmp_path / "new").replace(path)
    assert secret.read() == "two"


@pytest.mark.usefixtures("every_look")
def test_a_file_is_read_again_when_kubernetes_swaps_its_folder(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"..data_{number}").mkdir()
        (tmp_path / f"..data_{number}" / "secret").write_text(f"secret {number}")
    (tmp_path / "..data").symlink_to("..data_1")
    (tmp_path / "secret").symlink_to("..data/secret")
    secret = Secret("NAME", path=tmp_path / "secret")
    assert secret.read() == "secret 1"
    (tmp_path / "..data_tmp").symlink_to("..data_2")
    (tmp_path / "..data_tmp").rename(tmp_path / "..data")
    assert secret.read() == "secret 2"


@pytest.mark.usefixtures("every_look")
@pytest.mark.parametrize("what", ["gone", "empty", "blank", "binary", "a folder"])
def test_a_file_that_is_of_no_use_keeps_its_last_secret(tmp_path: Path, what: str) -> None:
    path = tmp_path / "secret"
    path.write_text("last good")
    secret = Secret("NAME", path=path)
    assert secret.read() == "last good"
    path.unlink()
    if what == "empty":
        path.write_text("")
    elif what == "blank":
        path.write_text(" \n")
    elif what == "binary":
        path.write_bytes(b"\xff\xfe")
    elif what == "a folder":
        path.mkdir()
    assert secret.read() == "last good"
    assert secret.read() == "last good"
    if what == "a folder":
        path.rmdir()
    path.write_text("next")
    assert secret.read() == "next"


def test_a_file_is_not_looked_at_for_every_delivery(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("one")
    secret = Secret("NAME", path=path)
    assert secret.read() == "one"
    path.write_text("two")
    assert secret.read() == "one"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "No such file or directory"),
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"\xff", "not text"),
    ],
)
def test_a_file_that_never_held_a_secret_is_a_fault(
    tmp_path: Path, content: bytes | None, what: str
) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    secret = Secret("NAME", path=path)
    with pytest.raises(InvalidSettings, match=what) as caught:
        secret.read()
    assert caught.value.faults == (f"NAME_FILE: {path}: {what}",)
    path.write_text("there at last")
    assert secret.read() == "there at last"


# The database

PIECES = {
    "DATABASE_HOST": "db.example.com",
    "DATABASE_PORT": "3307",
    "DATABASE_NAME": "app",
    "DATABASE_USERNAME": "clerk",
    "DATABASE_PASSWORD": HUNTER + "@:/?#%",
}


def test_the_database_is_where_the_url_says(env: pytest.MonkeyPatch) -> None:
    target = loaded(env, DATABASE_URL=f"mysql://clerk:{HUNTER}%40@db.example.com/app").locate()
    assert (target.host, target.port, target.name) == ("db.example.com", 3306, "app")
    assert (target.username, target.password) == ("clerk", HUNTER + "@")
    assert target.where == "mysql db.example.com:3306/app"
    assert HUNTER not in repr(target)


def test_the_database_is_where_the_pieces_say(env: pytest.MonkeyPatch) -> None:
    target = loaded(env, **PIECES).locate()
    assert (target.host, target.port, target.name) == ("db.example.com", 3307, "app")
    assert (target.username, target.password) == ("clerk", HUNTER + "@:/?#%")
    assert target.tls is not None


def test_pieces_come_from_files_and_change(
    env: pytest.MonkeyPatch, every_look: None, tmp_path: Path
) -> None:
    files = {}
    for name, value in PIECES.items():
        (tmp_path / name).write_text(f"{value}\n")
        files[f"{name}_FILE"] = str(tmp_path / name)
    settings = loaded(env, **files)
    assert settings.locate().password == PIECES["DATABASE_PASSWORD"]
    (tmp_path / "DATABASE_PASSWORD").write_text("rotated")
    assert settings.locate().password == "rotated"


def test_a_url_from_a_file_changes_too(
    env: pytest.MonkeyPatch, every_look: None, tmp_path: Path
) -> None:
    (tmp_path / "url").write_text("mysql://u:one@h/db\n")
    settings = loaded(env, DATABASE_URL_FILE=str(tmp_path / "url"))
    assert settings.locate().password == "one"
    (tmp_path / "url").write_text("mysql://u:other@h/db\n")
    assert settings.locate().password == "other"


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"DATABASE_NAME": ""}, "DATABASE_*: names no database name"),
        ({"DATABASE_USERNAME": ""}, "DATABASE_*: names no username"),
        ({"DATABASE_PORT": "http"}, "DATABASE_PORT: must be a number, such as 3306"),
        ({"DATABASE_PORT": "33x"}, "DATABASE_PORT: must be a number, such as 3306"),
        ({"DATABASE_PORT": "99999"}, "DATABASE_*: has the port 99999: MySQL's is 3306"),
        ({"DATABASE_HOST": ""}, "DATABASE_HOST: is not set, although DATABASE_NAME is"),
    ],
)
def test_pieces_that_make_no_address_are_a_fault(
    env: pytest.MonkeyPatch, changed: dict[str, str], fault: str
) -> None:
    assert located(env, **PIECES | changed) == fault


def test_the_port_and_the_password_may_be_left_out(env: pytest.MonkeyPatch) -> None:
    target = loaded(env, **PIECES | {"DATABASE_PORT": "", "DATABASE_PASSWORD": ""}).locate()
    assert (target.port, target.password) == (3306, "")


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        (HUNTER, "is not a URL: write mysql://USER:PASSWORD@HOST:3306/DATABASE"),
        (f"mysql:u:{HUNTER}@h/db", "is not a URL"),
        (f"mysql://u:{HUNTER}@h:port/db", "is not a URL"),
        (f"mysql://u:p@{HUNTER}@h/db", "has more than one @: write the one in the password as %40"),
        (f"mysql://u:p@x?{HUNTER}=x@h/db", "has more than one @"),
        (f"postgres://u:{HUNTER}@h/db", "has the scheme `postgres`: use mysql://"),
        (f"mysql://u:{HUNTER}@h", "names no database name"),
        (f"mysql://u:{HUNTER}@/db", "names no host"),
        (f"mysql://:{HUNTER}@h/db", "names no username"),
        (f"mysql://u:{HUNTER}@h:99999/db", "has the port 99999"),
        (f"mysql://u:{HUNTER}@h/db?tls=tidb", "has an unknown `tls`: use ?tls=, which is `verify`"),
        (f"mysql://u:{HUNTER}@h/db?tls=disable&tls=verify", "has `tls` twice"),
        (f"mysql://u:{HUNTER}@h/db?colour=red", "has an unknown option `colour`: leave it out"),
        (f"mysql://u:{HUNTER}@h/db?tls_ca=/no.pem", "names a `tls_ca` that is no PEM file"),
        (f"mysql://u:{HUNTER}@h/db?sslaccept=accept_invalid_certs", "asks for unverified TLS"),
        (f'mysql://u:{HUNTER}@h/db?ssl={{"rejectUnauthorized":false}}', "asks for unverified TLS"),
        ("sqlite://", "names no file: write sqlite:///clerk-sync.db"),
        ("sqlite:///:memory:", "names no file"),
    ],
)
def test_a_url_that_cannot_be_used_is_told_without_its_password(
    env: pytest.MonkeyPatch, url: str, fault: str
) -> None:
    assert located(env, DATABASE_URL=url).startswith(f"DATABASE_URL: {fault}")


@patient
@given(st.text("@:/?#%&=[]; +ab1\\'", max_size=8))
def test_a_password_is_never_shown_however_badly_it_is_written(password: str) -> None:
    """Unencoded, it may change what the URL means, but no message and no address shows it."""
    try:
        target = target_of(f"mysql://u:{password}{HUNTER}@127.0.0.1/app")
    except InvalidDatabaseUrl as error:
        shown = str(error)
    else:
        shown = f"{target!r} {target.where}"
    assert HUNTER not in shown


@patient
@given(st.text(min_size=1, max_size=30))
def test_any_password_can_be_written_percent_encoded(password: str) -> None:
    target = target_of(f"mysql://u:{quote(password, safe='')}@127.0.0.1/app")
    assert target.password == password


@pytest.mark.parametrize("scheme", ["mysql", "mariadb", "mysql+pymysql", "mysql+asyncmy"])
def test_mariadb_and_driver_names_are_mysql(scheme: str) -> None:
    assert target_of(f"{scheme}://u:p@h/db").where == "mysql h:3306/db"


def test_sqlite_is_a_file() -> None:
    assert target_of("sqlite:///clerk-sync.db").where == "sqlite clerk-sync.db"
    assert target_of("sqlite:////data/clerk-sync.db").path == "/data/clerk-sync.db"


@pytest.mark.parametrize(
    ("where", "verified"),
    [
        ("db.example.com/app", True),
        ("10.0.0.1/app", True),
        ("aws.connect.psdb.cloud/app?sslaccept=strict", True),
        ('aws.connect.psdb.cloud/app?ssl={"rejectUnauthorized":true}', True),
        ('aws.connect.psdb.cloud/app?ssl={"rejectUnauthorized": true}', True),
        ("aws.connect.psdb.cloud/app?ssl=%7B%22rejectUnauthorized%22%3Atrue%7D", True),
        ("localhost.example.com/app", True),
        ("127.0.0.1/app?tls=verify", True),
        ("127.0.0.1/app", False),
        ("127.9.9.9/app", False),
        ("localhost/app", False),
        ("[::1]/app", False),
        ("db.example.com/app?tls=disable", False),
    ],
)
def test_tls_is_verified_unless_the_host_is_this_one(where: str, verified: bool) -> None:  # noqa: FBT001
    tls = target_of(f"mysql://u:p@{where}").tls
    assert (tls is not None) == verified
    if tls is not None:
        assert tls.verify_mode is ssl.CERT_REQUIRED
        assert tls.check_hostname


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("6h", 21_600), ("1d", 86_400), ("45", 45), ("off", None)],
)
def test_an_interval_is_a_span_of_time(
    monkeypatch: pytest.MonkeyPatch, text: str, seconds: int | None
) -> None:
    monkeypatch.setenv("CLERK_SYNC_RECONCILE_INTERVAL", text)
    settings, faults = load()
    assert not faults
    assert settings.reconcile_interval == seconds


@pytest.mark.parametrize("text", ["6 h", "-1s", "soon", "1w", "0.5h"])
def test_an_interval_that_is_none_is_said_to_be_so(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("CLERK_SYNC_RECONCILE_INTERVAL", text)
    _, faults = load()
    assert faults == [
        "CLERK_SYNC_RECONCILE_INTERVAL: must be a time such as 90s, 30m, 6h or 1d, or off"
    ]


def test_an_interval_without_a_key_is_doubted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLERK_SYNC_RECONCILE_INTERVAL", "6h")
    settings, _ = load()
    assert any("CLERK_SECRET_KEY is not" in doubt for doubt in settings.warnings(os.environ))
