"""What the index of a counts file says of its cells and of their job."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from data_prep.manifest import Manifest
from jobs.cell import Cell

if TYPE_CHECKING:  # it imports torch, which what a cell is called does not need
    from jobs.run import Run


def cell_record(cell: Cell, backbone: str) -> dict[str, str]:
    """How a counts file names a cell, counted with the backbone of that SHA-256. Its settings stand
    in the job's task file: status and reduction read thousands of these."""
    return {"signature": cell.signature, "name": cell.name, "backbone": backbone}


def job_record(job: Run, manifest: Manifest) -> dict[str, Any]:
    """What holds for all cells of a counts file."""
    return {
        "task": job.task.name,
        "generation": job.generation.number,
        "classes": list(manifest.classes),
        "manifest": manifest.fingerprint,
        "protocol": job.task.cells[0].protocol.model_dump(mode="json"),
        "provenance": job.provenance,
        "source": job.task.source,
        "time": time.time(),
    }
