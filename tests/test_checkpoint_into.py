"""`load` into models that are not yet sparse, or are wrapped; and what it shows of layers."""

import pytest
import torch
from checkpoint_models import dense, equal, sparse, states
from torch import nn

import sparsekern as sk


def test_hooks_and_attributes_survive_a_load_into_a_dense_model(tmp_path):
    path, calls = tmp_path / "m.safetensors", []
    sk.save(path, sparse())
    model = dense()
    bias = model.fc.bias
    model.fc.register_forward_hook(lambda *_: calls.append("fc"))
    model.fc.lr_scale = 0.5
    sk.load(path, model)
    assert isinstance(model.fc, sk.SparseLinear)
    assert model.fc.lr_scale == 0.5
    assert model.fc.bias is bias
    model(torch.ones(2, 2, 3, 3))
    assert calls == ["fc"]


def test_what_a_file_would_resize_or_replace_inside_a_wrapper_is_refused(tmp_path):
    path, group = tmp_path / "m.safetensors", torch.distributed
    sk.save(path, sparse())
    group.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for model, text in ((dense(), "is inside"), (sparse(share=0.8), "counts on the size")):
            wrapped = nn.parallel.DistributedDataParallel(model)
            target = wrapped if text == "is inside" else model
            names = "module." if target is wrapped else ""
            held = path
            if names:
                held = tmp_path / "wrapped.safetensors"
                sk.save(held, nn.ModuleDict({"module": sparse()}))
            before = states(target)
            with pytest.raises(sk.CheckpointError, match=f"{text}"):
                sk.load(held, target)
            assert equal(states(target), before)
            del wrapped
    finally:
        group.destroy_process_group()


def test_a_saved_layer_shows_facts_and_no_numbers(tmp_path):
    path = tmp_path / "m.safetensors"
    sk.save(path, sparse())
    shown = repr(sk.load(path)["fc"])
    assert len(shown) < 250
    assert "Topology(shape=(10, 6)" in shown
    assert "values=torch.float32 of shape" in shown
