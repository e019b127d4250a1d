"""`mkf report`: an analysis as one HTML page, and its figures for a paper."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mkf.cli import _outputs, _sources
from mkf.cli._console import stderr, stdout
from mkf.cli._errors import user_errors


def command(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar=_sources.METAVAR, help=f"{_sources.HELP} Without any, the embedded bank.", show_default=False
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE.html", help="The page to write.")] = Path("report.html"),
    keys: Annotated[str, typer.Option(metavar=_sources.KEYS, help=_sources.KEYS_HELP)] = "paper8",
    title: Annotated[str, typer.Option(help="The page's heading; the models' names if not given.")] = "",
    image: Annotated[
        Path | None,
        typer.Option(
            metavar="PICTURE",
            help="The natural image to compare with; without it scikit-image's cameraman if that is installed.",
        ),
    ] = None,
    pdf: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write the figures as PDF into this folder.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write the figures as PNG into this folder.")
    ] = None,
    pretrained: Annotated[bool, typer.Option(help="Fetch the trained weights of timm models.")] = True,
) -> None:
    """Write a page on the filters of trained networks: which keys they are, where, how well, and an atlas to browse.

    The page is a single file that loads nothing, for any browser. Sources are those of `mkf analyze`.
    """
    with user_errors():
        from mkf._files import replacing
        from mkf.analysis import analyze, identify, natural_keys, page, reconstruct, report
        from mkf.analysis.natural import default_image
        from mkf.keys import parse

        if out.is_dir() or out.suffix not in (".html", ".htm"):
            raise ValueError(f"--out {out}: the page is a file whose name ends in .html")
        _outputs.file(out, "--out")
        _outputs.not_an_input(out, "--out", *(sources or []), keys, *([image] if image else []))
        if image is not None and not image.is_file():
            raise FileNotFoundError(f"--image {image}: there is no such file")
        folders = {".pdf": pdf, ".png": png}
        for suffix, folder in folders.items():
            if folder is not None:
                _outputs.folder(folder, f"--{suffix[1:]}")
        key_set = parse(keys)
        k = key_set.kernel_size
        note = ""
        try:
            picture = default_image() if image is None else image
        except ImportError as error:
            picture, note = None, f"no natural image: {error}"
        natural = None
        if picture is not None:
            eigenvectors = natural_keys(picture, k)
            natural = eigenvectors, reconstruct(picture, eigenvectors.keys, max(3, k - 2))
        with _sources.bars(stderr()) as progress:
            bank = _sources.read(sources, pretrained, k, progress)
            layers = len(bank.select(k=k).layers())
            fitting = progress.add_task("fitting filters", total=None)
            analysis = analyze(
                bank,
                key_set,
                atlas=page.atlas_size(layers, len(key_set), k),
                progress=lambda done, total: progress.update(fitting, completed=done, total=total),
            )
            naming = progress.add_task("naming filters", total=None)
            found = identify(
                bank.select(k=k, model=[model.model for model in analysis.trained.models]),
                progress=lambda done, total: progress.update(naming, completed=done, total=total),
            )
        text = page.render(analysis, found, natural, title, bank)
        content = text.encode()
        with replacing(out) as file:
            file.write(content)
        console = stdout()
        console.print(f"Written to {out}: {len(content) / 1e6:.1f} MB", soft_wrap=True)
        for suffix, folder in folders.items():
            if folder is not None:
                written = report.write_figures(analysis, folder, suffix)
                console.print(f"Written to {folder}: " + ", ".join(path.name for path in written), soft_wrap=True)
        if note:
            typer.secho(f"note: {note}", fg=typer.colors.YELLOW, err=True)
