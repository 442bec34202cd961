"""Prometheus and its promtool, as programs: to judge rules, and to watch a service for real."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from tools import programs
from tools.servers import LOOPBACK, free_port

Labels = frozenset[tuple[str, str]]


def promtool(*arguments: str | Path) -> str:
    """Run promtool; what it says, which is about a failure if it fails."""
    done = subprocess.run(
        [programs.need("promtool"), *arguments],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@dataclass(frozen=True)
class Watching:
    """A Prometheus that runs."""

    url: str
    http: aiohttp.ClientSession

    async def query(self, expr: str) -> dict[Labels, float]:
        """The value of each series now."""
        found = await self._ask("query", query=expr)
        return {_labels(one["metric"]): float(one["value"][1]) for one in found}

    async def over(
        self, expr: str, start: float, end: float, step: float
    ) -> dict[Labels, list[tuple[float, float]]]:
        """Each series' times and values between two times, in seconds."""
        found = await self._ask("query_range", query=expr, start=start, end=end, step=step)
        return {
            _labels(one["metric"]): [(float(at), float(value)) for at, value in one["values"]]
            for one in found
        }

    async def firing(self) -> set[str]:
        """The names of the alerts that fire: as of their last evaluation, however late it is."""
        async with self.http.get(f"{self.url}/api/v1/alerts") as response:
            answer = await response.json()
        alerts = answer["data"]["alerts"]
        return {one["labels"]["alertname"] for one in alerts if one["state"] == "firing"}

    async def _ask(self, path: str, **data: Any) -> Any:
        data = {name: str(value) for name, value in data.items()}
        async with self.http.post(f"{self.url}/api/v1/{path}", data=data) as response:
            answer = await response.json()
        assert answer["status"] == "success", f"{answer['error']} in {data['query']}"
        return answer["data"]["result"]


def _labels(metric: Mapping[str, str]) -> Labels:
    return frozenset(metric.items())


@contextlib.asynccontextmanager
async def watching(
    folder: Path,
    *,
    targets: Iterable[Mapping[str, str]],
    rules: Mapping[str, Any],
    seconds: float,
    lookback: float,
    history: str = "",
) -> AsyncIterator[Watching]:
    """Run Prometheus on a history in OpenMetrics' text, scraping and judging every so often.

    A target is its labels, of which `instance` is its address.
    """
    data = folder / "prometheus"
    data.mkdir()
    if history:
        text = folder / "history.txt"
        text.write_text(history)
        await asyncio.to_thread(promtool, "tsdb", "create-blocks-from", "openmetrics", text, data)
    rules_path, config = folder / "rules.yaml", folder / "prometheus.yaml"
    rules_path.write_text(yaml.safe_dump(dict(rules)))
    every = f"{round(seconds * 1000)}ms"
    config.write_text(
        yaml.safe_dump(
            {
                "global": {
                    "scrape_interval": every,
                    "scrape_timeout": every,
                    "evaluation_interval": every,
                },
                "rule_files": [str(rules_path)],
                "scrape_configs": [
                    {
                        "job_name": "clerk-sync",
                        "static_configs": [
                            {"targets": [labels["instance"]], "labels": dict(labels)}
                            for labels in targets
                        ],
                    }
                ],
            }
        )
    )
    address = f"{LOOPBACK}:{free_port()}"
    log = folder / "prometheus.log"
    process = _started(
        log,
        f"--config.file={config}",
        f"--storage.tsdb.path={data}",
        f"--web.listen-address={address}",
        f"--query.lookback-delta={round(lookback * 1000)}ms",
    )
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as http:
            await _ready(http, f"http://{address}", log)
            yield Watching(f"http://{address}", http)
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(process.wait, 10)
        process.kill()
        process.wait()


def _started(log: Path, *options: str) -> subprocess.Popen[bytes]:
    environment = {"PATH": os.environ["PATH"], "HOME": str(log.parent)}
    with log.open("wb") as out:
        return subprocess.Popen(
            [programs.need("prometheus"), *options],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )


async def _ready(http: aiohttp.ClientSession, url: str, log: Path) -> None:
    deadline = time.monotonic() + 30
    while True:
        with contextlib.suppress(aiohttp.ClientError):
            async with http.get(f"{url}/-/ready") as response:
                if response.status == 200:
                    return
        if time.monotonic() > deadline:
            raise AssertionError(f"Prometheus does not start: see {log}")
        await asyncio.sleep(0.1)
