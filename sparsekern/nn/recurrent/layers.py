"""Running recurrent layers over whole sequences, padded or packed, as torch lays them out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from sparsekern.errors import ConfigError, DtypeError, ShapeError
from sparsekern.nn.recurrent.arguments import check_flag, check_size, checked_dropout
from sparsekern.nn.recurrent.base import SparseRecurrent, uncompiled
from sparsekern.nn.recurrent.gates import KINDS
from sparsekern.nn.recurrent.scan import scan


class RecurrentLayers(SparseRecurrent):
    """Layers over whole sequences; `kind` names the cell."""

    arguments: ClassVar[tuple[str, ...]] = (
        "input_size",
        "hidden_size",
        "num_layers",
        "bias",
        "batch_first",
        "dropout",
        "bidirectional",
    )
    kind: str
    proj_size = 0

    def __init__(
        self,
        kind: str,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        proj_size: int = 0,
    ) -> None:
        super().__init__()
        for name, size in (
            ("input_size", input_size),
            ("hidden_size", hidden_size),
            ("num_layers", num_layers),
        ):
            check_size(name, size)
        for name, flag in (
            ("bias", bias),
            ("batch_first", batch_first),
            ("bidirectional", bidirectional),
        ):
            check_flag(name, flag)
        check_size("proj_size", proj_size, least=0)
        if proj_size >= hidden_size:
            raise ConfigError(
                f"`proj_size` must be smaller than hidden_size = {hidden_size}; got {proj_size}"
            )
        self.kind = kind
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.bidirectional = bias, batch_first, bidirectional
        self.dropout, self.proj_size = checked_dropout(dropout, num_layers), proj_size

    @property
    def _passes(self) -> list[tuple[int, str]]:
        """Layer and name of each pass over the sequence, in torch's order."""
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [(i, f"l{i}{end}") for i in range(self.num_layers) for end in directions]

    def _shapes(self) -> dict[str, tuple[int, int]]:
        rows = KINDS[self.kind].gates * self.hidden_size
        out = self.proj_size or self.hidden_size
        between = out * (2 if self.bidirectional else 1)
        shapes = {}
        for layer, name in self._passes:
            shapes[f"ih_{name}"] = rows, between if layer else self.input_size
            shapes[f"hh_{name}"] = rows, out
            if self.proj_size:
                shapes[f"hr_{name}"] = self.proj_size, self.hidden_size
        return shapes

    # ---- forward

    def _run(self, input: Any, hx: Any) -> tuple[Any, list[Tensor]]:
        """Outputs, packed or padded as the input, and final states as torch lays them out."""
        return uncompiled(self._run_eagerly, input, hx)

    def _run_eagerly(self, input: Any, hx: Any) -> tuple[Any, list[Tensor]]:
        x, sizes = self._tokens(input)
        packed = isinstance(input, PackedSequence)
        batch = () if not packed and input.dim() == 2 else (sizes[0],)
        lead = (len(self._passes), *batch)
        shapes = {"h_0": (*lead, self.proj_size or self.hidden_size)}
        if KINDS[self.kind].states == 2:
            shapes["c_0"] = (*lead, self.hidden_size)
        states = [
            s.view(lead[0], sizes[0], s.shape[-1]) if not batch else s
            for s in self._initial(hx, x, shapes)
        ]
        if packed and input.sorted_indices is not None and hx is not None:
            states = [s.index_select(1, input.sorted_indices) for s in states]
        y, finals = self._over_layers(x, states, sizes)
        if packed:
            if input.unsorted_indices is not None:
                finals = [s.index_select(1, input.unsorted_indices) for s in finals]
            return PackedSequence(y, *input[1:]), finals
        if not batch:
            return y, [s.squeeze(1) for s in finals]
        y = y.view(len(sizes), sizes[0], y.shape[1])
        return y.transpose(0, 1) if self.batch_first else y, finals

    def _tokens(self, input: Any) -> tuple[Tensor, list[int]]:
        """The tokens (sum of lengths, input_size), time step by time step, and their numbers."""
        packed = isinstance(input, PackedSequence)
        x = input.data if packed else input
        if not isinstance(x, Tensor):
            raise DtypeError(
                f"`input` must be a tensor or a PackedSequence; got {type(x).__name__}"
            )
        self._check_tensor("input", x)
        ranks = (2,) if packed else (2, 3)
        if x.dim() not in ranks or x.shape[-1] != self.input_size:
            lead = "batch, time" if self.batch_first else "time, batch"
            n = self.input_size
            expected = f"(tokens, {n})" if packed else f"({lead}, {n}) or (time, {n})"
            raise ShapeError(f"`input` must have shape {expected}; got {tuple(x.shape)}")
        if packed:
            return x, input.batch_sizes.tolist()
        if x.dim() == 3 and self.batch_first:
            x = x.transpose(0, 1)
        if not x.shape[0]:
            raise ShapeError(f"`input` must have at least one time step; got {tuple(input.shape)}")
        sizes = [x.shape[1] if x.dim() == 3 else 1] * x.shape[0]
        return x.reshape(-1, self.input_size), sizes

    def _over_layers(
        self, x: Tensor, states: Sequence[Tensor], sizes: list[int]
    ) -> tuple[Tensor, list[Tensor]]:
        matrices = self._matrices()
        directions: list[Tensor] = []
        finals: list[tuple[Tensor, ...]] = []
        for i, (layer, name) in enumerate(self._passes):
            inputs = matrices[f"ih_{name}"](x)
            y, *final = scan(
                self.kind,
                inputs,
                [s[i].to(inputs.dtype) for s in states],
                matrices[f"hh_{name}"],
                matrices.get(f"hr_{name}"),
                sizes,
                reverse=name.endswith("_reverse"),
            )
            directions.append(y)
            finals.append(tuple(final))
            if len(directions) == len(self._passes) // self.num_layers:
                x = directions[0] if len(directions) == 1 else torch.cat(directions, 1)
                directions = []
                if self.dropout and layer < self.num_layers - 1:
                    x = nn.functional.dropout(x, self.dropout, self.training)
        return x, [torch.stack(s) for s in zip(*finals, strict=True)]

    def flatten_parameters(self) -> None:
        """Do nothing: model code calls it for cuDNN, which is not used here."""

    def extra_repr(self) -> str:
        """As torch's; the matrices tell their sparsity themselves."""
        facts = [f"{self.input_size}, {self.hidden_size}"]
        plain = {
            "proj_size": 0,
            "num_layers": 1,
            "bias": True,
            "batch_first": False,
            "dropout": 0.0,
            "bidirectional": False,
        }
        facts += [f"{k}={getattr(self, k)}" for k, v in plain.items() if getattr(self, k) != v]
        return ", ".join(facts + (["nonlinearity=relu"] if self.kind == "relu" else []))
