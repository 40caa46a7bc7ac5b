"""Masks over torch's own dense layers, how they are found, and their hand-over to sparse ones.

scores = tickets.snip(model, [(x, y)], torch.nn.functional.cross_entropy)
sk.sparsify_(model, masks=tickets.top(scores, 0.95))
"""

from sparsekern.tickets.at_init import grasp, random, snip, synflow
from sparsekern.tickets.basis import Basis, coordinates, from_basis_, hold_, in_basis_
from sparsekern.tickets.controls import CONTROLS, Start, control, retrain
from sparsekern.tickets.deconstruct import CRITERIA, Criterion, pruned, rescaled, survivors
from sparsekern.tickets.imp import imp
from sparsekern.tickets.masks import Masks, Scores, shuffled, top, weights
from sparsekern.tickets.pruning import Pruning
from sparsekern.tickets.supermask import Supermask, supermask_, supermasks, to_sparse_
from sparsekern.tickets.ticket import Ticket

__all__ = [
    "CONTROLS",
    "CRITERIA",
    "Basis",
    "Criterion",
    "Masks",
    "Pruning",
    "Scores",
    "Start",
    "Supermask",
    "Ticket",
    "control",
    "coordinates",
    "from_basis_",
    "grasp",
    "hold_",
    "imp",
    "in_basis_",
    "pruned",
    "random",
    "rescaled",
    "retrain",
    "shuffled",
    "snip",
    "supermask_",
    "supermasks",
    "survivors",
    "synflow",
    "to_sparse_",
    "top",
    "weights",
]
