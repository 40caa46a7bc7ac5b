"""The papers' networks: sizes and FLOPs of the papers, ERK's golden figures, a training step."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from sparsekern import sparse_layers, sparsify_
from sparsekern.distribution import distribute
from sparsekern.topology.blocks import active_count


@pytest.fixture(scope="module", autouse=True)
def _benchmarks_are_importable():
    """The folder stands beside the package, and is not installed."""
    from pathlib import Path

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parent.parent))
        yield


def zoo():
    from sparsekern import models

    vgg = partial(models.vgg_16, 1000, image_size=224, batch_norm=False, hidden=(4096, 4096))
    vit_s = partial(models.vit, 1000, image_size=224, patch=16, width=384, depth=12, heads=6)
    return {
        # name: (builder, weight tensors, weights in them, parameters, FLOPs, input shape)
        "lenet_300_100": (models.lenet_300_100, 3, 266_200, 266_610, 532_400, (1, 28, 28)),
        "lenet_5": (models.lenet_5, 5, 61_470, 61_706, 833_040, (1, 28, 28)),
        "wide_resnet_22_2": (
            *(models.wide_resnet_22_2, 23, 1_076_912, 1_079_642, 315_460_096),
            (3, 32, 32),
        ),
        "resnet_50": (
            *(models.resnet_50, 54, 25_502_912, 25_557_032, 8_178_368_512),
            (3, 224, 224),
        ),
        "mobilenet_v1": (
            *(models.mobilenet_v1, 28, 4_209_088, 4_231_976, 1_137_480_704),
            (3, 224, 224),
        ),
        "vgg_16": (models.vgg_16, 14, 14_715_584, 14_724_042, 626_403_328, (3, 32, 32)),
        "vgg_16 ImageNet": (vgg, 16, 138_344_128, 138_357_544, 30_940_528_640, (3, 224, 224)),
        "vit": (models.vit, 26, 2_665_344, 2_693_578, 365_699_328, (3, 32, 32)),
        "vit S/16": (vit_s, 50, 21_912_576, 22_050_664, 9_197_764_608, (3, 224, 224)),
        "small_gpt": (models.small_gpt, 25, 4_784_128, 4_870_144, 2_852_126_720, (256,)),
        "char_gru": (models.char_gru, 3, 196_608, 1_183_360, 10 * 2_359_296, (10,)),
    }


NAMES = (
    *("lenet_300_100", "lenet_5", "wide_resnet_22_2", "resnet_50", "mobilenet_v1", "vgg_16"),
    *("vgg_16 ImageNet", "vit", "vit S/16", "small_gpt", "char_gru"),
)


def weights(model):
    """Weight matrices and kernels by layer name, biases and norms left out."""
    layers = model.named_modules()
    return {n: m.weight for n, m in layers if isinstance(m, nn.Linear | nn.Conv2d)}


@pytest.mark.parametrize("name", NAMES)
def test_sizes_and_flops_at_density_1(name):
    from sparsekern.models.flops import forward_flops

    build, tensors, count, parameters, flops, shape = zoo()[name]
    with torch.device("meta"):
        model = build()
    found = weights(model)
    assert len(found) == tensors
    assert sum(w.numel() for w in found.values()) == count
    assert sum(p.numel() for p in model.parameters()) == parameters
    dtype = torch.int64 if len(shape) == 1 else None
    assert forward_flops(build, 1, *shape, dtype=dtype) == flops
    assert forward_flops(build, 3, *shape, dtype=dtype) == 3 * flops


def test_docstrings_say_what_is_true():
    from sparsekern import models

    for name, (_, _, _, parameters, flops, _) in zoo().items():
        documented = getattr(models, name.split()[0]).__doc__
        samples = 10 if name == "char_gru" else 1  # per character there
        assert f"{parameters:,}" in documented, name
        assert f"{flops // samples:,}" in documented, name


def test_published_flops():
    """ResNet-50 8.2e9 and MobileNet v1 1.1e9, to the digits the paper gives."""
    assert round(zoo()["resnet_50"][4] / 1e9, 1) == 8.2
    assert round(zoo()["mobilenet_v1"][4] / 1e9, 1) == 1.1


# ---- Evci et al. 2020, recomputed for ResNet-50 v1.5 with 54 sparse layers

RATIOS = {
    # sparsity: FLOPs of inference against dense, by distribution
    0.8: {"uniform": 0.2231, "erk": 0.4138, "er": 0.4530},
    0.9: {"uniform": 0.1260, "erk": 0.2418, "er": 0.2571},
    0.95: {"uniform": 0.0774, "erk": 0.1217, "er": 0.1426},
    0.965: {"uniform": 0.0628, "erk": 0.0852, "er": 0.1082},
    0.99: {"uniform": 0.0386, "erk": 0.0243, "er": 0.0445},
}
EPS = {0.8: (99.5617, 8), 0.9: (48.7866, 1), 0.95: (24.3721, 0), 0.965: (17.0607, 0)}
EPS |= {0.99: (4.8748, 0)}
SPARSITIES = {
    0.8: {
        "conv1": 0.143,
        "stages.0.0.conv2": 0.638,
        "stages.1.1.conv1": 0.025,
        "stages.1.1.conv2": 0.823,
        "stages.2.1.conv1": 0.513,
        "stages.2.1.conv2": 0.913,
        "stages.3.0.shortcut.0": 0.854,
        "stages.3.1.conv1": 0.757,
        "stages.3.1.conv2": 0.957,
        "output": 0.852,
    },
    0.9: {
        "conv1": 0.580,
        "stages.0.0.conv2": 0.823,
        "stages.1.1.conv1": 0.522,
        "stages.2.1.conv2": 0.957,
        "stages.3.1.conv1": 0.881,
        "stages.3.1.conv2": 0.979,
        "output": 0.927,
    },
}


@pytest.fixture(scope="module")
def resnet_50():
    """Weight shapes and forward FLOPs of each layer of ResNet-50."""
    from sparsekern.models import resnet_50 as build

    with torch.device("meta"):
        model = build().eval()
    pixels = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(
                lambda m, _, y, name=name: pixels.update({name: y[0].numel() // len(m.weight)})
            )
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224, device="meta"))
    shapes = {name: tuple(w.shape) for name, w in weights(model).items()}
    return shapes, {name: 2 * pixels[name] * math.prod(shapes[name]) for name in shapes}


@pytest.mark.parametrize("sparsity", RATIOS)
@pytest.mark.parametrize("distribution", ["uniform", "erk", "er"])
def test_inference_ratio_of_resnet_50(resnet_50, sparsity, distribution):
    shapes, flops = resnet_50
    given = distribute(shapes, sparsity, distribution)
    if distribution == "uniform":
        given["conv1"] = 0.0  # dense there, and only there
    ratio = sum((1 - given[n]) * f for n, f in flops.items()) / sum(flops.values())
    assert abs(ratio - RATIOS[sparsity][distribution]) < 0.002


@pytest.mark.parametrize("sparsity", EPS)
def test_erk_eps_of_resnet_50(resnet_50, sparsity):
    shapes, _ = resnet_50
    given = distribute(shapes, sparsity, "erk")
    eps, dense = EPS[sparsity]
    assert sum(s == 0 for s in given.values()) == dense
    for name, shape in shapes.items():
        if given[name]:
            assert (1 - given[name]) * math.prod(shape) / sum(shape) == pytest.approx(eps, abs=5e-5)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_erk_sparsities_of_resnet_50(resnet_50, sparsity):
    given = distribute(resnet_50[0], sparsity, "erk")
    for name, expected in SPARSITIES[sparsity].items():
        assert round(given[name], 3) == expected, name


@pytest.mark.slow
@pytest.mark.parametrize("distribution", ["erk", "uniform"])
def test_resnet_50_holds_exactly_the_weights_that_the_reference_code_gives_it(distribution):
    from sparsekern.models import resnet_50

    model = resnet_50()
    shapes = {name: tuple(w.shape) for name, w in weights(model).items()}
    if distribution == "uniform":
        del shapes["conv1"]  # dense there
    given = distribute(shapes, 0.9, distribution)
    expected = {
        name: active_count(math.prod(shape), given[name])
        for name, shape in shapes.items()
        if given[name]
    }
    sparsify_(model, 0.9, distribution=distribution, init=None)
    held = {name: layer.nnz for name, layer in sparse_layers(model).items()}
    assert held == expected
    dense = sum(math.prod(shapes[name]) for name in set(shapes) - set(held))
    budget = sum(active_count(math.prod(shape), 0.9) for shape in shapes.values())
    # each layer rounds up its own share
    assert 0 <= sum(held.values()) + dense - budget <= len(shapes)
    assert len(held) == {"erk": 53, "uniform": 53}[distribution]


def test_mobilenet_keeps_its_depthwise_convolutions_dense():
    from sparsekern.models import mobilenet_v1

    model = sparsify_(mobilenet_v1(width=0.25), 0.75, distribution="uniform")
    kept = [m for m in model.modules() if type(m) is nn.Conv2d]
    assert len(kept) == 1 + 13  # the first one, and one in each block
    assert all(m.groups == m.in_channels for m in kept[1:])
    assert len(sparse_layers(model)) == 13 + 1


# ---- they run

SMALL = {
    # name: (arguments, input shape)
    "lenet_300_100": ({"image_size": 8}, (1, 8, 8)),
    "lenet_5": ({"image_size": 12}, (1, 12, 12)),
    "wide_resnet_22_2": ({"in_channels": 1}, (1, 8, 8)),
    "resnet_50": ({"in_channels": 1, "classes": 10}, (1, 33, 40)),
    "mobilenet_v1": ({"in_channels": 1, "classes": 10, "width": 0.25}, (1, 28, 28)),
    "vgg_16": ({"in_channels": 1}, (1, 32, 32)),
    "vit": ({"in_channels": 1, "image_size": 8, "patch": 2, "depth": 2}, (1, 8, 8)),
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_training_step_on_images(name, layout):
    from sparsekern import models

    arguments, shape = SMALL[name]
    model = getattr(models, name)(**arguments).to(memory_format=layout)
    x = torch.randn(2, *shape).to(memory_format=layout)
    scores = model(x)
    assert scores.shape == (2, 10)
    nn.functional.cross_entropy(scores, torch.tensor([0, 9])).backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("name", ["char_gru", "small_gpt"])
def test_a_training_step_on_text(name):
    from sparsekern import models

    model = getattr(models, name)()
    x = torch.randint(256, (2, 7))
    scores = model(x)
    assert scores.shape == (2, 7, 256)
    # the untrained model knows nothing: its loss is that of a guess among 256
    loss = nn.functional.cross_entropy(scores.flatten(0, 1), x.flatten())
    assert abs(loss.item() - math.log(256)) < 1
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("name", ["char_gru", "small_gpt"])
def test_text_models_do_not_look_ahead(name):
    from sparsekern import models

    model = getattr(models, name)().eval()
    x = torch.randint(256, (1, 9))
    changed = x.clone()
    changed[0, 5] = (x[0, 5] + 1) % 256
    before, after = model(x), model(changed)
    assert torch.equal(before[0, :5], after[0, :5])
    assert not torch.equal(before[0, 5:], after[0, 5:])


WRONG = {
    "lenet_5": ((1, 27, 28), ["(n, 1, 28, 28)", "(2, 1, 27, 28)"]),
    "lenet_300_100": ((784,), ["(n, 1, 28, 28)", "(2, 784)"]),
    "vgg_16": ((3, 28, 28), ["(n, 3, 32, 32)", "(2, 3, 28, 28)"]),
    "vit": ((3, 224, 224), ["(n, 3, 32, 32)", "(2, 3, 224, 224)"]),
    "resnet_50": ((1, 32, 32), ["(n, 3, height, width)", "(2, 1, 32, 32)"]),
    "wide_resnet_22_2": ((3, 32), ["(n, 3, height, width)", "(2, 3, 32)"]),
    "mobilenet_v1": ((3, 0, 4), ["(n, 3, height, width)", "(2, 3, 0, 4)"]),
    "small_gpt": ((257,), ["(n, t), t at most 256", "(2, 257)"]),
    "char_gru": ((3, 4), ["(n, t)", "(2, 3, 4)"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_input_is_named(name):
    from sparsekern import models

    shape, fragments = WRONG[name]
    dtype = torch.int64 if name in ("small_gpt", "char_gru") else torch.float32
    with pytest.raises(ValueError, match="must") as caught:
        getattr(models, name)()(torch.zeros(2, *shape, dtype=dtype))
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("lenet_5", {"image_size": 8}, "`image_size` must be at least 12; got 8"),
        ("vgg_16", {"image_size": 28}, "`image_size` must be at least 32; got 28"),
        ("vit", {"image_size": 30}, "`image_size` must be a multiple of `patch`; got 30 and 4"),
        ("vit", {"heads": 5}, "`width` must be a multiple of `heads`; got 192 and 5"),
    ],
)
def test_sizes_that_do_not_fit(name, arguments, text):
    from sparsekern import models

    with pytest.raises(ValueError, match=text):
        getattr(models, name)(**arguments)
