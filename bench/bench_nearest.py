"""nearest, against torch (cdist, expanded, compiled) and FAISS flat, from the bare codebook.

pytest bench/bench_nearest.py --benchmark-only [-k "latents and K8192"]
"""

from __future__ import annotations

import pytest
from _common import over, timed
from memory import peak_mib
from shapes import SEARCHES

from vqfast.cli._peers import CDIST, COMPILED, EXPANDED, FAISS, searches
from vqfast.cli._timing import check_codes


@over(SEARCHES, ["vqfast", CDIST, EXPANDED, COMPILED, FAISS])
def bench_nearest(benchmark, shape, method):
    x, codebook = shape.load()
    work = searches(x, codebook, compiled=method == COMPILED)
    if method not in work:
        pytest.skip(f"{method} is not installed")
    ours = work["vqfast"]()
    check_codes(ours, x, codebook)
    benchmark.extra_info["same codes as vqfast"] = float((work[method]() == ours).double().mean())
    if shape.codes == max(s.codes for s in SEARCHES) and method != COMPILED:
        benchmark.extra_info["peak extra MiB"] = peak_mib(method, shape)
    timed(benchmark, work[method], shape)
