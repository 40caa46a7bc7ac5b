"""Damaged and hostile files: each is refused by a typed error, or is a whole checkpoint.

`SPARSEKERN_DAMAGED=20000` mutates that many; SPARSEKERN_DAMAGED_SEED is the first seed.
"""

import contextlib
import json
import os
import random
import struct
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.checkpoint import file

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

COUNT = int(os.environ.get("SPARSEKERN_DAMAGED", "240"))
SEED = int(os.environ.get("SPARSEKERN_DAMAGED_SEED", "0"))
A_CHILD = 120  # mutants of a child process


def build(seed=0, impl=None):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(9, 14), nn.ReLU(), nn.Linear(14, 12), nn.BatchNorm1d(12))
    sk.sparsify_(model, 0.5, block={"0": (2, 3), "2": 1}, distribution="uniform", impl=impl)
    optimizer = torch.optim.Adam(model.parameters())
    method = sk.SET(model, optimizer, t_end=99, update_freq=3)
    return model, optimizer, method


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(3, 9)).sum().backward()
    optimizer.step()


def original(path):
    trio = build()
    for _ in range(3):
        step(*trio[:2])
    sk.save(path, *trio, extra={"step": 3})
    return path.read_bytes()


# ---- mutations of a file


def split(data):
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])


def joined(header, body):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(body)


def sealed(header, body):
    """The file with the digest of what it holds, as somebody who means harm would write it."""
    with tempfile.NamedTemporaryFile() as made:
        metadata = header["__metadata__"]
        plain = {"format": "pt"}
        Path(made.name).write_bytes(joined({**header, "__metadata__": plain}, body))
        with contextlib.suppress(Exception):
            tensors = file.read(Path(made.name)).tensors
            metadata["sparsekern.sha256"] = file._digest(metadata["sparsekern"], tensors)
    return joined(header, body)


def flips(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def header_flips(data, rng):
    size = struct.unpack("<Q", data[:8])[0]
    data = bytearray(data)
    for _ in range(rng.choice((1, 2))):
        data[rng.randrange(8 + size)] = rng.randrange(256)
    return bytes(data)


def cut(data, rng):
    at = rng.randrange(len(data))
    return data[:at] if rng.random() < 0.7 else data + bytes(rng.randrange(1, 99))


def swapped(data, rng):
    a, b = sorted(rng.randrange(len(data)) for _ in range(2))
    return data[:a] + data[b:] if rng.random() < 0.5 else data[:b] + data[a:]


HOSTILE = (0, 1, -1, 2, 3, 7, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63, 2**64, 1.5, None, "x")


def header_edit(data, rng):
    """A name, shape, type or offset of a tensor is another."""
    header, body = split(data)
    name = rng.choice([n for n in header if n != "__metadata__"])
    entry = header[name]
    kind = rng.randrange(6)
    if kind == 0:
        entry["dtype"] = rng.choice(("I32", "F32", "F64", "I64", "BF16", "BOOL", "U8", "F8_E4M3"))
    elif kind == 1:
        entry["shape"] = [*entry["shape"], rng.choice(HOSTILE)][rng.randrange(2) :]
    elif kind == 2:
        entry["data_offsets"][rng.randrange(2)] = rng.choice(HOSTILE)
    elif kind == 3:
        header[rng.choice(("0.weight", "9.values", "", name * 2))] = header.pop(name)
    elif kind == 4:
        other = rng.choice([n for n in header if n != "__metadata__"])
        header[name], header[other] = header[other], entry
    else:
        del header[name]
    return sealed(header, body)


def tensor_edit(data, rng):
    """Entries of a tensor are others, the index arrays above all."""
    header, body = split(data)
    names = [n for n in header if n != "__metadata__"]
    indices = [n for n in names if n.endswith(("crow", "col"))]
    first, last = header[rng.choice(indices * 3 + names)]["data_offsets"]
    for _ in range(rng.choice((1, 1, 3))):
        if last - first < 4:
            break
        at = first + 4 * rng.randrange((last - first) // 4)
        old = struct.unpack("<i", body[at : at + 4])[0]
        new = rng.choice((old + 1, old - 1, -1, 2**31 - 1, -(2**31), 0, rng.randrange(99)))
        body[at : at + 4] = struct.pack("<i", max(min(new, 2**31 - 1), -(2**31)))
    return sealed(header, body)


def places(tree, found):
    """(holder, key) of everything in plain data."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        found.append((tree, key))
        if isinstance(tree[key], dict | list):
            places(tree[key], found)
    return found


def head_edit(data, rng):
    """The plain data is other: layouts, options, names, step counts."""
    header, body = split(data)
    head = json.loads(header["__metadata__"]["sparsekern"])
    for _ in range(rng.choice((1, 1, 2))):
        holder, key = rng.choice(places(head, []))
        kind = rng.randrange(3)
        if kind == 0:
            del holder[key]
        elif kind == 1:
            holder[key] = rng.choice((*HOSTILE, [], {}, {"tensor": "0.col"}, {"dict": [[[], 1]]}))
        else:
            _, (other, its) = None, rng.choice(places(head, []))
            holder[key] = json.loads(json.dumps(other[its]))
    header["__metadata__"]["sparsekern"] = json.dumps(head)
    return sealed(header, body)


def nested(data, rng):
    header, body = split(data)
    depth = rng.choice((60, 300, 3000, 200_000))
    header["__metadata__"]["sparsekern"] = "[" * depth + "]" * depth * rng.randrange(2)
    return sealed(header, body)


MUTATIONS = (
    *(flips, header_flips, cut, swapped, header_edit, header_edit),
    *(tensor_edit, tensor_edit, head_edit, head_edit, nested),
)


# ---- what must hold after each


def whole(model, optimizer=None):
    """Everything has its shape, the topologies are valid, and a step runs."""
    for layer in sk.sparse_layers(model).values():
        topology = layer.topology.validate()
        shape = topology.shape if layer.dense_mask is not None else topology.values_shape
        assert tuple(layer.values.shape) == shape
        assert tuple(layer.bias.shape) == topology.shape[:1]
    if optimizer is not None:
        for p, entries in optimizer.state.items():
            for entry in entries.values():
                fits = not isinstance(entry, torch.Tensor) or entry.dim() == 0
                assert fits or entry.shape == p.shape or 1 in entry.shape
    with torch.no_grad():
        assert model(torch.ones(3, 9)).shape == (3, 12)


def try_file(path, rng):
    """Load a file in one of several ways; returns whether it was taken."""
    impl = rng.choice((None, None, "masked"))
    model, optimizer, method = build(1, impl)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    way = rng.randrange(4)
    try:
        if way == 0:
            for topology, values, _ in sk.load(path).values():
                topology.validate()
                assert tuple(values.shape) in (topology.values_shape, topology.shape)
            return True
        if way == 1:
            sk.load(path, model, optimizer, method)
            whole(model, optimizer)
            return True
        if way == 2:
            sk.load(path, sk.densify_(model))
            whole(model)
            return True
        sk.load(path, model, connections="magnitude", strict=False)
        whole(model)
    except (sk.CheckpointError, sk.TopologyError):
        if way != 2:
            after = model.state_dict()
            assert all(torch.equal(v, after[k]) for k, v in before.items())
            whole(model)
        return False
    return True


def try_state(rng):
    """Load a wrong state_dict as torch does."""
    source, target = build(0)[0], build(1, rng.choice((None, "masked")))[0]
    state = {k: v.clone() for k, v in source.state_dict().items()}
    for name, layer in sk.sparse_layers(source).items():
        if rng.random() < 0.3:
            state |= {f"{name}.{n}": a.clone() for n, a in layer.named_buffers()}
            state.pop(f"{name}.dense_mask", None)
    for _ in range(rng.choice((1, 1, 2))):
        key = rng.choice([k for k in state if k[0] in "02" and isinstance(state[k], torch.Tensor)])
        old = state[key]
        kind = rng.randrange(9)
        if kind == 0 and old.numel() and old.dtype is not torch.bool:
            old.view(-1)[rng.randrange(old.numel())] += rng.choice((1, -1, 99, 10**6))
        elif kind == 1:
            state[key] = old[: rng.randrange(len(old) + 1)]
        elif kind == 2:
            state[key] = old.to(rng.choice((torch.int64, torch.float32, torch.int8, torch.bool)))
        elif kind == 3:
            state[key] = old.unsqueeze(rng.randrange(old.dim() + 1))
        elif kind == 4:
            del state[key]
        elif kind == 5:
            state[key] = rng.choice((None, "text", 3, old.to("meta"), old.tolist()))
        elif kind == 6:
            state[key] = torch.stack([old, old], -1)[..., 0]
        elif kind == 7:
            state[key] = old.flip(0)
        else:
            state[key] = state[rng.choice(list(state))]
    try:
        target.load_state_dict(state, strict=rng.random() < 0.5, assign=rng.random() < 0.5)
    except (sk.SparseKernError, RuntimeError, AttributeError, TypeError):
        taken = False
    else:
        taken = True
    for layer in sk.sparse_layers(target).values():
        with contextlib.suppress(sk.TopologyError):
            layer.topology.validate()
    try:
        with torch.no_grad():
            y = target(torch.ones(3, 9))
    except (sk.SparseKernError, RuntimeError):
        assert not taken, "a state was taken and does not run"
    else:
        whole(target)
        assert y.shape == (3, 12)
    return taken


def mutants(data, numbers, folder):
    """Try these mutants; returns how many were refused and taken."""
    counts = [0, 0]
    path = folder / "mutant"
    for n in numbers:
        rng = random.Random(n)
        with contextlib.redirect_stderr(None):
            try:
                if n % 4 == 3:
                    counts[try_state(rng)] += 1
                    continue
                mutation = MUTATIONS[rng.randrange(len(MUTATIONS))]
                path.write_bytes(mutation(data, rng))
                counts[try_file(path, rng)] += 1
            except Exception:
                sys.__stderr__.write(f"mutant {n}:\n{traceback.format_exc()}\n")
                raise
    return counts


@needs_fork
def test_damaged_files_and_states_are_refused(tmp_path, capfd):
    data = original(tmp_path / "whole")
    trio = build(1)
    sk.load(tmp_path / "whole", *trio)  # warm: what is imported and compiled late is so now
    step(*trio[:2])
    refused, taken, broken = 0, 0, []
    for first in range(SEED, SEED + COUNT, A_CHILD):
        numbers = range(first, min(first + A_CHILD, SEED + COUNT))
        receive, send = os.pipe()
        pid = os.fork()
        if not pid:
            status = 1
            with contextlib.suppress(BaseException):
                os.write(send, json.dumps(mutants(data, numbers, tmp_path)).encode())
                status = 0
            os._exit(status)
        os.close(send)
        with os.fdopen(receive) as answer:
            text = answer.read()
        if os.waitpid(pid, 0)[1]:
            broken.append(first)
            continue
        refused, taken = (a + b for a, b in zip((refused, taken), json.loads(text), strict=True))
    with capfd.disabled():
        print(f"\n{COUNT} mutants from seed {SEED}: {refused} refused, {taken} whole")
    assert not broken, f"children of mutants {broken}: {capfd.readouterr().err[-3000:]}"
    assert refused > COUNT // 3
