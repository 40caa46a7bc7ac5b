"""Whether a result file has what its readers look at: a table of fields and their kinds."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Any

from sparsekern.errors import DataError

Kinds = Mapping[str, tuple[type, ...]]

NUMBER = (int, float)
FILE: Kinds = {"data": (dict,), "task": (dict,), "dense": (dict,), "runs": (list,)}
DATA: Kinds = {
    "name": (str,),
    "sample": (str,),
    "validation": (int,),
    "test": (int,),
    "unigram_entropy": (*NUMBER, NoneType),
    "most_common": NUMBER,
    "test_digest": (str,),
}
DENSE: Kinds = {"inference": NUMBER, "training": NUMBER}
RUN: Kinds = {
    "method": (str,),
    "sparsity": NUMBER,
    "block": (list,),
    "multiplier": NUMBER,
    "lr": NUMBER,
    "seed": (int,),
    "state": (str,),
}
FAILED: Kinds = {"error": (str,)}
DONE: Kinds = {
    "learned": (bool,),
    "validation": (dict, NoneType),
    "test": (dict,),
    "curve": (list,),
    "flops": (dict,),
    "held": (dict,),
    "step_seconds": NUMBER,
    "layers": (list,),
}
SCORE: Kinds = {"accuracy": NUMBER, "bits": (*NUMBER, NoneType)}
FLOPS: Kinds = {"training_ratio": NUMBER, "inference_ratio": NUMBER}
HELD: Kinds = dict.fromkeys(("weights", "gradients", "optimizer", "index"), NUMBER)
LAYER: Kinds = {"shape": (list,), "impl": (str,)}


def check(content: Mapping[str, Any]) -> None:
    """Look at all that tables are made of.

    Args:
        content: of the file, an object.

    Raises:
        DataError: a field is missing or of another kind; the text names it.
    """
    _have(content, FILE, "it")
    _have(content["data"], DATA, "data")
    _have(content["dense"], DENSE, "dense")
    if not isinstance(content.get("environment", {}), dict):
        raise DataError("`environment` must be an object")
    for i, run in enumerate(content["runs"]):
        _check_run(run, f"run {i}")


def _check_run(run: Any, where: str) -> None:
    _have(run, RUN, where)
    _edges(run["block"], f"{where}, block")
    if run["state"] != "done":
        _have(run, FAILED, where)
        return
    _have(run, DONE, where)
    _have(run["test"], SCORE, f"{where}, test")
    if run["validation"] is not None:
        _have(run["validation"], SCORE, f"{where}, validation")
    _have(run["flops"], FLOPS, f"{where}, flops")
    _have(run["held"], HELD, f"{where}, held")
    if not run["curve"]:
        raise DataError(f"{where}: `curve` must have a point; got none")
    for point in run["curve"]:
        _have(point, {"nnz": (int,)}, f"{where}, curve")
    for layer in run["layers"]:
        _have(layer, LAYER, f"{where}, layers")
        _edges(layer["shape"], f"{where}, shape of a layer")


def _edges(found: list[Any], where: str) -> None:
    if len(found) != 2 or any(type(edge) is not int or edge < 1 for edge in found):
        raise DataError(f"{where}: expected two positive ints; got {found!r:.60}")


def _have(found: Any, kinds: Kinds, where: str) -> None:
    if not isinstance(found, dict):
        raise DataError(f"{where}: expected an object; got {found!r:.60}")
    for name, kind in kinds.items():
        if name not in found:
            raise DataError(f"{where}: `{name}` is missing")
        value = found[name]
        # JSON's true is an int to Python
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kind):
            names = " or ".join("null" if k is NoneType else k.__name__ for k in kind)
            raise DataError(f"{where}: `{name}` must be {names}; got {value!r:.60}")
