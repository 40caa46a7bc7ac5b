"""CIFAR-10 in its published forms, what is refused of them, and augmentation."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsekern.errors import ConfigError, DataError
from sparsekern.training import data
from sparsekern.training.data import cifar, idx

NAMES = (*cifar.TRAIN, cifar.TEST)


class Calls:
    """Unpickled, it would run a command."""

    def __reduce__(self):
        return os.system, ("echo run > /tmp/never",)


def batch(n=4, seed=0):
    r = np.random.default_rng(seed)
    return r.integers(0, 256, (n, 3072)).astype(np.uint8), r.integers(0, 10, n).tolist()


def python_file(x, y, protocol=2):
    names = [f"frog_{i}.png" for i in range(len(y))]
    saved = {"batch_label": "one", "labels": y, "data": x, "filenames": names}
    return pickle.dumps({k.encode(): v for k, v in saved.items()}, protocol)


def binary_file(x, y):
    return np.concatenate([np.array(y, np.uint8)[:, None], x], 1).tobytes()


def contents(binary):
    made = {name: batch(seed=i) for i, name in enumerate(NAMES)}
    if binary:
        return made, {f"{name}.bin": binary_file(*made[name]) for name in NAMES}
    return made, {name: python_file(*made[name]) for name in NAMES}


def put(folder, files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def archive(path, files, mode="w:gz"):
    with tarfile.open(path, mode) as made:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches/{name}")
            info.size = len(content)
            made.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("where", ["files", "folder", "archive", "folder of it", "plain archive"])
def test_cifar_as_it_is_published(tmp_path, binary, where):
    made, files = contents(binary)
    kind = int(binary)
    path = {
        "files": lambda: put(tmp_path / "any", files),
        "folder": lambda: put(tmp_path / cifar._FOLDERS[kind], files).parent,
        "archive": lambda: archive(tmp_path / "a.tar.gz", files),
        "folder of it": lambda: archive(tmp_path / cifar._ARCHIVES[kind], files).parent,
        "plain archive": lambda: archive(tmp_path / "a.tar", files, "w"),
    }[where]()
    got = data.load("cifar-10", path)
    assert (got.image_shape, got.channels, got.pixels, got.inputs) == ((32, 32), 3, 1024, 3072)
    assert got.train_x.shape == (20, 3072)
    assert got.with_channel().test_x.shape == (4, 3, 32, 32)
    assert got.train_y.tolist() == [y for name in cifar.TRAIN for y in made[name][1]]
    assert got.test_y.tolist() == made[cifar.TEST][1]
    raw = torch.from_numpy(np.concatenate([made[name][0] for name in cifar.TRAIN])).float() / 255
    raw = raw.view(-1, 3, 1024)
    spread, mean = torch.std_mean(raw, dim=(0, 2), keepdim=True)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(got.train_x.view(-1, 3, 1024), (raw - mean) / spread, **close)
    torch.testing.assert_close(got.average.flatten(), raw.mean((0, 1)), **close)


X, Y = batch()
SPOILED = {
    "shape": (python_file(X[:, :-1], Y), r"\(n, 3072\), uint8.*3071"),
    "dtype": (python_file(X.astype(np.float32), Y), "uint8.*float32"),
    "labels": (python_file(X, Y[:-1]), "4 labels.*got 3"),
    "label": (python_file(X, [0, 1, 2, 10]), r"\[0, 10\).*10"),
    "negative label": (python_file(X, [0, 1, 2, -1]), r"\[0, 10\)"),
    "no labels": (pickle.dumps({"data": X}, 2), "list of labels"),
    "no data": (pickle.dumps({"labels": Y}, 2), "expected an array"),
    "list": (pickle.dumps([1], 2), "dict of data and labels"),
    "hostile": (pickle.dumps(Calls(), 2), "asks for"),
    "truncated": (python_file(X, Y)[:-500], "CIFAR-10"),
    "empty": (b"", "CIFAR-10"),
}


@pytest.mark.parametrize("in_archive", [False, True])
@pytest.mark.parametrize("what", SPOILED)
def test_spoiled_batches_are_named(tmp_path, what, in_archive):
    content, told = SPOILED[what]
    files = contents(False)[1] | {"data_batch_3": content}
    path = archive(tmp_path / "a.tar.gz", files) if in_archive else put(tmp_path / "a", files)
    with pytest.raises(DataError, match=f"data_batch_3.*{told}"):
        data.load("cifar-10", path)


@pytest.mark.parametrize("content", [b"", binary_file(X, Y)[:-1], binary_file(X, [255] * 4)])
def test_spoiled_records_are_named(tmp_path, content):
    path = put(tmp_path / "a", contents(True)[1] | {"test_batch.bin": content})
    with pytest.raises(DataError, match="test_batch.bin: expected images"):
        data.load("cifar-10", path)


def test_cifar_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="'cifar-10' needs .*cifar.html; got none"):
        data.load("cifar-10")
    with pytest.raises(DataError, match="without data_batch_1,.*published at"):
        data.load("cifar-10", tmp_path)
    files = contents(False)[1]
    del files["test_batch"]
    with pytest.raises(DataError, match=r"without test_batch\."):
        data.load("cifar-10", put(tmp_path / "a", files))
    with pytest.raises(DataError, match=r"without test_batch\."):
        data.load("cifar-10", archive(tmp_path / "a.tgz", files))


def test_archives_that_are_none_or_endless(tmp_path, monkeypatch):
    path = archive(tmp_path / "a.tar.gz", contents(False)[1])
    whole = path.read_bytes()
    for content in (b"", b"\x1f\x8b", whole[: len(whole) // 2], b"x" * 1000):
        path.write_bytes(content)
        with pytest.raises(DataError, match="a.tar.gz"):
            data.load("cifar-10", path)
    monkeypatch.setattr(cifar, "Bounded", lambda file: idx.Bounded(file, 2**20))
    archive(path, {"readme": bytes(2**22)})
    with pytest.raises(DataError, match="a.tar.gz.*at most 1,048,576 bytes"):
        data.load("cifar-10", path)


def test_links_and_folders_in_an_archive_are_left_alone(tmp_path):
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz") as made:
        for name, kind in (("data_batch_1", tarfile.SYMTYPE), ("test_batch", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            made.addfile(info)
    with pytest.raises(DataError, match="without data_batch_1"):
        data.load("cifar-10", path)
    assert sorted(Path(tmp_path).iterdir()) == [path]


# ---- augmentation


def coloured(n=6, edge=16):
    x = torch.randint(-9, 10, (n, 3, edge, edge), generator=torch.Generator().manual_seed(0))
    rows = x.float().flatten(1)
    return data.Images(
        name="cifar-10",
        classes=10,
        train_x=rows,
        train_y=torch.arange(n),
        test_x=rows,
        test_y=torch.arange(n),
        image_shape=(edge, edge),
        average=torch.zeros(edge, edge),
        channels=3,
        augmented=True,
    )


@pytest.mark.parametrize("as_rows", [False, True])
def test_images_are_shifted_and_mirrored_and_nothing_else(as_rows):
    images = coloured() if as_rows else coloured().with_channel()
    kinds = set()
    stream = data.batches(images, 3, seed=1)
    for _ in range(40):
        xs, ys = next(stream)
        assert xs.shape == (3, *images.train_x.shape[1:])
        for x, y in zip(xs.view(3, 3, 16, 16), ys.tolist(), strict=True):
            whole = torch.nn.functional.pad(images.train_x[y].view(3, 16, 16), (2, 2, 2, 2))
            found = [
                (up, left, mirrored)
                for up in range(5)
                for left in range(5)
                for mirrored in (False, True)
                if torch.equal(
                    x.flip(-1) if mirrored else x, whole[:, up : up + 16, left : left + 16]
                )
            ]
            assert len(found) == 1, found
            kinds.update(found)
    assert len(kinds) == 50 or len(kinds) > 40  # 120 draws of 50


def test_augmentation_repeats_by_seed_and_changes_no_data():
    images = coloured()
    before = images.train_x.clone()
    one, two, other = (data.batches(images, 3, seed) for seed in (1, 1, 2))
    drawn = [torch.stack([next(s)[0] for _ in range(4)]) for s in (one, two, other)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(images.train_x, before)
