"""An empty figure for a file or for a page, and a drawn one as a file. Nothing else imports matplotlib.

A figure needs no display and none of the user's settings: the same values give the same bytes.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from warnings import catch_warnings, filterwarnings

from recap_cli.errors import StorageError, UsageError
from recap_cli.memory.plot_style import INK, SOFT

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

SUFFIXES: dict[str, dict[str, None]] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}  # without dates
STYLE = {
    "figure.dpi": 100,
    "savefig.dpi": 300,
    "text.parse_math": False,  # a name may hold a dollar sign
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "hatch.linewidth": 0.8,
    "svg.fonttype": "none",
    "svg.hashsalt": "recap",
    "pdf.fonttype": 42,
}


class Medium(NamedTuple):
    """What a figure is drawn for."""

    width: float  # inches
    font_size: float  # points
    page: bool  # True: the page says the title in its own text, and is read on a phone

    def text(self, name: str) -> str:
        """The text in one line, with question marks for what a file's font may lack, or what no page can have."""
        known = name if self.page else name.encode("latin-1", "replace").decode("latin-1")
        return " ".join(
            "".join(letter if letter.isprintable() else " " if letter.isspace() else "?" for letter in known).split()
        )


FILE = Medium(7.0, 10.0, page=False)  # a paper's two columns
PAGE = Medium(5.0, 11.0, page=True)  # 360 points: a phone's width, so that letters keep their size there


@dataclass(frozen=True)
class Picture:
    """A figure, with what its marks say where a page shows them and a reader points at them."""

    figure: "Figure"
    medium: Medium
    words: dict[str, list[str]] = field(default_factory=dict)  # by the group of marks: one for each mark, or one for all

    def describe(self, artist: "Artist", words: Sequence[str]) -> None:
        """Give the marks of a line or a patch their words: one for each mark in order, or one for all."""
        if self.medium.page:
            name = f"marks{len(self.words)}"
            artist.set_gid(name)
            self.words[name] = list(words)


@contextmanager
def picture(medium: Medium, height: float) -> Iterator[Picture]:
    """Lend an empty figure, `height` inches high, to draw on under settings of our own."""
    with _settings(medium) as new_figure:
        yield Picture(new_figure(figsize=(medium.width, height), layout="constrained"), medium)


def save(drawn: Picture, path: Path) -> None:
    """Write a figure to a file of its ending.

    Raises:
        UsageError: the path ends in none of `SUFFIXES`.
        StorageError: the file cannot be written.
    """
    check_path(path)
    suffix = path.suffix.lower()
    content = encoded(drawn, suffix[1:], bbox_inches="tight", pad_inches=0.05, metadata=SUFFIXES[suffix])
    try:
        path.write_bytes(content)
    except OSError as error:  # a full disk, a folder of that name: the message names the file
        raise _unwritable(path, error.strerror or str(error)) from error


def encoded(drawn: Picture, kind: str, **settings: Any) -> bytes:
    """The bytes of a figure in a format of matplotlib's."""
    content = BytesIO()
    with _settings(drawn.medium), catch_warnings():  # what is made as late as ticks reads the settings too
        filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)  # a browser has its own letters
        drawn.figure.savefig(content, format=kind, **settings)
    return content.getvalue()


def check_path(path: Path) -> None:
    """Raise `UsageError` for an ending that is none of `SUFFIXES`, `StorageError` for a folder that cannot be written."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"{path}: a picture's name ends in {', '.join(SUFFIXES)}", hint=f"name it {path.stem or 'memory'}.svg, say"
        )
    if not path.parent.is_dir():
        raise StorageError(f"{path} cannot be written: there is no folder {path.parent}", hint="make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise _unwritable(path, f"nothing may be written to {path.parent}")


@contextmanager
def _settings(medium: Medium) -> Iterator[type["Figure"]]:
    """Put the settings of this medium in the place of the user's, and lend the class of figures."""
    os.environ["MPLBACKEND"] = "agg"  # whatever the user has: a name that matplotlib does not know would be an error
    from matplotlib import style
    from matplotlib.figure import Figure

    tick_colour = SOFT if medium.page else INK
    given = {"font.size": medium.font_size, "xtick.color": tick_colour, "ytick.color": tick_colour}
    with style.context(["default", STYLE | given]):  # whatever the user's matplotlibrc says
        yield Figure


def _unwritable(path: Path, why: str) -> StorageError:
    return StorageError(f"{path} cannot be written: {why}", hint="make room, or name a file in a folder you may write to")
