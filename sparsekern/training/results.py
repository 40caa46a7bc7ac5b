"""The result file of `sparsekern train`: one JSON object, written anew after every run.

    {"format": 2,
     "flops": FLOP_CONVENTION,
     "environment": {...},              sparsekern.show.environment
     "data": {"name": "fashion-mnist", "sample": "image", "classes": 10,
              "train": 54000, "validation": 6000, "test": 10000,
              "image_shape": [28, 28] or null, "unigram_entropy": null or bits per character,
              "most_common": 0.1,       share of the test set's most common class: chance
              "test_digest": "9f86d081"},
     "task": {...},                     what all runs share: the fields of `TrainConfig` but those
                                        that a run has of its own; "model", "epochs", ...
     "dense": {"inference": f_D, "training": 3 f_D samples x steps},   FLOPs of dense training, 1x
     "runs": [RUN, ...]}                in the order they were asked for

A RUN that is done:

    {"method": "rigl",                  as asked for: a recipe's name, or MODULE:CLASS
     "sparsity": 0.98,                  0.0 for dense
     "block": [1, 1],                   (outputs, inputs)
     "multiplier": 1.0,                 of the training's length
     "lr": 0.1,
     "seed": 0,
     "state": "done", "error": null,
     "learned": true,                   false: accuracy near chance, or the loss did not fall
     "validation": {"accuracy": 0.88, "bits": null} or null without a validation split,
     "test": {"accuracy": 0.87, "bits": null},      after the last step; bits per character of text
     "start_loss": 2.31,                nats, of the first batch before any step
     "curve": [{"step": 540,            weight steps so far; one entry for each epoch of the task
                "seconds": 1.9,         of training so far
                "training_flops": 1.2e12,           so far
                "loss": 0.61,           mean training loss since the entry before, nats
                "validation": {"accuracy": 0.84, "bits": null} or null,
                "nnz": 6304},           active weights of all the layers in "layers"
               ...],
     "flops": {"inference": 13000,      per sample, executed
               "dense_equivalent": 532400,          the same net if every layer were dense
               "training": 2.4e12,      of the run, by the active weights of each step
               "inference_ratio": 0.0244, "training_ratio": 0.031},   to "dense" above
     "dense_at": "updates",             when dense gradients were computed: "never", "updates" or
                                        "steps"; older files lack it
     "held": {"weights": B, "gradients": B, "optimizer": B, "index": B,     bytes after the run
              "method": B},             what a method keeps besides; older files lack it
     "weight_steps": 5400, "update_batches": 41,
     "seconds": 21.0,                   of training: no evaluation, no counting
     "step_seconds": 0.0039,            the same for each batch, updates included
     "update_seconds": 0.006 or null,   median of a batch with a topology update
     "updates": [{"step": 0, "fraction": 0.5,       the method's history, `UpdateRecord`
                  "layers": {"hidden1": {"dropped": 2352, "grown": 2352,
                                         "facts": {"outputs": 300, "live_outputs": 262, ...}}}},
                 ...],
     "layers": [{"name": "hidden1", "shape": [300, 784], "nnz": 4700, "impl": "cpu"}, ...],
     "connections": {"start": [...], "end": [...]} or null,   leaving each input pixel of a fully
                                        connected first layer, row by row
     "unsaved": "OSError: ...",         only where --save could not write its weights
     "frames": null or {...}}           for the movie: what topology_frames gives as plain data

A RUN that failed has the first six fields, "state": "failed" and "error": what was raised, in one
line. A run that was interrupted is not there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sparsekern.cost.run_flops import FLOP_CONVENTION, forward_flops
from sparsekern.errors import ConfigError, DataError
from sparsekern.show.environment import environment
from sparsekern.show.output_files import explained, write_whole
from sparsekern.training import wellformed
from sparsekern.training.config import TrainConfig
from sparsekern.training.data import Dataset, Images, Text, for_model
from sparsekern.training.grid import AXES, Spec
from sparsekern.training.network import dense_network, shaped
from sparsekern.training.score import most_common, split_off
from sparsekern.training.trainer import total_steps

FORMAT = 2
DONE, FAILED = "done", "failed"


def heading(config: TrainConfig, data: Dataset, threads: int) -> dict[str, Any]:
    """All of a result file but its runs.

    Args:
        config: that the runs share; its axes are left out.
        data: whole, on the CPU.
        threads: of each run.
    """
    plain = {k: v for k, v in asdict(config).items() if k not in (*AXES, "methods", "seeds")}
    return {
        "format": FORMAT,
        "flops": FLOP_CONVENTION,
        "environment": environment(torch.device(config.device)),
        "data": _data_facts(config, data),
        # through JSON, where tuples are lists, so that it compares with what was read
        "task": json.loads(json.dumps(plain | {"threads": threads})),
        "dense": _dense_flops(config, data),
    }


def _data_facts(config: TrainConfig, data: Dataset) -> dict[str, Any]:
    left, held_out = split_off(data, config.validation)
    digest = hashlib.sha256()
    for part in (data.test_x, data.test_y):
        digest.update(part.contiguous().numpy().tobytes())
    return {
        "name": data.name,
        "sample": data.sample,
        "classes": data.classes,
        "train": len(left.train_y),
        "validation": 0 if held_out is None else len(held_out.y),
        "test": len(data.test_y),
        "image_shape": list(data.image_shape) if isinstance(data, Images) else None,
        "unigram_entropy": data.unigram_entropy if isinstance(data, Text) else None,
        "most_common": most_common(data),
        "test_digest": digest.hexdigest()[:16],
    }


def _dense_flops(config: TrainConfig, data: Dataset) -> dict[str, int]:
    """Of the dense network at its plain length: what all others are compared with."""
    steps = total_steps(config, data)
    data = shaped(config, data)
    model = dense_network(config, data, seed=0)
    inference = forward_flops(model, for_model(data.test_x[:1])).executed
    return {"inference": inference, "training": 3 * inference * config.batch_size * steps}


class ResultFile:
    """The runs of a comparison, written to a file after each.

    Args:
        path: of the file; None keeps them in memory.
        head: see `heading`.
        specs: all that are asked for, in order.
        resume: whether to take over what the file holds; if not, what it held is kept beside it,
            under its name with a "~".

    Raises:
        ConfigError: `resume` without a file, or its runs were made in another way.
        DataError: the file is no result file.
    """

    def __init__(
        self, path: Path | None, head: Mapping[str, Any], specs: list[Spec], *, resume: bool
    ) -> None:
        self.path, self.specs = path, specs
        self.head = dict(head)
        self._runs: dict[Spec, dict[str, Any]] = {}
        self._keep = path is not None and path.is_file() and not resume
        if not resume:
            return
        if path is None:
            raise ConfigError("`resume` needs the file that it goes on from: give `json` too")
        if path.is_file():
            content = read(path)
            _check_same(path, content, head)
            self._runs = {Spec.of_json(run): run for run in content["runs"]}

    @property
    def missing(self) -> list[Spec]:
        """What is not done yet: what failed is tried again."""
        return [spec for spec in self.specs if self._state(spec) != DONE]

    def add(self, spec: Spec, run: Mapping[str, Any]) -> None:
        """Keep a run, and write the file."""
        self._runs[spec] = dict(run)
        self.write()

    def write(self) -> None:
        """Write the file, whole: what was there before is there until then."""
        if self.path is not None:
            with explained("json", self.path):
                if self._keep:
                    kept = self.path.with_name(self.path.name + "~")
                    write_whole(kept, self.path.read_bytes())
                    self._keep = False
                write_whole(self.path, json.dumps(self.content(), allow_nan=False) + "\n")

    def content(self) -> dict[str, Any]:
        """As in the file; runs that are not asked for, from before, come last."""
        order = dict.fromkeys((*self.specs, *self._runs))
        return {**self.head, "runs": [self._runs[spec] for spec in order if spec in self._runs]}

    def asked(self) -> dict[str, Any]:
        """The same without runs that are not asked for."""
        runs = [self._runs[spec] for spec in self.specs if spec in self._runs]
        return {**self.head, "runs": runs}

    def _state(self, spec: Spec) -> str | None:
        state: str | None = self._runs.get(spec, {}).get("state")
        return state


def read(path: Path) -> dict[str, Any]:
    """A result file, with all that tables are made of.

    Raises:
        DataError: as `content_of`; or something is missing; the text names it.
    """
    content = content_of(path)
    try:
        wellformed.check(content)
    except DataError as error:
        raise DataError(f"{path}: expected a result file of sparsekern train: {error}") from error
    return content


def content_of(path: Path) -> dict[str, Any]:
    """What a result file says, for a reader that looks at it with care.

    Raises:
        DataError: it can't be read, is none, or is of another format; the text names it.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected a result file of sparsekern train: {error}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        older = f"format {found}, of an older release" if found == 1 else f"format {found!r:.20}"
        raise DataError(
            f"{path}: expected a result file of sparsekern train in format {FORMAT}; got {older}"
        )
    whole: dict[str, Any] = content
    return whole


def entry(spec: Spec, facts: Mapping[str, Any]) -> dict[str, Any]:
    """A run that is done."""
    return {**spec.to_json(), "state": DONE, "error": None, **facts}


def failure(spec: Spec, error: str) -> dict[str, Any]:
    """A run that raised, or whose process died."""
    return {**spec.to_json(), "state": FAILED, "error": error}


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterable[str]:
    """Names of what differs between two mappings."""
    return (name for name in sorted({*a, *b}) if a.get(name) != b.get(name))


def _check_same(path: Path, content: Mapping[str, Any], head: Mapping[str, Any]) -> None:
    for part in ("data", "task"):
        for name in differing(content[part], head[part]):
            raise ConfigError(
                f"`resume`: {path} was made with {name} {content[part].get(name)!r}; "
                f"got {head[part].get(name)!r}"
            )
