"""Models of transformers, tiny and random: trained as their masked twins, saved and rebuilt."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparsekern as sk

T = pytest.importorskip("transformers")
ROOT = Path(sk.__file__).parent.parent

LANGUAGE = {"vocab_size": 96, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
LLAMA = LANGUAGE | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BERT = LANGUAGE | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
MODELS = {
    "gpt2": lambda: T.GPT2LMHeadModel(T.GPT2Config(n_embd=32, n_layer=2, n_head=4, **LANGUAGE)),
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**LLAMA)),
    "qwen2": lambda: T.Qwen2ForCausalLM(T.Qwen2Config(**LLAMA)),
    "mixtral": lambda: T.MixtralForCausalLM(
        # the other way of running experts takes no float64
        T.MixtralConfig(num_local_experts=4, experts_implementation="eager", **LLAMA)
    ),
    "mamba": lambda: T.MambaForCausalLM(
        T.MambaConfig(hidden_size=32, state_size=8, num_hidden_layers=2, **LANGUAGE)
    ),
    "bert": lambda: T.BertForMaskedLM(T.BertConfig(**BERT)),
    "albert": lambda: T.AlbertForMaskedLM(T.AlbertConfig(embedding_size=16, **BERT)),
    "t5": lambda: T.T5ForConditionalGeneration(
        T.T5Config(
            vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
            decoder_start_token_id=0,
        )
    ),
    "vit": lambda: T.ViTForImageClassification(
        T.ViTConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            image_size=16, patch_size=4, num_labels=3,
        )
    ),
    "resnet": lambda: T.ResNetForImageClassification(
        T.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_labels=3)
    ),
}  # fmt: skip
PICTURES = ("vit", "resnet")
GENERATING = ("gpt2", "llama", "qwen2", "mixtral", "mamba", "t5")


def batch(name, seed):
    g = torch.Generator().manual_seed(seed)
    if name in PICTURES:
        size = 16 if name == "vit" else 32
        pixels = torch.randn(3, 3, size, size, generator=g, dtype=torch.float64)
        return {"pixel_values": pixels, "labels": torch.randint(0, 3, (3,), generator=g)}
    tokens = torch.randint(3, 96, (2, 8), generator=g)
    return {"input_ids": tokens, "labels": tokens}


def trained(name, block, impl):
    torch.manual_seed(0)
    model = MODELS[name]().double().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    g = torch.Generator().manual_seed(1)
    sk.sparsify_(model, 0.6, block=block, impl=impl, generator=g)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rigl = sk.RigL(model, optimizer, t_end=20, update_freq=5)
    step, topologies = 0, []
    while rigl.weight_steps < 20:
        optimizer.zero_grad()
        torch.manual_seed(step)
        model(**batch(name, step)).loss.backward()
        optimizer.step()
        step += 1
        topologies.append([m.topology.digest() for m in sk.sparse_layers(model).values()])
    assert len(rigl.history) >= 3
    rigl.detach()
    return model, topologies


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains_as_its_masked_twin_and_comes_back(name, block, tmp_path):
    model, topologies = trained(name, block, None)
    twin, others = trained(name, block, "masked")
    assert topologies == others
    for key, layer in sk.sparse_layers(model).items():
        weight, other = layer.dense_weight(), twin.get_submodule(key).dense_weight()
        # rounding errors of 2^-53 grow over 20 steps by far less than the 2^23 that is left
        assert bool(((weight - other).abs() <= 2.0**-30 * other.abs().max()).all()), key
    model.eval()
    model.save_pretrained(tmp_path)
    settings = {"experts_implementation": "eager"} if name == "mixtral" else {}
    back = type(model).from_pretrained(tmp_path, dtype=torch.float64, **settings)
    given = batch(name, 0)
    with torch.no_grad():
        wanted = model(**given).logits
        assert sk.sparse_layers(back).keys() == sk.sparse_layers(model).keys()
        assert torch.equal(back(**given).logits, wanted)
        if name in GENERATING:
            ids = given["input_ids"]
            how = {"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4}
            assert torch.equal(back.generate(ids, **how), model.generate(ids, **how))
        sk.densify_(back)
        assert not sk.sparse_layers(back)
        dense = back(**given).logits
        # as many roundings as the longest sums have terms, through few layers
        assert bool(((dense - wanted).abs() <= 2.0**-40 * wanted.abs().max()).all())
    back.save_pretrained(tmp_path / "dense")
    again = type(model).from_pretrained(tmp_path / "dense", dtype=torch.float64, **settings)
    # the numbers; where they lie in memory decides about the last bit of a product
    state, loaded = back.state_dict(), again.state_dict()
    assert state.keys() == loaded.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())


def test_gpt2_becomes_what_it_was():
    model = MODELS["gpt2"]()
    kind = type(model.transformer.h[0].attn.c_attn)
    sk.sparsify_(model, 0.5)
    assert type(model.transformer.h[0].attn.c_attn) is not kind
    sk.densify_(model)
    assert type(model.transformer.h[0].attn.c_attn) is kind


@pytest.mark.parametrize(
    ("name", "part", "why"),
    [
        ("mixtral", "experts", "experts have"),
        ("mamba", "x_proj", "multiplies by its weight itself"),
        ("gpt2", "wte", "shares"),
    ],
)
def test_what_stays_dense_is_named(name, part, why):
    told = sk.summary(sk.sparsify_(MODELS[name](), 0.9)).dense
    found = [text for key, text in told.items() if part in key]
    assert found
    assert all(why in text for text in found)


def test_who_does_not_know_of_sparse_models_raises(tmp_path):
    model = sk.sparsify_(MODELS["llama"](), 0.8)
    model.save_pretrained(tmp_path)
    load = f"T.LlamaForCausalLM.from_pretrained({str(tmp_path)!r})"
    # torchvision may be built for another torch
    code = f"import sys; sys.modules['torchvision'] = None; import transformers as T; {load}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "mismatch" in run.stderr


def test_a_model_that_ranks_share_is_refused_by_name(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = sk.sparsify_(MODELS["llama"](), 0.8)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(sk.CheckpointError, match="is sharded over ranks, so save_pretrained"):
            model.save_pretrained(tmp_path)
    finally:
        dist.destroy_process_group()


def test_transformers_imports_from_the_root_of_a_clone():
    code = "import transformers as T; T.OPTForCausalLM"
    start = f"import sys; sys.modules['torchvision'] = None; {code}"
    command = [sys.executable, "-c", start]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_trainer_takes_a_loaded_model(tmp_path):
    pytest.importorskip("accelerate")
    sk.sparsify_(MODELS["llama"](), 0.8).save_pretrained(tmp_path / "model")
    model = T.LlamaForCausalLM.from_pretrained(tmp_path / "model")
    rows = [{"input_ids": t, "labels": t} for t in torch.randint(3, 96, (8, 6))]
    settings = T.TrainingArguments(
        str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=2, report_to=[],
        use_cpu=True, save_steps=2,
    )  # fmt: skip
    T.Trainer(model, settings, train_dataset=rows).train()
    back = T.LlamaForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-2")
    for (name, a), b in zip(
        sk.sparse_layers(model).items(), sk.sparse_layers(back).values(), strict=True
    ):
        assert torch.equal(a.dense_weight(), b.dense_weight()), name


def test_low_rank_adapters_on_sparse_layers():
    peft = pytest.importorskip("peft")
    model = sk.sparsify_(MODELS["llama"](), 0.8)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="SparseLinear"):
        peft.get_peft_model(model, config)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    config._register_custom_module({sk.SparseLinear: peft.tuners.lora.layer.Linear})
    model = peft.get_peft_model(sk.sparsify_(MODELS["llama"](), 0.8), config)
    given = batch("llama", 0)
    model(**given).loss.backward()
    trained = [n for n, p in model.named_parameters() if p.grad is not None]
    assert trained
    assert all("lora_" in name for name in trained)
    with pytest.raises(sk.WeightError):
        model.merge_and_unload()


def test_adapters_stay_dense_when_the_model_turns_sparse():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(MODELS["llama"](), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    sk.sparsify_(model, 0.8)
    assert not any("lora_" in name for name in sk.sparse_layers(model))
    assert any("base_layer" in name for name in sk.sparse_layers(model))
