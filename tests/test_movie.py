"""The topology movie: frames are kept exactly, and shown one by one."""

import io
import itertools
import json

import numpy as np
import pytest
import torch
from result_files import frames_of, of, run
from torch import nn

import sparsekern as sk
from sparsekern.errors import ConfigError, DataError
from sparsekern.training.pictures import movie, style
from sparsekern.training.topology_frames import TopologyFrames, counts

pytest.importorskip("matplotlib")


def pages(gif):
    from PIL import Image

    image = Image.open(io.BytesIO(gif))
    shown = []
    for i in range(image.n_frames):
        image.seek(i)
        shown.append((np.asarray(image.convert("RGB")), image.info["duration"]))
    return shown


def test_a_movie_has_a_frame_for_each_update_and_one_before():
    frames = frames_of(updates=3)
    gif = movie.movie_of(of(run("static"), run("rigl", frames=frames.to_json())))
    shown = pages(gif)
    assert [duration for _, duration in shown] == [500, 500, 500, 2000]
    assert not any(np.array_equal(a[0], b[0]) for a, b in itertools.pairwise(shown))
    assert len(gif) < 2**20 / 10


def test_a_movie_shows_the_counts():
    frames = frames_of()
    scene = movie._Scene(style.figure(8, 4, ""), frames, of(run("rigl")).groups.popitem()[1][0], "")
    for number, frame in enumerate(frames.frames):
        scene.show(number)
        assert scene.image.get_array().tolist() == frame.leaving.view(5, 6).tolist()
        assert sum(bar.get_height() for bar in scene.bars) == 12
        assert scene.bars[0].get_height() == int((frame.fan_in == 0).sum())
        unused = int((frame.leaving == 0).sum())
        assert f"update {number:>3} of 3" in scene.text.get_text()
        assert f"{unused:>4} of 30 pixels unused" in scene.text.get_text()
    assert list(scene.course.lines[0].get_ydata()) == pytest.approx([75.0, 80.0])


def test_frames_are_kept_exactly():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 20, 8), nn.ReLU(), nn.Linear(8, 10))
    dense = TopologyFrames((4, 5), channels=3)
    assert dense.can_see(model)
    dense.see(model, 0)
    assert dense.frames[0].leaving.tolist() == [24] * 20
    assert dense.frames[0].fan_in.tolist() == [60] * 8
    sk.sparsify_(model, 0.8)
    dense.see(model, 7, accuracy=0.5)
    mask = model[1].mask()
    frame = dense.frames[1]
    assert torch.equal(frame.leaving, mask.view(8, 3, 20).sum((0, 1)))
    assert torch.equal(frame.fan_in, mask.sum(1))
    assert torch.equal(counts(model[1])[0], mask.sum(0))
    saved = json.loads(json.dumps(dense.to_json()))
    again = TopologyFrames.from_json(saved)
    assert (again.image_shape, again.channels) == ((4, 5), 3)
    for one, other in zip(dense.frames, again.frames, strict=True):
        assert (one.step, one.accuracy) == (other.step, other.accuracy)
        assert torch.equal(one.leaving, other.leaving)
        assert torch.equal(one.fan_in, other.fan_in)
    with pytest.raises(ConfigError, match=r"images of \(5, 5\) pixels; this model has another"):
        TopologyFrames((5, 5)).see(model, 0)


SPOILED = {
    "none": {},
    "shape": {"image_shape": [5]},
    "pixels": {"image_shape": [5, 7]},
    "frames": {"frames": 3},
    "counts": {"frames": [{"step": 0, "accuracy": None, "leaving": "!", "fan_in": "!"}]},
    "cut": {"frames": [{"step": 0, "accuracy": None, "leaving": "eJw=", "fan_in": "eJw="}]},
}


@pytest.mark.parametrize("what", SPOILED)
def test_spoiled_frames_are_refused(what):
    saved = frames_of(1).to_json() | SPOILED[what] if what != "none" else {}
    with pytest.raises(DataError, match="expected"):
        TopologyFrames.from_json(saved)


def test_a_movie_without_frames_is_refused():
    with pytest.raises(ConfigError, match="train with --frames"):
        movie.movie_of(of(run("rigl")))
    with pytest.raises(ConfigError, match="kept none"):
        movie.movie_of(of(run("rigl", frames=TopologyFrames((2, 2)).to_json())))
