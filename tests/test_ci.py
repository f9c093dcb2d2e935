"""The last lines of .ci/run: nothing that failed may be counted as passed."""

import runpy
from pathlib import Path

import pytest

SUMMARY = Path(__file__).resolve().parent.parent / ".ci/summary.py"
pytestmark = pytest.mark.skipif(not SUMMARY.exists(), reason="not run from a checkout")


@pytest.mark.parametrize(
    ("log", "status", "expected"),
    [
        ("== 2 failed, 40 passed, 3 skipped, 1 error in 5.02s ==", "1", "40 passed, 3 failed, 3 skipped"),
        ("5 passed, 13 skipped, 1 warning in 60.01s (0:01:00)", "0", "5 passed, 0 failed, 13 skipped"),
        ("== 12 passed in 3.30s ==\nSegmentation fault", "139", "12 passed, 1 failed, 0 skipped"),
        ("== no tests ran in 0.01s ==", "5", "0 passed, 1 failed, 0 skipped"),
        ("compiled", "0", "1 passed, 0 failed, 0 skipped"),
        ("make: *** Error 2", "2", "0 passed, 1 failed, 0 skipped"),
        ("this processor has no avx512", "77", "0 passed, 0 failed, 1 skipped"),
    ],
)
def test_one_stage_is_counted_as_it_ended(tmp_path, capsys, log, status, expected):
    (tmp_path / "results").write_text(f"stage {status}\n")
    (tmp_path / "stage.log").write_text(log + "\n")
    failed = runpy.run_path(str(SUMMARY))["main"](tmp_path)
    assert capsys.readouterr().out.splitlines()[-1] == expected
    assert bool(failed) == (status not in ("0", "77"))


def test_stages_add_up_and_skips_are_listed(tmp_path, capsys):
    (tmp_path / "results").write_text("tests 0\nlevel 77\n")
    skips = "== skipped, and why ==\n    2  cuda: no device\n"
    (tmp_path / "tests.log").write_text(skips + "\n7 passed, 2 skipped in 1.00s\n")
    (tmp_path / "level.log").write_text("no AVX-512 here\n")
    assert runpy.run_path(str(SUMMARY))["main"](tmp_path) == 0
    out = capsys.readouterr().out
    assert "2  cuda: no device" in out and "no AVX-512 here" in out
    assert out.splitlines()[-1] == "7 passed, 0 failed, 3 skipped"
