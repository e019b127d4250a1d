"""`python -m mkf` is the command `mkf`."""

from mkf.cli import app

app(prog_name="mkf")
