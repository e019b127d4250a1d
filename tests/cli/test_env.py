from typer.testing import CliRunner

import mkf
from mkf.cli import app
from mkf.kernels import extension, registry


def test_env_names_every_implementation():
    result = CliRunner().invoke(app, ["env"])
    assert result.exit_code == 0, result.output
    for implementation in registry.IMPLEMENTATIONS:
        assert implementation.name in result.output
    assert "chosen" in result.output


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"mkf {mkf.__version__}\n")


def test_env_without_the_extension_names_numba(monkeypatch):
    why = "the C++ extension is missing: no compiler in [/x]" + "/a" * 60
    monkeypatch.setattr(extension, "missing", lambda: why)
    output = CliRunner().invoke(app, ["env"]).output
    assert f"extension: {why}\n" in output
    numba = next(line for line in output.splitlines() if line.lstrip(" │").startswith("numba"))
    assert "chosen" in numba


def test_env_with_a_wrong_switch_is_one_message(monkeypatch):
    monkeypatch.setenv("MKF_BACKEND", "fortran")
    result = CliRunner().invoke(app, ["env"])
    assert result.exit_code == 1
    assert "no such implementation" in result.stderr
