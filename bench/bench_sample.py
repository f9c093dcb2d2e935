"""Sampling a map of codes: the incremental engine against the ordinary loop that re-runs the network for each position.

    python bench/bench_sample.py [--model gated|snail|pixelcnn] [--size 32] [--batch 1 16] [--threads 2] [--naive]

Checked first: the engine's logits against the network's, and its first tokens against the naive mode (everything
recomputed); no
ratio is printed when they differ. --naive compares a whole map, which takes minutes. The loop is timed on
`--positions` positions
and extrapolated; its forward is the fastest of several ordinary ways to call the same network.
"""

from __future__ import annotations

import argparse
import time

import torch
from bench_masked_conv import machine

import vqfast
from vqfast.models.pixelcnn import GatedPixelCNN, PixelCNN
from vqfast.models.pixelsnail import PixelSNAIL
from vqfast.models.sampling import canonical_logits, compile_prior, sample_codes
from vqfast.ops import sample as op

MODELS = {
    "gated": lambda: GatedPixelCNN(codebook_size=512, channels=128, layers=15),
    "pixelcnn": lambda: PixelCNN(codebook_size=512, channels=128, layers=15),
    "snail": lambda: PixelSNAIL(codebook_size=512, channels=128, residual_channels=128, blocks=4, layers=4),
}


def median(seconds: list[float]) -> float:
    return sorted(seconds)[len(seconds) // 2]


def sharpened(prior, factor: float):
    """The same network with logits times `factor`: peaked distributions, as training makes them."""
    last = prior.logits if isinstance(prior, PixelSNAIL) else prior.head.second
    with torch.no_grad():
        last.weight.mul_(factor)
    return prior


@torch.inference_mode()
def seconds_per_forward(prior, batch: int, size: int, positions: int) -> tuple[float, str]:
    """Median seconds of one pass of the whole network, the fastest of several ordinary ways."""
    codes = torch.zeros(batch, size, size, dtype=torch.int64)
    best = (float("inf"), "")
    for name, model in (("eager", prior), ("channels-last", prior.to(memory_format=torch.channels_last))):
        model(codes)
        times = []
        for _ in range(positions):
            begin = time.perf_counter()
            model(codes)
            times.append(time.perf_counter() - begin)
        best = min(best, (median(times), name))
    prior.to(memory_format=torch.contiguous_format)
    return best


def check(prior, size: int, whole_map: bool) -> int:
    """Raises when the engine is wrong; returns how many tokens were compared with the naive mode."""
    tokens = sample_codes(prior, 1, size, size, seed=1)
    logits, _ = canonical_logits(prior, tokens)
    network = prior(tokens).movedim(1, -1)
    error = (logits - network).abs().max().item()
    if not error < 1e-3 * network.std().item() + 1e-4:
        raise SystemExit(f"RED: logits differ from the network's by {error:.3g}")
    count = size * size if whole_map else 2 * size
    given = tokens.clone()
    given.view(-1)[:count] = -1
    if not torch.equal(sample_codes(prior, 1, size, size, seed=1, given=given, mode="naive"), tokens):
        raise SystemExit("RED: tokens differ from the naive mode's")
    return count


def engine(prior, batch: int, size: int, lookahead: int, repeats: int) -> tuple[float, float]:
    """(median seconds of the whole public call for one batch of maps, positions evaluated per position)."""
    times = []
    for repeat in range(repeats + 1):
        begin = time.perf_counter()
        sample_codes(prior, batch, size, size, seed=repeat, lookahead=lookahead, batch_size=batch)
        times.append(time.perf_counter() - begin)
    program, inputs = compile_prior(prior), prior.spatial_inputs(None, batch, size, size)
    tokens = torch.full((batch, size, size), -1)
    _, evaluated = op.run_program(
        program.words, program.weights, tokens, seed=repeats, lookahead=lookahead, condition=inputs
    )
    return median(times[1:]), evaluated / (size * size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="gated")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--positions", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--naive", action="store_true", help="compare a whole map with the naive mode")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    prior = MODELS[args.model]().eval()
    with torch.no_grad():
        compared = check(prior, args.size, args.naive)
        print(machine(args.threads))
        weights = sum(p.numel() for p in prior.parameters())
        print(
            f"{args.model}, {weights / 1e6:.2f} M weights, {args.size} x {args.size} codes, K = 512, float32, random weights"
        )
        print(f"green: logits match the network, {compared} tokens equal the naive mode's\n")
        print("| batch | ordinary loop (one forward) | lookahead | engine | per token | ratio | evaluated |")
        print("|---|---|---|---|---|---|---|")
        for batch in args.batch:
            forward, way = seconds_per_forward(prior, batch, args.size, max(3, args.positions // batch))
            loop = forward * args.size**2
            for lookahead in sorted({1, max(1, 6 // batch)}):
                taken, evaluated = engine(prior, batch, args.size, lookahead, args.repeats)
                per_token = taken / args.size**2 / batch * 1e6
                print(
                    f"| {batch} | {loop:.0f} s ({forward * 1e3:.0f} ms, {way}) | {lookahead} | {taken:.3f} s | {per_token:.0f} us"
                    f" | {loop / taken:.0f}x | {evaluated:.2f} |"
                )
        if args.batch[0] == 1:
            sharp = sharpened(MODELS[args.model]().eval(), 8.0)
            for lookahead in (1, 6):
                taken, evaluated = engine(sharp, 1, args.size, lookahead, args.repeats)
                print(f"| 1 (logits x 8) | | {lookahead} | {taken:.3f} s | | | {evaluated:.2f} |")
        print("\ncost per token at other sizes (batch 1, lookahead 1):")
        for size in (args.size // 2, args.size, 2 * args.size):
            taken, _ = engine(prior, 1, size, 1, 2)
            print(f"  {size} x {size}: {taken / size**2 * 1e6:.0f} us")
    print(vqfast.explain("sample", torch.empty(0)))


if __name__ == "__main__":
    main()
