"""``vqfast bench``: a first look at the quantizer's speed on this machine. The full benchmarks are in bench/ of the
repository.
"""

from __future__ import annotations

import torch

import vqfast
from vqfast.cli import UserError
from vqfast.cli._timing import compare_steps
from vqfast.train.ranks import pick_device

EPILOG = """\
Rows are correlated Gaussians, like an encoder's outputs; each result is checked against float64 before it is timed."""


def add_arguments(parser) -> None:
    parser.add_argument("--rows", type=int, default=4096, help="rows per step (default 4096)")
    parser.add_argument("--dim", type=int, default=64, help="numbers per row (default 64)")
    parser.add_argument(
        "--codebook-sizes", type=int, nargs="+", default=[512, 1024], metavar="K", help="default 512 1024"
    )
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of each (default 15)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def run(args) -> int:
    for name in ("rows", "dim", "repeats"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}, but must be at least 1")
    if min(args.codebook_sizes) < 1:
        raise UserError(f"--codebook-sizes has {min(args.codebook_sizes)}, but every size must be at least 1")
    device = pick_device(args.device)
    threads = (
        f", {torch.get_num_threads()} threads" if device.type == "cpu" else f" ({torch.cuda.get_device_name(device)})"
    )
    print(
        f"one training step of the quantizer (forward, backward, codebook update), {args.rows} rows of {args.dim} "
        f"float32, {device}{threads}, torch {torch.__version__}"
    )
    print(f"{'codes':>7} {'vqfast ms':>11} {'plain ms':>10} {'ratio':>7}   plain PyTorch's codes that are the nearest")
    for size in args.codebook_sizes:
        z, codebook = latents(args.rows, args.dim, size)
        if size == args.codebook_sizes[0]:
            backend = vqfast.explain("nearest", z.to(device), codebook.to(device)).splitlines()[0]
        times = compare_steps(z.to(device), codebook.to(device), args.repeats)
        print(f"{size:>7} {times.ours:>11.2f} {times.plain:>10.2f} {times.ratio:>6.1f}x   {times.agreement:.2%}")
    print(f"{backend}; medians of {args.repeats}, taken in turns after warm-up")
    return 0


def latents(rows: int, dim: int, codes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and codes whose variance falls off like that of trained encoders (the direction d has 1 / d^2 of the
    first's).
    """
    generator = torch.Generator().manual_seed(seed)
    spread = 1 / torch.arange(1, dim + 1, dtype=torch.float32)
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    draw = (torch.randn(rows + codes, dim, generator=generator) * spread) @ turn
    return draw[:rows].contiguous(), draw[rows:].contiguous()
