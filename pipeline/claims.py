"""The paper's claims, each checked on results of one's own. A claim is a pure function of the
evidence; its threshold and the reason for it stand in its criterion."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import combinations

from jobs.models.names import MODELS
from pipeline.evidence import PRE_FINE, Evidence, Kind
from pipeline.paper import paper_evidence
from pipeline.tables import markdown_escaped
from pipeline.verdicts import (
    MARGIN,
    Block,
    Claim,
    Finding,
    Part,
    above,
    alike,
    amount,
    blocks,
    classes_left_out,
    ends_in_wce,
    heads_apart,
    plain,
    varies_more,
)

RESEMBLES = 0.5
AGREES = 0.25
NO_LESS = f"by more than {MARGIN}: less would not show in the paper's two digits"
SCALE = "the change that scheduling towards WCE brings over the static CE and dice losses (medians)"
SAID = {True: "holds", False: "does not hold", None: "cannot be said"}


def check(evidence: Evidence) -> list[Claim]:
    """All claims, in the order of the paper's argument."""
    return [
        _recall_for_accuracy(evidence),
        _worst_calibrated(evidence),
        _back_to_ce(evidence),
        _schedules_agree(evidence),
        _ramps_matter_little(evidence),
        _dice_varies_most(evidence),
        _deeplab_against_fcn(evidence),
        _no_class_left_out(evidence),
        _pre_fine_wins(evidence),
    ]


def _recall_for_accuracy(evidence: Evidence) -> Claim:
    def judge(block: Block) -> Finding:
        schedules, static = block.losses(ends_in_wce), block.losses(plain)
        return block.judged(
            {"a schedule towards WCE": schedules, "a static CE or dice loss": static},
            lambda: [
                above(block, schedules, static, "rec"),
                above(block, static, schedules, "acc"),
            ],
        )

    return Claim(
        "recall_for_accuracy",
        "Scheduling towards weighted CE raises class-averaged recall over static CE and dice "
        "losses, and lowers accuracy.",
        "Every schedule that ends in WCE has the higher recall and the lower accuracy than every "
        f"static loss of CE and dice without class-weighted CE, {NO_LESS}.",
        tuple(judge(block) for block in blocks(evidence)),
    )


def _worst_calibrated(evidence: Evidence) -> Claim:
    def judge(block: Block) -> Finding:
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


def _back_to_ce(evidence: Evidence) -> Claim:
    def judge(block: Block) -> Finding:
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
        f"Their recall and accuracy differ from CE's by at most half of {SCALE}: they lie on CE's "
        "side.",
        tuple(judge(block) for block in blocks(evidence)),
    )


def _schedules_agree(evidence: Evidence) -> Claim:
    def judge(block: Block) -> Finding:
        kinds = block.evidence.kinds
        naive = block.losses(lambda kind: kind.scheduled and kind.start == {kind.terms[0]})
        alternating = block.losses(lambda kind: kind.scheduled and kind.start == kind.end)
        pairs = [
            (one, other)
            for one in naive
            for other in alternating
            if kinds[one].terms == kinds[other].terms
            and kinds[one].end == kinds[other].end
            and one.partition("@")[2] == other.partition("@")[2]
        ]
        return block.judged(
            {
                "a naive schedule with its alternating one": [one for one, _ in pairs],
                "an alternating schedule with its naive one": [other for _, other in pairs],
            },
            lambda: [
                *(alike(block, pairs, score, AGREES) for score in ("rec", "acc")),
                _calibration_apart(block, pairs),
            ],
        )

    return Claim(
        "schedules_agree",
        "The two schedules, naive and alternating, agree.",
        f"Between the same two losses, their recall and accuracy differ by at most a quarter of "
        f"{SCALE}. Calibration is shown beside it: the paper's own table has them up to 0.07 "
        "apart there.",
        tuple(judge(block) for block in blocks(evidence)),
    )


def _ramps_matter_little(evidence: Evidence) -> Claim:
    def judge(block: Block) -> Finding:
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


def _dice_varies_most(evidence: Evidence) -> Claim:
    def judge(block: Block) -> Finding:
        dice = block.losses(_static("DL", "WDL"))
        others = [loss for loss in evidence.blocks[block.dataset, block.model] if loss not in dice]
        return block.judged(
            {"DL or WDL": dice, "another loss": others}, lambda: [varies_more(block, dice, others)]
        )

    return Claim(
        "dice_varies_most",
        "Dice alone varies most over seeds.",
        "The largest standard deviation of recall over seeds is that of DL or WDL. It is itself "
        "uncertain, by 40 % with 4 seeds and by 70 % with 2.",
        tuple(judge(block) for block in blocks(evidence)),
    )


def _deeplab_against_fcn(evidence: Evidence) -> Claim:
    models: dict[tuple[str, str], dict[str, str]] = {}
    for dataset, model in evidence.blocks:
        if model in MODELS:
            heads = models.setdefault((dataset, MODELS[model].backbone), {})
            heads[MODELS[model].head] = model
    return Claim(
        "deeplab_against_fcn",
        "DeepLabV3 beats FCN in recall and calibrates worse.",
        f"On the same backbone, its recall is higher and its cal lower in the mean over the losses "
        f"that both have, {NO_LESS}.",
        tuple(heads_apart(evidence, *where, heads) for where, heads in models.items()),
    )


def _no_class_left_out(evidence: Evidence) -> Claim:
    families = {kind.family for kind in paper_evidence().kinds.values()}

    def expected(kind: Kind) -> bool:
        return ends_in_wce(kind) or (not kind.scheduled and kind.terms == ("DL", "WCE"))

    def judge(block: Block) -> Finding:
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
        "On the data set whose most frequent class is the most times as frequent as its rarest: "
        "these losses predict every class with every seed, and every other loss of the paper's "
        "table leaves one out with one seed at least. WCE and WDL with class weights are not in "
        "that table, and are not judged.",
        tuple(
            judge(block) for block in blocks(evidence) if block.dataset == evidence.most_imbalanced
        ),
    )


def _pre_fine_wins(evidence: Evidence) -> Claim:
    def judge(block: Block) -> Finding:
        losses = evidence.blocks[block.dataset, block.model]
        pre_fine = [loss for loss in losses if loss == PRE_FINE]
        others = [loss for loss in losses if loss != PRE_FINE]
        return block.judged(
            {PRE_FINE: pre_fine, "another loss": others},
            lambda: [above(block, pre_fine, others, "s_rec")],
        )

    return Claim(
        "pre_fine_wins",
        "Starting from weights trained for segmentation wins: pre-fine has the best S_rec.",
        f"Its S_rec is above that of every loss, {NO_LESS}.",
        tuple(judge(block) for block in blocks(evidence)),
    )


def to_json(claims: Sequence[Claim]) -> str:
    """Claims with their verdicts, and every finding with the cells that it compares."""
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
                        "dataset": finding.dataset,
                        "models": finding.models,
                        "holds": finding.holds,
                        "text": finding.texts,
                        "cells": finding.cells,
                    }
                    for finding in claim.findings
                ],
            }
            for claim in claims
        ],
        indent=1,
        ensure_ascii=False,
    )


def to_markdown(claims: Sequence[Claim]) -> str:
    """A heading a claim, a line a finding."""
    parts = []
    for claim in claims:
        parts.append(f"## {markdown_escaped(claim.sentence)}\n\n")
        parts.append(f"**{claim.verdict}** ({claim.extent}). {markdown_escaped(claim.criterion)}\n")
        for finding in claim.findings:
            where = markdown_escaped(f"{finding.dataset} · {', '.join(finding.models)}")
            against = " against ".join(", ".join(side) for side in finding.sides if side)
            text = markdown_escaped(
                f"{'; '.join(finding.texts)}. Compared: {against or 'nothing'}."
            )
            parts.append(f"\n* {where}: **{SAID[finding.holds]}**. {text}")
        parts.append("\n\n")
    return "".join(parts)


def _static(*terms: str) -> Callable[[Kind], bool]:
    return lambda kind: not kind.scheduled and len(kind.terms) == 1 and kind.terms[0] in terms


def _calibration_apart(block: Block, pairs: Sequence[tuple[str, str]]) -> Part:
    (one, other), furthest = block.furthest(pairs, "cal")
    return Part(True, f"Cal {amount(furthest)} at the furthest pair ({one} minus {other})")
