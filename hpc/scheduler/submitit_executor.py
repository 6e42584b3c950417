"""Adapt submitit's executor for Slurm: read job ids from `sbatch --parsable`.

Importing submitit takes 0.2 s, so import this module only where jobs are submitted.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.core import Job
from submitit.core.utils import DelayedSubmission, JobPaths

from hpc.cli import UserError, one_line

# `ID[;CLUSTER]`, or sbatch's usual line if a wrapper of the site drops --parsable
_ANSWER = re.compile(r"(?:Submitted batch job )?(\d+)(?:;\S*| on cluster \S+)?")


class SlurmExecutor(submitit.SlurmExecutor):
    """Submit calls as one plain job or one array."""

    def script(self, num_calls: int) -> str:
        """Return the batch script for `num_calls` calls."""
        self._set_array_size(num_calls)
        return self._make_submission_file_text(self._submitit_command_str, "")

    def _internal_process_submissions(
        self, delayed_submissions: list[DelayedSubmission]
    ) -> list[Job[Any]]:
        # submitit would submit an array through its own class, which reads ids another way
        if len(delayed_submissions) == 1:
            return super()._internal_process_submissions(delayed_submissions)
        self._set_array_size(len(delayed_submissions))
        pickles = [self._pickled(call) for call in delayed_submissions]
        array = self._submit_command(self._submitit_command_str)
        ranks = range(array.num_tasks)
        jobs: list[Job[Any]] = [
            self.job_class(self.folder, f"{array.job_id}_{element}", ranks)
            for element in range(len(pickles))
        ]
        for job, pickle in zip(jobs, pickles, strict=True):
            job.paths.move_temporary_file(pickle, "submitted_pickle")
        return jobs

    def _set_array_size(self, num_calls: int) -> None:
        if num_calls > 1:
            self.parameters["map_count"] = num_calls

    def _pickled(self, call: DelayedSubmission) -> Path:
        folder = JobPaths.get_first_id_independent_folder(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{uuid.uuid4().hex}.pkl"
        call.set_timeout(self.parameters["time"], self.max_num_timeout)
        call.dump(path)
        return path

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return ["sbatch", "--parsable", str(submission_file_path)]

    @staticmethod
    def _get_job_id_from_submission_command(string: bytes | str) -> str:
        return parse_job_id(string if isinstance(string, str) else string.decode(errors="replace"))


def parse_job_id(answer: str) -> str:
    """Return the last job id in the output of sbatch; a site's wrapper may print other lines.

    Raises:
        UserError: No line is a job id.
    """
    lines: Sequence[str] = [line.strip() for line in answer.splitlines()]
    found = [match for match in map(_ANSWER.fullmatch, lines) if match]
    if not found:
        raise UserError(
            f"sbatch printed no job id: {one_line(answer)!r}; check with squeue whether the job is "
            "queued"
        )
    return found[-1].group(1)
