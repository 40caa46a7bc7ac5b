"""A device as users name it."""

from __future__ import annotations

import torch

from sparsekern.errors import ConfigError, DtypeError

DEVICES = ("cpu", "cuda")
"""Types of devices that the library knows how to plan for and run on."""


def as_device(value: torch.device | str, argument: str = "device") -> torch.device:
    """The device that a value of an argument stands for, like "cpu", "cuda" or "cuda:1".

    Whether this machine has it isn't asked: one can plan for a device that is elsewhere.

    Raises:
        DtypeError: neither a torch.device nor a string.
        ConfigError: no device, or one of a type other than `DEVICES`.
    """
    if not isinstance(value, torch.device | str):
        raise DtypeError(
            f'`{argument}` must be a torch.device or a string like "cpu" or "cuda:0"; got {value!r}'
        )
    try:
        device = torch.device(value)
    except RuntimeError:
        device = None
    if device is None or device.type not in DEVICES:
        raise ConfigError(f"`{argument}` must be one of {DEVICES}, or like 'cuda:0'; got {value!r}")
    return device
