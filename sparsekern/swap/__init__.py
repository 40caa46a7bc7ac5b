"""What of a model becomes sparse: by a distribution, a mask or a plan, and back."""

from sparsekern.swap.facts import topology_facts
from sparsekern.swap.patterns import Pattern
from sparsekern.swap.shares import Blocks, Distribution, Planned
from sparsekern.swap.sparsify import INITS, densify_, sparse_layers, sparsify_
from sparsekern.swap.summary import Summary, SummaryRow, summary
from sparsekern.swap.targets import DEFAULT_EXCLUDE, Target, all_targets, candidates

__all__ = [
    "DEFAULT_EXCLUDE",
    "INITS",
    "Blocks",
    "Distribution",
    "Pattern",
    "Planned",
    "Summary",
    "SummaryRow",
    "Target",
    "all_targets",
    "candidates",
    "densify_",
    "sparse_layers",
    "sparsify_",
    "summary",
    "topology_facts",
]
