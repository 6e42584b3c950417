"""Check each of the paper's claims on a grid's own results.

A claim is a pure function of the evidence. Its `criterion` states its threshold and the reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations

from data_prep.weights import PRE_FINE
from jobs.models.registry import MODELS
from pipeline.paper.reference import paper_evidence
from pipeline.paper.verdicts import (
    MARGIN,
    Block,
    Case,
    Claim,
    Part,
    above,
    ahead,
    alike,
    apart,
    blocks,
    classes_left_out,
    ends_in_wce,
    has_wce,
    heads_apart,
    joined,
    plain,
    varies_more,
)
from pipeline.scores.evidence import Evidence, Kind
from pipeline.scores.score_table import LABELS, PAPER_SCORES, markdown_escaped

DICE = frozenset({"DL", "WDL"})
VOC_AND_SBD = ("voc", "sbd")
RESEMBLES = 0.5
AGREES = 0.25
NO_LESS = f"by more than {MARGIN} (the paper's two digits would not show less)"
SCALE = "the effect of schedules towards WCE over the static CE and dice losses (medians)"
SAID = {True: "holds", False: "does not hold", None: "cannot be judged"}


def check(evidence: Evidence, paper_datasets: Mapping[str, str]) -> list[Claim]:
    """Judge all claims, in the order of the paper's argument.

    `paper_datasets` maps each data set to the paper's name for it, "" for another data set.
    """
    return [
        _recall_for_accuracy(evidence),
        _worst_calibrated(evidence),
        _static_compounds(evidence),
        _back_to_ce(evidence),
        _schedules_agree(evidence),
        _no_trend(evidence),
        _ramps_matter_little(evidence),
        _ratios_matter_little(evidence),
        _dice_varies_most(evidence),
        _deeplab_against_fcn(evidence, paper_datasets),
        _deeplab_calibrates_worse(evidence),
        _no_class_left_out(evidence),
        _pre_fine_wins(evidence, paper_datasets),
    ]


def _recall_for_accuracy(evidence: Evidence) -> Claim:
    def judge(block: Block) -> Case:
        compounds, others = block.losses(has_wce), block.losses(plain)
        return block.judged(
            {"a compound loss with WCE": compounds, "a static CE or dice loss": others},
            lambda: [
                above(block, compounds, others, "rec"),
                above(block, others, compounds, "acc"),
            ],
        )

    return Claim(
        "recall_for_accuracy",
        "Compound losses with weighted CE trade accuracy for class-averaged recall.",
        "Every loss of two terms that ends with WCE, static or scheduled, has higher recall and "
        f"lower accuracy than every static loss of CE and dice without WCE, {NO_LESS}. The choice "
        "of these static losses is our reading.",
        tuple(judge(block) for block in blocks(evidence)),
    )


def _worst_calibrated(evidence: Evidence) -> Claim:
    def judge(block: Block) -> Case:
        fl, cemp = block.losses(_static("FL")), block.losses(_static("CEMP"))
        others = block.losses(lambda kind: not any("FL" in t or "MP" in t for t in kind.terms))
        return block.judged(
            {"FL": fl, "CEMP": cemp, "another loss": others},
            lambda: [above(block, others, fl + cemp, "cal")],
        )

    return Claim(
        "worst_calibrated",
        "FL and CEMP have the worst calibration.",
        f"Every loss without a focal or max-pooled term has a higher cal than both, {NO_LESS}.",
        tuple(judge(block) for block in blocks(evidence)),
    )


def _static_compounds(evidence: Evidence) -> Claim:
    def judge(block: Block) -> Case:
        compounds = block.losses(
            lambda kind: (
                not kind.scheduled
                and len(kind.terms) > 1
                and "CE" in kind.end
                and DICE.issuperset(kind.end - {"CE"})
            )
        )
        traditional = block.losses(_static("CE", "FL"))
        pairs = [(loss, other) for loss in compounds for other in traditional]
        return block.judged(
            {"a static compound of dice and CE": compounds, "CE or FL": traditional},
            lambda: [alike(block, pairs, score, RESEMBLES) for score in ("rec", "acc")],
        )

    return Claim(
        "static_compounds",
        "Static compound losses with unweighted CE resemble the traditional losses.",
        "The recall and accuracy of DLCE and WDLCE, in any ratio, differ from those of CE and FL "
        f"by at most half of {SCALE}. Our reading: the traditional losses are CE and FL, because "
        "a dice loss alone varies over seeds. Calibration, in which FL differs, is not compared.",
        tuple(judge(block) for block in blocks(evidence)),
    )


def _back_to_ce(evidence: Evidence) -> Claim:
    def judge(block: Block) -> Case:
        schedules = block.losses(lambda kind: kind.scheduled and kind.end == {"CE"})
        ce = block.losses(_static("CE"))
        pairs = [(loss, other) for loss in schedules for other in ce]
        return block.judged(
            {"a schedule towards CE": schedules, "CE": ce},
            lambda: [alike(block, pairs, score, RESEMBLES) for score in ("rec", "acc")],
        )

    return Claim(
        "back_to_ce",
        "Losses that end in unweighted CE resemble CE.",
        f"Their recall and accuracy differ from CE's by at most half of {SCALE}.",
        tuple(judge(block) for block in blocks(evidence)),
    )


def _naive_and_alternating(block: Block) -> list[tuple[str, str]]:
    """Return the pairs of a naive and an alternating schedule between the same two losses."""
    kinds = block.evidence.kinds
    naive = block.losses(lambda kind: kind.scheduled and kind.start == {kind.terms[0]})
    alternating = block.losses(lambda kind: kind.scheduled and kind.start == kind.end)
    return [
        (one, other)
        for one in naive
        for other in alternating
        if kinds[one].terms == kinds[other].terms
        and kinds[one].end == kinds[other].end
        and one.partition("@")[2] == other.partition("@")[2]
    ]


def _schedules_agree(evidence: Evidence) -> Claim:
    def judge(block: Block) -> Case:
        pairs = _naive_and_alternating(block)
        return block.judged(
            {
                "a naive schedule with its alternating one": [one for one, _ in pairs],
                "an alternating schedule with its naive one": [other for _, other in pairs],
            },
            lambda: [
                *(alike(block, pairs, score, AGREES) for score in ("rec", "acc")),
                apart(block, pairs, "cal"),
            ],
        )

    return Claim(
        "schedules_agree",
        "The two schedules, naive and alternating, agree.",
        f"Between the same two losses, their recall and accuracy differ by at most a quarter of "
        f"{SCALE}. Calibration is shown but not judged: it differs by up to 0.07 in the paper's "
        "own table.",
        tuple(judge(block) for block in blocks(evidence)),
    )


def _no_trend(evidence: Evidence) -> Claim:
    def judge(dataset: str, of_dataset: Sequence[Block]) -> Case:
        pairs = [(block, _naive_and_alternating(block)) for block in of_dataset]
        models = tuple(block.model for block in of_dataset)
        sides = tuple(dict.fromkeys(loss for _, of in pairs for pair in of for loss in pair))
        if sum(len(of) for _, of in pairs) < 2:
            text = f"missing: {dataset}/two naive schedules with their alternating ones"
            return Case(dataset, models, None, (text,), (sides,))
        parts = [_either_way(pairs, score) for score in ("rec", "acc", "cal", "s_rec")]
        return Case(dataset, models, *joined(parts), (sides,))

    by_dataset: dict[str, list[Block]] = {}
    for block in blocks(evidence):
        by_dataset.setdefault(block.dataset, []).append(block)
    return Claim(
        "no_trend",
        "There is no consistent trend between the naive and the alternating schedule.",
        "Over all models and pairs of losses of a data set, neither schedule is higher in every "
        f"pair, {NO_LESS}. This holds for recall, accuracy, cal and S_rec each. The paper does not "
        "define a trend; this definition is our reading.",
        tuple(judge(dataset, of_dataset) for dataset, of_dataset in by_dataset.items()),
    )


def _either_way(pairs: Sequence[tuple[Block, Sequence[tuple[str, str]]]], score: str) -> Part:
    signs = [sign for block, of in pairs for sign in ahead(block, of, score)]
    naive, alternating = signs.count(1), signs.count(-1)
    if len(signs) < 2:
        return Part(None, f"{LABELS[score]} is defined for {len(signs)} of the pairs, fewer than 2")
    return Part(
        len(signs) not in (naive, alternating),
        f"{LABELS[score]} higher with the naive schedule in {naive}, with the alternating one in "
        f"{alternating} of {len(signs)} pairs",
    )


def _ramps_matter_little(evidence: Evidence) -> Claim:
    def judge(block: Block) -> Case:
        kinds = block.evidence.kinds
        scheduled = block.losses(lambda kind: kind.scheduled)
        pairs = [
            pair
            for pair in combinations(scheduled, 2)
            if kinds[pair[0]].family == kinds[pair[1]].family
            and kinds[pair[0]].schedule != kinds[pair[1]].schedule
        ]
        return block.judged(
            {"a schedule at two or more (s, e)": [name for pair in pairs for name in pair]},
            lambda: [alike(block, pairs, score, AGREES) for score in ("rec", "acc")],
        )

    return Claim(
        "ramps_matter_little",
        "Results depend little on where a schedule's ramp begins and ends (s and e).",
        f"Losses that differ in s and e alone differ in recall and accuracy by at most a quarter "
        f"of {SCALE}.",
        tuple(judge(block) for block in blocks(evidence)),
    )


def _ratios_matter_little(evidence: Evidence) -> Claim:
    def judge(block: Block) -> Case:
        kinds = block.evidence.kinds
        static = block.losses(lambda kind: not kind.scheduled and len(kind.end) > 1)
        pairs = [
            pair
            for pair in combinations(static, 2)
            if kinds[pair[0]].family == kinds[pair[1]].family
            and kinds[pair[0]].ratio != kinds[pair[1]].ratio
        ]
        return block.judged(
            {"a static compound in two or more ratios": [name for pair in pairs for name in pair]},
            lambda: [alike(block, pairs, score, AGREES) for score in ("rec", "acc")],
        )

    return Claim(
        "ratios_matter_little",
        "The ratio in which a static compound mixes its losses matters little.",
        "Static compounds of the same terms in different ratios differ in recall and accuracy by "
        f"at most a quarter of {SCALE}. This bound is our reading.",
        tuple(judge(block) for block in blocks(evidence)),
    )


def _dice_varies_most(evidence: Evidence) -> Claim:
    def judge(block: Block) -> Case:
        dice = block.losses(_static("DL", "WDL"))
        others = [loss for loss in evidence.blocks[block.dataset, block.model] if loss not in dice]
        return block.judged(
            {"DL or WDL": dice, "another loss": others}, lambda: [varies_more(block, dice, others)]
        )

    return Claim(
        "dice_varies_most",
        "Dice alone varies most over seeds.",
        "The largest standard deviation of recall over seeds is that of DL or WDL. Its own "
        "uncertainty is 40 % with 4 seeds and 70 % with 2.",
        tuple(judge(block) for block in blocks(evidence)),
    )


def _deeplab_against_fcn(evidence: Evidence, paper_datasets: Mapping[str, str]) -> Claim:
    def judge(dataset: str, backbone: str, heads: Mapping[str, str]) -> Case:
        if paper_datasets.get(dataset) not in VOC_AND_SBD:
            text = f"missing: VOC or SBD, the only data sets of this claim ({dataset} is neither)"
            return Case(dataset, tuple(heads.values()), None, (text,), ())
        return heads_apart(evidence, dataset, backbone, heads, {"acc": 1, "f1": 1, "rec": 1})

    return Claim(
        "deeplab_against_fcn",
        "On VOC and SBD, DeepLabV3 beats FCN in accuracy, F1 and recall.",
        "On the same backbone, each of the three is higher on average over the losses for which "
        f"both models define it, {NO_LESS}. The average over losses is our reading.",
        tuple(judge(*where, heads) for where, heads in _heads(evidence).items()),
    )


def _deeplab_calibrates_worse(evidence: Evidence) -> Claim:
    return Claim(
        "deeplab_calibrates_worse",
        "DeepLabV3 is calibrated worse than FCN.",
        "On the same backbone, its cal is lower on average over the losses that both models have, "
        f"{NO_LESS}. The average over losses is our reading.",
        tuple(
            heads_apart(evidence, *where, heads, {"cal": -1})
            for where, heads in _heads(evidence).items()
        ),
    )


def _heads(evidence: Evidence) -> dict[tuple[str, str], dict[str, str]]:
    """Return the models' names by head, for each data set and backbone."""
    models: dict[tuple[str, str], dict[str, str]] = {}
    for dataset, model in evidence.blocks:
        if model in MODELS:
            heads = models.setdefault((dataset, MODELS[model].backbone), {})
            heads[MODELS[model].head] = model
    return models


def _no_class_left_out(evidence: Evidence) -> Claim:
    families = {kind.family for kind in paper_evidence().kinds.values()}

    def expected(kind: Kind) -> bool:
        return ends_in_wce(kind) or (not kind.scheduled and kind.terms == ("DL", "WCE"))

    def judge(block: Block) -> Case:
        complete = block.losses(expected)
        others = block.losses(lambda kind: kind.family in families and not expected(kind))
        return block.judged(
            {"a schedule towards WCE or DLWCE": complete, "another loss of the paper": others},
            lambda: [classes_left_out(block, complete, others)],
        )

    return Claim(
        "no_class_left_out",
        "Only schedules that end in WCE, and DLWCE, leave no class unpredicted on the most "
        "imbalanced data.",
        "The most imbalanced data set has the largest ratio of its most frequent class to its "
        "rarest. There F1 is defined with every seed for these losses. For every other loss of the "
        "paper's table it is undefined with at least one seed. F1 is undefined if a class is never "
        "predicted or never right; the paper's table does not distinguish the two. WCE and WDL "
        "with class weights are not in that table, and are not judged.",
        tuple(
            judge(block) for block in blocks(evidence) if block.dataset == evidence.most_imbalanced
        ),
    )


def _pre_fine_wins(evidence: Evidence, paper_datasets: Mapping[str, str]) -> Claim:
    exceptions = _pre_fine_exceptions()

    def judge(block: Block) -> list[Case]:
        losses = evidence.blocks[block.dataset, block.model]
        pre_fine = [loss for loss in losses if loss == PRE_FINE]
        others = [loss for loss in losses if loss != PRE_FINE]
        sides = {PRE_FINE: pre_fine, "another loss": others}
        if not all(sides.values()):
            return [block.judged(sides, list)]
        paper_dataset = paper_datasets.get(block.dataset, "")
        return [
            _score_by_score(
                block.case(sides, [above(block, pre_fine, others, score)]),
                (paper_dataset, block.model, score) in exceptions,
            )
            for score in PAPER_SCORES
        ]

    named = "; ".join(f"{LABELS[score]} of {model} on {data}" for data, model, score in exceptions)
    return Claim(
        "pre_fine_wins",
        "Starting from weights trained for segmentation wins: pre-fine is the best in every score.",
        f"Each of the paper's six scores is above that of every loss, {NO_LESS}. Each score is a "
        f"separate case. Exceptions in the paper's own table: {named}.",
        tuple(case for block in blocks(evidence) for case in judge(block)),
    )


def _score_by_score(case: Case, is_exception: bool) -> Case:
    if case.holds is not False or not is_exception:
        return case
    return replace(case, texts=(*case.texts, "the paper's table has the same exception"))


@cache
def _pre_fine_exceptions() -> tuple[tuple[str, str, str], ...]:
    """Return (data set, model, score) where pre-fine is not the best in the paper's own table."""
    table = paper_evidence()
    return tuple(
        (block.dataset, block.model, score)
        for block in blocks(table)
        if PRE_FINE in table.blocks[block.dataset, block.model]
        for score in PAPER_SCORES
        if not above(
            block,
            [PRE_FINE],
            [loss for loss in table.blocks[block.dataset, block.model] if loss != PRE_FINE],
            score,
        ).holds
    )


def to_json(claims: Sequence[Claim]) -> str:
    """Return the claims as JSON, with their verdicts and the cells that each case compares."""
    return json.dumps(
        [
            {
                "claim": claim.key,
                "sentence": claim.sentence,
                "criterion": claim.criterion,
                "verdict": claim.verdict,
                "extent": claim.extent,
                "findings": [
                    {
                        "dataset": case.dataset,
                        "models": case.models,
                        "holds": case.holds,
                        "text": case.texts,
                        "cells": case.cells,
                    }
                    for case in claim.cases
                ],
            }
            for claim in claims
        ],
        indent=1,
        ensure_ascii=False,
    )


def to_markdown(claims: Sequence[Claim]) -> str:
    """Return the claims as Markdown, a heading for each claim and a line for each case."""
    parts = []
    for claim in claims:
        parts.append(f"## {markdown_escaped(claim.sentence)}\n\n")
        parts.append(f"**{claim.verdict}** ({claim.extent}). {markdown_escaped(claim.criterion)}\n")
        for case in claim.cases:
            where = markdown_escaped(f"{case.dataset} · {', '.join(case.models)}")
            against = " against ".join(", ".join(side) for side in case.sides if side)
            text = markdown_escaped(f"{'; '.join(case.texts)}. Compared: {against or 'nothing'}.")
            parts.append(f"\n* {where}: **{SAID[case.holds]}**. {text}")
        parts.append("\n\n")
    return "".join(parts)


def _static(*terms: str) -> Callable[[Kind], bool]:
    return lambda kind: not kind.scheduled and len(kind.terms) == 1 and kind.terms[0] in terms
