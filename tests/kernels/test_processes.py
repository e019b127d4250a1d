"""Kernels of the CPU in several processes and threads, and where numba is not as it should be."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from mkf.kernels import registry
from mkf.kernels.affine_fit import numba
from mkf.nn import KeyConv2d
from tests.kernels.runs_here import runnable

NUMBA = any(name == "numba" for name, _ in runnable("affine_fit"))


def run(code, **environment):
    """The output of a program, which has half a minute and may not end in any other way."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.split()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.skipif(not any(name == "native" for name, _ in runnable("affine_fit")), reason="needs the extension")
def test_a_forked_process_computes_with_one_thread():
    """GNU OpenMP would wait for ever for the threads that its parent had, as torch's own operators do."""
    code = """
        import os, numpy, torch, mkf
        torch.set_num_threads(2)
        keys = mkf.keys.paper8()
        filters, x = torch.randn(100_000, 7, 7), torch.randn(4, 32, 56, 56)
        layer = mkf.KeyConv2d(32, 7, keys, padding=3).requires_grad_(False)
        parent = os.getpid()

        def results():
            others = filters[:256] * (1 + (os.getpid() == parent))  # which no process knows from before
            many = mkf.affine_fit(filters[:500], others, backend="native").index
            return [*mkf.affine_fit(filters, keys, backend="native"), many, layer(x)]

        mine = results()
        child = os.fork()
        if child == 0:
            same = all(numpy.array_equal(a, b) for a, b in zip(mine, results()))
            os._exit(0 if same else 1)
        print(os.waitpid(child, 0)[1])
    """
    assert run(code) == ["0"]


@pytest.mark.skipif(not NUMBA, reason="needs numba")
def test_threads_may_call_numba_at_once_without_openmp():
    code = """
        import threading, torch, mkf
        keys, filters = mkf.keys.paper8(), torch.randn(20_000, 7, 7)
        expected = mkf.affine_fit(filters, keys, backend="numba").index
        right = []

        def several():
            for _ in range(20):
                right.append(torch.equal(mkf.affine_fit(filters, keys, backend="numba").index, expected))

        threads = [threading.Thread(target=several) for _ in range(3)]
        [t.start() for t in threads], [t.join() for t in threads]
        print(len(right), all(right))
    """
    assert run(code, NUMBA_THREADING_LAYER="workqueue") == ["60", "True"]


@pytest.mark.skipif(not NUMBA, reason="needs numba")
def test_numba_without_a_folder_for_what_it_compiled():
    from mkf.kernels.affine_fit import numba_kernel

    names = {}
    exec("def double(x):\n    return 2 * x", names)  # of no file, so that nothing can be kept beside it
    assert numba_kernel._kept(names["double"])(4) == 8


def test_a_numba_that_does_not_load_is_passed_over(tmp_path, monkeypatch):
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs an older NumPy')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "numba", raising=False)
    numba._missing.cache_clear()
    try:
        assert numba.why_not(torch.device("cpu")) == "numba does not load: Numba needs an older NumPy"
    finally:
        numba._missing.cache_clear()


def test_a_switch_for_one_operator_leaves_the_other_alone(monkeypatch):
    layer, x = KeyConv2d(4, 3, torch.randn(2, 3, 3), padding=1), torch.randn(1, 4, 6, 6)
    expected = layer(x)
    monkeypatch.setenv("MKF_BACKEND", "numba")
    assert torch.equal(layer(x), expected)
    assert registry.choose("affine_fit", x.device).name == "numba"
    with pytest.raises(ValueError, match="backend='numba': key_conv2d has no such implementation"):
        registry.choose("key_conv2d", x.device, "numba")
