from typer.testing import CliRunner

import mkf
from mkf.cli import app
from mkf.kernels import extension, registry


def test_env_names_every_implementation(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = CliRunner().invoke(app, ["env"])
    assert result.exit_code == 0, result.output
    for implementation in registry.IMPLEMENTATIONS:
        assert implementation.name in result.output
    assert "chosen" in result.output


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"mkf {mkf.__version__}\n")


def test_env_without_the_extension_names_numba(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(extension, "missing", lambda: "the C++ extension is missing: no compiler")
    output = CliRunner().invoke(app, ["env"]).output
    assert "extension: the C++ extension is missing" in output
    numba = next(line for line in output.splitlines() if line.lstrip(" │").startswith("numba"))
    assert "chosen" in numba


def test_env_with_a_wrong_switch_is_one_message(monkeypatch):
    monkeypatch.setenv("MKF_BACKEND", "fortran")
    result = CliRunner().invoke(app, ["env"])
    assert result.exit_code == 1
    assert "no such implementation" in result.stderr
