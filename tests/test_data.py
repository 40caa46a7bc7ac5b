"""Datasets: IDX files round trip, damage is named, the digits split is stratified and fixed."""

import gzip
import math
import struct
import tracemalloc

import numpy as np
import pytest
import torch

from sparsekern.errors import ConfigError, DataError, UnavailableError
from sparsekern.training import data
from sparsekern.training.data import text
from sparsekern.training.data.idx import read_idx

STEMS = tuple(
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)


def idx(array):
    header = struct.pack(f">I{array.ndim}I", 0x0800 | array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def arrays(n_train=30, n_test=20, shape=(5, 4)):
    rng = np.random.default_rng(0)
    out = []
    for n in (n_train, n_test):
        out.append(rng.integers(0, 256, (n, *shape)))
        out.append(np.arange(n) % 10)
    return out


def write(folder, contents, *, zipped):
    for stem, content in zip(STEMS, contents, strict=True):
        path = folder / (f"{stem}.gz" if zipped else stem)
        path.write_bytes(gzip.compress(content) if zipped else content)


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_round_trip(tmp_path, zipped):
    made = arrays()
    write(tmp_path, map(idx, made), zipped=zipped)
    got = data.load("fashion-mnist", tmp_path)
    assert got.image_shape == (5, 4)
    assert got.pixels == 20
    for tensor, array in zip((got.train_x, got.test_x), made[::2], strict=True):
        pixels = torch.tensor(array, dtype=torch.float32) / 255
        spread = (torch.tensor(made[0], dtype=torch.float32) / 255 - got.average).std()
        assert torch.equal(tensor, ((pixels - got.average) / spread).flatten(1))
    for tensor, array in zip((got.train_y, got.test_y), made[1::2], strict=True):
        assert torch.equal(tensor, torch.tensor(array))
    mean = torch.tensor(made[0].mean(0) / 255, dtype=torch.float32)
    assert (got.average - mean).abs().max() < 1e-6


IMAGES, LABELS = idx(arrays()[0]), idx(arrays()[1])
DAMAGE = {
    # damage: (file, its content, what the message says)
    "magic": (0, b"\x00\x00\x0d\x03" + IMAGES[4:], ["expected magic", "0x00000803", "0x00000d03"]),
    "swapped": (0, LABELS, ["0x00000803", "0x00000801"]),
    "empty": (0, b"", ["0x00000803", "got 0x"]),
    "header": (0, IMAGES[:10], ["header of 16 bytes", "got 10"]),
    "truncated": (0, IMAGES[:-1], ["expected 600 bytes", "got 599"]),
    "longer": (0, IMAGES + b"x", ["expected 600 bytes", "got more"]),
    "huge": (
        0,
        struct.pack(">4I", 0x803, *[2**32 - 1] * 3),
        ["at most 536,870,912", "make 79,228"],
    ),
    "lie": (0, struct.pack(">4I", 0x803, 2**9, 2**10, 2**10), ["expected 536,870,912", "got 0"]),
    "no-images": (0, struct.pack(">4I", 0x803, 0, 5, 4), ["positive sizes", "(0, 5, 4)"]),
    "fewer-labels": (1, idx(np.zeros(29)), ["expected 30 labels", "got 29"]),
    "label-range": (1, idx(np.full(30, 10)), ["[0, 10)", "got 10"]),
    "test-shape": (2, idx(np.zeros((20, 4, 4))), ["(5, 4)", "(4, 4)"]),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_named(tmp_path, damage, zipped):
    which, content, fragments = DAMAGE[damage]
    contents = [idx(array) for array in arrays()]
    contents[which] = content
    write(tmp_path, contents, zipped=zipped)
    with pytest.raises(DataError) as caught:
        data.load("fashion-mnist", tmp_path)
    for fragment in [STEMS[which], *fragments]:
        assert fragment in str(caught.value)


@pytest.mark.parametrize("cut", [3, 40, -4])
def test_damaged_gzip_is_a_data_error(tmp_path, cut):
    write(tmp_path, map(idx, arrays()), zipped=True)
    path = tmp_path / f"{STEMS[0]}.gz"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=STEMS[0]):
        data.load("fashion-mnist", tmp_path)


def test_a_flipped_bit_in_a_gzip_is_found(tmp_path):
    write(tmp_path, map(idx, arrays()), zipped=True)
    path = tmp_path / f"{STEMS[0]}.gz"
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # of the sum at the end
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{STEMS[0]}.*CRC"):
        data.load("fashion-mnist", tmp_path)


@pytest.mark.parametrize("rest", [b"", b"no deflate at all", bytes(64)])
def test_garbage_after_the_mark_of_gzip(tmp_path, rest):
    path = tmp_path / "a.gz"
    path.write_bytes(b"\x1f\x8b" + rest)
    with pytest.raises(DataError, match="readable IDX file"):
        read_idx(path, 3)


@pytest.mark.parametrize(
    ("sizes", "told"),
    [((2**10, 2**10, 2**10), "at most 536,870,912"), ((2**5, 2**5, 2**5), "32,768 bytes.*more")],
    ids=["told", "hidden"],
)
def test_a_bomb_takes_no_memory(tmp_path, sizes, told):
    path = tmp_path / "bomb.gz"
    with gzip.open(path, "wb") as file:
        file.write(struct.pack(">4I", 0x803, *sizes))
        for _ in range(64):
            file.write(bytes(2**20))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=told):
            read_idx(path, 3)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * 2**20  # a few chunks, of 64 MiB that lie there


def test_a_text_that_has_no_end_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(2**12))
    monkeypatch.setattr(text, "MOST_TEXT", 2**12)
    assert data.load_text(path, 16).classes == 256
    monkeypatch.setattr(text, "MOST_TEXT", 2**12 - 1)
    with pytest.raises(DataError, match="at most 4,095 bytes; got more"):
        data.load_text(path, 16)


def test_missing_places(tmp_path):
    with pytest.raises(DataError, match=r"must be a folder; got .*nowhere"):
        data.load("fashion-mnist", tmp_path / "nowhere")
    with pytest.raises(DataError, match=rf"expected a file {STEMS[0]}.gz or {STEMS[0]}"):
        data.load("fashion-mnist", tmp_path)
    with pytest.raises(ConfigError, match="needs a data directory"):
        data.load("fashion-mnist")
    with pytest.raises(ConfigError, match="takes no data directory"):
        data.load("digits", tmp_path)
    with pytest.raises(ConfigError, match=r"one of .*digits.*; got 'cifar'"):
        data.load("cifar")


def test_missing_scikit_learn(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    with pytest.raises(UnavailableError, match=r'pip install "sparsekern\[cpu,demo\]"'):
        data.load("digits")


def test_digits_split():
    first, second = data.load_digits(), data.load_digits()
    assert first.image_shape == (8, 8)
    assert torch.equal(first.train_x, second.train_x)
    assert len(first.train_y) + len(first.test_y) == 1797
    assert bool((first.train_x[:, first.average.flatten() == 0] == 0).all())
    assert first.train_x.std().sub(1).abs() < 1e-3
    shares = torch.bincount(first.test_y) / (
        torch.bincount(first.test_y) + torch.bincount(first.train_y)
    )
    assert bool((shares - 0.2).abs().le(0.003).all())
    assert not torch.equal(data.load_digits(seed=1).test_x, first.test_x)


def test_batches_cover_an_epoch_once_and_repeat_by_seed():
    size, n = 4, 10
    rows = torch.arange(n, dtype=torch.float32).view(n, 1)
    labels = torch.arange(n)
    small = data.Images(
        name="digits",
        classes=n,
        train_x=rows,
        train_y=labels,
        test_x=rows,
        test_y=labels,
        image_shape=(1, 1),
        average=rows[:1],
    )
    one, two, other = (data.batches(small, size, seed) for seed in (3, 3, 4))
    drawn = [[next(stream)[1].tolist() for _ in range(6)] for stream in (one, two, other)]
    assert drawn[0] == drawn[1] != drawn[2]
    for epoch in range(3):
        seen = [label for batch in drawn[0][2 * epoch : 2 * epoch + 2] for label in batch]
        assert len(set(seen)) == len(seen) == n // size * size


def test_text_sequences_follow_each_other(tmp_path):
    content = bytes(range(256)) * 2
    (tmp_path / "t").write_bytes(content)
    got = data.load("text", tmp_path / "t", 7)
    assert (got.classes, got.sample) == (256, "sequence of 7 bytes")
    held_out = 512 // 10
    for x, y, part in (
        (got.train_x, got.train_y, content[:-held_out]),
        (got.test_x, got.test_y, content[-held_out:]),
    ):
        n = (len(part) - 1) // 7 * 7
        assert bytes(x.flatten().tolist()) == part[:n]
        assert bytes(y.flatten().tolist()) == part[1 : n + 1]
        assert x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
    x, y = next(data.batches(got, 3, 0))
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert got.unigram_entropy == pytest.approx(math.log2(49), rel=1e-12)  # 49 different bytes


def test_entropy_by_hand(tmp_path):
    (tmp_path / "t").write_bytes(b"x" * 900 + b"aaba" * 25)
    got = data.load("text", tmp_path / "t", 9)  # predicted: 99 bytes after the first
    a, b = 74, 25
    shares = [a / 99, b / 99]
    assert got.unigram_entropy == pytest.approx(-sum(p * math.log2(p) for p in shares), rel=1e-12)


def test_text_that_can_not_be_used_is_named(tmp_path):
    (tmp_path / "short").write_bytes(b"a" * 109)
    with pytest.raises(DataError, match=r"short: expected at least 110 bytes .* of 10; got 109"):
        data.load("text", tmp_path / "short", 10)
    assert len(data.load("text", _written(tmp_path / "enough", b"a" * 110), 10).test_x) == 1
    with pytest.raises(DataError, match="expected a readable text file"):
        data.load("text", tmp_path / "nowhere")
    with pytest.raises(DataError, match="expected a readable text file"):
        data.load("text", tmp_path)
    with pytest.raises(ConfigError, match="needs a file"):
        data.load("text")


def _written(path, content):
    path.write_bytes(content)
    return path
