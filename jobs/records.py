"""What the index of a counts file says of its cells and of their job."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from data_prep.manifest import Manifest
from jobs.backbone import LoadedBackbone
from jobs.cell import Cell
from jobs.run import Run


def cell_record(cell: Cell, backbone: LoadedBackbone) -> dict[str, Any]:
    """How a counts file names a cell."""
    return {
        "signature": cell.signature,
        "name": cell.name,
        "dataset": cell.dataset,
        "model": cell.model,
        "loss": asdict(cell.loss),
        "seed": cell.seed,
        "backbone": backbone.sha256,
    }


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
