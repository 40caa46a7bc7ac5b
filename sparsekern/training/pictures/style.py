"""How methods look: a colour and a marker each, so that no two are alike, printed grey included."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from sparsekern.errors import ConfigError, UnavailableError
from sparsekern.training.config import DENSE
from sparsekern.training.data import DEMO_EXTRA
from sparsekern.training.pictures.runs import Cell

INK, FAINT = "0.15", "0.55"
TITLE_LETTERS, BELOW_LETTERS = 9.5, 14.0
"""An inch has room for so many, in the two sizes."""
CONTROLS = ("-shuffled", "-fresh")


class Look(NamedTuple):
    """Of one method."""

    label: str
    color: str
    marker: str


LOOKS = {
    DENSE: Look("dense", "#000000", "_"),
    "static": Look("Static", "#7f7f7f", "o"),
    "set": Look("SET", "#1f6fd0", "s"),
    "rigl": Look("RigL", "#d62728", "^"),
    "rigl-sg": Look("RigL-SG", "#ff7aa8", "v"),
    "rigl-sm": Look("RigL-SM", "#7b0d3b", "<"),
    "snfs": Look("SNFS", "#2ca02c", "D"),
    "dsr": Look("DSR", "#00b5c8", "P"),
    "granet": Look("GraNet", "#7e3fc4", "X"),
    "srigl": Look("SRigL", "#ff7f0e", ">"),
    "deepr": Look("DeepR", "#8c564b", "p"),
    "top-kast": Look("Top-KAST", "#b5a900", "h"),
    "pruning": Look("gradual pruning", "#004d40", "*"),
    "snip": Look("SNIP", "#88b8f0", "d"),
    "grasp": Look("GraSP", "#c79bef", "8"),
    "synflow": Look("SynFlow", "#8fd17f", "H"),
    "random": Look("random", "#9a9a9a", "x"),
    "small-dense": Look("small dense", "#3a3a3a", "4"),
    "big-sparse": Look("big sparse", "#e0b070", "3"),
}

_OTHERS = ("#5b2a86", "#1b7f5c", "#a8321e", "#2d4a8a", "#8a6d00", "#9c2f7f")
_LINES = (
    "-",
    (0, (5, 2)),
    (0, (1, 1.5)),
    (0, (5, 2, 1, 2)),
    (0, (9, 3)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (1, 4)),
    (0, (9, 2, 2, 2)),
)
_SIZES = {"*": 13, "P": 9.5, "X": 9.5, "_": 6}
_STROKES = ("_", "x", "3", "4")


def check_available() -> None:
    """Raise `UnavailableError` unless matplotlib can be imported."""
    try:
        import matplotlib as mpl  # noqa: F401, PLC0415  an optional extra
    except ImportError as error:
        raise UnavailableError(f"a picture needs matplotlib: {DEMO_EXTRA}") from error


def look(method: str, unknown: Sequence[str] = ()) -> Look:
    """Of a method by its name; one that is not known here gets a colour by its place in `unknown`.

    A control of a ticket has the ticket's colour.
    """
    if method in LOOKS:
        return LOOKS[method]
    for ending in CONTROLS:
        ticket = LOOKS.get(method.removesuffix(ending)) if method.endswith(ending) else None
        if ticket is not None:
            return ticket._replace(label=f"{ticket.label}, {ending[1:]}")
    at = list(unknown).index(method) if method in unknown else 0
    return Look(method.rpartition(":")[2], _OTHERS[at % len(_OTHERS)], f"${'abcdefgh'[at % 8]}$")


class Series:
    """Lines of a picture: a colour and a marker for each method, a dash for what else differs.

    Args:
        cells: all that are drawn; what is the same in all is told once, by `shared`.
        along: the field that a line runs along.

    Raises:
        ConfigError: more settings differ than there are dashes.
    """

    def __init__(self, cells: Iterable[Cell], along: str = "") -> None:
        self.cells = list(cells)
        sparse = [cell for cell in self.cells if cell.method != DENSE]
        self.along = along
        self.unknown = sorted({cell.method for cell in sparse} - set(LOOKS))
        values = {field: sorted({getattr(cell, field) for cell in sparse}) for field in _NAMES}
        self.varied = [f for f, known in values.items() if f != along and len(known) > 1]
        self.kinds = sorted({self._kind(cell) for cell in sparse})
        if len(self.kinds) > len(_LINES):
            raise ConfigError(
                f"a picture tells at most {len(_LINES)} settings apart, by dashes; got "
                f"{len(self.kinds)}: choose by sparsity, block or multiplier"
            )
        plainest = {"block": [(1, 1)], "multiplier": [1.0]}
        told = ("sparsity", "block", "multiplier")
        self.shared = ", ".join(
            _told(field, values[field][0])
            for field in told
            if len(values[field]) == 1 and values[field] != plainest.get(field)
        )
        """What all sparse runs have in common, in words."""

    def _kind(self, cell: Cell) -> tuple[Any, ...]:
        return tuple(getattr(cell, field) for field in self.varied)

    def key(self, cell: Cell) -> tuple[Any, ...]:
        """Of the line that a cell is on."""
        return (cell.method, *(self._kind(cell) if cell.method != DENSE else ()))

    def look(self, cell: Cell) -> Look:
        """Of the cell's method."""
        return look(cell.method, self.unknown)

    def label(self, cell: Cell) -> str:
        """Method and what else differs."""
        kind = self._told_kind(self._kind(cell)) if cell.method != DENSE else ""
        return ", ".join(filter(None, (self.look(cell).label, kind)))

    def style(self, cell: Cell) -> dict[str, Any]:
        """Arguments of matplotlib's `plot`."""
        kind = self.kinds.index(self._kind(cell)) if cell.method != DENSE else 0
        return self._marker(cell) | {"linestyle": _LINES[kind], "linewidth": 1.4}

    def _marker(self, cell: Cell) -> dict[str, Any]:
        seen = self.look(cell)
        shuffled, fresh = (cell.method.endswith(ending) for ending in CONTROLS)
        edge = seen.color if shuffled or fresh or seen.marker in _STROKES else "white"
        return {
            "color": seen.color,
            "marker": seen.marker,
            "markersize": _SIZES.get(seen.marker, 8),
            "markeredgecolor": edge,
            "markeredgewidth": 1.4 if edge == seen.color else 0.6,
            "markerfacecolor": "white" if shuffled else seen.color,
            "markerfacecoloralt": "white",
            "fillstyle": "left" if fresh else "full",
        }

    def handles(self) -> list[Any]:
        """Of a legend: methods, then what dashes mean."""
        from matplotlib.lines import Line2D  # noqa: PLC0415

        firsts = {cell.method: cell for cell in reversed(self.cells)}
        order = dict.fromkeys(cell.method for cell in self.cells)
        made = [
            Line2D(
                [],
                [],
                linestyle="none",
                label=self.look(firsts[m]).label,
                **self._marker(firsts[m]),
            )
            for m in order
            if m != DENSE
        ]
        if DENSE in order and self.along != "sparsity":
            made.insert(0, Line2D([], [], color="black", label="dense"))
        if len(self.kinds) > 1:
            made.append(Line2D([], [], linestyle="none", label=""))
            made += [
                Line2D([], [], color=FAINT, linestyle=_LINES[i], label=self._told_kind(kind))
                for i, kind in enumerate(self.kinds)
            ]
        return made

    def _told_kind(self, kind: Sequence[Any]) -> str:
        return ", ".join(_told(f, value) for f, value in zip(self.varied, kind, strict=True))


_NAMES = {"sparsity": "sparsity ", "block": "block ", "multiplier": "", "lr": "lr "}


def _told(field: str, value: Any) -> str:
    if isinstance(value, tuple):
        text = str(value[0]) if value[0] == value[1] else f"{value[0]}x{value[1]}"
    else:
        text = f"{value:g}x length" if field == "multiplier" else f"{value:g}"
    return f"{_NAMES[field]}{text}"


def figure(width: float, height: float, title: str, below: str = "") -> Any:
    """A figure with a title, and a small line below; without pyplot, so without global state."""
    from matplotlib.figure import Figure  # noqa: PLC0415  an optional extra

    made = Figure(figsize=(width, height), dpi=130, layout="constrained")
    made.suptitle(textwrap.fill(title, int(TITLE_LETTERS * width)), fontsize=12, color=INK)
    if below:
        folded = textwrap.fill(below, int(BELOW_LETTERS * width))
        made.supxlabel(folded, fontsize=8, color="0.4")
    return made


def height_of(handles: Sequence[Any], least: float) -> float:
    """Inches of a figure beside its legend."""
    return max(least, 1.0 + 0.23 * len(handles))


def legend(made: Any, handles: Sequence[Any]) -> None:
    """To the right of all panels."""
    made.legend(
        handles=handles, loc="outside right center", frameon=False, fontsize=9, labelspacing=0.55
    )


def plain(axes: Any) -> None:
    """A quiet frame and a faint grid."""
    axes.grid(True, color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9, color=FAINT)


def log_scale(axes: Any, which: str, spread: float) -> None:
    """A logarithmic x or y with plain numbers at it, the more the smaller the ratio `spread` is."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: PLC0415

    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    subs = (1, 1.5, 2, 3, 4, 5, 6, 8) if spread < 4 else (1, 2, 3, 5) if spread < 30 else (1, 2, 5)
    axis.set_major_locator(LogLocator(base=10, subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())
