"""k-means: seconds until an equal inertia, against faiss.Kmeans and scikit-learn, from the same rows and the same start.

    python bench/bench_kmeans.py [--rows FILE] [--codes 1024 4096] [--threads 2]     writes docs/results/kmeans.md and .json
    python bench/bench_kmeans.py --quick                                            few rows, into a temporary folder

The rows are the stored encoder outputs of bench/data, or those of a .npy or .safetensors file. The level to reach is the inertia
of ten Lloyd steps of vqfast from codes drawn at random, plus 0.1 %. Every method is run again from the start with more and more
iterations until its codes reach that level; that last run's time counts. Inertia is the mean squared distance of all
rows to their nearest codes, evaluated by vqfast's exact search outside the measured time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from latents import ROWS, load_rows
from render import number, table
from report import ROOT, machine
from torch import Tensor

import vqfast
from vqfast.cli._peers import installed
from vqfast.cli._timing import check_codes
from vqfast.data import open_latents

LLOYD_STEPS, TOLERANCE = 10, 1e-3
# Iterations to try, or passes. Lloyd's steps from the same start are the same steps, whoever takes them.
LLOYD_TRIES, TRIES = (LLOYD_STEPS, LLOYD_STEPS + 1, LLOYD_STEPS + 3, 2 * LLOYD_STEPS), (1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20)
ELKAN_GIB = 2  # scikit-learn's Elkan keeps a bound of 4 bytes per row and code
BATCH = 8  # rows per code in a mini-batch
OURS, ELKAN = "vqfast, Lloyd", "scikit-learn, Elkan"

Method = Callable[[Tensor, Tensor, int], Tensor]  # rows, start [K, D], iterations -> codes [K, D]


def ours(**options) -> Method:
    def run(rows, start, iterations):
        init = {} if "init" in options else {"init": start}
        return vqfast.kmeans(rows, len(start), iterations=iterations, **init, **options).codebook

    return run


def ours_mini_batch(rows, start, iterations):
    return vqfast.kmeans(rows, len(start), iterations=iterations, init=start, batch_rows=BATCH * len(start)).codebook


def faiss_kmeans(rows, start, iterations):
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    # All rows, as for everybody else; by default FAISS draws 256 per code.
    use_all = dict(min_points_per_centroid=1, max_points_per_centroid=len(rows))
    clusters = faiss.Kmeans(rows.shape[1], len(start), niter=iterations, seed=0, **use_all)
    clusters.train(rows.numpy(), init_centroids=start.numpy())
    return torch.from_numpy(clusters.centroids)


def sklearn_kmeans(algorithm: str) -> Method:
    def run(rows, start, iterations):
        from sklearn.cluster import KMeans

        found = KMeans(len(start), init=start.numpy(), n_init=1, max_iter=iterations, tol=0, algorithm=algorithm).fit(rows.numpy())
        return torch.from_numpy(found.cluster_centers_)

    return run


def sklearn_mini_batch(rows, start, iterations):
    from sklearn.cluster import MiniBatchKMeans

    batch = min(len(rows), BATCH * len(start))
    options = dict(batch_size=batch, max_no_improvement=None, tol=0, n_init=1, random_state=0, compute_labels=False)
    found = MiniBatchKMeans(len(start), init=start.numpy(), max_iter=iterations, **options).fit(rows.numpy())
    return torch.from_numpy(found.cluster_centers_)


METHODS: dict[str, tuple[Method, tuple[int, ...]]] = {
    OURS: (ours(), LLOYD_TRIES),
    "vqfast, Lloyd, k-means++ start": (ours(init="k-means++"), TRIES),
    "vqfast, mini-batch": (ours_mini_batch, TRIES),
    "faiss.Kmeans": (faiss_kmeans, LLOYD_TRIES),
    "scikit-learn, Lloyd": (sklearn_kmeans("lloyd"), LLOYD_TRIES),
    ELKAN: (sklearn_kmeans("elkan"), LLOYD_TRIES),
    "scikit-learn, mini-batch": (sklearn_mini_batch, TRIES),
}


PACKAGES = {"faiss": "faiss", "scikit-learn": "sklearn"}  # beginning of a method's name -> what it needs


def inertia(rows: Tensor, codes: Tensor) -> float:
    return float(vqfast.nearest(rows, codes.float()).distance.double().mean())


def timed(method: Method, rows: Tensor, start: Tensor, iterations: int) -> dict:
    wall, cpu = time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's, that it has not converged: it was not meant to
        codes = method(rows, start, iterations)
    spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    return spent | {"iterations": iterations, "inertia": inertia(rows, codes)}


def reach(method: Method, tries: tuple[int, ...], rows: Tensor, start: Tensor, level: float, limit: float) -> dict:
    """The first run that reaches the level; `left out` says why there is none."""
    timed(method, rows[: 4 * BATCH * len(start)], start, 1)  # warm-up
    for iterations in tries:
        run = timed(method, rows, start, iterations)
        if run["inertia"] <= level:
            return run
        if run["cpu"] > limit:
            break
    return {"left out": f"level not reached in {iterations} iterations", **run}


def compare(rows: Tensor, codes: int, limit: float) -> dict:
    start = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:codes]].clone()
    found = vqfast.kmeans(rows, codes, iterations=LLOYD_STEPS, init=start)
    check_codes(found.indices, rows, found.codebook)
    level = float(found.inertia) * (1 + TOLERANCE)
    entry = {"rows": len(rows), "dim": rows.shape[1], "codes": codes, "level": level, "methods": {}}
    for name, (method, tries) in METHODS.items():
        package = next((package for said, package in PACKAGES.items() if name.startswith(said)), None)
        if package and not installed(package):
            continue
        if name == ELKAN and 4 * len(rows) * codes > ELKAN_GIB * 2**30:
            continue
        entry["methods"][name] = run = reach(method, tries, rows, start, level, limit)
        said = run.get("left out", f"{run['wall']:.2f} s, {run['iterations']} iterations")
        print(f"{len(rows)} rows, K = {codes}, {name}: {said}", flush=True)
    return entry


# ---- the page ------------------------------------------------------------------------------------------------------


def render(result: dict, source: str, folder: Path) -> None:
    m = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    load = f"{m['load average at the start'][0]:.1f} at the start, {m['load average at the end'][0]:.1f} at the end"
    quick = "**A quick run on few rows: it proves the script, not a speed.**\n\n" if result["quick"] else ""
    tables = "\n\n".join(section(entry) for entry in result["compared"])
    (folder / "kmeans.md").write_text(f"""# Measured: k-means

{quick}{result["date"][:10]}, {m["cpu"]}, {m["threads"]} of {m["cores"]} cores, SIMD level {m["cpu level"]}, load average {load};
{versions}; commit {m["commit"]}. Raw numbers: [{source}]({source}). Again: `{result["command"]}`.

Rows: {result["data"]}. Every method gets the same rows and, but for the k-means++ line, the same {"codes"} to start from, drawn
among the rows. The level is the inertia (mean squared distance) of {LLOYD_STEPS} Lloyd steps of vqfast, plus {100 * TOLERANCE:g} %; a
method is run from the start with more and more iterations until it is reached, and that last run is the time shown: wall seconds,
processor seconds in brackets. Mini-batches have {BATCH} rows per code. faiss.Kmeans is given all rows; by default it draws 256 per code. Elkan's variant is
left out where its bounds would take more than {ELKAN_GIB} GiB.

{tables}
""")


def section(entry: dict) -> str:
    base = entry["methods"][OURS]["cpu"]
    lines = []
    for name, run in entry["methods"].items():
        spent = f"{number(run['wall'])} ({number(run['cpu'])})"
        said = f"{spent}, {run['left out']}" if "left out" in run else spent
        ratio = run["cpu"] / base
        lines.append([name, f"**{said}**" if name == OURS else said, f"{ratio:.1f}x", str(run["iterations"]), f"{run['inertia']:.5g}"])
    head = f"{entry['rows']:,} rows of {entry['dim']}, K = {entry['codes']:,}"
    return f"## {head}\n\n" + table(["", "seconds", "processor time", "iterations", "inertia"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rows", type=Path, help="a .npy or .safetensors file of rows; default the stored latents")
    parser.add_argument("--data", default="encoder outputs of held-out CIFAR-10 pictures (bench/data)", help="what they are, for the page")
    parser.add_argument("--most", type=int, default=1 << 17, help="rows to use at most (default 131,072)")
    parser.add_argument("--codes", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=40, help="processor seconds after which a method gets no longer try")
    parser.add_argument("--out", type=Path, help="folder; default docs/results, or a temporary one with --quick")
    parser.add_argument("--render", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.render:
        return render(json.loads(args.render.read_text()), args.render.name, args.out or args.render.parent)
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # scikit-learn reads it when it is imported
    rows = load_rows(ROWS) if args.rows is None else open_latents(args.rows)[: args.most].float()
    if args.quick:
        rows, args.codes = rows[:2048].contiguous(), [64]
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    result = {"date": date, "quick": args.quick, "data": args.data, "machine": machine("scikit-learn"), "compared": []}
    result["command"] = "python bench/bench_kmeans.py" + (" --rows FILE --codes " + " ".join(map(str, args.codes)) if args.rows else "")
    out = args.out or (Path(tempfile.mkdtemp(prefix="vqfast-kmeans-")) if args.quick else ROOT / "docs/results")
    out.mkdir(parents=True, exist_ok=True)
    for codes in args.codes:
        result["compared"].append(compare(rows, codes, args.limit))
        result["machine"]["load average at the end"] = list(os.getloadavg())
        file = out / f"kmeans_{date[:10]}.json"
        file.write_text(json.dumps(result, indent=1) + "\n")
        render(result, file.name, out)
    print(out / "kmeans.md")


if __name__ == "__main__":
    main()
