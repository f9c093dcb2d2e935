"""``vqfast sweep``: the same training for a grid of commitment weights and codebook sizes."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from vqfast._files import write_atomic
from vqfast.cli import UserError
from vqfast.cli._settings import add_settings, settings_epilog, values_of
from vqfast.train.config import config_from, merged
from vqfast.train.evaluate import evaluate
from vqfast.train.plots import Chart, save_charts
from vqfast.train.runs import begin_run, find_model, resume_run
from vqfast.train.sources import open_sources

EPILOG = f"""\
Runs that are finished are not repeated, an interrupted one goes on, so a sweep can be stopped and started again.

{settings_epilog()}"""


def add_arguments(parser) -> None:
    add_settings(parser)
    parser.add_argument("--beta", nargs="+", type=float, default=[0.25], metavar="B", help="commitment weights")
    parser.add_argument("--codebook-sizes", nargs="+", type=int, default=[128, 512], metavar="K", help="codebook sizes")
    parser.add_argument("--pictures", type=int, default=200, help="test pictures to judge by")
    parser.add_argument(
        "--out", default="runs/sweep", metavar="FOLDER", help="gets one folder per run and the comparison"
    )


def run(args) -> int:
    if args.pictures < 1:
        raise UserError(f"--pictures is {args.pictures}, but must be at least 1")
    values, folder, rows = values_of(args), Path(args.out), []
    grid = [(beta, size) for beta in args.beta for size in args.codebook_sizes]
    for beta, size in grid:
        config_from(_point(values, beta, size))  # every point is checked before the first one trains
    for number, (beta, size) in enumerate(grid, 1):
        print(f"--- {number} of {len(grid)}: beta {beta:g}, {size} codes", flush=True)
        result = _train_one(_point(values, beta, size), folder / f"beta{beta:g}-K{size}", args.pictures)
        if result is None:
            return 0
        rows.append({"beta": beta, "codebook_size": size, **result})
    _write(rows, folder)
    return 0


def _point(values: dict, beta: float, size: int) -> dict:
    return merged(values, {"model": {"commitment_weight": float(beta), "codebook_size": size}})


def _train_one(values: dict, folder: Path, pictures: int) -> dict | None:
    """The figures of one point of the grid; None when it was interrupted."""
    if not (folder / "model").is_dir():
        outcome = resume_run(folder, values) if (folder / "config.json").exists() else begin_run(values, folder)
        if outcome.interrupted:
            return None
    model, config, _ = find_model(folder)
    test = open_sources(config.data, config.model.in_channels).test
    judged = evaluate(model, (test[i] for i in range(min(pictures, len(test)))), codecs=False, likelihood=False)
    return {
        "psnr": round(judged.psnr, 3),
        "mse": round(judged.mse, 6),
        "perplexity": round(judged.perplexity[0], 2),
        "usage": round(judged.usage[0], 4),
        "bits_per_pixel": round(judged.bits_per_pixel, 4),
    }


def _write(rows: list[dict], folder: Path) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_atomic(folder / "sweep.csv", text.getvalue())
    charts = []
    for key, title in (("psnr", "PSNR (dB) on test pictures"), ("perplexity", "perplexity on test pictures")):
        series = {}
        for beta in dict.fromkeys(row["beta"] for row in rows):
            points = sorted((row["codebook_size"], row[key]) for row in rows if row["beta"] == beta)
            series[f"beta {beta:g}"] = tuple(zip(*points, strict=True))
        charts.append(Chart(title, "codes", series))
    written = save_charts(charts, folder / "sweep.svg")
    print("  beta  codes    PSNR   perplexity   usage   bits/pixel")
    for row in rows:
        print(
            f"{row['beta']:>6g} {row['codebook_size']:>6} {row['psnr']:>7.2f} {row['perplexity']:>12.1f} "
            f"{row['usage']:>7.0%} {row['bits_per_pixel']:>12.3f}"
        )
    print(f"written: {folder / 'sweep.csv'}, {written[0]}")
