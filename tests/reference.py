"""Write the reference pages of the grid file and the cluster profile from the models: `make docs`.

Types, ranges and defaults come from the JSON schema of a model, meanings from the docstring below
each of its fields. A docstring may end with the unit of the field: `Unit: pixels.`
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from data_prep.settings import SOURCES, DatasetSettings
from hpc.scheduler.cluster_profile import ClusterProfile
from jobs.losses.grammar import KINDS, PARAMETERS
from jobs.models.registry import MODELS, STRIDE
from jobs.spec.protocol import RUNTIME_FIELDS, Pretrain, Protocol
from pipeline.config.grid_file import GridFile
from pipeline.config.losses import KnotTable, LossTable

PAGES = Path(__file__).parents[1] / "docs/reference"
HEADER = "| key | type | range | default | unit | meaning |\n|---|---|---|---|---|---|\n"
NOTE = "<!-- Written by `make docs` from the models. Edit the docstrings of the fields there. -->\n"
PLAIN = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false",
         "object": "table", "null": ""}  # fmt: skip


def pages() -> dict[str, str]:
    """Return the text of each generated page by its file name."""
    return {"grid-file.md": grid_file_page(), "cluster-profile.md": cluster_profile_page()}


RUNTIME = (
    "The defaults are those of the paper. These keys are not part of the identity of a cell: "
    f"{', '.join(f'`{name}`' for name in sorted(RUNTIME_FIELDS))}. Of these, `threads` and "
    "`deterministic` can change rounding."
)


def grid_file_page() -> str:
    """Return the page of the grid file."""
    per_dataset = "Takes the keys of `[protocol]` and replaces them for the data set NAME."
    pretrain = "Pre-training of a whole network with CE. Other settings are those of `[protocol]`."
    cluster = "Takes the keys of a [cluster profile](cluster-profile.md)."
    audience = "For users who write a grid file: all keys with type, range, default and meaning."
    shared = ("`[dataset.NAME]`: keys of every source", "NAME is free.", fields(DatasetSettings))
    sections = [
        ("The top level", "", fields(GridFile)),
        shared,
        *(_source_section(name, model) for name, model in SOURCES.items()),
        ("`[protocol]`", RUNTIME, fields(Protocol)),
        ("`[protocol.pretrain]`", pretrain, fields(Pretrain)),
        ("`[protocol.per_dataset.NAME]`", per_dataset, ""),
        ("`[[loss]]`", "One table for each loss of your own.", fields(LossTable)),
        ("Entries of `schedule`", "Sorted by `at`.", fields(KnotTable)),
        _loss_names(),
        _models(),
        ("`[cluster]`", cluster, ""),
    ]
    return _page("The grid file", audience, sections)


def cluster_profile_page() -> str:
    """Return the page of the cluster profile."""
    intro = (
        "A profile is the file `configs/clusters/NAME.toml`, a file at another path, or the table "
        "`[cluster]` of a grid file. Slurm gets no option for a key that is not given or empty."
    )
    audience = "For users who describe a site: all keys with type, range, default and meaning."
    return _page("The cluster profile", audience, [("Keys", intro, fields(ClusterProfile))])


def fields(model: type[BaseModel], leave_out: Iterable[str] = ()) -> str:
    """Return a table with a row for each field of `model`.

    Raises:
        KeyError: a field has no docstring.
    """
    schema = model.model_json_schema()
    meanings = field_docstrings(model)
    rows = [
        _row(
            name,
            _resolved(schema["properties"][name], schema),
            field.get_default(call_default_factory=True),
            meanings[name],
        )
        for name, field in model.model_fields.items()
        if name not in set(leave_out)
    ]
    return HEADER + "".join(rows)


def field_docstrings(model: type[BaseModel]) -> dict[str, str]:
    """Return the docstring below each field of `model` and of the models that it extends."""
    found: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if issubclass(base, BaseModel) and base.model_fields:
            found |= _own_docstrings(base)
    return found


def _own_docstrings(model: type[BaseModel]) -> dict[str, str]:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    assert isinstance(definition, ast.ClassDef)
    pairs = zip(definition.body, definition.body[1:], strict=False)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairs
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def _row(name: str, schema: Mapping[str, Any], default: Any, meaning: str) -> str:
    meaning, _, unit = meaning.partition(" Unit: ")
    spread = "; ".join(dict.fromkeys(_ranges(schema)))
    cells = [f"`{name}`", _type(schema), spread, _default(default), unit.rstrip("."), meaning]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def _resolved(part: Any, schema: Mapping[str, Any]) -> dict[str, Any]:
    if "$ref" in part:
        return dict(schema["$defs"][part["$ref"].rsplit("/", 1)[1]])
    return dict(part)


def _type(part: Mapping[str, Any]) -> str:
    if "anyOf" in part:
        return " or ".join(filter(None, map(_type, part["anyOf"])))
    if "enum" in part or "const" in part:
        return ", ".join(
            f"`{json.dumps(value)}`" for value in part.get("enum", [part.get("const")])
        )
    if part["type"] != "array":
        return PLAIN[part["type"]]
    if "prefixItems" in part:
        return f"list of {len(part['prefixItems'])}: {_type(part['prefixItems'][0])}"
    return f"list of {_type(part['items'])}"


def _ranges(part: Mapping[str, Any]) -> Iterator[str]:
    for inner in [*part.get("anyOf", ()), *part.get("prefixItems", ()), part.get("items", False)]:
        if isinstance(inner, dict):
            yield from _ranges(inner)
    integer = part.get("type") == "integer"
    low, high = part.get("minimum"), part.get("maximum")
    if integer and "exclusiveMaximum" in part:
        high = part["exclusiveMaximum"] - 1
    if low is not None and high is not None:
        yield f"{_number(low)} to {_number(high)}"
    elif low is not None:
        yield f"{_number(low)} or more" + _below(part)
    elif "exclusiveMinimum" in part:
        upper = f", at most {_number(high)}" if high is not None else ""
        yield f"more than {_number(part['exclusiveMinimum'])}{upper}"
    if "minItems" in part and "prefixItems" not in part:
        yield f"{part['minItems']} entry or more"


def _below(part: Mapping[str, Any]) -> str:
    return f", less than {_number(part['exclusiveMaximum'])}" if "exclusiveMaximum" in part else ""


def _number(value: float) -> str:
    return "2^63 - 1" if value == 2**63 - 1 else f"{value:,.0f}" if value >= 1e3 else f"{value:g}"


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return "its defaults"
    return "not given" if value is None else f"`{json.dumps(value)}`"


def _source_section(name: str, model: type[BaseModel]) -> tuple[str, str, str]:
    shared = set(DatasetSettings.model_fields) - {"source"}
    return f'`[dataset.NAME]` with `source = "{name}"`', "", fields(model, leave_out=shared)


def _loss_names() -> tuple[str, str, str]:
    intro = (
        "`W` in front of a loss weights the classes by their inverse frequency. Numbers in "
        "brackets replace the defaults, as in `FL[2]`. Two names side by side are their mean "
        "(`DLCE`). `N` or `A` between them is a naive or an alternating "
        "schedule that ends with the second "
        "(`DLNWCE`). `@` gives the ramp, as in `DLNWCE@0.2-0.8`. `pre-fine` is CE "
        'from the weights `"pre-fine"`.'
    )
    rows = [
        f"| `{kind}` | {meaning} | {'; '.join(map(_parameter, PARAMETERS.get(kind, ())))} |\n"
        for kind, meaning in KINDS.items()
    ]
    return "Names of losses", intro, "| name | loss | numbers |\n|---|---|---|\n" + "".join(rows)


def _parameter(parameter: Any) -> str:
    span = f"{_number(parameter.low)} to {_number(parameter.high)}"
    return f"`{parameter.name}` = {parameter.default:g} ({span})"


def _models() -> tuple[str, str, str]:
    rows = [
        f"| `{name}` | `{model.head}` | `{model.backbone}` | {STRIDE[model.backbone]} |\n"
        for name, model in MODELS.items()
    ]
    head = "| model | head | backbone | pixels per position of the logits |\n|---|---|---|---|\n"
    return "`MODELS`", "Names for the key `models`.", head + "".join(rows)


def _page(title: str, audience: str, sections: Iterable[tuple[str, str, str]]) -> str:
    parts = [f"# {title}\n", f"{audience}\n", NOTE]
    for heading, intro, table in sections:
        parts += [
            f"## {heading}\n",
            *([f"{intro}\n"] if intro else []),
            *([table] if table else []),
        ]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGES.mkdir(exist_ok=True)
    for file, text in pages().items():
        (PAGES / file).write_text(text, encoding="utf-8")
