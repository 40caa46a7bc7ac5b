"""Why a weight is dense that `sparsify_` was not asked about."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from sparsekern.nn.kinds import SPARSE_TYPES, is_depthwise, sparse_type, weights_of
from sparsekern.nn.pruned import unpruned

NOT_CALLED = "`sparsify_` has not been called for it"
MADE = "something else makes its weight"

_KINDS: dict[type[nn.Module], str] = {
    parametrize.ParametrizationList: f"{MADE} (a parametrization)",
    nn.Embedding: "it is an embedding",
    nn.EmbeddingBag: "it is an embedding",
    nn.modules.conv._ConvTransposeNd: "it is a transposed convolution",
    nn.Conv3d: "a 3-D convolution has no sparse counterpart",
}


def reason(module: nn.Module, dimensions: int, *, is_shared: bool) -> str:
    """Why a parameter of so many dimensions, held by `module`, can't be sparse, or is not."""
    kind = type(module)
    if is_shared:
        return "it shares a parameter with another module"
    if sparse_type(kind):
        return _usual(module)
    base = next((base for base in SPARSE_TYPES if isinstance(module, base)), None)
    if base is not None:
        return f"{kind.__name__} is a subclass of nn.{base.__name__}"
    other = f"{kind.__name__} has no sparse counterpart"
    if dimensions > 2:
        other = f"a parameter of {dimensions} dimensions, as experts have, is no layer's weight"
    return next((text for known, text in _KINDS.items() if isinstance(module, known)), other)


def _usual(module: nn.Module) -> str:
    """Of a layer whose kind could be sparse."""
    if is_depthwise(module):
        return "it is a depthwise convolution"
    return NOT_CALLED if weights_of(unpruned(module)) else f"{MADE} (weight norm), or it is shared"
