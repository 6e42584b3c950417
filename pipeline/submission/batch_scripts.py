"""Turn a plan into batch scripts, for sites where the user runs `sbatch`. Pure functions.

The script of an array lists its tasks, and no file beside it does. Slurm keeps a copy of the
script, so waiting elements keep their meaning when scripts are written again.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.cli import one_line
from hpc.scheduler import sbatch_options
from hpc.scheduler.clean_env import batch_lines, submitting_lines
from hpc.scheduler.cluster_profile import ClusterProfile, Resources
from jobs.spec.task import Task
from pipeline.tracking.submissions import BUNDLE, GRID, PRETRAIN, PROGRAMS, REDUCE, REPORT

MARK = "# Written by lossgrid"
SUBMIT = "submit.sh"
# Slurm refuses scripts of more than 4 MB, whatever arrays the site allows
MOST_TASKS = 10_000

_TRAIN = "train"  # the script of bundles
_PROGRAMS = {**PROGRAMS, _TRAIN: PROGRAMS[BUNDLE]}


@dataclass(frozen=True)
class ScriptSite:
    """The place where scripts run.

    Attributes:
        profile: The cluster profile.
        folder: The working directory.
        run: The run directory, absolute.
        grid: The name of the grid.
        token: The name of the record that lists the tasks.
        options: Arguments of reduce and report beside the grid file.
    """

    profile: ClusterProfile
    folder: Path
    run: Path
    grid: str
    token: str
    options: Sequence[str] = ()


@dataclass(frozen=True)
class Part:
    """One script: a stage, or some tasks of `pretrain` or `train`.

    Attributes:
        stage: The stage or kind of task.
        name: The file's name without suffix.
        tasks: The name and a remark of each task.
        needs: The script, and its element, that trains the backbone of these tasks.
    """

    stage: str
    name: str
    tasks: Sequence[tuple[str, str]] = ()
    needs: tuple[str, int] | None = None


def parts(
    stages: Sequence[str], pretrain: Sequence[Task], bundles: Sequence[Task], size: int
) -> list[Part]:
    """Return the scripts for `stages` in the order of their work. An array has at most `size`
    tasks, which all need the same backbone."""
    found = []
    for stage in stages:
        if stage == GRID:
            trainers = _arrays(PRETRAIN, [(None, task) for task in pretrain], size)
            keys = {task.name: task.cells[0].backbone_key for task in pretrain}
            trained_by = {
                keys[name]: (part.name, element)
                for part in trainers
                for element, (name, _) in enumerate(part.tasks)
            }
            needed = [(trained_by.get(_backbone(task)), task) for task in bundles]
            found += trainers + _arrays(_TRAIN, needed, size)
        else:
            found.append(Part(stage, stage))
    return found


def _backbone(task: Task) -> str:
    """Return the key of the backbone that must be trained for a task; "" if there is none."""
    cell = task.cells[0]
    return cell.backbone_key if cell.protocol.weights == "pretrain" else ""


def _arrays(
    stage: str, tasks: Sequence[tuple[tuple[str, int] | None, Task]], size: int
) -> list[Part]:
    """Return the arrays of tasks, each given with what it needs."""
    size = min(size, MOST_TASKS)
    grouped: dict[tuple[str, int] | None, list[Task]] = {}
    for needs, task in tasks:
        grouped.setdefault(needs, []).append(task)
    pieces = [
        (needs, together[start : start + size])
        for needs, together in grouped.items()
        for start in range(0, len(together), size)
    ]
    return [
        Part(stage, f"{stage}-{number}" if number > 1 else stage,
             [(task.name, _remark(task)) for task in piece], needs)
        for number, (needs, piece) in enumerate(pieces, start=1)
    ]  # fmt: skip


def _remark(task: Task) -> str:
    first = task.cells[0]
    if task.kind == PRETRAIN:
        return f"the backbone of {one_line(first.dataset)}"
    cells = "1 cell" if len(task.cells) == 1 else f"{len(task.cells)} cells"
    return f"{cells} of {one_line(first.dataset)}, seed {first.seed}"


def render(site: ScriptSite, scripts: Sequence[Part]) -> dict[str, str]:
    """Return the text of each file by its name; `submit.sh`, which sends the others, comes last."""
    files = {f"{part.name}.sbatch": script(site, part) for part in scripts}
    return files | {SUBMIT: _submit_script(site, scripts)}


def script(site: ScriptSite, part: Part) -> str:
    """Return the text of one batch script. Its logs have the names that `grid` gives to those of
    its jobs."""
    array = bool(part.tasks)
    what = f"{len(part.tasks)} tasks" if array else f"stage {part.stage}"
    log = "%A_%a_{}_log" if array else "%j_{}_log"
    lines = [
        "#!/bin/bash",
        f"{MARK}. Run it with `sbatch {part.name}.sbatch`. Running it again resumes",
        "# interrupted work and skips finished work.",
        f"# grid: {one_line(site.grid)}, {what}",
        *sbatch_options.directives(_options(site, part, log.format(0))),
        "",
        *([f"tasks=({''.join(_row(*task) for task in part.tasks)}\n)"] if array else []),
        f"run={_quoted(site.run)}",
        "",
        f"cd -- {_quoted(site.folder)} || exit 1",
        _umask(site.profile),
        *batch_lines(),
        *site.profile.setup_lines(),
        "",
    ]
    if array:
        element = "${SLURM_ARRAY_TASK_ID:?run this script with sbatch}"
        lines += [
            f"task=${{tasks[{element}]:?the script has no such task}}",
            "# from this pipeline.status knows which jobs these are",
            _note(site, part, "$SLURM_ARRAY_JOB_ID"),
            "",
        ]
    return "\n".join([*lines, *_srun(site, part, log.format("%t"))]) + "\n"


def _row(task: str, remark: str) -> str:
    return f"\n    {task}  # {remark}"


def _options(site: ScriptSite, part: Part, log: str) -> dict[str, Any]:
    given = sbatch_options.options(
        site.profile, _resources(site.profile, part), f"{site.grid}-{part.name}"
    )
    path = site.run / "logs" / log
    given |= {"output": f"{path}.out", "error": f"{path}.err", "open_mode": "append"}
    if part.tasks:
        last, together = len(part.tasks) - 1, site.profile.array_parallelism
        given["array"] = f"0-{last}%{min(last + 1, together)}"
        given["signal"] = f"USR2@{site.profile.lead_seconds}"  # the other stages do not listen
    return given | sbatch_options.free_options(site.profile)


def _resources(profile: ClusterProfile, part: Part) -> Resources:
    if part.tasks:
        return profile.training()
    return profile.reducing() if part.stage == REDUCE else profile.single()


def _srun(site: ScriptSite, part: Part, log: str) -> list[str]:
    words = shlex.join(
        ["srun", *sbatch_options.srun_options(site.profile, _resources(site.profile, part))]
    )
    what = "tasks/$task.json" if part.tasks else "grid.toml"
    more = "".join(f" {option}" for option in site.options if part.stage in (REDUCE, REPORT))
    return [
        f"{words} \\",
        f'    --output="$run/logs/{log}.out" --error="$run/logs/{log}.err" \\',
        f'    {site.profile.python_command()} -m {_PROGRAMS[part.stage]} "$run/{what}"{more}',
    ]


def _umask(profile: ClusterProfile) -> str:
    """Return the umask of `hpc.storage.permissions.restrict_umask` in words of the shell."""
    return "umask u=rwx,g=rwx,o=" if profile.group else "umask go-w"


def _note(site: ScriptSite, part: Part, job: str) -> str:
    return f': >"$run/submitted/{note_name(site.token, part)}.{job}"'


def note_name(token: str, part: Part) -> str:
    """Return the name of the notes of a script's jobs, without the job's id."""
    return f"{token}-{part.name}"


def _submit_script(site: ScriptSite, scripts: Sequence[Part]) -> str:
    variables = {part.name: part.name.replace("-", "_") for part in scripts}
    lines = [
        "#!/bin/bash",
        f"{MARK}. It submits the scripts of this folder. Training starts after the jobs",
        "# that it needs have succeeded; reduce starts after all earlier jobs have ended.",
        f"# grid: {one_line(site.grid)}",
        "set -euo pipefail",
        'cd -- "$(dirname -- "${BASH_SOURCE[0]}")"',
        f"run={_quoted(site.run)}",
        "",
        "# Variables of this shell would win over the options in the scripts, or reach the jobs.",
        *submitting_lines(),
        "",
        "send() {  # SCRIPT [DEPENDENCY]: sends it; afterok: it never starts if such a job fails",
        "    local answer job",
        '    set -- --kill-on-invalid-dep=yes ${2:+--dependency="$2"} "$1"',
        '    answer=$(sbatch --parsable "$@") || return',
        "    # ID or ID;CLUSTER is the last line that is one: a site may print others before",
        "    job=$(sed -nE 's/^(Submitted batch job )?([0-9]+)(;.*| on cluster .*)?$/\\2/p' \\",
        '        <<<"$answer" | tail -n 1)',
        '    [ -n "$job" ] || { echo "error: sbatch printed no job id: $answer" >&2; return 1; }',
        '    echo "${!#}: job $job" >&2',
        '    echo "$job"',
        "}",
        "",
    ]
    for part in scripts:
        kind, jobs = _dependency(part, scripts, variables)
        needs = f' "{kind}:{":".join(jobs)}"' if jobs else ""
        lines.append(f"{variables[part.name]}=$(send {part.name}.sbatch{needs})")
        if part.tasks:
            lines.append(_note(site, part, f"${variables[part.name]}"))
    return "\n".join(lines) + "\n"


def _dependency(
    part: Part, scripts: Sequence[Part], variables: Mapping[str, str]
) -> tuple[str, list[str]]:
    """Return the kind of a script's dependency, and its jobs in the words of the shell: the element
    that trains its backbone, or else all scripts of the stage before."""
    kind = "afterany" if part.stage == REDUCE else "afterok"
    if part.needs:
        name, element = part.needs
        return kind, [f"${{{variables[name]}}}_{element}"]
    stages = list(dict.fromkeys(other.stage for other in scripts))
    earlier = stages[: stages.index(part.stage)]
    if part.stage == _TRAIN:  # its backbones are trained already
        earlier = [stage for stage in earlier if stage != PRETRAIN]
    before = earlier[-1:]
    return kind, [f"${variables[other.name]}" for other in scripts if other.stage in before]


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
