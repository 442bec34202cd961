"""Every type of column on real servers: a value is refused, or is what the column gives back.

The comparison here knows nothing of `columns`: it is made of what the value means in JSON and of
what the server's own documentation says that the type holds.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.dialects.mysql import mariadb

from clerk_sync.database.connection import COMMIT, NO_PARAMETERS, Statement
from clerk_sync.database.errors import RejectedByDatabase
from clerk_sync.outcomes import QUARANTINES, Reason
from clerk_sync.schema import reflection
from clerk_sync.schema.migrate import migrate
from clerk_sync.store.values import Encode, InvalidValue, encoder_for, same_for
from tests.histories import Clerk, Database, mapped

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from clerk_sync.database.connection import Step

UUID: Final = "0190c8e2-7d5a-7cc1-a3b4-5e6f70819293"
# Declared as MySQL's and MariaDB's manuals do; those with a note are not on every server.
NUMBERS: Final = (
    *("TINYINT", "TINYINT UNSIGNED", "SMALLINT", "MEDIUMINT", "MEDIUMINT UNSIGNED", "INT"),
    *("INT UNSIGNED", "INT(5) ZEROFILL", "BIGINT", "BIGINT UNSIGNED", "BOOLEAN"),
    *("DECIMAL(5,2)", "DECIMAL(5,2) UNSIGNED", "DECIMAL", "DECIMAL(30,0)", "DECIMAL(65,30)"),
    *("FLOAT", "FLOAT(7,3)", "FLOAT UNSIGNED", "DOUBLE", "DOUBLE(10,2)", "REAL"),
    *("BIT", "BIT(3)", "BIT(64)", "YEAR"),
)
TIMES: Final = (
    *("DATETIME", "DATETIME(1)", "DATETIME(3)", "DATETIME(6)", "DATE"),
    *("TIMESTAMP NULL", "TIMESTAMP(2) NULL", "TIMESTAMP(6) NULL"),
)
CLOCKS: Final = ("TIME", "TIME(3)", "TIME(6)")
TEXTS: Final = (
    *("CHAR(4)", "CHAR", "VARCHAR(4)", "VARCHAR(300)", "TINYTEXT", "TEXT", "LONGTEXT"),
    *("BINARY(4)", "VARBINARY(4)", "VARBINARY(300)", "TINYBLOB", "BLOB"),
)
# Of these the server alone knows what characters they have.
NARROW: Final = (
    *("VARCHAR(20) CHARACTER SET latin1", "VARCHAR(20) CHARACTER SET ascii"),
    *("VARCHAR(20) CHARACTER SET utf8mb3", "TINYTEXT CHARACTER SET ucs2"),
    *("TINYTEXT CHARACTER SET latin1", "TINYTEXT CHARACTER SET utf32"),
)
WORDS: Final = (
    "ENUM('free','pro','3','enterprise','it''s, so')",
    "ENUM('','a') CHARACTER SET latin1",
    "SET('a','b','3')",
)
NOTHING: Final = ("POINT", "GEOMETRY")
VECTOR: Final = ("VECTOR(3)",)  # MySQL 9, and MariaDB from 11.7 on
MARIADB: Final = ("UUID", "INET4", "INET6")
JSON: Final = ("JSON",)
# SQLite takes no labels, no charsets and no NULL with a word in front.
ON_SQLITE: Final = tuple(
    one
    for one in (*NUMBERS, *TIMES, *CLOCKS, *TEXTS, *MARIADB, *JSON)
    if not re.search(r"UNSIGNED|ZEROFILL| NULL|^DOUBLE\(|^FLOAT\(|^DATETIME\(|^TIME\(", one)
)

VALUES: Final[tuple[Any, ...]] = (
    *("", " ", "3", "03", " 3", "3 ", "+3", "3.0", "1e3", "0x10", "1.5", "-0", "true", "NULL", "0"),
    *("2026-01-05", "2026-01-05T11:25:45Z", "2026-01-05 11:25:45+02:00", "26-1-5", "20260105"),
    *("0000-00-00", "11:25", "11:25:45", "11:25:45.120", "11:25:45.123456", "-11:25:45", "1 2:3:4"),
    *("838:59:59", "839:00:00", "24:00:00", "00:00:00", "-00:00:00", "112545", "now()", "current"),
    *("pro", "PRO", "pro ", " pro", "enterprise", "it's, so", "free,pro", "1,2"),
    *("a", "b", "a,b", "b,a", "a,,b", "a,a", "A", "a ", ",", "a,3"),
    *('{"a": 1}', "[1", '"x"', "ab", "abcd", "ab  ", "abcde", "a\0b", "\\", "a'b\"c\\%s;--", "\n"),
    *("Zoë", "ß", "ss", "中", "😀", "😀😀", "\x80", "é" * 127, "é" * 128, "é" * 250),
    *("x" * 255, "x" * 256, "中" * 100, "x" * 254 + "  ", "😀" * 63, "😀" * 64, "x" * 70_000),
    *(UUID, UUID.upper(), UUID.replace("-", ""), f"{{{UUID}}}", f"{UUID} "),
    *("192.0.2.1", "192.0.2.01", "192.0.2", "::1", "::ffff:192.0.2.1", "2001:db8::1"),
    *("2001:DB8::1", "2001:db8:0:0::1", "::192.0.2.1", "2001:db8::", "fe80::1%eth0"),
    *(0, 1, -1, 2, 3, 7, 8, 26, 69, 99, 100, 127, 128, 255, 256, 1900, 1901, 2026, 2155, 2156),
    *(32767, 32768, 2**23, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53 + 1, 99_999, 100_000),
    *(2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**25 + 1, 10**400, -(2**31) - 1, -(2**63), -(10**30)),
    *(0.5, 0.1, 0.125, 1.005, 9.99, 99.995, 999.99, 999.995, 1000.0, 1e3, 1e16, 1e22, 1e300, 1e-7),
    *(1e-40, 1e-300, 16_777_216, 16_777_217, 123_456, 1_234_567, 3.4e38, 3.5e38, 0.1 + 0.2, -0.0),
    *(1.5, 12.345, 12.3456, 1.7976931348623157e308, 5e-324, 3.0, 1_767_612_345.678),
    *(999, 1000, 1001, 1_767_612_345_678, 1_767_612_345_999, 253_402_300_799_999, -1),
    *(-30_610_224_000_000, -30_610_224_000_001, 2**31 * 1000 - 1, 2**31 * 1000, 2**32 * 1000),
    *(True, False, [], {}, ["a", "b"], {"a": [1, None, 2.5, "Zoë", True]}, {"n": 2**64}, [0.1]),
    *({"n": [2**64 - 1, -(2**63)]}, {"n": 10**30}, [-0.0], {"a": {"b": [[]]}}, [1e300], [1e-300]),
)


REFUSALS: Final = frozenset(f"!{reason.value}" for reason in QUARANTINES)


def answer(fit: Encode, value: Any) -> Any:
    """What the column is given; the reason as `!reason` where it is not."""
    try:
        return fit(value)
    except InvalidValue as error:
        return f"!{error.reason.value}"


def same_number(value: Any, read: Any) -> bool:
    if isinstance(read, bytes):  # a BIT
        read = int.from_bytes(read)
    exact = Decimal(repr(value)) if isinstance(value, float) else Decimal(int(value))
    return Decimal(str(read)) == exact


def same_double(value: Any, read: Any) -> bool:
    return bool(float(read) == value)


def same_time(unit: int) -> Callable[[Any, Any], bool]:
    def same(value: Any, read: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        time = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=int(value) // unit * unit)
        if isinstance(read, str):
            read = datetime.fromisoformat(read)
        return bool(read == time.replace(tzinfo=None))

    return same


def same_day(value: Any, read: Any) -> bool:
    day = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=int(value))
    return bool((date.fromisoformat(read) if isinstance(read, str) else read) == day.date())


def same_span(value: Any, read: Any) -> bool:
    if isinstance(read, str):
        return bool(read == value)
    ((sign, hours, minutes, seconds),) = re.findall(r"(-?)(\d+):(\d\d):([\d.]+)", value)
    span = timedelta(hours=int(hours), minutes=int(minutes), seconds=float(seconds))
    return bool(read == (-span if sign else span))


def same_text(value: Any, read: Any) -> bool:
    text = read.decode() if isinstance(read, bytes) else read
    if isinstance(value, bool):
        return bool(text == ("true" if value else "false"))
    if isinstance(value, str):
        return bool(text == value)
    if isinstance(value, list | dict):
        return bool(json.loads(text) == value)
    return bool(float(text) == value if isinstance(value, float) else int(text) == value)


def same_json(value: Any, read: Any) -> bool:
    # MySQL's JSON has a double for an integer of more than 64 bits, as its manual says.
    def integer(digits: str) -> float:
        return int(digits) if -(2**63) <= int(digits) < 2**64 else float(digits)

    said = json.loads(json.dumps(value), parse_int=integer)
    found = json.loads(read, parse_int=integer) if isinstance(read, str) else read
    return bool(found == said and repr(found).count("True") == repr(said).count("True"))


def comparison(declared: str, *, sqlite: bool) -> Callable[[Any, Any], bool]:
    if declared in NUMBERS:
        doubles = "DOUBLE|REAL|FLOAT" if sqlite else "DOUBLE|REAL"
        return same_double if re.match(doubles, declared) else same_number
    if declared == "DATE":
        return same_day
    if declared in TIMES:
        digits = re.search(r"\((\d)\)", declared)
        # SQLite keeps a time as text, whatever the precision.
        unit = 10 ** max(0, 3 - int(digits[1])) if digits else 1000
        return same_time(1 if sqlite else unit)
    if declared in CLOCKS:
        return same_span
    return same_json if declared in JSON else same_text


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    async with Database.at(database_url) as database:
        yield database


async def columns_of(database: Database) -> dict[str, sa.Column[Any]]:
    """A column of each type that the database has, in one table."""
    declared = ON_SQLITE
    if not database.sqlite:
        version = await database.value("SELECT VERSION()")
        declared = (
            *(*NUMBERS, *TIMES, *CLOCKS, *TEXTS, *NARROW, *WORDS, *NOTHING, *JSON),
            *(MARIADB if "MariaDB" in version else VECTOR),
        )
    columns = ", ".join(f"x{place} {type_}" for place, type_ in enumerate(declared))
    await database.ddl(f"CREATE TABLE everything (n INT PRIMARY KEY, {columns}) OPTIONS")
    found = (await reflection.inspect_tables(database.engine, {"everything": set()})).tables[
        "everything"
    ]
    return {type_: found.c[f"x{place}"] for place, type_ in enumerate(declared)}


async def stored(database: Database, column: sa.Column[Any], values: list[Any]) -> list[Any]:
    """What the column gives back for each value: written by the driver, as events are."""
    row = "(?, ?)" if database.sqlite else "(%s, %s)"
    steps: list[Step] = [
        (Statement("DELETE FROM everything"), NO_PARAMETERS),
        (
            Statement(f"INSERT INTO everything (n, {column.name}) VALUES ", row),
            [*enumerate(values)],
        ),
        (Statement(f"SELECT {column.name} FROM everything ORDER BY n"), NO_PARAMETERS),
        COMMIT,
    ]
    _, _, read, _ = await database.connections[0].run(steps)
    return [value for (value,) in read.rows]


async def taken(database: Database, column: sa.Column[Any], value: Any) -> bool:
    """Whether the server takes it, which knows the characters of its charsets."""
    try:
        await stored(database, column, [value])
    except RejectedByDatabase as refused:
        await database.connections[0].rollback()
        if refused.reason is not Reason.WRONG_TYPE:
            raise
        return False
    return True


async def test_a_value_is_refused_or_is_what_the_column_gives_back(database: Database) -> None:
    await database.connect()
    wrong = []
    for declared, column in (await columns_of(database)).items():
        fit = encoder_for(column, json_text=False, sqlite=database.sqlite)
        same = comparison(declared, sqlite=database.sqlite)
        took = [
            (value, fitted)
            for value in VALUES
            if (fitted := answer(fit, value)) not in REFUSALS
            if declared not in NARROW or await taken(database, column, fitted)
        ]
        assert bool(took) != (declared in (*NOTHING, *VECTOR)), declared
        read = await stored(database, column, [one for _, one in took]) if took else []
        ours = same_for(column, json_text=False)
        for (value, fitted), back in zip(took, read, strict=True):
            if not (same(value, back) and ours(fitted, back)):
                wrong.append((declared, str(value)[:40], str(back)[:40]))
    assert wrong == []


async def test_a_number_of_a_label_is_no_label(database: Database) -> None:
    """What the server would take for the third label goes to quarantine, from events, too."""
    if database.sqlite:
        pytest.skip("SQLite has no ENUM")
    mapping = mapped("""
tables:
  user: {table: people, key: clerk_id, columns: {plan: public_metadata.plan}}
""")
    await database.ddl(
        "CREATE TABLE people (clerk_id VARCHAR(128) EXACT PRIMARY KEY,"
        " plan ENUM('free', 'pro', 'enterprise')) OPTIONS"
    )
    await migrate(database.engine, mapping)
    store, clerk = await database.store(mapping), Clerk(mapping)
    plans = ("pro", "3", 3, "03", "PRO", "", None)
    answers = await database.apply(
        store,
        *(clerk.user(f"user_{n}", public_metadata={"plan": plan}) for n, plan in enumerate(plans)),
    )
    refused = "quarantined: wrong_type"
    assert answers == ["applied", *[refused] * 5, "applied"]
    rows = await database.rows("SELECT clerk_id, plan FROM people ORDER BY clerk_id")
    assert rows == [("user_0", "pro"), ("user_6", None)]


@pytest.mark.parametrize(
    ("declared", "type_"),
    [
        ("TINYINT", mysql.TINYINT()),
        ("SMALLINT", mysql.SMALLINT()),
        ("MEDIUMINT", mysql.MEDIUMINT()),
        ("BIGINT UNSIGNED", mysql.BIGINT(unsigned=True)),
        ("DECIMAL(5,2)", mysql.DECIMAL(5, 2)),
        ("FLOAT", mysql.FLOAT()),
        ("DOUBLE", mysql.DOUBLE()),
        ("YEAR", mysql.YEAR()),
        ("BIT(3)", mysql.BIT(3)),
        ("DATE", sa.DATE()),
        ("TIME", mysql.TIME(fsp=6)),
        ("TIMESTAMP", mysql.TIMESTAMP(fsp=3)),
        ("DATETIME", mysql.DATETIME(fsp=3)),
        ("CHAR(4)", mysql.CHAR(4)),
        ("VARCHAR(4)", mysql.VARCHAR(4)),
        ("TINYTEXT", mysql.TINYTEXT()),
        ("TINYBLOB", mysql.TINYBLOB()),
        ("UUID", sa.UUID()),
        ("INET4", mariadb.INET4()),
        ("INET6", mariadb.INET6()),
    ],
)
async def test_sqlite_which_checks_nothing_answers_as_mysql(
    tmp_path: Path, declared: str, type_: sa.types.TypeEngine[Any]
) -> None:
    async with Database.at(f"sqlite:///{tmp_path}/clerk-sync.db") as database:
        await database.execute(f"CREATE TABLE one (x {declared})")
        column = (
            (await reflection.inspect_tables(database.engine, {"one": set()})).tables["one"].c.x
        )
    ours = encoder_for(column, json_text=False, sqlite=True)
    theirs = encoder_for(sa.Column("x", type_), json_text=False, sqlite=False)
    assert {str(value): answer(ours, value) for value in VALUES} == {
        str(value): answer(theirs, value) for value in VALUES
    }
