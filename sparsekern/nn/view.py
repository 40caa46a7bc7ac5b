"""What a sparse layer shows where a dense one has its weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from sparsekern.errors import DtypeError

if TYPE_CHECKING:
    from sparsekern.nn.base import SparseLayer


class WeightView:
    """Stands where `nn.Linear` has `weight`: answers for the dense matrix without storing it."""

    def __init__(self, layer: SparseLayer) -> None:
        self._layer = layer

    @property
    def shape(self) -> torch.Size:
        """Shape of the dense weight, as torch's dense layer has it."""
        return torch.Size(self._layer.weight_shape)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""
        return self._layer.values.dtype

    @property
    def device(self) -> torch.device:
        """Device of the values."""
        return self._layer.values.device

    @property
    def requires_grad(self) -> bool:
        """Whether the values are trained."""
        return self._layer.values.requires_grad

    @classmethod
    def __torch_function__(cls, func: Any, *_: Any, **__: Any) -> NoReturn:
        """Refuse to act as a tensor; torch's fused inference paths then step aside."""
        raise DtypeError(
            f"{getattr(func, '__name__', func)} needs a dense tensor; use layer.weight.to_dense()"
        )

    def to_dense(self) -> Tensor:
        """The dense weight, made anew and detached; zero where nothing is active."""
        return self._layer.dense_weight()

    def __repr__(self) -> str:
        return f"WeightView(shape={tuple(self.shape)}, dtype={self.dtype}, sparse)"
