"""Inputs through pinned memory, on a road whose copies are made as late as they may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from raypar.stages.optimizers import prefer_fused
from raypar.stages.pinned import Inputs


class Late:
    """Reads what it was sent only when somebody waits for it, as a busy device does."""

    def __init__(self) -> None:
        self.rooms = 0
        self.sent: list[Copy] = []

    def room(self, like: torch.Tensor) -> torch.Tensor:
        self.rooms += 1
        return torch.empty_like(like)

    def send(self, values: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Any]:
        self.sent.append(Copy(dict(values)))
        return self.sent[-1].copies, self.sent[-1]


class Copy:
    def __init__(self, values: dict[str, torch.Tensor]) -> None:
        self.values = values
        self.copies = {k: torch.full_like(v, -1) for k, v in values.items()}
        self.done = False

    def synchronize(self) -> None:
        if not self.done:
            self.done = True
            for name, value in self.values.items():
                self.copies[name].copy_(value)


def test_no_step_overwrites_what_the_device_has_not_read() -> None:
    road = Late()
    inputs = Inputs(torch.device("cpu"), road)
    batch = torch.zeros(3)
    found = []
    for step in range(6):
        batch.fill_(step)  # the caller has one tensor for all steps
        found.append(inputs.put({"in:0": batch})["in:0"])
    for copy in road.sent:
        copy.synchronize()
    assert [t.tolist() for t in found] == [[float(step)] * 3 for step in range(6)]
    assert road.rooms == 2


def test_the_host_waits_for_nothing_before_two_steps_are_under_way() -> None:
    road = Late()
    inputs = Inputs(torch.device("cpu"), road)
    for _ in range(2):
        inputs.put({"in:0": torch.ones(2)})
    assert not any(copy.done for copy in road.sent)
    inputs.put({"in:0": torch.ones(2)})
    assert [copy.done for copy in road.sent] == [True, False, False]


def test_another_form_gets_room_of_its_own() -> None:
    road = Late()
    inputs = Inputs(torch.device("cpu"), road)
    for shape, dtype in (((2,), torch.float32), ((3,), torch.float32), ((3,), torch.int64)):
        for _ in range(2):
            found = inputs.put({"in:0": torch.ones(shape, dtype=dtype)})["in:0"]
            assert (found.shape, found.dtype) == (shape, dtype)
    assert road.rooms == 6


def test_on_a_cpu_inputs_are_where_they_are() -> None:
    batch = torch.ones(2)
    assert Inputs.to(torch.device("cpu")).put({"in:0": batch})["in:0"] is batch


# -- the optimizer's kernels ----------------------------------------------------------------


def _groups(kind: Any, device: str, **options: Any) -> list[Any]:
    made = kind([torch.nn.Parameter(torch.ones(2))], lr=0.1, **options)
    prefer_fused(made, torch.device(device))
    return [group.get("fused") for group in made.param_groups]


def test_on_a_gpu_optimizers_are_fused_unless_asked_otherwise() -> None:
    optim = torch.optim
    assert _groups(optim.AdamW, "cuda") == [True]
    assert _groups(optim.SGD, "cuda") == [True]
    assert _groups(optim.AdamW, "cpu") == [None]
    assert _groups(optim.AdamW, "cuda", foreach=True) == [None]
    assert _groups(optim.AdamW, "cuda", fused=False) == [False]
    assert _groups(optim.AdamW, "cuda", differentiable=True) == [None]
    assert _groups(optim.RMSprop, "cuda") == [None]  # torch has no fused one


def test_fused_steps_are_the_steps() -> None:
    """The same as torch's own choice, up to rounding: on the CPU both can be run."""
    found = []
    for fused in (None, True):
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.randn(50, dtype=torch.float64))
        made = torch.optim.AdamW([param], lr=0.1)
        if fused:
            prefer_fused(made, torch.device("cuda"))
        for step in range(3):
            param.grad = torch.sin(param.detach() * (step + 1))
            made.step()
        found.append(param.detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
