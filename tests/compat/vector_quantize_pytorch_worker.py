"""Trains the faces of vector_quantize_pytorch's layers in several gloo processes: python ..._worker.py WORLD_SIZE.

Layers are built before the process group exists. Every process must hold the same bits after every step, and where the
averages alone move the codes, what one process learns from all rows.
"""

import os
import sys
import tempfile
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import vqfast.compat.vector_quantize_pytorch as face

ROWS, DIM, STEPS = 96, 8, 4
LAYERS = {
    "averages": lambda: face.VectorQuantize(DIM, 12),
    "cosine": lambda: face.VectorQuantize(DIM, 12, use_cosine_sim=True),
    "heads": lambda: face.VectorQuantize(DIM, 12, heads=2, codebook_dim=4, separate_codebook_per_head=True),
    "residual": lambda: face.ResidualVQ(dim=DIM, codebook_size=12, num_quantizers=3),
    "affine": lambda: face.VectorQuantize(DIM, 12, affine_param=True, sync_affine_param=True),
    "dead codes": lambda: face.VectorQuantize(DIM, 12, threshold_ema_dead_code=9),
    "k-means": lambda: face.VectorQuantize(DIM, 12, kmeans_init=True),
    "k-means, heads": lambda: face.VectorQuantize(
        DIM, 12, heads=2, codebook_dim=4, separate_codebook_per_head=True, kmeans_init=True, threshold_ema_dead_code=2
    ),
    "residual, dropout": lambda: face.ResidualVQ(
        dim=DIM, codebook_size=12, num_quantizers=3, quantize_dropout=True, threshold_ema_dead_code=2, shared_codebook=True
    ),
    "in-place optimizer": lambda: face.VectorQuantize(
        DIM,
        12,
        learnable_codebook=True,
        ema_update=False,
        in_place_codebook_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    ),
}
SAME_AS_ONE = ("averages", "cosine", "heads", "residual", "affine", "in-place optimizer")


WRAPPED = {
    "averages": lambda: face.VectorQuantize(DIM, 12),
    "learnable": lambda: face.VectorQuantize(DIM, 12, learnable_codebook=True, ema_update=False),
    "residual": lambda: face.ResidualVQ(dim=DIM, codebook_size=12, num_quantizers=2),
    "sim": lambda: face.SimVQ(DIM, 12),
}


class Network(torch.nn.Module):
    """An encoder before a face, from one seed."""

    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.quantizer = torch.nn.Linear(DIM, DIM), make()

    def forward(self, x):
        return self.quantizer(self.encoder(x))


def batch(step):
    return torch.randn(1, ROWS, DIM, generator=torch.Generator().manual_seed(step))


def built():
    torch.manual_seed(0)
    return {name: make() for name, make in LAYERS.items()}


def learned_by_one():
    layers = built()
    for name in SAME_AS_ONE:
        for step in range(STEPS):
            layers[name](batch(step))
    return {name: layers[name].state_dict() for name in SAME_AS_ONE}


def train_wrapped(rank, world):
    """DistributedDataParallel and FSDP2 around an encoder and a face: the same codes and the same state, step by step."""
    mesh = dist.init_device_mesh("cpu", (world,))
    for name, make in WRAPPED.items():
        sharded, plain = Network(make), torch.nn.parallel.DistributedDataParallel(Network(make))
        fully_shard(sharded.quantizer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        optimizers = [torch.optim.SGD(network.parameters(), lr=0.1) for network in (sharded, plain)]
        for step in range(STEPS):
            found = []
            for network, optimizer in zip((sharded, plain), optimizers, strict=True):
                optimizer.zero_grad()
                quantized, indices, loss = network(batch(step).chunk(world, dim=1)[rank])
                (loss.sum() + quantized.square().mean()).backward()
                optimizer.step()
                found.append(indices)
            assert torch.equal(*found), f"{name}, step {step}: other codes"
        for key, value in plain.module.state_dict().items():
            own = sharded.state_dict()[key]
            own = own.full_tensor() if isinstance(own, DTensor) else own
            torch.testing.assert_close(own, value, rtol=1e-5, atol=1e-5, msg=lambda m, k=key, n=name: f"{n} {k}: {m}")


def work(rank, world, path, expected):
    torch.set_num_threads(1)
    layers = built()
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    torch.manual_seed(rank)  # each process draws differently
    for name, layer in layers.items():
        for step in range(STEPS):
            own = batch(step).chunk(world, dim=1)[rank]
            layer(own)
            state = torch.cat([t.flatten().double() for t in layer.state_dict().values()])
            others = [torch.empty_like(state) for _ in range(world)]
            dist.all_gather(others, state)
            assert all(torch.equal(state, other) for other in others), f"{name}, step {step}: the processes disagree"
            assert state.isfinite().all(), name
        for key, value in expected.get(name, {}).items():
            torch.testing.assert_close(layer.state_dict()[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, k=key, n=name: f"{n} {k}: {m}")
    for name in ("averages", "dead codes"):
        layers[name](torch.randn(1, 0 if rank else 5, DIM))  # one process without rows joins all the same
    train_wrapped(rank, world)
    dist.destroy_process_group()


if __name__ == "__main__":
    size = int(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(
            work, (size, os.path.join(folder, "store"), learned_by_one()), nprocs=size, start_method="fork"
        )
