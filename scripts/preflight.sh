#!/bin/sh
# Usage: preflight.sh PYTHON
# Checks the system packages that set-up needs and names the missing Debian packages.
set -u
python=$1
packages=""
missing() {
  echo "missing: $1" >&2
  packages="$packages $2"
}

if ! command -v "$python" >/dev/null 2>&1; then
  missing "Python ($python is not on PATH)" "python3 python3-venv python3-dev"
elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
  echo "missing: Python 3.10 or newer ($python is $("$python" -V 2>&1));" \
    "name another one with: make PYTHON=python3.11 ..." >&2
  packages="$packages python3 python3-venv python3-dev"
else
  "$python" -c 'import venv, ensurepip' 2>/dev/null ||
    missing "Python's venv and ensurepip modules" python3-venv
  headers=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
  [ -f "$headers/Python.h" ] || missing "Python's headers ($headers/Python.h)" python3-dev
fi
compiler=${CXX:-g++}
command -v "${compiler%% *}" >/dev/null 2>&1 || missing "a C++ compiler ($compiler)" g++

if [ -n "$packages" ]; then
  echo "On Debian or Ubuntu: sudo apt install$packages" >&2
  exit 1
fi
