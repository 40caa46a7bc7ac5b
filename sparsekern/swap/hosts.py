"""Models of other libraries that keep a description of themselves: it says what is sparse."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from torch import nn

_HOSTS = {
    ("transformers.modeling_utils", "PreTrainedModel"): "sparsekern.integrations.transformers"
}
"""Who describes the models of a class; imported for one, if the class is loaded already."""


def describe(model: nn.Module) -> None:
    """Let those of `model` and its parts that are nearest to the top say what they are now."""
    for (home, name), integration in _HOSTS.items():
        kind: Any = getattr(sys.modules.get(home), name, None)
        if kind is None:
            continue
        inside: set[int] = set()
        for part in model.modules():
            if isinstance(part, kind) and id(part) not in inside:
                inside.update(map(id, part.modules()))
                importlib.import_module(integration).describe_(part)
