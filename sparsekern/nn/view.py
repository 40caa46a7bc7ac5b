"""What a sparse layer shows where a dense one has its weight."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from sparsekern.errors import DtypeError, WeightError

HELP = (
    "`layer.weight.to_dense()` makes a dense copy; the active weights are `layer.values`: write to "
    "it, or to all by `layer.set_active_values`; `from_dense` takes over a dense layer"
)


class WeightView:
    """Stands where `nn.Linear` has `weight`: answers for the dense matrix without storing it.

    What can't be answered without the dense matrix raises `WeightError`, and so does every
    assignment and in-place change, which would be lost.
    """

    __slots__ = ("_layer", "_tracked")

    def __init__(self, layer: Any, tracked: bool = True) -> None:
        self._layer = layer
        self._tracked = tracked

    # ---- what is known

    @property
    def shape(self) -> torch.Size:
        """Shape of the dense weight, as torch's dense layer has it."""
        return torch.Size(self._layer.weight_shape)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""
        dtype: torch.dtype = self._layer.values.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Device of the values."""
        device: torch.device = self._layer.values.device
        return device

    @property
    def requires_grad(self) -> bool:
        """Whether the values are trained."""
        return self._tracked and bool(self._layer.values.requires_grad)

    @property
    def ndim(self) -> int:
        """Dimensions of the dense weight."""
        return len(self.shape)

    @property
    def is_cuda(self) -> bool:
        """Whether the values are on a CUDA device."""
        return bool(self._layer.values.is_cuda)

    @property
    def is_meta(self) -> bool:
        """Whether the values are on the meta device."""
        return bool(self._layer.values.is_meta)

    @property
    def data(self) -> WeightView:
        """The same view, which is not trained."""
        return WeightView(self._layer, tracked=False)

    @property
    def grad(self) -> None:
        """None if there is no gradient.

        Raises:
            WeightError: there is one; it exists for the active weights only.
        """
        if self._tracked and self._layer.values.grad is not None:
            raise AttributeError  # `__getattr__` takes over

    def dim(self) -> int:
        """Dimensions of the dense weight."""
        return self.ndim

    ndimension = dim

    def numel(self) -> int:
        """Weights of the dense layer; `layer.nnz` is the number of active ones."""
        return self.shape.numel()

    nelement = numel

    def size(self, dim: int | None = None) -> torch.Size | int:
        """Shape of the dense weight, or one size of it."""
        return self.shape if dim is None else self.shape[dim]

    def element_size(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize

    def is_floating_point(self) -> bool:
        """True: all weights are."""
        return True

    def is_complex(self) -> bool:
        """False: no weight is."""
        return False

    def norm(self, p: float | str = "fro") -> Tensor:
        """The p-norm of all weights, detached; those that are not active add nothing.

        Raises:
            WeightError: `p` is negative, where zeros count.
        """
        order = 2.0 if p == "fro" else p
        if isinstance(order, str) or order < 0:
            raise WeightError(f"`p` must be 'fro' or at least 0; got {p!r}: {HELP}")
        total: Tensor = torch.linalg.vector_norm(self._layer.active_values(), order)
        return total

    def to_dense(self) -> Tensor:
        """The dense weight, made anew and detached; zero where nothing is active."""
        dense: Tensor = self._layer.dense_weight()
        return dense

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"WeightView(shape={tuple(self.shape)}, dtype={self.dtype}, sparse)"

    # ---- what is not

    @classmethod
    def __torch_function__(cls, func: Any, *_: Any, **__: Any) -> NoReturn:
        """Refuse to act as a tensor; torch's fused inference paths then step aside."""
        raise DtypeError(f"{getattr(func, '__name__', func)} needs a dense tensor: {HELP}")

    def __getattr__(self, name: str) -> Any:
        # what others have put on the weight; a copy that is being made has no layer yet
        if name not in WeightView.__slots__:
            marks = getattr(getattr(self._layer, "values", None), "__dict__", {})
            if name in marks:
                return marks[name]
        raise WeightError(_refusal(name))

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in WeightView.__slots__:
            raise WeightError(f"`layer.weight.{name}` can't be assigned to: {HELP}")
        super().__setattr__(name, value)


class PackedView(WeightView):
    """Stands where `nn.MultiheadAttention` has `in_proj_weight`: three matrices as one (3 E, E)."""

    __slots__ = ()

    def _parts(self) -> list[Any]:
        held: Any = self._layer
        return [layer.weight for layer in (held.q_proj, held.k_proj, held.v_proj)]

    @property
    def shape(self) -> torch.Size:
        """(3 E, E)."""
        rows, cols = self._parts()[0].shape
        return torch.Size((3 * rows, cols))

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self._parts()[0].dtype  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:
        """Of the values."""
        return self._parts()[0].device  # type: ignore[no-any-return]

    @property
    def requires_grad(self) -> bool:
        """Whether any of the three is trained."""
        return self._tracked and any(part.requires_grad for part in self._parts())

    @property
    def is_cuda(self) -> bool:
        """Whether the values are on a CUDA device."""
        return self.device.type == "cuda"

    @property
    def is_meta(self) -> bool:
        """Whether the values are on the meta device."""
        return self.device.type == "meta"

    @property
    def data(self) -> PackedView:
        """The same view, which is not trained."""
        return PackedView(self._layer, tracked=False)

    @property
    def grad(self) -> None:
        """None if there is no gradient.

        Raises:
            WeightError: there is one; it exists for the active weights only.
        """
        held: Any = self._layer
        layers = (held.q_proj, held.k_proj, held.v_proj)
        if self._tracked and any(p.grad is not None for m in layers for p in m.parameters()):
            raise AttributeError

    def norm(self, p: float | str = "fro") -> Tensor:
        """The p-norm of all weights, detached."""
        total: Tensor = torch.linalg.vector_norm(self.to_dense(), 2.0 if p == "fro" else float(p))
        return total

    def to_dense(self) -> Tensor:
        """The dense matrix, made anew and detached."""
        parts = [p.to_dense() if isinstance(p, WeightView) else p.detach() for p in self._parts()]
        return torch.cat(parts)


def refuse_assignment() -> NoReturn:
    """Raise the `WeightError` of `layer.weight = ...`."""
    raise WeightError(f"`weight` of a sparse layer can't be assigned to: {HELP}")


def _refusal(name: str) -> str:
    if name == "grad":
        return "the gradient exists for the active weights only: `layer.values.grad`"
    return f"`layer.weight.{name}` needs a dense tensor: {HELP}"


def _refused(name: str) -> Any:
    def method(*_: object) -> NoReturn:
        raise WeightError(_refusal(name))

    return method


# operators are looked up in the type, where `__getattr__` is not asked
_OPERATORS = (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "matmul", "rmatmul"),
    *("pow", "neg", "abs", "iter", "getitem", "setitem", "array", "lt", "le", "gt", "ge"),
)
for _name in _OPERATORS:
    setattr(WeightView, f"__{_name}__", _refused(f"__{_name}__"))
