"""What became of the topologies, kept with a method and resumed with it."""

from __future__ import annotations

import logging
from typing import Any

import torch

from sparsekern.methods import progress
from sparsekern.methods.holding import Holds
from sparsekern.methods.progress import Progress
from sparsekern.methods.trace import Exploration, Trace, check_fits, exploration

log = logging.getLogger(__name__)


class Traced(Holds):
    """A loop that keeps the start of its layers, and what they explored where that is wanted."""

    _trace = Trace({}, None)

    def exploration(self) -> Exploration:
        """How much of each layer was ever active, and how many bytes it takes to know.

        Raises:
            ConfigError: the method was not made with `exploration=True`.
        """
        return exploration(self._trace, self.layers)

    def _explores(self) -> bool:
        return self._trace.explored is not None

    def _progress(self) -> Progress:
        return super()._progress()._replace(trace=self._trace)

    def _check(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        super()._check(optimizer, state)
        found = progress.in_group(state["param_groups"])
        if found is not None and (trace := progress.decode(found).trace) is not None:
            check_fits(trace, self.layers)

    def _resume(self, found: Progress) -> None:
        if found.trace is not None:
            check_fits(found.trace, self.layers)
        super()._resume(found)
        begins = found.last_update is None
        trace = found.trace or Trace({} if begins else None, None)
        if self._explores():
            if trace.explored is None and not begins:
                log.warning("the method's state tells of no exploration: it counts from here on")
            trace = trace._replace(explored=trace.explored or {})
        elif trace.explored is not None:
            log.warning("the method's state tells of exploration, which is followed no longer")
            trace = trace._replace(explored=None)
        self._trace = trace
