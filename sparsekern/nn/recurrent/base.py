"""What recurrent layers and cells share: named weight matrices, made, drawn and converted."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from sparsekern.errors import ConfigError, DeviceError, DtypeError, ShapeError, WeightError
from sparsekern.nn.connections import check_mask, topology_of
from sparsekern.nn.init import TORCH_GAIN, as_gain, draw_uniform_
from sparsekern.nn.linear import SparseLinear
from sparsekern.nn.recurrent.arguments import Shares, by_name
from sparsekern.topology import Topology
from sparsekern.topology.blocks import Block, check_sparsity

T = TypeVar("T")


def matrices(module: nn.Module) -> dict[str, nn.Parameter]:
    """Weight matrices of a torch recurrent layer or cell, by the names they have here.

    They are `ih_l0`, `hh_l0`, `hr_l0` (a projection), `ih_l0_reverse` and so on; `ih` and `hh` in a
    cell: torch's names without the leading `weight_`.
    """
    return {
        name.removeprefix("weight_"): weight
        for name, weight in module.named_parameters(recurse=False, remove_duplicate=False)
        if name.startswith("weight_")
    }


class SparseRecurrent(nn.Module):
    """Base of recurrent layers and cells: each weight matrix is a submodule.

    A matrix is a `SparseLinear` (outputs are the gates' rows) with its own bias, or an `nn.Linear`
    where it stays dense. What finds, trains and saves sparse layers therefore finds these.
    """

    dense_type: ClassVar[type[nn.Module]]
    """The torch module that this one stands for."""
    arguments: ClassVar[tuple[str, ...]]
    """Its constructor's arguments, which are attributes of both."""

    input_size: int
    hidden_size: int
    bias: bool

    def _shapes(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of each weight matrix, by name."""
        raise NotImplementedError

    def _build(
        self,
        sparsity: Shares,
        block: Block,
        impl: str | None,
        topologies: Mapping[str, Topology | None] | None,
        generator: torch.Generator | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Make the weight matrices, and draw their values."""
        shapes = self._shapes()
        if topologies is None:
            shares: dict[str, float | None] = by_name("sparsity", sparsity, shapes)

            def draw(name: str, share: float | None) -> Topology | None:
                if share is None:
                    return None
                share = check_sparsity(share, f"sparsity of {name}")
                return Topology.random(shapes[name], block, sparsity=share, generator=generator)

            topologies = {name: _named(draw, name, share) for name, share in shares.items()}
        else:
            topologies = by_name("topologies", topologies, shapes)
        for name, (rows, cols) in shapes.items():
            topology, bias = topologies[name], self.bias and not name.startswith("hr")
            where: dict[str, Any] = {
                "device": device or torch.get_default_device(),
                "dtype": dtype or torch.get_default_dtype(),
            }
            if topology is None:
                empty: Any = nn.utils.skip_init  # values are drawn below, here and there
                layer: nn.Module = empty(nn.Linear, cols, rows, bias=bias, **where)
            else:
                unused = torch.Generator("cpu").manual_seed(0)
                layer = SparseLinear(
                    cols, rows, bias, topology=topology, impl=impl, generator=unused, **where
                )
            self.add_module(name, layer)
        self.reset_parameters(generator)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith(("weight_", "bias_")):
            kind, _, matrix = name.partition("_")
            sparse = isinstance(getattr(self, matrix, None), SparseLinear)
            place = "bias" if kind == "bias" else "values" if sparse else "weight"
            raise WeightError(
                f"`{name}` can't be assigned to: write to `{matrix}.{place}`; a dense layer is "
                "taken over by `from_dense`"
            )
        super().__setattr__(name, value)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Give the names of torch's own layer, such as `weight_hh_l0`, to the matrices."""
        for matrix in self._matrices():
            for kind in ("weight", "bias"):
                old, new = f"{prefix}{kind}_{matrix}", f"{prefix}{matrix}.{kind}"
                if old in state_dict and new not in state_dict:
                    state_dict[new] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _matrices(self) -> dict[str, Any]:
        return dict(self.named_children())

    def reset_parameters(
        self,
        generator: torch.Generator | None = None,
        names: Container[str] | None = None,
        gain: float | str = TORCH_GAIN,
    ) -> None:
        """Draw as torch does, from U(-b, b) with b = 1 / sqrt(hidden_size).

        A sparse weight of a neuron with f of n inputs gets 1 / sqrt(hidden_size f / n), so that
        what the neuron sums has the variance it would have at density 1.

        Args:
            generator: to draw from; torch's default one if None.
            names: of the matrices to draw, with their biases; None for all.
            gain: of sparse weights, see `nn.init.as_gain`; other than the default one it scales
                that bound.
        """
        bound, scale = 1 / math.sqrt(self.hidden_size), as_gain(gain)
        for name, layer in self._matrices().items():
            if names is not None and name not in names:
                continue
            if isinstance(layer, SparseLinear):
                layer.reset_values(generator, scale * math.sqrt(layer.in_features) * bound)
            else:
                draw_uniform_(layer.weight.data, generator, bound)
            if layer.bias is not None:
                draw_uniform_(layer.bias.data, generator, bound)

    # ---- conversion

    @classmethod
    def from_dense(
        cls,
        module: nn.Module,
        *,
        sparsity: Shares | None = None,
        mask: Mapping[str, Tensor | None] | None = None,
        block: Block = 1,
        impl: str | None = None,
    ) -> Self:
        """Take over a torch module's weights, biases, settings, dtype, device and training flag.

        Args:
            module: of the torch class of the same name; it is not changed.
            sparsity: keep the blocks of largest summed magnitude, exact to within one block in each
                matrix; one number, or one (None: stays dense) for each name in `matrices(module)`.
            mask: keep these weights; for each of those names a mask of the weight's shape made of
                whole blocks, or None.
            block: edge or pair; without `sparsity` and `mask`, blocks holding a nonzero are kept.
            impl: as in the constructor.

        Raises:
            DtypeError: `module` is of another class.
            ConfigError: both `sparsity` and `mask` are given, or their names are not the matrices'.
            ShapeError, TopologyError: a mask or the block does not fit.
        """
        if not isinstance(module, cls.dense_type):
            raise DtypeError(
                f"`module` must be an nn.{cls.dense_type.__name__}; got {type(module).__name__}"
            )
        if sparsity is not None and mask is not None:
            raise ConfigError("give `sparsity` or `mask`, not both")
        weights = {name: weight.detach() for name, weight in matrices(module).items()}

        def choose(name: str, asked: Any) -> Topology | None:
            weight = weights[name]
            if asked is None:
                return None
            if mask is not None:
                check_mask(asked, weight)
                return topology_of(weight, block, mask=asked)
            return topology_of(weight, block, sparsity=None if sparsity is None else asked)

        asked: Mapping[str, Any] = dict.fromkeys(weights, True)
        if mask is not None:
            asked = by_name("mask", mask, weights)
        elif sparsity is not None:
            asked = by_name("sparsity", sparsity, weights)
        topologies = {name: _named(choose, name, value) for name, value in asked.items()}
        return cls.from_topologies(module, topologies, impl=impl)

    @classmethod
    def from_topologies(
        cls,
        module: nn.Module,
        topologies: Mapping[str, Topology | None],
        *,
        impl: str | None = None,
    ) -> Self:
        """Take over a torch module with the weights that `topologies` make active.

        None leaves a matrix dense; there must be an entry for each name in `matrices(module)`.
        """
        weights = matrices(module)
        like = next(iter(weights.values()))
        made = cls(
            **{name: getattr(module, name) for name in cls.arguments if name != "dropout"},
            topologies=topologies,
            impl=impl,
            generator=torch.Generator("cpu").manual_seed(0),  # all of it is overwritten below
            device=like.device,
            dtype=like.dtype,
        )
        if "dropout" in cls.arguments:
            made.dropout = module.dropout  # set here, it does not warn a second time
        for name, layer in made._matrices().items():
            weight = weights[name].detach()
            if isinstance(layer, SparseLinear):
                layer.set_active_values(layer.topology.pack(weight))
                layer.values.requires_grad_(weights[name].requires_grad)
            else:
                _take(layer.weight, weights[name])
            if layer.bias is not None:
                _take(layer.bias, getattr(module, f"bias_{name}"))
        return made.train(module.training)

    def to_dense(self) -> Any:
        """The torch module with the same weights, zeros filled in."""
        layers = self._matrices()
        first = next(iter(layers.values())).weight
        module: Any = self.dense_type(
            **{name: getattr(self, name) for name in self.arguments if name != "dropout"},
            device=first.device,
            dtype=first.dtype,
        )
        if "dropout" in self.arguments:
            module.dropout = self.dropout
        for name, layer in layers.items():
            weight = getattr(module, f"weight_{name}")
            if isinstance(layer, SparseLinear):
                weight.data.copy_(layer.dense_weight())
                weight.requires_grad_(layer.values.requires_grad)
            else:
                _take(weight, layer.weight)
            if layer.bias is not None:
                _take(getattr(module, f"bias_{name}"), layer.bias)
        return module.train(self.training)

    # ---- arguments of forward

    def _check_tensor(self, name: str, tensor: Any) -> None:
        """Refuse what is no tensor, or of another dtype or device than the weights."""
        if not isinstance(tensor, Tensor):
            raise DtypeError(f"`{name}` must be a tensor; got {type(tensor).__name__}")
        weight = next(iter(self._matrices().values())).weight
        if tensor.device != weight.device:
            raise DeviceError(f"`{name}` must be on {weight.device}; got {tensor.device}")
        if tensor.dtype != weight.dtype and not torch.is_autocast_enabled(tensor.device.type):
            raise DtypeError(f"`{name}` must have dtype {weight.dtype}; got {tensor.dtype}")

    def _initial(
        self, hx: Any, like: Tensor, shapes: Mapping[str, tuple[int, ...]]
    ) -> list[Tensor]:
        """The states of `hx`, checked against `shapes` by name; zeros if it is None."""
        if hx is None:
            return [like.new_zeros(shape) for shape in shapes.values()]
        if len(shapes) == 1:
            hx = (hx,)
        elif not isinstance(hx, tuple | list) or len(hx) != len(shapes):
            got = len(hx) if isinstance(hx, tuple | list) else type(hx).__name__
            raise DtypeError(f"`hx` must be a pair of tensors ({', '.join(shapes)}); got {got}")
        for state, (name, shape) in zip(hx, shapes.items(), strict=True):
            self._check_tensor(name, state)
            if tuple(state.shape) != shape:
                raise ShapeError(f"`{name}` must have shape {shape}; got {tuple(state.shape)}")
        return list(hx)


def uncompiled(run: Callable[..., T], *args: Any) -> T:
    """Call `run`, which `torch.compile` leaves alone: it would unroll all time steps."""
    if torch.compiler.is_compiling():
        # as a decorator it would import the compiler along with this library
        run = torch.compiler.disable(run)  # type: ignore[no-untyped-call]
    return run(*args)


def _named(call: Callable[[str, Any], T], name: str, value: Any) -> T:
    """Call with a matrix's name and value, and say its name in a `ShapeError`."""
    try:
        return call(name, value)
    except ShapeError as error:
        raise ShapeError(f"matrix {name}: {error}") from None


def _take(parameter: nn.Parameter, source: nn.Parameter) -> None:
    parameter.data.copy_(source.detach())
    parameter.requires_grad_(source.requires_grad)
