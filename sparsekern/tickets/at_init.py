"""Scores of untrained weights: which connections to train, before any training.

Each looks at a copy of the model, so that nothing of the model changes, batch statistics included.
All hold dense gradients of every weight while they run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from sparsekern.errors import ConfigError, DtypeError
from sparsekern.swap import Pattern
from sparsekern.swap.targets import Filter
from sparsekern.tickets.masks import Scores, top, weights
from sparsekern.topology.blocks import check_sparsity
from sparsekern.topology.sampling import check_generator

Batches = Iterable[tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]


def random(
    model: nn.Module,
    *,
    filter_fn: Filter | None = None,
    exclude: Sequence[Pattern] = (),
    generator: torch.Generator | None = None,
) -> Scores:
    """Scores by chance, U(0, 1): with `top` by "erk", the usual random start.

    Raises:
        ConfigError, DtypeError: as in `weights`, or `generator` is no torch.Generator.
    """
    check_generator(generator)
    found = weights(model, filter_fn, exclude)
    return {
        name: torch.rand(w.shape, generator=generator, device="cpu").to(w.device)
        for name, w in found.items()
    }


def snip(
    model: nn.Module,
    batches: Batches,
    loss_fn: Loss,
    *,
    filter_fn: Filter | None = None,
    exclude: Sequence[Pattern] = (),
) -> Scores:
    """|g w|: how much the loss would change without a weight (Lee et al. 2019, equation 6).

    Args:
        model: untrained.
        batches: pairs (input, target); one is what the paper takes. Gradients are summed.
        loss_fn: of output and target.
        filter_fn: see `sparsify_`.
        exclude: see `sparsify_`.

    Raises:
        ConfigError: there is no batch, the loss is no finite scalar, or as in `weights`.
    """
    twin, found = _twin(model, filter_fn, exclude)
    total: list[Tensor] = []
    for x, y in _listed(batches):
        grads = torch.autograd.grad(_loss(loss_fn, twin(x), y), list(found.values()))
        total = _added(total, grads)
    return {n: (g * w).abs().detach() for (n, w), g in zip(found.items(), total, strict=True)}


def grasp(
    model: nn.Module,
    batches: Batches,
    loss_fn: Loss,
    *,
    temperature: float = 200.0,
    filter_fn: Filter | None = None,
    exclude: Sequence[Pattern] = (),
) -> Scores:
    """w (H g): how much a weight adds to the gradient flow (Wang et al. 2020, equation 8).

    The paper's score is -w (H g), of which the *largest* go; this one is its negative, so that the
    largest stay, as everywhere here. g is the sum of the gradients of all batches, and H g that of
    their Hessian products.

    Args:
        model: untrained; each of its operations must have a second derivative.
        batches: pairs (input, target); the paper takes two halves of ten samples a class.
        loss_fn: of output and target.
        temperature: the outputs are divided by it, so that the loss is nearly linear in them.
        filter_fn: see `sparsify_`.
        exclude: see `sparsify_`.

    Raises:
        ConfigError: the temperature is not positive, there is no batch, the loss is no finite
            scalar, or as in `weights`.
    """
    if not temperature > 0:
        raise ConfigError(f"`temperature` must be positive; got {temperature!r}")
    twin, found = _twin(model, filter_fn, exclude)
    parameters, pairs = list(found.values()), _listed(batches)
    gradient: list[Tensor] = []
    for x, y in pairs:
        loss = _loss(loss_fn, twin(x) / temperature, y)
        gradient = _added(gradient, torch.autograd.grad(loss, parameters))
    product: list[Tensor] = []
    for x, y in pairs:
        loss = _loss(loss_fn, twin(x) / temperature, y)
        grads = torch.autograd.grad(loss, parameters, create_graph=True)
        along = torch.stack([(g * v).sum() for g, v in zip(grads, gradient, strict=True)]).sum()
        product = _added(product, torch.autograd.grad(along, parameters))
    return {n: (w * h).detach() for (n, w), h in zip(found.items(), product, strict=True)}


def synflow(
    model: nn.Module,
    example: Tensor,
    sparsity: float,
    *,
    rounds: int = 100,
    filter_fn: Filter | None = None,
    exclude: Sequence[Pattern] = (),
) -> Scores:
    """|w| dR/d|w|, R the sum over all paths of absolute weights (Tanaka et al. 2020, algorithm 1).

    Needs no data. Weights go in rounds: after round k a share (1 - sparsity)^(k / rounds) is left
    of all together, so no layer is emptied before all others are. In float64, and in evaluation
    mode, on the absolute values of all parameters and buffers.

    Args:
        model: untrained.
        example: an input; its numbers do not matter, the first of the batch is replaced by ones.
        sparsity: that the scores are meant for: `top(scores, sparsity)`.
        rounds: 100 in the paper.
        filter_fn: see `sparsify_`.
        exclude: see `sparsify_`.

    Returns:
        The scores of the last round; those that went before it have -1.

    Raises:
        ConfigError: an argument is out of its domain, the scores are not finite, or as in
            `weights`.
        DtypeError: `example` is no floating-point tensor.
    """
    check_sparsity(sparsity)
    if type(rounds) is not int or rounds < 1:
        raise ConfigError(f"`rounds` must be an int of at least 1; got {rounds!r}")
    if not isinstance(example, Tensor) or not example.is_floating_point():
        raise DtypeError("`example` must be a floating-point tensor: an input of the model")
    twin, found = _twin(model, filter_fn, exclude)
    twin.double().eval()
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            if tensor.is_floating_point():
                tensor.abs_()
    ones = torch.ones_like(example[:1], dtype=torch.float64)
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in found.items()}
    scores: Scores = {}
    for k in range(1, rounds + 1):
        grads = torch.autograd.grad(twin(ones).sum(), list(found.values()))
        scores = {
            name: (g * w).detach().masked_fill_(~masks[name], -1)
            for (name, w), g in zip(found.items(), grads, strict=True)
        }
        if not all(bool(s.isfinite().all()) for s in scores.values()):
            raise ConfigError("the path sums of this model are beyond float64: rescale its weights")
        masks = top(scores, 1 - (1 - sparsity) ** (k / rounds))
        with torch.no_grad():
            for name, w in found.items():
                w.mul_(masks[name])
    return scores


# ---- shared


def _twin(
    model: nn.Module, filter_fn: Filter | None, exclude: Sequence[Pattern]
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A copy of the model and its weights, all of which take gradients."""
    twin = copy.deepcopy(model)
    found = weights(twin, filter_fn, exclude)
    for weight in found.values():
        weight.requires_grad_(True)
    return twin, found


def _listed(batches: Batches) -> list[tuple[Tensor, Tensor]]:
    pairs = list(batches)
    if not pairs or any(not isinstance(pair, tuple | list) or len(pair) != 2 for pair in pairs):
        raise ConfigError(
            "`batches` must hold at least one pair (input, target), as in [(x, y)]; got "
            f"{[type(pair).__name__ for pair in pairs[:2]]}"
        )
    return pairs


def _loss(loss_fn: Loss, output: Tensor, target: Tensor) -> Tensor:
    loss = loss_fn(output, target)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ConfigError(f"`loss_fn` must give a scalar; got {getattr(loss, 'shape', loss)!r}")
    if not bool(loss.isfinite()):
        raise ConfigError(f"`loss_fn` must give a finite loss; got {loss.item()}")
    return loss


def _added(total: list[Tensor], more: Sequence[Tensor]) -> list[Tensor]:
    return [a + b for a, b in zip(total, more, strict=True)] if total else list(more)
