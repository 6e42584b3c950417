"""`--profile`: write the time of each part of a job to its log and to RUN/profiles.

The parts of training are data (waiting for the loaders, and copies to the GPU), backbone, heads
(forward and backward), losses (resizing, the loss, and the gradient of both), optimiser,
communication, checkpoints, and other. Communication is all collectives of `Group`, and the rest of
a head's all-reduce after its backward pass. Communication of batch norm counts as part of its
network. The parts of evaluation are data, backbone, heads, counts, communication, and other.
Measuring waits for the GPU at the end of each part, so a profiled run is slower; its bits are the
same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from hpc.distributed.process_group import Group
from hpc.storage.atomic import write_json
from jobs.training.job_run import JobRun

DATA = "data"


def report(job: JobRun, stage: str, unit: str, done: int) -> None:
    """Write the profile of a stage to the log and to a file; do nothing without `--profile`.

    All ranks must call this together.

    Args:
        job: this start of the job.
        stage: "training" or "evaluation".
        unit: "steps" or "images".
        done: number of units; no file is written for 0.
    """
    watch = job.group.watch
    if not watch.running:
        return
    ranks = of_all_ranks(job.group, watch.lap())
    for line in table(stage, unit, done, ranks):
        job.log(line)
    record = {"stage": stage, unit: done, "generation": job.generation.number, "ranks": ranks,
              "provenance": job.provenance}  # fmt: skip
    path = job.task.paths.profile(job.task.name, job.generation.number, stage)
    if done:
        job.group.on_main(lambda: write_json(path, record, job.generation.check))
    watch.lap()


def of_all_ranks(group: Group, seconds: Mapping[str, float]) -> list[dict[str, float]]:
    """Return the `seconds` by part of each rank. All ranks must call it together."""
    return [group.broadcast(dict(seconds), source=rank) for rank in range(group.world_size)]


def table(stage: str, unit: str, done: int, ranks: Sequence[Mapping[str, float]]) -> Iterator[str]:
    """Yield the lines of a profile: rates with and without waiting for data, then the parts.

    Times are means over ranks; the longest part comes first.
    """
    parts = {part for seconds in ranks for part in seconds}
    mean = {part: sum(r.get(part, 0.0) for r in ranks) / len(ranks) for part in parts}
    total = sum(mean.values())
    yield f"profile of {stage}: {done} {unit} in {total:.2f} s"
    if done and total:
        without = done / (total - mean.get(DATA, 0.0))
        yield f"  {done / total:.3f} {unit} a second, {without:.3f} without waiting for data"
        for part in sorted(parts, key=lambda part: -mean[part]):
            share, each = mean[part] / total, 1000 * mean[part] / done
            yield f"  {part:13} {share:6.1%} {mean[part]:10.2f} s {each:10.2f} ms each"
