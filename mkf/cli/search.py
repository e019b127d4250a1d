"""`mkf search`: the keys of a bank of filters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mkf.cli import _outputs, _sources
from mkf.cli._console import print_table, stderr, stdout
from mkf.cli._errors import typed, user_errors

if TYPE_CHECKING:
    import torch

    from mkf.bank import FilterBank
    from mkf.keys import KeySet
    from mkf.search import Autoencoder, Comparison, Elimination

METHODS = ("clusters", "autoencoder", "pca", "random")
OBJECTIVES = ("residual", "output", "accuracy")
_WEIGHTS = "model.safetensors"
"""In the folder of a run."""

_COMPARED = ("sources", "keys", "size", "seeds", "pretrained", "compare")
"""What --compare looks at."""

_TRAINED = ("steps", "rounds")
"""What only the autoencoder looks at."""

_ELIMINATED = ("candidates", "state")
"""What only a search with an elimination looks at."""


def command(
    context: typer.Context,
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar=f"{_sources.METAVAR}...",
            help=_sources.HELP,
        ),
    ],
    method: Annotated[str, typer.Option(help="clusters, autoencoder, pca or random.")] = "clusters",
    objective: Annotated[
        str | None,
        typer.Option(
            help="Find --candidates keys, then eliminate them one at a time by this: residual (weights alone), output "
            "or accuracy (of --model on training images of --data). With autoencoder residual if not given.",
        ),
    ] = None,
    keys: Annotated[int, typer.Option(help="How many keys.")] = 8,
    out: Annotated[Path | None, typer.Option(help="The key file to write, safetensors.")] = None,
    size: Annotated[int | None, typer.Option(help="Kernel size, if the sources hold several.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of all random draws.")] = 0,
    candidates: Annotated[int, typer.Option(min=1, max=256, help="How many candidates to eliminate from.")] = 50,
    rounds: Annotated[
        int, typer.Option(min=1, max=2, help="Of autoencoder: 2 for a second round around the 10 best.")
    ] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of the autoencoder at most.")] = 3000,
    model: Annotated[Path | None, typer.Option(help="Folder of a finished run of mkf train.")] = None,
    data: Annotated[Path | None, typer.Option(help="Its data folder, of which the training split is used.")] = None,
    per_class: Annotated[int, typer.Option(min=1, help="Training images of each class that judge the keys.")] = 100,
    state: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep what is done here; a search that was killed goes on from it."),
    ] = None,
    figures: Annotated[Path | None, typer.Option(metavar="DIR", help="Draw keys, code axis and curve here.")] = None,
    device: Annotated[str, typer.Option(help="Where autoencoder and --model run: auto, cpu, cuda, ...")] = "auto",
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Instead: hold models out in turn and print how every method does on them."),
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Of --compare: searches with seeds 0, 1, ...")] = 3,
    pretrained: Annotated[bool, typer.Option(help="Fetch the trained weights of timm models.")] = True,
) -> None:
    """Find the keys of a bank: the few filters that the others are linear shifts of.

    Untrained models of a bank (named ...-untrained) take no part.
    """
    with user_errors():
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        from mkf.search import autoencoder, eliminate, two_rounds
        from mkf.search.two_rounds import check_rounds
        from mkf.train.device import find_device

        _check(method, objective, model, data)
        given = typed(context)
        if compare:
            _refuse(given - set(_COMPARED), "--compare prints a table of all methods and takes no")
        else:
            _refuse(given & {"seeds"}, "one search has one --seed; only --compare takes")
        if method != "autoencoder":
            _refuse(given & set(_TRAINED), f"--method {method} trains nothing and takes no")
            if objective is None:
                _refuse(given & set(_ELIMINATED), f"--method {method} without --objective eliminates nothing: no")
        if objective not in ("output", "accuracy"):
            _refuse(given & {"per_class"}, "only --objective output and accuracy look at images: no")
            if method != "autoencoder":
                _refuse(given & {"device"}, "only autoencoder and --model run on a device of choice: no")
        if out is not None:
            _outputs.named(out, "--out", ".safetensors")
            _outputs.file(out, "--out")
            _outputs.not_an_input(out, "--out", *sources, *([model / _WEIGHTS] if model else []))
        elif not compare:
            raise ValueError("name the key file to write: --out keys.safetensors")
        for option, folder in (("--state", state), ("--figures", figures)):
            if folder is not None:
                _outputs.folder(folder, option)
        # Numbers that do not go together are told before any candidate is searched.
        if method == "autoencoder" and rounds == 2 and not compare:
            check_rounds(keys, candidates)
        elif (method == "autoencoder" or objective) and not 1 <= keys <= candidates:
            raise ValueError(f"--keys {keys}: there are {candidates} --candidates, so ask for 1 to {candidates} keys")
        bank = _sources.trained(sources, size, pretrained)
        console, err = stdout(), stderr()
        columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
        bar = Progress(*columns, console=err, transient=True, disable=not err.is_terminal)

        def task(name: str) -> Callable[[int, int], None]:
            added = bar.add_task(name, total=None)
            return lambda done, total: bar.update(added, completed=done, total=total)

        if compare:
            with bar:
                comparison = _compare(bank, keys, seeds, task("searching"))
            _print_comparison(comparison, console)  # once the bar is gone, which stands on the same terminal
            return
        with bar:
            place = find_device(device)
            judge = _objective(
                objective or ("residual" if method == "autoencoder" else None), bank, model, data, per_class, place
            )
            coder = elimination = None
            if method == "autoencoder":
                file = _in(state, "autoencoder.pt")
                coder = autoencoder(bank, seed=seed, steps=steps, device=place, state=file, progress=task("training"))
                pool = coder.candidates(candidates)
            else:
                pool = _direct(method, bank, candidates if judge else keys, seed, task(method))
            if coder is not None and rounds == 2:
                _, elimination = two_rounds(
                    coder, keys, judge, candidates=candidates, state=state, progress=task("eliminating")
                )
            elif judge is not None:
                file = _in(state, "elimination.json")
                elimination = eliminate(pool, keys, judge, state=file, progress=task("eliminating"))
            found = pool if elimination is None else elimination.keys
        _report(bank, found, coder, elimination, console)
        if figures is not None:
            _draw(figures, found, coder, candidates, elimination)
        if out is not None:
            found.save(out)
            console.print(f"Written to {out}", soft_wrap=True)


def _refuse(options: set[str], reason: str) -> None:
    """An error if there are any."""
    if options:
        raise ValueError(f"{reason} {', '.join('--' + name.replace('_', '-') for name in sorted(options))}")


def _check(method: str, objective: str | None, model: Path | None, data: Path | None) -> None:
    """Refuse words that are none and a network that is missing, or would not be looked at."""
    if method not in METHODS:
        raise ValueError(f"--method {method}: use one of {', '.join(METHODS)}")
    if objective not in (None, *OBJECTIVES):
        raise ValueError(f"--objective {objective}: use one of {', '.join(OBJECTIVES)}")
    if objective in ("output", "accuracy") and (model is None or data is None):
        raise ValueError(f"--objective {objective} needs --model, a finished run of mkf train, and --data, its images")
    if objective not in ("output", "accuracy") and (model or data):
        raise ValueError("--model and --data are for --objective accuracy or output, which was not asked for")


def _compare(bank: FilterBank, k: int, seeds: int, progress: Callable[[int, int], None]) -> Comparison:
    from mkf.keys import analytic, paper8
    from mkf.search import compare

    size = bank.kernel_sizes[0]
    known = {"analytic B": analytic("B", size)} | ({"paper8": paper8()} if size == 7 else {})
    return compare(bank, k, keys=known if k == 8 else None, seeds=range(seeds), progress=progress)


def _print_comparison(comparison: Comparison, console: Any) -> None:
    console.print(comparison.markdown(), soft_wrap=True)
    folds = "; ".join(", ".join(fold) for fold in comparison.folds)
    console.print(f"Mean residual of held-out filters, seeds {list(comparison.seeds)}; held out together: {folds}.")


def _objective(
    word: str | None, bank: FilterBank, model: Path | None, data: Path | None, per_class: int, device: torch.device
) -> Any:
    from mkf.search import Accuracy, OutputError, Residual

    if word is None:
        return None
    if word == "residual":
        return Residual(bank)
    assert model is not None
    assert data is not None
    from mkf.train import ParquetImages, evaluation_loader, load_weights
    from mkf.train.data import keep_if_small

    network, metadata = load_weights(model / _WEIGHTS)
    images, size = ParquetImages(data), int(metadata["image_size"])
    batches = keep_if_small(evaluation_loader(images, images, size, per_class))
    return (Accuracy if word == "accuracy" else OutputError)(network.to(device), batches, split="train")


def _direct(method: str, bank: FilterBank, k: int, seed: int, progress: Callable[[int, int], None]) -> KeySet:
    from mkf.keys import random
    from mkf.search import clusters, pca

    if method == "clusters":
        return clusters(bank, k, seed, progress=progress).keys
    return pca(bank, k) if method == "pca" else random(bank.kernel_sizes[0], k, seed)


def _in(folder: Path | None, name: str) -> Path | None:
    return None if folder is None else folder / name


def _report(
    bank: FilterBank, found: KeySet, coder: Autoencoder | None, elimination: Elimination | None, console: Any
) -> None:
    """Print how well the keys fit, and what the search went through."""
    from rich.table import Table

    from mkf.ops.fit_statistics import fit_statistics

    if coder is not None:
        best = coder.best
        console.print(
            f"autoencoder: loss {best.train:.3f}, on held-out filters {best.held_out:.3f} at step {best.step}, the "
            f"best of {coder.history[-1].step}; code axis used evenly to {coder.occupancy:.2f} (entropy; 1 is level)"
        )
    if elimination is not None:
        shown = elimination.curve[:: max(1, len(elimination.curve) // 10)]
        points = ", ".join(f"{step.keys}: {step.loss:.4f}" for step in shown)
        console.print(f"{elimination.objective}, loss by keys left: {points}; elbow at {elimination.elbow}")
    statistics = fit_statistics(bank, found)
    table = Table("key", "filters", "share", "mean residual", title=f"Keys: {len(found)}, of {len(bank):,} filters")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, count, share, mean in zip(
        found.names, statistics.count[0], statistics.share[0], statistics.mean[0], strict=True
    ):
        table.add_row(name, f"{count:,}", f"{share:.1%}", f"{mean:.3f}" if count else "-")
    table.add_row("all", f"{statistics.count.sum():,}", "", f"{statistics.over_keys().mean[0, 0]:.3f}")
    print_table(console, table)
    if left_out := statistics.dead.sum() + statistics.not_finite.sum():
        console.print(f"Constant or not finite, under no key: {left_out:,}")


def _draw(
    folder: Path, found: KeySet, coder: Autoencoder | None, candidates: int, elimination: Elimination | None
) -> None:
    from mkf.analysis import figures

    figures.save(figures.keys_row(found), folder / "keys.png")
    if coder is not None:
        figures.save(figures.code_axis(coder.candidates(candidates), coder.histogram), folder / "code_axis.png")
    if elimination is not None:
        losses = {step.keys: step.loss for step in elimination.curve}
        drawn = figures.elimination(losses, elimination.objective, len(found), elimination.elbow)
        figures.save(drawn, folder / "elimination.png")
