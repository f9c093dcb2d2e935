"""Several processes hold the same codebook, bit for bit, and nobody waits for ever (contract 13)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("distributed_worker.py")

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="gloo: torch was built without it"
)


def run(scenario, world):
    """The scenario's own assertions run in every process; here only the exit status counts."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([sys.executable, str(WORKER), scenario, str(world)], env=environment, timeout=150,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("scenario", ["moving_average", "residual", "revival"])
def test_every_rank_holds_the_same_bits(scenario, world):
    run(scenario, world)


def test_debiased_rule():
    run("debiased_rule", 2)


def test_one_process_without_valid_rows():
    """Fully masked, no rows, all NaN, in turn; then all processes at once."""
    run("one_empty_process", 3)


def test_one_all_reduce_per_step_and_none_in_evaluation():
    run("number_of_collectives", 2)


def test_quantizer_dropout_with_different_draws():
    run("residual_dropout", 2)


def test_one_process_may_evaluate_alone():
    run("evaluation_on_one_process", 2)


def test_accumulated_forwards():
    run("accumulation", 2)


@pytest.mark.slow
def test_counts_are_exact_beyond_2_24():
    run("exact_counts", 2)


def test_process_group_of_the_layer():
    run("process_groups", 3)


def test_distributed_data_parallel():
    run("data_parallel", 2)


def test_fully_sharded_data_parallel():
    run("fully_sharded", 2)


def test_kmeans_start_uses_all_rows():
    run("kmeans_start", 3)
