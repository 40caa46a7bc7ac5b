"""Sparse models in transformers' `save_pretrained` and `from_pretrained`.

transformers asks its registry of quantizers how a model differs from what its class builds. What is
sparse is one more answer: config.json gets shape, block and number of blocks of each sparse layer,
and the file of weights holds values and connections. `sparsify_` imports this module, and describes
the model, where it is one of transformers'; a process that only loads must import it first.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparsekern.checkpoint.layers import SavedLayer, fit, topology_at
from sparsekern.errors import CheckpointError, ConfigError
from sparsekern.nn import SparseLayer
from sparsekern.nn.recurrent import SparseRecurrent
from sparsekern.nn.sharded import is_sharded
from sparsekern.swap import densify_, sparse_layers
from sparsekern.topology import Topology
from sparsekern.topology.blocks import Grid

METHOD = "sparsekern"


@register_quantization_config(METHOD)
class SparseConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What config.json says of a sparse model.

    Attributes:
        layers: for each sparse layer, by name, rows, cols, block height and width, groups, taps and
            the number of active blocks.
    """

    def __init__(self, layers: dict[str, list[int]] | None = None, **_: Any) -> None:
        self.quant_method = METHOD
        self.layers = {} if layers is None else layers


@register_quantizer(METHOD)
class SparseQuantizer(HfQuantizer):  # type: ignore[misc]
    """Makes the layers of a model sparse before its weights are loaded, and checks them after."""

    requires_calibration = False

    def __init__(self, quantization_config: SparseConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise ConfigError(
                "a dense checkpoint can't be loaded as a sparse model: load it, then call sparsify_"
            )

    def is_serializable(self) -> bool:
        """It is: values and connections are in the model's state."""
        return True

    @property
    def is_trainable(self) -> bool:
        """It is what this library is for."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """All weights are trained, not only adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """As any model."""
        return True

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        layers = self.quantization_config.layers
        if not isinstance(layers, dict):
            raise CheckpointError("`layers` of the quantization config must be an object")
        with torch.device("cpu"), ExitStack() as undo:  # the default is the meta device here
            saved = {name: _placeholder(name, facts) for name, facts in layers.items()}
            fit(model, saved, undo)
            undo.pop_all()
        guard = _guard(model)
        if guard is not None:
            ignored: Any = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
            pattern = guard.replace(".", r"\.") + "$"
            own: Any = model
            own._keys_to_ignore_on_load_unexpected = {*(ignored or ()), pattern}
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        for name, layer in sparse_layers(model).items():
            if layer.values.is_meta:
                continue  # offloaded, or built without weights
            try:
                layer.load_state_dict({k: v.clone() for k, v in layer.state_dict().items()})
            except (ValueError, RuntimeError) as error:
                raise CheckpointError(
                    f"sparse layer {name!r} of the checkpoint: {error}"
                ) from error
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[Any, dict[str, str]]:
        """The model's state, as it is now, and its description in the config.

        One entry stands where a dense model has a weight, with no numbers in it: a process that
        does not know of sparse models raises over its shape instead of drawing weights at random.

        Raises:
            CheckpointError: ranks hold parts of the model. transformers asks on rank 0 alone, and
                does not hand on what was gathered before.
        """
        cut = next((n for n, p in model.named_parameters() if is_sharded(p)), None)
        if cut is not None:
            raise CheckpointError(
                f"{cut!r} is sharded over ranks, so save_pretrained can't write this sparse model: "
                "save it with torch.distributed.checkpoint, or gather its state on all ranks by "
                "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)), load "
                "that into a model that is not sharded, and save that one"
            )
        describe_(model)
        state: dict[str, Tensor] = dict(model.state_dict())
        guard = _guard(model)
        if guard is not None:
            state[guard] = torch.empty(0)
        return state, {}

    def _dequantize(self, model: nn.Module, dtype: Any = None) -> nn.Module:
        densify_(model)
        return model if dtype is None else model.to(dtype)


def describe_(model: Any) -> None:
    """Let a model of transformers, and its config, say which layers are sparse now."""
    layers = {name: [*layer._held().layout, layer._held().nnzb] for name, layer in _all(model)}
    if layers:
        quantizer = SparseQuantizer(SparseConfig(layers), pre_quantized=True)
        model.config.quantization_config = quantizer.quantization_config
        model.hf_quantizer, model.is_quantized = quantizer, True
        model.quantization_method = METHOD
    elif isinstance(getattr(model, "hf_quantizer", None), SparseQuantizer):
        model.hf_quantizer.remove_quantization_config(model)


def _all(model: nn.Module) -> list[tuple[str, SparseLayer]]:
    return list(sparse_layers(model).items())


def _placeholder(name: str, facts: Any) -> SavedLayer:
    """A layer of this size with connections that are to be overwritten."""
    if not isinstance(facts, list) or [type(n) for n in facts] != [int] * 7:
        raise CheckpointError(f"layer {name!r} must be described by seven ints; got {facts!r:.60}")
    *layout, nnzb = facts
    grid = Grid.of((layout[0], layout[1]), (layout[2], layout[3]), layout[4], layout[5])
    if not 0 <= nnzb <= grid.rows * grid.cols:
        raise CheckpointError(f"layer {name!r} can't have {nnzb} active blocks")
    crow = (torch.arange(grid.rows + 1) * grid.cols).clamp_(max=nnzb).to(torch.int32)
    col = (torch.arange(nnzb) % max(grid.cols, 1)).to(torch.int32)
    topology: Topology = topology_at(name, layout, crow, col)
    return SavedLayer(topology, torch.empty(topology.values_shape, device="meta"), None)


def _guard(model: nn.Module) -> str | None:
    """Name that a dense model gives to the weight of the first sparse layer it has."""
    for name, module in model.named_modules():
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, SparseLayer) and not isinstance(parent, SparseRecurrent):
            return f"{name}.weight"
    return None
