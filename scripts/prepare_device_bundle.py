"""Prepare a bundle for `resformer-kernels device-check --bundle`: see benchmarks/device/prepare.py.

python scripts/prepare_device_bundle.py --help
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.exit(importlib.import_module("benchmarks.device.prepare").main())
