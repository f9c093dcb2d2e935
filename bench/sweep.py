"""How the cost of the exact search grows with K and with D, in one run of under 10 minutes on a quiet machine.

    python bench/make_latents.py            once: encoder outputs of a trained model (see bench/data/README.md)
    python bench/sweep.py                   everything, with two threads: docs/results/sweep.md, .svg and .json
    python bench/sweep.py --quick           small shapes from bench/data, into a temporary folder: does it run?
    python bench/sweep.py --render FILE     the page and the plot again, from a run's JSON

Methods take turns in one process; medians after warm-up. Each result of vqfast is compared with the float64 oracle before it
is timed, and starts from the bare codebook. A method is left out of a shape, and the page says so, when its N x K matrices
would take more than MEMORY_GIB or when what it took for a smaller shape, scaled by K x D, is more than SECONDS.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from latents import FOLDER, HUGE, ROWS, load_codes, load_rows
from memory import from_own_process, raised_by
from report import ROOT, machine
from shapes import ISOTROPIC, LATENTS
from sweep_page import render
from torch import Tensor

import vqfast
from vqfast._backends import search_counts
from vqfast.cli._peers import CDIST, COMPILED, EXPANDED, FAISS, LAYERS, indices_of, installed, layers, searches
from vqfast.cli._timing import check_codes, in_turns
from vqfast.cli.bench import isotropic
from vqfast.data import open_latents

CPU = torch.device("cpu")
KEOPS = "KeOps"
SECONDS, MEMORY_GIB = 7, 5
# Bytes of the largest matrices per pair of row and code that a method holds at once.
PAIR_BYTES = {CDIST: 4, EXPANDED: 4, COMPILED: 4, LAYERS: 24}
COMPILES_FOR = ((1024, 64), (8192, 64), (65_536, 64), (8192, 256))  # shapes for which torch.compile is worth its ten seconds
KEOPS_DIMS = (16, 64)  # it compiles a program per D, for half a minute each
NOISE = 1e-3  # of the latents' variance, spread over all coordinates when latents are embedded in more than they have


@dataclass(frozen=True)
class Case:
    """N rows, K codes, D numbers each."""

    data: str
    rows: int
    codes: int
    dim: int

    @property
    def name(self) -> str:
        return f"{self.data}, N = {self.rows:,}, K = {self.codes:,}, D = {self.dim:,}"

    def load(self, source: Source) -> tuple[Tensor, Tensor]:
        if self.data == ISOTROPIC:
            return isotropic(self.rows, self.dim, self.codes)
        return source.load(self.rows, self.codes, self.dim)


@dataclass(frozen=True)
class Source:
    """Where latents lie: held-out rows in `folder`, and a file of training rows in random order, None for bench/data's codebook."""

    folder: Path
    training: Path | None

    def load(self, rows: int, codes: int, dim: int) -> tuple[Tensor, Tensor]:
        """Held-out rows and, as codes, training rows; in D = 64 as they are, in fewer their first principal coordinates, in
        more turned into that many coordinates with a little noise in all of them: the same intrinsic dimension.
        """
        x = load_rows(rows, self.folder)
        training = load_codes(8192) if self.training is None else open_latents(self.training)
        if len(training) < codes:
            raise ValueError(f"{self.training} holds {len(training)} rows, {codes} are needed")
        codebook = training[:codes].float()
        if dim == x.shape[1]:
            return x.contiguous(), codebook.contiguous()
        if dim < x.shape[1]:
            basis = torch.linalg.eigh(torch.cov(training[:8192].double().T)).eigenvectors.flip(1)[:, :dim].float()
            return x @ basis, codebook @ basis
        generator = torch.Generator().manual_seed(dim)
        turn = torch.linalg.qr(torch.randn(dim, x.shape[1], generator=generator)).Q.T.contiguous()
        scale = (NOISE * float(x.var(0).sum()) / dim) ** 0.5
        return tuple((t @ turn).add_(torch.randn(len(t), dim, generator=generator), alpha=scale) for t in (x, codebook))


# ---- methods -------------------------------------------------------------------------------------------------------


def methods(case: Case, x: Tensor, codebook: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Name -> call that gives the indices; vqfast first, what cannot be afforded included."""
    work = searches(x, codebook, compiled=(case.codes, case.dim) in COMPILES_FOR and fits(COMPILED, case))
    if installed("pykeops") and case.dim in KEOPS_DIMS:
        work[KEOPS] = lambda: keops(x, codebook)
    if installed("vector_quantize_pytorch") and fits(LAYERS, case):
        theirs = layers(codebook)[LAYERS]
        work[LAYERS] = lambda: indices_of(theirs, x)
    return work


def keops(x: Tensor, codebook: Tensor) -> Tensor:
    from pykeops.torch import LazyTensor

    return ((LazyTensor(x[:, None, :]) - LazyTensor(codebook[None])) ** 2).sum(-1).argmin(1).view(-1)


def fits(method: str, case: Case) -> bool:
    return PAIR_BYTES.get(method, 0) * case.rows * case.codes <= MEMORY_GIB * 2**30


@dataclass
class Rates:
    """Least nanoseconds per row, code and dimension that each method took so far, by data: what a larger shape will cost it at
    least.
    """

    seen: dict[tuple[str, str], float] = field(default_factory=dict)

    def seconds(self, method: str, case: Case) -> float:
        """What a call will about take; 0 where nothing is known."""
        return self.seen.get((method, case.data), 0) * case.rows * case.codes * case.dim * 1e-9

    def reason(self, method: str, case: Case) -> str:
        """Why the method is left out of this shape, or ''."""
        if not fits(method, case):
            return f"N x K of {PAIR_BYTES[method] * case.rows * case.codes / 2**30:.0f} GiB"
        seconds = self.seconds(method, case)
        return f"about {seconds:.0f} s" if seconds > SECONDS else ""

    def learn(self, case: Case, times: dict[str, float]) -> None:
        for method, ms in times.items():
            rate = ms * 1e6 / (case.rows * case.codes * case.dim)
            self.seen[method, case.data] = min(rate, self.seen.get((method, case.data), rate))


def measure(case: Case, source: Source, rates: Rates, rounds: int) -> dict:
    """Times of all methods that can be afforded, what vqfast's search did, and what others were left out."""
    x, codebook = case.load(source)
    work = methods(case, x, codebook)
    # vqfast is never left out: its cost is what this is about.
    why = {name: rates.reason(name, case) for name in (CDIST, EXPANDED, COMPILED, FAISS, KEOPS, LAYERS)}
    why = {name: reason for name, reason in why.items() if reason}
    work = {name: call for name, call in work.items() if name not in why}
    found = search_counts(x, codebook)
    sample = min(1024, max(64, 2**29 // (case.codes * case.dim)))  # the oracle takes seconds for these
    check_codes(found.indices, x, codebook, sample=sample)
    ours = work["vqfast"]()
    if not torch.equal(ours, found.indices):
        raise RuntimeError(f"the counted search and `nearest` differ: {case.name}")
    # What takes seconds gets one round after its warm-up; a busy moment is a small part of it.
    slow = {name: call for name, call in work.items() if name != "vqfast" and rates.seconds(name, case) > 1}
    times = in_turns({name: call for name, call in work.items() if name not in slow}, rounds, CPU) | in_turns(slow, 1, CPU)
    rates.learn(case, times)
    print(f"{case.name}: " + ", ".join(f"{name} {ms:.1f}" for name, ms in times.items()), flush=True)
    per_row = {what: getattr(found, what) / case.rows for what in ("panels", "evaluations", "candidates")}
    counts = per_row | {"road": found.road, "panels of the codebook": found.panels_of_codebook, "distinct codes": found.searched}
    return asdict(case) | {"ms": times, "left out": why, "counts": counts, "rows checked": sample}


def adversaries(x: Tensor, codebook: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Codebooks and rows that must cost at most 1.5 times the dense search (contract, line 3)."""
    mostly = codebook.clone()
    mostly[torch.randperm(len(mostly), generator=torch.Generator().manual_seed(0))[: int(0.9 * len(mostly))]] = codebook[0]
    huge = codebook.clone()
    huge[len(huge) // 2] = 1e30
    yield "as they are", x, codebook
    yield "90 % of the codes identical", x, mostly
    yield "all codes identical", x, codebook[:1].expand_as(codebook).contiguous()
    yield "all codes zero", x, torch.zeros_like(codebook)
    yield "all rows equal", x[:1].expand_as(x).contiguous(), codebook
    yield "one code of norm 1e30", x, huge


def measure_adversaries(case: Case, source: Source, rounds: int) -> dict:
    x, codebook = case.load(source)
    work: dict[str, Callable] = {"dense": lambda: search_counts(x, codebook, road="dense")}
    for name, rows, codes in adversaries(x, codebook):
        check_codes(vqfast.nearest(rows, codes).indices, rows, codes, sample=256)
        work[name] = lambda rows=rows, codes=codes: vqfast.nearest(rows, codes)
    times = in_turns(work, rounds, CPU)
    print(f"adversaries, {case.name}: " + ", ".join(f"{name} {ms:.1f}" for name, ms in times.items()), flush=True)
    return asdict(case) | {"ms": times}


def measure_widths(cases: Sequence[Case], source: Source, rounds: int) -> dict:
    """Median milliseconds of the same search at several D, in turns: a busy machine changes the ratio of times of different moments by as
    much as the bound leaves.
    """
    work = {}
    for case in cases:
        x, codebook = case.load(source)
        work[str(case.dim)] = lambda x=x, codebook=codebook: vqfast.nearest(x, codebook)
    times = in_turns(work, rounds, CPU)
    print("in turns, D = " + ", ".join(f"{dim} {ms:.1f}" for dim, ms in times.items()), flush=True)
    return {"codes": cases[0].codes, "data": cases[0].data, "rounds": rounds, "ms": times}


def peak_mib(case: Case, method: str, source: Source) -> float:
    files = [str(source.folder), str(source.training or "")]
    return from_own_process([__file__, "--memory", method, *map(str, asdict(case).values()), *files])


def measure_memory(case: Case, source: Source) -> dict:
    names = ["vqfast"] + ([FAISS] if installed("faiss") and case.codes <= 65_536 else [])
    mib = {name: peak_mib(case, name, source) for name in names}
    print(f"peak extra MiB, {case.name}: " + ", ".join(f"{name} {m:.0f}" for name, m in mib.items()), flush=True)
    return asdict(case) | {"MiB": mib}


def run_memory(method: str, data: str, rows: str, codes: str, dim: str, folder: str, training: str) -> float:
    x, codebook = Case(data, int(rows), int(codes), int(dim)).load(Source(Path(folder), Path(training) if training else None))
    searches(x[:64], codebook[:64].contiguous(), compiled=False)[method]()
    return raised_by(searches(x, codebook, compiled=False)[method])


# ---- the run -------------------------------------------------------------------------------------------------------


def plan(quick: bool) -> dict[str, list[Case]]:
    rows, sizes, dims, middle = (512, (256, 1024), (4, 64, 256), 1024) if quick else (
        ROWS, (256, 1024, 8192, 65_536, 262_144, 1_048_576), (4, 16, 64, 256, 1024), 8192)  # fmt: skip
    both = (LATENTS, ISOTROPIC)
    most = sizes[-1] if quick else 65_536  # isotropic codes; dense search of a million takes tens of seconds
    return {
        "K": [Case(data, rows, size, 64) for data in both for size in sizes if data == LATENTS or size <= most],
        # D = 64 stands under K already.
        "D": [Case(data, rows, middle, dim) for data in both for dim in dims if dim != 64],
        "memory": [Case(LATENTS, rows, size, 64) for size in sizes[-3:]] + [Case(ISOTROPIC, rows, most, 64)],
        "adversaries": [Case(data, rows, middle, 64) for data in both],
        "widths": [Case(LATENTS, rows, middle, dim) for dim in (64, 256)],
    }


def sweep(args) -> Iterator[dict]:
    """Yields the growing result after every shape, so that a run that is stopped leaves what it has."""
    begin = time.perf_counter()
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    source = Source(args.latents, None if args.quick else args.training)
    result = {"date": date, "quick": args.quick, "rounds": args.rounds, "machine": machine("pykeops"), "noise": NOISE}
    result |= {"limits": {"seconds": SECONDS, "GiB": MEMORY_GIB}, "shapes": [], "memory": [], "adversaries": [], "widths": []}
    result["latents"] = args.about
    rates, todo = Rates(), plan(args.quick)
    work = [("adversaries", lambda case=case: measure_adversaries(case, source, args.rounds)) for case in todo["adversaries"]]
    work += [("shapes", lambda case=case: measure(case, source, rates, args.rounds)) for case in todo["K"] + todo["D"]]
    work += [("widths", lambda: measure_widths(todo["widths"], source, 8 * args.rounds))]
    work += [("memory", lambda case=case: measure_memory(case, source)) for case in todo["memory"]]
    for name, call in work:
        result[name].append(call())
        result["machine"]["load average at the end"] = list(os.getloadavg())
        result["seconds"] = round(time.perf_counter() - begin)
        yield result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; 1 of what takes more than a second")
    parser.add_argument("--latents", type=Path, default=FOLDER, help="folder that make_latents.py --out wrote; default bench/data")
    parser.add_argument("--about", default="the model of bench/data", help="whose outputs they are, for the page")
    parser.add_argument("--out", type=Path, help="folder; default docs/results, or a temporary one with --quick")
    parser.add_argument("--render", type=Path, metavar="FILE")
    parser.add_argument("--memory", nargs=7, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        return print(run_memory(*args.memory))
    if args.render:
        return render(json.loads(args.render.read_text()), args.render.name, args.out or args.render.parent)
    args.training = HUGE if args.latents == FOLDER else args.latents / HUGE.name
    if not args.quick and not args.training.exists():
        raise SystemExit(f"{args.training} is not there; python bench/make_latents.py makes it")
    torch.set_num_threads(args.threads)
    out = args.out or (Path(tempfile.mkdtemp(prefix="vqfast-sweep-")) if args.quick else ROOT / "docs/results")
    out.mkdir(parents=True, exist_ok=True)
    for result in sweep(args):
        file = out / f"sweep_{result['date'][:10]}.json"
        file.write_text(json.dumps(result, indent=1) + "\n")
    render(result, file.name, out)
    print(f"{out / 'sweep.md'}; {result['seconds']} s")


if __name__ == "__main__":
    main()
