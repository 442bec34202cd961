#!/bin/sh
# Makes the virtual environment $1 with the first Python that is new enough, on a machine that
# may have no more than that: `make install` calls it.
set -eu

new_enough='import sys; sys.exit(sys.version_info < (3, 11))'

if [ -x "$1/bin/python" ] && "$1/bin/python" -c "$new_enough" && "$1/bin/python" -m pip --version >/dev/null 2>&1; then
  exit 0
fi

python=
for candidate in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11 python; do
  if "$candidate" -c "$new_enough" 2>/dev/null; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  echo "clerk-sync needs Python 3.11 or newer, and found none on the PATH." >&2
  echo "Install one (Debian, Ubuntu: apt-get install python3; macOS: brew install python)," >&2
  echo "or name one: make install PYTHON=/path/to/python3" >&2
  exit 1
fi

# Debian and Ubuntu keep a part of Python's own `venv` in a package of its own.
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
  package=$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends "$package" >/dev/null
  else
    echo "$python cannot make virtual environments. On Debian and Ubuntu:" >&2
    echo "  sudo apt-get install $package" >&2
    exit 1
  fi
fi

echo "$python -m venv $1"
"$python" -m venv --clear "$1"
