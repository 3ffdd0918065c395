"""Where the optional C++ extension of csrc/ is built; everything else stands in pyproject.toml.

It serves the CPU only: every CUDA kernel is written in Triton and compiled on its first use. It is compiled against the
torch that can be imported here, so `pip install --no-build-isolation` comes after that of torch. Without torch or a C++
compiler, and when compilation fails, the install goes on: without it the package does the same things on a CPU more
slowly, and rounds logits in 16 bits.
SELM_FAST_EXTENSION=0 skips the extension, SELM_FAST_EXTENSION=1 makes its absence an error.
"""

import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
SETTING = os.environ.get("SELM_FAST_EXTENSION", "")


def absent(why):
    """Say that there will be no extension; an error where one is required."""
    message = (
        "selm_fast: the C++ extension of csrc/ is not built, which on a CPU costs speed, and exactness in 16 bits: "
        f"{why}"
    )
    if SETTING == "1":
        sys.exit(f"{message} (SELM_FAST_EXTENSION=1 requires it)")
    print(message, file=sys.stderr)


def extension():
    """The arguments of `setup` that build it; none where it cannot or shall not be built."""
    if SETTING not in ("", "0", "1"):
        sys.exit(f"SELM_FAST_EXTENSION must be 0 or 1 where it is set; got {SETTING!r}")
    if SETTING == "0":
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        absent(f"{error} (install torch first, then this with --no-build-isolation)")
        return {}

    # By its path: the package itself cannot be imported in every place that this file runs in.
    spec = spec_from_file_location("extension", ROOT / "selm_fast" / "ops" / "extension.py")
    names = module_from_spec(spec)
    spec.loader.exec_module(names)
    library = names.file_name(torch.__version__, names.digest_of(ROOT / "csrc"))

    class Build(BuildExtension):
        def get_ext_filename(self, ext_name):
            return os.path.join(*ext_name.split(".")[:-1], library)

        def run(self):
            # A wheel takes all that lies in the build folder; the checkout may serve environments with other torches.
            stale = [*(Path(self.build_lib) / "selm_fast").glob("_C-*.so")]
            stale += (ROOT / "selm_fast").glob(names.file_name(torch.__version__, "*"))
            for old in stale:
                if old.name != library:
                    old.unlink()
            try:
                super().run()
            except (Exception, SystemExit) as error:  # compilers, linkers, ninja: each fails in its own way
                self.extensions = []
                absent(f"{type(error).__name__}: {error}")

    return {
        "cmdclass": {"build_ext": Build},
        "ext_modules": [
            CppExtension(
                "selm_fast._C",
                sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.cpp")),
                depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.h")),
                extra_compile_args=["-O3", "-g0", "-fopenmp", "-fvisibility=hidden"],
                extra_link_args=["-fopenmp"],
                py_limited_api=True,  # it holds torch operators and nothing of Python
            )
        ],
    }


setup(**extension())
