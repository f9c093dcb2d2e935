"""Data-parallel training with two gloo processes: the same codebook bits everywhere, the work of one larger batch,
exact resumption.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from vqfast.data import save_picture
from vqfast.models import VQVAE2, load_pretrained
from vqfast.train import checkpoint as checkpoints
from vqfast.train.config import assigned
from vqfast.train.priors import begin_priors
from vqfast.train.runs import begin_run

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch has no gloo"
)

SETTINGS = {
    "model.hidden": 8,
    "model.residual_hidden": 4,
    "model.residual_layers": 1,
    "model.dim": 4,
    "model.codebook_size": 16,
    "model.revive_below": 0.5,
    "data.size": 16,
    "data.batch_size": 4,
    "train.steps": 6,
    "train.init_pictures": 8,
    "train.log_every": 2,
    "train.picture_every": 0,
    "train.checkpoint_every": 3,
    "train.threads": 1,
}

# What each process does: train like `vqfast train`, then write down its own weights and the pictures that it saw.
SCRIPT = """
import hashlib, json, os, signal, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from vqfast.train import loop
from vqfast.train.config import assigned
from vqfast.train.runs import begin_run, resume_run

settings, folder, stop_at = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
rank, seen = int(os.environ["RANK"]), []
inner = loop.Trainer._train_step
def step(self, batches):
    def noted():
        for pixels in batches:
            seen.append(hashlib.sha256(pixels.numpy().tobytes()).hexdigest())
            yield pixels
    inner(self, noted())
    if rank == 1 and self.step + 1 == stop_at:
        os.kill(os.getpid(), signal.SIGTERM)  # only one of the processes gets the signal
loop.Trainer._train_step = step
finish = loop.Trainer.run
def run(self):
    outcome = finish(self)
    weights = {name: value.contiguous() for name, value in self.model.state_dict().items()}
    save_file(weights, folder.with_name(f"{folder.name}-rank{rank}.safetensors"))
    folder.with_name(f"{folder.name}-seen{rank}.json").write_text(json.dumps(seen))
    return outcome
loop.Trainer.run = run
outcome = resume_run(folder, {}) if (folder / "config.json").exists() else begin_run(assigned(settings), folder)
assert outcome.interrupted == (stop_at > 0), outcome
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(6):
        save_picture(folder / f"p{number}.png", torch.from_numpy(rng.integers(0, 256, (3, 24, 24), dtype=np.uint8)))
    return folder


# Joining and leaving a group again and again. Without Trainer.close this hangs within a few rounds: see Ranks.release.
LEAVING = """
import os, sys, torch
from vqfast.train.loop import Trainer
from vqfast.train.ranks import start_ranks
def work():
    trainer = Trainer.__new__(Trainer)
    with start_ranks("cpu") as trainer.ranks:
        trainer.model = torch.nn.Linear(4, 4)
        trainer.forward = trainer.ranks.parallel(trainer.model)
        for _ in range(3):
            trainer.forward(torch.randn(8, 4)).sum().backward()
        trainer.ranks.gather(torch.zeros(100))
        trainer.close()
for port in sys.argv[1:]:
    os.environ["MASTER_PORT"] = port
    work()
"""


def both(script: str, *argv: object) -> None:
    """Runs a script in two processes that find each other the way torchrun sets them up."""
    common = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_ports(1)[0],
    }
    jobs = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", script, *map(str, argv)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for job in jobs:
            out, err = job.communicate(timeout=120)
            assert job.returncode == 0, out + err
    finally:
        for job in jobs:
            job.kill()


def free_ports(number: int) -> list[str]:
    """Ports that nobody listens on just now."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(number)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [str(probe.getsockname()[1]) for probe in probes]


def train(settings: dict, folder: Path, stop_at: int = 0) -> None:
    both(SCRIPT, json.dumps(settings), folder, stop_at)


def weights_of(folder: Path, rank: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder.with_name(f"{folder.name}-rank{rank}.safetensors"))


@pytest.mark.slow
def test_two_processes_hold_the_same_bits_and_resume_exactly(pictures, tmp_path):
    settings = {**SETTINGS, "data.source": str(pictures)}
    train(settings, tmp_path / "whole")
    train(settings, tmp_path / "cut", stop_at=4)
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path / "cut" / "checkpoints")][
        -1
    ] == "step-000000004.safetensors"
    train(settings, tmp_path / "cut")
    first = weights_of(tmp_path / "whole", 0)
    for folder, rank in (("whole", 1), ("cut", 0), ("cut", 1)):
        other = weights_of(tmp_path / folder, rank)
        for name in first:
            assert first[name].numpy().tobytes() == other[name].numpy().tobytes(), (folder, rank, name)
    seen = [set(json.loads((tmp_path / f"whole-seen{rank}.json").read_text())) for rank in range(2)]
    assert len(seen[0]) == len(seen[1]) == 6 and not seen[0] & seen[1], "each process has pictures of its own"

    # Two processes with 4 pictures each take the same first step as one with 8: the same pictures in the same places.
    train({**settings, "train.steps": 1}, tmp_path / "two")
    begin_run(assigned({**settings, "train.steps": 1, "data.batch_size": 8}), tmp_path / "one", say=lambda text: None)
    one = checkpoints.load_checkpoint(checkpoints.list_checkpoints(tmp_path / "one" / "checkpoints")[-1]).tensors
    two = weights_of(tmp_path / "two", 0)
    assert torch.equal(two["quantizer.cluster_size"], one["model.quantizer.cluster_size"]), (
        "counts of all processes together"
    )
    # Gradients and sums are added in another order; Adam's first step is the learning rate times the gradient's sign.
    for name in two:
        close = torch.isclose(two[name].double(), one[f"model.{name}"].double(), rtol=0, atol=2e-5)
        assert close.double().mean() > 0.99, name


def test_processes_leave_their_group_without_waiting_for_each_other():
    both(LEAVING, *free_ports(12))


# Each process trains the priors of the model in the folder, and writes down the weights that it holds at the end.
PRIORS = """
import json, os, signal, sys
from pathlib import Path
from safetensors.torch import save_file
from vqfast.train import priors
settings, folder, stop_at = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
rank, held = int(os.environ["RANK"]), {}
inner, finish = priors.PriorTrainer._train_step, priors.PriorTrainer.run
def step(self, batches):
    inner(self, batches)
    if rank == 1 and (self.level, self.step + 1) == (0, stop_at):
        os.kill(os.getpid(), signal.SIGTERM)
def run(self):
    outcome = finish(self)
    held.update({f"{self.level}.{name}": value.contiguous() for name, value in self.model.state_dict().items()})
    return outcome
priors.PriorTrainer._train_step, priors.PriorTrainer.run = step, run
begun = (folder / "config.json").exists()
outcome = priors.resume_priors(folder, {}) if begun else priors.begin_priors(settings, folder)
assert outcome.interrupted == (stop_at > 0), outcome
save_file(held, folder.with_name(f"{folder.name}-rank{rank}.safetensors"))
"""


@pytest.mark.slow
def test_two_processes_train_the_same_priors_and_resume_exactly(pictures, tmp_path):
    model = VQVAE2(hidden=8, residual_hidden=4, residual_layers=1, dims=(4, 4), codebook_sizes=(8, 8))
    model.save_pretrained(tmp_path / "model")
    settings = {"codes.model": str(tmp_path / "model"), "codes.views": 3, "data.source": str(pictures)}
    settings |= {"model.channels": 8, "model.layers": 2, "data.size": 16, "data.batch_size": 2, "train.threads": 1}
    settings |= {"train.steps": 6, "train.log_every": 2, "train.picture_every": 0}
    both(PRIORS, json.dumps(assigned(settings)), tmp_path / "whole", 0)
    both(PRIORS, json.dumps(assigned(settings)), tmp_path / "cut", 4)
    both(PRIORS, json.dumps(assigned(settings)), tmp_path / "cut", 0)
    first = weights_of(tmp_path / "whole", 0)
    assert any(name.startswith("1.") for name in first) and any(name.startswith("0.") for name in first)
    for folder, rank in (("whole", 1), ("cut", 0), ("cut", 1)):
        other = weights_of(tmp_path / folder, rank)
        for name, weight in first.items():
            assert weight.numpy().tobytes() == other[name].numpy().tobytes(), (folder, rank, name)

    # Two processes with 2 maps each take the steps of one with 4.
    begin_priors(assigned(settings | {"data.batch_size": 4}), tmp_path / "one", say=lambda text: None)
    alone = load_pretrained(tmp_path / "one" / "level-1" / "model").state_dict()
    for name, weight in alone.items():
        close = torch.isclose(weight, first[f"1.{name}"], rtol=0, atol=1e-4)
        assert close.double().mean() > 0.99, name


@pytest.mark.slow
def test_torchrun_trains_and_the_number_of_processes_is_fixed(pictures, tmp_path):
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "vqfast",
        "train",
    ]
    options = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
    done = subprocess.run(
        [*run, "--data", str(pictures), "--out", str(tmp_path / "run"), *options],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=150,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes" in done.stdout and done.stdout.count("step      6/6") == 1, "one process speaks"
    alone = subprocess.run(
        [sys.executable, "-m", "vqfast", "train", "--resume", str(tmp_path / "run"), "--steps", "8"],
        capture_output=True,
        text=True,
    )
    assert alone.returncode == 2 and "made by 2 processes" in alone.stderr
