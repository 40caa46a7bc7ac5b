"""Eigenvalues of the loss's Hessian over the weights that exist."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp

from sparsekern.errors import ConfigError
from sparsekern.methods.schedule import check_int
from sparsekern.nn import SparseLayer
from sparsekern.swap.refuse import check_model
from sparsekern.tickets.masks import Masks
from sparsekern.tickets.ticket import keys_of
from sparsekern.topology.sampling import check_generator

Product = Callable[[Tensor], Tensor]
"""A symmetric matrix times a vector (n,) float64."""


class Lanczos(NamedTuple):
    """A symmetric matrix H as far as it was seen: H Q = Q T, but for a remainder in the last row.

    Attributes:
        basis: Q transposed, (steps, n) float64, orthonormal rows.
        diagonal: of T, (steps,).
        beside: next to it, (steps,); the last one is the length of the remainder.
    """

    basis: Tensor
    diagonal: Tensor
    beside: Tensor

    def tridiagonal(self) -> Tensor:
        """T, (steps, steps)."""
        inner = self.beside[:-1]
        return self.diagonal.diag() + inner.diag(1) + inner.diag(-1)


class Spectrum(NamedTuple):
    """Eigenvalues, smallest first.

    Attributes:
        values: (steps,) float64; all of them if there were as many steps as dimensions. With
            fewer, both ends of the spectrum are found first.
        residuals: ||H v - value v||, (steps,): an eigenvalue of H is no further away, but for
            rounding.
        weights: (steps,), summing to 1: the share of the start vector in each direction. With
            random starts, their histogram estimates the density of all eigenvalues.
        size: dimensions.
    """

    values: Tensor
    residuals: Tensor
    weights: Tensor
    size: int


def spectrum(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    *,
    steps: int | None = None,
    masks: Masks | None = None,
    generator: torch.Generator | None = None,
) -> Spectrum:
    """Eigenvalues of the Hessian over active dimensions (Evci et al. 2022, section 5).

    These are the active weights of sparse layers and all other parameters that train. The loss is
    the mean over the batches, by their sizes; the model's mode counts, and its buffers stay as they
    are. Each step costs a backward pass through a gradient; all batches' graphs are kept, and a
    float64 vector for each step. Products have the precision of the model: for more, `.double()`.

    Args:
        model: dense or sparse.
        batches: pairs (input, target).
        loss_fn: of output and target, their mean.
        steps: of Lanczos' method; None are as many as dimensions, for all eigenvalues.
        masks: of dense weights; what they leave out is no dimension. See `Ticket.masks`.
        generator: of the start vector.

    Raises:
        ConfigError: there is no batch or no dimension, the loss is no finite scalar, the masks do
            not fit, or `steps` is not in [1, dimensions].
        DtypeError: an argument is of the wrong type.
    """
    check_model(model)
    check_generator(generator)
    places = _active(model, masks or {})
    size = sum(int(place.sum()) for place in places.values())
    if not size:
        raise ConfigError("`model` has no parameter that trains: there is no Hessian")
    count = size if steps is None else steps
    check_int("steps", count, 1)
    if count > size:
        raise ConfigError(f"`steps` must be at most the {size} dimensions; got {count}")
    made = lanczos(_hessian(model, list(batches), loss_fn, places), size, count, generator)
    values, vectors = torch.linalg.eigh(made.tridiagonal())
    residuals = made.beside[-1] * vectors[-1].abs()
    return Spectrum(values, residuals, vectors[0] ** 2, size)


def lanczos(
    product: Product, size: int, steps: int, generator: torch.Generator | None = None
) -> Lanczos:
    """Lanczos' method; each vector is made orthogonal to all before, twice.

    Where the vectors seen so far span an invariant space, it goes on from a random vector outside,
    so that repeated eigenvalues are found as often as they are there.

    Args:
        product: see `Product`.
        size: n.
        steps: at most n.
        generator: of the start vectors.

    Raises:
        ConfigError: a product is not finite.
    """
    basis = torch.zeros(steps, size, dtype=torch.float64)
    diagonal, beside = torch.zeros(steps).double(), torch.zeros(steps).double()
    basis[0] = _outside(basis[:0], size, generator)
    scale = 0.0
    for j in range(steps):
        vector = product(basis[j])
        if not bool(vector.isfinite().all()):
            raise ConfigError("a product of the Hessian is not finite: the loss has no curvature")
        scale = max(scale, float(vector.norm()))
        diagonal[j] = basis[j] @ vector
        rest = _orthogonal(vector, basis[: j + 1])
        beside[j] = rest.norm()
        if beside[j] <= size * torch.finfo(torch.float64).eps * scale:
            beside[j] = 0.0
            rest = _outside(basis[: j + 1], size, generator) if j + 1 < steps else rest
        if j + 1 < steps:
            basis[j + 1] = rest / rest.norm()
    return Lanczos(basis, diagonal, beside)


def _orthogonal(vector: Tensor, basis: Tensor) -> Tensor:
    for _ in range(2):  # once leaves rounding errors of the size of what is taken away
        vector = vector - basis.t() @ (basis @ vector)
    return vector


def _outside(basis: Tensor, size: int, generator: torch.Generator | None) -> Tensor:
    """A random direction orthogonal to the basis, of length 1."""
    device = "cpu" if generator is None else generator.device
    drawn = torch.randn(size, dtype=torch.float64, generator=generator, device=device).cpu()
    rest: Tensor = _orthogonal(drawn, basis)
    return rest.div_(rest.norm())


def _active(model: nn.Module, masks: Masks) -> dict[str, Tensor]:
    """Where each parameter that trains has a dimension: bool, of its shape."""
    places = {
        key: torch.ones_like(p, dtype=torch.bool)
        for key, p in model.named_parameters()
        if p.requires_grad
    }
    for name, module in model.named_modules():
        key = f"{name}.values" if name else "values"
        if isinstance(module, SparseLayer) and key in places:
            ones = torch.ones(module.matrix_shape, dtype=torch.bool, device=module.values.device)
            packed = module.topology.pack(ones)  # padding is no weight
            whole = module.dense_mask
            places[key] = packed if whole is None else module.topology.to_mask()
    for name, key in keys_of(model, masks).items():
        if key in places:
            places[key] = masks[name].bool()
    return places


def _hessian(
    model: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    places: Mapping[str, Tensor],
) -> Product:
    """The product with the Hessian of the mean loss, from graphs that are made once."""
    if not batches:
        raise ConfigError("`batches` must hold at least one pair (input, target)")
    held = dict(model.named_parameters())
    fixed = {key: p.detach() for key, p in held.items() if key not in places}
    at = {key: held[key].detach() for key in places}
    total = sum(len(x) for x, _ in batches)
    back: list[tuple[float, Callable[..., tuple[dict[str, Tensor]]]]] = []
    for x, y in batches:

        def loss(parameters: dict[str, Tensor], x: Tensor = x, y: Tensor = y) -> Tensor:
            # copies: a batch norm in training mode writes to its buffers
            buffers = {key: b.clone() for key, b in model.named_buffers()}
            value = loss_fn(functional_call(model, {**fixed, **buffers, **parameters}, (x,)), y)
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise ConfigError(f"`loss_fn` must give a scalar; got {value!r}")
            return value.reshape(())

        back.append((len(x) / total, vjp(grad(loss), at)[1]))
    sizes = [int(place.sum()) for place in places.values()]

    def product(vector: Tensor) -> Tensor:
        parts = torch.split(vector, sizes)
        given = {
            key: torch.zeros_like(at[key]).masked_scatter_(place, part.to(at[key]))
            for (key, place), part in zip(places.items(), parts, strict=True)
        }
        result = torch.zeros_like(vector)
        for share, pull in back:
            (found,) = pull(given)
            cut = [found[key][place].double().cpu() for key, place in places.items()]
            result += share * torch.cat(cut)
        return result

    return product
