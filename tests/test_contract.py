"""docs/CONTRACT.md names the tests that hold each promise; this holds the names."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "CONTRACT.md").read_text()
SECTIONS = re.split(r"^## ", TEXT, flags=re.M)[1:]


def named_tests(section):
    """(file, function) of every reference; `::name` belongs to the file named last."""
    file = None
    for path, name in re.findall(r"`(tests/[\w/]+\.py)?::(\w+)`", section):
        file = path or file
        yield file, name


def defined_tests(file):
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_contract_has_all_its_lines():
    assert [int(s.split(".")[0]) for s in SECTIONS] == list(range(1, 16))


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: "line" + s.split(".")[0])
def test_every_promise_is_held_by_tests_that_exist(section):
    references = list(named_tests(section))
    assert references, "a promise without a test"
    missing = [f"{file}::{name}" for file, name in references if name not in defined_tests(file)]
    assert not missing, missing
