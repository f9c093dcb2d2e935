"""``vqfast sweep``: the same training for a grid of commitment weights and codebook sizes."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from vqfast._files import write_atomic
from vqfast.cli import UserError
from vqfast.cli._settings import add_settings, model_values_of, settings_epilog
from vqfast.train.config import build_model, config_from, merged, read_json
from vqfast.train.evaluate import evaluate
from vqfast.train.plots import Chart, save_charts
from vqfast.train.runs import begin_run, differences, find_model, resume_run
from vqfast.train.sources import open_sources

EPILOG = f"""\
Runs that are finished are not repeated, an interrupted one goes on, so a sweep can be stopped and started again.

{settings_epilog()}"""

# Settings that say how a run is made and shown, and not what comes out of it.
_INDIFFERENT = tuple(
    f"train.{key} " for key in ("device", "threads", "log_every", "picture_every", "checkpoint_every", "keep", "tensorboard")
)


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
    values, folder, rows = model_values_of(args), Path(args.out), []
    grid = [(beta, size) for beta in args.beta for size in args.codebook_sizes]
    kind = values.get("model", {}).get("kind", "vqvae")
    if kind != "vqvae":
        raise UserError(
            f"a sweep trains one-level VQ-VAEs (model.kind vqvae), but model.kind is {kind}; choose another --preset"
        )
    for beta, size in grid:  # every point is checked before the first one trains
        _check(_point(values, beta, size), _place(folder, beta, size))
    for number, (beta, size) in enumerate(grid, 1):
        print(f"--- {number} of {len(grid)}: beta {_name(beta)}, {size} codes", flush=True)
        result = _train_one(_point(values, beta, size), _place(folder, beta, size), args.pictures)
        if result is None:
            return 0
        rows.append({"beta": beta, "codebook_size": size, **result})
    _write(rows, folder)
    return 0


def _point(values: dict, beta: float, size: int) -> dict:
    return merged(values, {"model": {"commitment_weight": float(beta), "codebook_size": size}})


def _name(beta: float) -> str:
    """A weight with all digits that tell it from others."""
    return repr(beta).removesuffix(".0")


def _place(folder: Path, beta: float, size: int) -> Path:
    return folder / f"beta{_name(beta)}-K{size}"


def _check(values: dict, folder: Path) -> None:
    """Raises for settings that cannot be used, or that are not those of the run in the folder: its figures would be
    reported as theirs.
    """
    config = config_from(values)
    build_model(config)
    if (folder / "config.json").exists():
        changed = differences(config_from(read_json(folder / "config.json")), config)
        changed = [text for text in changed if not text.startswith(_INDIFFERENT)]
        if changed:
            raise UserError(
                f"{folder} was trained with other settings ({', '.join(changed)}); go on with the old ones, or choose "
                "another folder with --out"
            )


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
            series[f"beta {_name(beta)}"] = tuple(zip(*points, strict=True))
        charts.append(Chart(title, "codes", series))
    written = save_charts(charts, folder / "sweep.svg")
    print("  beta  codes    PSNR   perplexity   usage   bits/pixel")
    for row in rows:
        print(
            f"{_name(row['beta']):>6} {row['codebook_size']:>6} {row['psnr']:>7.2f} {row['perplexity']:>12.1f} "
            f"{row['usage']:>7.0%} {row['bits_per_pixel']:>12.3f}"
        )
    print(f"written: {folder / 'sweep.csv'}, {written[0]}")
