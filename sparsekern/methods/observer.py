"""Collecting what the dense gradient of one layer says, on armed steps only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import TensorWeakRef

from sparsekern.nn import SparseLayer
from sparsekern.nn.sharded import gradients, is_sharded, trained
from sparsekern.ops import GrowScores
from sparsekern.ops.capture import register
from sparsekern.ops.ranges import ranged

_C: Any = torch._C  # untyped in torch
_OUTSIDE = -1  # torch's number of the running backward pass where none runs

UNSEEN = "its gradient holds backward passes that were not observed; clear gradients after a step"
OVERWRITTEN = "a tensor of a micro-batch was overwritten before the optimizer's step"
LATE = "it is used in several checkpointed parts; its inputs are held from now on"


class Seen(NamedTuple):
    """What an observer saw of the gradient that a layer has accumulated.

    Attributes:
        passes: backward passes.
        problem: why the scores would not be of that gradient, or None.
    """

    passes: int
    problem: str | None


class GradientObserver:
    """Turns the backward passes of one layer into `GrowScores` of what its gradient accumulated.

    While armed, it streams the dense gradient at the end of the last of `passes` backward passes
    through the layer and keeps nothing else; with more than one, the (dy, x) pairs of the earlier
    ones are held until then, so that the score is the norm of the *summed* gradient, as if they
    were one batch. Where a layer sees fewer passes, or `hold` says so, its pairs are held until
    `scores` asks.

    What counts is what torch adds to `values.grad`: of `torch.autograd.grad`, and of a backward
    pass whose `inputs` leave the values out, nothing. When gradients are cleared (after a skipped
    AMP step, between the passes of SAM) it starts over.
    """

    def __init__(
        self, layer: SparseLayer, norm: str, passes: int, hold: Callable[[], bool] = lambda: False
    ) -> None:
        self.layer, self.norm, self.passes, self.hold = layer, norm, passes, hold
        self.k = self.each_row = 0
        self._keep_late = False
        self._uses = 0
        self._grad: tuple[TensorWeakRef, int] | None = None
        self._scores: GrowScores | None = None
        self._prepare()

    def _prepare(self) -> None:
        self.key = register(self)
        self._hook: RemovableHandle | None = None
        self._armed = False
        self._met: TensorWeakRef | None = None
        self._node: Any = None
        self._outer = _OUTSIDE
        self._reset()

    def arm(self, k: int, each_row: int = 0) -> None:
        """Observe coming passes, for the `k` best inactive blocks, and some of each block row."""
        self.disarm()
        self.k, self.each_row = k, each_row
        self.layer.observe(self.key)
        self._armed = True
        if not is_sharded(self.layer.values):
            self._meet()

    def _meet(self) -> None:
        """Hang on to the parameter whose gradient is accumulated now.

        FSDP2 has one for the time between its gathering and the end of backward, made at the first.
        """
        values = self.layer.values
        if self._met is not None and self._met() is values:
            return
        if self._hook is not None:
            self._hook.remove()
        self._met, self._node = TensorWeakRef(values), _node_of(values)
        register_hook: Any = values.register_post_accumulate_grad_hook
        self._hook = register_hook(self._accumulated)

    def disarm(self) -> None:
        """Stop observing, and forget."""
        self.layer.observe(0)
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self._armed, self._node, self._met = False, None, None
        self._reset()

    # ---- called by the capture operators

    def expect(self) -> None:
        """A forward pass went through the layer."""
        if self._armed and self.layer._sharding is not None:
            self._meet()
        self._outer = _C._current_graph_task_id()
        if self._outer == _OUTSIDE:
            self._uses += 1
            if self._done and self._was_cleared():
                self._reset()  # no batch outlives its gradient
                self._uses = 1

    def receive(self, dy: Tensor, x: Tensor) -> None:
        """A backward pass came through."""
        if self._hook is None or not self._accumulates():
            return
        task = _C._current_graph_task_id()
        running = self._running.get(task)
        if running is None:
            running = self._begin(task)
        if self._scores is not None or running.scores is not None:
            # beyond the declared passes, which `seen` tells; or a further part of the last one
            self._late |= running.scores is not None or running.root in self._done
            return
        running.pairs.append(_Pair.of(dy, x, held=self.passes > 1 or self._holds()))
        if len(running.pairs) == self._uses and self._is_last(running) and _is_compiled():
            # a compiled graph hands out all gradients at its end; pairs of all layers would wait
            running.scores = self._stream(running.pairs, None)

    def _begin(self, task: int) -> _Pass:
        """Another backward pass: of its own, or a part that is recomputed inside of one."""
        root = task if self._outer in (_OUTSIDE, task) else self._outer
        if root not in self._done and root not in {p.root for p in self._running.values()}:
            if self._was_cleared():
                uses = self._uses
                self._reset()
                self._uses = uses
            elif not self._done:
                self._unseen = True
        self._running[task] = running = _Pass(root)
        # torch keeps the callback, and with it the pairs, as long as this backward pass runs
        torch.autograd.Variable._execution_engine.queue_callback(running.end)
        return running

    def _accumulated(self, values: Tensor) -> None:
        """The gradient of a backward pass was added to `values.grad`: its pairs count."""
        grad = values.grad
        self._grad = None if grad is None else (TensorWeakRef(grad), grad._version)
        node = get_gradient_edge(values).node
        if node is not self._node:  # the values moved to another dtype or device meanwhile
            self._node, self._unseen = node, True
        running = self._running.get(_C._current_graph_task_id())
        if running is None:
            return
        last, self._uses = self._is_last(running), 0
        self._done.add(running.root)
        if running.scores is not None:
            self._scores = running.scores
        elif self._scores is None:
            self._pairs += running.pairs
            if last:
                self._scores = self._stream(self._pairs, None)
        running.pairs.clear()

    # ---- asked at the update

    def seen(self) -> Seen:
        """What was seen of the gradient that there is; one that was cleared is forgotten."""
        if self._done and self._was_cleared():
            self._reset()
        overwritten = any(pair.is_overwritten() for pair in self._pairs)
        unseen = self._unseen or (not self._done and not self._was_cleared())
        told = {LATE: self._late, UNSEEN: unseen, OVERWRITTEN: overwritten}
        self._keep_late |= self._late
        return Seen(len(self._done), next((text for text, is_so in told.items() if is_so), None))

    def scores(self, reduce: Callable[[Tensor], None] | None = None) -> GrowScores | None:
        """The scores, or None if no backward pass came.

        Args:
            reduce: sums a slab over ranks in place; a rank that saw nothing adds zeros then.
        """
        if self._scores is None and (self._pairs or reduce is not None):
            pairs = self._pairs or [_Pair.of(*self.layer.no_pair(), held=False)]
            self._scores = self._stream(pairs, reduce)
        return self._scores

    # ---- what it knows

    def _accumulates(self) -> bool:
        """Whether the backward pass that runs now adds to the gradient of the values."""
        try:
            return bool(_C._will_engine_execute_node(self._node))
        except RuntimeError:  # `torch.autograd.grad` of the values themselves, or no pass runs
            return False

    def _holds(self) -> bool:
        return self._keep_late or self.hold()

    def _is_last(self, running: _Pass) -> bool:
        return len(self._done | {running.root}) == self.passes and not self._holds()

    def _was_cleared(self) -> bool:
        """Whether the gradients were set to None or zero since the last backward pass.

        A gradient that is zero by itself has not been touched since it was accumulated. With FSDP2
        only None is cleared.
        """
        grads = gradients(self.layer)
        if not grads or self.layer._sharding is not None:  # one rank's part may be all zeros
            return not grads
        grad = grads[0]
        if self._grad is not None and self._grad[0]() is grad and self._grad[1] == grad._version:
            return False
        return not bool(grad.any())

    def _stream(self, pairs: list[_Pair], reduce: Callable[[Tensor], None] | None) -> GrowScores:
        device = trained(self.layer).device
        dys, xs = (
            [t.to(device) for t in group] for group in zip(*(p[:2] for p in pairs), strict=True)
        )
        pairs.clear()
        autocast = torch.autocast(device.type, enabled=False)
        with ranged("score"), torch.no_grad(), autocast:
            return self.layer.grow_scores(dys, xs, self.k, self.norm, reduce, self.each_row)

    def _reset(self) -> None:
        self._pairs: list[_Pair] = []
        self._done: set[int] = set()
        self._running: WeakValueDictionary[int, _Pass] = WeakValueDictionary()
        self._uses = 0
        self._grad = self._scores = None
        self._late = self._unseen = False

    # ---- a copy observes by itself, once it is armed

    def __getstate__(self) -> dict[str, Any]:
        kept = ("layer", "norm", "passes", "hold", "k", "each_row", "_keep_late")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()


class _Pair(NamedTuple):
    """An output gradient and an input, and their versions as they came."""

    dy: Tensor
    x: Tensor
    versions: tuple[int, int]

    @classmethod
    def of(cls, dy: Tensor, x: Tensor, *, held: bool) -> _Pair:
        """Copies what comes from no graph if it is held: loops fill their input tensors again."""
        x = x.clone() if held and not x.requires_grad else x
        return cls(dy.detach(), x.detach(), (dy._version, x._version))

    def is_overwritten(self) -> bool:
        return (self.dy._version, self.x._version) != self.versions


class _Pass:
    """The pairs of one run of torch's engine, which belongs to the backward pass `root`."""

    def __init__(self, root: int) -> None:
        self.root = root
        self.pairs: list[_Pair] = []
        self.scores: GrowScores | None = None

    def end(self) -> None:
        """What was not accumulated by now, never is."""
        self.pairs.clear()


def _node_of(values: Tensor) -> Any:
    """What accumulates the gradient of a parameter; also from inside an operator."""
    none = _C.DispatchKeySet(_C.DispatchKey.Undefined)
    with _C._ForceDispatchKeyGuard(none, none):
        return get_gradient_edge(values).node


def _is_compiled() -> bool:
    """Whether the node that runs is the backward pass of a compiled graph."""
    node = _C._current_autograd_node()
    return node is not None and "Compiled" in type(node).__name__
