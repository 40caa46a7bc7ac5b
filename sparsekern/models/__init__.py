"""The networks of the papers as plain torch modules; nothing here imports sparsekern.

Image models take (n, in_channels, height, width) float, in either memory format, and give
(n, classes). Text models take (n, t) int64 and give (n, t, vocab).
"""

from sparsekern.models.char_gru import char_gru
from sparsekern.models.gpt import small_gpt
from sparsekern.models.lenet import lenet_5, lenet_300_100
from sparsekern.models.mobilenet import mobilenet_v1
from sparsekern.models.resnet import resnet_50, wide_resnet_22_2
from sparsekern.models.vgg import vgg_16
from sparsekern.models.vit import vit

__all__ = [
    "char_gru",
    "lenet_5",
    "lenet_300_100",
    "mobilenet_v1",
    "resnet_50",
    "small_gpt",
    "vgg_16",
    "vit",
    "wide_resnet_22_2",
]
