"""`python -m resformer_kernels.cli`."""

from resformer_kernels.cli import main

raise SystemExit(main())
