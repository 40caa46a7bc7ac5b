"""Supermasks: masks that are trained while the weights stay what they were drawn as.

model.requires_grad_(False)
tickets.supermask_(model, "popup", density=0.5)    # now the scores train, and nothing else
tickets.to_sparse_(model)                          # the same function, sparse in memory
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparsekern.errors import ConfigError, DtypeError
from sparsekern.swap import Pattern, candidates, sparsify_
from sparsekern.swap.refuse import check_model, check_unwrapped
from sparsekern.swap.targets import Filter
from sparsekern.tickets.checks import check_all, unknown
from sparsekern.tickets.masks import Masks, weights
from sparsekern.tickets.parametrized import Before, bare_, original, parametrized_by
from sparsekern.topology.blocks import active_count
from sparsekern.topology.sampling import check_generator
from sparsekern.topology.select import top_k_mask

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


class _Rule(NamedTuple):
    """How scores become a mask, and what stands for the mask in the backward pass."""

    start: Callable[[Tensor, float, torch.Generator | None], Tensor]
    draw: Callable[[Tensor, float, torch.Generator | None], Tensor]
    soft: Callable[[Tensor], Tensor]


class Supermask(nn.Module):
    """The parametrization of one layer: weight -> weight times the mask of the scores.

    Args:
        kind: see `supermask_`.
        weight: of the layer, frozen.
        density: see there.
        rescale: see there.
        generator: of the first scores.

    Attributes:
        scores: of the weight's shape; they train.
    """

    def __init__(
        self,
        kind: str,
        weight: Tensor,
        density: float,
        rescale: bool = False,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.density, self.rescale = kind, density, rescale
        start = _RULES[kind].start(weight.detach(), density, generator)
        self.scores = nn.Parameter(start.to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        """The masked weight; "bernoulli" draws a mask at every call, in training or not."""
        return self.masked(weight, self.mask())

    def mask(self, generator: torch.Generator | None = None) -> Tensor:
        """A mask of the scores as they are: bool, of the weight's shape."""
        return _RULES[self.kind].draw(self.scores.detach(), self.density, generator)

    def masked(self, weight: Tensor, mask: Tensor) -> Tensor:
        """The weight under a mask, with the straight-through gradient to the scores."""
        weight, hard = weight.detach(), mask.to(weight.dtype)
        soft = _RULES[self.kind].soft(self.scores)
        through = soft - soft.detach()  # 0, with the gradient of `soft`
        if self.kind == "biprop":
            total = (weight.abs() * hard).sum()
            scale = total / _divisor(weight.numel(), self.density)
            return scale * weight.sign() * hard + weight * through
        if not self.rescale:
            return weight * (hard + through)
        if self.kind == "bernoulli":  # how many are kept is trained as well
            rate = hard.numel() / (hard + through).sum().clamp(min=1)
        else:
            rate = hard.numel() / hard.sum().clamp(min=1)
        return weight * (hard + through) * rate

    def extra_repr(self) -> str:
        """Of a printed model."""
        return f"{self.kind!r}, density={self.density}, rescale={self.rescale}"


def supermask_(
    model: nn.Module,
    kind: str = "bernoulli",
    density: float = 0.5,
    rescale: bool = False,
    *,
    filter_fn: Filter | None = None,
    exclude: Sequence[Pattern] = (),
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Put a mask with trainable scores over the frozen weights of linear layers and convolutions.

    The scores are parameters of `torch.nn.utils.parametrize`: they are in `parameters()` and in
    `state_dict()`, which loads into a model that was given the same supermask. Build the optimizer
    afterwards, of what requires a gradient.

    Args:
        model: frozen: `model.requires_grad_(False)`, biases too.
        kind: "bernoulli": a weight is kept with probability sigmoid(score), drawn anew at every
            forward pass from torch's global generator, in evaluation too; the gradient is that of
            the probability (Zhou et al. 2019, section 5; they train by SGD at a rate of 100).
            "popup": the largest |score| of each layer are kept; the gradient of a score is that of
            its masked weight, times the weight and the score's sign (Ramanujan et al. 2020).
            "biprop": so, with values alpha sign(w), alpha the sum of kept |w| over int(density n)
            (Diffenderfer & Kailkhura 2021).
        density: share of each layer that is *kept*, in (0, 1]; some of the papers' code calls this
            `prune_rate`. For "bernoulli" the probability at the start, in (0, 1).
        rescale: weights times size / kept of their layer, counted at every forward pass (Zhou et
            al.'s dynamic weight rescaling). Not for "biprop", whose alpha does that.
        filter_fn: see `sparsify_`.
        exclude: see `sparsify_`.
        generator: of the first scores: U(+-1 / sqrt(fan_in)), but for "bernoulli".

    Returns:
        The same model.

    Raises:
        ConfigError: an unknown kind, an argument out of its domain, a layer that trains, one that
            is neither linear nor a convolution, or nothing left to mask. The model is as it was.
        DtypeError: an argument of the wrong type.
    """
    check_model(model)
    check_unwrapped(model, "supermask_")
    check_generator(generator)
    _check(kind, density, rescale)
    names = weights(model, filter_fn, exclude)
    targets = candidates(model, filter_fn, exclude, first_conv_stays=False)
    layers = {t.name: t.module for t in targets if t.name in names}
    for name, layer in layers.items():
        _check_layer(name, layer, kind, density)
    made = [
        (layer, Supermask(kind, names[name], density, rescale, generator=generator))
        for name, layer in layers.items()
    ]
    for layer, supermask in made:
        parametrize.register_parametrization(layer, "weight", supermask, unsafe=True)
    return model


def supermasks(model: nn.Module, *, generator: torch.Generator | None = None) -> Masks:
    """The masks of the scores as they are, by layer.

    Args:
        model: with supermasks.
        generator: of "bernoulli" masks, which are drawn; without it, torch's global one.

    Raises:
        ConfigError: there is no supermask, or a score is NaN.
        DtypeError: `model` is no module, or `generator` no torch.Generator.
    """
    check_generator(generator)
    found = _found(model)
    for name, (_, supermask) in found.items():
        if bool(supermask.scores.isnan().any()):
            raise ConfigError(f"the scores of {name!r} hold NaN: their training has diverged")
    return {name: supermask.mask(generator) for name, (_, supermask) in found.items()}


def to_sparse_(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None = None,
    *,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Turn the masked layers into sparse ones that compute the same, in place.

    They hold the masked weights, rescaled where those were, and stay frozen:
    `model.requires_grad_(True)` trains on from there. Layers whose mask leaves nothing out become
    dense ones.

    Args:
        model: with supermasks.
        masks: bool, by layer: which to take of those that "bernoulli" can draw. Without it, those
            of `supermasks`.
        generator: see `supermasks`.

    Returns:
        The same model.

    Raises:
        ConfigError: there is no supermask, masks have other names, or as in `sparsify_`.
        DtypeError, ShapeError: a mask does not fit its weight, or `model` is itself a layer.
            Whatever is raised, the model is as it was.
    """
    found = _found(model)
    check_unwrapped(model, "to_sparse_")
    if "" in found:
        raise DtypeError("`model` must contain layers; a single one can't be replaced")
    chosen = dict(masks) if masks is not None else supermasks(model, generator=generator)
    check_all({"model": {name: one.scores for name, (_, one) in found.items()}}, chosen)
    with torch.no_grad():
        values = {
            name: one.masked(original(layer), chosen[name].to(one.scores.device))
            for name, (layer, one) in found.items()
        }
    before = {name: Before.of(layer) for name, (layer, _) in found.items()}
    try:
        for name, (layer, _) in found.items():
            bare_(layer, nn.Parameter(values[name], requires_grad=False))
        sparsify_(model, masks=chosen, filter_fn=_any)
    except BaseException:
        for name, (layer, _) in found.items():
            before[name].restore(layer)
        raise
    return model


def _any(_module: nn.Module, _name: str) -> bool:
    """The masks say which."""
    return True


def _found(model: nn.Module) -> dict[str, tuple[nn.Module, Supermask]]:
    """Layers and their supermasks by name."""
    found = parametrized_by(model, Supermask)
    if not found:
        raise ConfigError("`model` has no supermask: put some on with supermask_")
    return found


# ---- the three kinds


def _logit(weight: Tensor, density: float, _generator: torch.Generator | None) -> Tensor:
    return torch.full_like(weight, math.log(density) - math.log1p(-density))


def _kaiming_uniform(weight: Tensor, _density: float, generator: torch.Generator | None) -> Tensor:
    """torch's own, of a = sqrt(5)."""
    drawn = torch.rand(weight.shape, generator=generator, device="cpu")
    return (2 * drawn - 1) / math.sqrt(weight[0].numel())


def _sampled(scores: Tensor, _density: float, generator: torch.Generator | None) -> Tensor:
    p = scores.sigmoid()
    if generator is None:
        return torch.bernoulli(p).bool()
    return torch.rand(p.shape, generator=generator, device="cpu").to(p) < p


def _largest(scores: Tensor, density: float, _generator: torch.Generator | None) -> Tensor:
    kept = active_count(scores.numel(), 1 - density)
    return top_k_mask(scores.abs().flatten(), kept).view(scores.shape)


_RULES = {
    "bernoulli": _Rule(_logit, _sampled, torch.sigmoid),
    "popup": _Rule(_kaiming_uniform, _largest, torch.abs),
    "biprop": _Rule(_kaiming_uniform, _largest, torch.abs),
}
KINDS = tuple(_RULES)


def _divisor(size: int, density: float) -> int:
    """int(density n); rounding first keeps .29 * 100 = 28.999... from losing one."""
    return math.floor(round(density * size, 6))


# ---- arguments


def _check(kind: object, density: object, rescale: object) -> None:
    if kind not in KINDS:
        raise ConfigError(unknown("`kind`", kind, KINDS))
    if isinstance(density, bool) or not isinstance(density, int | float):
        raise DtypeError(f"`density` must be a number; got {density!r}")
    if not 0 < density <= 1 or (kind == "bernoulli" and density == 1):
        domain = "(0, 1), a probability" if kind == "bernoulli" else "(0, 1]"
        raise ConfigError(f"`density`, the share that is kept, must lie in {domain}; got {density}")
    if not isinstance(rescale, bool):
        raise DtypeError(f"`rescale` must be a bool; got {rescale!r}")
    if rescale and kind == "biprop":
        raise ConfigError("`rescale` is not for 'biprop', whose alpha scales its weights already")


def _check_layer(name: str, layer: nn.Module, kind: str, density: float) -> None:
    if not isinstance(layer, LAYERS):
        kinds = ", ".join(f"nn.{known.__name__}" for known in LAYERS)
        raise ConfigError(
            f"supermasks are of {kinds}; {name!r} belongs to a {type(layer).__name__}: exclude it"
        )
    for own, parameter in layer.named_parameters(recurse=False):
        if parameter.requires_grad:
            raise ConfigError(
                f"layer {name!r} trains: its {own} requires a gradient. A supermask is of frozen "
                "weights and biases: call model.requires_grad_(False) before"
            )
    if kind == "biprop" and not _divisor(layer.weight.numel(), density):
        raise ConfigError(
            f"`density` {density} keeps less than one of the {layer.weight.numel()} weights of "
            f"layer {name!r}"
        )
