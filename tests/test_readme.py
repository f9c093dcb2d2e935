"""The README is true of the package: its Python runs, its commands are those that exist, its files are there."""

import re
from pathlib import Path

import pytest
import torch

from vqfast.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def run(block: str) -> dict:
    """Runs a block of the README, as a reader would paste it; returns its names."""
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    return names


def test_the_autoencoder_trains_and_decodes_its_codes():
    names = run(BLOCKS[0])
    assert names["codes"].shape == (8, 8, 8) and names["codes"].dtype == torch.int64
    assert names["again"].shape == names["pictures"].shape
    assert names["encoder"].weight.grad.abs().sum() > 0
    comment = re.search(r"out = .*# (.*)", BLOCKS[0]).group(1)
    assert tuple(comment.split(", ")) == names["out"]._fields


def test_the_functions_run_and_agree():
    names = run(BLOCKS[1])
    assert names["counts"].sum() == 1000 and names["indices"].shape == (1000,)
    assert names["levels"].quantized.shape == names["x"].shape
    assert names["found"].codebook.shape == (64, 16)


def test_every_block_of_python_is_tested():
    assert len(BLOCKS) == 2


def test_the_table_of_commands_is_complete():
    assert re.findall(r"^\| `vqfast ([a-z-]+)` \|", TEXT, re.MULTILINE) == list(COMMANDS)


@pytest.mark.parametrize("name", ["README.md", *sorted(p.name for p in (ROOT / "docs").glob("*.md"))])
def test_links_lead_to_files(name):
    path = ROOT / name if name == "README.md" else ROOT / "docs" / name
    links = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text())]
    # Results are written by the benchmarks, and may not be there yet.
    missing = [t for t in links if t and "://" not in t and not (path.parent / t).exists() and "results" not in t]
    assert missing == []
