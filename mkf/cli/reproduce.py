"""`mkf reproduce`: the tables and figures of papers and documentation, made anew."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from mkf.cli import _outputs, _sources
from mkf.cli._console import stderr, stdout
from mkf.cli._errors import user_errors

app = typer.Typer(help="Make tables and figures of papers and documentation anew.", no_args_is_help=True)

Sources = Annotated[
    list[str],
    typer.Argument(metavar=f"{_sources.METAVAR}...", help=_sources.HELP),
]
Out = Annotated[
    Path, typer.Option(metavar="DIR", help="Folder for what is found, and what a killed search goes on from.")
]
Size = Annotated[int | None, typer.Option(help="Kernel size, if the sources hold several.")]
Keys = Annotated[int, typer.Option(help="How many keys.")]
Seed = Annotated[int, typer.Option(min=0, help="Of all random draws.")]
Steps = Annotated[int, typer.Option(min=1, help="Training steps of the autoencoder at most.")]
Pretrained = Annotated[bool, typer.Option(help="Fetch the trained weights of timm models.")]


@app.command("matched-keys")
def matched_keys(
    sources: Sources,
    out: Out,
    keys: Keys = 8,
    size: Size = None,
    seed: Seed = 0,
    steps: Steps = 3000,
    pretrained: Pretrained = True,
) -> None:
    """A bank's keys by clusters and by autoencoder, and known keys, matched one to one; the code axis."""
    with user_errors():
        from mkf.experiments.matched_keys import match_keys

        _outputs.folder(out, "--out")
        with _bar("searching") as progress:
            bank = _sources.trained(sources, size, pretrained)
            found = match_keys(bank, keys, seed, steps=steps, state=out / "state", progress=progress)
        console = stdout()
        for line in found.lines():
            console.print(line, soft_wrap=True)
        console.print("Written to " + ", ".join(str(path) for path in found.draw(out)), soft_wrap=True)


@app.command("search-by-accuracy")
def search_by_accuracy(
    sources: Sources,
    model: Annotated[Path, typer.Option(help="Folder of a finished run of mkf train.")],
    data: Annotated[
        Path, typer.Option(help="Its data folder: searched on the training split, tested on the test split.")
    ],
    out: Out,
    keys: Keys = 8,
    per_class: Annotated[int, typer.Option(min=1, help="Training images of each class that judge the keys.")] = 100,
    size: Size = None,
    seed: Seed = 0,
    steps: Steps = 3000,
    device: Annotated[str, typer.Option(help="Where autoencoder and --model run: auto, cpu, cuda, ...")] = "auto",
    pretrained: Pretrained = True,
) -> None:
    """Figure 3 and a column of Table 1 of arXiv 2509.11711 for a network of one's own: greedy search by accuracy."""
    with user_errors():
        from mkf.experiments.search_by_accuracy import search_by_accuracy as run

        _outputs.folder(out, "--out")
        with _bar("eliminating") as progress:
            bank = _sources.trained(sources, size, pretrained)
            found = run(
                bank,
                model,
                data,
                keys,
                per_class=per_class,
                steps=steps,
                seed=seed,
                state=out / "state",
                device=device,
                progress=progress,
            )
        found.second.keys.save(out / "keys.safetensors")
        console = stdout()
        console.print(found.markdown(), soft_wrap=True)
        console.print(
            f"Top-1 of {found.images:,} test images, which no search has seen. Elbow of the error on training images: "
            f"{found.first.elbow} keys in the first round, {found.second.elbow} in the second.",
            soft_wrap=True,
        )
        console.print(f"Written to {found.draw(out)}, {out / 'keys.safetensors'}", soft_wrap=True)


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:

    with _sources.bars(stderr()) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
