import json

import pytest
from typer.testing import CliRunner

from mkf.cli import app


def test_bench_fit_writes_table_results_and_figure(tmp_path):
    pytest.importorskip("matplotlib")
    out, figure = tmp_path / "fit.json", tmp_path / "fit.png"
    words = ["bench", "fit", "--filters", "1000", "--keys", "8", "--rounds", "2", "--only", "mkf native"]
    result = CliRunner().invoke(app, [*words, "--json", str(out), "--figure", str(figure)])
    assert result.exit_code == 0, result.output
    (written,) = json.loads(out.read_text())
    assert written["baseline"] == written["rows"][0]["name"]
    assert written["environment"]["versions"]["torch"]
    assert figure.stat().st_size > 1000


def test_bench_fit_refuses_what_it_cannot_time():
    result = CliRunner().invoke(app, ["bench", "fit", "--dtype", "int8"])
    assert result.exit_code == 1
    assert "float32" in result.stderr


def test_bench_fit_names_the_candidates_when_none_is_meant():
    result = CliRunner().invoke(app, ["bench", "fit", "--filters", "10", "--only", "nonsense"])
    assert result.exit_code == 1
    assert "mkf native" in result.stderr
