"""What every contestant imports, for the process that starts them all; modules are found where its parent finds them.

Python's server of processes does not take its parent's sys.path over before 3.12.4, and a package that one import looks
for in vain is remembered as absent (transformers does so).
"""

import os
import sys

VARIABLE = "SELM_FAST_BENCH_PATH"  # sys.path, joined

if VARIABLE in os.environ:
    sys.path[:] = os.environ[VARIABLE].split(os.pathsep)
    import transformers.models.llama.modeling_llama  # noqa: F401

    import benchmarks.train.worker  # noqa: F401
