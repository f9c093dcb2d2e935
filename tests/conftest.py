"""Fixtures that every test may use, and the policy for skips: a skip that matters can be turned into a failure.

A skip reason that starts with `native:`, `triton:` or `cuda:` fails instead when VQFAST_REQUIRE names that word, so
that a machine which is meant to have a compiler or a GPU cannot pass by leaving its tests out. Every skip is listed at
the end, with its reason.
"""

import os
import zlib
from collections import Counter

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

from vqfast import _backends  # noqa: E402

REQUIREMENT = {"cpu": "native", "triton": "triton", "cuda": "cuda"}
INTERPRETER_SHARE = 16  # of the tests per op, under Triton's interpreter
REQUIRED = {word for word in os.environ.get("VQFAST_REQUIRE", "").split(",") if word}
if REQUIRED - set(REQUIREMENT.values()):
    raise pytest.UsageError(f"VQFAST_REQUIRE={os.environ['VQFAST_REQUIRE']!r}: only native, triton and cuda are known")

try:
    import hypothesis
except ImportError:
    pass
else:
    hypothesis.settings.register_profile("vqfast", deadline=None, derandomize=True, database=None, max_examples=50)
    hypothesis.settings.load_profile("vqfast")


def device_of(backend: str) -> torch.device:
    """Where `backend` gets its tensors in tests: the GPU for CUDA, and for Triton when there is one."""
    return torch.device("cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu")


def why_not(backend: str, family: str) -> str:
    """Empty when `backend` can run `family` on this machine, else the reason in words."""
    if backend == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    return "; ".join(_backends.reasons(family, backend, torch.empty(0, device=device_of(backend))))


@pytest.fixture(params=["reference", "cpu", "triton", "cuda"])
def backend(request) -> str:
    """Each backend in turn; skips those that this machine or this op family lacks.

    The family is the test's `@pytest.mark.family("gather")`, else the module's `FAMILY`, else `nearest`. Of a family that only some
    backends have, the mark's `backends=` or the module's `BACKENDS` names those.
    """
    mark = request.node.get_closest_marker("family")
    family = mark.args[0] if mark else getattr(request.module, "FAMILY", "nearest")
    meant = getattr(request.module, "BACKENDS", (*REQUIREMENT, "reference"))
    if request.param not in (mark.kwargs.get("backends", meant) if mark else meant):
        pytest.skip(f"nowhere: {family} has no kernel for {request.param}, and needs none")
    reason = why_not(request.param, family)
    if reason:
        pytest.skip(f"{REQUIREMENT[request.param]}: {family} on backend {request.param}: {reason}")
    if request.param == "triton" and not torch.cuda.is_available() and not _in_interpreter_share(request.node.nodeid):
        pytest.skip(
            f"interpreter: slow, so one test in {INTERPRETER_SHARE} runs (VQFAST_TEST_INTERPRETER=1 runs all); tests/kernels"
            " holds every kernel to the contract's data"
        )
    return request.param


def _in_interpreter_share(nodeid: str) -> bool:
    return os.environ.get("VQFAST_TEST_INTERPRETER") == "1" or zlib.crc32(nodeid.encode()) % INTERPRETER_SHARE == 0


@pytest.fixture
def device(backend) -> torch.device:
    """The device on which `backend` takes its tensors."""
    return device_of(backend)


@pytest.fixture
def set_threads():
    """`set_threads(n)` sets torch's thread count until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poisoned_memory(request):
    """Fresh memory holds NaN (integers: the largest value), so that an output which a kernel leaves unwritten shows.

    Off under `@pytest.mark.unpoisoned`, for tests that map huge memory without touching it.
    """
    if request.node.get_closest_marker("unpoisoned"):
        yield
        return
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if device_of(params.get("backend", "cpu")).type == "cuda":
        # Not by torch's deterministic mode, which would hide that an op of ours is not deterministic. This block goes
        # back to the caching allocator, which hands it out again.
        torch.full((1 << 24,), float("nan"), device="cuda")
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


# ---- skips -------------------------------------------------------------------------------------------------------


def skip_reason(report) -> str:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason.removeprefix("Skipped: ")


def fail_if_required(report) -> None:
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = skip_reason(report)
    if reason.partition(":")[0] in REQUIRED:
        report.outcome = "failed"
        report.longrepr = f"skipped although VQFAST_REQUIRE={os.environ['VQFAST_REQUIRE']}: {reason}"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    fail_if_required(outcome.get_result())


@pytest.hookimpl(trylast=True)  # the report has been sent
def pytest_runtest_logreport(report):
    """A GPU's context does not survive a wrong address: all tests after it would fail, so a worker of pytest-xdist ends and is replaced."""
    fatal = ("illegal memory access", "unspecified launch failure", "misaligned address")
    if report.failed and os.environ.get("PYTEST_XDIST_WORKER") and any(words in str(report.longrepr) for words in fatal):
        os._exit(1)


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector):
    outcome = yield
    fail_if_required(outcome.get_result())


def pytest_report_header(config):
    backends = [b for b in ("reference", "cpu", "triton", "cuda") if not why_not(b, "nearest")]
    return (
        f"vqfast: torch {torch.__version__}, CPU level {_backends.cpu_level()}, {torch.get_num_threads()} threads, "
        f"nearest on {', '.join(backends)}; VQFAST_REQUIRE={','.join(sorted(REQUIRED)) or '(nothing)'}"
    )


def pytest_terminal_summary(terminalreporter):
    reasons = Counter(skip_reason(r) for r in terminalreporter.stats.get("skipped", []))
    if reasons:
        terminalreporter.section("skipped, and why")
        for reason, count in sorted(reasons.items()):
            terminalreporter.line(f"{count:5d}  {reason}")
