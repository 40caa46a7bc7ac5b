"""`sparsify_` and `densify_`: turn the layers of a model into sparse ones, and back."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sparsekern.carry.hand_over import HandOver, Optimizers, as_optimizers, commit, prepare, undoing
from sparsekern.errors import ConfigError, DtypeError
from sparsekern.nn import SparseLayer
from sparsekern.nn.init import as_gain
from sparsekern.nn.kinds import SPARSE_KINDS, SPARSE_TYPES, sparse_type, weights_of
from sparsekern.nn.pruned import unpruned
from sparsekern.ops.dispatch import check_impl
from sparsekern.swap import record
from sparsekern.swap.build import Drawing, Made, dense_layer, sparse_layer
from sparsekern.swap.hosts import describe
from sparsekern.swap.masks import by_masks, by_pruning
from sparsekern.swap.patterns import Pattern
from sparsekern.swap.refuse import check_model, check_unwrapped, follower_name, refuse_followed
from sparsekern.swap.replace import replace_all, staying
from sparsekern.swap.shares import (
    Blocks,
    Distribution,
    Plans,
    by_distribution,
    by_plan,
    check_distribution,
)
from sparsekern.swap.summary import tell
from sparsekern.swap.targets import Choice, Filter, Target, all_targets, choose
from sparsekern.topology.blocks import check_sparsity
from sparsekern.topology.sampling import check_generator

log = logging.getLogger(__name__)

INITS = ("sparse", "keep", None)

# objects of their own: a caller's 0.9 beside `masks`, or "sparse", is told from them
_SPARSITY = float("0.9")
_INIT = "".join(("spa", "rse"))


def sparsify_(
    model: nn.Module,
    sparsity: float = _SPARSITY,
    *,
    masks: Mapping[str, Tensor] | None = None,
    plan: Plans | None = None,
    block: Blocks = 1,
    distribution: Distribution = "erk",
    filter_fn: Filter | None = None,
    exclude: Sequence[Pattern] = (),
    init: str | None = _INIT,
    gain: float | str | None = None,
    optimizer: Optimizers = None,
    impl: str | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Replace the model's linear, convolution and recurrent layers by sparse ones, in place.

    `nn.Linear`, `nn.Conv1d`, `nn.Conv2d`, `nn.RNN`, `nn.LSTM`, `nn.GRU` and their cells. The
    matrices of a recurrent layer count one by one, under names such as "rnn.hh_l0".

    Left alone are modules of other types (embeddings, norms, subclasses), layers that share a
    parameter with another module, layers whose weight something else makes (weight norm), output
    heads of language models (`DEFAULT_EXCLUDE`), depthwise convolutions, the model's first
    convolution if the distribution is "uniform" (Evci et al. 2020, section 3), layers that their
    block does not fit, and weights whose share comes out as sparsity 0, which are faster dense.
    `summary` tells why each is dense; the others do not take up its share.

    Layers that `torch.nn.utils.prune` has pruned are taken over with their masks and values,
    whatever `sparsity`, `masks`, `plan` and `init` say of the others. Layers that are sparse
    already become sparser where `masks` or `plan` name them, and with init="keep" to their share of
    the whole matrix; they keep their block, and stay as they are where their share is no more than
    they have. With another `init` a sparsity is shared out to dense layers alone.

    The new layers take over hooks, attributes and flags, and hold the same bias Parameters. Weights
    are new Parameters: give `optimizer`, or build it afterwards.

    Args:
        model: its direct or nested layers are replaced; a bare layer can't be.
        sparsity: of all replaced weights together, in [0, 1).
        masks: connections instead of a sparsity: bool or 0-1 masks of the weights' shapes, by the
            names used here ("fc", "fc.weight", "rnn.hh_l0", "rnn.weight_hh_l0"), made of whole
            blocks. Layers without one, or whose mask leaves nothing out, stay dense. A mask may
            leave a layer or neurons without inputs; that is logged as a warning.
        plan: a `sparsekern.Plan`, made to the letter, instead of a sparsity.
        block: edge or pair (outputs, inputs; channels of a convolution at one tap); a mapping
            from name pattern to block (first match wins, others get 1); or a callable
            (name, module) -> block.
        distribution: "erk", "er" or "uniform"; "global", the largest weights of all layers
            together (blocks by mean magnitude; with init="keep"); a mapping from name pattern to
            sparsity (first match wins, others get `sparsity`); or a callable (name, module) ->
            sparsity.
        filter_fn: (module, name) -> whether to replace it; takes the place of the default
            exclusions.
        exclude: names to leave dense, with all they contain, as globs ("encoder.*.out") or compiled
            regexes.
        init: "sparse": random connections, values drawn for each neuron's real inputs. "keep":
            connections of largest magnitude, with their values (start from a trained model).
            None: random connections, the model's own values. Masks and plans keep their
            connections; masks keep the values too, unless `init` is given.
        gain: of values drawn by init="sparse": standard deviation times the root of a neuron's
            inputs, or the nonlinearity that follows: "relu" is He's sqrt(2). None is torch's own,
            sqrt(1/3).
        optimizer: one or several that hold the model's weights, wrapped ones too: the new weights
            take the places of the old ones in their groups, with the state at the connections
            that stay.
        impl: of the new layers, see `SparseLinear`.
        generator: of random connections and values.

    Returns:
        The same model.

    Raises:
        ConfigError: bad or conflicting arguments, a pattern or name that matches nothing, a model
            inside DistributedDataParallel or FSDP, a sparse layer that an attached method follows,
            or a layer with a method of its own (`layer.forward = ...`).
        DtypeError, ShapeError, TopologyError: a mask or a block that is given to one layer does
            not fit it, or there are more blocks than int32 can count.
        OptimizerError: the optimizer holds none of the weights, or state that can't be moved.
            Whatever is raised, model and optimizer are as they were.
    """
    _check(model, sparsity, init, impl)
    check_generator(generator)
    check_distribution(distribution, init)
    _check_exclusive(sparsity, masks, plan, block, distribution)
    if init is _INIT and masks is not None and gain is None:
        init = "keep"  # a ticket: its weights are as much of it as its mask
    drawing = Drawing(init, _gain(gain, init), impl, generator)
    optimizers = as_optimizers(optimizer)
    known = all_targets(model, sparse=True)
    own_filter = filter_fn or getattr(plan, "filter_fn", None)
    named = masks is not None or plan is not None
    uniform = distribution == "uniform"
    choice = choose(model, known, own_filter, exclude, first_conv_stays=uniform, named=named)
    if not named and init != "keep":  # what is sparse was made so before, and may be trained
        choice = choice._replace(
            targets=[t for t in choice.targets if not isinstance(t.module, SparseLayer)]
        )
    if not choice.targets:
        kinds = ", ".join(f"nn.{kind.__name__}" for kind in SPARSE_TYPES)
        raise ConfigError(f"`model` has no layer left to make sparse ({kinds})")
    pruned = by_pruning(_part(choice, pruned=True), block, [t.name for t in known])
    rest = _part(choice, pruned=False)
    if masks is not None:
        rest = by_masks(model, rest, masks, block, known)
    elif plan is not None:
        rest = by_plan(rest, plan, known)
    else:
        rest = by_distribution(rest, sparsity, distribution, block, [t.name for t in known])
    shares = {**rest.shares, **pruned.shares}
    choice = Choice([*pruned.targets, *rest.targets], rest.dense | pruned.dense, shares)
    made = _made(model, choice.targets, drawing)
    moved = prepare(optimizers, [move for m in made for move in m.moves], staying(model, made))
    asked = None if masks is not None or not isinstance(distribution, str) else sparsity
    asked = plan.sparsity if plan is not None else asked
    _commit(model, made, moved, record.asked(asked, choice))
    _say(made, moved, init)
    tell(model, log)
    return model


def densify_(model: nn.Module) -> nn.Module:
    """Replace the model's sparse layers by torch's, in place, with the same weights.

    They take over hooks, attributes and flags, and hold the same bias Parameters.

    Raises:
        DtypeError: `model` is itself a layer, or no module.
        ConfigError: it is inside DistributedDataParallel or FSDP, or a layer has a method of its
            own. Whatever is raised, the model is as it was.
    """
    check_model(model)
    kinds = SPARSE_KINDS
    if isinstance(model, kinds):
        raise DtypeError("`model` must contain layers; a single one has `to_dense`")
    check_unwrapped(model, "densify_")
    done: set[int] = set()
    made = []
    for name, module in model.named_modules():
        if id(module) not in done and isinstance(module, kinds):
            done.update(map(id, module.modules()))  # a recurrent layer takes its matrices with it
            made.append(dense_layer(name, module))
            follower = next(filter(None, map(follower_name, module.modules())), None)
            if follower:
                made[-1].lost.append(f"the {follower} that follows {name!r}: detach() it")
    _commit(model, made, HandOver(), None)
    _say(made, HandOver(), None)
    return model


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """The model's sparse layers by name, each once; of a recurrent layer, its matrices.

    Raises:
        DtypeError: `model` is no module.
    """
    check_model(model)
    return {name: m for name, m in model.named_modules() if isinstance(m, SparseLayer)}


# ---- arguments


def _check(model: nn.Module, sparsity: float, init: str | None, impl: str | None) -> None:
    check_model(model)
    check_sparsity(sparsity)
    check_impl(impl)
    if init not in INITS:
        raise ConfigError(f"`init` must be one of {INITS}; got {init!r}")
    if weights_of(unpruned(model)):
        raise DtypeError(
            f"`model` must contain layers; for a single one use "
            f"{sparse_type(type(model)).__name__}.from_dense"
        )
    if isinstance(model, SparseLayer):
        raise DtypeError("`model` must contain layers; a single sparse one can't be replaced")
    check_unwrapped(model, "sparsify_")


def _check_exclusive(
    sparsity: float, masks: object, plan: object, block: object, distribution: object
) -> None:
    """Masks, a sparsity and a plan say the same thing in three ways; only one can be given."""
    given = {
        "sparsity": sparsity is not _SPARSITY,
        "masks": masks is not None,
        "plan": plan is not None,
    }
    names = [f"`{name}`" for name, is_given in given.items() if is_given]
    if len(names) > 1:
        raise ConfigError(f"`sparsity`, `masks` and `plan` exclude each other; got {names}")
    if plan is not None and not hasattr(plan, "planned"):
        raise DtypeError(f"`plan` must be a sparsekern.Plan; got {type(plan).__name__}")
    if (masks is not None or plan is not None) and distribution != "erk":
        raise ConfigError(f"{names[0]} leaves nothing to share out by `distribution`")
    if plan is not None and block != 1:
        raise ConfigError(f"`plan` has blocks of its own; got `block` {block!r}")


def _gain(gain: float | str | None, init: str | None) -> float:
    if gain is not None and init != "sparse":
        raise ConfigError(f"`gain` is of values that init='sparse' draws; got init={init!r}")
    return as_gain(gain)


def _part(choice: Choice, *, pruned: bool) -> Choice:
    targets = [t for t in choice.targets if (t.pruned is not None) is pruned]
    return Choice(targets, {} if pruned else choice.dense)


# ---- making and replacing


def _made(model: nn.Module, targets: list[Target], drawing: Drawing) -> list[Made]:
    """The new layers, one for each module; refuses those that a method follows."""
    made = []
    for owner in dict.fromkeys(target.owner for target in targets):
        own = [target for target in targets if target.owner == owner]
        refuse_followed(owner, own[0].module)
        parent = model.get_submodule(owner.rpartition(".")[0])
        made.append(sparse_layer(own, parent, drawing))
    return made


def _commit(
    model: nn.Module, made: list[Made], moved: HandOver, asked: record.Asked | None
) -> None:
    with undoing() as undo:
        replace_all(model, made, undo)
        commit(moved, undo)
        record.write(model, asked, undo)
    describe(model)


def _say(made: list[Made], moved: HandOver, init: str | None) -> None:
    lost = [text for m in made for text in m.lost]
    if lost:
        log.warning("not carried over: %s", "; ".join(lost))
    if init == "sparse" and moved.moves_state and any(m.drawn for m in made):
        log.warning(
            "init='sparse' has drawn new values, but the optimizer's state is of the old ones: "
            "init='keep' or None goes on from them"
        )
