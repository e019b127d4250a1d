"""Where filters come from on a command line."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from mkf.bank import FilterBank

METAVAR = "NAME|FILE|BANK"  # narrow: a table of options at 80 columns cuts longer ones off
WORDS = "timm's name of a model, a checkpoint file, or a saved bank (embedded: the one that comes with mkf)"
HELP = f"Where the filters come from, any number and mix: {WORDS}."
KEYS = "KEYS"
KEYS_HELP = "The keys: paper8, analytic:B (or A, C1, C2, D1, D2; with :3 after it for 3x3), or a key file."


def bars(stderr: Console) -> Progress:
    """Progress bars on standard error, which vanish at the end and are not drawn into a file."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    description = TextColumn("{task.description}", markup=False)  # it names sources, whose brackets are no markup
    columns = SpinnerColumn(), description, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal)


def say(progress: Progress, line: str) -> None:
    """Print a line of results while bars are drawn: above them where both are on one terminal."""
    if progress.console.is_terminal and sys.stdout.isatty():
        progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
    else:
        typer.echo(line)


def read(sources: Sequence[str] | None, pretrained: bool, k: int, progress: Progress) -> FilterBank:
    """The filters of all sources, each read once, as one bank.

    Raises:
        ValueError: Two sources hold a model of one name with k x k filters, which would be added up as a single model;
            and see `mkf.bank.load`.
        OSError: See `mkf.bank.load`.
    """
    from mkf.bank import FilterBank, load

    names = list(dict.fromkeys(sources or ["embedded"]))
    task = progress.add_task("reading sources", total=len(names))
    banks: dict[str, FilterBank] = {}
    for name in names:
        progress.update(task, description=f"reading {name}")
        banks[name] = load(name, pretrained)
        progress.advance(task)
    refuse_twins({source: bank.select(k=k) for source, bank in banks.items()})
    return FilterBank.concat(banks.values())


def trained(sources: Sequence[str], size: int | None, pretrained: bool) -> FilterBank:
    """The filters of the sources' trained models, of one kernel size.

    Raises:
        ValueError: The sources hold several kernel sizes and none is chosen, or none of that size, untrained models
            only, or two sources a model of one name; and see `mkf.bank.load`.
        OSError: See `mkf.bank.load`.
    """
    from mkf.bank import UNTRAINED, FilterBank, load

    banks = {source: load(source, pretrained) for source in dict.fromkeys(sources)}
    bank = FilterBank.concat(banks.values())
    sizes = bank.kernel_sizes
    if size is None and len(sizes) > 1:
        found = ", ".join(f"{k}x{k}" for k in sizes)
        raise ValueError(f"the sources hold filters of {found}: choose one with --size {sizes[-1]}")
    if size is not None and size not in sizes:
        raise ValueError(f"--size {size}: the sources hold no filters of {size}x{size}")
    if size is not None:
        banks = {source: bank.select(k=size) for source, bank in banks.items()}
    refuse_twins(banks)
    bank = FilterBank.concat(banks.values())
    names = [name for name in bank.models if not name.endswith(UNTRAINED)]
    if not names:
        raise ValueError(f"the sources hold no trained model: names that end in {UNTRAINED} stand for controls")
    return FilterBank.concat(bank.select(model=name) for name in names) if len(names) < len(bank.models) else bank


def refuse_twins(banks: Mapping[str, FilterBank]) -> None:
    """Refuse a model's name that two sources have."""
    of_model: dict[str, str] = {}
    for source, bank in banks.items():
        for model in bank.models:
            if other := of_model.get(model):
                raise ValueError(f"{other} and {source} both hold a model called {model!r}: give one of them at a time")
            of_model[model] = source
