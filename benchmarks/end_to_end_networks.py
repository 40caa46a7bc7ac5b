"""The networks that `benchmarks.end_to_end` trains."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from sparsekern.models import small_gpt
from sparsekern.training.config import TrainConfig


@dataclass(frozen=True)
class Network:
    """What is trained, and for how long.

    Attributes:
        title: for people.
        config: of the training; its `impl` is that of the variant.
        steps: weight steps.
        edge: of the images; None for text.
    """

    title: str
    config: TrainConfig
    steps: int
    edge: int | None


def gpt(vocab: int, seq_len: int) -> nn.Module:
    """The small GPT, four blocks deep."""
    return small_gpt(vocab, seq_len, depth=4)


COMMON = TrainConfig(data="fashion-mnist", sparsity=0.9, distribution="uniform", momentum=0.9)
NETWORKS = {
    "mlp": Network(
        "MLP 784-1024-512-10, unstructured",
        replace(COMMON, hidden=(1024, 512), block=1, lr=0.05, batch_size=128, update_freq=100),
        steps=600,
        edge=28,
    ),
    "wrn": Network(
        "WRN-22-2, block 16",
        replace(COMMON, model="wide_resnet_22_2", block=16, batch_size=32, update_freq=40),
        steps=200,
        edge=32,
    ),
    "gpt": Network(
        "GPT of width 256 and depth 4, block 32",
        replace(
            COMMON,
            data="text",
            model="benchmarks.end_to_end_networks:gpt",
            block=32,
            batch_size=8,
            seq_len=128,
            optimizer="adamw",
            lr=1e-3,
            weight_decay=0.01,
            update_freq=40,
        ),
        steps=250,
        edge=None,
    ),
}
