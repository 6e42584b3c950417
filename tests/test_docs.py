"""The docs say what the code says: generated pages, links, paths, and how docstrings open."""

from __future__ import annotations

import pytest

from hpc.config import Settings
from tests import prose, reference


@pytest.mark.parametrize("name", reference.pages())
def test_a_reference_page_is_what_the_models_say(name):
    committed = (reference.PAGES / name).read_text(encoding="utf-8")
    assert committed == reference.pages()[name], "run `make docs`"


def test_docstrings_links_and_paths():
    assert list(prose.problems()) == []


class Engine(Settings):
    """A model with one field of each kind."""

    cylinders: int = 4
    """Number of cylinders. Unit: pieces."""
    ratio: tuple[float, float] = (0.5, 1.0)
    """Smallest and largest
    gear ratio."""
    fuel: str
    """Name of the fuel: `petrol | diesel`."""


def test_a_table_of_fields():
    assert reference.fields(Engine) == reference.HEADER + (
        "| `cylinders` | integer |  | `4` | pieces | Number of cylinders. |\n"
        "| `ratio` | list of 2: number |  | `[0.5, 1.0]` |  | Smallest and largest gear ratio. |\n"
        "| `fuel` | text |  | required |  | Name of the fuel: `petrol \\| diesel`. |\n"
    )


def test_a_field_without_a_docstring_is_refused():
    class Silent(Settings):
        wheels: int = 4

    with pytest.raises(KeyError, match="wheels"):
        reference.fields(Silent)


@pytest.mark.parametrize("docstring", ["What a job does.", "Whether it ran.", "Who waits."])
def test_a_docstring_that_opens_with_a_noun_clause_is_found(docstring):
    assert list(prose.noun_clauses(f'def f():\n    """{docstring}"""')) == [(1, docstring)]


def test_other_docstrings_are_not():
    assert list(prose.noun_clauses('def f():\n    """Return whether it ran."""')) == []


def test_links_and_paths_that_lead_nowhere_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n[top](#a-page) [none](#nothing) [gone](gone.md) [web](https://example.org)\n"
        "`jobs/train.py` `jobs/gone.py` `python -m jobs.train` `jobs.losses.gone.f` `jobs/NAME`\n"
        "```\n[in a listing](gone.md)\n```\n"
    )
    assert list(prose.broken_links(page)) == ["#nothing", "gone.md"]
    assert list(prose.missing_paths(page)) == ["jobs/gone.py", "jobs.losses.gone.f"]
