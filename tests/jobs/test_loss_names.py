"""The paper's loss names, and what each of them stands for."""

import csv
import itertools
from pathlib import Path

import pytest

from jobs.losses.names import Term, UnknownLoss, example_names, parse_loss

PAPER = Path(__file__).parents[3] / "shared" / "paper" / "table1.csv"
# All of Table 1 but CEMP: loss max-pooling is not a term of the grammar.
TABLE_1 = [
    *("WCE", "WDL", "FL"),
    *("DLCE", "WDLCE", "DLWCE", "WDLWCE"),
    *("DLNCE", "DLACE", "WDLNCE", "WDLACE"),
    *("DLNWCE", "DLAWCE", "WDLNWCE", "WDLAWCE"),
]

CE, WCE = Term("CE", weighted=False), Term("CE", weighted=True)
DL, WDL = Term("DL", weighted=False), Term("DL", weighted=True)
FL, WFL = Term("FL", weighted=False), Term("FL", weighted=True)


@pytest.mark.parametrize("name", TABLE_1)
def test_every_loss_of_table_1_is_understood(name):
    loss = parse_loss(name)
    assert loss.name == name
    assert len(loss.terms) == len(loss.schedule[0].weights)


@pytest.mark.shared
@pytest.mark.skipif(not PAPER.is_file(), reason="the paper's table is not beside the repository")
def test_the_list_above_is_that_of_the_paper():
    with PAPER.open() as file:
        losses = {row["loss"] for row in csv.DictReader(file)}
    known = {name for name in TABLE_1 if isinstance(name, str)}
    assert losses == known | {"CEMP", "pre-fine"}  # pre-fine is CE from other weights


@pytest.mark.parametrize(
    ("name", "terms"),
    [
        *[("CE", (CE,)), ("WCE", (WCE,)), ("DL", (DL,)), ("WDL", (WDL,))],
        *[("FL", (FL,)), ("WFL", (WFL,)), ("DLCE", (DL, CE)), ("WDLCE", (WDL, CE))],
        *[("DLWCE", (DL, WCE)), ("WDLNWCE", (WDL, WCE)), ("DLACE", (DL, CE))],
        *[("FLNCE", (FL, CE)), ("WFLAWCE", (WFL, WCE)), ("CENDL", (CE, DL))],
    ],
)
def test_terms_stand_in_the_order_of_the_name(name, terms):
    assert parse_loss(name).terms == terms


def test_the_grammar_is_unambiguous():
    """No two names stand for the same terms and schedule, and a term's name parses to itself."""
    names = ["".join(parts) for parts in itertools.product(
        ("DL", "WDL", "FL", "WFL", "CE", "WCE"), ("", "N", "A"), ("DL", "WDL", "FL", "CE", "WCE")
    )]  # fmt: skip
    meanings = {(parse_loss(name).terms, parse_loss(name).schedule) for name in names}
    assert len(meanings) == len(names) == len(set(names))
    for loss in map(parse_loss, names):
        assert [parse_loss(term.name).terms for term in loss.terms] == [(t,) for t in loss.terms]


@pytest.mark.parametrize(
    "name",
    ["", "W", "ce", "wCE", "WWCE", "NCE", "CEN", "DLNNCE", "DLNACE", "DL CE", "DL-CE", "DLXCE",
     "CEDLFL", "DLNCENFL", "XDL", "CE ", " CE", "CE\n", "MPCE", "Dice"],
)  # fmt: skip
def test_a_name_outside_the_grammar_is_refused(name):
    with pytest.raises(UnknownLoss):
        parse_loss(name)


def test_every_suggested_name_is_a_loss():
    names = example_names()
    assert len(names) == len(set(names))
    assert {parse_loss(name).name for name in names} == set(names)
    assert {name for name in TABLE_1 if isinstance(name, str)} <= set(names)


def test_a_loss_is_a_value():
    assert parse_loss("WDLNWCE") == parse_loss("WDLNWCE")
    assert parse_loss("WDLNWCE") != parse_loss("WDLAWCE")
    assert parse_loss("DLNCE", naive=(0.2, 0.9)) != parse_loss("DLNCE")
    assert parse_loss("DLNCE", alternating=(0.2, 0.9)) == parse_loss("DLNCE")
