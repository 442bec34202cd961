"""Encode Clerk's values for live columns, and compare them with stored ones.

The database would reject most of what is rejected here. Doing it first keeps a bad event from
failing its whole batch, and gives SQLite, which checks nothing, the same outcomes as MySQL.
"""

from __future__ import annotations

import decimal
import ipaddress
import json
import math
import re
import sys
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.dialects.mysql import mariadb

from clerk_sync.outcomes import Reason

Type = sa.types.TypeEngine[Any]
Encode = Callable[[Any], Any]
Same = Callable[[Any, Any], bool]
"""Whether an encoded value and one as the driver reads it from the column are the same."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC).replace(tzinfo=None)
_encode: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
# MySQL's DATETIME begins with the year 1000 and ends with 9999.
_EARLIEST_MS: Final = -30_610_224_000_000
_LATEST_MS: Final = 253_402_300_799_999
_TEXT_BYTES: Final[dict[type, int]] = {
    mysql.TINYTEXT: 2**8 - 1,
    mysql.TEXT: 2**16 - 1,
    mysql.MEDIUMTEXT: 2**24 - 1,
}
_BLOB: Final = 2**16 - 1
_BLOB_BYTES: Final[dict[type, int]] = {
    mysql.TINYBLOB: 2**8 - 1,
    mysql.MEDIUMBLOB: 2**24 - 1,
    mysql.LONGBLOB: 2**32 - 1,
}
BINARY: Final = (sa.BINARY, sa.VARBINARY, sa.LargeBinary, *_BLOB_BYTES)
"""The types of columns that hold bytes."""
# In what charsets a character takes other bytes than in UTF-8; by the driver's measure a
# character that a charset lacks is one more, and the server's to refuse.
_CODECS: Final = {
    "latin1": "cp1252",
    "ascii": "ascii",
    "ucs2": "utf-16-be",
    "utf16": "utf-16-be",
    "utf16le": "utf-16-le",
    "utf32": "utf-32-be",
}
_LENIENT: Final = {
    "utf-8": "surrogatepass",
    "cp1252": "replace",
    "ascii": "replace",
    **dict.fromkeys(("utf-16-be", "utf-16-le", "utf-32-be"), "surrogatepass"),
}
_SINGLE_BITS: Final = 24
_SINGLE_LEAST: Final = 1.17549435e-38
_SINGLE_MOST: Final = 3.40282e38
_YEARS: Final = (1901, 2155)
# A TIMESTAMP is 32 bits of seconds, and 0 is no time.
_STAMPS_MS: Final = (1000, 2**31 * 1000 - 1)
_EXACT: Final = decimal.Context(prec=decimal.MAX_PREC)
_VAST: Final = re.compile(r"\d{309}")
_NUMBER: Final = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*", re.IGNORECASE)
_SIZED: Final = (mysql.BIT, sa.BINARY, sa.VARBINARY)
_DECLARED: Final[dict[str, type[sa.types.TypeEngine[Any]]]] = {
    "TINYINT": mysql.TINYINT,
    "SMALLINT": mysql.SMALLINT,
    "MEDIUMINT": mysql.MEDIUMINT,
    "BIGINT": mysql.BIGINT,
    "YEAR": mysql.YEAR,
    "BIT": mysql.BIT,
    "BINARY": sa.BINARY,
    "VARBINARY": sa.VARBINARY,
    "TINYBLOB": mysql.TINYBLOB,
    "BLOB": sa.BLOB,
    "MEDIUMBLOB": mysql.MEDIUMBLOB,
    "LONGBLOB": mysql.LONGBLOB,
    "TINYTEXT": mysql.TINYTEXT,
    "MEDIUMTEXT": mysql.MEDIUMTEXT,
    "UUID": sa.Uuid,
    "INET4": mariadb.INET4,
    "INET6": mariadb.INET6,
}
_INTEGER_BITS: Final[tuple[tuple[type, int], ...]] = (
    (mysql.TINYINT, 8),
    (mysql.MEDIUMINT, 24),
    (sa.SmallInteger, 16),
    (sa.BigInteger, 64),
    (sa.Integer, 32),
)


class Other(sa.types.TypeEngine[Any]):
    """A type that SQLAlchemy does not know, such as VECTOR(3); it is the name of a subclass."""

    __visit_name__ = "OTHER"

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()


class TextOfBytes(sa.types.TypeDecorator[str]):
    """Text in a column of bytes, the same for SQLAlchemy as for the driver: UTF-8.

    A value holds from `least` to `most` bytes. SQLite keeps what it is given, and that is text.
    """

    impl = sa.LargeBinary
    cache_ok = True

    def __init__(self, type_: Type) -> None:
        super().__init__()
        self.least, self.most = _octets_of(type_)
        # SQLite knows no VARBINARY, and keeps what looks like a number there as one.
        self.numeric = isinstance(type_, sa.BINARY | sa.VARBINARY)

    def load_dialect_impl(self, dialect: sa.Dialect) -> Type:
        return dialect.type_descriptor(sa.Text() if dialect.name == "sqlite" else sa.LargeBinary())

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> Any:
        return value.encode() if isinstance(value, str) and dialect.name != "sqlite" else value

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> Any:  # noqa: ARG002
        try:
            return value.decode() if isinstance(value, bytes) else value
        except UnicodeDecodeError:
            return value


class InvalidValue(Exception):
    """A value does not fit its column, whose name is `column` once it is known."""

    def __init__(self, reason: Reason, column: str | None = None) -> None:
        super().__init__(reason.value)
        self.reason = reason
        self.column = column


def time_text(milliseconds: int) -> str:
    """Return Unix milliseconds as the UTC text that every database here stores."""
    return (_EPOCH + timedelta(milliseconds=milliseconds)).isoformat(" ", "microseconds")


def encoder_for(column: sa.Column[Any], *, json_text: bool, sqlite: bool) -> Encode:
    """Return the function that encodes values, other than null, for this column.

    The column gives back what it was given: nothing is rounded, cut, folded or taken for something
    else. Only times are cut to the column's unit, and MySQL's JSON has an integer of more than 64
    bits as a double. `json_text` says that a text column holds JSON, as MariaDB's do. The function
    raises InvalidValue.
    """
    type_ = column.type
    if json_text or isinstance(type_, sa.JSON):
        return _json_or_number if sqlite else _json
    if sqlite and isinstance(type_, sa.types.NullType):
        return _scalar
    for encoder in (
        _encoder_for_times,
        _encoder_for_numbers,
        _encoder_for_words,
        _encoder_for_text,
    ):
        if (encode := encoder(type_, sqlite)) is not None:
            return encode
    return _nothing


def _encoder_for_times(type_: Type, sqlite: bool) -> Encode | None:  # noqa: FBT001 -- positional, as its kin
    match type_:
        case sa.DateTime():
            return _moment(type_)
        case sa.Date():
            return lambda value: _time(value)[:10]
        case sa.Time():
            return _clock(getattr(type_, "fsp", None) or (6 if sqlite else 0))
        case mysql.YEAR():
            return _year
        case _:
            return None


def _encoder_for_numbers(type_: Type, sqlite: bool) -> Encode | None:  # noqa: FBT001
    match type_:
        case sa.Boolean():
            return _integer(0, 1)
        case mysql.BIT():
            bits = min(type_.length or 1, 63 if sqlite else 64)
            return _integer(0, 2**bits - 1)
        case sa.Integer():
            bits = next(bits for class_, bits in _INTEGER_BITS if isinstance(type_, class_))
            if sqlite and type(type_) in (sa.Integer, sa.INTEGER):
                bits = 64
            if getattr(type_, "unsigned", False):
                return _integer(0, 2**bits - 1)
            return _integer(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        case sa.Numeric() | sa.Float():
            return _number(type_, sqlite=sqlite)
        case _:
            return None


def _encoder_for_words(type_: Type, sqlite: bool) -> Encode | None:  # noqa: ARG001, FBT001
    """For types that take some texts only."""
    match type_:
        case mysql.SET():
            return _members(type_.values)
        case sa.Enum():
            return _label(type_.enums)
        case sa.Uuid():
            return _written_as(lambda text: str(uuid.UUID(text)))
        case mariadb.INET4():
            return _written_as(lambda text: str(ipaddress.IPv4Address(text)))
        case mariadb.INET6():
            return _written_as(_inet6)
        case _:
            return None


def _encoder_for_text(type_: Type, sqlite: bool) -> Encode | None:  # noqa: FBT001
    if isinstance(type_, BINARY):
        type_ = TextOfBytes(type_)
    if isinstance(type_, TextOfBytes):
        octets = _octets(type_.least, type_.most)
        return _no_number(octets) if sqlite and type_.numeric else octets
    if isinstance(type_, sa.String):
        most = _TEXT_BYTES.get(type(type_))
        text = _text(None if most else type_.length, most, _codec(type_))
        return _unpadded(text) if isinstance(type_, sa.CHAR | sa.NCHAR) else text
    return None


def same_for(column: sa.Column[Any], *, json_text: bool) -> Same:
    """Return the comparison of encoded values, other than null, with what the column gives back.

    The database gives values back in its own form: JSON in another order, times in the column's
    unit, fixed text without its last spaces, numbers with more zeros.
    """
    type_ = column.type
    if json_text or isinstance(type_, sa.JSON):
        return _same_json
    if isinstance(type_, sa.DateTime):
        # MySQL rounds, MariaDB cuts off: either way it is less than one unit.
        unit = timedelta(seconds=10.0 ** -(getattr(type_, "fsp", None) or 0))
        return lambda encoded, stored: abs(_read_time(encoded) - _read_time(stored)) < unit
    if isinstance(type_, sa.Time):
        return lambda encoded, stored: _span(encoded) == _span(stored)
    if isinstance(type_, mysql.BIT):
        return lambda encoded, stored: encoded == _bits(stored)
    if isinstance(type_, sa.Boolean | sa.Integer | mysql.YEAR):
        return lambda encoded, stored: int(encoded) == int(stored)
    if isinstance(type_, sa.Float):
        # A FLOAT of MySQL's keeps seven digits, and shows six.
        digits = 1e-5 if _is_single(type_) else 1e-12
        return lambda encoded, stored: math.isclose(encoded, float(stored), rel_tol=digits)
    if isinstance(type_, sa.Numeric):
        return lambda encoded, stored: _decimal(encoded) == Decimal(as_text(stored))
    if isinstance(type_, sa.CHAR):
        return lambda encoded, stored: str(encoded).rstrip(" ") == as_text(stored).rstrip(" ")
    return lambda encoded, stored: as_text(encoded) == as_text(stored)


def read_time_ms(value: object) -> int | None:
    """Return a time as a driver gives it in Unix milliseconds."""
    return (
        None if value is None else round((_read_time(value) - _EPOCH) / timedelta(milliseconds=1))
    )


def _read_time(value: object) -> datetime:
    return value if isinstance(value, datetime) else datetime.fromisoformat(as_text(value))


def as_text(value: object) -> str:
    """Return a text, also where the column is binary and the driver gives bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _same_json(encoded: Any, stored: Any) -> bool:
    return bool(_parsed(encoded) == _parsed(stored))


def _parsed(text: Any) -> Any:
    if isinstance(text, int | float):  # SQLite took it for a number of its own
        return text
    return json.loads(text, parse_int=_json_integer)


def _json_integer(digits: str) -> int | float:
    """MySQL's JSON keeps an integer of more than 64 bits as a double."""
    number = int(digits)
    return number if -(2**63) <= number < 2**64 else float(number)


def _text(length: int | None, octets: int | None, codec: str) -> Encode:
    def encode(value: Any) -> str:
        text = _utf8(value if type(value) is str else _written(value))
        if length is not None and len(text) > length:
            raise InvalidValue(Reason.TOO_LONG)
        if octets is not None and len(text.encode(codec, _LENIENT[codec])) > octets:
            raise InvalidValue(Reason.TOO_LONG)
        return text

    return encode


def _utf8(text: str) -> str:
    """Return the text. Raises InvalidValue for half a surrogate pair, which UTF-8 cannot say."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidValue(Reason.WRONG_TYPE) from None
    return text


def _codec(type_: sa.String) -> str:
    """Return the codec in which a TEXT column counts its bytes."""
    return _CODECS.get(getattr(type_, "charset", None) or "", "utf-8")


def _unpadded(encode: Encode) -> Encode:
    """For a CHAR, which gives text back without its last spaces."""

    def unpadded(value: Any) -> str:
        text: str = encode(value)
        if text.endswith(" "):
            raise InvalidValue(Reason.WRONG_TYPE)
        return text

    return unpadded


def _octets(least: int, most: int) -> Encode:
    """Text as UTF-8, where the column counts bytes; a BINARY fills what is short with zeros."""

    def encode(value: Any) -> str:
        text = _utf8(value if type(value) is str else _written(value))
        size = len(text.encode())
        if size > most:
            raise InvalidValue(Reason.TOO_LONG)
        if size < least:
            raise InvalidValue(Reason.WRONG_TYPE)
        return text

    return encode


def _no_number(encode: Encode) -> Encode:
    def no_number(value: Any) -> str:
        text: str = encode(value)
        if _NUMBER.fullmatch(text):
            raise InvalidValue(Reason.WRONG_TYPE)
        return text

    return no_number


def _octets_of(type_: Type) -> tuple[int, int]:
    """Return the fewest and the most bytes of a value."""
    most = _BLOB_BYTES.get(type(type_)) or getattr(type_, "length", None) or _BLOB
    return (most if isinstance(type_, sa.BINARY) else 0), most


def _label(labels: Sequence[str]) -> Encode:
    """Exactly a label: MySQL takes a number in text for a label's, and folds case."""
    known = frozenset(labels)

    def encode(value: Any) -> str:
        text = value if type(value) is str else _written(value)
        if text not in known:
            raise InvalidValue(Reason.WRONG_TYPE)
        return text

    return encode


def _members(labels: Sequence[str]) -> Encode:
    """Labels with commas between them, as MySQL writes a SET: in its order, each once."""

    def encode(value: Any) -> str:
        if type(value) is not str:
            raise InvalidValue(Reason.WRONG_TYPE)
        named = value.split(",") if value else []
        if ",".join(label for label in labels if label in named) != value:
            raise InvalidValue(Reason.WRONG_TYPE)
        return value

    return encode


def _written_as(canonical: Callable[[str], str]) -> Encode:
    """Text in the one form in which the column gives it back."""

    def encode(value: Any) -> str:
        try:
            same = type(value) is str and canonical(value) == value
        except ValueError:
            same = False
        if not same:
            raise InvalidValue(Reason.WRONG_TYPE)
        text: str = value
        return text

    return encode


def _inet6(text: str) -> str:
    address = ipaddress.IPv6Address(text)
    # The server writes the last four bytes of some in the old way, Python of none, and knows no
    # scopes.
    if int(address) >> 32 in (0, 0xFFFF) or "%" in text:
        raise ValueError(text)
    return str(address)


def declared(text: str) -> Type | None:
    """Return the MySQL type that a column of SQLite declares, such as `TINYINT` or `YEAR`."""
    found = re.fullmatch(
        r"(\w+)\s*(?:\((.*)\))?(\s+UNSIGNED)?", text.strip(), re.IGNORECASE | re.DOTALL
    )
    type_ = _DECLARED.get(found[1].upper()) if found else None
    if found is None or type_ is None:
        return None
    sizes = [int(size) for size in re.findall(r"\d+", found[2] or "")]
    if issubclass(type_, mysql.TINYINT | mysql.SMALLINT | mysql.MEDIUMINT | mysql.BIGINT):
        return type_(unsigned=found[3] is not None)
    return type_(*sizes) if issubclass(type_, _SIZED) else type_()


def _nothing(_value: Any) -> Any:
    """Reject any value: for a type that holds nothing of Clerk's, such as POINT, or is unknown."""
    raise InvalidValue(Reason.WRONG_TYPE)


def _written(value: object) -> str:
    """Return a value other than text as text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict | list):
        return _json(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidValue(Reason.OUT_OF_RANGE)
    if isinstance(value, int | float | str):
        try:
            return str(value)
        except ValueError:  # Python writes no integer of more than 4300 digits
            raise InvalidValue(Reason.TOO_LONG) from None
    raise InvalidValue(Reason.WRONG_TYPE)


def _integer(least: int, most: int) -> Encode:
    def encode(value: Any) -> int:
        if type(value) is not int:
            value = _whole(value)
        if not least <= value <= most:
            raise InvalidValue(Reason.OUT_OF_RANGE)
        number: int = value
        return number

    return encode


def _whole(value: object) -> int:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, float) and math.isinf(value):  # a number of too many digits, or 1e400
        raise InvalidValue(Reason.OUT_OF_RANGE)
    if not isinstance(value, int):
        raise InvalidValue(Reason.WRONG_TYPE)
    return int(value)


def _number(type_: sa.Numeric[Any] | sa.Float[Any], *, sqlite: bool) -> Encode:
    """Return the encoder of numbers that the column keeps to their last digit."""
    negative = not getattr(type_, "unsigned", False)
    double, single = isinstance(type_, sa.Float), _is_single(type_)
    scale, precision = type_.scale if not double else getattr(type_, "scale", None), type_.precision
    whole = None if precision is None or scale is None else 10 ** (precision - scale)

    def encode(value: Any) -> float | int:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidValue(Reason.WRONG_TYPE)
        # Comparing takes integers of any size; NaN is in no range.
        if not -sys.float_info.max <= value <= sys.float_info.max or (value < 0 and not negative):
            raise InvalidValue(Reason.OUT_OF_RANGE)
        if double and float(value) != value:
            raise InvalidValue(Reason.OUT_OF_RANGE)
        if single and value and not _keeps_single(value):
            raise InvalidValue(Reason.OUT_OF_RANGE)
        if whole is not None and not (-whole < value < whole and _places(value) <= (scale or 0)):
            raise InvalidValue(Reason.OUT_OF_RANGE)
        if sqlite and isinstance(value, int) and not -(2**63) <= value < 2**63:
            if not double:  # but SQLite would make one of it
                raise InvalidValue(Reason.OUT_OF_RANGE)
            return float(value)
        return value

    return encode


def _is_single(type_: Type) -> bool:
    """Whether it is a FLOAT of 4 bytes. SQLite's has 8, and accepts the same values."""
    return isinstance(type_, sa.FLOAT) and (type_.precision or 0) <= _SINGLE_BITS


def _keeps_single(value: float) -> bool:
    """Whether a FLOAT shows the number as it was: it shows six digits."""
    return _SINGLE_LEAST <= abs(value) <= _SINGLE_MOST and float(f"{value:.6g}") == value


def _decimal(value: float) -> Decimal:
    return Decimal(value if isinstance(value, int) else repr(value))


def _places(value: float) -> int:
    """Return the number of digits behind the point."""
    exponent = _decimal(value).normalize(_EXACT).as_tuple().exponent
    return max(0, -exponent) if isinstance(exponent, int) else 0


def _time(value: Any) -> str:
    return time_text(_milliseconds(value))


def _milliseconds(value: Any) -> int:
    if type(value) is not int:
        value = _whole(None if isinstance(value, bool) else value)
    if not _EARLIEST_MS <= value <= _LATEST_MS:
        raise InvalidValue(Reason.OUT_OF_RANGE)
    number: int = value
    return number


def _moment(type_: sa.DateTime) -> Encode:
    """Return the encoder of times, cut to the column's unit: MySQL would round, MariaDB cut."""
    if not isinstance(type_, mysql.DATETIME | mysql.TIMESTAMP):
        unit = 1
    else:
        unit = 10 ** max(0, 3 - (type_.fsp or 0))
    stamp = isinstance(type_, sa.TIMESTAMP)

    def encode(value: Any) -> str:
        milliseconds = _milliseconds(value) // unit * unit
        if stamp and not _STAMPS_MS[0] <= milliseconds <= _STAMPS_MS[1]:
            raise InvalidValue(Reason.OUT_OF_RANGE)
        return time_text(milliseconds)

    return encode


def _clock(digits: int) -> Encode:
    """`09:30:00` as text, with up to `digits` digits behind the seconds."""
    pattern = re.compile(r"-?(\d\d|[1-7]\d\d|8[0-2]\d|83[0-8]):[0-5]\d:[0-5]\d(\.\d+)?", re.ASCII)

    def encode(value: Any) -> str:
        found = pattern.fullmatch(value) if type(value) is str else None
        if found is None or value == "-00:00:00":
            raise InvalidValue(Reason.WRONG_TYPE)
        if len(found[2] or ".") - 1 > digits:
            raise InvalidValue(Reason.OUT_OF_RANGE)
        text: str = value
        return text

    return encode


def _span(value: Any) -> timedelta:
    """Return a TIME, encoded or as a driver gives it, as a timedelta."""
    if isinstance(value, timedelta):
        return value
    hours, minutes, seconds = as_text(value).lstrip("-").split(":")
    micros = round(Decimal(seconds) * 1_000_000)
    span = timedelta(hours=int(hours), minutes=int(minutes), microseconds=micros)
    return -span if as_text(value).startswith("-") else span


def _year(value: Any) -> int:
    """Four digits: MySQL takes 26 for 2026."""
    year = _whole(None if isinstance(value, bool) else value)
    if not _YEARS[0] <= year <= _YEARS[1]:
        raise InvalidValue(Reason.OUT_OF_RANGE)
    return year


def _bits(stored: Any) -> int:
    return int.from_bytes(stored) if isinstance(stored, bytes) else int(stored)


def _json(value: Any) -> str:
    try:
        text = _utf8(_encode(value))
    except ValueError:  # a number that is infinite, or of more digits than Python writes
        raise InvalidValue(Reason.OUT_OF_RANGE) from None
    except (TypeError, RecursionError):
        raise InvalidValue(Reason.WRONG_TYPE) from None
    if _VAST.search(text) and not _has_doubles(value):
        raise InvalidValue(Reason.OUT_OF_RANGE)
    return text


def _has_doubles(value: Any) -> bool:
    """Whether a double comes near every integer in it."""
    match value:
        case dict():
            return all(map(_has_doubles, value.values()))
        case list():
            return all(map(_has_doubles, value))
        case int():
            return -sys.float_info.max <= value <= sys.float_info.max
        case _:
            return True


def _json_or_number(value: Any) -> str:
    """For SQLite, which takes a number alone in a JSON column for a number of its own."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise InvalidValue(Reason.OUT_OF_RANGE)
    return _json(value)


def _scalar(value: Any) -> Any:
    """For a column of SQLite's without a type, which takes anything."""
    if isinstance(value, dict | list):
        return _json(value)
    if not isinstance(value, str | int | float):
        raise InvalidValue(Reason.WRONG_TYPE)
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidValue(Reason.OUT_OF_RANGE)
    return _utf8(value) if isinstance(value, str) else value
