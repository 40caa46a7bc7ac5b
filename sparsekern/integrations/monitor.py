"""What a training method did, as figures for a logger: the same names in every trainer."""

from __future__ import annotations

from sparsekern.methods import Method


class Monitor:
    """Tells what is new about a method since it was last asked.

        monitor = Monitor(method)
        ...
        optimizer.step()
        for name, value in monitor.news().items():
            writer.add_scalar(name, value, step)  # TensorBoard's, or any other

    What the method did before the monitor was made is no news.

    Args:
        method: attached to an optimizer, see `sparsekern.Method`.
        by_layer: tell the blocks dropped and grown in each layer too.
    """

    def __init__(self, method: Method, *, by_layer: bool = False) -> None:
        self.method, self.by_layer = method, by_layer
        self._seen = len(method.history)
        self._told: tuple[int, int] | None = None

    def news(self) -> dict[str, float]:
        """The figures, or nothing if no update was made or postponed since the last time.

        The first time they come in any case.

        - `sparsity/sparsity`: share of the weights of the method's layers that are zero;
        - `sparsity/updates`: topology updates so far, before a resume too;
        - `sparsity/dropped`, `sparsity/grown`: blocks, in the updates since the last time; those
          that were dropped and grown again at once are among the dropped only;
        - `sparsity/drop_fraction`: of the last update;
        - `sparsity/postponed`: batches on which a due update was not made, of this process;
        - `sparsity/weight_steps`: steps that changed weights.
        """
        history = self.method.history
        now = len(history), self.method.postponed
        if now == self._told:
            return {}
        new = history[self._seen :]
        self._told, self._seen = now, len(history)
        figures = {"sparsity": self._sparsity(), "updates": float(len(history))}
        for what in ("dropped", "grown"):
            counts = dict.fromkeys(self.method.layers, 0)
            for record in new:
                for name, layer in record.layers.items():
                    counts[name] = counts.get(name, 0) + getattr(layer, what)
            figures[what] = float(sum(counts.values()))
            if self.by_layer:
                figures |= {f"{what}/{name}": float(n) for name, n in counts.items()}
        figures["drop_fraction"] = float(history[-1].fraction) if history else 0.0
        figures["postponed"] = float(self.method.postponed)
        figures["weight_steps"] = float(self.method.weight_steps)
        return {f"sparsity/{name}": value for name, value in figures.items()}

    def _sparsity(self) -> float:
        layers = self.method.layers.values()
        total = sum(layer.matrix_shape[0] * layer.matrix_shape[1] for layer in layers)
        return 1 - sum(layer.nnz for layer in layers) / total
