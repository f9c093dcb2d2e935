"""Turns a run of sweep.py into docs/results/sweep.md and its log-log plots."""

from __future__ import annotations

from pathlib import Path

from render import STYLES, cell, number, table

from vqfast.cli._peers import CDIST, COMPILED, EXPANDED, FAISS, LAYERS

KEOPS = "KeOps"
METHODS = ("vqfast", CDIST, EXPANDED, COMPILED, FAISS, KEOPS, LAYERS)
LOOKS = STYLES | {KEOPS: ("#CC79A7", "P"), LAYERS: ("#E69F00", "X")}
DATA = ("latents", "isotropic")

HOW = """\
float32, medians of {rounds} rounds after warm-up (1 of methods that take more than a second), all in turns. Codes of `latents` are training
rows drawn at random; with D < 64 rows and codes are the first principal coordinates, with D > 64 they are turned into that many
coordinates by a random orthonormal map, plus noise of {noise:g} of their variance: the same intrinsic dimension. `isotropic` are
independent normal numbers. vqfast starts from the bare codebook each time, FAISS from its finished index. Before it was timed, each
of vqfast's results was compared with the float64 oracle on a sample of rows. A method was left out of a shape when its N x K matrices would
have taken more than {gib} GiB, or when its time for a smaller shape, scaled, was more than {seconds} s."""


def render(result: dict, source: str, folder: Path) -> None:
    """Writes sweep.md and sweep.svg into `folder`; `source` names the JSON they come from."""
    plot(result, folder / "sweep.svg")
    parts = [
        "# Measured: cost against K and D",
        conditions(result, source),
        "![time against K and D](sweep.svg)",
        "## What grows, and how much\n\n" + growth(result),
        "## Milliseconds\n\n" + times(result),
        "## What the search did, per row\n\n" + counts(result),
        "## Peak extra memory of one search, MiB\n\n" + memory(result),
        "## Rows and codebooks made to hurt\n\n" + adversaries(result),
    ]
    (folder / "sweep.md").write_text("\n\n".join(part for part in parts if part) + "\n")


def conditions(result: dict, source: str) -> str:
    m = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    load = f"{m['load average at the start'][0]:.1f} at the start, {m['load average at the end'][0]:.1f} at the end"
    quick = "**A quick run on small shapes: it proves the script, not a speed.**\n\n" if result["quick"] else ""
    limits = result["limits"]
    how = HOW.format(rounds=result["rounds"], noise=result["noise"], gib=limits["GiB"], seconds=limits["seconds"])
    return (
        f"{quick}{result['date'][:10]}, {m['cpu']}, {m['threads']} of {m['cores']} cores, SIMD level {m['cpu level']}, load average {load};"
        f" {versions}; commit {m['commit']}. Latents: {result['latents']}. Raw numbers: [{source}]({source}). Again: `python bench/sweep.py`"
        f" ({result['seconds']} s).\n\n{how}"
    )


def find(result: dict, data: str, codes: int, dim: int) -> dict | None:
    same = (s for s in result["shapes"] if (s["data"], s["codes"], s["dim"]) == (data, codes, dim))
    return next(same, None)


def growth(result: dict) -> str:
    """The figures that the search is judged by, each beside its bound."""
    lines = []
    small, large, most = (find(result, "latents", *at) for at in ((8192, 64), (65_536, 64), (1_048_576, 64)))

    def work(entry: dict) -> float:
        return entry["counts"]["evaluations"] + entry["counts"]["panels"]

    if small and large:
        grown = f"{work(small):.1f} to {work(large):.1f}: {work(large) / work(small):.2f}x"
        lines.append(["evaluations + panels per row, K = 8,192 to 65,536, latents", grown, "4x at most"])
    for entry in result.get("widths", []):  # older files have none
        said = f"time at D = 256 / time at D = 64, K = {entry['codes']:,}, {entry['data']}, the two in turns {entry['rounds']} times"
        lines.append([said, f"{entry['ms']['256'] / entry['ms']['64']:.2f}", "1.5 at most"])
    if most:
        lines.append(["K = 1,048,576, latents", f"{number(most['ms']['vqfast'])} ms", "under 2,000 ms"])
    held = next((e for e in result["memory"] if e["codes"] == 1_048_576), None)
    if held:
        lines.append(["the same, peak extra memory", f"{held['MiB']['vqfast']:,.0f} MiB", "under 1,536 MiB"])
    dense = find(result, "isotropic", 8192, 64)
    for name, least in ((CDIST, 5), (FAISS, 1.3)):
        if dense and name in dense["ms"]:
            lines.append([f"{name} / vqfast, isotropic, K = 8,192", f"{dense['ms'][name] / dense['ms']['vqfast']:.1f}x", f"{least}x at least"])
    worst = [(ms / entry["ms"]["dense"], name, entry["data"]) for entry in result["adversaries"] for name, ms in entry["ms"].items()]
    if worst:
        times_dense, name, data = max(entry for entry in worst if entry[1] != "dense")
        said = f"{times_dense:.2f}x ({name}, {data})"
        lines.append(["worst of the rows and codebooks made to hurt, against dense", said, "1.5x at most"])
    return table(["", "measured", "bound"], lines)


def label(entry: dict) -> str:
    return f"{entry['data']}, K = {entry['codes']:,}, D = {entry['dim']:,}"


def times(result: dict) -> str:
    rows = []
    for entry in result["shapes"]:
        cells = []
        for name in METHODS[1:]:
            left_out = entry["left out"].get(name)
            cells.append(f"({left_out})" if left_out else cell(entry["ms"].get(name), entry["ms"]["vqfast"]))
        rows.append([label(entry), f"**{number(entry['ms']['vqfast'])}**", *cells])
    return "N = {:,} rows. In brackets how many times vqfast's time, or why a method was left out; empty where it was not tried.\n\n".format(
        result["shapes"][0]["rows"]
    ) + table(["", *METHODS], rows)


def counts(result: dict) -> str:
    rows = []
    for entry in result["shapes"]:
        c = entry["counts"]
        if c["road"] == "dense":
            shown = ["all", "", "all", ""]
        elif c["road"] == "bytes":
            shown = ["all", "", "all, in bytes", number(c["candidates"])]
        else:
            visited = c["panels"] / max(1, c["panels of the codebook"])
            shown = [number(c["panels"]), f"{100 * visited:.2f} %", number(c["evaluations"]), number(c["candidates"])]
        rows.append([label(entry), c["road"], *shown])
    head = ["", "road", "panels visited", "of all panels", "codes compared in all coordinates", "settled in float64"]
    return table(head, rows)


def memory(result: dict) -> str:
    names = [name for name in METHODS if any(name in entry["MiB"] for entry in result["memory"])]
    rows = [[label(e), *(f"{e['MiB'][name]:,.0f}" if name in e["MiB"] else "" for name in names)] for e in result["memory"]]
    return "The process's high-water mark above what was resident before, rows and codebook included there.\n\n" + table(["", *names], rows)


def adversaries(result: dict) -> str:
    entries = result["adversaries"]
    if not entries:
        return ""
    rows = [
        [name, *(f"{number(entry['ms'][name])} ({entry['ms'][name] / entry['ms']['dense']:.2f}x)" for entry in entries)]
        for name in entries[0]["ms"]
    ]
    say = "Milliseconds, and in brackets the part of the dense search of the data as they are, which the first line forces."
    return say + "\n\n" + table(["", *(f"{label(entry)}, N = {entry['rows']:,}" for entry in entries)], rows)


def plot(result: dict, file: Path) -> None:
    """Time against K (left) and D (right), both axes logarithmic; latents above, isotropic data below."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "vqfast"  # the same numbers give the same file
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(11, 8), sharey="row", layout="constrained")
    middle = max({e["codes"] for e in result["shapes"] if e["dim"] != 64}, default=0)
    for row, data in zip(panels, DATA, strict=True):
        shapes = [entry for entry in result["shapes"] if entry["data"] == data]
        curve(row[0], [e for e in shapes if e["dim"] == 64], "codes", f"{data}, D = 64", "codes K")
        curve(row[1], [e for e in shapes if e["codes"] == middle], "dim", f"{data}, K = {middle:,}", "dimensions D")
        row[0].set_ylabel("milliseconds")
    panels[0][0].legend(frameon=False, fontsize=8)
    rows = result["shapes"][0]["rows"]
    figure.suptitle(f"Nearest code of {rows:,} rows, threads: {result['machine']['threads']}")
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def curve(panel, shapes: list[dict], axis: str, title: str, x_label: str) -> None:
    shapes = sorted(shapes, key=lambda entry: entry[axis])
    for name, (colour, mark) in LOOKS.items():
        points = [(entry[axis], entry["ms"][name]) for entry in shapes if name in entry["ms"]]
        if points:
            at, spent = zip(*points, strict=True)
            width = 2.4 if name == "vqfast" else 1.2
            panel.loglog(at, spent, color=colour, marker=mark, linewidth=width, markersize=5, label=name)
    ticks = [entry[axis] for entry in shapes]
    panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    panel.minorticks_off()
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.set(title=title, xlabel=x_label)
    panel.grid(True, which="major", alpha=0.3)
