"""What pyproject.toml cannot say: the extension dropinf._C, and where triton_kernels is installed.

Without torch or a C++ compiler the package is installed without the extension; the reason is kept
in dropinf/_build_failure.txt for `dropinf.backends()`. DROPINF_EXTENSION=1 makes that an error,
DROPINF_EXTENSION=0 asks for it.
"""

import os
import sys
from glob import glob
from pathlib import Path

from setuptools import setup

WISH = os.environ.get("DROPINF_EXTENSION", "")
OBSTACLE = "DROPINF_EXTENSION=0 was set when it was built" if WISH == "0" else ""

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except (ImportError, OSError) as error:
    from setuptools import Extension as CppExtension
    from setuptools.command.build_ext import build_ext as BuildExtension

    OBSTACLE = OBSTACLE or (
        f"torch could not be imported when it was built ({error}); "
        "pip install --no-build-isolation builds against the torch that is there"
    )

# Compiled and linked with OpenMP, or at::parallel_for would be serial.
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]


class BuildOptional(BuildExtension):
    def run(self) -> None:
        note = Path(self.get_ext_fullpath("dropinf._C")).with_name("_build_failure.txt")
        note.unlink(missing_ok=True)
        reason = OBSTACLE
        if not reason:
            try:
                super().run()
                return
            except Exception as error:
                reason = f"the C++ extension did not compile: {error or type(error).__name__}"
                if WISH == "1":
                    raise
        if WISH == "1":
            raise RuntimeError(f"DROPINF_EXTENSION=1, but {reason}")
        print(f"dropinf: no C++ kernels, {reason}", file=sys.stderr)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(reason + "\n")


setup(
    packages=["dropinf", "dropinf.solvers", "dropinf.triton_kernels"],
    package_dir={"dropinf.triton_kernels": "triton_kernels"},
    ext_modules=[
        CppExtension(
            "dropinf._C",
            sorted([*glob("csrc/*.cpp"), *glob("csrc/cpu/*.cpp")]),
            depends=sorted(glob("csrc/**/*.h", recursive=True)),
            define_macros=[("DROPINF_WHY_NO_CUDA", '"not yet"')],
            include_dirs=[os.path.abspath("csrc")],
            extra_compile_args=["-O3", "-g0", *OPENMP],
            extra_link_args=OPENMP,
        )
    ],
    cmdclass={"build_ext": BuildOptional},
)
