"""`examples/imagenet_resnet50.py` on generated images: dense and sparse, killed and resumed."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from processes import DiedError, FailedError, ranks
from torch.utils._pytree import tree_map

import sparsekern

Image = pytest.importorskip("PIL.Image")

EXAMPLES = Path(sparsekern.__file__).resolve().parent.parent / "examples"
SMALL = ["--model", "tiny", "--image-size", "16", "--batch", "8", "--steps", "12"]
SMALL += ["--workers", "0", "--update-freq", "3", "--sparsity", "0.6", "--save-every", "3"]


def example(name="imagenet_resnet50"):
    sys.path.insert(0, str(EXAMPLES))
    try:
        return __import__(name)
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Reddish and bluish noise."""
    root = tmp_path_factory.mktemp("images")
    for part, n in (("train", 15), ("val", 5)):
        for label, tint in (("blue", (0, 0, 99)), ("red", (99, 0, 0))):
            (root / part / label).mkdir(parents=True)
            for i in range(n):
                g = torch.Generator().manual_seed(1000 * n + i)
                noise = torch.randint(0, 150, (20, 24, 3), generator=g) + torch.tensor(tint)
                picture = Image.fromarray(noise.to(torch.uint8).numpy())
                picture.save(root / part / label / f"{i}.{'png' if i % 2 else 'jpg'}")
    return root


def saved(out):
    return torch.load(out / "last.pt")


def plain(state):
    """Tensors by their bits."""
    return tree_map(lambda x: x.tolist() if torch.is_tensor(x) else x, state)


def assert_same(out, other):
    assert plain(saved(out)) == plain(saved(other))


@pytest.mark.parametrize("method", ["dense", "static", "set", "rigl"])
def test_trains(images, tmp_path, method):
    found = example().main([str(images), "--out", str(tmp_path), "--method", method, *SMALL])
    assert json.loads((tmp_path / "result.json").read_text())["accuracy"] == found["accuracy"]
    assert 0 <= found["accuracy"] <= 1
    assert found["weight_steps"] == 12
    assert found["batches"] == 12 + (found["updates"] if method == "rigl" else 0)
    # t_end is 12 * 25,000 / 32,000
    assert found["updates"] == {"rigl": 3, "set": 3}.get(method, 0)
    assert (found["sparsity"] > 0.3) == (method != "dense")


def test_learns(images, tmp_path):
    steps = ["--steps", "60", "--base-lr", "3"]
    found = example().main([str(images), "--out", str(tmp_path), *SMALL, *steps])
    assert found["accuracy"] == 1


def test_a_run_that_was_broken_off_ends_as_one_left_alone(images, tmp_path, monkeypatch):
    script = example()
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    script.main([str(images), "--out", str(whole), *SMALL])
    train, calls = script.Run.train, itertools.count()

    def breaking(*args):
        if next(calls) == 7:
            raise KeyboardInterrupt
        return train(*args)

    with monkeypatch.context() as patch:
        patch.setattr(script.Run, "train", breaking)
        with pytest.raises(KeyboardInterrupt):
            script.main([str(images), "--out", str(broken), *SMALL])
    assert saved(broken)["batches"] == 6
    with pytest.raises(SystemExit, match="other settings: {'seed': 0}"):
        script.main([str(images), "--out", str(broken), *SMALL, "--seed", "1"])
    script.main([str(images), "--out", str(broken), *SMALL])
    assert_same(whole, broken)


def worker(_rank, _world, images, out, dies_at):
    script = example()
    train, calls = script.Run.train, itertools.count()

    def dying(*args):
        if next(calls) == dies_at:
            os._exit(9)
        return train(*args)

    with mock.patch.object(script.Run, "train", dying):
        return script.main([str(images), "--out", str(out), *SMALL])


@pytest.mark.slow
def test_two_processes_that_are_killed_go_on_with_the_same_bits(images, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = ranks(worker, 2, images, whole, None)
    assert not any(isinstance(one, DiedError | FailedError) for one in expected.values()), expected
    died = ranks(worker, 2, images, broken, 7)
    assert all(isinstance(one, DiedError) and one.status == 9 for one in died.values()), died
    assert saved(broken)["batches"] == 6
    assert ranks(worker, 2, images, broken, None) == expected
    assert expected[0] == expected[1]
    assert expected[0]["updates"] == 3
    assert_same(whole, broken)


@pytest.mark.skipif(os.environ.get("SPARSEKERN_RANKS") != "all", reason="SPARSEKERN_RANKS=all")
@pytest.mark.slow
def test_under_torchrun(images, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    script = [str(EXAMPLES / "imagenet_resnet50.py"), str(images), "--out", str(tmp_path)]
    command = [*launch, *script, *SMALL, "--workers", "1", "--micro-batches", "2", "--bfloat16"]
    own = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=own)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "result.json").read_text())["updates"] == 3


# ---- parts


def test_the_learning_rate_of_the_paper():
    script = example()
    epoch = 1_281_167 / 4096  # steps
    wanted = {
        0: 0,
        2.5: 0.5,
        5: 1,
        29.9: 1,
        30.1: 0.1,
        69.9: 0.1,
        70.1: 0.01,
        89.9: 0.01,
        91: 0.001,
    }
    for when, rate in wanted.items():
        got = script.rate_at(when * epoch / 32_000)
        assert got == pytest.approx(rate, abs=1e-12)
    assert script.rate_at(1.0) == 0.001
    args = script.parsed(["data", "--out", "out"])
    assert args.base_lr * args.batch / 256 == 1.6


def test_weights_decay_and_biases_and_norms_do_not(tmp_path):
    script = example()
    args = script.parsed([str(tmp_path), "--out", str(tmp_path), *SMALL])
    run = script.Run(args, 2, script.Ranks(0, 1, torch.device("cpu")))
    decays = {id(p): g["weight_decay"] for g in run.optimizer.param_groups for p in g["params"]}
    for name, parameter in run.model.named_parameters():
        assert decays[id(parameter)] == (1e-4 if parameter.ndim > 1 else 0), name
    assert set(sparsekern.sparse_layers(run.model)) == {"3", "6"}  # ERK leaves small ones dense


def test_batches_follow_from_their_number_alone():
    folders = example("image_folders")

    def first(n, **changes):
        known = {"images": 10, "batch": 4, "start": 0, "rank": 0, "world": 1, "seed": 3}
        return list(itertools.islice(folders.Batches(**known | changes), n))

    whole = first(6)
    assert first(4, start=2) == whole[2:]
    assert first(2, start=4) == whole[4:]
    parts = [first(6, rank=rank, world=2) for rank in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole
    assert [epoch for batch in whole for epoch, _ in batch] == [0] * 8 + [1] * 8 + [2] * 8
    assert len({index for batch in whole[:2] for _, index in batch}) == 8
    assert whole[:2] != whole[2:4] != whole[4:]
    for wrong in ({"batch": 11}, {"world": 3}, {"batch": 0}):
        with pytest.raises(ValueError, match="multiple of"):
            first(1, **wrong)
    tested = [i for rank in range(3) for b in folders.shares(10, 2, rank, 3) for _, i in b]
    assert sorted(tested) == list(range(10))


def test_crops_lie_in_the_image_and_the_middle_is_the_middle(images):
    folders = example("image_folders")
    g = torch.Generator().manual_seed(0)
    for width, height in ((24, 20), (1, 300), (2000, 1)):
        for _ in range(200):
            left, top, right, bottom = folders.random_box(width, height, g)
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
    data = folders.ImageFolders(images / "train", 16, seed=0)
    assert data.classes == ["blue", "red"]
    assert [label for _, label in data.images] == [0] * 15 + [1] * 15
    first, again, other = data[0, 4][0], data[0, 4][0], data[1, 4][0]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    plain = Image.new("RGB", (50, 30), (255, 0, 0))
    left, top, right, bottom = folders.ImageFolders(images / "val", 16, None)._middle(plain)
    assert (left + right, top + bottom) == (50, 30)
    red = torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225]).view(3, 1, 1)
    torch.testing.assert_close(folders.as_tensor(plain), red.expand(3, 30, 50))
    with pytest.raises(FileNotFoundError, match="no images"):
        folders.ImageFolders(images / "val" / "red", 16, None)
