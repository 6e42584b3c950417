"""The paper's loss names, and what each of them stands for."""

import csv
import itertools
from pathlib import Path

import pytest

from jobs.losses.grammar import Term, UnknownLoss, example_names, parse_loss, with_ramp

PAPER = Path(__file__).parents[4] / "shared" / "paper" / "table1.csv"
TABLE_1 = [
    *("WCE", "WDL", "FL", "CEMP"),
    *("DLCE", "WDLCE", "DLWCE", "WDLWCE"),
    *("DLNCE", "DLACE", "WDLNCE", "WDLACE"),
    *("DLNWCE", "DLAWCE", "WDLNWCE", "WDLAWCE"),
]

CE, WCE = Term("CE", weighted=False), Term("CE", weighted=True)
DL, WDL = Term("DL", weighted=False), Term("DL", weighted=True)
FL, WFL = Term("FL", weighted=False), Term("FL", weighted=True)
TL, WTL = Term("TL", weighted=False), Term("TL", weighted=True)
CEMP, WFLMP = Term("CEMP", weighted=False), Term("FLMP", weighted=True)
KINDS = ("CE", "CEMP", "CEMP[2,0.5]", "DL", "FL", "FL[1]", "FLMP", "TL", "TL[0.5,1]")


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
    assert losses == {*TABLE_1, "pre-fine"}  # pre-fine is CE from other weights


@pytest.mark.parametrize(
    ("name", "terms"),
    [
        *[("CE", (CE,)), ("WCE", (WCE,)), ("DL", (DL,)), ("WDL", (WDL,))],
        *[("FL", (FL,)), ("WFL", (WFL,)), ("DLCE", (DL, CE)), ("WDLCE", (WDL, CE))],
        *[("DLWCE", (DL, WCE)), ("WDLNWCE", (WDL, WCE)), ("DLACE", (DL, CE))],
        *[("FLNCE", (FL, CE)), ("WFLAWCE", (WFL, WCE)), ("CENDL", (CE, DL))],
        *[("CEMP", (CEMP,)), ("DLCEMP", (DL, CEMP)), ("CEMPNCE", (CEMP, CE))],
        *[
            ("TLAWFLMP", (TL, WFLMP)),
            ("WTLCE", (WTL, CE)),
            ("WTL[0.5,2]NWTL", (Term("TL", weighted=True, parameters=(0.5, 2.0)), WTL)),
        ],
    ],
)
def test_terms_stand_in_the_order_of_the_name(name, terms):
    assert parse_loss(name).terms == terms


def test_the_grammar_is_unambiguous():
    """No two names stand for the same terms and schedule, and a term's name parses to itself."""
    terms = [w + kind for kind in KINDS for w in ("", "W")]
    ways = ["", "N", "N@0.1-0.2", "A", "A@0.1-0.2"]
    names = [
        first + how[:1] + second + how[1:]
        for first, how, second in itertools.product(terms, ways, terms)
    ]
    meanings = {(parse_loss(name).terms, parse_loss(name).schedule) for name in names}
    assert len(meanings) == len(names) == len(set(names))
    for loss in map(parse_loss, names):
        assert [parse_loss(term.name).terms for term in loss.terms] == [(t,) for t in loss.terms]


@pytest.mark.parametrize(
    "name",
    ["", "W", "ce", "wCE", "WWCE", "NCE", "CEN", "DLNNCE", "DLNACE", "DL CE", "DL-CE", "DLXCE",
     "CEDLFL", "DLNCENFL", "XDL", "CE ", " CE", "CE\n", "MPCE", "Dice", "DLMP", "TLMP", "CEMPMP",
     "CE[0.1,0.2]", "DL[1]", "TL[0.1]", "TL[1,1,1]", "FL[]", "FL[1,2]", "FL[-1]", "FL[101]",
     "FL[1]MP", "CEMP[1.3]", "CEMP[1,0.1]", "CEMP[1.3,0]", "CEMP[1.3,1.5]", "FLMP[1.3,0.1]",
     "TL[-1,2]", "TL[0,0]", "TL[nan,1]", "CE@0.1-0.2", "DLCE@0.1-0.2",
     "DLNCE@0.2-0.1", "DLNCE@0-0.5", "DLNCE@0.5-1.1", "DLNCE@0.5"],
)  # fmt: skip
def test_a_name_outside_the_grammar_is_refused(name):
    with pytest.raises(UnknownLoss):
        parse_loss(name)


def test_every_suggested_name_is_a_loss():
    names = example_names()
    assert len(names) == len(set(names))
    assert {parse_loss(name).name for name in names} == set(names)
    assert set(TABLE_1) <= set(names)


def test_a_loss_is_a_value():
    assert parse_loss("WDLNWCE") == parse_loss("WDLNWCE")
    assert parse_loss("WDLNWCE") != parse_loss("WDLAWCE")
    assert parse_loss("DLNCE", naive=(0.2, 0.9)) != parse_loss("DLNCE")
    assert parse_loss("DLNCE", alternating=(0.2, 0.9)) == parse_loss("DLNCE")


def test_a_name_may_say_where_its_ramp_lies():
    for how in "NA":
        loss = parse_loss(f"WDL{how}WCE@0.2-0.85")
        assert loss.name == f"WDL{how}WCE@0.2-0.85"
        plain = parse_loss(f"WDL{how}WCE", naive=(0.2, 0.85), alternating=(0.2, 0.85))
        assert loss.schedule == plain.schedule
        assert parse_loss(loss.name, naive=(0.4, 0.5), alternating=(0.4, 0.5)) == loss


def test_a_ramp_can_be_given_to_the_losses_that_have_one():
    assert with_ramp("WDLNWCE", 0.25, 1.0) == "WDLNWCE@0.25-1"
    assert with_ramp("TL[0.5,2]ACE", 0.1, 0.3) == "TL[0.5,2]ACE@0.1-0.3"
    assert with_ramp("WDLNWCE@0.1-0.2", 0.3, 0.4) == "WDLNWCE@0.1-0.2"
    for name in ("CE", "DLCE", "CEMP"):
        assert with_ramp(name, 0.3, 0.4) == name
    with pytest.raises(UnknownLoss):
        with_ramp("CX", 0.3, 0.4)


@pytest.mark.parametrize(
    ("short", "written_out"),
    [
        ("TL", "TL[0.3,0.7]"),
        ("FL", "FL[2]"),
        ("CEMP", "CEMP[1.3,0.1]"),
        ("FLMP", "FLMP[2,1.3,0.1]"),
    ],
)
def test_a_loss_whose_usual_parameters_are_written_out_is_the_same_loss(short, written_out):
    assert parse_loss(written_out).terms == parse_loss(short).terms


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("CE[1]", "CE has no parameters"),
        ("CEMP[2]", "write CEMP[p,share]"),
        ("FLMP[2,1.3]", "write FLMP[gamma,p,share]"),
        ("CEMP[1,0.1]", "p of CEMP must be from 1.05 to 100"),
        ("DLNFL[1000]", "gamma of FL must be from 0 to 100"),
        ("TL[0,0]", "alpha and beta of TL cannot both be 0"),
        ("DLNWCE@0.9-0.3", "@s-e needs 0 < s < e <= 1"),
        ("DLNWCE@0.2-1.1", "@s-e needs 0 < s < e <= 1"),
        ("DLCE@0.2-0.8", "only losses with N or A have a ramp (@s-e)"),
    ],
)
def test_wrong_parameters_are_refused_with_the_reason(name, reason):
    with pytest.raises(UnknownLoss) as refused:
        parse_loss(name)
    assert refused.value.reason == reason
