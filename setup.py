"""What pyproject.toml cannot say: the extension dropinf._C, and where triton_kernels is installed.

Without torch or a C++ compiler the package is installed without the extension; the reason is kept
in dropinf/_build_failure.txt for `dropinf.backends()`. DROPINF_EXTENSION=1 makes that an error,
DROPINF_EXTENSION=0 asks for it. On Windows, where it was never built, only DROPINF_EXTENSION=1
builds it; on macOS, where it was never built either, its kernels are compiled without OpenMP.

The CUDA kernels are built where torch is a CUDA build and nvcc is found; no GPU is needed. Else, or
where they do not compile, the extension is built without them and keeps the reason. DROPINF_CUDA=1
makes that an error, DROPINF_CUDA=0 asks for it. TORCH_CUDA_ARCH_LIST names the architectures.
"""

import json
import os
import sys
from glob import glob
from pathlib import Path

from setuptools import find_packages, setup

WISH = os.environ.get("DROPINF_EXTENSION", "")
WISH_CUDA = os.environ.get("DROPINF_CUDA", "")
OBSTACLE = "DROPINF_EXTENSION=0 was set when it was built" if WISH == "0" else ""
if sys.platform == "win32" and "1" not in (WISH, WISH_CUDA):
    OBSTACLE = OBSTACLE or (
        "the C++ kernels were never built on Windows; install with DROPINF_EXTENSION=1 to try"
    )

NO_CUDA = "DROPINF_CUDA=0 was set when it was built" if WISH_CUDA == "0" else ""

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except (ImportError, OSError) as error:
    from setuptools import Extension as CppExtension
    from setuptools.command.build_ext import build_ext as BuildExtension

    OBSTACLE = OBSTACLE or (
        f"torch could not be imported when it was built ({error}); "
        "pip install --no-build-isolation builds against the torch that is there"
    )
    NO_CUDA = NO_CUDA or OBSTACLE
else:
    if torch.version.cuda is None:
        NO_CUDA = NO_CUDA or f"torch {torch.__version__} is not a CUDA build"
    elif CUDA_HOME is None:
        NO_CUDA = NO_CUDA or "nvcc was not found; CUDA_HOME names the toolkit's folder"
    elif not Path(CUDA_HOME, "include", "cuda_runtime.h").exists():
        NO_CUDA = NO_CUDA or (
            f"{CUDA_HOME} has no include/cuda_runtime.h; CUDA_HOME names the toolkit's folder"
        )

# With OpenMP, or at::parallel_for would be serial; Apple's compiler has none.
FLAGS, LINK_FLAGS = {
    "win32": (["/O2", "/openmp"], []),
    "darwin": (["-O3", "-g0"], []),
}.get(sys.platform, (["-O3", "-g0", "-fopenmp"], ["-fopenmp"]))

# In a checkout that is installed in place, dropinf/triton_kernels is a link, and found.
PACKAGES = sorted({*find_packages(include=["dropinf", "dropinf.*"]), "dropinf.triton_kernels"})


def extension(no_cuda: str) -> CppExtension:
    """With the CUDA kernels if `no_cuda`, the reason to leave them out, is empty."""
    sources = [*glob("csrc/*.cpp"), *glob("csrc/cpu/*.cpp"), "csrc/capture/bindings.cpp"]
    common = {
        "depends": sorted([*glob("csrc/**/*.*h", recursive=True), *glob("csrc/capture/*.cpp")]),
        "include_dirs": [os.path.abspath("csrc")],
        "extra_link_args": LINK_FLAGS,
    }
    if no_cuda:
        macro = ("DROPINF_WHY_NO_CUDA", json.dumps(no_cuda))
        return CppExtension(
            "dropinf._C", sorted(sources), define_macros=[macro], extra_compile_args=FLAGS, **common
        )
    # torch would build for the GPUs of this machine, and fail without one.
    newer = tuple(map(int, torch.version.cuda.split(".")[:2])) >= (12, 8)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX" if newer else "8.0;9.0+PTX")
    built_for = f"CUDA {torch.version.cuda}, {os.environ['TORCH_CUDA_ARCH_LIST']}"
    return CUDAExtension(
        "dropinf._C",
        sorted([*sources, *glob("csrc/cuda/*.cpp"), *glob("csrc/cuda/*.cu")]),
        define_macros=[("DROPINF_CUDA", json.dumps(built_for))],
        extra_compile_args={"cxx": FLAGS, "nvcc": ["-O3"]},
        **common,
    )


class BuildOptional(BuildExtension):
    def run(self) -> None:
        note = Path(self.get_ext_fullpath("dropinf._C")).with_name("_build_failure.txt")
        note.unlink(missing_ok=True)
        if WISH_CUDA == "1" and NO_CUDA:
            raise RuntimeError(f"DROPINF_CUDA=1, but {NO_CUDA}")
        reason = OBSTACLE
        if not reason:
            try:
                self.run_with_or_without_cuda()
                return
            except Exception as error:
                reason = f"the C++ extension did not compile: {error or type(error).__name__}"
                if "1" in (WISH, WISH_CUDA):
                    raise
        if WISH == "1":
            raise RuntimeError(f"DROPINF_EXTENSION=1, but {reason}")
        print(f"dropinf: no C++ kernels, {reason}", file=sys.stderr)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(reason + "\n", encoding="utf-8")

    def run_with_or_without_cuda(self) -> None:
        try:
            super().run()
        except Exception as error:
            if NO_CUDA or WISH_CUDA == "1":
                raise
            reason = " ".join(f"the CUDA kernels did not compile: {error}".split())
            print(f"dropinf: no CUDA kernels, {reason}", file=sys.stderr)
            self.extensions = [extension(reason)]
            super().run()


setup(
    packages=PACKAGES,
    package_dir={"dropinf.triton_kernels": "triton_kernels"},
    ext_modules=[extension(NO_CUDA)],
    cmdclass={"build_ext": BuildOptional},
)
