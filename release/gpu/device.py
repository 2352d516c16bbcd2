"""What the GPU reaches: matrix rates by size and dtype, bandwidth, NCCL; against the table.

    python release/gpu/device.py [--out DIR]         # also writes DIR/calibration.json
    python release/gpu/device.py --device cpu --smoke

What `raypar probe --gpu` measures, beside the device table. NCCL runs with one rank (its own
loopback) and, with NCCL 2.30 or newer, with two that share the GPU: both ends of a message are then
the same memory, so these figures bound what NCCL costs and say nothing about links.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from raypar.comm.group import Group
from raypar.mesh._probe_device import measure_device
from raypar.mesh._probe_links import loopback, measure_links
from raypar.mesh._probe_table import against_table, reached
from raypar.mesh.devices import device_kind
from raypar.mesh.probe import RankSamples, calibrate
from release.gpu import kit
from release.gpu.solo import solo_cluster


def exchanged(group: Group, device: str) -> list[tuple[str, int, float, float]]:
    """(kind, ranks, bytes, seconds) of every exchange of one group on one node."""
    place = torch.device(device, 0) if device == "cuda" else torch.device("cpu")
    if group.size == 1:
        samples = loopback(group, place)
    else:
        samples = [
            s for found in measure_links(group, [0] * group.size, place).values() for s in found
        ]
    return [tuple(s) for s in samples]  # type: ignore[misc]


def nccl(options: Any) -> list[dict[str, Any]]:
    """Exchanges of one and of two ranks on the device; the slowest rank's."""
    import functools

    rows = []
    with kit.Ranks(2, options.device) as ranks:
        for size in (1, 2):
            case = functools.partial(exchanged, device=options.device)
            for samples in zip(*ranks.run(case, size, 60.0), strict=True):
                kind, _, nbytes, _ = samples[0]
                seconds = max(s[3] for s in samples)
                rows.append({"kind": kind, "ranks": size, "bytes": nbytes, "s": seconds})
    return rows


def main() -> int:
    """Measures; returns the exit code."""
    parser = kit.parser(__doc__)
    parser.add_argument("--kind", help="row of the device table; default: H200, or CPU")
    options = parser.parse_args()
    torch.set_num_threads(1)
    on_gpu = options.device == "cuda"
    kind = device_kind(options.kind or ("H200" if on_gpu else "CPU"))
    samples = measure_device(torch.device("cuda", 0) if on_gpu else torch.device("cpu"))
    rates = reached(samples)
    verdicts = against_table(samples, kind)
    for row in verdicts:
        print(f"{row.what}: {row.found:.4g} of {row.listed:.4g} ({row.share:.0%}): {row.verdict}")
    exchanges = nccl(options)
    for row in exchanges:
        print(f"{row['kind']} of {row['ranks']}: {row['bytes']:.0f} B in {row['s'] * 1e6:.1f} us")
    cluster = solo_cluster(options.device)
    known = calibrate(cluster, [RankSamples(0, samples, {"inside": [], "across": []})])
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "calibration.json").write_text(known.to_json() + "\n")
    wrong = sum(row.verdict != "plausible" for row in verdicts)
    figures = {
        "matmul": rates,
        "table": [
            {**row._asdict(), "share": row.share, "verdict": row.verdict} for row in verdicts
        ],
        "overhead_s": samples.overhead,
        "exchanges": exchanges,
    }
    targets = [kit.Target("figures that do not fit the table", wrong, "== 0")]
    return kit.write(options, "device", figures, targets)


if __name__ == "__main__":
    sys.exit(main())
