"""The names of files and folders of a run directory."""

from __future__ import annotations

from pathlib import Path


class RunPaths:
    """The names that several modules use."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.tasks = self.root / "tasks"
        self.submitted = self.root / "submitted"
        self.logs = self.root / "logs"
        self.queue = self.root / "queue"
        self.counts = self.root / "counts"
        self.progress = self.root / "progress"
        self.failures = self.root / "failures"
        self.profiles = self.root / "profiles"
        self.results = self.root / "results.h5"
        self.report = self.root / "report"
        self.page = self.report / "index.html"
        self.stale = self.root / "stale"
        self.lock = self.root / "submit.lock"
        self.config = self.root / "grid.toml"
        self.rendezvous = self.root / "rendezvous"

    def task(self, name: str) -> Path:
        return self.tasks / f"{name}.json"

    def progress_of(self, task: str) -> Path:
        return self.progress / f"{task}.json"

    def profile(self, task: str, generation: int, stage: str) -> Path:
        return self.profiles / f"{task}-g{generation}-{stage}.json"

    def generations(self, bundle: str) -> Path:
        return self.root / "generations" / bundle

    def checkpoints(self, bundle: str) -> Path:
        return self.root / "checkpoints" / bundle

    def counts_of(self, task: str, generation: int) -> Path:
        return self.counts / f"{task}-g{generation}.h5"

    def failure(self, cell: str) -> Path:
        return self.failures / f"{cell}.json"

    def head(self, cell: str) -> Path:
        return self.root / "heads" / f"{cell}.pt"

    def backbone(self, key: str) -> Path:
        return self.root / "backbones" / f"{key}.pt"
