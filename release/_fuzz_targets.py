"""What is fuzzed: every reader of what others may have written, with inputs that nearly fit.

A target takes one input and says whether it was accepted. It raises `RayparError` where it refuses
the input; anything else that it raises is a find.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import operator
import socket
import struct
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

import raypar as rp
from raypar._yaml import dump_yaml, parse_yaml
from raypar.comm import _frames
from raypar.comm._handshake import Door, introduce
from raypar.comm._meeting import CONTEXT, LENGTH
from raypar.comm.gloo import GlooGroup
from raypar.comm.group import TensorSpec
from raypar.comm.mailbox import Mailbox
from raypar.comm.network import listen
from raypar.comm.rendezvous import Link, Rendezvous
from raypar.config import default_yaml, load_config
from raypar.errors import CommError, CommTimeoutError, RayparError
from raypar.fit import check_plan
from raypar.plan import Plan
from raypar.testing import models, random_plan
from release._fuzz_edits import dumped, edited_bytes, edited_trees, json_inputs, odd_values

_SECRET = b"k" * 32


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        inputs: Makes the strategy of its inputs, at first use.
        accepts: Reads one input; False or a RayparError where it is refused.
    """

    inputs: Callable[[], st.SearchStrategy[Any]]
    accepts: Callable[[Any], bool]


# ---- plans ------------------------------------------------------------------------------------


@functools.cache
def _graph() -> Any:
    case = models.case("mlp")
    return rp.capture(case.model_fn, case.batch(0, 8), case.loss_fn)


@functools.cache
def _cluster() -> rp.Cluster:
    return rp.Cluster.local(4)


def _plans() -> st.SearchStrategy[str]:
    plans = [random_plan(_graph(), _cluster(), seed=seed) for seed in range(12)]
    return json_inputs([json.loads(plan.to_json()) for plan in plans])


def _accepts_plan(text: str) -> bool:
    plan = Plan.from_json(text)
    assert Plan.from_json(plan.to_json()) == plan
    check_plan(plan)  # by itself, and then with the model and the cluster
    plan.explain()
    check_plan(plan, _graph(), _cluster())
    plan.explain(_graph())
    return True


# ---- configurations ---------------------------------------------------------------------------


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="raypar-fuzz-")


def _configs() -> st.SearchStrategy[tuple[str, list[str]]]:
    folder = Path(__file__).resolve().parents[1] / "examples"
    texts = [default_yaml(), *(p.read_text("utf-8") for p in sorted(folder.rglob("*.yaml"))[:6])]
    trees = [parse_yaml(text, "base") for text in texts]
    whole = st.one_of(
        edited_trees(trees).map(dumped(dump_yaml)),
        edited_trees(trees).map(dumped(dump_yaml)),
        edited_bytes([t.encode() for t in texts]).map(lambda b: b.decode("utf-8", "replace")),
        st.text(max_size=60),
    )
    keys = st.sampled_from(["train.steps", "model", "mesh.num_workers", "a..b", "", "optimizer.lr"])
    override = st.one_of(
        st.builds("{}={}".format, keys, odd_values.map(dumped(dump_yaml))), st.text(max_size=30)
    )
    return st.tuples(whole, st.lists(override, max_size=2))


def _accepts_config(given: tuple[str, list[str]]) -> bool:
    path = Path(_scratch().name) / "config.yaml"
    path.write_bytes(given[0].encode("utf-8", "surrogatepass"))
    config = load_config(path, given[1])
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(path).to_yaml() == config.to_yaml()
    return True


# ---- clusters, calibrations, measurements, records ----------------------------------------------


def _clusters() -> st.SearchStrategy[str]:
    folder = Path(__file__).resolve().parent / "clusters"
    trees = [parse_yaml(p.read_text("utf-8"), p.name) for p in sorted(folder.glob("*.yaml"))]
    trees.append(_cluster().to_dict())
    return edited_trees(trees).map(dumped(dump_yaml))


def _accepts_cluster(text: str) -> bool:
    path = Path(_scratch().name) / "cluster.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    cluster = rp.Cluster.load(path)
    cluster.describe()
    return True


def _calibrations() -> st.SearchStrategy[str]:
    from raypar.mesh.calibration import table_calibration

    return json_inputs([json.loads(table_calibration(_cluster()).to_json())])


def _accepts_calibration(text: str) -> bool:
    from raypar.mesh.calibration import Calibration

    Calibration.from_json(text).to_json()
    return True


# ---- checkpoints ------------------------------------------------------------------------------


@functools.cache
def _index() -> dict[str, Any]:
    """The inner object of a real index: of the smallest model, saved by a run of two ranks."""
    from raypar.stages.saved import Key
    from raypar.train.checkpoint.format import Index, SavedFile, SavedPiece, SavedTensor

    halves = (
        SavedPiece(0, 64, (2, 4), ((((0, 2), (0, 4)), ((0, 2), (0, 4))),)),
        SavedPiece(1, 64, (2, 4), ((((2, 2), (0, 4)), ((0, 2), (0, 4))),)),
    )
    weight = SavedTensor(Key("param", "", "w"), (4, 4), torch.float32, False, halves)
    scale = SavedTensor(
        Key("param", "", "b"), (), torch.float64, False, (SavedPiece(0, 96, (), (((), ()),)),)
    )
    files = tuple(SavedFile(f"rank-0000{r}.safetensors", 104, (123456,)) for r in range(2))
    plan = json.loads(random_plan(_graph(), _cluster(), seed=0).to_json())
    state = {"step": 3, "samples": 24, "data": {"epoch": 0}, "metrics": {"loss": 1.5}, "extra": {}}
    index = Index(
        step=3,
        world=2,
        files=files,
        tensors={t.key: t for t in (weight, scale)},
        names={"w": "w", "b": "b"},
        values={"states": {"w": {"step": 3}}, "update": {}},
        state=state,
        plan=plan,
    )
    inner: dict[str, Any] = json.loads(index.to_bytes())["index"]
    return inner


def _checkpoints() -> st.SearchStrategy[bytes]:
    from raypar.train.checkpoint.sealed import seal

    def sealed(tree: Any) -> bytes:
        try:  # with a right checksum, so that what is behind it is reached
            return seal(tree) if isinstance(tree, dict) else json.dumps(tree).encode()
        except (ValueError, TypeError):
            return repr(tree).encode("utf-8", "replace")

    base = seal(_index())
    return st.one_of(
        edited_trees([_index()]).map(sealed),
        edited_trees([_index()]).map(sealed),
        edited_trees([json.loads(base)]).map(lambda tree: json.dumps(tree).encode()),
        edited_bytes([base]),
    )


def _accepts_checkpoint(data: bytes) -> bool:
    from raypar.train.checkpoint.format import Index
    from raypar.train.state import TrainState

    index = Index.from_bytes(data, "index.json")
    TrainState.from_json(index.state)
    check_plan(Plan.from_json(json.dumps(index.plan)))
    return True


def _headers() -> st.SearchStrategy[bytes]:
    table = {
        "__metadata__": {"format": "pt"},
        "param//w": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]},
    }

    def file(text: str) -> bytes:
        body = text.encode("utf-8", "replace")
        return struct.pack("<Q", len(body)) + body + bytes(64)

    return st.one_of(
        edited_trees([table]).map(dumped(json.dumps)).map(file),
        edited_bytes([file(json.dumps(table))]),
    )


def _accepts_header(data: bytes) -> bool:
    from raypar.train.checkpoint.image import header_of

    def read(at: int, count: int) -> torch.Tensor:
        part = data[at : at + count]
        if len(part) != count:
            raise ValueError("the file is too short")
        return torch.frombuffer(bytearray(part), dtype=torch.uint8)

    header_of(read, len(data))
    return True


# ---- socket messages ----------------------------------------------------------------------------

_SPECS = (TensorSpec((3,), torch.float32), TensorSpec((2, 2), torch.int64))


def _frame(kind: int, code: int, shape: tuple[int, ...], key: bytes, body: bytes) -> bytes:
    head = _frames.HEADER.pack(kind, code, len(shape), len(key), len(body))
    return head + struct.pack(f"<{len(shape)}Q", *shape) + key + body


def _conversations() -> st.SearchStrategy[bytes]:
    good = [
        _frame(_frames.DATA, 0, (3,), b"/:a", bytes(12)),
        _frame(_frames.DATA, 8, (2, 2), b"/:b", bytes(32)),
        _frame(_frames.DATA, 0, (), b"/:c", bytes(4)),
        _frame(_frames.DATA, 0, (4,), b"/:a", bytes(16)),
        _frames.abort_frame(b"/1/", "enough"),
        _frames.bye_frame(),
    ]
    odd = st.builds(
        _frame,
        st.integers(0, 5),
        st.integers(0, 20),
        st.lists(st.sampled_from([0, 1, 2, 3, 2**20, 2**40, 2**63]), max_size=4).map(tuple),
        st.binary(max_size=20),
        st.binary(max_size=40),
    )
    head = st.builds(
        _frames.HEADER.pack,
        st.integers(0, 255),
        st.integers(0, 255),
        st.integers(0, 2**16 - 1),
        st.integers(0, 2**32 - 1),
        st.integers(0, 2**64 - 1),
    )
    one = st.one_of(st.sampled_from(good), edited_bytes(good), odd, head, st.binary(max_size=60))
    whole = st.sampled_from([b"", good[0], good[0] + good[1], good[1] + good[0]])
    more = st.lists(st.sampled_from(good) | one, min_size=1, max_size=4).map(b"".join)
    return st.builds(operator.add, whole, more)


def _accepts_conversation(data: bytes) -> bool:
    """A peer that knows the token sends `data` and hangs up."""
    here, there = socket.socketpair()
    group = GlooGroup(Mailbox("fuzz", 0, 2, {1: Link(here, "a socket")}), range(2), name="fuzz")
    group.timeout_s = 5.0
    refused: RayparError | None = None
    try:
        works = [group.irecv(spec, 1, tag) for spec, tag in zip(_SPECS, "ab", strict=True)]
        with contextlib.suppress(OSError):  # it may hang up first, as it should
            there.sendall(data)
        there.close()
        for work, spec in zip(works, _SPECS, strict=True):
            try:
                found = work.wait()
            except CommError as error:
                refused = error
                continue
            assert found is not None
            assert (tuple(found.shape), found.dtype) == (spec.shape, spec.dtype)
            assert not found.is_meta
    finally:
        there.close()
        group.close()
    if refused is not None:
        assert not isinstance(refused, CommTimeoutError), "it must be told, not time out"
        raise refused
    return True


def _greetings() -> st.SearchStrategy[bytes]:
    claim = bytes(32) + struct.pack("<I", 1) + bytes(32)
    return edited_bytes([claim, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 4, b""]) | st.binary()


@functools.cache
def _door() -> tuple[Door, Any]:
    listener = listen("127.0.0.1")
    return Door([listener], _SECRET, b"fuzz", patience_s=0.5), listener.getsockname()


def _accepts_greeting(data: bytes) -> bool:
    """A stranger: must never be admitted, and must be gone when it hangs up."""
    door, where = _door()
    with socket.create_connection(where, 5) as sock:
        sock.sendall(data)
    end = time.monotonic() + 5
    while time.monotonic() < end:
        assert not door.admit(0.02)
        if not door._strangers:
            return False
    raise AssertionError("the stranger is still there")


@functools.cache
def _rendezvous() -> Rendezvous:
    return Rendezvous()


def _requests() -> st.SearchStrategy[bytes]:
    asked = {"world": "w", "size": 2, "wait_s": 0.0, "info": {"host": "127.0.0.1", "port": 5}}

    def framed(body: bytes) -> bytes:
        return LENGTH.pack(len(body)) + body

    texts = edited_trees([asked]).map(dumped(json.dumps)).map(str.encode)
    return texts.map(framed) | edited_bytes([framed(json.dumps(asked).encode())])


def _accepts_request(data: bytes) -> bool:
    """A member that says nonsense: gets an answer or is dropped, and the service goes on."""
    server = _rendezvous()
    where = (server.address.host, server.address.port)
    deadline = time.monotonic() + 5
    with socket.create_connection(where, 5) as sock:
        introduce(sock, bytes.fromhex(server.address.token), CONTEXT, 0, deadline)
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        sock.settimeout(5)
        said = b""
        try:
            while part := sock.recv(4096):
                said += part
        except ConnectionError:
            pass
    return b"ranks" in said


TARGETS: dict[str, Target] = {
    "plan": Target(_plans, _accepts_plan),
    "config": Target(_configs, _accepts_config),
    "checkpoint": Target(_checkpoints, _accepts_checkpoint),
    "messages": Target(_conversations, _accepts_conversation),
    "strangers": Target(_greetings, _accepts_greeting),
    "rendezvous": Target(_requests, _accepts_request),
    "header": Target(_headers, _accepts_header),
    "cluster": Target(_clusters, _accepts_cluster),
    "calibration": Target(_calibrations, _accepts_calibration),
}
"""By name; the first four are what a release has to run."""


@dataclass
class Tally:
    """What came of a target's inputs.

    Attributes:
        inputs: Read so far.
        accepted: That were valid after all.
        refused: That ended in a RayparError (or were refused without one).
        slowest_s: Of one input.
        grown_mib: Most that the process grew over the inputs of one round.
    """

    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    slowest_s: float = 0.0
    grown_mib: float = 0.0

    def plain(self) -> dict[str, float]:
        """For JSON."""
        return dataclasses.asdict(self)
