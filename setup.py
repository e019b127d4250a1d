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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

# Instructions in the order that suits this processor run 1 to 10 % faster on AMD's Zen 4 too, unknown to gcc 12.
TUNING = ["-mtune=icelake-server"]
# GCC's own headers of AVX-512 start from a value that is not set, and make it warn of that.
QUIET = ["-Wno-uninitialized"]
INSTRUCTION_SETS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c", *TUNING, *QUIET],
}
GPU_ARCHITECTURES = ("80", "90", "100")
# Kernels that rank filters must find the same bits for a filter in each of their forms: only fmaf() is one.
CUDA_FLAGS = {"affine_fit": ["-fmad=false"]}  # by folder
X86 = platform.machine().lower() in ("x86_64", "amd64")


def find_nvcc() -> str | None:
    """The nvcc to compile with, by MKF_CUDA, CUDA_HOME and PATH; a GPU need not be there."""
    wanted = os.environ.get("MKF_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"MKF_CUDA={wanted}: use 1 (build the CUDA kernels), 0 (do not) or leave it unset")
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
            for one in (self.get_ext_filename(ext.name), self.get_ext_fullpath(ext.name)):
                Path(one).unlink(missing_ok=True)  # one that is there, in place or in build, is of other sources
            print(f"mkf: building without mkf._native, numba takes over ({error})", file=sys.stderr)

    def compile_and_link(self, ext: Pybind11Extension) -> None:
        """Build with the CUDA kernels if nvcc is there and works, else without."""
        nvcc = find_nvcc()
        if nvcc is not None:
            try:
                return self.compile_and_link_with(ext, nvcc)
            except (OSError, subprocess.CalledProcessError) as error:
                if os.environ.get("MKF_CUDA") == "1":
                    raise SystemExit(f"MKF_CUDA=1, but nvcc failed: {error}") from error
                print(f"mkf: building without the CUDA kernels, nvcc failed ({error})", file=sys.stderr)
        self.compile_and_link_with(ext, None)

    def compile_and_link_with(self, ext: Pybind11Extension, nvcc: str | None) -> None:
        """Compile every source with the flags of its file name and link them."""
        objects = self.compile_cuda(nvcc) if nvcc else []
        # Sums of windows are only set, and only read, where a group needs them, which compilers cannot know.
        quiet = ["-Wno-maybe-uninitialized"]
        flags = ["-O3", "-std=c++17", "-fvisibility=hidden", "-g0", *quiet, *self.openmp()]
        macros = [("MKF_X86", None)] if X86 else []
        if nvcc:
            macros.append(("MKF_WITH_CUDA", None))

        def compile_one(source: str) -> list[str]:
            isa = Path(source).stem.removeprefix("cpu_")
            return self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=macros,
                include_dirs=ext.include_dirs,
                extra_postargs=flags + INSTRUCTION_SETS.get(isa, []),
            )

        sources = [s for s in ext.sources if X86 or Path(s).stem not in ("cpu_avx2", "cpu_avx512")]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects += [one for some in pool.map(compile_one, sources) for one in some]
        library = self.get_ext_fullpath(ext.name)
        if nvcc:  # it knows where its static runtime is
            Path(library).parent.mkdir(parents=True, exist_ok=True)
            host = ",".join(["-fPIC", *self.openmp()])
            self.spawn_nvcc([nvcc, "-shared", "-cudart", "static", "-Xcompiler", host, *objects, "-o", library])
        else:
            self.compiler.link_shared_object(objects, library, extra_postargs=self.openmp(), target_lang="c++")

    def compile_cuda(self, nvcc: str) -> list[str]:
        """The objects of the .cu files, each with machine code for `GPU_ARCHITECTURES` and PTX for what comes after."""
        targets = []
        for arch in GPU_ARCHITECTURES:
            code = f"[sm_{arch},compute_{arch}]" if arch == GPU_ARCHITECTURES[-1] else f"sm_{arch}"
            targets += ["-gencode", f"arch=compute_{arch},code={code}"]
        objects = []
        for source in sorted(Path("csrc").rglob("*.cu")):
            target = Path(self.build_temp, source).with_suffix(".cuda.o")
            target.parent.mkdir(parents=True, exist_ok=True)
            flags = ["-Xcompiler", "-fPIC,-fvisibility=hidden", *CUDA_FLAGS.get(source.parent.name, [])]
            self.spawn_nvcc(
                [nvcc, "-O3", "-std=c++17", "--threads", "0", *flags, *targets, "-c", str(source), "-o", str(target)]
            )
            objects.append(str(target))
        return objects

    def spawn_nvcc(self, command: list[str]) -> None:
        """Run one command, showing it."""
        print(" ".join(command))
        subprocess.run(command, check=True)

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


class BuildModules(build_py):
    """Leaves out the tests that stand among the benchmarks: an installation lacks what they need."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """What `build_py` finds, without tests."""
        found = super().find_package_modules(package, package_dir)
        return [module for module in found if not module[1].startswith("test_")]


native = Pybind11Extension(
    "mkf._native",
    sorted(str(path) for path in Path("csrc").rglob("*.cpp")),
    include_dirs=["csrc"],
    depends=sorted(str(path) for pattern in ("*.h*", "*.cu*") for path in Path("csrc").rglob(pattern)),
    optional=True,
)
setup(ext_modules=[native], cmdclass={"build_ext": BuildNative, "build_py": BuildModules})
