"""Models that the planner's tests share."""

import torch
from torch import nn


class Mixed(nn.Module):
    """Every kind of layer: convolutions, one grouped, one depthwise; recurrent; linear; unused."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.grouped = nn.Conv2d(32, 64, 3, groups=2, stride=2)
        self.depthwise = nn.Conv2d(64, 64, 3, groups=64)
        self.flat = nn.Conv1d(64, 48, 5)
        self.gru = nn.GRU(48, 40, batch_first=True, bidirectional=True)
        self.cell = nn.LSTMCell(80, 40)
        self.blocks = nn.ModuleDict({"odd[0]*": nn.Linear(40, 70)})
        self.unused = nn.Linear(128, 128)

    def forward(self, x):
        y = self.depthwise(self.grouped(self.stem(x)).relu())
        y = self.gru(self.flat(y.flatten(2)).transpose(1, 2))[0]
        return self.blocks["odd[0]*"](self.cell(y[:, -1])[0])


def images(device=None):
    return torch.ones(4, 3, 15, 15, device=device)
