#!/usr/bin/env bash
# Creates the virtual environment DIR and installs the pins that fit this machine.
#   requirements/install.sh DIR        TORCH_INDEX: index of torch's CPU wheels, where pip needs one
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1

fail() { printf 'laclip set-up: %s\n' "$@" >&2; exit 1; }

python=""
for candidate in ${SETUP_PYTHON:-python3.12 python3.11 python3.13 python3}; do
  if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
[ -n "$python" ] || fail "needs Python 3.11, 3.12 or 3.13, found $(python3 --version 2>/dev/null || echo none)." \
  "Install one, or name it: make train SETUP_PYTHON=/path/to/python3.12"
"$python" requirements/check.py --driver
command -v c++ >/dev/null || command -v g++ >/dev/null || fail \
  "needs a C++20 compiler, found neither c++ nor g++ on PATH (Debian: apt-get install g++)."
header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
[ -f "$header" ] || fail "needs the headers of $("$python" --version), found no $header (Debian: apt-get install python3-dev)."

"$python" -m venv "$venv" || fail "could not create a virtual environment with $python (Debian: apt-get install python3-venv)."
pins=requirements/cpu.txt
if "$python" requirements/check.py --gpu; then pins=requirements/cuda.txt; fi
echo "laclip set-up: $("$python" --version), $pins (about 2.6 GB without a GPU, 6 GB with one)"
torch=$(grep '^torch==' "$pins")
"$venv/bin/pip" install --disable-pip-version-check -q "$(grep '^numpy==' requirements/common.txt)"
"$venv/bin/pip" install --disable-pip-version-check -q ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$torch"
if [ "$pins" = requirements/cpu.txt ]; then
  "$venv/bin/python" requirements/check.py --torch-only
fi
"$venv/bin/pip" install --disable-pip-version-check -q -r "$pins"
"$venv/bin/python" requirements/check.py
