"""What a live column takes: the same answers as MySQL in strict mode, on every database."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy.dialects import mysql
from sqlalchemy.dialects.mysql import mariadb

from clerk_sync.outcomes import QUARANTINES
from clerk_sync.store.values import InvalidValue, Other, encoder_for, time_text

# In a fresh clone, the first text waits until hypothesis has made its tables of characters.
patient = hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

Type = sa.types.TypeEngine[Any]


def fitted(
    type_: Type,
    value: object,
    *,
    json_text: bool = False,
    sqlite: bool = False,
) -> Any:
    """What the column would be given; the reason as `!reason` where it is not."""
    column = sa.Column("x", type_)
    try:
        return encoder_for(column, json_text=json_text, sqlite=sqlite)(value)
    except InvalidValue as error:
        reason = error.reason
    assert reason in QUARANTINES
    return f"!{reason.value}"


def named(part: object) -> str | None:
    """A part of a test's name, the same in every process."""
    if isinstance(part, int) and abs(part) > 2**64:
        return None
    return re.sub(r" at 0x\w+", "", repr(part))[:40]


@pytest.mark.parametrize(
    ("type_", "value", "expected"),
    [
        # Text: characters, not bytes, up to the column's length.
        (sa.String(4), "Zoë🎉", "Zoë🎉"),
        (sa.String(3), "Zoë🎉", "!too_long"),
        (sa.String(4), "", ""),
        (sa.String(), "x" * 100_000, "x" * 100_000),
        (mysql.CHAR(2), "abc", "!too_long"),
        (mysql.VARCHAR(2), "ab", "ab"),
        # Half of a surrogate pair: JSON can say it, UTF-8 cannot.
        (sa.String(9), "cut \ud83d", "!wrong_type"),
        (sa.String(9), "\udc00", "!wrong_type"),
        (sa.String(9), "\ud83d\ude00", "!wrong_type"),  # two halves are not a whole
        (sa.String(9), ["\ud83d"], "!wrong_type"),
        (sa.String(0), "\ud83d", "!wrong_type"),
        (mysql.TINYTEXT(), "\ud83d", "!wrong_type"),
        (mysql.ENUM("a"), "\ud83d", "!wrong_type"),
        (sa.types.NullType(), "\ud83d", "!wrong_type"),
        (sa.JSON(), "\ud83d", "!wrong_type"),
        (sa.JSON(), {"a": ["cut \ud83d"]}, "!wrong_type"),
        (sa.JSON(), {"\ud83d": 1}, "!wrong_type"),
        # What is no text becomes some.
        (sa.String(5), True, "true"),
        (sa.String(5), False, "false"),
        (sa.String(4), False, "!too_long"),
        (sa.String(9), 12, "12"),
        (sa.String(9), 1.5, "1.5"),
        (sa.String(20), {"a": ["é", None]}, '{"a":["é",null]}'),
        (sa.String(5), [1, 2, 3], "!too_long"),
        (sa.String(5), object(), "!wrong_type"),
        (sa.String(5), b"x", "!wrong_type"),
        # MySQL's TEXT types are as long as their bytes.
        (mysql.TINYTEXT(), "é" * 127, "é" * 127),
        (mysql.TINYTEXT(), "é" * 128, "!too_long"),
        (mysql.TEXT(), "x" * 65_535, "x" * 65_535),
        (mysql.TEXT(), "x" * 65_536, "!too_long"),
        (mysql.MEDIUMTEXT(), "x" * 65_536, "x" * 65_536),
        (mysql.LONGTEXT(), "x" * 65_536, "x" * 65_536),
        # A label is a label, not its number, nor another spelling of it.
        (mysql.ENUM("a", "bb"), "bb", "bb"),
        (mysql.ENUM("a", "bb"), "2", "!wrong_type"),
        (mysql.ENUM("a", "bb"), 2, "!wrong_type"),
        (mysql.ENUM("a", "bb"), "02", "!wrong_type"),
        (mysql.ENUM("a", "bb"), "BB", "!wrong_type"),
        (mysql.ENUM("a", "bb"), "bb ", "!wrong_type"),
        (mysql.ENUM("a", "bb"), "", "!wrong_type"),
        (mysql.ENUM("a", "2"), 2, "2"),
        (mysql.ENUM("true"), True, "true"),
        (mysql.SET("a", "b"), "a,b", "a,b"),
        (mysql.SET("a", "b"), "", ""),
        (mysql.SET("a", "b"), "b,a", "!wrong_type"),
        (mysql.SET("a", "b"), "3", "!wrong_type"),
        (mysql.SET("a", "b"), 3, "!wrong_type"),
        # A CHAR gives no last spaces back.
        (mysql.CHAR(3), "ab ", "!wrong_type"),
        (mysql.VARCHAR(3), "ab ", "ab "),
        # Bytes count as bytes, and a BINARY fills up what is shorter.
        (sa.VARBINARY(4), "éé", "éé"),
        (sa.VARBINARY(4), "ééé", "!too_long"),
        (sa.VARBINARY(4), 7, "7"),
        (sa.BINARY(4), "abcd", "abcd"),
        (sa.BINARY(4), "abc", "!wrong_type"),
        (mysql.TINYBLOB(), "x" * 256, "!too_long"),
        (mysql.TINYTEXT(charset="latin1"), "é" * 200, "é" * 200),
        (mysql.TINYTEXT(charset="ucs2"), "x" * 128, "!too_long"),
        # Integers
        (mysql.TINYINT(), 127, 127),
        (mysql.TINYINT(), -128, -128),
        (mysql.TINYINT(), 128, "!out_of_range"),
        (mysql.TINYINT(unsigned=True), 255, 255),
        (mysql.TINYINT(unsigned=True), 256, "!out_of_range"),
        (mysql.TINYINT(unsigned=True), -1, "!out_of_range"),
        (mysql.SMALLINT(), 2**15, "!out_of_range"),
        (mysql.SMALLINT(), 2**15 - 1, 2**15 - 1),
        (mysql.MEDIUMINT(), 2**23, "!out_of_range"),
        (mysql.MEDIUMINT(unsigned=True), 2**24 - 1, 2**24 - 1),
        (mysql.INTEGER(), 2**31, "!out_of_range"),
        (mysql.INTEGER(), -(2**31), -(2**31)),
        (mysql.INTEGER(unsigned=True), 2**32 - 1, 2**32 - 1),
        (sa.Integer(), 2**31, "!out_of_range"),
        (sa.BigInteger(), 2**63 - 1, 2**63 - 1),
        (sa.BigInteger(), 2**63, "!out_of_range"),
        (mysql.BIGINT(unsigned=True), 2**64 - 1, 2**64 - 1),
        (mysql.BIGINT(unsigned=True), 2**64, "!out_of_range"),
        (sa.Integer(), 10**400, "!out_of_range"),
        (sa.Integer(), True, 1),
        (sa.Integer(), 3.0, 3),
        (sa.Integer(), 3.5, "!wrong_type"),
        (sa.Integer(), "3", "!wrong_type"),
        (sa.Integer(), math.inf, "!out_of_range"),
        (sa.Integer(), math.nan, "!wrong_type"),
        (sa.Integer(), 1e300, "!out_of_range"),
        (sa.Integer(), [], "!wrong_type"),
        # Booleans
        (sa.Boolean(), True, 1),
        (sa.Boolean(), False, 0),
        (sa.Boolean(), 1, 1),
        (sa.Boolean(), 2, "!out_of_range"),
        (sa.Boolean(), "true", "!wrong_type"),
        # Numbers
        (sa.Float(), 1.5, 1.5),
        (sa.Numeric(10, 2), 3, 3),
        (sa.Float(), True, "!wrong_type"),
        (sa.Float(), "1", "!wrong_type"),
        (sa.Float(), math.inf, "!out_of_range"),
        (sa.Numeric(10, 2), math.nan, "!out_of_range"),
        (sa.Float(), 10**400, "!out_of_range"),
        # Nothing is rounded.
        (sa.Numeric(5, 2), 999.99, 999.99),
        (sa.Numeric(5, 2), 1000, "!out_of_range"),
        (sa.Numeric(5, 2), 1.005, "!out_of_range"),
        (sa.Numeric(5, 2), -0.5, -0.5),
        (mysql.DECIMAL(5, 2, unsigned=True), -0.5, "!out_of_range"),
        (mysql.DECIMAL(10, 0), 0.5, "!out_of_range"),
        (mysql.FLOAT(), 123_456, 123_456),
        (mysql.FLOAT(), 1_234_567, "!out_of_range"),
        (mysql.FLOAT(), 0.1, 0.1),
        (mysql.FLOAT(), 1e39, "!out_of_range"),
        (mysql.DOUBLE(), 2**53 + 1, "!out_of_range"),
        (mysql.DOUBLE(), 0.1 + 0.2, 0.1 + 0.2),
        (mysql.BIT(3), 7, 7),
        (mysql.BIT(3), 8, "!out_of_range"),
        (mysql.BIT(8), "1", "!wrong_type"),
        # Times
        (sa.DateTime(), 1_767_612_345_678, "2026-01-05 11:25:45.678000"),
        (mysql.DATETIME(fsp=3), 0, "1970-01-01 00:00:00.000000"),
        # Cut to the column's unit here: MySQL would round it, and MariaDB cut it off.
        (mysql.DATETIME(), 1_767_612_345_999, "2026-01-05 11:25:45.000000"),
        (mysql.DATETIME(fsp=1), 1_767_612_345_999, "2026-01-05 11:25:45.900000"),
        (mysql.DATETIME(), -1, "1969-12-31 23:59:59.000000"),
        (mysql.TIMESTAMP(), 1_999, "1970-01-01 00:00:01.000000"),
        (mysql.TIMESTAMP(), 999, "!out_of_range"),
        (mysql.TIMESTAMP(), 2**31 * 1000, "!out_of_range"),
        (sa.DateTime(), -1, "1969-12-31 23:59:59.999000"),
        (sa.DateTime(), -30_610_224_000_000, "1000-01-01 00:00:00.000000"),
        (sa.DateTime(), -30_610_224_000_001, "!out_of_range"),
        (sa.DateTime(), 253_402_300_799_999, "9999-12-31 23:59:59.999000"),
        (sa.DateTime(), 253_402_300_800_000, "!out_of_range"),
        (sa.DateTime(), 10**4000, "!out_of_range"),
        (sa.DateTime(), True, "!wrong_type"),
        (sa.DateTime(), "2026-01-05", "!wrong_type"),
        (sa.DateTime(), {}, "!wrong_type"),
        (sa.Date(), 1_767_612_345_678, "2026-01-05"),
        (sa.Date(), "x", "!wrong_type"),
        # JSON
        (sa.JSON(), {"a": "Zoë", "b": [1, None, True]}, '{"a":"Zoë","b":[1,null,true]}'),
        (mysql.JSON(), [], "[]"),
        (sa.JSON(), "text", '"text"'),
        (sa.JSON(), False, "false"),
        (sa.JSON(), {"a": math.nan}, "!out_of_range"),
        (sa.JSON(), [math.inf], "!out_of_range"),
        (sa.JSON(), {"n": [2**64 - 1]}, '{"n":[18446744073709551615]}'),
        (sa.JSON(), {"n": [10**400]}, "!out_of_range"),
        (sa.JSON(), "1" * 400, f'"{"1" * 400}"'),
        (sa.JSON(), [object()], "!wrong_type"),
        # Types of which few texts are values, and of which none is
        (mysql.TIME(), "09:30:00", "09:30:00"),
        (mysql.TIME(), 5, "!wrong_type"),
        (mysql.TIME(), "9:30", "!wrong_type"),
        (mysql.TIME(fsp=3), "09:30:00.1234", "!out_of_range"),
        (mysql.YEAR(), 2026, 2026),
        (mysql.YEAR(), 26, "!out_of_range"),
        (mysql.YEAR(), "2026", "!wrong_type"),
        (mysql.YEAR(), object(), "!wrong_type"),
        (sa.UUID(), "0190c8e2-7d5a-7cc1-a3b4-5e6f70819293", "0190c8e2-7d5a-7cc1-a3b4-5e6f70819293"),
        (sa.UUID(), "0190C8E2-7D5A-7CC1-A3B4-5E6F70819293", "!wrong_type"),
        (mariadb.INET6(), "2001:db8::1", "2001:db8::1"),
        (mariadb.INET6(), "2001:db8:0:0::1", "!wrong_type"),
        (mariadb.INET4(), "192.0.2.1", "192.0.2.1"),
        (mariadb.INET4(), 1, "!wrong_type"),
        (Other(3), "[1,2,3]", "!wrong_type"),
        (sa.types.NullType(), "x", "!wrong_type"),
        (sa.LargeBinary(), "x", "x"),
    ],
    ids=named,
)
def test_a_column_takes_what_fits(type_: Type, value: object, expected: object) -> None:
    found = fitted(type_, value)
    assert found == expected
    assert type(found) is type(expected)


def test_json_in_a_text_column_is_written_as_json() -> None:
    assert fitted(mysql.LONGTEXT(), "a", json_text=True) == '"a"'
    assert fitted(mysql.LONGTEXT(), {"a": 1}, json_text=True) == '{"a":1}'


def test_sqlite_holds_64_bits_and_any_text_in_what_it_calls_integer_and_text() -> None:
    assert fitted(sa.Integer(), 2**40, sqlite=True) == 2**40
    assert fitted(sa.Integer(), 2**63, sqlite=True) == "!out_of_range"
    assert fitted(sa.String(2), "abc", sqlite=True) == "!too_long"
    assert len(fitted(sa.Text(), "x" * 70_000, sqlite=True)) == 70_000


TYPES: list[Type] = [
    sa.String(10),
    mysql.TINYTEXT(),
    mysql.TEXT(),
    mysql.LONGTEXT(),
    mysql.ENUM("a"),
    mysql.TINYINT(),
    mysql.BIGINT(unsigned=True),
    sa.Boolean(),
    sa.Integer(),
    sa.Float(),
    sa.Numeric(10, 2),
    sa.DateTime(),
    sa.Date(),
    sa.JSON(),
    sa.LargeBinary(),
]


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


_integers = st.integers() | st.sampled_from([10**400, -(10**400), 2**63, 2**64, 10**14])
_scalars = st.one_of(
    st.booleans(),
    _integers,
    st.floats(),
    st.text(st.characters(codec=None, exclude_categories=[]), max_size=20),
    st.binary(max_size=5),
    st.builds(object),
    st.just(print),
)
_values = st.recursive(
    _scalars,
    lambda inner: (
        st.lists(inner | st.none(), max_size=3) | st.dictionaries(st.text(max_size=3), inner)
    ),
    max_leaves=6,
)


@patient
@given(_values, st.sampled_from(TYPES), st.booleans(), st.booleans())
def test_whatever_the_value_it_fits_or_is_unfit(
    value: object,
    type_: Type,
    json_text: bool,  # noqa: FBT001 -- hypothesis calls it by name
    sqlite: bool,  # noqa: FBT001
) -> None:
    found = fitted(type_, value, json_text=json_text, sqlite=sqlite)
    assert isinstance(found, str | int | float)


@pytest.mark.parametrize("type_", TYPES, ids=repr)
@pytest.mark.parametrize(
    "value",
    [nested(100_000), 10**400, -(10**5000), "\ud800"],
    ids=["deep", "400 digits", "5000 digits", "half a pair"],
)
def test_the_monstrous_fits_or_is_unfit(type_: Type, value: object) -> None:
    found = fitted(type_, value)
    assert isinstance(found, str | int)


@patient
@given(st.integers(-(2**31), 2**31 - 1))
def test_what_fits_an_integer_column_stays_itself(value: int) -> None:
    assert fitted(sa.Integer(), value) == value


@patient
@given(st.text(max_size=30))
def test_text_fits_by_its_characters_or_not_at_all(value: str) -> None:
    assert fitted(sa.String(10), value) == (value if len(value) <= 10 else "!too_long")


_jsonable = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=9,
)


@patient
@given(_jsonable)
def test_json_is_kept_whole(value: object) -> None:
    if value is not None:
        assert json.loads(fitted(sa.JSON(), value)) == value


@patient
@given(st.integers(-30_610_224_000_000, 253_402_300_799_999))
def test_times_are_written_so_that_text_order_is_time_order(milliseconds: int) -> None:
    text = time_text(milliseconds)
    assert len(text) == len("2026-01-05 11:25:45.678000")
    if milliseconds < 253_402_300_799_999:
        assert text < time_text(milliseconds + 1)
