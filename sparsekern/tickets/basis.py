"""Tickets in another basis: the coordinates of a weight are pruned and rewound, not its entries.

tickets.in_basis_(model, "dct")
start = tickets.coordinates(model)
...                                              # train; scores of coordinates(model), masks by top
tickets.hold_(model, masks, start)               # a ticket: these coordinates, from these values
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparsekern.errors import ConfigError, DtypeError, ShapeError
from sparsekern.swap import Pattern, candidates
from sparsekern.swap.refuse import check_unwrapped
from sparsekern.swap.targets import Filter
from sparsekern.tickets.checks import Weights, check_all, unknown
from sparsekern.tickets.masks import weights
from sparsekern.tickets.parametrized import bare_, original, parametrized_by

Transform = Callable[[Tensor], tuple[Tensor | None, Tensor | None]]
"""Of a weight as a matrix (outputs, inputs times taps): orthonormal matrices of its rows and of its
columns; None leaves that side as it is."""

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


def dct(n: int, like: Tensor) -> Tensor:
    """The orthonormal discrete cosine transform (DCT-II): (n, n), a frequency in each row."""
    k = torch.arange(n, dtype=torch.float64, device=like.device)
    matrix = torch.cos(math.pi * (2 * k + 1) * k[:, None] / (2 * n)) * math.sqrt(2 / n)
    matrix[0] = 1 / math.sqrt(n)
    return matrix.to(like.dtype)


def _singular(w: Tensor) -> tuple[Tensor, Tensor]:
    u, _, vh = torch.linalg.svd(w.double())
    return u.t().to(w.dtype), vh.to(w.dtype)


TRANSFORMS: Mapping[str, Transform] = {
    "identity": lambda _: (None, None),
    "dct": lambda w: (dct(w.shape[0], w), dct(w.shape[1], w)),
    "svd": _singular,
}
"""Those that go by name. The others are yours.

Masks in "identity" are the usual tickets, and those of whole rows prune units. "svd" has the
singular vectors of the weight as it is now: masks of the first diagonal coordinates are low rank.
"""


class Basis(nn.Module):
    """The parametrization of one layer: coordinates Z -> weight R^T (Z mask) C.

    Args:
        weight: of the layer.
        rows: R, (outputs, outputs), or None.
        cols: C, (inputs times taps, inputs times taps), or None.

    Attributes:
        mask: bool, of the weight's shape: which coordinates are kept.
    """

    rows: Tensor | None
    cols: Tensor | None
    mask: Tensor

    def __init__(self, weight: Tensor, rows: Tensor | None, cols: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("rows", rows)
        self.register_buffer("cols", cols)
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool))

    def forward(self, z: Tensor) -> Tensor:
        """The weight of these coordinates."""
        matrix = z.where(self.mask, 0.0).flatten(1)
        matrix = matrix if self.rows is None else self.rows.t() @ matrix
        return (matrix if self.cols is None else matrix @ self.cols).view(z.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The coordinates of a weight."""
        matrix = weight.flatten(1)
        matrix = matrix if self.rows is None else self.rows @ matrix
        return (matrix if self.cols is None else matrix @ self.cols.t()).view(weight.shape)


def in_basis_(
    model: nn.Module,
    transform: str | Transform = "dct",
    *,
    filter_fn: Filter | None = None,
    exclude: Sequence[Pattern] = (),
) -> nn.Module:
    """Let linear layers and convolutions train the coordinates of their weights in a basis.

    A parametrization of torch over dense layers, which holds two square matrices a layer: for
    tickets in the sense of Alabdulmohsin et al. 2021, not for speed. The coordinates are the
    parameters from now on: build the optimizer afterwards.

    Args:
        model: with dense layers.
        transform: "dct", "svd", "identity", or a function of a weight as a matrix to two
            orthonormal matrices, see `Transform`.
        filter_fn: see `sparsify_`.
        exclude: see `sparsify_`.

    Returns:
        The same model, whose outputs are the same but for rounding.

    Raises:
        ConfigError: an unknown name, matrices that are not orthonormal, a layer that is neither
            linear nor a convolution, or no layer at all. The model is as it was.
        DtypeError, ShapeError: a transform gives something else than two matrices that fit.
    """
    names = weights(model, filter_fn, exclude)
    check_unwrapped(model, "in_basis_")
    if not callable(transform) and transform not in TRANSFORMS:
        raise ConfigError(unknown("`transform`", transform, TRANSFORMS))
    function = transform if callable(transform) else TRANSFORMS[transform]
    targets = candidates(model, filter_fn, exclude, first_conv_stays=False)
    made = []
    for name, layer in ((t.name, t.module) for t in targets if t.name in names):
        if not isinstance(layer, LAYERS):
            kinds = ", ".join(f"nn.{known.__name__}" for known in LAYERS)
            raise ConfigError(
                f"bases are of {kinds}; {name!r} belongs to a {type(layer).__name__}: exclude it"
            )
        made.append((layer, Basis(names[name], *_matrices(name, names[name], function))))
    for layer, basis in made:
        parametrize.register_parametrization(layer, "weight", basis, unsafe=True)
    return model


def coordinates(model: nn.Module) -> dict[str, Tensor]:
    """The coordinates that layers train, by name; 0 where a mask leaves one out.

    Raises:
        ConfigError: no layer is in a basis.
        DtypeError: `model` is no module.
    """
    return {
        n: original(layer).detach().where(b.mask, 0.0) for n, (layer, b) in _found(model).items()
    }


def hold_(
    model: nn.Module, masks: Mapping[str, Tensor], values: Weights | None = None
) -> nn.Module:
    """Keep these coordinates and no others, in place.

    Args:
        model: of `in_basis_`.
        masks: bool, by layer; True is kept.
        values: coordinates to go on from, as in rewinding; without them those of now.

    Returns:
        The same model.

    Raises:
        ConfigError, DtypeError, ShapeError: no layer is in a basis, or masks and values do not fit
            them. The model is as it was.
    """
    found, now = _found(model), coordinates(model)
    values = now if values is None else values
    check_all({"model": now, "values": values}, masks)
    with torch.no_grad():
        for name, (layer, basis) in found.items():
            basis.mask.copy_(masks[name])
            original(layer).copy_(values[name].where(masks[name], 0.0))
    return model


def from_basis_(model: nn.Module) -> nn.Module:
    """Make the layers plain ones again, with the weights that they have now, in place.

    Raises:
        ConfigError, DtypeError: as in `coordinates`.
    """
    found = _found(model)
    with torch.no_grad():
        made = {name: basis(original(layer)) for name, (layer, basis) in found.items()}
    for name, (layer, _) in found.items():
        bare_(layer, nn.Parameter(made[name], requires_grad=original(layer).requires_grad))
    return model


def _found(model: nn.Module) -> dict[str, tuple[nn.Module, Basis]]:
    found = parametrized_by(model, Basis)
    if not found:
        raise ConfigError("`model` has no layer in a basis: call in_basis_ before")
    return found


def _matrices(
    name: str, weight: Tensor, transform: Transform
) -> tuple[Tensor | None, Tensor | None]:
    """What the transform gives for one weight, checked."""
    matrix = weight.detach().flatten(1)
    pair = transform(matrix)
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise DtypeError(f"`transform` must give two matrices for {name!r}; got {pair!r}")
    for side, one, size in zip(("rows", "columns"), pair, matrix.shape, strict=True):
        if one is None:
            continue
        if not isinstance(one, Tensor) or not one.is_floating_point():
            raise DtypeError(f"the matrix of {name!r}'s {side} must be a floating-point tensor")
        if one.shape != (size, size):
            raise ShapeError(
                f"the matrix of {name!r}'s {side} must have shape {(size, size)}; got "
                f"{tuple(one.shape)}"
            )
        off = (one.double() @ one.double().t() - torch.eye(size, device=one.device)).abs().max()
        if not off <= size * torch.finfo(one.dtype).eps:
            raise ConfigError(f"the matrix of {name!r}'s {side} is not orthonormal (by {off:.2g})")
    rows, cols = (None if one is None else one.detach().to(weight).clone() for one in pair)
    return rows, cols
