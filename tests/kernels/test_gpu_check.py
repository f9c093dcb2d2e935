"""bench/gpu_check.py runs through without a GPU, writes each section as it ends and goes on where it stopped; so it cannot rot."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vqfast import _backends

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu_check.py"
SECTIONS = ("suite_triton", "graphs", "streams", "beyond_32_bits", "statistics", "training_step", "certificates", "masked_conv",
            "microbenchmarks", "sanitizer")  # fmt: skip


# The script, as if at a commit of the test's choice: one made by somebody else between two runs would be another result file.
AT_COMMIT = """
import sys
sys.path.insert(0, sys.argv[1])
import gpu_check
facts = gpu_check.facts
gpu_check.facts = lambda: {**facts(), "commit": sys.argv[2]}
sys.exit(gpu_check.main(sys.argv[3:]))
"""


def run(*words, commit="0123456789abcdef"):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-W", "ignore", "-c", AT_COMMIT, str(SCRIPT.parent), commit, *words], capture_output=True, text=True,
                          timeout=280, env=environment)  # fmt: skip


def test_sections_are_listed_most_important_first():
    done = run("--list")
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert names[:3] == ["small", "suite_cuda", "suite_triton"] and names.index("determinism") < names.index("nearest") and set(SECTIONS) < set(names)


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
        "suite_triton", "statistics", "training_step", "certificates", "masked_conv"
    }  # fmt: skip
    assert "mean nothing" in second.stdout
    (row,) = result["sections"]["suite_triton"]["rows"]
    assert row["passed"] > 0 == row["failed"] and row["ended"] == "0"
    assert all(row["wrong"] == "" for row in result["sections"]["masked_conv"]["rows"])
    if importlib.util.find_spec("matplotlib"):
        drawing = out.with_suffix(".svg").read_text()
        assert drawing.startswith("<?xml") and "they mean nothing" in drawing


def test_results_of_another_commit_are_kept_and_not_continued(tmp_path):
    out = tmp_path / "result.json"
    first, second = (run("--out", str(out), "--sections", "graphs", commit=name * 40) for name in "ab")
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "in the file already" not in second.stdout and "kept as" in second.stdout
    (aside,) = set(tmp_path.glob("*.json")) - {out}
    assert aside.name.startswith("result_aaaaaaaa_")
    assert [json.loads(path.read_text())["facts"]["commit"][0] for path in (aside, out)] == ["a", "b"]


def test_a_missing_library_is_built_for_the_gpu_at_hand(tmp_path, monkeypatch):
    """With a GPU and no vqfast/_C_cuda.so the script builds it, for that GPU alone; where it cannot, the result says why."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu_check

    calls = []

    def failed(words, **keywords):
        calls.append((words[1:], keywords["env"]["VQFAST_BUILD"], keywords["env"]["VQFAST_CUDA_ARCHS"]))
        return subprocess.CompletedProcess(words, 1, "", "no nvcc")

    monkeypatch.setattr(gpu_check.torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_check.subprocess, "run", failed)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    (tmp_path / "vqfast").mkdir()
    package = SimpleNamespace(origin=str(tmp_path / "vqfast" / "__init__.py"))
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: package)
    assert gpu_check.build_library(False) == "none" and not calls
    assert gpu_check.build_library(True) == "not built: no nvcc"
    assert calls == [(["setup.py", "-q", "build_ext", "--inplace"], "cuda", "90a")]
    (tmp_path / "vqfast" / "_C_cuda.so").touch()  # of which the build knows whether it is up to date
    assert gpu_check.build_library(False) == "found" and len(calls) == 1
    assert gpu_check.build_library(True) == "not built: no nvcc" and len(calls) == 2
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install"):
        gpu_check.build_library(True)


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
        "gpu_check.SECTIONS['small'] = gpu_check.Section(broken, starts_processes=True)\n"
        "sys.exit(gpu_check.main(['--out', sys.argv[2], '--sections', 'small']))\n"
    )
    out = tmp_path / "result.json"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", source, str(SCRIPT.parent), str(out)], capture_output=True, text=True)
    section = json.loads(out.read_text())["sections"]["small"]
    assert done.returncode == 1 and section["state"] == "failed" and "planted" in section["why"] and "broken" in section["where"]


@pytest.mark.parametrize("ending", ["crash", "hang"])
def test_a_section_that_takes_its_process_along_spares_the_script(tmp_path, monkeypatch, ending):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu_check

    child = tmp_path / "child.py"
    child.write_text("import os, time\nprint('last words', flush=True)\n" + ("os.abort()" if ending == "crash" else "time.sleep(600)"))
    monkeypatch.setattr(gpu_check, "SCRIPT", child)
    outcome = gpu_check.in_process("small", -13.0 if ending == "hang" else 60.0, "triton")
    assert outcome["state"] == "failed"
    assert ("last words" in outcome["where"] and "-6" in outcome["why"]) if ending == "crash" else "not finished" in outcome["why"]
    both = gpu_check.of_all_backends({"cuda": outcome, "triton": {"state": "passed", "rows": [{"wrong": 0}]}})
    assert both["state"] == "failed" and both["rows"] == [{"wrong": 0}] and both["why"].startswith("cuda: ")
