#!/bin/sh
# Usage: test_fa4.sh PYTHON VENV [pytest's arguments]
# Compiles FlashAttention 4's kernels as the flash_attn backend asks for them, with no GPU, for
# compute capability 9 and 10 at once. VENV is made if it is missing, of requirements-fa4.txt alone;
# TORCH_INDEX, as in venv.sh, gives PyTorch's index of CPU builds.
set -eu
python=$1
venv=$2
shift 2

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
if ! cmp -s requirements-fa4.txt "$venv/installed.txt"; then
  echo "installing flash-attn-4 and its compiler into $venv (about 500 MB; takes a minute)"
  "$venv/bin/python" -m pip --disable-pip-version-check --no-input -qq install --no-deps \
    ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r requirements-fa4.txt
  cp requirements-fa4.txt "$venv/installed.txt"
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
run() {
  OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest tests/fa4 -q -p no:cacheprovider "$@"
}
run --capability 10 "$@" >"$log" 2>&1 &
other=$!
status=0
run --capability 9 "$@" || status=$?
wait "$other" || status=$?
cat "$log"
exit "$status"
