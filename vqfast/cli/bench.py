"""``vqfast bench``: the quantizer's speed on this machine, on small shapes, against plain PyTorch and the libraries
that are installed. The full benchmarks are in bench/ of the repository.
"""

from __future__ import annotations

import torch

import vqfast
from vqfast.cli import UserError
from vqfast.cli._peers import LAYERS, indices_of, layers, searches, training_step
from vqfast.cli._timing import check_codes, compare_steps, in_turns
from vqfast.train.ranks import pick_device

EPILOG = """\
Rows are Gaussian: correlated, like an encoder's outputs, and isotropic, which gains nothing from the screen. Each
result of vqfast is checked against float64 before it is timed. faiss-cpu and vector-quantize-pytorch take part where
they are installed."""


def add_arguments(parser) -> None:
    parser.add_argument("--rows", type=int, default=4096, help="rows per step (default 4096)")
    parser.add_argument("--dim", type=int, default=64, help="numbers per row (default 64)")
    parser.add_argument(
        "--codebook-sizes", type=int, nargs="+", default=[512, 1024], metavar="K", help="default 512 1024"
    )
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds (default 15)")
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
    print(f"{args.rows} rows of {args.dim} float32, {device}{threads}, torch {torch.__version__}")
    data = {
        (name, size): tuple(part.to(device) for part in make(args.rows, args.dim, size))
        for name, make in (("correlated", latents), ("isotropic", isotropic))
        for size in args.codebook_sizes
    }
    print("\nnearest code of every row, milliseconds (how many times vqfast's)")
    for (name, size), (x, codebook) in data.items():
        _print_row(f"{size:>7} codes, {name}", compare_searches(x, codebook, args.repeats))
    print("\none training step of the layer (forward, backward, codebook update)")
    for size in args.codebook_sizes:
        z, codebook = data["correlated", size]
        times = compare_steps(z, codebook, args.repeats)
        print(
            f"{size:>7} codes: vqfast ms {times.ours:.2f}, plain ms {times.plain:.2f} ({times.ratio:.1f}x; "
            f"{times.agreement:.2%} of its codes are the nearest)"
        )
        others = compare_layers(z, codebook, args.repeats)
        if len(others) > 1:
            _print_row(f"{size:>7} codes", others)
    if len(others) == 1:
        print(f"        {LAYERS} is not installed")
    print(
        f"\n{vqfast.explain('nearest', z, codebook).splitlines()[0]}; medians of {args.repeats} rounds, taken in turns"
    )
    return 0


def _print_row(head: str, times: dict[str, float]) -> None:
    ours = times["vqfast"]
    others = [f"{name} {ms:.2f} ({ms / ours:.1f}x)" for name, ms in times.items() if name != "vqfast"]
    print(f"{head}: " + ", ".join([f"vqfast {ours:.2f}", *others]))


def compare_searches(x: torch.Tensor, codebook: torch.Tensor, repeats: int, compiled: bool = False) -> dict[str, float]:
    """Median milliseconds of each search of `x` [N, D] in `codebook` [K, D], once vqfast's codes are right.

    Raises:
        RuntimeError: they are not.
    """
    work = searches(x, codebook, compiled=compiled)
    check_codes(work["vqfast"](), x, codebook)
    return in_turns(work, repeats, x.device)


def compare_layers(x: torch.Tensor, codebook: torch.Tensor, repeats: int) -> dict[str, float]:
    """Median milliseconds of a training step of each layer on rows `x` [N, D]; `codebook` [K, D], or [Q, K, D] for
    residual layers.

    Raises:
        RuntimeError: vqfast's codes are not right.
    """
    made = layers(codebook)
    check_layer(indices_of(made["vqfast"], x), x, codebook)
    return in_turns({name: lambda n=n: training_step(n, x) for name, n in made.items()}, repeats, x.device)


def check_layer(indices: torch.Tensor, x: torch.Tensor, codebook: torch.Tensor) -> None:
    """Compares a layer's codes [N] or [N, Q] with the oracle's, level by level: r <- r - code."""
    if codebook.ndim == 2:
        return check_codes(indices, x, codebook)
    rest = x
    for level, codes in enumerate(codebook):
        check_codes(indices[:, level], rest, codes)
        rest = rest - codes[indices[:, level]]


def latents(rows: int, dim: int, codes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and codes whose variance falls off like that of trained encoders (the direction d has 1 / d^2 of the
    first's).
    """
    generator = torch.Generator().manual_seed(seed)
    spread = 1 / torch.arange(1, dim + 1, dtype=torch.float32)
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    draw = (torch.randn(rows + codes, dim, generator=generator) * spread) @ turn
    return draw[:rows].contiguous(), draw[rows:].contiguous()


def isotropic(rows: int, dim: int, codes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Independent standard normal rows and codes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dim, generator=generator), torch.randn(codes, dim, generator=generator)
