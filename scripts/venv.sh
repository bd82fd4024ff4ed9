#!/bin/sh
# Usage: venv.sh PYTHON VENV
# Makes VENV if it is missing and installs torch and the pinned development requirements into it.
# On a machine with a CUDA device, a suitable torch of PYTHON is used. Otherwise the pinned torch is
# installed, from TORCH_INDEX if that is set: PyTorch's index of CPU builds avoids the gigabytes of
# CUDA libraries that pip's default index can add. TORCH_VERSION overrides the pin.
set -eu
python=$1
venv=$2
torch_version=${TORCH_VERSION:-2.13.0}
torch_index=${TORCH_INDEX:-}

usable_cuda_torch='
import sys
try:
    import torch
except ImportError:
    sys.exit(1)
recent = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10)
if torch.cuda.is_available() and not recent:
    print(f"the torch on this machine is {torch.__version__}, older than 2.10", file=sys.stderr)
sys.exit(not (torch.cuda.is_available() and recent))
'
has_gpu() {
  command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1
}

if [ ! -x "$venv/bin/python" ]; then
  if has_gpu && "$python" -c "$usable_cuda_torch"; then
    echo "[1/4] making $venv on top of the installed CUDA torch"
    "$python" -m venv --system-site-packages "$venv"
    # If $python is itself a virtual environment, --system-site-packages omits its packages.
    "$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' \
      >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/outer.pth"
  else
    echo "[1/4] making $venv"
    "$python" -m venv "$venv"
  fi
else
  echo "[1/4] using the existing $venv"
fi

pip="$venv/bin/python -m pip --disable-pip-version-check --no-input -qq"
if has_gpu && "$venv/bin/python" -c "$usable_cuda_torch"; then
  echo "[2/4] keeping torch $("$venv/bin/python" -c 'import torch; print(torch.__version__)')"
elif "$venv/bin/python" -c "
import importlib.metadata as m, sys
sys.exit(m.version('torch').split('+')[0] != '$torch_version')" 2>/dev/null; then
  echo "[2/4] torch $torch_version is installed"
else
  echo "[2/4] installing torch $torch_version (about 200 MB for a CPU build; takes a minute)"
  $pip install "torch==$torch_version" ${torch_index:+--extra-index-url "$torch_index"}
fi
echo "[3/4] installing the pinned tools and test packages"
$pip install -r requirements-dev.txt
$pip install --no-deps -r requirements-no-deps.txt
