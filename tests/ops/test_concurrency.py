"""Right in threads, in forked workers, on user streams and in CUDA graphs; the GIL is released (contract 12)."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import cases
import oracle
import pytest
import torch
from check import device_of, put, same, same_bits
from torch.utils.data import DataLoader, Dataset

import vqfast


class Batches(Dataset):
    """Looks codes up inside a data-loader worker."""

    def __init__(self, x, codebook, backend):
        self.x, self.codebook, self.backend = x, codebook, backend

    def __len__(self):
        return len(self.x)

    def __getitem__(self, at):
        found = vqfast.vector_quantize(self.x[at], self.codebook, backend=self.backend)
        return found.indices, found.quantized, os.getpid()


@pytest.mark.family("quantize")
@pytest.mark.parametrize("in_parent", [1, 4], ids=["1 thread", "4 threads"])
def test_forked_data_loader_workers(backend, in_parent, set_threads):
    """The parent has used its thread pool before the fork: a pool that the child believes in would hang here."""
    if device_of(backend).type == "cuda":
        pytest.skip("CUDA itself does not survive a fork")
    set_threads(in_parent)
    x, codebook = cases.normal(6, 3000, 8, seed=1), cases.normal(200, 8, seed=2)
    parent = vqfast.vector_quantize(x, codebook, backend=backend)
    loader = DataLoader(Batches(x, codebook, backend), num_workers=2, batch_size=None, multiprocessing_context="fork", timeout=60)
    found = list(loader)
    assert os.getpid() not in {int(f[2]) for f in found}
    same_bits(torch.stack([f[0] for f in found]), parent.indices)
    same_bits(torch.stack([f[1] for f in found]), parent.quantized)


@pytest.mark.family("quantize")
def test_threads_do_not_disturb_each_other(backend):
    """Different sizes at the same time: shared scratch memory would mix them up."""
    problems = [put(backend, *cases.clustered(40 + 37 * i, 20 + 11 * i, 3 + i, seed=i)) for i in range(6)]
    alone = [vqfast.vector_quantize(x, c, backend=backend) for x, c in problems]

    def repeat(i):
        return [vqfast.vector_quantize(*problems[i], backend=backend) for _ in range(8)]

    with ThreadPoolExecutor(6) as pool:
        for expected, several in zip(alone, pool.map(repeat, range(6))):
            for again in several:
                same_bits(again.indices, expected.indices), same_bits(again.loss, expected.loss)


@pytest.mark.family("quantize")
def test_gradients_from_several_threads(backend):
    x, codebook = put(backend, *cases.clustered(120, 30, 6, seed=9))

    def gradients(_):
        rows, codes = x.clone().requires_grad_(), codebook.clone().requires_grad_()
        vqfast.vector_quantize(rows, codes, backend=backend).loss.backward()
        return rows.grad, codes.grad

    expected = gradients(0)
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(gradients, range(16)):
            same_bits(got[0], expected[0]), same_bits(got[1], expected[1])


def test_use_backend_holds_for_its_own_thread_only(backend):
    """A choice made in one thread does not leak into another."""
    inside, release = threading.Event(), threading.Event()

    def hold():
        with vqfast.use_backend("reference"):
            inside.set()
            release.wait(20)

    holder = threading.Thread(target=hold)
    holder.start()
    inside.wait(20)
    try:
        with vqfast.use_backend(backend):
            same(vqfast.nearest(*put(backend, *cases.gaussian())).indices, oracle.nearest(*cases.gaussian()).indices)
    finally:
        release.set()
        holder.join()


def test_the_gil_is_released(backend):
    """While one thread searches, another runs Python. Not a timing test: the search only has to last 0.3 s."""
    if backend != "cpu":
        pytest.skip("the plain torch reference and the interpreter hold the GIL between their own small steps")
    n = 2000
    while True:
        x, codebook = cases.normal(n, 64, seed=3), cases.normal(4096, 64, seed=4)
        span, ticks = [], []

        def search():
            span.append(time.perf_counter())
            vqfast.nearest(x, codebook, backend=backend)
            span.append(time.perf_counter())

        worker = threading.Thread(target=search)
        worker.start()
        while worker.is_alive():
            ticks.append(time.perf_counter())
            time.sleep(0.001)
        worker.join()
        if span[1] - span[0] > 0.3:
            break
        n *= 2
    quarter = (span[1] - span[0]) / 4
    assert any(span[0] + quarter < t < span[1] - quarter for t in ticks), "no Python ran in the middle half of the search"


def test_user_streams(backend):
    """Work goes to the current stream: it waits for what that stream still has to do."""
    if device_of(backend).type != "cuda":
        pytest.skip("streams, graphs and device memory belong to GPU backends")
    x, codebook = cases.clustered(500, 300, 32, seed=5)
    late, codes, stream = torch.zeros_like(x, device="cuda"), codebook.cuda(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x.cuda())
        found = vqfast.nearest(late, codes, backend=backend)
    stream.synchronize()
    same(found.indices, oracle.nearest(x, codebook).indices)


def test_cuda_graphs(backend):
    """A captured search, replayed on new rows, gives the new rows' codes."""
    if device_of(backend).type != "cuda":
        pytest.skip("streams, graphs and device memory belong to GPU backends")
    x, codebook = cases.clustered(500, 300, 32, seed=6)
    rows, codes = torch.zeros(500, 32, device="cuda"), codebook.cuda()
    vqfast.nearest(rows, codes, backend=backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = vqfast.nearest(rows, codes, backend=backend)
    for values in (x, x.flip(0), torch.full_like(x, torch.nan)):
        rows.copy_(values)
        graph.replay()
        same(found.indices, oracle.nearest(values, codebook).indices)
