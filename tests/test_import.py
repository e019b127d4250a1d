"""`import mkf` is light: torch and numpy only, and nothing wakes a GPU."""

import subprocess
import sys

HEAVY = ("timm", "matplotlib", "triton", "numba", "pyarrow", "typer", "rich", "safetensors", "PIL")


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_brings_in_nothing_heavy():
    code = f"""
import sys, torch
before = set(sys.modules)  # torch may bring some of them by itself
import mkf
print([m for m in {HEAVY!r} if m in sys.modules and m not in before], torch.cuda.is_initialized())
"""
    assert run(code) == "[] False"


def test_one_openmp_runtime():
    code = """
import torch, mkf
from mkf.kernels import extension
if extension.missing() is None and extension.native().openmp:
    mkf.affine_fit(torch.randn(100_000, 7, 7), mkf.keys.paper8(), backend="native")
    maps = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}
    print(len(maps))
else:
    print(1)
"""
    assert run(code) == "1"


def test_the_public_face_exists():
    code = "import mkf; print([name for name in mkf.__all__ if not hasattr(mkf, name)])"
    assert run(code) == "[]"
