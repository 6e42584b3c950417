"""Break the facts of a probe job, one fault per function: ranks 0, 1 are on n1, and 2, 3 on n2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Ranks = list[dict[str, Any]]


def late(seconds: float) -> Callable[[Ranks], None]:
    def change(ranks: Ranks) -> None:
        for moment in ("sent", "received"):
            ranks[2]["clock"][moment] += seconds

    return change


def version(ranks: Ranks) -> None:
    ranks[2]["versions"]["numpy"] = "1.26.0"


def source(ranks: Ranks) -> None:
    ranks[2]["versions"]["own source"] = "0123456789ab"


def no_interface(ranks: Ranks) -> None:
    ranks[2]["interfaces"] = ["eth0", "ib0"]


def unseen_file(ranks: Ranks) -> None:
    ranks[2]["files"] = dict.fromkeys(ranks[2]["files"], -1)


def old_file(ranks: Ranks) -> None:
    path = list(ranks[2]["files"])[-1]
    ranks[2]["files"][path] -= 1


def full_node(ranks: Ranks) -> None:
    ranks[2]["room"] = 1000


def no_gpu(ranks: Ranks) -> None:
    ranks[3]["device"]["name"] = "cpu"


def no_peer(ranks: Ranks) -> None:
    for rank in ranks:
        del rank["met"]
    ranks[2]["errors"]["met"] = "RuntimeError: Unable to find address for: ib0"


def wrong_sum(ranks: Ranks) -> None:
    ranks[1]["met"]["sum"] = 1.0


def slow_disk(ranks: Ranks) -> None:
    ranks[0]["bytes_per_second"] = 1000.0


def damage(ranks: Ranks) -> None:
    ranks[3]["damaged"] = ["val-00000.h5 is damaged", "another"]


def lost_rank(ranks: Ranks) -> None:
    del ranks[2]


def alone(ranks: Ranks) -> None:
    for rank in ranks:
        rank["world_size"] = 1


def one_node(ranks: Ranks) -> None:
    for rank in ranks:
        rank["node"] = "n1"


def unanswered(ranks: Ranks) -> None:
    del ranks[2]["clock"]
    ranks[2]["errors"]["clock"] = "the folder did not show train-2.answer within 60 s"
