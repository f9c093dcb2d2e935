"""bench/gpu_check.py runs through without a GPU, writes each section as it ends and goes on where it stopped; so it cannot rot."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vqfast import _backends

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu_check.py"
SECTIONS = ("graphs", "streams", "beyond_32_bits", "statistics", "training_step", "certificates", "masked_conv",
            "microbenchmarks", "sanitizer")  # fmt: skip


def run(*words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-W", "ignore", str(SCRIPT), *words], capture_output=True, text=True, timeout=280,
                          env=environment)  # fmt: skip


def test_sections_are_listed_most_important_first():
    done = run("--list")
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert names[:2] == ["small", "suite"] and names.index("determinism") < names.index("nearest") and set(SECTIONS) < set(names)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the script itself is run")
def test_it_runs_without_a_gpu_and_continues(tmp_path):
    reason = "; ".join(_backends.reasons("quantize", "triton", torch.empty(0)))
    if reason:
        pytest.skip(f"triton: {reason}")
    out = tmp_path / "result.json"
    first = run("--out", str(out), "--sections", *SECTIONS[:4])
    assert first.returncode == 0, first.stdout + first.stderr
    second = run("--out", str(out), "--sections", *SECTIONS)
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.count("in the file already") == 4
    result = json.loads(out.read_text())
    assert set(result["sections"]) == set(SECTIONS) and result["facts"]["on_gpu"] is False
    assert {name for name, section in result["sections"].items() if section["state"] == "passed"} == {
        "statistics", "training_step", "certificates", "masked_conv"
    }  # fmt: skip
    assert "mean nothing" in second.stdout
    assert all(row["wrong"] == "" for row in result["sections"]["masked_conv"]["rows"])
    if importlib.util.find_spec("matplotlib"):
        drawing = out.with_suffix(".svg").read_text()
        assert drawing.startswith("<?xml") and "they mean nothing" in drawing


def test_plots_show_every_number(tmp_path, monkeypatch):
    """One bar per method and shape of the sections that have numbers, and none for a wrong result, which has none."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from gpu import plots

    rows = [{"N": 1024, "K": 16, "D": 64, "dtype": "float32", "who": who, "ms": ms} for who, ms in (("triton", 1.5), ("KeOps", 7.0))]
    wrong = {"N": 1024, "K": 16, "D": 64, "dtype": "float32", "who": "cuda", "wrong of sample": 3}
    facts = {"device": "a device", "commit": "0123456789abcdef", "on_gpu": True}
    result = {"date": "2026-01-01T00:00:00", "facts": facts, "sections": {"nearest": {"rows": [*rows, wrong]}, "small": {"rows": []}}}
    assert plots.panels(result) == [("nearest", "ms", False, {"N 1,024, K 16, D 64, float32": {"triton": 1.5, "KeOps": 7.0}})]
    pytest.importorskip("matplotlib")
    assert plots.draw(result, tmp_path / "a.svg") and (tmp_path / "a.svg").stat().st_size > 1000
    assert not plots.draw({**result, "sections": {}}, tmp_path / "b.svg") and not (tmp_path / "b.svg").exists()


def test_a_failed_section_is_written_and_fails_the_script(tmp_path):
    """A section that raises is a result too: state, reason and place, exit status 1, and the next run tries it again."""
    source = (
        "import sys; sys.path.insert(0, sys.argv[1]); import gpu_check\n"
        "def broken(on_gpu, deadline): raise RuntimeError('planted')\n"
        "gpu_check.SECTIONS['small'] = broken\n"
        "sys.exit(gpu_check.main(['--out', sys.argv[2], '--sections', 'small']))\n"
    )
    out = tmp_path / "result.json"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", source, str(SCRIPT.parent), str(out)], capture_output=True, text=True)
    section = json.loads(out.read_text())["sections"]["small"]
    assert done.returncode == 1 and section["state"] == "failed" and "planted" in section["why"] and "broken" in section["where"]
