"""backfill, reconcile, ensure, erase: the tables beside Clerk, and what goes for good."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import click
import structlog

from clerk_sync.cli.common import TERMINATED, command, fail, run, settled, text, unnamed
from clerk_sync.outcomes import Ending
from clerk_sync.store import profiles
from clerk_sync.telemetry import logs

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from clerk_sync.mapping.model import Mapping
    from clerk_sync.settings import Settings
    from clerk_sync.sync.diff import Compared
    from clerk_sync.sync.report import Report
    from clerk_sync.sync.runs import Walks

log = structlog.get_logger()

PROGRESS_SECONDS = 10.0
IN_STEP, FAILED, DRIFT = 0, 1, 2


def _walked(work: Callable[[Walks], Coroutine[Any, Any, int]]) -> None:
    """Open what a walk needs, and end with what `work` says; or say what is wrong."""
    settings, mapping = settled(signing=False, mapped=True)
    assert mapping is not None
    logs.configure(settings.log_level, settings.log_format, file=sys.stderr)

    async def opened(settings: Settings, mapping: Mapping) -> int:
        from clerk_sync.clerk.api import ClerkRefused, ClerkUnavailable  # noqa: PLC0415 -- see `serve`
        from clerk_sync.clerk.metrics import new_metrics  # noqa: PLC0415
        from clerk_sync.schema.checks import SchemaMismatch  # noqa: PLC0415
        from clerk_sync.settings import InvalidSettings  # noqa: PLC0415
        from clerk_sync.store.lease import LeaseHeld, LeaseLost  # noqa: PLC0415
        from clerk_sync.sync.report import SafetyStop  # noqa: PLC0415
        from clerk_sync.sync.runs import walks  # noqa: PLC0415

        # A pod that is told to stop gives its lease back first.
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        try:
            async with walks(settings, mapping, new_metrics()) as open_:
                # Pages make hundreds of thousands of objects and no cycles: looking for some
                # among them took a third of the time.
                gc.freeze()
                gc.set_threshold(1_000_000, 50, 100)
                return await work(open_)
        except InvalidSettings as error:
            fail(*error.faults)
        except SchemaMismatch as error:
            fail(*error.faults, *unnamed(settings))
        except (ClerkUnavailable, ClerkRefused, LeaseHeld, LeaseLost, SafetyStop) as error:
            fail(str(error))

    try:
        run(opened(settings, mapping))
    except asyncio.CancelledError:
        sys.exit(TERMINATED)


@command("CLERK_SECRET_KEY=sk_live_… DATABASE_URL=mysql://… clerk-sync backfill")
@click.option("--restart", is_flag=True, help="Begin anew, although one was left off.")
def backfill(*, restart: bool) -> None:
    """Write all users, organizations and memberships that Clerk has.

    Safe beside the running service: a row that is newer stays. After a crash or Ctrl-C the same
    command goes on where it was. Exit code 1 if anything could not be written, or if Clerk and
    the tables do not have the same number in the end.
    """

    async def work(walks: Walks) -> int:
        from clerk_sync.sync.report import Report  # noqa: PLC0415

        report = Report()
        with _progress() as on_page:
            ending = await walks.backfill(restart=restart, report=report, on_page=on_page)
        if report.resumed is not None:
            at = report.resumed.isoformat(sep=" ", timespec="seconds")
            click.echo(f"went on from the backfill of {at}")
        for why in report.anew:
            click.echo(why)
        for kind, tally in report.tallies.items():
            older = tally.read - tally.written - tally.unfit
            click.echo(
                f"{kind}: read {tally.read}, wrote {tally.written}, skipped {older} as in step or "
                f"newer here, could not write {tally.unfit}; {_counts(report, kind)}"
            )
        _say_absent(report)
        _say_doubts(
            report,
            "not all is in step: the log names what could not be written; `clerk-sync reconcile` "
            "finds the rest, and removes rows of what Clerk has no more",
        )
        return FAILED if ending is Ending.UNMENDED else IN_STEP

    _walked(work)


@command("clerk-sync reconcile --dry-run")
@click.option("--dry-run", is_flag=True, help="Write nothing, and print what is out of step.")
@click.option("--show-values", is_flag=True, help="Print values, too: they are people's data.")
@click.option(
    "--breaker",
    type=click.FloatRange(0, 100),
    metavar="PERCENT",
    help="How much of a table may be gone from Clerk. Default: CLERK_SYNC_BREAKER_PERCENT.",
)
@click.option("--mended-ok", is_flag=True, help="Exit code 0, too, when all was mended: for cron.")
def reconcile(*, dry_run: bool, show_values: bool, breaker: float | None, mended_ok: bool) -> None:
    """Find what is missing, outdated, drifted or deleted, and mend it.

    One at a time, over all replicas. Exit code 0: in step, 2: something was not, 1: it failed,
    or would have deleted too much, and deleted nothing.
    """
    if show_values and not dry_run:
        fail("--show-values needs --dry-run")
    if mended_ok and dry_run:
        fail("--mended-ok makes no sense with --dry-run, which mends nothing")

    def told(kind: str, one: Compared) -> None:
        columns = ", ".join(difference.column for difference in one.differences)
        click.echo(f"{kind} {one.clerk_id} {one.verdict.value}" + (f": {columns}" * bool(columns)))
        if show_values:
            for difference in one.differences:
                click.echo(f"  {difference.column}: {difference.stored!r} -> {difference.wanted!r}")

    async def work(walks: Walks) -> int:
        from clerk_sync.sync.report import Report  # noqa: PLC0415

        report = Report()
        percent = walks.settings.breaker_percent if breaker is None else breaker
        with _progress() as on_page:
            if dry_run:
                await walks.look(breaker_percent=percent, report=report, on_page=on_page, told=told)
                ending = report.ending
            else:
                ending = await walks.reconcile(
                    breaker_percent=percent, report=report, on_page=on_page
                )
        for kind, tally in report.tallies.items():
            drift = ", ".join(f"{number} {name}" for name, number in tally.drift.items())
            unfit = f", {tally.unfit} that the table cannot take" if tally.unfit else ""
            click.echo(f"{kind}: {drift}{unfit}; {_counts(report, kind)}")
        _say_left(report)
        if report.purged:
            click.echo(f"{'to purge' if dry_run else 'purged'}: {report.purged}")
        _say_absent(report)
        _say_doubts(
            report,
            "both sides do not agree: run it again; if it stays, see `tombstone_conflict`"
            " and `unconfirmed` in the log, and whether Clerk's API is well",
        )
        fine = (Ending.IN_STEP, Ending.MENDED) if mended_ok else (Ending.IN_STEP,)
        return IN_STEP if ending in fine else DRIFT

    _walked(work)


@command("clerk-sync ensure user_2x…")
@click.argument("user_id", metavar="USER_ID", type=text)
def ensure(user_id: str) -> None:
    """Ask Clerk for one user, write the row, and print it.

    Exit code 1 if Clerk has no such user, it was deleted, or the table cannot take it.
    """

    async def work(walks: Walks) -> int:
        from clerk_sync import app  # noqa: PLC0415
        from clerk_sync.sync.ensure import Ensure, NotMapped  # noqa: PLC0415

        async with app.committing(walks.settings, walks.mapping) as committer:
            ensure = Ensure(
                walks.clerk,
                walks.mapping,
                committer,
                walks.engine,
                lambda: walks.store.targets.get("user"),
            )
            try:
                ensured = await ensure(user_id)
            except NotMapped as error:
                fail(str(error))
        if ensured.row is None:
            why = "Clerk has no such user, or it was deleted"
            if ensured.outcome is not None:
                why = f"{ensured.outcome.value}: {ensured.reason}"
            fail(f"{user_id}: {why}")
        click.echo(profiles.to_json(ensured.row))
        return 0

    _walked(work)


@command("clerk-sync erase user_2x…")
@click.argument("user_id", metavar="USER_ID", type=text)
def erase(user_id: str) -> None:
    """Remove a person from every mapped table and from clerk-sync's own. It cannot be undone.

    Only the id stays, so that a late event does not bring the person back. Clerk is not called:
    delete the user there, too.
    """
    settings, mapping = settled(signing=False, mapped=True)
    assert mapping is not None

    async def work() -> int:
        from clerk_sync.database.connection import engine_of  # noqa: PLC0415
        from clerk_sync.schema.binding import bind  # noqa: PLC0415 -- see `serve`
        from clerk_sync.schema.checks import SchemaMismatch  # noqa: PLC0415
        from clerk_sync.store import erasure  # noqa: PLC0415

        engine = engine_of(settings.locate, size=2)
        try:
            store = await bind(engine, mapping)
            now_ms = time.time_ns() // 1_000_000
            removed = await erasure.erase(engine, store, user_id, now_ms=now_ms)
        except SchemaMismatch as error:
            fail(*error.faults, *unnamed(settings))
        except ValueError as error:
            fail(f"{user_id}: {error}")
        finally:
            await engine.dispose()
        for table, number in sorted(removed.items()):
            click.echo(f"{table}: removed {number}")
        click.echo(f"{user_id} is remembered as deleted, and nothing else is")
        for kind in erasure.out_of_reach(store):
            click.echo(
                f"warning: rows of `{kind}` may be this user's, but no column says so", err=True
            )
        return 0

    run(work())


def _counts(report: Report, kind: str) -> str:
    return f"Clerk counts {report.clerk[kind]}, the table {report.table[kind]}"


def _say_absent(report: Report) -> None:
    for kind in report.absent:
        click.echo(f"{kind}: not looked at, this Clerk instance has organizations switched off")


def _say_left(report: Report) -> None:
    if report.unconfirmed:
        click.echo(
            f"{report.unconfirmed} rows that Clerk did not list were left, as Clerk did not say, "
            "in its own words, that it has them no more: the log tells which, and why"
        )
    for kind, rows in report.foreign.items():
        if rows:
            click.echo(f"{kind}: {rows} rows were left whose keys are no ids of Clerk's")


def _say_doubts(report: Report, advice: str) -> None:
    for doubt in report.doubts:
        click.echo(f"clerk-sync: {doubt}: {advice}", err=True)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal, else a log line every few seconds."""
    totals: dict[str, int] = {}
    taken: dict[str, int] = {}
    if sys.stderr.isatty():
        from tqdm import tqdm  # noqa: PLC0415 -- for people only

        tqdm.monitor_interval = 0  # its thread would outlive the loop
        with tqdm(unit=" objects", unit_scale=True, dynamic_ncols=True, file=sys.stderr) as bar:

            def draw(kind: str, number: int, total: int) -> None:
                totals[kind], taken[kind] = total, number
                bar.total = max(sum(totals.values()), sum(taken.values()))
                bar.set_postfix_str(kind, refresh=False)
                bar.update(sum(taken.values()) - bar.n)

            yield draw
        return
    began = told = time.monotonic()
    first: dict[str, int] = {}

    def tell(kind: str, number: int, total: int) -> None:
        nonlocal told
        first.setdefault(kind, number)
        totals[kind], taken[kind] = total, number
        now = time.monotonic()
        if now - told < PROGRESS_SECONDS:
            return
        told = now
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

    yield tell
