"""The topology movie: connections leave the empty edge of the images, update by update.

A GIF of one run: how many connections leave each input pixel, how many reach each neuron of the
first layer, and how good the network is by then.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sparsekern.errors import ConfigError
from sparsekern.training.pictures.runs import Run, Runs, best_rates
from sparsekern.training.pictures.style import FAINT, INK, Series, figure, plain
from sparsekern.training.topology_frames import Frame, TopologyFrames

SECONDS = 9.0
"""Of a movie, about; frames are never longer than `SLOWEST` of it."""

SLOWEST, LAST = 500, 2000  # milliseconds
MAP = "magma"
"""Colours of the pixels. All frames share one palette: what does not change takes no bytes then."""

_BINS = 24
DEAD, LIVE = "#c0392b", "#2c5f8a"


def movie_of(runs: Runs) -> bytes:
    """The GIF of the first run that kept its frames, of RigL if there is one.

    Raises:
        ConfigError: no run kept its frames.
        DataError: the frames are damaged.
    """
    runs = best_rates(runs)
    found = [(c, r) for c, group in runs.groups.items() for r in group if r.frames is not None]
    if not found:
        raise ConfigError(
            "a movie needs the frames of a fully connected first layer: train with --frames"
        )
    cell, run = next((f for f in found if f[0].method == "rigl"), found[0])
    frames = TopologyFrames.from_json(run.frames or {})
    if not frames.frames:
        raise ConfigError("a movie needs frames; this run kept none")
    name = Series(runs.groups).label(cell)
    title = f"{name}: where the connections of the first layer come from ({runs.title})"
    return as_gif(pictures_of(frames, run, title))


def pictures_of(frames: TopologyFrames, run: Run, title: str) -> list[Any]:
    """One RGB picture of PIL for each frame."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from PIL import Image  # noqa: PLC0415  it comes with matplotlib

    made = figure(8.6, 3.9, "")
    made.set_dpi(80)
    canvas = FigureCanvasAgg(made)
    drawn = []
    scene = _Scene(made, frames, run, title)
    for number in range(len(frames.frames)):
        scene.show(number)
        canvas.draw()
        drawn.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()))
    return drawn


class _Scene:
    """The panels, whose artists are changed from frame to frame."""

    def __init__(self, made: Any, frames: TopologyFrames, run: Run, title: str) -> None:
        made.suptitle(title, fontsize=10.5, color=INK)
        self.frames, self.run = frames, run
        # no layout engine: with one, axes would move from frame to frame as texts change
        made.set_layout_engine("none")
        self.pixels = made.add_axes((0.01, 0.13, 0.38, 0.77))
        bar = made.add_axes((0.395, 0.13, 0.015, 0.77))
        self.neurons = made.add_axes((0.56, 0.59, 0.42, 0.31))
        self.course = made.add_axes((0.56, 0.2, 0.42, 0.2))
        self.text = made.text(0.12, 0.035, "", fontsize=9, family="monospace")
        self._draw_pixels(made, bar)
        self._draw_neurons()
        self._draw_course()

    def _draw_pixels(self, made: Any, bar: Any) -> None:
        every = np.stack([frame.leaving.numpy() for frame in self.frames.frames])
        top = max(1.0, float(np.quantile(every, 0.998)))
        empty = np.zeros(self.frames.image_shape)
        self.image = self.pixels.imshow(empty, cmap=MAP, vmin=0, vmax=top)
        self.pixels.set_xticks([])
        self.pixels.set_yticks([])
        made.colorbar(self.image, cax=bar, label="connections that leave a pixel")

    def _draw_neurons(self) -> None:
        """Neurons by fan-in: those without connections, then intervals of equal ratio."""
        most = max(int(frame.fan_in.max()) for frame in self.frames.frames)
        inner = np.geomspace(1, max(2, most + 1), _BINS)
        self.edges = np.unique(np.concatenate([[0], np.ceil(inner)]))
        counts = [self._counts(frame) for frame in self.frames.frames]
        places = np.arange(len(self.edges) - 1)
        colors = [DEAD, *[LIVE] * (len(places) - 1)]
        self.bars = self.neurons.bar(places, counts[0], color=colors, width=0.9)
        labels = [f"{int(edge)}" for edge in self.edges[:-1]]
        kept = places[:: max(1, math.ceil(len(places) / 10))]
        self.neurons.set_xticks(kept, [labels[i] for i in kept])
        top = max(1, *(int(c.max()) for c in counts))
        self.neurons.set_yscale("symlog", linthresh=2)  # few neurons with many connections show
        self.neurons.set_ylim(0, 1.2 * top)
        ticks = [tick for tick in (0, 1, 3, 10, 30, 100, 300, 1000, 3000) if tick <= 1.2 * top]
        self.neurons.set_yticks(ticks, [str(tick) for tick in ticks])
        self.neurons.minorticks_off()
        self.neurons.set_xlabel("connections that reach a neuron (red: none)", fontsize=8.5)
        self.neurons.set_ylabel("neurons", fontsize=8.5)
        plain(self.neurons)
        self.neurons.tick_params(labelsize=8)

    def _counts(self, frame: Frame) -> Any:
        return np.histogram(frame.fan_in.numpy(), self.edges)[0]

    def _draw_course(self) -> None:
        steps, values, self.name = course(self.frames.frames, self.run)
        self.course.plot(steps, values, color=LIVE, linewidth=1.2, alpha=0.35)
        (self.past,) = self.course.plot([], [], color=LIVE, linewidth=2)
        self.steps, self.values = np.array(steps), np.array(values)
        self.course.set_xlabel("weight steps", fontsize=8.5)
        self.course.set_ylabel(self.name, fontsize=8.5)
        self.now = self.course.axvline(0, color=FAINT, linewidth=1)
        plain(self.course)
        self.course.tick_params(labelsize=8)

    def show(self, number: int) -> None:
        """Change what differs in a frame."""
        frame = self.frames.frames[number]
        self.image.set_data(frame.leaving.view(self.frames.image_shape).numpy())
        for bar, height in zip(self.bars, self._counts(frame), strict=True):
            bar.set_height(height)
        past = self.steps <= frame.step
        self.past.set_data(self.steps[past], self.values[past])
        self.now.set_xdata([frame.step, frame.step])
        self.text.set_text(self._told(number, self.values[past]))

    def _told(self, number: int, values: Any) -> str:
        frame = self.frames.frames[number]
        unused = int((frame.leaving == 0).sum())
        what, _, unit = self.name.partition(", ")
        now = f"{values[-1]:.2f} {unit}" if len(values) else "-"
        return (
            f"update {number:>3} of {len(self.frames.frames) - 1}   step {frame.step:>6,}   "
            f"{what} {now:>6}   {unused:>4} of {frame.leaving.numel()} pixels unused"
        )


def course(frames: Sequence[Frame], run: Run) -> tuple[list[int], list[float], str]:
    """Steps, values and name of what is followed: accuracy where it is known, else the loss."""
    seen = [(f.step, 100 * f.accuracy) for f in frames if f.accuracy is not None]
    curve = [(p.step, 100 * p.accuracy) for p in run.curve if p.accuracy is not None]
    known, name = (seen or curve), "accuracy, %"
    if not known:
        known, name = [(p.step, p.loss) for p in run.curve], "training loss, nats"
    return [step for step, _ in known], [value for _, value in known], name


def as_gif(pictures: Sequence[Any]) -> bytes:
    """A GIF that repeats; its last frame stays longer."""
    palette = _palette()
    flat = [picture.quantize(palette=palette, dither=0) for picture in pictures]
    each = int(min(SLOWEST, 1000 * SECONDS / len(flat)))
    durations = [each] * (len(flat) - 1) + [LAST]
    made = io.BytesIO()
    flat[0].save(
        made,
        format="GIF",
        save_all=True,
        append_images=flat[1:],
        duration=durations,
        loop=0,
        optimize=True,  # what did not change is transparent
    )
    return made.getvalue()


def _palette() -> Any:
    """The colours that occur: the map of the pixels, and inks on white with their soft edges."""
    import matplotlib as mpl  # noqa: PLC0415
    from matplotlib.colors import to_rgb  # noqa: PLC0415
    from PIL import Image  # noqa: PLC0415

    shades = [np.asarray(mpl.colormaps[MAP](np.linspace(0, 1, 128)))[:, :3]]
    for ink, count in (("black", 32), (LIVE, 24), (DEAD, 12)):
        shares = np.linspace(0, 1, count)[:, None]
        shades.append(1 - shares * (1 - np.array(to_rgb(ink))))
    colors = np.unique(np.rint(255 * np.concatenate(shades)).astype(np.uint8), axis=0)
    made = Image.new("P", (1, 1))
    made.putpalette(colors.tobytes())
    return made
