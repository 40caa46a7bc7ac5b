"""All pictures of a result file, by name, into a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparsekern.errors import ConfigError
from sparsekern.show.output_files import explained, write_figure, write_whole
from sparsekern.training.pictures.cost import draw_cost, draw_length
from sparsekern.training.pictures.curves import draw_curves
from sparsekern.training.pictures.layers import draw_layers
from sparsekern.training.pictures.movie import movie_of
from sparsekern.training.pictures.runs import Runs
from sparsekern.training.pictures.style import check_available

FIGURES: dict[str, Callable[[Runs], Any]] = {
    "cost": draw_cost,
    "length": draw_length,
    "curves": draw_curves,
    "layers": draw_layers,
}
MOVIE = "movie"
PICTURES = (*FIGURES, MOVIE)
"""Names of pictures, and of their files: cost.png, movie.gif."""


class Drawn(NamedTuple):
    """What was made of a result file.

    Attributes:
        files: that were written.
        missing: why a picture can't be made of it, by name.
    """

    files: list[Path]
    missing: dict[str, str]


def draw(runs: Runs, folder: Path, names: Sequence[str] = ()) -> Drawn:
    """Draw pictures; all that the runs allow if none is named.

    Args:
        runs: what to draw.
        folder: where; it is made if its parent exists.
        names: of `PICTURES`.

    Raises:
        ConfigError: a name is unknown, a named picture needs what the runs don't hold, or the
            folder can't be written to.
        DataError: the frames of a run are damaged.
        UnavailableError: matplotlib is not installed.
    """
    check_available()
    for name in names:
        if name not in PICTURES:
            raise ConfigError(f"`only` must be of {PICTURES}; got {name!r}")
    made: dict[str, Any] = {}
    drawn = Drawn([], {})
    for name in names or PICTURES:  # all of them before the first file is written
        try:
            made[name] = movie_of(runs) if name == MOVIE else FIGURES[name](runs)
        except ConfigError as error:
            if names:
                raise
            drawn.missing[name] = str(error)
    with explained("out", folder):
        folder.mkdir(exist_ok=True)
    for name, content in made.items():
        path = folder / (f"{name}.gif" if name == MOVIE else f"{name}.png")
        with explained("out", path):
            if name == MOVIE:
                write_whole(path, content)
            else:
                write_figure(content, path)
        drawn.files.append(path)
    return drawn
