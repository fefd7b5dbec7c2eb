"""`recap report`: a page of a state, or of one or several comparisons, for a browser."""

from pathlib import Path
from typing import Annotated

import typer

from recap_cli import console, extras

SOURCE_HELP = (
    "A state's folder, or the results.json of [bold]recap compare[/bold] (or its folder); several of these make one page."
)
SOURCE = typer.Argument(metavar="STATE|RESULTS...", help=SOURCE_HELP, show_default=False)
OUT_HELP = (
    "The page; replaces an older page of recap's; required for several comparisons. "
    "[default: report.html in the folder of what is reported]"
)
OUT = typer.Option("--out", metavar="FILE", help=OUT_HELP, show_default=False)


def report(sources: Annotated[list[Path], SOURCE], out: Annotated[Path | None, OUT] = None) -> None:
    """Write one HTML page on a state or a comparison: results, pictures, memory, time, settings.

    Of several comparisons the page has a table over all of them, and a section for each.
    Of segmentation it has pictures: the full and the small model predict up to 64 validation examples for them.
    The page needs no network. Its path is printed on standard output.

    Example: [bold]recap report runs/cola[/bold]
    """
    extras.require("report")
    from recap_cli.report import report as stage

    one = len(sources) == 1
    page = stage.report(sources[0], out, console.say, console.track) if one else stage.report_joined(sources, out)
    console.result(str(page))
