"""Small networks for the command line to train, and functions that are none."""

import os
import signal

import torch
from torch import nn

import sparsekern as sk


def conv(classes, in_channels):
    """8 x 8 pixels: a convolution, a grouped one, a depthwise one and a hidden linear layer."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2, bias=False),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(64, 32),
        nn.ReLU(),
        nn.Linear(32, classes),
    )


def flat(classes):
    return nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, classes))


class _Characters(nn.Module):
    def __init__(self, vocab, recurrent):
        super().__init__()
        self.embedding = nn.Embedding(vocab, 12)
        self.recurrent = recurrent(12, 20, batch_first=True)
        self.output = nn.Linear(20, vocab)

    def forward(self, x):
        return self.output(self.recurrent(self.embedding(x))[0])


def gru(vocab=256):
    return _Characters(vocab, nn.GRU)


def lstm(vocab):
    return _Characters(vocab, nn.LSTM)


def no_module(classes):
    return classes


def fails():
    raise RuntimeError("out of\nmemory")


def flat_features():
    return nn.Linear(64, 7)


def no_tensor():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    return Pair()


def everything_dense(classes):
    return nn.Sequential(nn.Linear(64, classes))


number = torch.pi


class DropAtRandom(sk.Method):
    """A method of a user's own."""

    source = sk.methods.Gradient

    def drop_scores(self, name, layer):
        return torch.rand(layer.topology.nnzb, generator=self.generator(name))


class Breaks(DropAtRandom):
    """Its second seed raises at the second update."""

    def decide(self, fraction):
        if self.seed == 1 and self.history:
            raise RuntimeError("out of\nluck")
        return super().decide(fraction)


class Dies(DropAtRandom):
    """Its second seed takes its process with it."""

    def decide(self, fraction):
        if self.seed == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().decide(fraction)
