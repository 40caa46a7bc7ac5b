"""What the operators need under `torch.func` and forward-mode differentiation.

Every product is bilinear, so a forward derivative is the product itself with a tangent in the place
of each operand. Under `vmap`, tokens of all samples are the tokens of one product as long as they
share the weight; where each sample has a result or a weight of its own (per-sample gradients,
ensembles), each is a product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.utils._pytree import tree_leaves

from sparsekern.errors import UnavailableError

_C: Any = torch._C  # untyped in torch
_allow: Any = enable_single_level_autograd_function
_below: Any = super
_leaves: Any = tree_leaves

Rule = Callable[..., tuple[Any, Any]]
"""(info, dimension of the batch in each argument, *arguments) -> results, their dimensions."""


def kernel_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """An autograd function as the kernel of an operator for the dispatcher's key `Autograd`.

    Inside a transform the dispatcher has wrapped the operands for the level that runs, and what
    the function calls below autograd goes on to the next level: it acts on a single one.
    """
    plain: Any = function.apply
    single: Any = _below(torch.autograd.Function, function).apply

    def kernel(*args: Any) -> Any:
        if not _C._are_functorch_transforms_active():
            return plain(*args)
        with _allow():
            return single(*args)

    return kernel


def below_autograd(op: Any, *args: Any) -> Any:
    """Call an operator from its own autograd function."""
    if not _C._are_functorch_transforms_active():
        with _C._AutoDispatchBelowAutograd():
            return op(*args)
    # an autograd function turns both off, but the next level may differentiate too
    with torch.enable_grad(), _set_fwd_grad_enabled(True), _C._AutoDispatchBelowAutograd():
        return op(*args)


# ---- forward-mode derivatives


def bilinear_tangent(
    op: Callable[..., Tensor],
    operands: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    *rest: Any,
) -> Tensor | None:
    """Tangent of op(a, b, *rest), which is linear in a and in b; None where neither has one."""
    (a, b), (ta, tb) = operands, tangents
    parts = [] if ta is None else [op(ta, b, *rest)]
    parts += [] if tb is None else [op(a, tb, *rest)]
    return sum(parts[1:], parts[0]) if parts else None


def tangent_sum(*tangents: Tensor | None) -> Tensor | None:
    """The sum of those that exist."""
    found = [t for t in tangents if t is not None]
    return sum(found[1:], found[0]) if found else None


# ---- vmap


def folded(op: Any, operands: int = 1) -> Rule:
    """Rule of an operator that treats the rows of its first operands one by one."""
    alone = each(op)

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        if any(d is not None for d in _leaves(list(in_dims[operands:]))):
            return alone(info, in_dims, *args)
        size, dims = info.batch_size, in_dims[:operands]
        ahead = [_ahead(t, d, size) for t, d in zip(args[:operands], dims, strict=True)]
        out = op(*(t.flatten(0, 1) for t in ahead), *args[operands:])
        return out.unflatten(0, (size, ahead[0].shape[1])), 0

    return rule


def each(op: Any) -> Rule:
    """Rule of any operator: once for each sample."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        found = [
            op(*(_sample(a, d, i) for a, d in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(found[0], Tensor):
            return torch.stack(found), 0
        return tuple(map(torch.stack, zip(*found, strict=True))), (0,) * len(found[0])

    return rule


def both_gradients(backward: Any, transposed: Any, sampled: Any) -> Rule:
    """Rule of the operator (dy, x, values, ...) -> dx, dw: two of them where samples share w."""
    alone, dx_rule, dw_rule = each(backward), folded(transposed), each(sampled)

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        (dy, x, values, *rest), (of_dy, of_x, *others) = args, in_dims
        if of_dy is None or any(d is not None for d in _leaves(others)):
            return alone(info, in_dims, *args)
        dx, dx_dim = dx_rule(info, (of_dy, *others), dy, values, *rest)
        dw, dw_dim = dw_rule(info, (of_dy, of_x, *others[1:]), dy, x, *rest)
        return (dx, dw), (dx_dim, dw_dim)

    return rule


def refused(name: str, instead: str) -> Rule:
    """Rule of an operator that has none."""

    def rule(*_: Any) -> tuple[Any, Any]:
        raise UnavailableError(f"sparsekern::{name} can't be mapped by torch.vmap: {instead}")

    return rule


def _ahead(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """With the dimension of the batch in front."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _sample(argument: Any, dim: Any, i: int) -> Any:
    return argument.select(dim, i) if isinstance(dim, int) else argument
