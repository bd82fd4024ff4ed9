#!/bin/sh
# Usage: test_vllm.sh PYTHON VENV [pytest's arguments]
# Serves tiny value-residual models with vLLM on a CPU, in an environment of its own (vllm_env.sh),
# and holds their tokens to transformers'. Fails where vLLM is not there.
set -eu
python=$1
venv=$2
shift 2

scripts/vllm_env.sh "$python" "$venv"
# TRITON_INTERPRET: the other tests run Triton's interpreter, which vLLM's own kernels do not stand.
OMP_NUM_THREADS=1 TRITON_INTERPRET=0 RESFORMER_REQUIRE_NATIVE=1 \
  exec "$venv/bin/python" -m pytest tests/vllm --vllm -v -p no:cacheprovider "$@"
