"""Sparse-aware initialisation: each neuron is scaled by the inputs it really has."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsekern.errors import ConfigError, DtypeError
from sparsekern.topology import Topology, native
from sparsekern.topology.sampling import check_generator

TORCH_GAIN = math.sqrt(1 / 3)
"""Gain that makes a layer at density 1 start like `torch.nn.Linear`; He's is sqrt(2)."""


NONLINEARITIES = ("linear", "sigmoid", "tanh", "relu", "leaky_relu", "selu")
"""Names of gains, as `torch.nn.init.calculate_gain` knows them."""


def as_gain(gain: float | str | None) -> float:
    """A gain as a number: standard deviation times the root of a neuron's active inputs.

    Args:
        gain: that number; the nonlinearity that follows, in `NONLINEARITIES`: "relu" is He's
            sqrt(2) (He et al. 2015, equation 10); None is torch's own, `TORCH_GAIN`.

    Raises:
        ConfigError: it is not positive and finite, or an unknown name.
        DtypeError: it is neither a number nor a name.
    """
    if gain is None:
        return TORCH_GAIN
    if isinstance(gain, str):
        if gain not in NONLINEARITIES:
            raise ConfigError(f"`gain` must be a number or one of {NONLINEARITIES}; got {gain!r}")
        return float(torch.nn.init.calculate_gain(gain))  # type: ignore[arg-type]
    if isinstance(gain, bool) or not isinstance(gain, int | float):
        raise DtypeError(f"`gain` must be a number or one of {NONLINEARITIES}; got {gain!r}")
    if not 0 < gain < math.inf:
        raise ConfigError(f"`gain` must be positive and finite; got {gain}")
    return float(gain)


def fan_in(topology: Topology) -> Tensor:
    """Active inputs of each output: (rows,) float32; padding does not count."""
    grid, bh = topology.grid, topology.block[0]
    if grid.part[1] % grid.block[1]:
        widths = torch.tensor(grid.block_sizes(1), dtype=torch.float32, device=topology.device)
        per_block_row = widths.new_zeros(topology.block_rows)
        per_block_row.index_add_(0, topology.slot_rows(), widths[topology.col.long()])
    else:  # all blocks are equally wide
        per_block_row = topology.crow.diff().to(torch.float32) * grid.block[1]
    per_row = per_block_row.repeat_interleave(bh, output_size=topology.block_rows * bh)
    return per_row.view(topology.groups, -1)[:, : grid.part[0]].flatten()


def bounds(topology: Topology, gain: float = TORCH_GAIN) -> Tensor:
    """Half-width of the uniform distribution of each stored weight: (nnzb, bh, 1).

    The standard deviation is gain / sqrt(fan_in of the neuron), as in Evci et al. 2022, "Gradient
    flow in sparse neural networks", section 3. A neuron without inputs counts as having one.
    """
    slots = topology.crow.long().diff()
    per_row = _row_bounds(topology, gain)
    return per_row.repeat_interleave(slots, 0, output_size=topology.nnzb).unsqueeze(-1)


def _row_bounds(topology: Topology, gain: float) -> Tensor:
    """`bounds` by neuron: (block rows, bh)."""
    grid = topology.grid
    per_row = gain * (3 / fan_in(topology).clamp_(min=1)).sqrt()
    padded = per_row.new_zeros(topology.groups, grid.part_blocks[0] * topology.block[0])
    padded[:, : grid.part[0]] = per_row.view(topology.groups, -1)
    return padded.view(topology.block_rows, -1)


def sparse_uniform_(
    values: Tensor,
    topology: Topology,
    gain: float = TORCH_GAIN,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill `values` (nnzb, bh, bw) from U(-b, b), b per neuron from `bounds`; padding gets 0."""
    with torch.no_grad():
        draw_uniform_(values, generator)
        compiled = native.loops(values.numel(), values, topology.crow)
        if compiled is None:
            values.mul_(bounds(topology, gain).to(values.dtype))
        else:
            per_row = _row_bounds(topology, gain).to(values.dtype)
            compiled.scale_rows(values.detach().numpy(), topology.crow.numpy(), per_row.numpy())
        return topology.clear_padding_(values)


def draw_uniform_(
    tensor: Tensor, generator: torch.Generator | None = None, limit: float = 1.0
) -> Tensor:
    """Fill from U(-limit, limit), drawing on the generator's device: one serves all devices."""
    check_generator(generator)
    if generator is None or generator.device == tensor.device:
        return tensor.uniform_(-limit, limit, generator=generator)
    drawn = torch.empty(tensor.shape, dtype=tensor.dtype, device=generator.device)
    return tensor.copy_(drawn.uniform_(-limit, limit, generator=generator))
