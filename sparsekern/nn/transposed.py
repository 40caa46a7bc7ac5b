"""`SparseTransposedLinear`: for layers with a weight of shape (inputs, outputs), as GPT-2's."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from torch import Tensor, nn

from sparsekern.errors import DtypeError, UnavailableError
from sparsekern.nn.linear import SparseLinear
from sparsekern.topology import Topology
from sparsekern.topology.blocks import Block

_HOME, _NAME = "transformers.pytorch_utils", "Conv1D"


def is_transposed(kind: type[nn.Module]) -> bool:
    """Whether it is the class `Conv1D` of transformers, which is never imported for that."""
    home = sys.modules.get(_HOME)
    return home is not None and kind is getattr(home, _NAME, None)


class SparseTransposedLinear(SparseLinear):
    """y = x w + b, with a w of shape (inputs, outputs): `transformers.pytorch_utils.Conv1D`.

    The connections are those of the matrix (outputs, inputs), as in a `SparseLinear`: blocks are
    (outputs, inputs) too. `weight`, `mask()` and dense states have the shape of the dense layer's.
    """

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(inputs, outputs)."""
        return self.in_features, self.out_features

    def as_weight(self, matrix: Tensor) -> Tensor:
        """(inputs, outputs) of a matrix (outputs, inputs), a view."""
        return matrix.t()

    def as_matrix(self, weight: Tensor) -> Tensor:
        """(outputs, inputs) of a weight (inputs, outputs), a view."""
        return weight.t()

    @classmethod
    def from_dense(
        cls,
        module: Any,
        *,
        sparsity: float | None = None,
        mask: Tensor | None = None,
        block: Block = 1,
        impl: str | None = None,
    ) -> SparseTransposedLinear:
        """As `SparseLinear.from_dense`; `mask` has the shape (inputs, outputs) of the weight."""
        if not is_transposed(type(module)):
            raise DtypeError(f"`module` must be a {_HOME}.{_NAME}; got {type(module).__name__}")
        turned = mask if mask is None else mask.t()
        like = SparseLinear.from_dense(
            _as_linear(module), sparsity=sparsity, mask=turned, block=block, impl=impl
        )
        return cls.from_topology(module, like.topology, impl=impl)

    @classmethod
    def from_topology(
        cls, module: Any, topology: Topology, *, impl: str | None = None
    ) -> SparseTransposedLinear:
        """Take over a dense layer with the weights that `topology` makes active."""
        layer = cls.shaped_like(module, topology, impl)
        return layer._take_from(module, module.weight.detach().t())

    @classmethod
    def shaped_like(
        cls, module: Any, topology: Topology, impl: str | None
    ) -> SparseTransposedLinear:
        """A layer of another one's size, dtype and device, with values to be overwritten."""
        made: Any = super().shaped_like(
            module if isinstance(module, SparseLinear) else _as_linear(module), topology, impl
        )
        return made  # type: ignore[no-any-return]

    def to_dense(self) -> Any:
        """A `Conv1D` with the same weights, zeros filled in.

        Raises:
            UnavailableError: transformers is not installed.
        """
        kind = dense_type()
        layer = kind(self.out_features, self.in_features)
        layer.to(device=self.values.device, dtype=self.values.dtype)
        return self._give_to(layer)


def dense_type() -> Any:
    """The class `Conv1D`; transformers is imported if it is not yet.

    Raises:
        UnavailableError: it is not installed.
    """
    try:
        return getattr(importlib.import_module(_HOME), _NAME)
    except ImportError as error:
        raise UnavailableError(f"a dense {_NAME} needs transformers: {error}") from error


def _as_linear(module: Any) -> nn.Linear:
    """A linear layer with the same weights."""
    empty: Any = nn.utils.skip_init
    made: nn.Linear = empty(
        nn.Linear, module.nx, module.nf, device=module.weight.device, dtype=module.weight.dtype
    )
    made.weight = nn.Parameter(module.weight.detach().t(), module.weight.requires_grad)
    made.bias = nn.Parameter(module.bias.detach(), module.bias.requires_grad)
    return made.train(module.training)
