"""Builds the optional extension `mkf._native`; everything else about the package stands in pyproject.toml.

Without a C++ compiler the installation succeeds and says so: numba and torch take over. With nvcc (CUDA 12.8 or newer)
the extension also holds the CUDA kernels; MKF_CUDA=0 leaves them out, MKF_CUDA=1 makes a missing nvcc an error.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

INSTRUCTION_SETS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}
GPU_ARCHITECTURES = ("80", "90", "100")
X86 = platform.machine().lower() in ("x86_64", "amd64")


def find_nvcc() -> str | None:
    """The nvcc to compile with, by MKF_CUDA, CUDA_HOME and PATH; a GPU need not be there."""
    wanted = os.environ.get("MKF_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"MKF_CUDA={wanted}: use 1 (build the CUDA kernels), 0 (do not) or leave it unset (if nvcc is there)")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("nvcc")
    if nvcc is None and wanted == "1":
        raise SystemExit("MKF_CUDA=1, but there is no nvcc on PATH or under CUDA_HOME")
    return nvcc


class BuildNative(build_ext):
    """Compiles each file for its own instruction set, and the .cu files with nvcc."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        """Build, or say what failed and go on without."""
        try:
            self.compile_and_link(ext)
        except SystemExit:
            raise
        except Exception as error:
            print(f"mkf: building without mkf._native, numba takes over ({error})", file=sys.stderr)

    def compile_and_link(self, ext: Pybind11Extension) -> None:
        """Compile every source with the flags of its file name and link them."""
        flags = ["-O3", "-std=c++17", "-fvisibility=hidden", "-g0", "-Wno-maybe-uninitialized", *self.openmp()]
        macros = [("MKF_X86", None)] if X86 else []
        objects = []
        for source in ext.sources:
            isa = Path(source).stem.removeprefix("cpu_")
            if isa in ("avx2", "avx512") and not X86:
                continue
            objects += self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=macros,
                include_dirs=ext.include_dirs,
                extra_postargs=flags + INSTRUCTION_SETS.get(isa, []),
            )
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=self.openmp(), target_lang="c++"
        )

    def openmp(self) -> list[str]:
        """The flag for OpenMP if this compiler takes it; without it kernels run on one thread."""
        if not hasattr(self, "_openmp"):
            with tempfile.TemporaryDirectory() as folder:
                probe = Path(folder, "probe.cpp")
                probe.write_text("#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n")
                try:
                    self.compiler.compile([str(probe)], output_dir=folder, extra_postargs=["-fopenmp"])
                    self._openmp = ["-fopenmp"]
                except Exception:
                    self._openmp = []
        return self._openmp


native = Pybind11Extension(
    "mkf._native",
    sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
    include_dirs=["csrc"],
    depends=sorted(str(path) for path in Path("csrc").rglob("*.h*")),
    optional=True,
)
setup(ext_modules=[native], cmdclass={"build_ext": BuildNative})
