"""`clerk-sync backfill`, `reconcile` and `ensure`: the tables beside Clerk's API."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import sys
import time
from typing import TYPE_CHECKING, Final

import click
import structlog
from tqdm import tqdm

from clerk_sync import app
from clerk_sync.clerk.api import ClerkRefused, ClerkUnavailable
from clerk_sync.clerk.metrics import new_metrics
from clerk_sync.cli.common import command, load, text, unnamed
from clerk_sync.cli.exits import fail
from clerk_sync.outcomes import Ending
from clerk_sync.schema.checks import SchemaMismatch
from clerk_sync.settings import InvalidSettings, Settings
from clerk_sync.store import profiles
from clerk_sync.store.lease import LeaseHeld, LeaseLost
from clerk_sync.sync.ensure import NotMapped
from clerk_sync.sync.report import Report
from clerk_sync.sync.safety import SafetyStop
from clerk_sync.telemetry import logs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from clerk_sync.mapping.model import Mapping
    from clerk_sync.sync.diff import Comparison

log = structlog.get_logger()

PROGRESS_SECONDS: Final = 10.0
IN_SYNC, FAILED, DRIFT = 0, 1, 2


def _load() -> tuple[Settings, Mapping]:
    settings, mapping = load()
    logs.configure(settings.log_level, settings.log_format, file=sys.stderr)
    return settings, mapping


@contextlib.asynccontextmanager
async def _stated(settings: Settings) -> AsyncIterator[None]:
    """Within, what keeps a run from its end is one sentence, and SIGTERM ends it in good order."""
    task = asyncio.current_task()
    assert task is not None
    # A pod that is stopped gives its lease back first.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        yield
    except InvalidSettings as error:
        fail(*error.faults)
    except SchemaMismatch as error:
        fail(*error.faults, *unnamed(settings))
    except (ClerkUnavailable, ClerkRefused, LeaseHeld, LeaseLost, SafetyStop, NotMapped) as error:
        fail(str(error))


def _collect_seldom() -> None:
    """Keep the garbage collector from a third of the time.

    Pages make hundreds of thousands of objects and no cycles.
    """
    gc.freeze()
    gc.set_threshold(1_000_000, 50, 100)


@command("CLERK_SECRET_KEY=sk_live_… DATABASE_URL=mysql://… clerk-sync backfill")
@click.option("--restart", is_flag=True, help="Start from the beginning, not from a checkpoint.")
async def backfill(*, restart: bool) -> int:
    """Write all users, organizations and memberships that Clerk has.

    Safe while the service runs: newer rows are kept. After a crash or Ctrl-C, the same command
    resumes from its checkpoint. Exit code 1 if anything could not be written, or if Clerk's counts
    and the tables' differ at the end.
    """
    settings, mapping = _load()
    report = Report()
    async with _stated(settings), app.open_runs(settings, mapping, new_metrics()) as runs:
        _collect_seldom()
        with _progress() as on_page:
            ending = await runs.backfill(restart=restart, report=report, on_page=on_page)
    if report.resumed is not None:
        at = report.resumed.isoformat(sep=" ", timespec="seconds")
        click.echo(f"resumed the backfill of {at}")
    for why in report.restarted:
        click.echo(why)
    for kind, tally in report.tallies.items():
        unchanged = tally.read - tally.written - tally.invalid
        click.echo(
            f"{kind}: read {tally.read}, wrote {tally.written}, unchanged {unchanged}, "
            f"failed {tally.invalid}; {_counts(report, kind)}"
        )
    _print_rest(
        report,
        "not everything is in sync: the log names the objects that could not be written; "
        "`clerk-sync reconcile` finds the rest, and deletes orphaned rows",
    )
    return FAILED if ending is Ending.UNMENDED else IN_SYNC


@command("clerk-sync reconcile --dry-run")
@click.option("--dry-run", is_flag=True, help="Write nothing; print what differs.")
@click.option("--show-values", is_flag=True, help="Also print the values, which are personal data.")
@click.option(
    "--breaker",
    type=click.FloatRange(0, 100),
    metavar="PERCENT",
    help="The deletion guard: how much of a table may be deleted. "
    "Default: CLERK_SYNC_BREAKER_PERCENT.",
)
@click.option(
    "--mended-ok", is_flag=True, help="Exit code 0 if everything was repaired, for example in cron."
)
async def reconcile(
    *, dry_run: bool, show_values: bool, breaker: float | None, mended_ok: bool
) -> int:
    """Find missing, outdated, drifted and orphaned rows, and repair them.

    Only one run at a time, across all replicas. Exit code 0: everything was in sync. 2: something
    was not. 1: the run failed, or the deletion guard stopped it before it deleted anything.
    """
    if show_values and not dry_run:
        fail("--show-values needs --dry-run")
    if mended_ok and dry_run:
        fail("--mended-ok makes no sense with --dry-run, which repairs nothing")
    settings, mapping = _load()
    percent = settings.breaker_percent if breaker is None else breaker
    report = Report()

    def show(kind: str, one: Comparison) -> None:
        columns = ", ".join(difference.column for difference in one.differences)
        click.echo(f"{kind} {one.clerk_id} {one.verdict.value}" + (f": {columns}" * bool(columns)))
        if show_values:
            for difference in one.differences:
                click.echo(f"  {difference.column}: {difference.stored!r} -> {difference.wanted!r}")

    async with _stated(settings), app.open_runs(settings, mapping, new_metrics()) as runs:
        _collect_seldom()
        with _progress() as on_page:
            if dry_run:
                await runs.dry_run(
                    breaker_percent=percent, report=report, on_page=on_page, on_drift=show
                )
                ending = report.ending
            else:
                ending = await runs.reconcile(
                    breaker_percent=percent, report=report, on_page=on_page
                )
    for kind, tally in report.tallies.items():
        drift = ", ".join(f"{number} {name}" for name, number in tally.drift.items())
        invalid = f", {tally.invalid} that the table cannot store" if tally.invalid else ""
        click.echo(f"{kind}: {drift}{invalid}; {_counts(report, kind)}")
    if report.purged:
        click.echo(f"{'to purge' if dry_run else 'purged'}: {report.purged}")
    _print_rest(
        report,
        "the counts differ: run it again; if they still differ, see `tombstone_conflict` and "
        "`deletion_unconfirmed` in the log, and check Clerk's status page",
    )
    fine = (Ending.IN_STEP, Ending.MENDED) if mended_ok else (Ending.IN_STEP,)
    return IN_SYNC if ending in fine else DRIFT


@command("clerk-sync ensure user_2x…")
@click.argument("user_id", metavar="USER_ID", type=text)
async def ensure(user_id: str) -> int:
    """Read one user from Clerk, write the row, and print it.

    Exit code 1 if Clerk has no such user, it was deleted, or the table cannot store it.
    """
    settings, mapping = _load()
    async with _stated(settings), app.open_ensure(settings, mapping) as ensure_user:
        ensured = await ensure_user(user_id)
    if ensured.row is None:
        why = "Clerk has no such user, or it was deleted"
        if ensured.outcome is not None:
            why = f"{ensured.outcome.value}: {ensured.reason}"
        fail(f"{user_id}: {why}")
    click.echo(profiles.to_json(ensured.row))
    return 0


def _counts(report: Report, kind: str) -> str:
    return f"Clerk {report.clerk[kind]}, table {report.table[kind]}"


def _print_rest(report: Report, advice: str) -> None:
    """Print what belongs to no kind's line, or to some only."""
    if report.unconfirmed:
        click.echo(
            f"{report.unconfirmed} unconfirmed rows stay: Clerk did not list them, but did not "
            "confirm that they are gone. The log says which, and why"
        )
    for kind, rows in report.unmanaged.items():
        if rows:
            click.echo(f"{kind}: {rows} unmanaged rows stay: their keys are not Clerk ids")
    for kind in report.switched_off:
        click.echo(f"{kind}: skipped: organizations are disabled in this Clerk instance")
    for discrepancy in report.discrepancies:
        click.echo(f"clerk-sync: {discrepancy}: {advice}", err=True)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show how far a run is: a bar on a terminal, else a log line every few seconds."""
    totals: dict[str, int] = {}
    taken: dict[str, int] = {}
    if sys.stderr.isatty():
        tqdm.monitor_interval = 0  # its thread would outlive the loop
        with tqdm(unit=" objects", unit_scale=True, dynamic_ncols=True, file=sys.stderr) as bar:

            def draw(kind: str, number: int, total: int) -> None:
                totals[kind], taken[kind] = total, number
                bar.total = max(sum(totals.values()), sum(taken.values()))
                bar.set_postfix_str(kind, refresh=False)
                bar.update(sum(taken.values()) - bar.n)

            yield draw
        return
    began = logged = time.monotonic()
    first: dict[str, int] = {}

    def log_line(kind: str, number: int, total: int) -> None:
        nonlocal logged
        first.setdefault(kind, number)
        totals[kind], taken[kind] = total, number
        now = time.monotonic()
        if now - logged < PROGRESS_SECONDS:
            return
        logged = now
        rate = (sum(taken.values()) - sum(first.values())) / (now - began)
        left = max(0, sum(totals.values()) - sum(taken.values()))
        log.info(
            "progress",
            kind=kind,
            taken=sum(taken.values()),
            total=sum(totals.values()),
            per_second=round(rate),
            seconds_left=round(left / rate) if rate else None,
        )

    yield log_line
