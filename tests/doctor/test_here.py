"""The doctor: judgements on versions and machines, and that it never raises."""

from __future__ import annotations

import socket
import sys

import pytest

from raypar import doctor
from raypar.doctor import FAIL, OK, WARN, Finding, here, packages


@pytest.mark.parametrize(
    ("version", "status"), [((3, 10, 2), FAIL), ((3, 11, 0), OK), ((3, 13, 1), OK)]
)
def test_python(version: tuple[int, ...], status: str) -> None:
    assert here.python_finding(version).status == status


@pytest.mark.parametrize(
    ("system", "machine", "status"),
    [
        ("linux", "x86_64", OK),
        ("darwin", "arm64", OK),
        ("darwin", "x86_64", FAIL),
        ("win32", "AMD64", FAIL),
    ],
)
def test_system(system: str, machine: str, status: str) -> None:
    finding = here.system_finding(system, machine)
    assert finding.status == status
    assert (status == OK) == (finding.mend == "")


@pytest.mark.parametrize(
    ("version", "status"),
    [
        (None, FAIL),
        ("2.10.1", FAIL),
        ("2.11.0", OK),
        ("2.13.0+cpu", OK),
        ("2.14.0", FAIL),
        ("1.13", FAIL),
    ],
)
def test_torch(version: str | None, status: str) -> None:
    finding = packages.torch_finding(version)
    assert finding.status == status
    if status == FAIL:
        assert finding.mend.endswith("-m pip install 'torch>=2.11,<2.14'")


@pytest.mark.parametrize(
    ("version", "status"), [(None, FAIL), ("2.59.1", FAIL), ("2.60.0", OK), ("3.0.0", FAIL)]
)
def test_ray(version: str | None, status: str) -> None:
    assert packages.ray_finding(version).status == status
    assert packages.ray_finding("2.60.0", default_extra=False).status == WARN


@pytest.mark.parametrize(
    ("installed", "cuda", "gpu", "status", "mend"),
    [
        ({}, None, True, OK, ""),
        ({}, "12.8", True, FAIL, "pip install 'raypar[cuda12]'"),
        ({}, "13.0", True, FAIL, "pip install 'raypar[cuda13]'"),
        ({}, "12.8", False, OK, ""),
        ({"cupy-cuda12x": "14.2.0"}, "12.8", True, OK, ""),
        ({"cupy-cuda13x": "14.2.0"}, "13.0", True, OK, ""),
        ({"cupy-cuda12x": "14.2.0"}, "13.0", True, FAIL, "pip install cupy-cuda13x"),
        ({"cupy-cuda12x": "14.2.0"}, "13.0", False, WARN, "pip install cupy-cuda13x"),
        (
            {"cupy-cuda12x": "14.2.0", "cupy-cuda13x": "14.2.0"},
            "12.6",
            True,
            FAIL,
            "uninstall -y cupy-cuda12x cupy-cuda13x",
        ),
        ({}, "11.8", True, FAIL, "--index-url"),
    ],
)
def test_cupy_goes_with_torchs_cuda(
    installed: dict[str, str], cuda: str | None, gpu: bool, status: str, mend: str
) -> None:
    finding = packages.cupy_finding(installed, cuda, gpu)
    assert finding.status == status
    assert mend in finding.mend
    assert bool(finding.mend) == bool(mend)


@pytest.mark.parametrize(
    ("libraries", "cuda", "status"),
    [
        ({}, None, OK),
        ({"nvidia-nccl-cu12": "2.27.3"}, "12.8", OK),
        ({"nvidia-nccl-cu12": "2.27.3"}, "13.0", FAIL),
        ({}, "12.8", FAIL),
    ],
)
def test_nccl(libraries: dict[str, str], cuda: str | None, status: str) -> None:
    assert packages.nccl_finding(libraries, cuda).status == status


def test_temp_path_and_space() -> None:
    assert here.temp_finding("/tmp").status == OK
    long = here.temp_finding("/tmp/" + "x" * 60)
    assert (long.status, long.mend) == (WARN, "export TMPDIR=/tmp")
    assert here.space_finding("disk", 10, 2**30, "free some").mend == "free some"


def test_a_dead_cluster_is_a_failure_with_a_mend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert doctor.main() == 1
    printed = capsys.readouterr().out
    assert "Ray cluster: unset RAY_ADDRESS" in printed


def test_without_an_address_a_run_has_a_ray_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (found,) = here._cluster()
    assert (found.status, "starts a Ray of its own" in found.found) == (OK, True)


def test_an_address_that_means_the_ray_of_this_machine_is_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr("raypar.compat_ray.ray_address_on_this_machine", lambda: None)
    (none,) = here._cluster()
    assert (none.status, "no Ray was started" in none.found) == (FAIL, True)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dead = f"127.0.0.1:{listener.getsockname()[1]}"
    monkeypatch.setattr("raypar.compat_ray.ray_address_on_this_machine", lambda: dead)
    (gone,) = here._cluster()
    assert (gone.status, dead in gone.found) == (FAIL, True)


def test_here_it_finds_everything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    findings = doctor.diagnose()
    names = {f.name for f in findings}
    assert {"Python", "torch", "cupy", "NCCL", "Ray", "CPU", "memory", "GPU", "temp path"} <= names
    assert all(f.mend for f in findings if f.status == FAIL)
    doctor.render(findings)
    assert "[" not in capsys.readouterr().out.splitlines()[0]


def test_a_check_that_raises_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Finding]:
        raise OSError("libtorch.so: cannot open")

    monkeypatch.setattr(here, "_CHECKS", (("torch", broken),))
    (finding,) = doctor.diagnose()
    assert finding.status != OK
    assert "libtorch.so" in finding.found


def test_it_prints_without_rich(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    doctor.render([Finding("torch", FAIL, "not installed", "pip install torch")])
    assert capsys.readouterr().out == "[fail] torch: not installed -> pip install torch\n"
