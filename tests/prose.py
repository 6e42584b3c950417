"""Check docstrings and links in the docs, as a part of `make lint`: `python -m tests.prose`.

A docstring opens with an imperative summary, not with a noun clause such as "What a job does".
Relative links, their anchors and the paths of code in Markdown pages exist.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("hpc", "data_prep", "jobs", "pipeline")
# folders whose docstrings are checked
FINISHED = (*PACKAGES, "benchmarks", "tests")
ROOTS = (*PACKAGES, "benchmarks", "tests", "configs", "docs")
NOUN_CLAUSE = re.compile(
    r"(What|Who|Whose|How|Whether|Where|When|Which|Why|Those|Whatever|Whoever)\b"
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
FILE = re.compile(rf"({'|'.join(ROOTS)})/[\w./*-]*")
MODULE = re.compile(rf"({'|'.join([*PACKAGES, 'benchmarks', 'tests'])})(\.[a-z_]\w*)+")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def noun_clauses(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and docstring for each docstring of `source` that opens with a noun clause."""
    for node in ast.walk(ast.parse(source)):
        text = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
        if text and NOUN_CLAUSE.match(text):
            yield getattr(node, "lineno", 1), text.splitlines()[0]


def broken_links(page: Path) -> Iterator[str]:
    """Yield the relative links of a Markdown page whose file or anchor does not exist."""
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        file = page.parent / target if target else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            yield link


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes from the headings of a Markdown page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing_paths(page: Path, repository: Path = REPOSITORY) -> Iterator[str]:
    """Yield the words between backticks that look like our files or modules and do not exist.

    Words with a placeholder in capitals, such as `configs/NAME.toml`, are left out.
    """
    for code in CODE.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        for word in (word.split("::")[0].strip(",;:") for word in code.split()):
            if re.search(r"\b[A-Z]+\b", word):
                continue
            if FILE.fullmatch(word) and not any(repository.glob(word.rstrip("/"))):
                yield word
            if MODULE.fullmatch(word) and not is_module(word, repository):
                yield word


def is_module(name: str, repository: Path = REPOSITORY) -> bool:
    """Return whether `name` is a module or package of ours, or a name defined in one."""
    path = repository / name.replace(".", "/")
    if path.is_dir() or path.with_suffix(".py").is_file():
        return True
    module = path.parent.with_suffix(".py")
    return module.is_file() and bool(
        re.search(rf"^(def|class) {path.name}\b|^{path.name}\b", module.read_text(), re.MULTILINE)
    )


def pages() -> list[Path]:
    """Return the Markdown pages that git knows or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return [
        REPOSITORY / name for name in listed.stdout.splitlines() if (REPOSITORY / name).exists()
    ]


def problems(folders: Iterable[str] = FINISHED) -> Iterator[str]:
    """Yield a line for each problem in the docstrings below `folders` and in all pages."""
    for path in sorted(path for folder in folders for path in (REPOSITORY / folder).rglob("*.py")):
        source, name = path.read_text(encoding="utf-8"), path.relative_to(REPOSITORY)
        for line, text in noun_clauses(source):
            yield f"{name}:{line}: docstring opens with a noun clause: {text}"
    for page in pages():
        name = page.relative_to(REPOSITORY)
        yield from (f"{name}: link to {link}, which does not exist" for link in broken_links(page))
        yield from (f"{name}: {path} does not exist" for path in missing_paths(page))


def main() -> int:
    """Print all problems; folders as arguments are checked in place of `FINISHED`."""
    found = list(problems(sys.argv[1:] or FINISHED))
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
