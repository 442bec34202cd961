"""The documents say what the code does: every marked table is compared with its source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

from clerk_sync import __version__
from clerk_sync.clerk.catalog import ACTIONS, KINDS, Action
from clerk_sync.clerk.metrics import new_metrics
from clerk_sync.cli import cli
from clerk_sync.http.responses import response_to
from clerk_sync.mapping import loader
from clerk_sync.mapping.expressions import COMPUTED
from clerk_sync.outcomes import QUARANTINES, REJECTIONS, UNAVAILABILITIES, Answer, Outcome, Reason
from clerk_sync.settings import Secret, Settings
from clerk_sync.store import tables
from clerk_sync.sync.report import Report
from clerk_sync.telemetry.metrics import SETTLED
from tools import cli_reference, metrics_reference

ROOT = Path(__file__).parents[2]
# What GitHub and the site show.
PAGES = sorted(
    str(path.relative_to(ROOT))
    for folder in (".", ".github", "charts", "docs", "k8s")
    for path in (ROOT / folder).glob("*.md" if folder == "." else "**/*.md")
    if "_build" not in path.parts
)
# Words of the others are compared with the code by tests of their own.
OTHERS = (".github/", "charts/", "docs/runbooks/", "k8s/")
DOCUMENTS = [name for name in PAGES if not name.startswith(OTHERS)]
HOME = "https://github.com/clerk-sync/clerk-sync"
SOURCE = ROOT / "service" / "clerk_sync"

FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef

# Defaults that the fields cannot tell: they stand where the value is used.
USED_DEFAULTS = {
    "DATABASE_URL": Settings.DEFAULT_DATABASE,
    "DATABASE_PORT": "3306",
    "CLERK_WEBHOOK_SIGNING_SECRET": "required",
}


@cache
def text_of(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def table(name: str) -> list[list[str]]:
    """The rows of the one table behind `<!-- table: name -->`, without its head."""
    pattern = rf"<!-- table: {name} -->\n((?:\|.*\|\n)+)"
    found = [text for page in DOCUMENTS for text in re.findall(pattern, text_of(page))]
    assert len(found) == 1, f"{len(found)} tables are marked `{name}`"
    head, _, *rows = [
        [cell.strip() for cell in line[1:-1].split("|")] for line in found[0].splitlines()
    ]
    assert {len(head)} == {len(row) for row in rows}, name
    return rows


def code(cell: str) -> str:
    """What a cell has in backticks, as its only content."""
    found = re.fullmatch(r"`([^`]+)`", cell)
    assert found, f"`{cell}` is not plain code"
    return found[1]


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```$", text_of(name), re.DOTALL | re.MULTILINE)


def test_settings_are_those_of_the_code() -> None:
    wanted = {}
    for field in Settings.model_fields.values():
        name = str(field.validation_alias)
        default = USED_DEFAULTS.get(name, field.default)
        shown = default if default == "required" else f"`{default}`"
        is_secret = field.annotation == Secret | None
        wanted[name] = ["" if default is None else shown, "yes" if is_secret else ""]
    said = {code(name): [default, file] for name, default, file, _ in table("settings")}
    assert wanted == said


def test_every_variable_that_is_named_exists() -> None:
    known = {str(field.validation_alias) for field in Settings.model_fields.values()}
    known |= {f"{name}_FILE" for name in known} | {"TEST_DATABASE_URL", "TEST_DATABASES"}
    for name in DOCUMENTS:
        found = re.findall(r"\b(?:TEST_)?(?:CLERK|DATABASE|LOG)_[A-Z_]*[A-Z]\b", text_of(name))
        assert set() == set(found) - known, name


def test_answers_are_those_of_the_code() -> None:
    answers = [
        *(Answer(outcome) for outcome in SETTLED if outcome is not Outcome.QUARANTINED),
        *(Answer(Outcome.QUARANTINED, reason) for reason in QUARANTINES),
        *(Answer(Outcome.REJECTED, reason) for reason in REJECTIONS),
        *(Answer(Outcome.UNAVAILABLE, reason) for reason in UNAVAILABILITIES),
        Answer(Outcome.ERROR, Reason.INTERNAL),
    ]
    wanted = sorted((str(response_to(a).status), f"`{a.outcome}`", a.reason or "") for a in answers)
    rows = table("answers")
    said = sorted((row[0], row[1], code(row[2]) if row[2] else "") for row in rows)
    assert wanted == said
    assert set(Reason) == {answer.reason for answer in answers if answer.reason}
    assert set(Outcome) == {answer.outcome for answer in answers}


def test_every_metric_and_table_that_is_named_exists() -> None:
    metrics = {metrics_reference.name_of(metric) for metric in metrics_reference.own(new_metrics())}
    known = metrics | set(tables.metadata.tables)
    for name in DOCUMENTS:
        assert set() == set(re.findall(r"\bclerk_sync_\w+", text_of(name))) - known, name
    for _, named in table("metrics"):
        assert set(map(code, named.split(", "))) <= metrics


def test_the_page_of_the_commands_is_made_of_the_code() -> None:
    assert cli_reference.text() == cli_reference.PAGE.read_text("utf-8"), "run `make generate`"


def test_every_command_and_option_that_is_named_exists() -> None:
    known = cli_reference.commands(cli, "clerk-sync")
    for name in DOCUMENTS:
        shown = re.findall(r"`([^`\n]+)`", text_of(name)) + "".join(blocks(name, "sh")).splitlines()
        for line in shown:
            for part in re.split(r"&& |; ", line):
                words = part.split()
                if words[:1] != ["clerk-sync"] or len(words) == 1:
                    continue
                command = known.get(" ".join(words[:3])) or known.get(" ".join(words[:2]))
                assert command, f"{name}: {part}"
                options = {option for one in command.params for option in one.opts} | {"--help"}
                assert {word for word in words if word.startswith("--")} <= options, part


def test_presets_are_those_of_the_code() -> None:
    page = text_of("docs/reference/mapping.md")
    said = re.findall(r"^\| \[`(\w+)`\]\(\S+/presets/\w+\.yaml\)", page, re.MULTILINE)
    assert list(loader.PRESETS) == said
    named = ", ".join(f"`{preset}`" for preset in loader.PRESETS)
    assert named in text_of("docs/reference/settings.md")


def test_objects_and_their_events_are_those_of_the_code() -> None:
    wanted = [
        [
            f"`{kind}`",
            *(
                ", ".join(
                    f"`{type_.partition('.')[2]}`"
                    for type_, what in ACTIONS.items()
                    if what == (kind, action)
                )
                for action in (Action.SAVE, Action.DELETE)
            ),
        ]
        for kind in KINDS
    ]
    assert wanted == table("objects")


def test_column_types_are_those_of_the_code() -> None:
    assert list(loader.COLUMN_TYPES) == [code(row[0]) for row in table("types")]


def test_computed_names_are_those_of_the_code() -> None:
    assert list(COMPUTED) == [code(row[0]) for row in table("computed")]


def test_keys_of_the_mapping_are_those_of_the_code() -> None:
    with pytest.raises(loader.InvalidMapping) as invalid:
        loader.read("tables: {user: {zzz: 1}}", source="m.yaml")
    named = re.search(r"there is: (.*)", invalid.value.faults[0])
    assert named
    assert named[1].split(", ") == sorted(code(row[0]) for row in table("keys"))
    needed = [code(name) for name, need, _ in table("keys") if need == "yes"]
    assert needed == ["table", "key", "columns"]


def test_mapping_examples_can_be_read() -> None:
    for name in ("README.md", "docs/reference/mapping.md"):
        examples = blocks(name, "yaml")
        assert examples, name
        for example in examples:
            assert loader.read(example, source=name).warnings == ()


# What is spread into a line, where the call itself does not tell.
SPREAD = {
    "dict(key)": ["outcome", "reason"],
    "report.summary()": [*Report().summary()],
    "exemplar or {}": ["trace_id", "span_id"],
}
# What libraries say, at their own levels.
LIBRARIES = {("library", "warning"): ["logger", "message"]}


def spread(value: ast.expr, function: ast.AST) -> list[str]:
    """The fields of `**value` in a call: those of a dictionary of this function, or known ones."""
    if isinstance(value, ast.Name):
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == value.id:
                assert isinstance(node.value, ast.Dict)
                return [ast.literal_eval(key) for key in node.value.keys if key is not None]
    return SPREAD[ast.unparse(value)]


def log_lines() -> dict[tuple[str, str], list[str]]:
    """Each event and level that the code logs, with its fields in their order."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        functions = [one for one in ast.walk(tree) if isinstance(one, FUNCTIONS)]
        calls = [
            (function, call)
            for function in functions
            for call in ast.walk(function)
            if isinstance(call, ast.Call)
            and re.fullmatch(
                r"(log|structlog\.get_logger\(\))\.(info|warning|error|exception)",
                ast.unparse(call.func),
            )
        ]
        for function, call in calls:
            level = ast.unparse(call.func).rpartition(".")[2]
            fields = found.setdefault(
                (ast.literal_eval(call.args[0]), "error" if level == "exception" else level), []
            )
            for keyword in call.keywords:
                names = [keyword.arg] if keyword.arg else spread(keyword.value, function)
                fields += [name for name in names if name not in (*fields, "exc_info")]
            if level == "exception" or any(one.arg == "exc_info" for one in call.keywords):
                fields += [name for name in ("error_type", "traceback") if name not in fields]
    return found


def test_log_lines_are_those_of_the_code() -> None:
    wanted = log_lines() | LIBRARIES
    del wanted["delivery", "info"]
    said = {
        (code(event), level): [code(field) for field in fields.split(", ") if field]
        for event, level, fields, _ in table("log events")
    }
    assert {one: sorted(fields) for one, fields in wanted.items()} == {
        one: sorted(fields) for one, fields in said.items()
    }


def test_fields_of_a_delivery_line_are_those_of_the_code() -> None:
    *fields, trace_id, span_id = log_lines()["delivery", "info"]
    assert fields == [code(row[0]) for row in table("fields")]
    assert (trace_id, span_id) == ("trace_id", "span_id")  # see "Tracing"


def test_spans_are_those_of_the_code() -> None:
    source = (SOURCE / "telemetry" / "tracing.py").read_text("utf-8")
    path = Settings.model_fields["webhook_path"].default
    parts = re.findall(r'self\._part\("(\w+)"', source)
    assert 'f"POST {self._path}"' in source
    assert [f"POST {path}", *parts] == [code(row[0]) for row in table("spans")]


def test_internal_paths_are_those_of_the_code() -> None:
    found = re.findall(
        r'web\.(get|post)\("(/[^"]+)"', (SOURCE / "http" / "internal.py").read_text("utf-8")
    )
    routes = [("" if method == "get" else f"{method.upper()} ") + path for method, path in found]
    routes = [route.replace("{user_id}", "USER_ID") for route in routes]
    said = [code(row[0]).partition("?")[0] for row in table("internal")]
    assert routes == list(dict.fromkeys(said))


def defined() -> dict[str, tuple[str, list[str]]]:
    """Each public class of the package, with its room and its bases."""
    return {
        node.name: (path.relative_to(SOURCE).parts[0].removesuffix(".py"), bases)
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
        for bases in [[ast.unparse(base) for base in node.bases]]
    }


def is_exception(name: str, classes: dict[str, tuple[str, list[str]]]) -> bool:
    """Whether this class is an exception, by whatever way."""
    if name not in classes:
        return name in {"Exception", "ValueError", "LookupError"}
    return any(is_exception(base, classes) for base in classes[name][1])


def test_exceptions_of_the_glossary_are_those_of_the_code() -> None:
    classes = defined()
    wanted = {name: room for name, (room, _) in classes.items() if is_exception(name, classes)}
    assert wanted == {code(name): code(room) for name, _, room in table("exceptions")}


def test_log_events_of_the_glossary_are_those_of_the_code() -> None:
    said = [code(name) for names, _ in table("events") for name in names.split(", ")]
    assert sorted(said) == sorted({event for event, _ in log_lines() | LIBRARIES})


def test_rooms_of_the_glossary_and_of_the_architecture_exist() -> None:
    rooms = {path.stem for path in SOURCE.iterdir() if not path.stem.startswith("__")}
    glossary = re.findall(
        r"\| ((?:`[^`|]+`(?:, )?)+) \|$", text_of("docs/glossary.md"), re.MULTILINE
    )
    named = {code(room) for cell in glossary for room in cell.split(", ")}
    places = {one for one in named - rooms if not (SOURCE / one).exists()}
    assert [one for one in places if not (ROOT / one).exists()] == []
    assert {code(row[0]) for row in table("rooms")} <= rooms


def test_folders_are_all_there() -> None:
    named = [name for row in table("folders") for name in re.findall(r"\[`([^`]+)`\]", row[0])]
    assert [name for name in named if not (ROOT / name).is_dir()] == []
    code = {path.parent for path in ROOT.glob("*/__init__.py")}
    code |= {path.parent for path in ROOT.glob("tests/*/__init__.py")}
    assert {str(path.relative_to(ROOT)) for path in code} - {"tests"} <= {*named}


def test_make_verbs_exist() -> None:
    verbs = re.findall(r"^([a-z0-9-]+):.*## ", text_of("Makefile"), re.MULTILINE)
    said = [code(row[0]).removeprefix("make ") for row in table("verbs")]
    assert [verb for verb in said if verb not in verbs] == []
    for name in (*PAGES, "tools/demo.py", "tools/run.py"):
        for verb in re.findall(r"(?:`|^ *|\")make ([a-z0-9-]+)", text_of(name), re.MULTILINE):
            assert verb in verbs, f"{name}: make {verb}"


@cache
def anchors(name: str) -> set[str]:
    """The anchors that GitHub gives to a document's headings."""
    text = re.sub(r"^ *```.*?^ *```$", "", text_of(name), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def leads_nowhere(path: Path, anchor: str) -> bool:
    """Whether a link to this file or folder, and heading, is broken."""
    if not path.exists():
        return True
    return bool(anchor) and anchor not in anchors(str(path.resolve().relative_to(ROOT)))


@pytest.mark.parametrize("name", PAGES)
def test_links_between_files_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", text_of(name))
    local = [link.partition("#") for link in links if not re.match(r"\w+:", link)]
    page = ROOT / name
    broken = [
        path + hash_ + anchor
        for path, hash_, anchor in local
        if leads_nowhere(page.parent / path if path else page, anchor)
    ]
    assert broken == []


def test_links_to_this_repository_lead_somewhere() -> None:
    """Everywhere: the chart, its dashboard and the alerts link to GitHub, not to a file."""
    pattern = re.compile(rf"{HOME}(?:/(?:blob|tree)/main/([\w./-]*[\w/-]))?(?:#([\w-]+))?")
    broken = []
    for folder in (".", ".github", "charts", "docs", "k8s", "service", "tests"):
        for path in (ROOT / folder).glob("*.*" if folder == "." else "**/*.*"):
            if path.suffix in {".md", ".yaml", ".json", ".tpl", ".txt", ".py", ".toml"}:
                for file, anchor in pattern.findall(path.read_text("utf-8")):
                    if anchor != "readme" and leads_nowhere(ROOT / (file or "README.md"), anchor):
                        broken.append(f"{path.relative_to(ROOT)}: {file}#{anchor}")
    assert broken == []


def test_every_page_has_one_title_and_is_in_a_table_of_contents() -> None:
    pages = [name for name in PAGES if name.startswith("docs/")]
    linked = {
        str(Path(index).parent / link)
        for index in pages
        if Path(index).name in {"index.md", "README.md"}
        for link in re.findall(r"\]\(([^)\s#:]+\.md)\)", text_of(index))
    }
    assert [name for name in pages if name not in {*linked, "docs/index.md"}] == []
    for name in pages:
        text = re.sub(r"^ *```.*?^ *```$", "", text_of(name), flags=re.DOTALL | re.MULTILINE)
        assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1, name


def test_the_readme_fits_on_a_page_and_the_architecture_too() -> None:
    assert len(text_of("README.md").splitlines()) <= 150
    assert len(text_of("ARCHITECTURE.md").splitlines()) <= 150


def test_layers_are_those_of_the_import_contract() -> None:
    contracts = tomllib.loads(text_of("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    layers = next(one["layers"] for one in contracts if one["type"] == "layers")
    drawn = re.search(r"<!-- layers -->\n```\n(.*?)\n```", text_of("ARCHITECTURE.md"), re.DOTALL)
    assert drawn
    assert layers == drawn[1].splitlines()


def test_the_changelog_begins_with_this_version() -> None:
    versions = re.findall(r"^## (\S+) - ", text_of("CHANGELOG.md"), re.MULTILINE)
    assert versions[0] == __version__


def test_the_license_is_the_one_that_is_declared() -> None:
    assert tomllib.loads(text_of("pyproject.toml"))["project"]["license"] == "Apache-2.0"
    assert "Apache License\n                           Version 2.0" in text_of("LICENSE")


def test_the_demo_ends_as_it_should() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.demo"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 90
