"""The result file's speed sections as one picture of bars: a panel per section, a group per shape, a bar per method."""

from __future__ import annotations

from pathlib import Path

# Section, what identifies a shape, the number that is drawn, and whether more of it is better.
PANELS = (
    ("nearest", ("N", "K", "D", "dtype"), "ms", False),
    ("statistics", ("codes",), "GB/s", True),
    ("training_step", ("N", "K", "D"), "ms", False),
    ("masked_conv", ("layer", "dtype"), "ms of a step", False),
)
# Colours that the colour-blind can tell apart (Okabe and Ito); ours are the first two.
OURS = {"triton": "#D55E00", "cuda": "#CC79A7", "vqfast": "#D55E00"}
OTHERS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#444444", "#999999", "#F0E442")


def shape_of(row: dict, keys: tuple[str, ...]) -> str:
    words = [f"{key} {row[key]:,}" if isinstance(row[key], int) else str(row[key]) for key in keys if key in row]
    return ", ".join(words)


def panels(result: dict) -> list[tuple[str, str, bool, dict[str, dict[str, float]]]]:
    """(section, unit, more is better, {shape: {who: number}}) of the sections that have numbers."""
    found = []
    for section, keys, unit, more in PANELS:
        groups: dict[str, dict[str, float]] = {}
        for row in result["sections"].get(section, {}).get("rows", []):
            if unit in row and any(key in row for key in keys):
                groups.setdefault(shape_of(row, keys), {})[row["who"]] = row[unit]
        if groups:
            found.append((section, unit, more, groups))
    return found


def draw(result: dict, file: Path) -> bool:
    """Write the picture; False, and no file, when there is nothing to draw or no matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "vqfast"  # the same numbers give the same file
    from matplotlib import pyplot

    found = panels(result)
    if not found:
        return False
    bars = [sum(len(group) + 1 for group in groups.values()) for *_, groups in found]
    figure, axes = pyplot.subplots(
        len(found), 1, figsize=(9, 1.2 * len(found) + 0.17 * sum(bars)), height_ratios=bars, layout="constrained", squeeze=False
    )
    for axis, (section, unit, more, groups) in zip(axes[:, 0], found):
        others = [who for group in groups.values() for who in group if who not in OURS]
        colours = OURS | {who: OTHERS[i % len(OTHERS)] for i, who in enumerate(dict.fromkeys(others))}
        place, ticks = 0, []
        for shape, group in groups.items():
            ticks.append((place + (len(group) - 1) / 2, shape))
            for who, value in group.items():
                axis.barh(place, value, color=colours[who], label=who)
                axis.text(value, place, f" {value:,g}", va="center", fontsize=7)
                place += 1
            place += 1
        axis.set_yticks(*zip(*ticks), fontsize=7)
        axis.invert_yaxis()
        axis.set_xscale("linear" if more else "log")  # rates start at 0; times span decades
        axis.xaxis.set_minor_formatter(lambda value, _: "")
        axis.margins(x=0.12)
        axis.set_title(f"{section}: {unit}, {'more' if more else 'less'} is better", fontsize=9)
        entries = dict(zip(*reversed(axis.get_legend_handles_labels())))
        axis.legend(entries.values(), entries.keys(), fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    facts = result["facts"]
    note = "" if facts["on_gpu"] else " (an interpreter's times: they mean nothing)"
    figure.suptitle(f"{facts['device']}, {result['date'][:10]}, commit {facts['commit'][:12]}{note}", fontsize=9)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
    return True
