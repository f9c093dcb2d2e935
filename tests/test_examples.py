"""The migrations in examples/ run, and find equal codes before and after."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SMALL = {
    "vector_quantize_pytorch": ["--codes", "256", "--pictures", "2", "--repeats", "1"],
    "transformers": ["--seconds", "0.2", "--batch", "1", "--filters", "4", "--repeats", "1"],
    "diffusers": ["--codes", "256", "--size", "16", "--repeats", "1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("library", SMALL)
def test_migrations(library):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    script = EXAMPLES / f"migrate_{library}.py"
    done = subprocess.run([sys.executable, "-W", "ignore", script, *SMALL[library]], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.findall(r"equal codes: ([\d.]+) %", done.stdout), done.stdout
    assert re.search(r"old +[\d.]+ ms .*\n +new +[\d.]+ ms", done.stdout), done.stdout
    assert library == "vector_quantize_pytorch" or "replaced: " in done.stdout


def test_every_example_is_run():
    assert {path.stem.removeprefix("migrate_") for path in EXAMPLES.glob("migrate_*.py")} == set(SMALL)
