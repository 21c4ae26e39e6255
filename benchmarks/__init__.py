"""Measurements; each module prints and records one."""

import os

# Between small factorizations the threads of LAPACK's library would wait busily, and
# take the cores from XLA's own. Read when jaxlib loads it, at the first computation.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
