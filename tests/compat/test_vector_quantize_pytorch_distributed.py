"""The faces of vector_quantize_pytorch's layers under torch.distributed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("vector_quantize_pytorch_worker.py")


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="gloo: torch was built without it"
)
@pytest.mark.parametrize("world", [2, 3])
def test_processes_learn_the_same_codebook(world):
    """Layers built before the process group, which the other library would never synchronise."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(WORKER), str(world)], env=environment, timeout=150, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
