"""The whole CUDA backend under AddressSanitizer and UndefinedBehaviorSanitizer, on the executor, in its own
interpreter.
"""

import subprocess

import pytest
from check import run_python

SCRIPT = """
import sys, torch, vqfast, cases, oracle
from check import METRIC_CODE, same
torch.ops.load_library(sys.argv[1])
ops = torch.ops.vqfast

def nearest(x, codebook, metric="l2"):
    expected = oracle.nearest(x, codebook, metric)
    distance, indices = ops.nearest_cuda(x[None, None], codebook[None], METRIC_CODE[metric], None, None, None)
    same(indices[0, 0], expected.indices), same(distance[0, 0], expected.distance)

# Sizes just past and just before every tile; tensors are exactly as large as they need to be, so that ASan's red
# zones touch them.
for metric in METRIC_CODE:
    for n, k, dim in ((129, 127, 17), (31, 129, 33), (1, 1, 1)):
        nearest(*cases.clustered(n, k, dim, seed=n), metric)
for build in (cases.lattice, cases.nonfinite_rows_and_codes, cases.huge_code_among_normal):
    nearest(*build())
nearest(*(t.bfloat16() for t in cases.clustered(33, 40, 7)))

import ctypes, os
ctypes.CDLL(sys.argv[1]).vqfast_cuda_hopper_allow(1)
os.environ["VQFAST_EXECUTOR_HOPPER"] = "1"
for n, k, dim in ((65, 129, 33), (1, 300, 70)):
    nearest(*cases.clustered(n, k, dim, seed=n))
os.environ["VQFAST_EXECUTOR_HOPPER"] = "0"

ctypes.CDLL(sys.argv[1]).vqfast_cuda_few_rows_allow(1)
for n, k, dim in ((129, 257, 33), (1, 1, 1)):
    nearest(*cases.clustered(n, k, dim, seed=n))
nearest(*cases.nonfinite_rows_and_codes())
ctypes.CDLL(sys.argv[1]).vqfast_cuda_few_rows_allow(0)

for b, cin, cout, h, w, kh, kw, dilation in ((2, 9, 130, 5, 4, 7, 3, 1), (3, 4, 6, 9, 43, 3, 5, 2)):
    picture, weight, after = cases.normal(b, cin, h, w), cases.normal(cout, cin, kh, kw), cases.normal(b, cout, h, w)
    for dtype in (torch.float32, torch.bfloat16):
        picture, weight, after = (t.to(dtype) for t in (picture, weight, after))
        ops.masked_conv_cuda(picture, weight, cases.normal(cout, dtype=dtype), True, dilation, 1)
        ops.masked_conv_backward_cuda(after, picture, weight, False, dilation, 1, True, True)
    ops.gate_cuda(after, cases.normal(b, cout, dtype=dtype), 0)
    ops.gate_backward_cuda(after[:, : cout // 2], after, None, 1)

x, codebook = cases.normal(2, 1, 157, 35, seed=1), cases.normal(1, 513, 35, seed=2)
x[0, 0, 3, 1] = torch.nan
mask = torch.ones(2, 157, dtype=torch.bool)
mask[1, 150:] = False
for view in (x, x.transpose(2, 3).contiguous().transpose(2, 3)):
    step = oracle.step(view, codebook, mask)
    quantized, _, indices, sums, counts, _ = ops.quantize_cuda(view, codebook, mask, 0, True, None, None, None)
    same(indices, step.indices), same(counts, step.counts), same(quantized, step.quantized.float())
sums, counts = ops.code_stats_cuda(x, indices, 513)
ops.ema_update_cuda_(codebook, torch.ones(1, 513), codebook.clone(), sums, counts, None, 0.9, 1e-5)
ops.gather_cuda(codebook.bfloat16(), indices)
print("clean")
"""


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_no_wild_access_and_no_undefined_behaviour(executor_library, order):
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
        "VQFAST_EXECUTOR_ORDER": order,
        "VQFAST_EXECUTOR_SMS": "8",
    }
    assert "clean" in run_python(SCRIPT, str(executor_library(sanitized=True)), **environment)
