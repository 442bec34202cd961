"""Writes every generated file: `python -m monitoring`."""

from __future__ import annotations

from monitoring.files import generated


def main() -> None:
    """Write them all, and remove alerts that are no more."""
    files = generated()
    for folder in {path.parent for path in files}:
        folder.mkdir(parents=True, exist_ok=True)
        for there in set(folder.glob("*.yaml")) - files.keys():
            there.unlink()
    for path, text in files.items():
        path.write_text(text, "utf-8")


main()
