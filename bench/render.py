"""Turns a run of report.py into docs/results/search.md and its plot."""

from __future__ import annotations

from pathlib import Path

from vqfast.cli._peers import CDIST, COMPILED, EXPANDED, FAISS, LAYERS

METHODS = ("vqfast", CDIST, EXPANDED, COMPILED, FAISS)
DATA = ("latents", "isotropic")
# Colours that the colour-blind can tell apart (Okabe and Ito), and a mark per method for print.
STYLES = {
    "vqfast": ("#D55E00", "o"),
    CDIST: ("#0072B2", "s"),
    EXPANDED: ("#56B4E9", "^"),
    COMPILED: ("#009E73", "v"),
    FAISS: ("#444444", "D"),
}

HOW = """\
All methods took turns in one process, after warm-up; medians of {rounds} rounds (at most 3 for K = 65,536).
float32, 64 numbers a row. `latents` are a trained VQ-VAE's outputs for held-out CIFAR-10 pictures, with codes
made from its outputs for training pictures (bench/data/README.md); `isotropic` are independent normal numbers,
the hardest case, which gets the dense search. vqfast starts from the bare codebook each time; FAISS was handed
its finished index. Before it was timed, each of vqfast's results was compared with the float64 oracle: all rows
up to K = 8,192, 2,048 beyond, 1,024 for layers; one wrong code ends the run. A ratio says how many times
vqfast's time a method took; *same* is the smallest part of rows for which another method gave vqfast's code."""


def render(result: dict, source: str, folder: Path) -> None:
    """Writes search.md and search.svg into `folder`; `source` names the JSON they come from."""
    plot(result, folder / "search.svg")
    parts = [
        "# Measured: the exact search against others",
        conditions(result, source),
        "## Nearest code of every row, milliseconds\n\n" + search_table(result["search"]),
        "![time against the number of codes](search.svg)",
        "## One training step of a layer (forward, backward, codebook update)\n\n"
        + step_table(result["training step"]),
        "## Peak extra memory of one search\n\n" + memory_table(result["memory"]),
    ]
    (folder / "search.md").write_text("\n\n".join(parts) + "\n")


def conditions(result: dict, source: str) -> str:
    m = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    load = f"{m['load average at the start'][0]:.1f} at the start and {m['load average at the end'][0]:.1f} at the end"
    changed = ", with uncommitted changes" if m["changed files"] else ""
    quick = "**A quick run on small shapes: it proves the script, not a speed.**\n\n" if result["quick"] else ""
    return (
        f"{quick}{result['date'][:10]}, {m['cpu']}, {m['threads']} of {m['cores']} cores, SIMD level {m['cpu level']}, "
        f"load average {load}; {versions}; commit {m['commit']}{changed}. Raw numbers: [{source}]({source}). "
        f"Again: `python bench/report.py`.\n\n" + HOW.format(rounds=result["rounds"])
    )


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    return f"{value:,.2f}" if value < 10 else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def cell(value: float | None, ours: float) -> str:
    return "" if value is None else f"{number(value)} ({value / ours:.1f}x)"


def search_table(found: list[dict]) -> str:
    rows = []
    left_out = [f"{entry['shape']} was left out: {entry['left out']}." for entry in found if "left out" in entry]
    for entry in sorted((e for e in found if "ms" in e), key=lambda e: (e["data"] != "latents", e["codes"])):
        ms = entry["ms"]
        others = [cell(ms.get(name), ms["vqfast"]) for name in METHODS[1:]]
        same = min(entry["same codes"].values())
        rows.append(
            [
                f"{entry['data']}, N = {entry['rows']:,}, K = {entry['codes']:,}",
                f"**{number(ms['vqfast'])}**",
                *others,
                f"{100 * same:.2f} %",
            ]
        )
    return "\n\n".join([table(["", *METHODS, "same"], rows), *left_out])


def step_table(found: list[dict]) -> str:
    rows = []
    for entry in found:
        levels = f", residual, Q = {entry['levels']}" if entry["levels"] else ""
        ms = entry["ms"]
        name = f"{entry['data']}, N = {entry['rows']:,}, K = {entry['codes']:,}{levels}"
        rows.append([name, f"**{number(ms['vqfast'])}**", cell(ms.get(LAYERS), ms["vqfast"])])
    return table(["milliseconds", "vqfast", LAYERS], rows)


def memory_table(found: list[dict]) -> str:
    names = [name for name in METHODS if any(name in entry["MiB"] for entry in found)]
    rows = [
        [
            f"{entry['data']}, N = {entry['rows']:,}, K = {entry['codes']:,}",
            *(f"{entry['MiB'].get(name, 0):,.0f}" for name in names),
        ]
        for entry in found
    ]
    return (
        "The process's high-water mark above what was resident before the call (VmHWM, a process per method).\n\n"
        + table(["MiB", *names], rows)
    )


def plot(result: dict, file: Path) -> None:
    """Time against K, both axes logarithmic, one panel per kind of data."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "vqfast"  # the same numbers give the same file
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(DATA), figsize=(10, 4.2), sharey=True, layout="constrained")
    for panel, data in zip(panels, DATA, strict=True):
        entries = sorted((e for e in result["search"] if e.get("data") == data), key=lambda e: e["codes"])
        for name, (colour, mark) in STYLES.items():
            points = [(e["codes"], e["ms"][name]) for e in entries if name in e["ms"]]
            if points:
                width = 2.4 if name == "vqfast" else 1.2
                sizes, times = zip(*points, strict=True)
                panel.loglog(sizes, times, color=colour, marker=mark, linewidth=width, markersize=5, label=name)
        sizes = [e["codes"] for e in entries]
        panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
        panel.minorticks_off()
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.set(title=data, xlabel="codes K")
        panel.grid(True, which="major", alpha=0.3)
    panels[0].set_ylabel("milliseconds")
    panels[0].legend(frameon=False, fontsize=9)
    rows = next((e["rows"] for e in result["search"] if "rows" in e), 0)
    figure.suptitle(f"Nearest code of {rows:,} rows of 64 numbers, threads: {result['machine']['threads']}")
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
