"""Peers for speed ratios: plain eager PyTorch, torch.distributed.pipelining, and DDP.

A peer starts its processes once and then waits for orders on a pipe, so that a benchmark can
alternate: k steps of one system, k steps of the other. While one runs, the others sleep in a
blocking read. Every process uses one torch thread. All train the same GPT from the same seed on
the same batch with the same optimizer, and all report their losses, which have to agree.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import pipelining
from torch.distributed.pipelining.schedules import get_schedule_class
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from examples.models import GPT, gpt
from release.pairs import Timing
from release.pieces import cut

START_TIMEOUT_S = 120.0
STEPS_TIMEOUT_S = 600.0

Step = Callable[[], float | None]
"""Runs one training step; returns the loss of the whole batch where this rank knows it."""

Build = Callable[..., Step]
"""Makes one rank's step function from (rank, world, workload, **options), in its process."""


@dataclass(frozen=True)
class Workload:
    """What is trained.

    Attributes:
        layers: Transformer blocks.
        width: Features per token.
        heads: Attention heads.
        seq_len: Tokens per sample.
        vocab: Tokens known.
        batch: Samples per step, over all processes.
        microbatches: Equal parts a step's batch is cut into.
        lr: Learning rate of AdamW.
        seed: Seed of the initial parameters and of the batch.
    """

    layers: int = 4
    width: int = 256
    heads: int = 4
    seq_len: int = 128
    vocab: int = 256
    batch: int = 8
    microbatches: int = 1
    lr: float = 1e-3
    seed: int = 0

    def model(self) -> GPT:
        """The model with its initial parameters."""
        torch.manual_seed(self.seed)
        return gpt(self.layers, self.width, self.heads, self.seq_len, self.vocab)

    def data(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and targets, [batch, seq_len] each."""
        g = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(0, self.vocab, (self.batch, self.seq_len + 1), generator=g)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        """AdamW with torch's defaults, which every system under comparison uses."""
        return torch.optim.AdamW(parameters, lr=self.lr)


class Peer:
    """A set of processes that train on demand.

    Args:
        name: What to call it in tables.
        build: Makes a rank's step function; a top-level function.
        world: Number of processes.
        load: What to train.
        **options: Passed on to `build`.
    """

    def __init__(self, name: str, build: Build, world: int, load: Workload, **options: Any) -> None:
        self.name = name
        self.load = load
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="raypar-peer-")
        store = os.path.join(self._folder.name, "store")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(there, store, build, rank, world, load, options),
                name=f"{name}-{rank}",
                daemon=True,
            )
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)
        try:
            self._answers(START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    def steps(self, count: int) -> Timing:
        """Runs `count` steps on all processes and waits for them.

        Raises:
            RuntimeError: A process failed (with its traceback), died, or took too long.
        """
        for pipe in self._pipes:
            pipe.send(count)
        answers = self._answers(STEPS_TIMEOUT_S)
        losses = next(found for _, _, found in answers if found)
        return Timing(
            seconds=max(wall for wall, _, _ in answers) / count,
            cpu_seconds=max(cpu for _, cpu, _ in answers) / count,
            losses=losses,
        )

    def close(self) -> None:
        """Ends the processes; safe to call twice."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
            pipe.close()
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
        self._pipes, self._processes = [], []
        self._folder.cleanup()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answers(self, timeout: float) -> list[Any]:
        deadline = time.monotonic() + timeout
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                raise RuntimeError(f"{self.name} rank {rank}: no answer after {timeout:.0f} s")
            try:
                answer = pipe.recv()
            except EOFError:
                raise RuntimeError(f"{self.name} rank {rank} died") from None
            if isinstance(answer, str):
                raise RuntimeError(f"{self.name} rank {rank} failed:\n{answer}")
            answers.append(answer)
        return answers


def _serve(
    pipe: Connection,
    store: str,
    build: Build,
    rank: int,
    world: int,
    load: Workload,
    options: dict[str, Any],
) -> None:
    """The life of one process: set up, then k steps for every k that comes down the pipe."""
    torch.set_num_threads(1)
    try:
        if world > 1:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=world
            )
        step = build(rank, world, load, **options)
        pipe.send(())
        while (count := pipe.recv()) is not None:
            pipe.send(_timed(step, count, world))
    except (EOFError, KeyboardInterrupt):
        pass
    except BaseException:
        with contextlib.suppress(OSError):  # the benchmark may have given up already
            pipe.send(traceback.format_exc())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _timed(step: Step, count: int, world: int) -> tuple[float, float, list[float]]:
    if world > 1:
        dist.barrier()
    cpu, wall = time.process_time(), time.perf_counter()
    losses = [step() for _ in range(count)]
    if world > 1:
        dist.barrier()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return wall, cpu, [loss for loss in losses if loss is not None]


# ---------------------------------------------------------------------------------------- eager


def eager(rank: int, world: int, load: Workload) -> Step:
    """The plain loop: forward, backward, optimizer, one process."""
    model = load.model()
    optimizer = load.optimizer(model.parameters())
    parts = list(zip(*(x.chunk(load.microbatches) for x in load.data()), strict=True))

    def step() -> float:
        optimizer.zero_grad()
        total = 0.0
        for tokens, targets in parts:
            loss = model(tokens, targets) / len(parts)
            loss.backward()
            total += loss.item()
        optimizer.step()
        return total

    return step


# ------------------------------------------------------------------------------------------ DDP


def ddp(rank: int, world: int, load: Workload, *, bucket_view: bool = True) -> Step:
    """DistributedDataParallel; gradients are exchanged with the last microbatch only."""
    model = DistributedDataParallel(load.model(), gradient_as_bucket_view=bucket_view)
    optimizer = load.optimizer(model.parameters())
    mine = [x.chunk(world)[rank].chunk(load.microbatches) for x in load.data()]
    parts = list(zip(*mine, strict=True))

    def part(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = model(tokens, targets) / len(parts)
        loss.backward()
        return loss.detach()

    def step() -> float | None:
        optimizer.zero_grad()
        with model.no_sync():
            total = sum((part(*each) for each in parts[:-1]), torch.zeros(()))
        total = total + part(*parts[-1])
        optimizer.step()
        # The shares of the ranks are averaged for the report only; a barrier follows anyway.
        dist.all_reduce(total)
        return total.item() / world

    return step


# ----------------------------------------------------------------- torch.distributed.pipelining


def pipeline(rank: int, world: int, load: Workload, *, schedule: str, chunks: int = 1) -> Step:
    """A schedule of torch.distributed.pipelining over `world` processes of `chunks` stages each.

    The embedding is tied to the output layer: each of the two has a copy, and their gradients are
    added up before the optimizer step. Also where both are on one rank, for torch divides the
    gradients of every stage by M, a parameter of two stages twice.
    """
    count = world * chunks
    held = _placement(schedule, rank, world, chunks)
    pieces = cut(load.model(), held, count)
    stages = [
        pipelining.PipelineStage(piece, index, count, torch.device("cpu"))
        for index, piece in pieces.items()
    ]
    runner: Any = get_schedule_class(schedule)
    plan = runner(stages if chunks > 1 else stages[0], load.microbatches, loss_fn=_token_loss)
    parameters = list(nn.ModuleList(pieces.values()).parameters())
    optimizer = load.optimizer(parameters)
    tied = [p.tied_weight for p in pieces.values() if p.tied_weight is not None]
    tokens, targets = load.data()
    first, last = 0 in pieces, count - 1 in pieces

    def step() -> float | None:
        optimizer.zero_grad()
        losses: list[torch.Tensor] = []
        args = (tokens,) if first else ()
        plan.step(*args, **({"target": targets, "losses": losses} if last else {}))
        _add_tied_gradients(tied)
        optimizer.step()
        return torch.stack(losses).mean().item() if last else None

    return step


def _placement(schedule: str, rank: int, world: int, chunks: int) -> list[int]:
    """The stages of a rank: in a V for the schedules that fold back, else in a loop."""
    if "ZBV" in schedule or "DualPipeV" in schedule:
        return [rank, 2 * world - 1 - rank]
    return [rank + chunk * world for chunk in range(chunks)]


def _token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _add_tied_gradients(copies: list[nn.Parameter]) -> None:
    """Gives both copies of the tied weight the sum of their gradients."""
    grads = [copy.grad for copy in copies if copy.grad is not None]
    if len(grads) == 2:
        grads[0] += grads[1]
        grads[1].copy_(grads[0])
    elif grads:
        dist.all_reduce(grads[0])
