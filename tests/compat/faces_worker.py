"""Faces that follow moving averages, in several gloo processes: python faces_worker.py SCENARIO WORLD_SIZE."""

import sys
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "nn")]
import cases  # noqa: E402
import stand_ins  # noqa: E402
from distributed_worker import assert_equal_on_all, join, main, scenario  # noqa: E402

import vqfast  # noqa: E402
from vqfast.compat import encodec, rosinality, sonnet, taming  # noqa: E402

D, K = 6, 16


def converted():
    module = stand_ins.Quantize(D, K)
    assert vqfast.convert(module).replaced
    return module


FACES = {
    "rosinality": (lambda: rosinality.Quantize(D, K), lambda m, z: m(z)),
    "rosinality, converted": (converted, lambda m, z: m(z)),
    "sonnet": (lambda: sonnet.VectorQuantizerEMA(D, K, 0.25, 0.9), lambda m, z: m(z, is_training=True)),
    "taming": (lambda: taming.EMAVectorQuantizer(K, D, 0.25), lambda m, z: m(z.T[None, :, :, None])),
    "encodec": (lambda: encodec.EuclideanCodebook(D, K, threshold_ema_dead_code=0), lambda m, z: m(z)),
    "encodec, dead codes": (lambda: encodec.EuclideanCodebook(D, K), lambda m, z: m(z)),
    "encodec, k-means start": (lambda: encodec.EuclideanCodebook(D, K, kmeans_init=True), lambda m, z: m(z)),
}
DRAWN = ("encodec, dead codes", "encodec, k-means start")  # from one process's rows, so not what one process would learn


def make(name):
    torch.manual_seed(0)
    module = FACES[name][0]().train()
    if "k-means" not in name:
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point() and tensor.dim() == 2:
                tensor.data.copy_(tensor.data * 8)
    return module


def rows(step, rank):
    """Integers, so that sums are exact in any order."""
    return cases.integers(40, D, seed=10 * step + rank)


@scenario
def moving_averages(rank, world, path):
    # Converted before the group exists: the stand-in does not reduce over processes, so the trial would tell the two apart.
    alone, shared = ({name: make(name) for name in FACES} for _ in range(2))
    for name, module in alone.items():
        for step in range(3):
            FACES[name][1](module, torch.cat([rows(step, other) for other in range(world)]))
    join(rank, world, path)
    for name, (_, run) in FACES.items():
        module = shared[name]
        torch.manual_seed(rank)
        for step in range(3):
            run(module, rows(step, rank))
            assert_equal_on_all(module.state_dict(), f"{name}, step {step}")
        for key, tensor in alone[name].state_dict().items() if name not in DRAWN else ():
            torch.testing.assert_close(module.state_dict()[key], tensor, rtol=1e-6, atol=1e-6, msg=lambda m: f"{name}, {key}: {m}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
