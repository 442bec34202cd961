"""Measure the walks over all that Clerk has, beside the script that people write instead.

Clerk's API is the tests' stand-in, a process of its own, without a rate limit. Every command also
runs on an instance without users, before the real one: what that takes is start-up, and is taken
off the times.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from bench.processes import Failed, cpu_seconds, memory, server_pid

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tools.servers import Server

ROOT: Final = Path(__file__).parents[1]
# A production key: clerk-sync keeps below 100 requests, or 50,000 users, a second.
KEY: Final = "sk_live_YmVuY2gtYmVuY2gtYmVuY2g"
MILLION: Final = 1_000_000
_MEBI: Final = 2**20
# What a row, its indexes and its state take, with room to spare.
_BYTES_PER_USER: Final = 2_500
_POOL_STEP: Final = 128 * _MEBI
_POOL_SECONDS: Final = 30
_SAMPLE_SECONDS: Final = 0.02
# A server works on after the last commit: it writes its pages and purges.
_SETTLING_SECONDS: Final = 20
_LOOKING_SECONDS: Final = 0.5
_IDLE: Final = 0.03

_WRITING: Final = tuple(
    f"Com_{verb}"
    for verb in (
        *("insert", "insert_select", "update", "update_multi"),
        *("delete", "delete_multi", "replace", "replace_select"),
    )
)
_STATUS: Final = (
    *("Innodb_rows_inserted", "Innodb_rows_updated", "Innodb_rows_deleted"),
    *("Com_commit", "Com_select", *_WRITING),
    *("Innodb_os_log_written", "Innodb_buffer_pool_reads"),
)


@dataclass(frozen=True, slots=True)
class Step:
    """One command; its figures are also given as multiples of the `beside` one's."""

    name: str
    module: tuple[str, ...]
    beside: str | None = None
    # The second run of a command has the start-up of the first.
    startup_of: str | None = None


SERVICE: Final = (
    Step("backfill", ("clerk_sync", "backfill"), beside="script"),
    Step("backfill again", ("clerk_sync", "backfill"), "script again", startup_of="backfill"),
    Step("reconcile", ("clerk_sync", "reconcile"), beside="script again"),
)
SCRIPT: Final = (
    Step("script", ("bench.script",)),
    Step("script again", ("bench.script",), startup_of="script"),
)
STEPS: Final = (*SERVICE, *SCRIPT)


@dataclass(frozen=True, slots=True)
class Walked:
    """What one command took, in all; the server's CPU time until it was idle again."""

    seconds: float
    cpu_seconds: float
    server_cpu_seconds: float | None
    api_cpu_seconds: float
    rss_quarter_mib: float
    rss_end_mib: float
    rss_peak_mib: float
    status: dict[str, int]

    def less(self, startup: Walked) -> Walked:
        """Without start-up. Memory and the counters stay as they are."""
        server = None
        if self.server_cpu_seconds is not None and startup.server_cpu_seconds is not None:
            server = self.server_cpu_seconds - startup.server_cpu_seconds
        return replace(
            self,
            seconds=self.seconds - startup.seconds,
            cpu_seconds=self.cpu_seconds - startup.cpu_seconds,
            server_cpu_seconds=server,
            api_cpu_seconds=self.api_cpu_seconds - startup.api_cpu_seconds,
        )


@dataclass(frozen=True, slots=True)
class _Api:
    url: str
    pid: int


@contextlib.contextmanager
def _serving(users: int) -> Iterator[_Api]:
    """Start the stand-in for Clerk."""
    command = [sys.executable, "-m", "tests.clerk_api", f"--users={users}", f"--key={KEY}"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout
        try:
            line = process.stdout.readline()
            if not line:
                raise Failed("the stand-in for Clerk did not start")
            yield _Api(f"{json.loads(line)['url']}/v1", process.pid)
        finally:
            process.terminate()


class Walks:
    """The commands, one after the other, on one server."""

    def __init__(self, server: Server, users: int, api: _Api, empty: _Api) -> None:
        self._server = server
        self._pid = server_pid(server.port) if server.managed else None
        self._users = users
        self._api = api
        self._empty = empty

    def measure(self, steps: tuple[Step, ...], into: Walking) -> None:
        """Take these steps on an empty database with clerk-sync's tables, and count the rows."""
        name = f"clerk_sync_bench_{os.getpid()}"
        with tempfile.TemporaryFile() as said:
            url = self._server.create_database(name)
            try:
                self._run(("clerk_sync", "migrate"), url, self._empty, said)
                for step in steps:
                    if not step.startup_of:
                        into.startups[step.name].append(
                            self._run(step.module, url, self._empty, said)
                        )
                for step in steps:
                    into.walked[step.name].append(self._run(step.module, url, self._api, said))
                    self._count(step, name)
            except Failed as failed:
                said.seek(0)
                raise Failed(f"{failed}\n{said.read()[-4000:].decode()}") from None
            finally:
                self._server.drop_database(name)

    def _count(self, step: Step, database: str) -> None:
        [(rows,)] = self._server.execute(f"SELECT COUNT(*) FROM `{database}`.clerk_users")
        if rows != self._users:
            raise Failed(f"{step.name}: left {rows} rows of {self._users}")

    def _run(self, module: tuple[str, ...], database: str, api: _Api, said: IO[bytes]) -> Walked:
        status, server, asked = self._status(), self._server_cpu(), cpu_seconds(api.pid)
        environment = os.environ | {
            "DATABASE_URL": database,
            "CLERK_SECRET_KEY": KEY,
            "CLERK_API_URL": api.url,
            "CLERK_SYNC_CLERK_SHARE": "1",
            "CLERK_SYNC_CONFIG": "mirror",
            "LOG_LEVEL": "info",
        }
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", *module], cwd=ROOT, env=environment, stdout=said, stderr=said
        )
        try:
            cpu, samples, peak = _watch(process)
        finally:
            if process.returncode is None:
                process.kill()
                process.wait()
        seconds = time.perf_counter() - start
        if process.returncode:  # of `reconcile`: something was not in step
            raise Failed(f"{' '.join(module)}: exit status {process.returncode}")
        asked = cpu_seconds(api.pid) - asked
        now = self._status()
        self._settle()
        after = self._server_cpu()
        return Walked(
            seconds=seconds,
            cpu_seconds=cpu,
            server_cpu_seconds=None if server is None or after is None else after - server,
            api_cpu_seconds=asked,
            rss_quarter_mib=_around(samples, 0.25),
            rss_end_mib=_around(samples, 0.95),
            rss_peak_mib=peak,
            status={name: now[name] - status[name] for name in now},
        )

    def _status(self) -> dict[str, int]:
        found = {str(name): value for name, value in self._server.execute("SHOW GLOBAL STATUS")}
        return {name: int(found[name]) for name in _STATUS if name in found}

    def _server_cpu(self) -> float | None:
        return None if self._pid is None else cpu_seconds(self._pid)

    def _settle(self) -> None:
        """Wait until the server does nothing: what it does late is part of what it was asked."""
        deadline = time.monotonic() + _SETTLING_SECONDS
        before = self._server_cpu()
        while before is not None and time.monotonic() < deadline:
            time.sleep(_LOOKING_SECONDS)
            now = self._server_cpu()
            if now is None or now - before <= _IDLE * _LOOKING_SECONDS:
                return
            before = now


def _watch(process: subprocess.Popen[bytes]) -> tuple[float, list[float], float]:
    """Wait for the end; return CPU seconds, memory as it went, and its highest."""
    samples: list[float] = []
    peak = 0.0
    while True:
        with contextlib.suppress(OSError, KeyError, subprocess.CalledProcessError):
            rss, highest = memory(process.pid)
            samples.append(rss)
            peak = max(peak, highest)
        # Popen's own waiting throws away what the process took.
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return usage.ru_utime + usage.ru_stime, samples, peak
        time.sleep(_SAMPLE_SECONDS)


def _around(samples: list[float], part: float) -> float:
    """Memory at this part of the time, out of the tenth of the samples around it."""
    width = max(1, len(samples) // 20)
    at = int(len(samples) * part)
    near = samples[max(0, at - width) : at + width]
    return statistics.median(near) if near else 0.0


def _pool(server: Server, users: int) -> str:
    """Let the server hold the tables in memory, where it is ours; say what it has."""
    wanted = -(-users * _BYTES_PER_USER // _POOL_STEP) * _POOL_STEP
    [(had,)] = server.execute("SELECT @@innodb_buffer_pool_size")
    if not server.managed or wanted <= had:
        return f"buffer pool {had // _MEBI} MiB, as the server was started"
    server.execute(f"SET GLOBAL innodb_buffer_pool_size = {wanted}")
    # The server answers first, and resizes then.
    deadline = time.monotonic() + _POOL_SECONDS
    size = had
    while size < wanted * 0.95 and time.monotonic() < deadline:
        time.sleep(0.1)
        [(_, pages)] = server.execute("SHOW GLOBAL STATUS LIKE 'Innodb_buffer_pool_pages_total'")
        [(page,)] = server.execute("SELECT @@innodb_page_size")
        size = int(pages) * int(page)
    return f"buffer pool {size // _MEBI} MiB, for the walks only"


class Walking:
    """What was measured: of each step, its rounds; and what it prints."""

    def __init__(self, users: int, pool: str) -> None:
        self.users = users
        self.pool = pool
        self.walked: dict[str, list[Walked]] = {step.name: [] for step in STEPS}
        self.startups: dict[str, list[Walked]] = {
            step.name: [] for step in STEPS if not step.startup_of
        }

    def figures(self) -> dict[str, Any]:
        """Every figure, as it was measured: start-up is in all of them."""
        return {
            "users": self.users,
            "pool": self.pool,
            "walked": _listed(self.walked),
            "startups": _listed(self.startups),
        }

    def table(self) -> Iterator[str]:
        rounds = len(self.walked["script"])
        yield (
            f"\n{self.users:,} users of 2.7 kB from a stand-in for Clerk; {self.pool}; "
            f"{'one round' if rounds == 1 else f'medians of {rounds} rounds'}\n"
            "Times are without start-up, which is the same command on no users; the server's CPU "
            "time is\nuntil it is idle again. Memory is all there is, at a quarter of the time, "
            "at its end, and the highest.\n\n"
            f"{'':16}{'':>10}{'':>8}{'CPU s per million users':^30}{'RSS MiB':^24}{'start-':>8}\n"
            f"{'':16}{'users/s':>10}{'s':>8}{'itself':>10}{'database':>10}{'Clerk':>10}"
            f"{'quarter':>8}{'end':>8}{'highest':>8}{'up s':>8}"
        )
        for step in STEPS:
            costs = (
                self._per_million(step, name)
                for name in ("cpu_seconds", "server_cpu_seconds", "api_cpu_seconds")
            )
            memory = (
                f"{self._plain(step, name):>8.0f}"
                for name in ("rss_quarter_mib", "rss_end_mib", "rss_peak_mib")
            )
            yield (
                f"{step.name:16}{self.users / self._net(step, 'seconds'):>10,.0f}"
                f"{self._net(step, 'seconds'):>8.2f}"
                + "".join(f"{'—' if cost is None else f'{cost:.1f}':>10}" for cost in costs)
                + "".join(memory)
                + f"{_median(one.seconds for one in self._startups(step)):>8.2f}"
            )

    def written(self) -> Iterator[str]:
        """What each step wrote, by the server's own counters, start-up's share included."""
        yield (
            f"\n{'':16}{'rows inserted':>15}{'updated':>12}{'deleted':>12}"
            f"{'writing stmts':>15}{'COMMITs':>10}{'redo KiB':>12}{'disk reads':>12}"
        )
        for step in STEPS:
            of = {name: self._status(step, name) for name in _STATUS}
            writing = sum(of[name] or 0 for name in _WRITING)
            log = of["Innodb_os_log_written"]
            columns = (
                (of["Innodb_rows_inserted"], 15),
                (of["Innodb_rows_updated"], 12),
                (of["Innodb_rows_deleted"], 12),
                (writing, 15),
                (of["Com_commit"], 10),
                (None if log is None else log / 1024, 12),
                (of["Innodb_buffer_pool_reads"], 12),
            )
            yield f"{step.name:16}" + "".join(
                f"{'—' if value is None else f'{value:,.0f}':>{width}}" for value, width in columns
            )

    def ratios(self) -> Iterator[str]:
        yield ""
        steps = {step.name: step for step in STEPS}
        for step in SERVICE:
            assert step.beside
            beside = steps[step.beside]
            ratio = self._net(beside, "seconds") / self._net(step, "seconds")
            yield f"{f'users/s of `{step.name}`, times `{beside.name}`':60}{ratio:>8.2f}"
            ours, theirs = (self._per_million(one, "server_cpu_seconds") for one in (step, beside))
            if ours is not None and theirs:
                what = f"database's CPU time of `{step.name}`, times `{beside.name}`"
                yield f"{what:60}{ours / theirs:>8.2f}"
        for step in SERVICE:
            grown = self._plain(step, "rss_end_mib") - self._plain(step, "rss_quarter_mib")
            what = f"memory of `{step.name}`, from a quarter to the end, MiB"
            yield f"{what:60}{grown:>+8.1f}"
        cost = self._per_million(steps["reconcile"], "server_cpu_seconds")
        if cost is not None:
            seconds = cost * self.users / MILLION
            what = f"database's CPU time of `reconcile` of {self.users:,} users, s"
            yield f"{what:60}{seconds:>8.2f}"

    def _startups(self, step: Step) -> list[Walked]:
        return self.startups[step.startup_of or step.name]

    def _net(self, step: Step, name: str) -> float:
        rounds = zip(self.walked[step.name], self._startups(step), strict=True)
        return _median(getattr(one.less(startup), name) for one, startup in rounds)

    def _per_million(self, step: Step, name: str) -> float | None:
        if getattr(self.walked[step.name][0], name) is None:
            return None
        return self._net(step, name) * MILLION / self.users

    def _plain(self, step: Step, name: str) -> float:
        return _median(getattr(one, name) for one in self.walked[step.name])

    def _status(self, step: Step, name: str) -> float | None:
        rounds = self.walked[step.name]
        return _median(one.status[name] for one in rounds) if name in rounds[0].status else None


def _median(values: Iterator[float]) -> float:
    return statistics.median(values)


def _listed(steps: dict[str, list[Walked]]) -> dict[str, Any]:
    return {name: [asdict(one) for one in rounds] for name, rounds in steps.items()}


def measure(server: Server, *, users: int, rounds: int) -> Walking:
    """Walk so often, clerk-sync and the script taking turns in going first."""
    walking = Walking(users, _pool(server, users))
    with _serving(users) as api, _serving(0) as empty:
        walks = Walks(server, users, api, empty)
        for turn, order in zip(
            range(rounds), itertools.cycle([(SERVICE, SCRIPT), (SCRIPT, SERVICE)]), strict=False
        ):
            for steps in order:
                names = ", ".join(step.name for step in steps)
                print(f"round {turn + 1} of {rounds}: {names} …", file=sys.stderr)
                walks.measure(steps, walking)
    return walking
