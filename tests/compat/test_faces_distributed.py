"""Faces with moving averages hold the same codebook on every process, and learn what one process learns from all rows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="gloo: torch was built without it"
)
def test_moving_averages():
    worker = Path(__file__).with_name("faces_worker.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-W", "ignore", str(worker), "moving_averages", "2"]
    done = subprocess.run(command, env=environment, timeout=150, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
