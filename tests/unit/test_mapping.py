"""The mapping file: what its expressions give, and every mistake told with its line."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from jinja2 import TemplateError

from clerk_sync.clerk import samples
from clerk_sync.clerk.catalog import KINDS
from clerk_sync.clerk.signature import Delivery
from clerk_sync.mapping.change import Change, Delete, Delivered, Ignore, Quarantine, Upsert
from clerk_sync.mapping.expressions import InvalidExpression, names_in, row_of
from clerk_sync.mapping.ingest import change_of
from clerk_sync.mapping.loader import PRESETS, InvalidMapping, load, nearest, read
from clerk_sync.mapping.model import Place
from clerk_sync.outcomes import Reason

# In a fresh clone, the first text waits until hypothesis has made its tables of characters.
patient = hypothesis_settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

GOOD = """\
tables:
  user:
    table: users
    key: clerk_id
    adopt: {username: username}
    columns:
      username: username
      display_name: "[first_name, last_name] | select | join(' ')"
      email: primary_email
    on_delete: remove
    owns:
      - {table: blocks, column: user_id, references: id}
  organization:
    table: orgs
    create: true
    key: clerk_id
    columns:
      name: {value: name, type: string(255), index: true}
    on_delete: {mark: deleted_at}
"""


def faults(text: str) -> list[str]:
    with pytest.raises(InvalidMapping) as caught:
        read(text, source="m.yaml")
    assert str(caught.value) == "\n".join(caught.value.faults)
    for fault in caught.value.faults:
        assert re.match(r"m\.yaml:[1-9][0-9]*: \S", fault), fault
    return list(caught.value.faults)


def value(expression: str, **data: Any) -> Any:
    """What a column with this expression gets, alone and beside others."""
    alone = row_of({"column": expression})(data)
    beside = row_of({"a": "id", "column": expression, "b": "'x' ~ id"})(data)
    assert alone["column"] == beside["column"]
    assert list(beside) == ["a", "column", "b"]
    return alone["column"]


# A good file


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_loads_without_a_warning(name: str) -> None:
    mapping = load(name)
    assert mapping.warnings == ()
    assert mapping.source == f"preset {name}"


def test_the_default_preset_has_a_table_for_each_kind() -> None:
    tables = load(PRESETS[0]).tables
    assert PRESETS[0] == "mirror"
    assert {kind: table.table for kind, table in tables.items()} == {
        "user": "clerk_users",
        "organization": "clerk_organizations",
        "organizationMembership": "clerk_organization_memberships",
    }
    assert all(table.create and table.key == "clerk_id" for table in tables.values())


def test_the_tutorials_preset_adopts_its_users_and_owns_their_blocks() -> None:
    (table,) = load("orbytal").tables.values()
    assert (table.kind, table.table, table.create) == ("user", "users", False)
    assert [column.name for column in table.adopt] == ["username"]
    assert [(one.table, one.column, one.references) for one in table.owns] == [
        ("blocks", "user_id", "id")
    ]
    assert "tagline" not in {column.name for column in table.columns}


def test_a_file_is_read_as_it_is_written() -> None:
    mapping = read(GOOD, source="m.yaml")
    user, organization = mapping.tables["user"], mapping.tables["organization"]
    assert (user.table, user.key, user.mark, user.create) == ("users", "clerk_id", None, False)
    assert [column.name for column in user.columns] == ["username", "display_name", "email"]
    assert user.columns[0].at == Place("m.yaml", 7)
    assert str(user.owns[0].at) == "m.yaml:12"
    assert (organization.mark, organization.create) == ("deleted_at", True)
    (name,) = organization.columns
    assert (name.expression, name.type, name.index) == ("name", "string(255)", True)
    assert user.column_of("primary_email") == "email"
    assert user.column_of("last_name") is None


@pytest.mark.parametrize(
    ("on_delete", "wanted"),
    [
        ("remove", (None, None)),
        ("{mark: deleted_at}", ("deleted_at", None)),
        ("{mark: deleted_at, purge_after: 30d}", ("deleted_at", 2_592_000_000)),
        ("{purge_after: 12h, mark: deleted_at}", ("deleted_at", 43_200_000)),
        ("{mark: deleted_at, purge_after: 99999d}", ("deleted_at", 99_999 * 86_400_000)),
    ],
)
def test_a_delete_removes_or_marks_and_purges_later(
    on_delete: str, wanted: tuple[str | None, int | None]
) -> None:
    user = read(table(rest=f", on_delete: {on_delete}"), source="m.yaml").tables["user"]
    assert (user.mark, user.purge_after_ms) == wanted


def test_a_delete_sets_columns_to_constants() -> None:
    constants = """{mark: deleted_at, purge_after: 30d, set: {
      email: null, c: ~, name: gone, empty: '', number: 7, ratio: -1.5, yes: true, no: false,
      digits: '7', word: "null"
    }}"""
    user = read(table(rest=f", on_delete: {constants}"), source="m.yaml").tables["user"]
    assert (user.mark, user.purge_after_ms) == ("deleted_at", 2_592_000_000)
    sets = {one.name: one.value for one in user.sets}
    assert sets == {
        "email": None,
        "c": None,
        "name": "gone",
        "empty": "",
        "number": 7,
        "ratio": -1.5,
        "yes": True,
        "no": False,
        "digits": "7",
        "word": "null",
    }
    assert user.sets[2].at == Place("m.yaml", 2)
    plain = read(table(rest=", on_delete: {mark: d}"), source="m.yaml").tables["user"]
    assert plain.sets == ()


def test_a_file_is_loaded_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text("# Müller & Söhne\n" + GOOD)
    assert load(str(path)).tables.keys() == {"user", "organization"}


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("mirorr", "No such file or directory: give the path of a mapping file, or mirror or orb"),
        ("", "Is a directory"),
        ("latin", "not UTF-8 text"),
    ],
)
def test_a_file_that_cannot_be_read_is_a_fault(tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / "latin").write_bytes(b"\xe9\xff")
    with pytest.raises(InvalidMapping, match=what) as caught:
        load(str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)


# Faults


def table(columns: str = "{c: id}", rest: str = "", *, kind: str = "user") -> str:
    """A mapping file of one line."""
    return f"tables: {{{kind}: {{table: t, key: k, columns: {columns}{rest}}}}}"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        # The whole file
        ("", "1: the mapping file must be `name: value` pairs"),
        ("- 1", "1: the mapping file must be `name: value` pairs"),
        ("tables", "1: the mapping file must be `name: value` pairs"),
        ("\ntabels: {}", "2: the mapping file has no `tabels`; did you mean `tables`?"),
        ("{}", "1: the mapping file needs `tables:`"),
        ("tables: 5", "1: `tables` must be `name: value` pairs"),
        ("tables: [user]", "1: `tables` must be `name: value` pairs"),
        ("tables: {}\ntables: {}", "2: the mapping file: `tables` is there twice"),
        # Not YAML
        ("tables: [1", "1: not YAML: expected ',' or ']', but got '<stream end>'"),
        ("tables:\n  a: b: c", "2: not YAML: mapping values are not allowed here"),
        ("tables:\n\tuser: x", "2: not YAML: found character '\\t' that cannot start any token"),
        ("a: 1\n---\nb: 2", "2: not YAML: but found another document"),
        ("a: *b", "1: not YAML: found undefined alias 'b'"),
        ("a: 1\nb: \x00", "2: not YAML text: special characters are not allowed"),
        # Kinds
        ("tables:\n  users: {}", "2: `tables` has no `users`; did you mean `user`?"),
        (
            "tables:\n  organization_membership: {}",
            "2: `tables` has no `organization_membership`; did you mean `organizationMembership`?",
        ),
        (
            "tables: {zzz: {}}",
            "1: `tables` has no `zzz`; there is: " + ", ".join(sorted(KINDS)),
        ),
        (
            "tables: {email: {}}",
            "1: `tables` may not have `email`: its events carry one-time codes, which are never",
        ),
        ("tables:\n  sms: {}", "2: `tables` may not have `sms`: its events carry one-time codes"),
        ("tables:\n  [1]: {}", "2: `tables`: a name must be plain text"),
        (
            "tables:\n  user: {table: t, key: k, columns: {}}\n  user: {}",
            "3: `tables`: `user` is there twice",
        ),
        (
            f"{table()[:-1]},\n  organization: {{table: t, key: k, columns: {{c: id}}}}}}",
            "2: `t` already holds the users",
        ),
        # A table
        ("tables: {user: {table: t, columns: {c: id}}}", "1: `user` needs `key:`"),
        (table(rest=", kye: x"), "1: `user` has no `kye`; did you mean `key`?"),
        (table(rest=", ondelete: x"), "1: `user` has no `ondelete`; did you mean `on_delete`?"),
        (table(rest=", key: x"), "1: `user`: `key` is there twice"),
        (table().replace("table: t", "table: ''"), "1: `table` must be text"),
        (table().replace("table: t", "table: [t]"), "1: `table` must be text"),
        (table().replace("key: k", "key: {k: 1}"), "1: `key` must be text"),
        (table(rest=", create: yes"), "1: `yes` must be true or false"),
        (table(rest=", create: True"), "1: `True` must be true or false"),
        (
            table(rest=", create: true"),
            "1: `c` needs a `type:`, as `create: true` makes its column",
        ),
        # on_delete
        (table(rest=", on_delete: drop"), "1: `on_delete` must be `remove` or `{mark: column}`"),
        (table(rest=", on_delete: [mark]"), "1: `on_delete` must be `name: value` pairs"),
        (
            table(rest=", on_delete: {mrak: x}"),
            "1: `on_delete` has no `mrak`; did you mean `mark`?",
        ),
        (table(rest=", on_delete: {mark: [x]}"), "1: `mark` must be text"),
        (table(rest=", on_delete: {}"), "1: `on_delete` needs `mark:`"),
        (table(rest=", on_delete: {purge_after: 3d}"), "1: `on_delete` needs `mark:`: only what"),
        (
            table(rest=", on_delete: {mark: d, purge_afer: 3d}"),
            "1: `on_delete` has no `purge_afer`; did you mean `purge_after`?",
        ),
        (
            table(rest=", on_delete: {mark: d, purge_after: [3d]}"),
            "1: `purge_after` must be text",
        ),
        *(
            (
                table(rest=f", on_delete:\n  {{mark: d, purge_after: '{text}'}}"),
                f"2: `{text}` is no time: write days as `30d`, hours as `12h`",
            )
            for text in ("30", "0d", "-1d", "1.5d", "30 d", "d", "30m", "1d12h", "100000d", "٣d")
        ),
        (table(rest=", on_delete: {mark: c}"), "1: `c` is filled by clerk-sync already"),
        (table(rest=", on_delete: {set: {c: null}}"), "1: `on_delete` needs `mark:`: only what"),
        (table(rest=", on_delete: {mark: d, set: c}"), "1: `set` must be `name: value` pairs"),
        (table(rest=", on_delete: {mark: d, set: {c: 1, c: 2}}"), "1: `set`: `c` is there twice"),
        *(
            (
                table(rest=f", on_delete: {{mark: d,\n  set: {{\n c: {text}}}}}"),
                "3: `c` must be set to null, true, false, a number, or text in quotes",
            )
            for text in (
                *("[1]", "{a: 1}", ".inf", "-.inf", ".nan", "2026-01-05", "!!int x", "!a b"),
                *(
                    "no",
                    "off",
                    "Yes",
                    "TRUE",
                    "012",
                    "0x1f",
                    "1_000",
                    "1:30",
                    "+1",
                    "1." + "0" * 40,
                ),
                "1" * 5000,
            )
        ),
        *(
            (
                table(rest=f", on_delete: {{mark: d,\n  set: {{{name}: null}}}}"),
                f"2: `{name}` is filled by clerk-sync already",
            )
            for name in "kd"
        ),
        # owns
        (table(rest=", owns: blocks"), "1: `owns` must be a list of `{table: …, column: …, refe"),
        (
            table(rest=", owns: {table: b}"),
            "1: `owns` must be a list of `{table: …, column: …, refe",
        ),
        (table(rest=", owns: [{table: b}]"), "1: `owns` needs `table`, `column` and `references`"),
        (table(rest=", owns: [{table: b, column: '', references: i}]"), "1: `column` must be text"),
        # Columns
        (table("[c]"), "1: `columns` must be `name: value` pairs"),
        (table("{c: id, c: id}"), "1: `columns`: `c` is there twice"),
        (table("{k: id}"), "1: `k` is filled by clerk-sync already"),
        (table("{c: [id]}"), "1: `c` must be text"),
        (table("{c:}"), "1: `c` must be text"),
        (table("{c: {}}"), "1: `c` needs `value:`"),
        (table(rest=", adopt: username"), "1: `adopt` must be `name: value` pairs"),
        (
            table("{c: {value: id, type: strin(5)}}"),
            "1: no column type `strin(5)`; did you mean `string(255)`?",
        ),
        (
            table("{c: {value: id, type: bool}}"),
            "1: no column type `bool`; did you mean `boolean`?",
        ),
        (
            table("{c: {value: id, type: varchar}}"),
            "1: no column type `varchar`; there is: boolean, id, integer, json, string(255), text",
        ),
        (
            table("{c: {value: id, index: 1}}"),
            "1: `1` must be true or false",
        ),
        # Expressions
        (table("{c: 'a |'}"), "1: `c`: `a |` is not an expression: unexpected end of template"),
        (table("{c: '(a'}"), "1: `c`: `(a` is not an expression: "),
        (table("{c: 'a b'}"), "1: `c`: `a b` is not an expression: "),
        (
            table("{c: 'a | uper'}"),
            "1: `c`: `a | uper` is not an expression: No filter named 'uper'.",
        ),
        (
            table(rest=", adopt: {c: 'a is foo'}"),
            "1: `c`: `a is foo` is not an expression: No test named 'foo'.",
        ),
    ],
)
def test_a_fault_is_told_with_its_line_and_what_was_meant(text: str, fault: str) -> None:
    (found,) = faults(text)
    assert found.startswith(f"m.yaml:{fault}")


def test_what_says_whose_a_row_is_cannot_be_set() -> None:
    found = faults(
        """\
tables:
  user:
    table: users
    key: clerk_id
    columns: {username: username}
    on_delete: {mark: deleted_at, set: {id: 0, username: null}}
    owns:
      - {table: blocks, column: user_id, references: id}
      - {table: members, column: whose, references: clerk_id}
  organizationMembership:
    table: members
    key: clerk_id
    columns: {user: public_user_data.user_id, whose: role, other: "public_user_data.user_id or 0"}
    on_delete:
      mark: deleted_at
      set:
        user: null
        other: null
        whose: null
"""
    )
    assert found == [
        "m.yaml:6: `set` may not change `id`: `owns` at m.yaml:8 refers to it",
        "m.yaml:17: `set` may not change `user`: `erase` finds a user's rows by it",
        "m.yaml:19: `set` may not change `whose`: `owns` at m.yaml:9 finds rows by it",
    ]


def test_a_misspelt_key_is_told_and_so_is_that_it_is_missing() -> None:
    misspelt, missing = faults(table(rest=", owns: [{tabel: b, column: c, references: i}]"))
    assert misspelt == "m.yaml:1: `owns` has no `tabel`; did you mean `table`?"
    assert missing == "m.yaml:1: `owns` needs `table`, `column` and `references`"
    misspelt, missing = faults(table("{c: {vlaue: id}}"))
    assert misspelt == "m.yaml:1: `c` has no `vlaue`; did you mean `value`?"
    assert missing == "m.yaml:1: `c` needs `value:`"


def test_all_faults_are_told_at_once() -> None:
    found = faults(
        """\
tables:
  usr: {}
  user:
    table: [x]
    key: clerk_id
    colums: {}
    columns:
      a: "first_name |"
      b: {value: id, type: strng}
      b: id
      clerk_id: id
      c: ''
    adopt: {username: "("}
    on_delete: forget
    owns:
      - {table: blocks}
      - 7
    create: maybe
  organization:
    create: true
  organizationMembership:
    table: m
    key: k
    columns: {a: role}
    owns: nothing
"""
    )
    lines = [int(fault.split(":")[1]) for fault in found]
    assert sorted(set(lines)) == [2, 4, 6, 8, 9, 10, 11, 12, 13, 14, 16, 17, 18, 19, 25]
    assert [fault for fault in found if "`organization` needs" in fault] == [
        f"m.yaml:19: `organization` needs `{needed}:`" for needed in ("table", "key", "columns")
    ]


def test_a_field_that_clerk_does_not_have_is_a_warning_with_the_nearest() -> None:
    text = GOOD.replace("username: username\n", "username: usrname\n")
    (warning,) = read(text, source="m.yaml").warnings
    assert warning == (
        "m.yaml:7: `usrname` is no field of Clerk's user known to this version, "
        "and will be null unless Clerk sends it; did you mean `username`?"
    )


def test_each_kind_has_fields_of_its_own() -> None:
    assert read(table("{c: slug}"), source="m.yaml").warnings
    of_organization = table("{c: slug}", kind="organization")
    assert read(of_organization, source="m.yaml").warnings == ()


def test_the_nearest_name_is_told_or_all() -> None:
    assert nearest("colums", ["columns", "key"]) == "; did you mean `columns`?"
    assert nearest("zzz", ["b", "a"]) == "; there is: a, b"
    assert nearest("x", []) == "; there is: -"


def read_or_told(text: str) -> None:
    told: tuple[str, ...] = ()
    try:
        read(text, source="m.yaml")
    except InvalidMapping as error:
        told = error.faults
    assert all(re.match(r"m\.yaml:[0-9]+: ", fault) for fault in told)


@patient
@given(st.text(st.characters(codec=None, exclude_categories=[]), max_size=60))
def test_whatever_the_file_holds_it_is_read_or_its_faults_are_told(text: str) -> None:
    read_or_told(text)


_fragments = st.sampled_from(
    [
        *("user", "table", "key", "columns", "owns", "id", "value", "adopt", "on_delete", "mark"),
        *(
            "purge_after",
            "30d",
            "remove",
            "create",
            "true",
            "x|",
            "",
            "type",
            "json",
            "column",
            "references",
            "7",
        ),
    ]
)
_trees = st.recursive(
    _fragments,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_fragments, inner, max_size=5),
    max_leaves=15,
)


@patient
@given(_trees)
def test_whatever_shape_the_file_has_it_is_read_or_its_faults_are_told(tree: object) -> None:
    for text in (f"{{tables: {tree}}}", f"{{tables: {{user: {tree}}}}}"):
        read_or_told(text)


# Expressions


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("username", "ada"),
        (" username ", "ada"),
        ("username | upper", "ADA"),
        ("username.upper()", "ADA"),
        ("first_name or username", "Zoë"),
        ("last_name or username", "ada"),
        ("[first_name, last_name] | select | join(' ')", "Zoë"),
        ("public_metadata.plan", "pro"),
        ("public_metadata['plan']", "pro"),
        ("public_metadata.deep.list[1]", 2),
        ("public_metadata", {"plan": "pro", "deep": {"list": [1, 2]}, "items": 7, "get": None}),
        ("banned", False),
        ("not banned", True),
        ("created_at", 1_767_612_345_678),
        ("created_at // 1000", 1_767_612_345),
        ("'user'", "user"),
        ("'Größe 🎉'", "Größe 🎉"),
        ("7", 7),
        ("true", True),
        ("none", None),
        ("[1, username]", [1, "ada"]),
        ("{'a': username}", {"a": "ada"}),
        ("'yes' if banned else 'no'", "no"),
        ("username in ['ada']", True),
        ("first_name ~ ' ' ~ username", "Zoë ada"),
        # Missing is null
        ("nothing", None),
        ("last_name", None),
        ("nothing.at.all", None),
        ("nothing['at']['all'][7]", None),
        ("last_name.first", None),
        ("username.nothing", None),
        ("created_at.x.y", None),
        ("public_metadata.deep.list[9]", None),
        ("public_metadata.deep.list.x", None),
        ("nothing | default('x')", "x"),
        ("'x' if nothing", None),
        # The methods of Python's dict are fields like others
        ("public_metadata.items", 7),
        ("public_metadata['items']", 7),
        ("public_metadata.get", None),
        ("public_metadata.keys", None),
        ("public_metadata['keys']", None),
        ("public_metadata.values.x", None),
        ("public_metadata['pop']['x']", None),
        ("items", None),
    ],
)
def test_an_expression_reads_clerks_object(expression: str, expected: object) -> None:
    metadata = {"plan": "pro", "deep": {"list": [1, 2]}, "items": 7, "get": None}
    found = value(
        expression,
        username="ada",
        first_name="Zoë",
        last_name=None,
        banned=False,
        created_at=1_767_612_345_678,
        public_metadata=metadata,
    )
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    "expression",
    [
        "''.__class__",
        "''['__class__']",
        "'' | attr('__class__')",
        "''.__class__.__mro__",
        "data.__class__",
        "data['__class__']",
        "data | attr('__init__')",
        "data.x.__globals__",
        "'{0.__class__}'.format(1)",
        "username.upper.__self__",
        "username.format.__globals__",
        "[].append.__self__",
        "[].append(1)",
        "data.update({'a': 1})",
        "range(9)",
        "lipsum()",
        "cycler('a')",
        "dict(a=1)",
        "namespace()",
        "joiner()",
        "self.__init__",
        "self._TemplateReference__context",
        "__import__('os')",
        "caller()",
    ],
)
def test_an_expression_reaches_nothing_else(expression: str) -> None:
    data = {"username": "ada", "data": {"x": 1}}
    found = None
    with contextlib.suppress(TemplateError):
        found = row_of({"column": expression})(data)["column"]
    assert found in (None, "")
    assert data == {"username": "ada", "data": {"x": 1}}


@pytest.mark.parametrize(
    "expression",
    [
        *("", " ", "a b", "a }} {{ b", "a) }} {{ (b", "a, 'x': b", "a) , 'x': (b", "{# a #}"),
        *("a # b", "a %}", "a -}}{{- b", "(a", "a)", "**a", "a; b", "a = 1", "{% set a = 1 %}"),
    ],
)
def test_what_is_not_one_expression_is_refused(expression: str) -> None:
    with pytest.raises(InvalidExpression):
        names_in(expression)


def test_the_names_in_an_expression_are_clerks_fields() -> None:
    assert names_in("[first_name, public_metadata.last_name] | select('x') | join(' ')") == {
        "first_name",
        "public_metadata",
    }


@patient
@given(st.text(max_size=30))
def test_whatever_the_expression_it_is_read_or_refused(expression: str) -> None:
    try:
        names_in(expression)
    except InvalidExpression:
        return
    row_of({"column": expression})


ADDRESSES = [
    {"id": "idn_1", "email_address": "first@example.com"},
    {"id": "idn_2", "email_address": "primary@example.com"},
]


@pytest.mark.parametrize(
    ("primary_id", "addresses", "expected"),
    [
        ("idn_2", ADDRESSES, "primary@example.com"),
        ("idn_1", ADDRESSES, "first@example.com"),
        ("idn_3", ADDRESSES, None),
        (None, ADDRESSES, None),
        ("idn_2", [], None),
        ("idn_2", None, None),
        ("idn_2", "idn_2", None),
        ("idn_2", {"id": "idn_2"}, None),
        ("idn_2", [None, 7, "idn_2", {"id": "idn_2"}], None),
        ("idn_2", [*ADDRESSES, {"id": "idn_2", "email_address": "no"}], "primary@example.com"),
        (None, [{"id": None, "email_address": "no"}], None),
        (None, [{"email_address": "no"}], None),
        (["idn_2"], ADDRESSES, None),
    ],
)
def test_the_primary_email_is_the_one_that_the_id_names(
    primary_id: object, addresses: object, expected: object
) -> None:
    data = {"primary_email_address_id": primary_id, "email_addresses": addresses}
    assert value("primary_email", **data) == expected
    phones: object = addresses
    if isinstance(addresses, list):
        phones = [
            {"id": one.get("id"), "phone_number": one.get("email_address")}
            for one in addresses
            if isinstance(one, dict)
        ]
    assert value("primary_phone", primary_phone_number_id=primary_id, phone_numbers=phones) == (
        expected
    )


def test_without_addresses_there_is_no_primary() -> None:
    assert value("primary_email", primary_email_address_id="idn_1") is None
    assert value("primary_email", email_addresses=ADDRESSES) is None
    assert value("primary_email | upper", email_addresses=[]) == "NONE"


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        ("Ada", "Lovelace", "Ada Lovelace"),
        ("Zoë", None, "Zoë"),
        (None, "Núñez 🎉", "Núñez 🎉"),
        (None, None, None),
        ("", "", None),
        ("Ada", "", "Ada"),
        (7, ["x"], None),
    ],
)
def test_the_full_name_is_what_there_is_of_it(
    first: object, last: object, expected: object
) -> None:
    assert value("full_name", first_name=first, last_name=last) == expected


def test_computed_names_go_before_fields_of_the_same_name() -> None:
    assert value("full_name", full_name="Clerk's own", first_name="Ada") == "Ada"


@patient
@given(
    st.dictionaries(
        st.sampled_from(sorted(samples.fields_of("user"))) | st.text(max_size=6),
        st.none() | st.integers() | st.text(max_size=9) | st.lists(st.none() | st.text(max_size=3)),
    )
)
def test_an_object_is_not_changed_by_reading_it(data: dict[str, Any]) -> None:
    before = dict(data)
    for name in PRESETS:
        load_once(name).tables["user"].row(data)
    assert data == before


_loaded = {name: load(name) for name in PRESETS}


def load_once(name: str) -> Any:
    return _loaded[name]


# From a delivery to a change


def test_a_user_becomes_the_row_that_the_tutorials_function_wrote() -> None:
    body = (
        '{"type":"user.created","timestamp":1767612345678,"data":{"id":"user_1","username":"ada",'
        '"first_name":"Ada","last_name":null,"image_url":"https://img","updated_at":1767612345670}}'
    )
    change = change_of(Delivery("msg_1", 1_767_612_345, body), load("orbytal"), instance_id=None)
    assert change == Change(
        Delivered("msg_1", "user.created", 1_767_612_345_678, body),
        Upsert(
            ("user", "user_1"),
            (1_767_612_345_670, 1_767_612_345_678, "msg_1"),
            {"username": "ada", "display_name": "Ada", "img_url": "https://img"},
            {"username": "ada"},
        ),
    )


@pytest.mark.parametrize(
    "type_", ["organization.created", "organizationMembership.deleted", "session.created"]
)
@pytest.mark.parametrize(
    "data", [{"id": "x_1"}, {"id": "x_1", "updated_at": "odd"}, {"id": None}, None]
)
def test_a_kind_that_is_not_mapped_is_ignored_whatever_it_holds(type_: str, data: object) -> None:
    body = json.dumps({"type": type_, "data": data})
    change = change_of(Delivery("msg_1", 1, body), load("orbytal"), instance_id=None)
    assert (change.type, change.effect) == (type_, Ignore())
    assert not change.characters


@pytest.mark.parametrize(
    "expression", ["nothing + 1", "1 // 0", "username.x()", "username + 1", "range(9)"]
)
def test_an_expression_that_fails_makes_its_event_unusable(expression: str) -> None:
    mapping = read(table(f"{{c: {expression}}}"), source="m.yaml")
    body = '{"type":"user.updated","data":{"id":"user_1","username":"ada"}}'
    change = change_of(Delivery("msg_1", 1, body), mapping, instance_id=None)
    assert isinstance(change.effect, Quarantine)
    assert (change.effect.reason, change.clerk_id) == (Reason.BAD_EXPRESSION, "user_1")
    assert change.source == Delivered("msg_1", "user.updated", payload=body)


def test_an_expression_is_not_asked_about_what_is_deleted() -> None:
    mapping = read(table("{c: nothing + 1}"), source="m.yaml")
    body = '{"type":"user.deleted","data":{"id":"user_1"}}'
    change = change_of(Delivery("msg_1", 1, body), mapping, instance_id=None)
    assert change.effect == Delete(("user", "user_1"), 1000)
