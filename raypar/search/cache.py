"""Plans that were found before: one small JSON file for every question that a search answered.

A question is the model, the cluster with what is known of its speed, the options of the search, and
the code that answers it. Files are written as a whole or not at all, so that any number of
processes may share the folder; a file that cannot be read is kept aside and told.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from raypar._version import __version__
from raypar.errors import PlanError
from raypar.fit import check_plan
from raypar.graph.opgraph import OpGraph
from raypar.mesh.calibration import Calibration
from raypar.mesh.calibration_files import cache_dir, load_calibration
from raypar.mesh.cluster import Cluster
from raypar.plan import Plan
from raypar.search._file_lock import held
from raypar.search.config import SearchConfig
from raypar.search.record import SearchRecord

_LOG = logging.getLogger(__name__)
_FORMAT = 1
MOST_ENTRIES = 200
_NO_QUESTION = ("cache", "storage")
"""Options that say how to search, not what for."""
_PLANNING = (
    *(
        f"{room}/**/*.py"
        for room in ("graph", "sharding", "programs", "mesh", "schedules", "search")
    ),
    *("plan.py", "lowered.py"),
)
"""What of raypar's source decides which plan is found."""
_TMP_AGE_S = 3600.0

Question = dict[str, Any]


@dataclass(frozen=True, slots=True)
class CachedPlan:
    """What was found before.

    Attributes:
        plan: The plan; it fits the graph and the cluster that were asked about.
        record: The search that found it, with a note that says so.
        made: When it was found, in local time: ``2026-05-04 12:34``.
    """

    plan: Plan
    record: SearchRecord
    made: str


def question_of(
    graph: OpGraph,
    cluster: Cluster,
    config: SearchConfig,
    *,
    measured: bool = False,
    calibration: Calibration | None = None,
) -> Question:
    """What a cached plan must have been asked for to be the answer, as plain values.

    Measurements that a learned cost model rests on are no part of it: they grow with every run,
    and a plan that was good stays so.

    Args:
        graph: The captured model.
        cluster: The devices; names and ids of nodes do not matter.
        config: The options.
        measured: Whether the search may really run plans.
        calibration: What the cluster reaches; None: what is on disk for it.
    """
    import torch

    options = dataclasses.asdict(config)
    for name in _NO_QUESTION:
        options.pop(name)
    options["planner"] = config.chosen_planner
    if config.manual is not None:
        options["manual"] = repr(config.manual)
    calibration = calibration or load_calibration(cluster)
    found: Question = {
        "graph": graph.hash,
        "parameters": graph.params_hash,
        "batch_dims": list(graph.batch_dims),
        "global_batch": graph.global_batch,
        "cluster": cluster.fingerprint(),
        "memory": [node.device_memory for node in cluster.nodes],
        "calibration": _digest(calibration.to_json()),
        "search": options,
        "measured": measured,
        "raypar": __version__,
        "code": _code(),
        "torch": str(torch.__version__),
    }
    # As it is read from a file again: a tuple is a list there.
    plain: Question = json.loads(json.dumps(found))
    return plain


class PlanCache:
    """Cached plans in one folder.

    Args:
        folder: Where; default: ``plans`` in the cache folder (``$RAYPAR_CACHE_DIR``).
        most: Files that are kept; those that were not used for longest go.
    """

    def __init__(self, folder: str | Path | None = None, most: int = MOST_ENTRIES) -> None:
        self.folder = Path(folder) if folder is not None else cache_dir() / "plans"
        self.most = most

    def get(
        self, question: Question, graph: OpGraph, cluster: Cluster
    ) -> tuple[CachedPlan | None, str]:
        """The plan that was found for a question.

        A file that holds something else is renamed to ``*.bad``.

        Args:
            question: From `question_of`.
            graph: The captured model that the plan must fit.
            cluster: The devices that it must fit.

        Returns:
            The plan, or None; and a note for the user where a file was set aside, else ``""``.
        """
        path = self._path(question)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None, ""
        except (OSError, UnicodeDecodeError) as error:
            return None, self._set_aside(path, error)
        try:
            found = _read(text, question)
            check_plan(found.plan, graph, cluster)
        except (
            ValueError, TypeError, KeyError, AttributeError, RecursionError, PlanError,
        ) as error:  # fmt: skip
            return None, self._set_aside(path, error)
        # It was used just now; it may be gone, though, or lie where nothing may be written.
        with contextlib.suppress(OSError):
            os.utime(path)
        return found, ""

    @contextlib.contextmanager
    def only_one(self, question: Question) -> Iterator[None]:
        """Inside, no other process that shares the folder is here for the same question.

        So of several that start together one searches, and the others find what it found. Where
        there are no locks, or nothing can be written, everyone may be here.
        """
        locks = self.folder.with_name(f"{self.folder.name}.locks")
        with contextlib.ExitStack() as inside:
            with contextlib.suppress(OSError):
                # One of a few files, and not one for each question: they are never deleted.
                inside.enter_context(held(locks / self._path(question).stem[:2]))
            yield

    def put(self, question: Question, plan: Plan, record: SearchRecord) -> str:
        """Keeps a plan.

        Returns:
            A note for the user where it could not be kept, else ``""``.
        """
        path = self._path(question)
        try:
            entry = {
                "format": _FORMAT,
                "made": datetime.now().strftime("%Y-%m-%d %H:%M"),
                "question": question,
                "plan": json.loads(plan.to_json()),
                "record": json.loads(record.to_json()),
            }
            text = json.dumps(entry, indent=1, allow_nan=False)
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=path.name, suffix=".tmp")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(text + "\n")
                os.replace(temporary, path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
            self._prune()
        except (OSError, ValueError, PlanError) as error:
            note = f"the plan was not kept in the plan cache {str(self.folder)!r}: {error}"
            _LOG.warning("%s", note)
            return note
        return ""

    def _path(self, question: Question) -> Path:
        return self.folder / f"{_digest(json.dumps(question, sort_keys=True))}.json"

    def _set_aside(self, path: Path, error: Exception) -> str:
        aside = path.with_suffix(".bad")
        note = f"the plan cache held no plan in {path.name} ({error}); searched again"
        try:
            os.replace(path, aside)
            note = f"{note}, the file is kept as {str(aside)!r}"
        except OSError:
            pass
        _LOG.warning("%s", note)
        return note

    def _prune(self) -> None:
        """Deletes what was not used for longest, and what writers that died left behind."""
        ages: list[tuple[float, Path]] = []
        for path in self.folder.iterdir():
            try:
                used = path.stat().st_mtime
            except OSError:  # another process was faster
                continue
            if path.suffix in (".json", ".bad"):
                ages.append((used, path))
            elif path.suffix == ".tmp" and used < time.time() - _TMP_AGE_S:
                path.unlink(missing_ok=True)
        ages.sort()
        for _, path in ages[: max(0, len(ages) - self.most)]:
            path.unlink(missing_ok=True)


def _read(text: str, question: Question) -> CachedPlan:
    entry = json.loads(text)
    if not isinstance(entry, dict) or entry.get("format") != _FORMAT:
        raise ValueError(f"it is no entry of format {_FORMAT}")
    if entry["question"] != question:
        raise ValueError("it answers another question")
    made = str(entry["made"])
    plan = Plan.from_json(json.dumps(entry["plan"]))
    record = SearchRecord.from_json(json.dumps(entry["record"]))
    note = f"taken from the plan cache (made {made}); --no-cache searches again"
    return CachedPlan(plan, dataclasses.replace(record, notes=(*record.notes, note)), made)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@lru_cache(maxsize=1)
def _code() -> str:
    """Hash of the source that plans: a changed planner finds other plans under the same version."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(file for name in _PLANNING for file in root.glob(name)):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]
