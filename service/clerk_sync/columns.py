"""What a live column takes: one function per column from Clerk's value to the database's.

The database would refuse most of what is refused here. Doing it first keeps a bad event from
failing its whole batch, and gives SQLite, which checks nothing, the same answers as MySQL.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import mysql

from clerk_sync.answers import Reason

Fit = Callable[[Any], Any]
Same = Callable[[Any, Any], bool]
"""Whether a fitted value and one as the driver reads it from the column are the same."""

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
_INTEGER_BITS: Final[tuple[tuple[type, int], ...]] = (
    (mysql.TINYINT, 8),
    (mysql.MEDIUMINT, 24),
    (sa.SmallInteger, 16),
    (sa.BigInteger, 64),
    (sa.Integer, 32),
)


class Unfit(Exception):  # noqa: N818
    """The column cannot hold this value; `column` once it is known which."""

    def __init__(self, reason: Reason, column: str | None = None) -> None:
        super().__init__(reason.value)
        self.reason = reason
        self.column = column


def time_text(milliseconds: int) -> str:
    """Unix milliseconds as the UTC text that every database here stores."""
    return (_EPOCH + timedelta(milliseconds=milliseconds)).isoformat(" ", "microseconds")


def fit_for(column: sa.Column[Any], *, json_text: bool, sqlite: bool) -> Fit:
    """The column's function, for values that are not null.

    `json_text` says that a text column holds JSON, as MariaDB's do.
    """
    type_ = column.type
    if json_text or isinstance(type_, sa.JSON):
        return _json
    if isinstance(type_, sa.Boolean):
        return _integer(0, 1)
    if isinstance(type_, sa.DateTime):
        return _time
    if isinstance(type_, sa.Date):
        return lambda value: _time(value)[:10]
    if isinstance(type_, sa.Integer):
        bits = next(bits for class_, bits in _INTEGER_BITS if isinstance(type_, class_))
        if sqlite:
            bits = 64
        if getattr(type_, "unsigned", False):
            return _integer(0, 2**bits - 1)
        return _integer(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    if isinstance(type_, sa.Numeric | sa.Float):
        return _number
    if isinstance(type_, sa.Enum):
        return _text(None, None)
    if isinstance(type_, sa.String):
        octets = None if sqlite else _TEXT_BYTES.get(type(type_))
        return _text(None if octets else type_.length, octets)
    return _scalar


def same_for(column: sa.Column[Any], *, json_text: bool) -> Same:
    """The column's comparison, for values that are not null.

    The database gives values back in its own form: JSON in another order, times rounded to the
    column's precision, fixed text without its last spaces.
    """
    type_ = column.type
    if json_text or isinstance(type_, sa.JSON):
        return _same_json
    if isinstance(type_, sa.DateTime):
        # MySQL rounds, MariaDB cuts off: either way it is less than one unit.
        unit = timedelta(seconds=10.0 ** -(getattr(type_, "fsp", None) or 0))
        return lambda fitted, stored: abs(_read_time(fitted) - _read_time(stored)) < unit
    if isinstance(type_, sa.Boolean | sa.Integer):
        return lambda fitted, stored: int(fitted) == int(stored)
    if isinstance(type_, sa.Float):
        # A FLOAT of MySQL's keeps seven digits, and shows six.
        digits = 1e-5 if isinstance(type_, mysql.FLOAT) else 1e-12
        return lambda fitted, stored: math.isclose(fitted, float(stored), rel_tol=digits)
    if isinstance(type_, sa.Numeric):
        half = 0.5001 * 10.0 ** -(type_.scale or 0)
        return lambda fitted, stored: abs(fitted - float(stored)) <= half
    if isinstance(type_, sa.Enum):
        return lambda fitted, stored: str(fitted).casefold() == as_text(stored).casefold()
    if isinstance(type_, sa.CHAR):
        return lambda fitted, stored: str(fitted).rstrip(" ") == as_text(stored).rstrip(" ")
    return _same_text


def read_time_ms(value: object) -> int | None:
    """A time as a driver gives it, in unix milliseconds."""
    return (
        None if value is None else round((_read_time(value) - _EPOCH) / timedelta(milliseconds=1))
    )


def _read_time(value: object) -> datetime:
    return value if isinstance(value, datetime) else datetime.fromisoformat(as_text(value))


def as_text(value: object) -> str:
    """A text, or what a driver gives for one where the column is binary."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _same_text(fitted: Any, stored: Any) -> bool:
    if isinstance(stored, bytes) and isinstance(fitted, int):  # a BIT
        return fitted == int.from_bytes(stored)
    return as_text(fitted) == as_text(stored)


def _same_json(fitted: Any, stored: Any) -> bool:
    return bool(_parsed(fitted) == _parsed(stored))


def _parsed(text: Any) -> Any:
    return json.loads(text, parse_int=_json_integer)


def _json_integer(digits: str) -> int | float:
    """MySQL's JSON keeps an integer of more than 64 bits as a double."""
    number = int(digits)
    return number if -(2**63) <= number < 2**64 else float(number)


def _text(length: int | None, octets: int | None) -> Fit:
    def fit(value: Any) -> str:
        text = _utf8(value if type(value) is str else _written(value))
        if length is not None and len(text) > length:
            raise Unfit(Reason.TOO_LONG)
        if octets is not None and len(text.encode()) > octets:
            raise Unfit(Reason.TOO_LONG)
        return text

    return fit


def _utf8(text: str) -> str:
    """The text, unless half of a surrogate pair is in it, which JSON can say and UTF-8 cannot."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Unfit(Reason.WRONG_TYPE) from None
    return text


def _written(value: object) -> str:
    """What is no text, as text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict | list):
        return _json(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise Unfit(Reason.OUT_OF_RANGE)
    if isinstance(value, int | float | str):
        try:
            return str(value)
        except ValueError:  # Python writes no integer of more than 4300 digits
            raise Unfit(Reason.TOO_LONG) from None
    raise Unfit(Reason.WRONG_TYPE)


def _integer(least: int, most: int) -> Fit:
    def fit(value: Any) -> int:
        if type(value) is not int:
            value = _whole(value)
        if not least <= value <= most:
            raise Unfit(Reason.OUT_OF_RANGE)
        number: int = value
        return number

    return fit


def _whole(value: object) -> int:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, float) and math.isinf(value):  # a number of too many digits, or 1e400
        raise Unfit(Reason.OUT_OF_RANGE)
    if not isinstance(value, int):
        raise Unfit(Reason.WRONG_TYPE)
    return int(value)


def _number(value: Any) -> float | int:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Unfit(Reason.WRONG_TYPE)
    # Comparing takes integers of any size; NaN is in no range.
    if not -sys.float_info.max <= value <= sys.float_info.max:
        raise Unfit(Reason.OUT_OF_RANGE)
    return value


def _time(value: Any) -> str:
    if type(value) is not int:
        value = _whole(None if isinstance(value, bool) else value)
    if not _EARLIEST_MS <= value <= _LATEST_MS:
        raise Unfit(Reason.OUT_OF_RANGE)
    return time_text(value)


def _json(value: Any) -> str:
    try:
        return _utf8(_encode(value))
    except ValueError:  # a number that is infinite, or of more digits than Python writes
        raise Unfit(Reason.OUT_OF_RANGE) from None
    except (TypeError, RecursionError):
        raise Unfit(Reason.WRONG_TYPE) from None


def _scalar(value: Any) -> Any:
    """For a type that is not known here: plain values pass, and the database decides."""
    if isinstance(value, dict | list):
        return _json(value)
    if not isinstance(value, str | int | float):
        raise Unfit(Reason.WRONG_TYPE)
    if isinstance(value, float) and not math.isfinite(value):
        raise Unfit(Reason.OUT_OF_RANGE)
    return _utf8(value) if isinstance(value, str) else value
