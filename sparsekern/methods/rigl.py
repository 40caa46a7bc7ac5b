"""RigL: drop the smallest weights, grow where the dense gradient is largest.

Evci, Gale, Menick, Castro, Elsen, "Rigging the Lottery: Making All Tickets Winners", ICML 2020,
Algorithm 1.
"""

from __future__ import annotations

from sparsekern.methods.base import Method
from sparsekern.methods.sources import Gradient


class RigL(Method):
    """Train with RigL; arguments as in `Method`.

        sparsify_(model, sparsity=0.9)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        RigL(model, optimizer, t_end=int(0.75 * steps))   # the loop stays as it is

    On the batch of an update the dense gradient is streamed slab by slab inside backward, one layer
    at a time; on all other batches nothing dense is computed. Over several micro-batches
    (`grad_accumulation`) the score is the magnitude of their summed gradient, as if they were one
    batch. Over several ranks the signed gradients are summed first. An update whose gradient is not
    finite does not happen; it waits for the next batch.
    """

    source = Gradient
