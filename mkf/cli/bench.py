"""`mkf bench`: our operators against one read of memory and against their peers, as ratios in one run."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mkf.cli import _outputs, _sources
from mkf.cli._console import print_table, stdout
from mkf.cli._errors import user_errors

_PATIENCE = "Seconds to wait for a quiet machine, for each problem; as long as the turns take if not given."

app = typer.Typer(help="Time mkf against its peers; ratios in one run on this machine.", no_args_is_help=True)


@app.command("fit")
def fit(
    filters: Annotated[int, typer.Option(min=1, help="Number of filters.")] = 1_000_000,
    keys: Annotated[list[int] | None, typer.Option(min=1, max=256, help="Number of keys; repeatable.")] = None,
    k: Annotated[int, typer.Option(help="Kernel size: 3, 5, 7, 9 or 11.")] = 7,
    dtype: Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")] = "float32",
    rounds: Annotated[int, typer.Option(min=1, help="Turns that every candidate takes.")] = 15,
    patience: Annotated[float | None, typer.Option(min=0, help=_PATIENCE)] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; as torch has them if not given.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Candidates whose name starts so; repeatable.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw the ratios to this file (.png, .svg, .pdf).")] = None,
) -> None:
    """Time `affine_fit` relative to one read of the filters (`filters.sum()`), and the peers beside it."""
    import torch
    from rich.table import Table

    from mkf.benchmarks import affine_fit, measure

    console = stdout()
    with user_errors():
        _check(json, figure)
        if dtype not in affine_fit.DTYPES:
            raise ValueError(f"--dtype {dtype}: use one of {', '.join(affine_fit.DTYPES)}")
        if k not in (3, 5, 7, 9, 11):
            raise ValueError(f"--k {k}: kernel sizes are 3, 5, 7, 9 and 11")
        if threads:
            torch.set_num_threads(threads)
        results = []
        for count in keys or [8, 50]:
            result = affine_fit.run(filters, count, k, dtype, rounds, only, patience)
            table = Table(
                "", "ms", "times the read", "10 % to 90 %", "GB/s", title_justify="left",
                title=f"{filters:,} filters {k}x{k} {dtype}, {count} keys, {torch.get_num_threads()} threads",
                caption=_quiet([result]), caption_justify="left",
            )  # fmt: skip
            size = filters * k * k * affine_fit.DTYPES[dtype].itemsize
            for row in result.rows:
                table.add_row(
                    row.name, f"{row.seconds * 1e3:.2f}", f"{row.ratio:.2f}", f"{row.low:.2f} to {row.high:.2f}",
                    f"{size / row.seconds / 1e9:.1f}",
                )  # fmt: skip
            print_table(console, table)
            results.append(result)
        if json is not None:
            measure.write(results, json)
        if figure is not None:
            panels = {
                f"{filters:,} filters, {result.problem['keys']} keys": {row.name: row.ratio for row in result.rows}
                for result in results
            }
            _draw(panels, "times one read of the filters", figure)


@app.command("conv")
def conv(
    shape: Annotated[
        list[str] | None, typer.Option(metavar="N,C,H", help="Activations; repeatable. ConvNeXt-T's if not given.")
    ] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(help="Keys of the layer: the beginning of the name of a case; repeatable. All if not given."),
    ] = None,
    backward: Annotated[bool, typer.Option(help="Forward and backward in place of forward.")] = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    rounds: Annotated[int, typer.Option(min=1, help="Turns that every candidate takes.")] = 25,
    patience: Annotated[float | None, typer.Option(min=0, help=_PATIENCE)] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; as torch has them if not given.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Candidates whose name starts so; repeatable.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw the ratios to this file (.png, .svg, .pdf).")] = None,
) -> None:
    """Time `KeyConv2d` against free and frozen convolutions, each in the faster of both layouts.

    "of the copy" is the fraction of the speed at which the activations can be copied, which no layer can exceed. Calls
    are timed once the caches hold a candidate's own data; its first calls, after others have had their turns, apart.
    """
    import torch
    from rich.table import Table

    from mkf.benchmarks import key_conv2d as suite
    from mkf.benchmarks import measure

    console = stdout()
    with user_errors():
        _check(json, figure)
        shapes = [_shape(word) for word in shape] if shape else suite.SHAPES
        cases = [name for name in suite.CASES if not case or name.startswith(tuple(case))]
        if not cases:
            raise ValueError(f"no case begins so; there are {', '.join(suite.CASES)}")
        if dtype not in suite.DTYPES:
            raise ValueError(f"--dtype {dtype}: use one of {', '.join(suite.DTYPES)}")
        if threads:
            torch.set_num_threads(threads)
        own_names = [f"{suite.MKF}, {layout}" for layout in suite.LAYOUTS]
        if figure is not None and only and not any(own.startswith(tuple(only)) for own in own_names):
            raise ValueError(f"--figure shows times relative to those of {suite.MKF}: add --only {suite.MKF}")
        results, panels = [], {}
        for name in cases:
            mode = "backward" if backward else "forward"
            own = [suite.run(s, name, mode, dtype, rounds, only, patience) for s in shapes]  # type: ignore[arg-type]
            results += own
            what = "forward and backward" if backward else "forward"
            title = f"{name}: {what}, {dtype}, {torch.get_num_threads()} threads"
            table = Table(title=title, title_justify="left", caption=_quiet(own), caption_justify="left")
            table.add_column("times as long as mkf")
            for s in shapes:
                table.add_column(", ".join(map(str, s)), justify="right")
            table.add_column("geometric mean", justify="right")
            table.add_column("of first calls", justify="right")
            if _has(own[0], suite.MKF):
                ratios, of_first_calls = suite.times_as_long(own), suite.times_as_long(own, first_call=True)
                panels[title] = {peer: measure.geometric_mean(of_peer) for peer, of_peer in ratios.items()}
                for peer, of_peer in ratios.items():
                    means = panels[title][peer], measure.geometric_mean(of_first_calls[peer])
                    table.add_row(peer, *(f"{ratio:.2f}" for ratio in (*of_peer, *means)))
                best = [r.row(suite.fastest(r, suite.MKF)) for r in own]
                table.add_row("mkf, ms", *(f"{row.seconds * 1e3:.3f}" for row in best), "", "")
                table.add_row("mkf, of the copy", *(f"{100 / row.ratio:.0f} %" for row in best), "", "")
            print_table(console, table)
        if json is not None:
            measure.write(results, json)
        if figure is not None:
            _draw(panels, "times as long as mkf, geometric mean over the shapes", figure)


@app.command("model")
def model(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="timm's name of the network; untrained weights do for a timing.")
    ],
    keys: Annotated[str, typer.Option(metavar=_sources.KEYS, help=_sources.KEYS_HELP)] = "analytic:B",
    order: Annotated[str, typer.Option(help="Equal keys in blocks of channels, or random.")] = "blocks",
    inference: Annotated[bool, typer.Option(help="Inference in place of a training step.")] = False,
    train: Annotated[
        list[str] | None,
        typer.Option(
            help="What trains in the layers with keys: scale, shift, bias; repeatable. Shift and bias if not given."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images a step.")] = 8,
    size: Annotated[int, typer.Option(min=1, help="Height and width of an image.")] = 224,
    rounds: Annotated[int, typer.Option(min=1, help="Turns that every candidate takes.")] = 5,
    patience: Annotated[float | None, typer.Option(min=0, help=_PATIENCE)] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; as torch has them if not given.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Variants whose name starts so; repeatable.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw the ratios to this file (.png, .svg, .pdf).")] = None,
) -> None:
    """Time a whole network with keys, with its peers, and without depthwise layers, the ceiling."""
    import torch
    from rich.table import Table

    from mkf.benchmarks import measure
    from mkf.benchmarks import models as suite
    from mkf.benchmarks.key_conv2d import fastest
    from mkf.keys import parse

    console = stdout()
    with user_errors():
        _check(json, figure)
        if threads:
            torch.set_num_threads(threads)
        mode = "inference" if inference else "training"
        trained = train or suite.TRAIN
        result = suite.run(
            name, parse(keys), mode, batch, size, order, rounds, only,  # type: ignore[arg-type]
            train=trained, patience=patience,
        )  # fmt: skip
        what = mode if inference else f"{mode} ({' and '.join(trained)})"
        title = f"{name}, {what}, batch {batch}, {size}x{size}, {keys} in {order}, {torch.get_num_threads()} threads"
        caption = "removed: of what a network takes longer than the same without depthwise layers"
        table = Table(
            title=title, title_justify="left", caption=f"{caption}\n{_quiet([result])}", caption_justify="left"
        )
        table.add_column("network")
        shares = {own: result.derived[label] for own, label in suite.SHARES.items() if label in result.derived}
        for word in ("ms", "images/s", "times as long as without", *(f"removed by {own}" for own in shares)):
            table.add_column(word, justify="right")
        for row in result.rows:
            variant = row.name.rpartition(", ")[0]
            is_best = row.name == fastest(result, variant)
            removed = [str(of[variant]) if variant in of and is_best else "" for of in shares.values()]
            table.add_row(
                row.name, f"{row.seconds * 1e3:.1f}", f"{batch / row.seconds:.1f}", f"{row.ratio:.2f}", *removed
            )
        print_table(console, table)
        if json is not None:
            measure.write([result], json)
        if figure is not None:
            _draw({title: suite.times_as_long(result)}, "times as long as without depthwise layers", figure)


def _check(json: Path | None, figure: Path | None) -> None:
    """Refuse now, and not after the measurement, what cannot be written."""
    for option, path in (("--json", json), ("--figure", figure)):
        if path is not None:
            _outputs.file(path, option)
    if figure is not None:
        from mkf.analysis import figures

        figures.check(figure)


def _draw(panels: Mapping[str, Mapping[str, float]], label: str, path: Path) -> None:
    """Bars of ratios; panels by their titles, as `figures.bars` takes them."""
    from mkf.analysis import figures

    figures.save(figures.bars(panels, label), path)


def _quiet(results: Sequence[Any]) -> str:
    share = statistics.fmean(result.quiet for result in results)
    return f"the machine was quiet in {100 * share:.0f} % of the turns"


def _has(result: Any, name: str) -> bool:
    return any(row.name.rpartition(", ")[0] == name for row in result.rows)


def _shape(word: str) -> tuple[int, int, int]:
    parts = word.split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() and int(part) for part in parts):
        raise ValueError(f"--shape {word}: give batch, channels and height, such as 8,96,56")
    batch, channels, height = map(int, parts)
    return batch, channels, height
