"""The recurrence over time as one differentiable function.

Sequences come packed, as in torch's `PackedSequence`: the tokens of all sequences at one time step,
then those of the next, the longest sequences first. Plain sequences are the case of equal sizes. A
step takes one sparse product with the hidden state, and one transposed product on the way back; the
weight gradient is one sampled product over all tokens of all steps.

For each layer and direction, forward keeps the states and, but for a plain RNN, 4 H numbers a
token; the workspace of backward is of the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsekern.errors import UnavailableError
from sparsekern.nn.base import SparseLayer
from sparsekern.nn.recurrent.compiled import BACKWARD
from sparsekern.nn.recurrent.gates import KINDS
from sparsekern.nn.recurrent.products import Product, recipe_of
from sparsekern.nn.recurrent.unrolled import is_transformed, unrolled
from sparsekern.ops import capture
from sparsekern.ops.direct import is_plain
from sparsekern.ops.library import check_unchanged
from sparsekern.ops.ranges import ranged
from sparsekern.topology import Topology
from sparsekern.topology.known import versions_if_counted


def scan(
    kind: str,
    inputs: Tensor,
    state: Sequence[Tensor],
    hidden: nn.Module,
    projection: nn.Module | None,
    sizes: Sequence[int],
    *,
    reverse: bool = False,
) -> tuple[Tensor, ...]:
    """Run one layer in one direction.

    Args:
        kind: a name in `gates.KINDS`.
        inputs: (tokens, gates H), what the inputs contribute to the gates.
        state: initial h (B, H or projected size), for an LSTM also c (B, H); dtype of `inputs`.
        hidden: `SparseLinear` or `nn.Linear`, the hidden-to-hidden weight and its bias.
        projection: the same for an LSTM's projection, or None.
        sizes: sequences that have a token at each time step, B at first and never growing.
        reverse: from the last time step to the first.

    Returns:
        The hidden state at every token, in the order of `inputs`, and the final states.

    Raises:
        UnavailableError: where its gradient is to be differentiated again.
    """
    if is_transformed():
        return unrolled(kind, inputs, state, hidden, projection, sizes, reverse=reverse)
    layers = [hidden] if projection is None else [hidden, projection]
    recipes = [recipe_of(layer, inputs.dtype) for layer in layers]
    tensors = [inputs, recipes[0].bias, *state, *(t for r in recipes for t in r.tensors)]
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    weights = [
        _Weight(
            recipe.make,
            len(recipe.tensors),
            recipe.topology,
            layer._capture_key if keep and isinstance(layer, SparseLayer) else 0,
        )
        for layer, recipe in zip(layers, recipes, strict=True)
    ]
    plan = _Plan(kind, tuple(sizes), reverse, weights, keep)
    result: tuple[Tensor, ...] = _Scan.apply(plan, *tensors)  # type: ignore[no-untyped-call]
    return result


class _Weight(NamedTuple):
    """How to make a product, of how many tensors; its topology if it is sparse.

    `key` is the one under which it is observed, or 0.
    """

    make: Callable[[Sequence[Tensor], bool], Product]
    tensors: int
    topology: Topology | None
    key: int

    @property
    def arrays(self) -> tuple[Tensor, ...]:
        """What a product reads beside its tensors."""
        return () if self.topology is None else self.topology.arrays


class _Plan(NamedTuple):
    """What a scan knows besides tensors; `weights` are the hidden one and the projection's."""

    kind: str
    sizes: tuple[int, ...]
    reverse: bool
    weights: list[_Weight]
    keep: bool

    def order(self) -> range:
        """Time steps in the order in which they are taken."""
        steps = len(self.sizes)
        return range(steps - 1, -1, -1) if self.reverse else range(steps)

    def products(self, tensors: Sequence[Tensor], *, plain: bool) -> list[Product]:
        """The products, of the tensors of their recipes one after the other.

        Args:
            tensors: of all recipes.
            plain: whether kernels can read all that the products will be given.
        """
        made, start = [], 0
        for weight in self.weights:
            made.append(weight.make(tensors[start : start + weight.tensors], plain))
            start += weight.tensors
        return made

    def rows(self, buffer: Tensor) -> Sequence[Tensor]:
        """A buffer (tokens, n) by time step."""
        return torch.split_with_sizes(buffer, self.sizes)

    def shared(self, buffer: Tensor) -> Sequence[Tensor]:
        """A buffer (B, n) that all time steps use in turn."""
        batch = self.sizes[0]
        return [buffer if n == batch else buffer[:n] for n in self.sizes]


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: _Plan, inputs: Tensor, bias: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        states = KINDS[plan.kind].states
        with ranged("scan"), _bare(inputs):
            kept, final = _forward(plan, inputs, bias, tensors[:states], tensors[states:])
        for weight in plan.weights:
            capture.expect(weight.key)
        if plan.keep:
            ctx.plan = plan
            ctx.versions = [versions_if_counted(weight.arrays) for weight in plan.weights]
            ctx.save_for_backward(*tensors, *kept)
        return kept[0], *final

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *d_final: Tensor) -> tuple[Tensor | None, ...]:
        plan, saved = ctx.plan, ctx.saved_tensors
        for weight, versions in zip(plan.weights, ctx.versions, strict=True):
            check_unchanged(weight.arrays, versions)
        states = KINDS[plan.kind].states
        weights = states + sum(weight.tensors for weight in plan.weights)
        parts = saved[:states], saved[states:weights], saved[weights:]
        with ranged("scan_backward"), _bare(dy):
            found = _backward(plan, (dy, d_final), *parts, ctx.needs_input_grad[1:])
        if torch.is_grad_enabled():
            # torch's once_differentiable would take these for constants where dy is one
            found = [None if g is None else _Once.apply(g.requires_grad_()) for g in found]  # type: ignore[no-untyped-call]
        return None, *found


class _Once(torch.autograd.Function):
    """The identity; can't be differentiated."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_ctx: Any, _: Tensor) -> Tensor:
        raise UnavailableError("a recurrent layer can be differentiated once only; got twice")


def _forward(
    plan: _Plan,
    inputs: Tensor,
    bias: Tensor | None,
    initial: Sequence[Tensor],
    weights: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """Run over time; returns what backward needs, the outputs first, and the final states."""
    kind, batch = KINDS[plan.kind], plan.sizes[0]
    plain = is_plain(inputs, bias, *initial, *weights)
    product, *projection = plan.products(weights, plain=plain)
    size = inputs.shape[1] // kind.gates
    tokens = inputs.shape[0] if plan.keep else batch
    cut = plan.rows if plan.keep else plan.shared
    out = inputs.new_empty(inputs.shape[0], initial[0].shape[1])
    extra = [inputs.new_empty(tokens, size) for _ in range(kind.states - 1 + len(projection))]
    gates = inputs.new_empty(tokens, kind.kept * size)
    # states by time step as the cell leaves them: an h to be projected is not the output yet
    outs, others = plan.rows(out), [cut(buffer) for buffer in extra]
    new = [others[-1], *others[:-1]] if projection else [outs, *others]
    step = kind.forward(inputs, gates, new, plan.rows, cut)

    state, owned = list(initial), False
    for t in plan.order():
        n = plan.sizes[t]
        last = state if n == batch else [s[:n] for s in state]
        step(t, product.apply(last[0], bias), last)
        if projection:
            outs[t].copy_(projection[0].apply(new[0][t], None))
        fresh = [outs[t], *(rows[t] for rows in new[1:])]
        if n == batch:
            state, owned = fresh, False
            continue
        if not owned:
            state, owned = [s.clone() for s in state], True
        for held, value in zip(state, fresh, strict=True):
            held[:n].copy_(value)
    return [out, gates, *extra], state if owned else [s.clone() for s in state]


def _backward(
    plan: _Plan,
    gradients: tuple[Tensor, Sequence[Tensor]],
    initial: Sequence[Tensor],
    weights: Sequence[Tensor],
    kept: Sequence[Tensor],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Walk back; `needed` is of inputs, bias, states and weights, and so is the result."""
    kind, batch = KINDS[plan.kind], plan.sizes[0]
    plain = is_plain(gradients[0], *gradients[1], *initial, *weights, *kept)
    product, *projection = plan.products(weights, plain=plain)
    out, gates, *extra = kept
    cells = extra[: kind.states - 1]
    last = [_previous(plan, new, old) for new, old in zip([out, *cells], initial, strict=True)]
    # hooks on saved tensors may have given back others: the compiled walk reads rows of one type
    as_kept = all(k.is_contiguous() and k.dtype is gradients[0].dtype for k in kept)
    compiled = product.compiled and as_kept
    start = BACKWARD.get(plan.kind, kind.backward) if compiled else kind.backward
    walk = start(gates, last, [out, *cells], plan.rows)
    dy, d_state = plan.rows(gradients[0]), [_own(d) for d in gradients[1]]
    d_out = torch.empty_like(out) if projection else out
    d_outs = plan.rows(d_out)

    for t in reversed(plan.order()):
        n = plan.sizes[t]
        dh, *rest = d_state if n == batch else [d[:n] for d in d_state]
        dh.add_(dy[t])
        if projection:
            dh = projection[0].transposed(d_outs[t].copy_(dh))
        walk.step(t, dh, rest)
        d_last = product.transposed(walk.hidden_rows[t])
        if walk.carry is not None:
            walk.carry(t, dh, d_last)
        if n == batch:
            d_state[0] = d_last
        else:
            d_state[0][:n].copy_(d_last)

    pairs = [(walk.hidden, last[0]), *((d_out, extra[-1]) for _ in projection)]
    found: list[Tensor | None] = [
        walk.inputs() if needed[0] else None,
        walk.hidden.sum(0) if needed[1] else None,
        *d_state,
    ]
    for weight, made, pair in zip(plan.weights, (product, *projection), pairs, strict=True):
        capture.receive(weight.key, *pair)
        wanted = needed[len(found)]
        found.append(made.weight_gradient(*pair) if wanted else None)
        found += [None] * (weight.tensors - 1)
    return found


def _own(gradient: Tensor) -> Tensor:
    """A copy that a walk may write to, rows contiguous."""
    return gradient.clone(memory_format=torch.contiguous_format)


def _previous(plan: _Plan, states: Tensor, initial: Tensor) -> Tensor:
    """The state before each token's step, (tokens, n)."""
    rows, sizes = plan.rows(states), plan.sizes
    if not plan.reverse:
        return torch.cat([initial, *(r[:n] for r, n in zip(rows, sizes[1:], strict=False))])
    pieces = []
    for after, n, n_after in zip((*rows[1:], initial[:0]), sizes, (*sizes[1:], 0), strict=True):
        pieces += [after, initial[n_after:n]]
    return torch.cat(pieces)


@contextmanager
def _bare(like: Tensor) -> Iterator[None]:
    """Without the layers of torch that would only cost time here: autograd and autocast."""
    autocast = torch.autocast(like.device.type, enabled=False)
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd(), autocast:
        yield
