"""Errors that end in one line."""

import pytest
import typer
from safetensors import SafetensorError

from mkf.cli._errors import user_errors


def test_errors_of_safetensors_are_a_users(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught, user_errors():
        raise SafetensorError("no space left")
    assert caught.value.exit_code == 1
    assert capsys.readouterr().err == "error: no space left\n"
