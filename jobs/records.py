"""What the index of a counts file says of its cells and of their job."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from data_prep.manifest import Manifest
from jobs.cell import Cell

if TYPE_CHECKING:  # it imports torch, which what a cell is called does not need
    from jobs.run import Run


def cell_record(cell: Cell, backbone: str) -> dict[str, str]:
    """How a counts file names a cell, counted with the backbone of that SHA-256."""
    return {"signature": cell.signature, "name": cell.name, "backbone": backbone}


def job_record(job: Run, manifest: Manifest) -> dict[str, Any]:
    """What holds for all cells of a counts file; their settings stand in the task's file."""
    return {
        "task": job.task.name,
        "generation": job.generation.number,
        "manifest": manifest.fingerprint,
        "provenance": job.provenance,
        "source": job.task.source,
        "time": time.time(),
    }
