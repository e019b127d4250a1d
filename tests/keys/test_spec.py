"""Keys by a word of the command line."""

from pathlib import Path

import pytest

from mkf.keys import analytic, paper8, parse, random


def test_words() -> None:
    assert parse("paper8") == paper8()
    for method in ("A", "B", "C1", "C2", "D1", "D2"):
        assert parse(f"analytic:{method}") == analytic(method)
        assert parse(f"analytic:{method}:3") == analytic(method, 3)


def test_a_file(tmp_path: Path) -> None:
    random().save(tmp_path / "mine.safetensors")
    assert parse(str(tmp_path / "mine.safetensors")) == random()


@pytest.mark.parametrize("spec", ["paper9", "", "Paper8", "paper8:B", "no/such/file.txt", "."])
def test_the_error_lists_the_forms(spec: str) -> None:
    with pytest.raises(ValueError, match=r"analytic:METHOD:k with METHOD one of A, B, C1, C2, D1, D2 and k"):
        parse(spec)


@pytest.mark.parametrize("spec", ["analytic", "analytic:", "analytic:E", "analytic:A:B"])
def test_the_error_lists_the_methods(spec: str) -> None:
    with pytest.raises(ValueError, match="A, B, C1, C2, D1, D2"):
        parse(spec)
