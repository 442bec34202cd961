"""What a process takes: memory and CPU time."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Final

_MEBI: Final = 1024  # in KiB


class Failed(Exception):
    """A contender did not start or stop; the message says what it wrote."""


def memory(pid: int) -> tuple[float, float]:
    """Resident memory in MiB: now, and the highest where the system tells."""
    status = Path(f"/proc/{pid}/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmRSS"].split()[0]) / _MEBI, int(lines["VmHWM"].split()[0]) / _MEBI
    said = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, check=True)
    return int(said.stdout) / _MEBI, int(said.stdout) / _MEBI


def cpu_seconds(pid: int) -> float:
    """CPU time of a process until now, of all its threads."""
    stat = Path(f"/proc/{pid}/stat")
    if stat.exists():
        # The name, in brackets, may hold anything; then come the state and ten numbers.
        fields = stat.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    said = subprocess.run(
        ["ps", "-o", "time=", "-p", str(pid)], capture_output=True, text=True, check=True
    )
    days, _, clock = said.stdout.strip().rpartition("-")
    seconds = 0.0
    for part in clock.split(":"):
        seconds = seconds * 60 + float(part)
    return seconds + 86_400 * int(days or 0)


def server_pid(port: int) -> int | None:
    """Find the database server that was started here for this port; one in Docker is not found."""
    command = ["ps", "-A", "-ww", "-o", "pid=,args="]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # The guard beside the server and its chroot have other names; a container has another port.
    found = re.search(rf"^ *(\d+) \S*(?:mysqld|mariadbd) .*--port={port} ", said, re.MULTILINE)
    return int(found[1]) if found else None
