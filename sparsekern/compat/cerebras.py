"""The dictionary (or YAML) by which Cerebras' `cerebras.pytorch.sparse` describes a training."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sparsekern.errors import ConfigError, DtypeError
from sparsekern.methods import SET, Method, RigL, Static
from sparsekern.methods.schedule import UpdateSchedule
from sparsekern.swap import all_targets, sparsify_
from sparsekern.topology.blocks import Block

METHODS: Mapping[str, type[Method]] = {"static": Static, "set": SET, "rigl": RigL}
INITS: Mapping[str, str | None] = {"random": None, "topk": "keep"}
KEYS = ("algorithm", "sparsity", "init_method", "param_filter", "drop_fraction", "update")
DROP_FRACTION = 0.3


def configure_(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: float | Mapping[str, Any],
    *,
    block: Block = 1,
    generator: torch.Generator | None = None,
) -> Method:
    """Make a dense model sparse and attach a method, as a Cerebras configuration says.

        configure_(model, optimizer, {
            "algorithm": "rigl", "sparsity": 0.75, "param_filter": ["*proj*.weight"],
            "drop_fraction": {"type": "cosine", "init": 0.3, "half_period": 3584},
            "update": {"freq": 100, "stop": 3584},
        })

    Each layer gets the same sparsity; weights keep the values they have. As there, an update comes
    after the weight step of its batch.

    Args:
        model: dense; it is changed in place.
        optimizer: that holds its weights; it goes on with the sparse ones.
        config: a sparsity (static), or a dictionary: `algorithm` "static", "set" or "rigl";
            `sparsity`, a number; `init_method` "random" or "topk"; `param_filter`, a glob or
            several, of parameter names, else the layers that `sparsify_` takes; `drop_fraction`, a
            number, or a "cosine" that ends at 0 where the updates stop; `update` with `freq`,
            `stop` and, if it is not 0, `start`, in weight steps.
        block: of the sparse weights; Cerebras has 1.
        generator: of the random connections.

    Returns:
        The method that is attached.

    Raises:
        ConfigError, DtypeError: a key or value has no counterpart here; nothing has changed then.
    """
    said = {"sparsity": config} if isinstance(config, int | float) else config
    if not isinstance(said, Mapping):
        raise DtypeError(f"`config` must be a sparsity or a dictionary; got {type(said).__name__}")
    unknown = sorted(set(map(str, said)) - set(KEYS))
    if unknown:
        raise ConfigError(f"`config` has {unknown}, which have no counterpart; known are {KEYS}")
    kind: type[Method] = _one_of("algorithm", said.get("algorithm", "static"), METHODS)
    options = {"t_end": 1} if kind is Static else _options(said)
    sparsity = said.get("sparsity")
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 < sparsity < 1:
        raise ConfigError(
            f"`sparsity` must be a number in (0, 1); got {sparsity!r}: for one that grows see "
            "sparsekern.Pruning"
        )
    globs = _globs(model, said.get("param_filter"))

    def taken(_module: nn.Module, name: str) -> bool:
        return any(fnmatch.fnmatchcase(f"{name}.weight", pattern) for pattern in globs)

    def same(_name: str, _module: nn.Module) -> float:
        return float(sparsity)

    sparsify_(
        model,
        float(sparsity),
        distribution=same,
        filter_fn=taken if globs else None,
        init=_one_of("init_method", said.get("init_method", "random"), INITS),
        optimizer=optimizer,
        block=block,
        generator=generator,
    )
    return kind(model, optimizer, step_on_update=True, **options)


def _options(said: Mapping[str, Any]) -> dict[str, Any]:
    """Of a method with updates."""
    update = said.get("update")
    if not isinstance(update, Mapping) or not {"freq", "stop"} <= set(update) <= {
        *("freq", "stop", "start"),
    }:
        raise ConfigError(
            f"`update` must have `freq` and `stop`, and may have `start`, in weight steps; got "
            f"{update!r}"
        )
    stop = update["stop"]
    fraction = said.get("drop_fraction", DROP_FRACTION)
    decay = "constant"
    if isinstance(fraction, Mapping):
        decay, fraction = _decay(fraction, stop)
    freq, start = update["freq"], update.get("start") or 0
    UpdateSchedule(stop, freq, fraction, start, decay)  # checks them before anything changes
    return {
        "t_end": stop,
        "update_freq": freq,
        "first_update": start,
        "drop_fraction": fraction,
        "decay": decay,
    }


def _decay(said: Mapping[str, Any], stop: object) -> tuple[str, Any]:
    """The name of a decay here, and the share that it starts with."""
    name = str(said.get("type", "")).lower()
    if name == "constant" and set(said) == {"type", "value"}:
        return "constant", said["value"]
    ends = said.get("minimum", 0) == 0 and said.get("half_period") == stop
    if name == "cosine" and ends and set(said) <= {"type", "init", "minimum", "half_period"}:
        return "cosine", said.get("init")
    raise ConfigError(
        "`drop_fraction` must be a number, or a constant, or a cosine with a `half_period` of "
        f"`stop` ({stop!r}) and no `minimum`; got {dict(said)!r}"
    )


def _globs(model: nn.Module, said: object) -> tuple[str, ...]:
    """Patterns of parameter names, each of which finds a weight."""
    if said is None:
        return ()
    globs = [said] if isinstance(said, str) else said
    if not isinstance(globs, Sequence) or not all(isinstance(one, str) for one in globs):
        raise ConfigError(f"`param_filter` must be a glob, or a list of them; got {said!r}")
    names = [f"{target.owner}.weight" for target in all_targets(model)]
    missing = [one for one in globs if not fnmatch.filter(names, one)]
    if missing or not globs:
        raise ConfigError(f"`param_filter` {missing} finds no weight that could be sparse: {names}")
    return tuple(globs)


def _one_of(key: str, value: object, known: Mapping[str, Any]) -> Any:
    name = value.lower() if isinstance(value, str) else value
    if not isinstance(name, str) or name not in known:
        raise ConfigError(f"`{key}` must be one of {sorted(known)}; got {value!r}")
    return known[name]
