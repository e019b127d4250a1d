"""Errors that end in one line."""

import pytest
import typer
from safetensors import SafetensorError

from mkf.cli._errors import user_errors


def test_an_interruption_is_told_with_its_notes(capsys: pytest.CaptureFixture[str]) -> None:
    interrupt = KeyboardInterrupt()
    for said in ("interrupted", "interrupted; go on"):
        with pytest.raises(typer.Exit) as caught, user_errors():
            raise interrupt
        assert caught.value.exit_code == 130
        assert capsys.readouterr().err == f"{said}\n"
        interrupt.add_note("go on")


def test_errors_of_safetensors_are_a_users(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught, user_errors():
        raise SafetensorError("no space left")
    assert caught.value.exit_code == 1
    assert capsys.readouterr().err == "error: no space left\n"
