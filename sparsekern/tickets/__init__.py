"""Masks over torch's own dense layers, how they are found, and their hand-over to sparse ones.

scores = tickets.snip(model, [(x, y)], torch.nn.functional.cross_entropy)
sk.sparsify_(model, masks=tickets.top(scores, 0.95))
"""

from sparsekern.tickets.at_init import grasp, random, snip, synflow
from sparsekern.tickets.controls import CONTROLS, Start, control, retrain
from sparsekern.tickets.imp import imp
from sparsekern.tickets.masks import Masks, Scores, shuffled, top, weights
from sparsekern.tickets.pruning import Pruning
from sparsekern.tickets.ticket import Ticket

__all__ = [
    "CONTROLS",
    "Masks",
    "Pruning",
    "Scores",
    "Start",
    "Ticket",
    "control",
    "grasp",
    "imp",
    "random",
    "retrain",
    "shuffled",
    "snip",
    "synflow",
    "top",
    "weights",
]
