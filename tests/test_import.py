"""`import mkf` is light: what it offers comes when it is asked for, with torch and numpy only, and wakes no GPU."""

import pickle
import subprocess
import sys
from importlib import import_module

import pytest
from typer.testing import CliRunner

import mkf
from mkf.cli import app

HEAVY = ("timm", "matplotlib", "triton", "numba", "pyarrow", "typer", "rich", "safetensors", "PIL")


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_brings_in_nothing_heavy():
    code = f"""
import sys, torch
before = set(sys.modules)  # torch may bring some of them by itself
from mkf import *
print([m for m in {HEAVY!r} if m in sys.modules and m not in before], torch.cuda.is_initialized())
"""
    assert run(code) == "[] False"


@pytest.mark.parametrize("module", ["mkf", "mkf.train", "mkf.cli"])
def test_what_needs_no_torch_does_not_wait_for_it(module):
    assert run(f"import sys, {module}; print('torch' in sys.modules)") == "False"
    assert run(f"import {module}; import mkf; print(mkf.__version__)") == mkf.__version__


@pytest.mark.parametrize("package", ["mkf", "mkf.train"])
def test_names_are_there_before_they_are_imported(package):
    code = f"import {package} as package; print(set(package.__all__) <= set(dir(package)))"
    assert run(code) == "True"
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'none'"):
        _ = import_module(package).none


def test_what_is_used_first_brings_what_it_needs(tmp_path):
    path = tmp_path / "layer"
    path.write_bytes(pickle.dumps(mkf.KeyConv2d(4, 3, mkf.keys.analytic("B", 3))))
    assert run(f"import pickle; print(type(pickle.load(open({str(path)!r}, 'rb'))).__name__)") == "KeyConv2d"
    assert run("import mkf; print(len(mkf.keys.analytic('B')), mkf.KeySet.__name__)") == "8 KeySet"
    assert run("import torch, mkf.ops; print(torch.ops.mkf.key_conv2d)") == "mkf.key_conv2d"


def test_an_interrupt_ends_quietly(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("mkf.kernels.registry.operators", interrupted)
    result = CliRunner().invoke(app, ["env"])
    assert (result.exit_code, result.stderr) == (130, "")


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
    for package in ("mkf", "mkf.train"):
        assert run(f"import {package} as p; print([name for name in p.__all__ if not hasattr(p, name)])") == "[]"
