"""The list of mechanisms is one of this source and of these tests: `python -m tests.mechanisms`
takes them out one by one, which lasts too long for every run."""

from __future__ import annotations

import ast

import pytest

from tests.mechanisms.listing import REPOSITORY, read_lists

MECHANISMS = read_lists()


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda m: m.promise)
def test_a_mechanism_stands_once_where_the_list_says(mechanism):
    text = (REPOSITORY / mechanism.file).read_text()
    assert text.count(mechanism.old) == 1
    ast.parse(text.replace(mechanism.old, mechanism.new))  # without it there is still a program


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda m: m.promise)
def test_its_test_exists(mechanism):
    path, _, name = mechanism.test.partition("::")
    tree = ast.parse((REPOSITORY / path).read_text())
    names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert not name or name.partition("[")[0] in names


def test_every_promise_is_named_once():
    promises = [mechanism.promise for mechanism in MECHANISMS]
    assert len(promises) == len(set(promises)) > 0
