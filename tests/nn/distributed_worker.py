"""Runs one scenario in several gloo processes: python distributed_worker.py SCENARIO WORLD_SIZE.

The parent imports torch and vqfast once and forks, so a scenario costs one import whatever the number of processes.
Expected results come from a single process: they are computed before the group exists. Integer-valued rows make every
sum exact, so "the same as one process on all rows" holds bit for bit.
"""

import os
import signal
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))
import cases  # noqa: E402
from layers import CODES, DIM, make, state_of  # noqa: E402

SCENARIOS = {}


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


class Collectives(TorchDispatchMode):
    """Names of the collective calls made inside the block."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name.split("::")[0] in ("c10d", "_c10d_functional", "c10d_functional"):
            if "wait_tensor" not in function._schema.name:
                self.seen.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def join(rank, world, path):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world, timeout=timedelta(seconds=60))


def bits(state):
    return torch.cat([t.reshape(-1).contiguous().view(torch.uint8) for _, t in sorted(state.items())])


def assert_equal_on_all(state, what, group=None):
    """Every process holds the same bytes."""
    mine = bits(state)
    others = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(others, mine, group=group)
    assert all(torch.equal(mine, other) for other in others), f"{what}: the processes disagree"


def assert_same(state, expected, what):
    for name, tensor in expected.items():
        assert torch.equal(bits({"": tensor}), bits({"": state[name]})), f"{what}: {name} differs from the single process"


def batches(step, world, rows=20, integer=True):
    """One batch per process, of different sizes."""
    make_rows = cases.integers if integer else cases.normal
    return [make_rows(rows + 3 * rank, DIM, seed=1000 * step + rank) for rank in range(world)]


def integer_codebook(levels=1):
    return cases.integers(levels * CODES, DIM, seed=5)


def single(kind, steps, **options):
    """States after each of `steps` (each a batch of all rows), without a process group."""
    layer, states, outputs = make(kind, **options), [], []
    for z in steps:
        outputs.append(layer(z))
        states.append(state_of(layer))
    return states, outputs


@scenario
def moving_average(rank, world, path):
    """Codebooks agree after every step, and equal one process on all rows."""
    steps = [batches(step, world) for step in range(5)]
    options = dict(codebook=integer_codebook(), decay=0.7)
    expected, outputs = single("ema", [torch.cat(s) for s in steps], **options)
    join(rank, world, path)
    layer = make("ema", **options)
    for step, parts in enumerate(steps):
        out = layer(parts[rank])
        assert_equal_on_all(state_of(layer), f"step {step}")
        assert_same(state_of(layer), expected[step], f"step {step}")
        for name in ("perplexity", "usage"):
            assert torch.equal(getattr(out, name), getattr(outputs[step], name)), f"{name} is that of all processes' counts"


@scenario
def debiased_rule(rank, world, path):
    steps = [batches(step, world) for step in range(4)]
    options = dict(codebook=integer_codebook(), decay=0.7, rule="debiased")
    expected, _ = single("ema", [torch.cat(s) for s in steps], **options)
    join(rank, world, path)
    layer = make("ema", **options)
    for step, parts in enumerate(steps):
        layer(parts[rank])
        assert_equal_on_all(state_of(layer), f"step {step}"), assert_same(state_of(layer), expected[step], f"step {step}")


@scenario
def residual(rank, world, path):
    """All levels in one call; from the second step on the rests are no integers, so only the agreement is checked."""
    steps = [batches(step, world) for step in range(4)]
    options = dict(codebook=integer_codebook(3), num_quantizers=3, decay=0.7)
    expected, _ = single("residual", [torch.cat(steps[0])], **options)
    join(rank, world, path)
    layer = make("residual", **options)
    for step, parts in enumerate(steps):
        with Collectives() as calls:
            layer(parts[rank])
        assert len(calls.seen) == 1, f"all levels together in one call, seen {calls.seen}"
        assert_equal_on_all(state_of(layer), f"step {step}")
    again = make("residual", **options)
    again(steps[0][rank])
    assert_same(state_of(again), expected[0], "first step")


@scenario
def residual_dropout(rank, world, path):
    """Each process draws its own number of levels; nobody waits for a call that another one skipped."""
    join(rank, world, path)
    layer = make("residual", codebook=integer_codebook(3), num_quantizers=3, quantizer_dropout=0.9)
    torch.manual_seed(rank)
    for step in range(8):
        with Collectives() as calls:
            layer(batches(step, world)[rank])
        assert len(calls.seen) == 1, calls.seen
        assert_equal_on_all(state_of(layer), f"step {step}")


@scenario
def one_empty_process(rank, world, path):
    """In turn one process has everything masked, no rows at all, or only NaN; in the last step all have."""
    kinds = ["masked", "no_rows", "nan"]
    steps, inputs = [], []
    for step in range(7):
        parts = batches(step, world)
        idle = set(range(world)) if step == 6 else {step % world}
        steps.append(torch.cat([p for r, p in enumerate(parts) if r not in idle] or [parts[0][:0]]))
        mine, mask = parts[rank][None], torch.ones(1, len(parts[rank]), dtype=torch.bool)
        if rank in idle:
            kind = kinds[(step + rank) % 3]
            mask = mask & (kind != "masked")
            mine = {"masked": mine, "no_rows": mine[:, :0], "nan": torch.full_like(mine, torch.nan)}[kind]
            mask = mask[:, : mine.shape[1]]
        inputs.append((mine, mask))
    options = dict(codebook=integer_codebook(), decay=0.7)
    expected, outputs = single("ema", [s[None] for s in steps], **options)
    join(rank, world, path)
    layer = make("ema", **options)
    for step, (mine, mask) in enumerate(inputs):
        with Collectives() as calls:
            out = layer(mine, mask)
        assert len(calls.seen) == 1, f"the collective is joined whatever the data: {calls.seen}"
        floats = {n: t for n, t in state_of(layer).items() if t.is_floating_point()}
        assert_equal_on_all(floats, f"step {step}")
        assert_same(floats, {n: expected[step][n] for n in floats}, f"step {step}")
        assert torch.equal(out.perplexity, outputs[step].perplexity)
    assert out.perplexity.item() == 1 and out.usage.item() == 0 and out.loss.item() == 0


@scenario
def number_of_collectives(rank, world, path):
    """One all-reduce per layer and training step, none in evaluation, whatever the options."""
    join(rank, world, path)
    for kind, options in [("ema", {}), ("ema", {"revive_below": 0.5}), ("ema", {"groups": 2}), ("parameter", {}),
                          ("parameter", {"revive_below": 0.5}), ("residual", {"num_quantizers": 4, "revive_below": 0.5})]:  # fmt: skip
        layer = make(kind, **options)
        for step in range(3):
            with Collectives() as calls:
                out = layer(batches(step, world, integer=False)[rank].requires_grad_())
                out.loss.backward()
            assert calls.seen == ["c10d::allreduce_"], (kind, options, calls.seen)
        layer.eval()
        with Collectives() as calls:
            layer(batches(0, world)[rank]), layer.encode(batches(0, world)[rank]), layer.update_()
        assert not calls.seen, (kind, options, calls.seen)


@scenario
def evaluation_on_one_process(rank, world, path):
    """Rank 0 alone evaluates between training steps; nobody has to follow."""
    join(rank, world, path)
    layer = make("ema", codebook=integer_codebook())
    for step in range(3):
        layer(batches(step, world)[rank])
        if rank == 0:
            layer.eval()(batches(step, world)[rank]), layer.train()
    assert_equal_on_all(state_of(layer), "after evaluation on rank 0")


@scenario
def accumulation(rank, world, path):
    """Several forwards, a different number on each process, then one update_() on all."""
    steps = [batches(step, world) for step in range(3)]
    options = dict(codebook=integer_codebook(), decay=0.7)
    expected, _ = single("ema", [torch.cat(s) for s in steps], **options)
    join(rank, world, path)
    layer = make("ema", auto_update=False, **options)
    for step, parts in enumerate(steps):
        for piece in parts[rank].split((3, 7, len(parts[rank]) - 10)):
            layer(piece)
        layer.update_()
        assert_equal_on_all(state_of(layer), f"step {step}")
        codes = {"codebook": layer.codebook, "cluster_size": layer.cluster_size, "cluster_sum": layer.cluster_sum}
        assert_same({n: t.detach() for n, t in codes.items()}, {n: expected[step][n] for n in codes}, f"step {step}")


@scenario
def exact_counts(rank, world, path):
    """2^24 + 1 rows here and one there: a float32 count would lose one on the way, twice."""
    join(rank, world, path)
    layer = make("ema", codebook=torch.tensor([[1.0], [-1.0]]), dim=1, codebook_size=2, decay=0.0)
    n = 2**24 + 1 if rank == 0 else 1
    with torch.no_grad():
        layer(torch.ones(1, 1, 1).expand(1, n, 1))
    total = 2**24 + world
    assert layer.cluster_size.tolist() == [float(total - total % 2), 0.0], layer.cluster_size.tolist()
    # Each process rounds its own float32 sum once, the reduction once more.
    assert abs(layer.codebook[0].item() - 1.0) <= 3 * 2.0**-24, layer.codebook


@scenario
def revival(rank, world, path):
    """Dead codes become rows of some process's batch, the same on all; the fully masked process offers none."""
    join(rank, world, path)
    for kind, steps, options in [("ema", 6, {"decay": 0.5}), ("parameter", 80, {})]:
        codebook = torch.cat([cases.integers(4, DIM, seed=1), 1000.0 + cases.integers(CODES - 4, DIM, seed=2)])
        layer = make(kind, codebook=codebook, revive_below=0.5, **options)
        torch.manual_seed(100 + rank)
        seen = 0
        for step in range(steps):
            z = cases.normal(world, 20, DIM, seed=500 + step) + 10.0 * torch.arange(world)[:, None, None]
            idle = step % world
            if rank == idle:
                z[rank] = 77.0
            before = layer.codebook.detach().clone()
            layer(z[rank : rank + 1], torch.full((1, 20), rank != idle))
            assert_equal_on_all(state_of(layer), f"{kind}, step {step}")
            after = layer.codebook.detach()
            everyone = torch.cat([z[r] for r in range(world) if r != idle])
            for code in after[((after - before).abs() > 500).any(-1)]:
                seen += 1
                assert (everyone == code).all(-1).any(), f"{kind}: a revived code is a valid row of some process"
        assert seen >= CODES - 4 and torch.isfinite(layer.codebook).all() and (layer.codebook < 70).all(), seen


@scenario
def process_groups(rank, world, path):
    """A layer speaks to its own group only: ranks 0 and 1 share one, rank 2 has one for itself."""
    parts = batches(0, world)
    options = dict(codebook=integer_codebook(), decay=0.7)
    expected, _ = single("ema", [torch.cat(parts[:2]) if rank < 2 else parts[2]], **options)
    join(rank, world, path)
    pair, alone = dist.new_group([0, 1]), dist.new_group([2])
    layer = make("ema", process_group=pair if rank < 2 else alone, **options)
    layer(parts[rank])
    assert_same(state_of(layer), expected[0], f"rank {rank}")
    dist.barrier()


@scenario
def data_parallel(rank, world, path):
    """Encoder and quantizer inside DistributedDataParallel: parameters and buffers agree after every step."""
    join(rank, world, path)
    for kind in ("parameter", "ema", "residual"):
        torch.manual_seed(rank)
        options = {"num_quantizers": 2} if kind == "residual" else {}
        model = torch.nn.ModuleDict({"encoder": torch.nn.Linear(DIM, DIM), "quantizer": make(kind, **options)})

        class Network(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.parts = model

            def forward(self, z):
                return self.parts["quantizer"](self.parts["encoder"](z))

        network = torch.nn.parallel.DistributedDataParallel(Network())
        optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
        for step in range(4):
            optimizer.zero_grad()
            out = network(batches(step, world, integer=False)[rank])
            (out.loss + out.quantized.square().mean()).backward()
            optimizer.step()
            assert_equal_on_all(state_of(network.module), f"{kind}, step {step}")


@scenario
def fully_sharded(rank, world, path):
    """Encoder and quantizer under FSDP2: the same codes and codebooks as DistributedDataParallel gives, sharded or not."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    join(rank, world, path)
    mesh = torch.distributed.init_device_mesh("cpu", (world,))

    class Network(torch.nn.Module):
        def __init__(self, kind):
            super().__init__()
            torch.manual_seed(0)
            self.encoder = torch.nn.Linear(DIM, DIM)
            self.quantizer = make(kind, **({"num_quantizers": 2} if kind == "residual" else {}))

        def forward(self, z):
            return self.quantizer(self.encoder(z))

    for kind in ("parameter", "ema", "residual"):
        sharded, plain = Network(kind), torch.nn.parallel.DistributedDataParallel(Network(kind))
        fully_shard(sharded.quantizer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters()), kind
        optimizers = [torch.optim.SGD(network.parameters(), lr=0.5) for network in (sharded, plain)]
        for step in range(4):
            z = batches(step, world, integer=False)[rank]
            indices = []
            for network, optimizer in zip((sharded, plain), optimizers):
                optimizer.zero_grad()
                out = network(z)
                (out.loss + out.quantized.square().mean()).backward()
                optimizer.step()
                indices.append(out.indices)
            assert torch.equal(*indices), f"{kind}, step {step}: other codes"
            whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state_of(sharded).items()}
            assert_equal_on_all(whole, f"{kind}, step {step}")
            for name, tensor in state_of(plain.module).items():
                torch.testing.assert_close(whole[name], tensor, rtol=1e-5, atol=1e-5)


@scenario
def kmeans_start(rank, world, path):
    """init_codebook_ is a collective of its own: all processes' rows, one result; a process may have too few rows, or none."""
    join(rank, world, path)
    for sizes in ([5, 60, 40], [0, 50, 50], [40, 40, 40]):
        for kind in ("ema", "parameter", "residual"):
            layer = make(kind, **({"num_quantizers": 2} if kind == "residual" else {}))
            z = 50.0 * rank + cases.normal(sizes[rank], DIM, seed=rank)
            layer.init_codebook_(z)
            assert_equal_on_all(state_of(layer), f"{kind}, {sizes}")
            if len(z):
                error = (layer.eval()(z).quantized - z).square().mean()
                assert error < 25, f"rows of rank {rank} have codes near them: {error}"


def main(name, world):
    with tempfile.TemporaryDirectory() as folder:
        children = {}
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    torch.set_num_threads(1)
                    SCENARIOS[name](rank, world, Path(folder) / "meeting")
                    status = 0
                except BaseException:
                    print(f"--- rank {rank}", file=sys.stderr)
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(status)
            children[pid] = rank
        failed = 0
        while children:
            pid, status = os.wait()
            children.pop(pid)
            if status and not failed:
                failed = 1
                for other in children:  # they would wait for the one that is gone
                    os.kill(other, signal.SIGKILL)
        return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
