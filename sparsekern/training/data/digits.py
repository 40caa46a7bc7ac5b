"""scikit-learn's digits, which come with that package."""

from __future__ import annotations

import numpy as np
import torch

from sparsekern.errors import UnavailableError
from sparsekern.training.data.samples import CLASSES, Images, grey_images

DEMO_EXTRA = 'pip install "sparsekern[cpu,demo]"'


def load_digits(test_share: float = 0.2, seed: int = 0) -> Images:
    """scikit-learn's 1,797 digits of 8 x 8 pixels; `test_share` of each class is held out.

    Raises:
        UnavailableError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets  # noqa: PLC0415  an optional extra
    except ImportError as error:
        raise UnavailableError(f"data 'digits' needs scikit-learn: {DEMO_EXTRA}") from error
    images, labels = datasets.load_digits(return_X_y=True)
    x = torch.from_numpy(np.asarray(images, dtype=np.float32) / 16)
    y = torch.from_numpy(np.asarray(labels, dtype=np.int64))
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(y), dtype=torch.bool, device="cpu")
    for label in range(CLASSES):
        members = (y == label).nonzero()[:, 0]
        shuffled = members[torch.randperm(len(members), generator=generator, device="cpu")]
        held_out[shuffled[: round(test_share * len(members))]] = True
    x = x.view(-1, 8, 8)
    return grey_images("digits", (x[~held_out], x[held_out]), (y[~held_out], y[held_out]))
