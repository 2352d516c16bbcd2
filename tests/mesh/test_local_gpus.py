"""This machine's GPUs as a cluster, where torch sees some."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from raypar.errors import ClusterError
from raypar.mesh.local_gpus import local_gpus

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
See = Callable[..., None]


@pytest.fixture
def see(monkeypatch: pytest.MonkeyPatch) -> See:
    def put(*names: str) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: names[index])

    return put


def test_all_gpus_or_some(see: See) -> None:
    see(H200, H200, H200)
    assert local_gpus().shape == (3,)
    some = local_gpus(2)
    assert some.n_devices == 2
    assert some.nodes[0].device.name == "H200"


@pytest.mark.parametrize(
    ("names", "asked", "told"),
    [
        ((), None, "sees 0: leave --gpu out"),
        ((H100,), 2, "2 GPUs of this machine .* sees 1: give --local 1 or less"),
        ((H100, H200), None, f"{H100}, {H200}.* not of one kind"),
        (("NVIDIA H100 PCIe",), 1, "NVIDIA H100 PCIe.*device_kinds"),
    ],
)
def test_what_cannot_be_measured_is_told(
    see: See, names: tuple[str, ...], asked: int | None, told: str
) -> None:
    see(*names)
    with pytest.raises(ClusterError, match=told):
        local_gpus(asked)
