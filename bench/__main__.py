"""Measure clerk-sync and its baselines on one database, in one run, and print the ratios.

Every contender is started, measured and stopped in every round, in an order that changes from
round to round, each time on an empty database of its own; the figures are medians over the
rounds. Then come the walks over all of Clerk's users, in `walking`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from bench import load, tutorial, walking
from bench.processes import Failed, memory
from tools.servers import NAMES, UnavailableError, advice, available, free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tools.servers import Server, Source

ROOT: Final = Path(__file__).parents[1]
CONNECTIONS: Final = {64: 16_000, 8: 10_000}  # how many, and at most so many events
_START_SECONDS: Final = 20

Process = subprocess.Popen[bytes]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a contender runs: its database, its two ports, and the file for what it says."""

    database: str
    port: int
    internal_port: int
    said: IO[bytes]

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {
            "DATABASE_URL": self.database,
            "CLERK_WEBHOOK_SIGNING_SECRET": load.SECRET,
            "CLERK_SYNC_HOST": load.HOST,
            "CLERK_SYNC_PORT": str(self.port),
            "CLERK_SYNC_INTERNAL_PORT": str(self.internal_port),
            "CLERK_SYNC_CONFIG": "mirror",
            "LOG_LEVEL": "info",
        }

    def start(self, *module: str, **environment: str) -> Process:
        return subprocess.Popen(
            [sys.executable, "-m", *module],
            cwd=ROOT,
            env=self.environment | environment,
            stdout=subprocess.DEVNULL,
            stderr=self.said,
        )

    def run(self, *module: str) -> None:
        process = self.start(*module)
        if process.wait():
            raise Failed(f"{' '.join(module)}: exit status {process.returncode}")


@dataclass(frozen=True, slots=True)
class Contender:
    name: str
    start: Callable[[Place], Process]
    prepare: Callable[[Place], None] = lambda _: None
    expect: str = '"applied"'
    ready_at_internal: bool = False
    load_flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Measured:
    """One contender in one round."""

    ready_seconds: float
    rss_mib: float
    peak_mib: float
    at: dict[int, dict[str, Any]] = field(default_factory=dict)


def start_without_database(place: Place) -> Process:
    """Start the same service with the database call left out: what everything else costs."""
    return place.start("bench.ceiling")


def _migrate(place: Place) -> None:
    place.run("clerk_sync", "migrate")


def _serve(place: Place) -> Process:
    return place.start("clerk_sync", "serve")


def _serve_singly(place: Place) -> Process:
    return place.start("clerk_sync", "serve", CLERK_SYNC_BATCH_LIMIT="1", CLERK_SYNC_WRITERS="8")


def _tutorial(place: Place) -> Process:
    return place.start("bench.tutorial")


def _tutorial_as_published(place: Place) -> Process:
    return place.start("bench.tutorial", "--as-published")


def _prepare_tutorial(place: Place) -> None:
    asyncio.run(tutorial.prepare(place.database, as_published=False))


def _prepare_tutorial_as_published(place: Place) -> None:
    asyncio.run(tutorial.prepare(place.database, as_published=True))


def _trivial(place: Place) -> Process:
    return place.start("bench.trivial", str(place.port))


SERVICE: Final = Contender("clerk-sync", _serve, _migrate, ready_at_internal=True)
SINGLY: Final = Contender(
    "one transaction per event", _serve_singly, _migrate, ready_at_internal=True
)
WITHOUT_DATABASE: Final = Contender("no database", start_without_database, _migrate)
TUTORIAL: Final = Contender(
    "tutorial, verified and indexed",
    _tutorial,
    _prepare_tutorial,
    expect="ok",
    load_flags=("--usernames-in-deletes",),
)
AS_PUBLISHED: Final = Contender(
    "tutorial, as published",
    _tutorial_as_published,
    _prepare_tutorial_as_published,
    expect="ok",
    load_flags=("--usernames-in-deletes",),
)
TRIVIAL: Final = Contender("(load generator's ceiling)", _trivial)
CONTENDERS: Final = {
    "clerk-sync": SERVICE,
    "singly": SINGLY,
    "no-database": WITHOUT_DATABASE,
    "tutorial": TUTORIAL,
    "as-published": AS_PUBLISHED,
    "ceiling": TRIVIAL,
}


@contextlib.contextmanager
def _running(contender: Contender, server: Server) -> Iterator[tuple[Place, Process, float]]:
    """Start a contender on an empty database; yields how long it took to be ready, too."""
    name = f"clerk_sync_bench_{os.getpid()}"
    process = None
    with tempfile.TemporaryFile() as said:
        place = Place(server.create_database(name), free_port(), free_port(), said)
        try:
            contender.prepare(place)
            start = time.perf_counter()
            process = contender.start(place)
            port = place.internal_port if contender.ready_at_internal else place.port
            _wait_ready(process, port, asks=contender.ready_at_internal)
            yield place, process, time.perf_counter() - start
        except Failed as failed:
            said.seek(0)
            raise Failed(f"{contender.name}: {failed}\n{said.read()[-4000:].decode()}") from None
        finally:
            if process:
                _stop(process)
            server.drop_database(name)


def _wait_ready(process: Process, port: int, *, asks: bool) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not _ready(port, asks=asks):
        if process.poll() is not None:
            raise Failed(f"exit status {process.returncode}")
        if time.monotonic() > deadline:
            raise Failed(f"not ready after {_START_SECONDS} s")
        time.sleep(0.01)


def _ready(port: int, *, asks: bool) -> bool:
    """Whether the port answers, and where it `asks`, that it is ready."""
    try:
        with contextlib.closing(http.client.HTTPConnection(load.HOST, port, timeout=2)) as client:
            client.connect()
            if asks:
                client.request("GET", "/readyz")
                return client.getresponse().status == http.client.OK
            return True
    except OSError:
        return False


def _stop(process: Process) -> None:
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _load(contender: Contender, place: Place, **options: float) -> list[str]:
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [
        *(sys.executable, "-m", "bench.load", f"--port={place.port}"),
        *(f"--expect={contender.expect}", *flags, *contender.load_flags),
    ]


def measure(contender: Contender, server: Server, seconds: float) -> Measured:
    with _running(contender, server) as (place, process, ready_seconds):
        at = {}
        for connections, events in CONNECTIONS.items():
            command = _load(
                contender,
                place,
                connections=connections,
                events=events,
                seconds=seconds,
                seed=connections,
            )
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=False)
            if done.returncode:
                raise Failed("the load generator failed")
            at[connections] = json.loads(done.stdout.splitlines()[-1])
        rss, peak = memory(process.pid)
    return Measured(ready_seconds, rss, peak, at)


def soak(server: Server, events: int) -> None:
    """Send so many events and print the service's memory as it goes."""
    print("    events    events/s   p50 ms   p99 ms   other   RSS MiB")
    samples: list[float] = []
    with _running(SERVICE, server) as (place, process, _):
        command = _load(SERVICE, place, connections=64, events=events, seconds=600)
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as loading:
            assert loading.stdout
            for line in loading.stdout:
                at = json.loads(line)
                samples.append(memory(process.pid)[0])
                print(
                    f"{at['good']:>10,}  {at['per_second']:>10,.0f}  {at['p50_ms']:>7}"
                    f"  {at['p99_ms']:>7}  {at['other']:>6}  {samples[-1]:>8.1f}",
                    flush=True,
                )
    if len(samples) >= 10:
        early = samples[len(samples) // 10]
        print(f"from the first tenth to the end: {samples[-1] - early:+.1f} MiB")


def _median(values: Iterator[float]) -> float:
    return statistics.median(values)


class Report:
    """The medians, the table and the ratios."""

    def __init__(self, measured: dict[Contender, list[Measured]]) -> None:
        self._measured = measured

    def at(self, contender: Contender, connections: int, figure: str) -> float:
        return _median(m.at[connections][figure] for m in self._measured[contender])

    def _peak(self, contender: Contender) -> float:
        return _median(m.peak_mib for m in self._measured[contender])

    def table(self) -> Iterator[str]:
        yield (
            f"{'':32}{'64 connections':^28}{'8 connections':^28}\n"
            f"{'':32}{'events/s':>10}{'p50 ms':>9}{'p99 ms':>9}"
            f"{'events/s':>10}{'p50 ms':>9}{'p99 ms':>9}{'RSS MiB':>10}"
        )
        for contender in self._measured:
            figures = "".join(
                f"{self.at(contender, c, 'per_second'):>10,.0f}"
                f"{self.at(contender, c, 'p50_ms'):>9.2f}{self.at(contender, c, 'p99_ms'):>9.2f}"
                for c in CONNECTIONS
            )
            yield f"{contender.name:32}{figures}{self._peak(contender):>10.0f}"

    def troubles(self) -> Iterator[str]:
        for contender, rounds in self._measured.items():
            for at in (at for measured in rounds for at in measured.at.values()):
                if at["other"]:
                    yield (
                        f"{contender.name} at {at['connections']}: {at['other']} answers that do "
                        f"not count, such as {at['first_bad']!r}; by status {at['statuses']}"
                    )

    def targets(self) -> Iterator[tuple[str, bool]]:
        if SERVICE not in self._measured:
            return
        for connections, baseline, least in (
            (64, TUTORIAL, 2.0),
            (64, AS_PUBLISHED, 10.0),
            (64, WITHOUT_DATABASE, 0.55),
            (8, TUTORIAL, 0.9),
        ):
            if baseline in self._measured:
                ratio = self.at(SERVICE, connections, "per_second") / self.at(
                    baseline, connections, "per_second"
                )
                what = f"events/s at {connections}, times `{baseline.name}`"
                yield f"{what:60}{ratio:>8.2f}   at least {least:g}", ratio >= least
        for what, figure, below, unit in (
            ("p99 at 64", self.at(SERVICE, 64, "p99_ms"), 25, "ms"),
            ("start to ready", _median(m.ready_seconds for m in self._measured[SERVICE]), 1, "s"),
            ("resident memory, highest", self._peak(SERVICE), 120, "MiB"),
        ):
            yield f"{what + ', ' + unit:60}{figure:>8.2f}   below {below}", figure < below


def _describe(server: Server) -> str:
    [(flush, sync, binlog)] = server.execute(
        "SELECT @@innodb_flush_log_at_trx_commit, @@sync_binlog, @@log_bin"
    )
    durable = "full durability" if flush == 1 and (sync == 1 or not binlog) else "NOT DURABLE"
    return (
        f"{NAMES[server.flavour]} {server.version}, {durable} (flush at commit {flush}, binary log "
        f"{f'on, synced every {sync}' if binlog else 'off'}); Python "
        f"{platform.python_version()}, {os.cpu_count()} CPUs for everything"
    )


def _source(flavour: str | None) -> Source:
    """Choose what to measure on: MySQL where there is one, as clerk-sync is made for it."""
    sources = {source.flavour: source for source in available()}
    if flavour and flavour not in sources:
        raise UnavailableError(advice([flavour]))
    return sources[flavour] if flavour else sources.get("mysql", next(iter(sources.values())))


def _rounds(args: argparse.Namespace, server: Server) -> dict[Contender, list[Measured]]:
    contenders = [CONTENDERS[name] for name in args.contenders.split(",")]
    measured: dict[Contender, list[Measured]] = {contender: [] for contender in contenders}
    for turn in range(args.rounds):
        first = turn * 2 % len(contenders)
        for contender in contenders[first:] + contenders[:first]:
            print(f"round {turn + 1} of {args.rounds}: {contender.name} …", file=sys.stderr)
            measured[contender].append(measure(contender, server, args.seconds))
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--database", choices=NAMES, help="default: mysql, where there is one")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3, help="at most so long per figure")
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument(
        "--walk",
        type=int,
        default=200_000,
        metavar="USERS",
        help="also backfill and reconcile so many users; 0: do not; default: %(default)s",
    )
    parser.add_argument("--only-walk", action="store_true", help="leave the contenders out")
    parser.add_argument("--soak", type=int, metavar="N", help="only send N events, print memory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seconds = 1, min(args.seconds, 2)
    try:
        with _source(args.database).launch() as server:
            described = _describe(server)
            print(described)
            if args.soak:
                soak(server, args.soak)
                return
            measured = {} if args.only_walk else _rounds(args, server)
            walked = (
                walking.measure(server, users=args.walk, rounds=args.rounds) if args.walk else None
            )
    except (Failed, UnavailableError) as failed:
        sys.exit(str(failed))
    report = Report(measured)
    if measured:
        print(*report.table(), "", *report.troubles(), sep="\n")
    for text, met in report.targets():
        print(f"{text:86}{'met' if met else 'MISSED'}")
    if walked:
        print(*walked.table(), *walked.written(), *walked.ratios(), sep="\n")
    if args.json:
        figures: dict[str, Any] = {
            "on": described,
            "rounds": {c.name: [asdict(m) for m in rounds] for c, rounds in measured.items()},
            "walk": walked.figures() if walked else None,
        }
        args.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
