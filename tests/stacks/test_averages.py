"""Real averages of other packages follow RigL, as torch's own do."""

import copy

import loops
import pytest
import torch
from stacks.test_lightning import OPTIONS, Module, data, sparse_training, trainer

from sparsekern import RigL, sparse_layers

pytest.importorskip("lightning.pytorch")

DECAY = 0.9


def dense(model):
    """Dense weights and biases, by name."""
    found = {}
    for name, layer in sparse_layers(model).items():
        found[name] = layer.weight.to_dense().detach()
        found[name + ".bias"] = layer.bias.detach()
    return found


def by_hand(average, model, decay):
    """One step of the average of dense weights, at the model's connections."""
    masks = {name: layer.mask() for name, layer in sparse_layers(model).items()}
    for name, now in dense(model).items():
        new = torch.lerp(average[name], now, 1 - decay)
        average[name] = new * masks[name] if name in masks else new


def run(make, update, steps=16, **options):
    model = loops.net(block=options.pop("block", 1))
    optimizer = loops.adam(model)
    made = RigL(model, optimizer, **OPTIONS | options)
    average = make(model)
    expected = dense(copy.deepcopy(model))

    def after(i):
        update(average, model)
        by_hand(expected, model, DECAY)

    loops.train(model, [optimizer], range(steps), after)
    assert len(made.history) == 3
    return model, average, expected


def close(expected, averaged):
    got = dense(averaged)
    for name, weight in expected.items():
        torch.testing.assert_close(got[name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block", [1, 4])
def test_timm(block):
    timm = pytest.importorskip("timm.utils")
    _, average, expected = run(
        lambda m: timm.ModelEmaV3(m, decay=DECAY, foreach=False),
        lambda a, m: a.update(m),
        block=block,
    )
    close(expected, average.module)
    for layer in sparse_layers(average.module).values():
        layer.topology.validate()


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("kind", ["ModelEmaV2", "ModelEmaV3"])
def test_timm_of_both_kinds(kind, foreach):
    timm = pytest.importorskip("timm.utils")
    options = {"foreach": foreach} if kind == "ModelEmaV3" else {}
    _, average, expected = run(
        lambda m: getattr(timm, kind)(m, decay=DECAY, **options), lambda a, m: a.update(m)
    )
    close(expected, average.module)


@pytest.mark.parametrize("options", [{}, {"use_foreach": True}, {"include_online_model": False}])
def test_ema_pytorch(options):
    ema_pytorch = pytest.importorskip("ema_pytorch")
    known = {"beta": DECAY, "update_every": 1, "update_after_step": -1, "min_value": DECAY}
    model, average, expected = run(
        lambda m: ema_pytorch.EMA(m, **known | options), lambda a, m: a.update()
    )
    layers = sparse_layers(average.ema_model)
    for name, layer in sparse_layers(model).items():
        layers[name].topology.validate()
        assert torch.equal(layers[name].mask(), layer.mask())
    got = dense(average.ema_model)
    assert all(bool((got[name] != 0).any()) for name in expected)


def of_lightning(kind):
    from lightning.pytorch import callbacks

    if kind == "EMA":
        return callbacks.EMAWeightAveraging(decay=DECAY)
    if kind == "WeightAveraging":
        return callbacks.WeightAveraging()
    return callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1)


class Watched(Module):
    """Keeps the dense weights after each batch."""

    def __init__(self, *args):
        super().__init__(*args)
        self.seen = []
        self.first = dense(self.net)

    def on_train_batch_end(self, *_):
        self.seen.append(
            (dense(self.net), {n: m.mask() for n, m in sparse_layers(self.net).items()})
        )


@pytest.mark.parametrize("kind", ["EMA", "WeightAveraging", "StochasticWeightAveraging"])
def test_lightning(kind):
    module, callback = Watched(), sparse_training(t_end=100)
    steps = {"max_steps": -1, "max_epochs": 4}
    run = trainer([callback, of_lightning(kind)], **steps)
    run.fit(module, data(6), val_dataloaders=data(1))
    assert len(callback.method.history) >= 6
    # that of SWA averages at the start of each epoch, the others after each batch
    average = module.first if kind == "StochasticWeightAveraging" else None
    n = 1
    for i, (weights, masks) in enumerate(module.seen):
        if average is not None:
            average = {k: v * masks[k] if k in masks else v for k, v in average.items()}
        if kind != "StochasticWeightAveraging":
            average = mixed(average, weights, 1 - DECAY if kind == "EMA" else 1 / (i + 1))
        elif (i + 1) % 6 == 0 and i + 1 < len(module.seen):
            n += 1
            average = mixed(average, weights, 1 / n)
    got = dense(module.net)
    for name, weight in average.items():
        torch.testing.assert_close(got[name], weight, rtol=1e-4, atol=1e-5)


def mixed(average, weights, share):
    if average is None:
        return dict(weights)
    return {name: torch.lerp(average[name], now, share) for name, now in weights.items()}
