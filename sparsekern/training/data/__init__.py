"""The data of the command line: digits, MNIST's family, CIFAR-10 and text, held as tensors."""

from __future__ import annotations

from pathlib import Path

from sparsekern.errors import ConfigError
from sparsekern.training.data.cifar import PAGE, load_cifar10
from sparsekern.training.data.digits import DEMO_EXTRA, load_digits
from sparsekern.training.data.mnist import IDX_FILES, load_idx, load_mnist
from sparsekern.training.data.samples import CLASSES, Dataset, Images, Text, batches, for_model
from sparsekern.training.data.text import BYTES, load_text

__all__ = [
    "BYTES",
    "CLASSES",
    "DATASETS",
    "DEMO_EXTRA",
    "Dataset",
    "Images",
    "Text",
    "batches",
    "for_model",
    "load",
    "load_digits",
    "load_idx",
    "load_mnist",
    "load_text",
]

DATASETS = ("digits", "mnist", "fashion-mnist", "cifar-10", "text")
"""Names that `load` knows."""


def load(name: str, data_dir: str | Path | None = None, seq_len: int = 128) -> Dataset:
    """Load a dataset by name, on the CPU.

    Args:
        name: "digits" (embedded in scikit-learn), "mnist", "fashion-mnist", "cifar-10" or "text".
        data_dir: folder of the four IDX files, .gz or plain, for "mnist" and "fashion-mnist"; of
            the published files for "cifar-10", or their archive; the file for "text". "mnist" may
            be mnist.pkl.gz too, and is looked up among installed packages if nothing is given.
        seq_len: bytes in a sequence of "text".

    Raises:
        ConfigError: the name is unknown, or `data_dir` is missing or superfluous.
        DataError: a file or folder is missing or damaged.
        UnavailableError: scikit-learn, or the package that has "mnist", is not installed.
    """
    if name not in DATASETS:
        raise ConfigError(f"`data` must be one of {DATASETS}; got {name!r}")
    if name == "digits":
        if data_dir is not None:
            raise ConfigError(
                f"data 'digits' is part of scikit-learn and takes no data directory; "
                f"got {str(data_dir)!r}"
            )
        return load_digits()
    if name == "mnist":
        return load_mnist(None if data_dir is None else Path(data_dir))
    if data_dir is None:
        raise ConfigError(f"data {name!r} needs {_NEEDED[name]}; got none")
    path = Path(data_dir)
    if name == "text":
        return load_text(path, seq_len)
    return load_cifar10(path) if name == "cifar-10" else load_idx(name, path)


_NEEDED = {
    "text": "a file, given as data directory",
    "fashion-mnist": f"a data directory, the folder that holds {IDX_FILES['train_images'][0]}.gz "
    "and its three companions (Debian's package dataset-fashion-mnist has them)",
    "cifar-10": f"a data directory, the folder of what is published at {PAGE}",
}
