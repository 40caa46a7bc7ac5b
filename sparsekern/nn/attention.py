"""`SparseMultiheadAttention`: a drop-in for `torch.nn.MultiheadAttention`."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparsekern.errors import ConfigError, DtypeError, ShapeError
from sparsekern.nn.attend import attend
from sparsekern.nn.attention_parts import (
    BIASES,
    PROJECTIONS,
    arguments,
    copy_biases,
    projection,
    projections,
    split_packed,
)
from sparsekern.nn.connections import check_mask, topology_of
from sparsekern.nn.init import TORCH_GAIN, as_gain
from sparsekern.nn.linear import SparseLinear
from sparsekern.nn.recurrent.arguments import Shares, by_name
from sparsekern.nn.symbolic import one_node
from sparsekern.nn.view import PackedView
from sparsekern.topology import Topology
from sparsekern.topology.blocks import Block, check_sparsity


class SparseMultiheadAttention(nn.Module):
    """Attention with several heads, as `torch.nn.MultiheadAttention`, with sparse projections.

    The projections are submodules: `q_proj` (E, E), `k_proj` (E, kdim), `v_proj` (E, vdim) and
    `out_proj` (E, E), each a `SparseLinear`, or an `nn.Linear` where it stays dense. Torch's packed
    matrix is three here, so that attention over another sequence computes nothing it does not need,
    no block straddles two of them, and each keeps its number of weights. Torch's fused inference
    path takes dense weights alone and steps aside; nested tensors raise.

    Args:
        embed_dim: features, E.
        num_heads: heads; they divide E.
        dropout: probability of dropping an attention weight in training.
        bias: whether the projections add a bias, which is dense.
        add_bias_kv: add a learned key and value to each sequence.
        add_zero_attn: add a zero key and value to each sequence.
        kdim: features of the keys; None is E.
        vdim: features of the values; None is E.
        batch_first: sequences come as (batch, time, features), not (time, batch, features).
        sparsity: share of the weights that do not exist, in [0, 1); one number, or one for each
            projection by name, where None leaves it dense.
        block: edge or pair (outputs, inputs) of the blocks; 1 is unstructured (CSR).
        impl: None chooses by device, see `sparsekern.ops.resolve`; "masked" is the reference.
        topologies: connections to start from, by name; overrides sparsity and block.
        generator: of random topologies and values; torch's default one if None.
        device: where parameters and index arrays live.
        dtype: of the parameters.

    Raises:
        ConfigError, ShapeError, DtypeError: an argument is out of its domain, or the block is
            larger than a projection.
    """

    _qkv_same_embed_dim = False  # what torch's fused inference path asks before it takes weights
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None
    in_proj_bias: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        *,
        sparsity: Shares = 0.9,
        block: Block = 1,
        impl: str | None = None,
        topologies: Mapping[str, Topology | None] | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ConfigError(
                f"`num_heads` must divide `embed_dim`; got {num_heads} and {embed_dim}"
            )
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self.dropout, self.batch_first = dropout, batch_first
        self.head_dim = embed_dim // num_heads
        self.add_zero_attn = add_zero_attn
        shapes = self._shapes()
        if topologies is None:
            shares: dict[str, float | None] = by_name("sparsity", sparsity, shapes)
            topologies = {
                name: None
                if share is None
                else Topology.random(
                    shapes[name],
                    block,
                    sparsity=check_sparsity(share, f"sparsity of {name}"),
                    generator=generator,
                )
                for name, share in shares.items()
            }
        where: dict[str, Any] = {
            "device": device or torch.get_default_device(),
            "dtype": dtype or torch.get_default_dtype(),
        }
        every: dict[str, Topology | None] = by_name("topologies", topologies, shapes)
        for name, topology in every.items():
            self.add_module(name, projection(name, shapes[name], topology, impl, bias, where))
        one = (1, 1, embed_dim)
        sizes = {"in_proj_bias": (3 * embed_dim,) if bias else None}
        sizes |= dict.fromkeys(BIASES[1:], one if add_bias_kv else None)  # type: ignore[arg-type]
        for name, size in sizes.items():
            empty = None if size is None else nn.Parameter(torch.zeros(size, **where))
            self.register_parameter(name, empty)
        self.reset_parameters(generator)

    def _shapes(self) -> dict[str, tuple[int, int]]:
        E = self.embed_dim
        return dict(zip(PROJECTIONS, ((E, E), (E, self.kdim), (E, self.vdim), (E, E)), strict=True))

    @property
    def is_packed(self) -> bool:
        """Whether torch's layer of this shape holds one matrix for the three projections."""
        return self.kdim == self.vdim == self.embed_dim

    @property
    def in_proj_weight(self) -> PackedView | None:
        """A view of the three projections, as torch's layer packs them; None if it does not."""
        return PackedView(self) if self.is_packed else None

    def reset_parameters(
        self,
        generator: torch.Generator | None = None,
        names: Container[str] | None = None,
        gain: float | str = TORCH_GAIN,
    ) -> None:
        """Draw as torch does: Xavier for the projections of the inputs, biases 0.

        Sparse weights are scaled by the inputs that each neuron really has.
        """
        own = as_gain(gain)
        for name, layer in self.named_children():
            if names is not None and name not in names:
                continue
            scale = own * self.relative_gain(name)
            weight: Any = layer
            if isinstance(layer, SparseLinear):
                layer.reset_values(generator, scale)
            else:
                bound = math.sqrt(3 / weight.in_features) * scale
                with torch.no_grad():
                    weight.weight.uniform_(-bound, bound, generator=generator)
            if weight.bias is not None:
                nn.init.zeros_(weight.bias)
        if names is None:
            for bias in (self.bias_k, self.bias_v):
                if bias is not None:
                    nn.init.xavier_normal_(bias, generator=generator)

    def relative_gain(self, name: str) -> float:
        """Gain of a projection in torch's layer, over that of `nn.Linear`."""
        rows, cols = self._shapes()[name]
        if name == "out_proj":
            return 1.0
        rows = 3 * rows if self.is_packed else rows  # the matrix that torch draws is packed
        return math.sqrt(2 * cols / (rows + cols)) / TORCH_GAIN

    @one_node
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Output and, if asked for, attention weights, as `nn.MultiheadAttention` gives them.

        Args:
            query: (L, B, E), (B, L, E) if batch_first, or (L, E).
            key: (S, B, kdim) and so on.
            value: (S, B, vdim) and so on.
            key_padding_mask: (B, S), bool (True is left out) or added to the scores.
            need_weights: whether to return the attention weights.
            attn_mask: (L, S) or (B num_heads, L, S), bool or added to the scores.
            average_attn_weights: over the heads, else one for each.
            is_causal: a hint that `attn_mask` is the causal one.

        Raises:
            DtypeError: an input is a nested tensor.
            ShapeError: inputs or masks don't fit.
        """
        given = {"query": query, "key": key, "value": value}
        if any(t.is_nested for t in given.values()):
            raise DtypeError(
                "sparse attention takes no nested tensors: pad them (to_padded_tensor)"
            )
        for (name, tensor), size in zip(
            given.items(), (self.embed_dim, self.kdim, self.vdim), strict=True
        ):
            if tensor.dim() not in (2, 3) or tensor.shape[-1] != size:
                raise ShapeError(
                    f"`{name}` must have shape (..., {size}) of 2 or 3 dimensions; got "
                    f"{tuple(tensor.shape)}"
                )
        batched = query.dim() == 3
        if not batched:
            query, key, value = (t.unsqueeze(1) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        if key.shape[:2] != value.shape[:2] or key.shape[1] != query.shape[1]:
            raise ShapeError(
                f"`key` and `value` must have equal lengths, and the batch of `query`; got "
                f"{tuple(key.shape[:2])}, {tuple(value.shape[:2])} and {tuple(query.shape[:2])}"
            )
        q, k, v = self._projected(query, key, value)
        merged, weights = attend(
            q,
            k,
            v,
            self,
            masks=(key_padding_mask, attn_mask),
            need_weights=need_weights,
            is_causal=is_causal,
        )
        out = self.out_proj(merged)
        if batched and self.batch_first:
            out = out.transpose(0, 1)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            out = out.squeeze(1)
            weights = None if weights is None else weights.squeeze(0)
        return out, weights

    def _projected(self, *inputs: Tensor) -> list[Tensor]:
        """The three projections of (time, batch, features)."""
        out = [
            layer(x)
            for layer, x in zip((self.q_proj, self.k_proj, self.v_proj), inputs, strict=True)
        ]
        if self.in_proj_bias is None:
            return out
        biases = self.in_proj_bias.chunk(3)
        return [y + bias.to(y.dtype) for y, bias in zip(out, biases, strict=True)]

    # ---- conversion

    @classmethod
    def from_dense(
        cls,
        module: nn.MultiheadAttention,
        *,
        sparsity: Shares | None = None,
        mask: Mapping[str, Tensor | None] | None = None,
        block: Block = 1,
        impl: str | None = None,
    ) -> Self:
        """Take over torch's layer.

        Args:
            module: it is not changed.
            sparsity: keep the blocks of largest magnitude, one number or one for each projection
                (None: stays dense).
            mask: keep these weights, for each projection a mask of its shape, or None.
            block: edge or pair; without `sparsity` and `mask`, blocks holding a nonzero are kept.
            impl: as in the constructor.

        Raises:
            DtypeError: `module` is of another class.
            ConfigError, ShapeError, TopologyError: arguments conflict or don't fit.
        """
        if not isinstance(module, nn.MultiheadAttention):
            raise DtypeError(
                f"`module` must be an nn.MultiheadAttention; got {type(module).__name__}"
            )
        if sparsity is not None and mask is not None:
            raise ConfigError("give `sparsity` or `mask`, not both")
        weights = projections(module)
        given: Any = sparsity if mask is None else mask
        asked: dict[str, Any] = by_name("sparsity" if mask is None else "mask", given, weights)
        chosen: dict[str, Topology | None] = {}
        for name, value in asked.items():
            if mask is not None and value is not None:
                check_mask(value, weights[name])
                chosen[name] = topology_of(weights[name], block, mask=value)
            elif value is not None or given is None:
                chosen[name] = topology_of(weights[name], block, sparsity=value)
            else:
                chosen[name] = None
        return cls.from_topologies(module, chosen, impl=impl)

    @classmethod
    def from_topologies(
        cls,
        module: nn.MultiheadAttention,
        topologies: Mapping[str, Topology | None],
        *,
        impl: str | None = None,
    ) -> Self:
        """Take over torch's layer with the weights that `topologies` make active.

        None leaves a projection dense; there must be an entry for each of the four.
        """
        weights = projections(module)
        made = cls(
            **arguments(module),
            topologies=topologies,
            impl=impl,
            generator=torch.Generator("cpu").manual_seed(0),  # all of it is overwritten below
            device=weights["out_proj"].device,
            dtype=weights["out_proj"].dtype,
        )
        first: Any = module.in_proj_weight if module._qkv_same_embed_dim else module.q_proj_weight
        for name, weight in weights.items():
            layer: Any = getattr(made, name)
            needs = module.out_proj.weight if name == "out_proj" else first
            if isinstance(layer, SparseLinear):
                layer.set_active_values(layer.topology.pack(weight))
                layer.values.requires_grad_(needs.requires_grad)
            else:
                layer.weight.data.copy_(weight)
                layer.weight.requires_grad_(needs.requires_grad)
        copy_biases(module, made)
        return made.train(module.training)

    def to_dense(self) -> nn.MultiheadAttention:
        """Torch's layer with the same weights, zeros filled in."""
        like: Any = self.out_proj.weight
        module = nn.MultiheadAttention(**arguments(self), device=like.device, dtype=like.dtype)
        held = projections(module)
        for name, layer in self.named_children():
            sparse: Any = layer
            dense = sparse.dense_weight() if isinstance(layer, SparseLinear) else sparse.weight
            held[name].copy_(dense.detach())
        first: Any = self.q_proj.weight
        for name, parameter in module.named_parameters():
            if name.endswith("weight"):
                source = like if name.startswith("out") else first
                parameter.requires_grad_(source.requires_grad)
        copy_biases(self, module)
        return module.train(self.training)

    # ---- torch plumbing

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Take what torch's own layer saves, too."""
        split_packed(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Sizes, as the constructor takes them."""
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, "
            f"batch_first={self.batch_first}"
        )
