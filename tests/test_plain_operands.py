"""What is no plain tensor goes through torch's operators: it is never read as it lies."""

import pytest
import torch

from sparsekern import SparseGRU, SparseGRUCell, SparseLinear, SparseLSTM, SparseLSTMCell
from sparsekern.errors import TopologyError

CELLS = [SparseGRUCell, SparseLSTMCell]
LAYERS = [SparseGRU, SparseLSTM]


def negated(x):
    """A tensor equal to `x` whose negation is lazy."""
    view = torch._neg_view(-x)
    assert view.is_neg()
    return view


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("what", ["input", "hx"])
def test_a_lazily_negated_operand_of_a_cell(kind, what):
    cell, x, h = kind(24, 32, sparsity=0.5), torch.randn(3, 24), torch.randn(3, 32)
    given = {"input": x, "hx": h}

    def run(given):
        state = given["hx"]
        made = cell(given["input"], (state, h) if kind is SparseLSTMCell else state)
        return made[0] if isinstance(made, tuple) else made

    assert torch.equal(run(given | {what: negated(given[what])}), run(given))


def column_major(t):
    """Equal values in another memory format, as a hook on saved tensors may give them back."""
    return t.t().contiguous().t() if t.dim() == 2 else t


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("block", [1, 16])
def test_saved_tensors_in_another_memory_format(kind, block):
    layer = kind(24, 32, sparsity=0.5, block=block, dtype=torch.float64)

    def gradients(pack):
        x = torch.randn(5, 3, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        layer.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = layer(x.requires_grad_())[0]
        y.square().sum().backward()
        return [x.grad, *(p.grad for p in layer.parameters())]

    for got, want in zip(gradients(column_major), gradients(lambda t: t), strict=True):
        # two orders of sums over five steps: rounding of 2^-53 grows by far less than 2^13
        assert bool(((got - want).abs() <= 2.0**-40 * want.abs().max()).all())


def test_gradients_of_a_batch_at_once():
    layer, x = SparseLinear(24, 32, sparsity=0.5), torch.randn(3, 24, requires_grad=True)
    y = layer(x)
    dys = torch.randint(-3, 4, (4, 3, 32)).float()
    together = torch.autograd.grad(y, x, dys, retain_graph=True, is_grads_batched=True)[0]
    single = [torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in dys]
    assert torch.equal(together, torch.stack(single))


@pytest.mark.parametrize("change", [lambda a: a.long(), lambda a: a.repeat(2)[::2]])
def test_an_update_vouches_for_no_foreign_buffer(change):
    layer = SparseLinear(24, 32, sparsity=0.5)
    topology = layer.topology.clone()
    source = torch.arange(topology.nnzb)
    layer.col = change(layer.col)
    with pytest.raises(TopologyError, match="`col` must"):
        layer.rewire_(topology, source, [layer.values.data])
