"""Devices as users name them."""

import pytest
import torch

from sparsekern.devices import as_device
from sparsekern.errors import ConfigError, DtypeError


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:99"])
def test_names_and_devices_are_taken_whether_they_exist_or_not(name):
    assert as_device(name) == as_device(torch.device(name)) == torch.device(name)


@pytest.mark.parametrize("value", ["", "gpu", "cuda:x", "meta", torch.device("meta"), "cuda:-2"])
def test_other_devices_are_refused_by_name(value):
    with pytest.raises(ConfigError, match="`device` must be one of .'cpu', 'cuda'.*got"):
        as_device(value)


@pytest.mark.parametrize("value", [3.5, 0, None, True])
def test_other_types_are_refused(value):
    with pytest.raises(DtypeError, match="`where` must be a torch.device or a string.*got"):
        as_device(value, "where")
