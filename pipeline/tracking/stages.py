"""The stages of a grid, and the programs of their jobs."""

from __future__ import annotations

from pipeline.tracking.submissions import BUNDLE, PRETRAIN

PREP, GRID, REDUCE, REPORT = STAGES = ("prep", "grid", "reduce", "report")  # in order

# by the kind of a job: a stage, or a kind of task of the stage `GRID`
PROGRAMS = {
    PREP: "data_prep.pack",
    PRETRAIN: "jobs.pretrain",
    BUNDLE: "jobs.train",
    REDUCE: "pipeline.reduce",
    REPORT: "pipeline.report",
}
