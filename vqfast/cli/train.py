"""``vqfast train``: begin a run, or go on with one."""

from __future__ import annotations

from pathlib import Path

from vqfast.cli import UserError
from vqfast.cli._settings import add_settings, model_values_of, settings_epilog
from vqfast.train.runs import begin_run, resume_run

EPILOG = settings_epilog()


def add_arguments(parser) -> None:
    add_settings(parser)
    parser.add_argument(
        "--out", metavar="FOLDER", help="the run's folder (default: runs/ and the preset's or file's name)"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="go on with the run in RUN; without RUN: with the one in --out, or begin it",
    )


def run(args) -> int:
    if (
        args.resume and args.resume.endswith(".toml") and not args.config
    ):  # "--resume my.toml" means "--resume" and "my.toml"
        args.config, args.resume = args.resume, ""
    values = model_values_of(args)
    folder = Path(
        args.resume or args.out or f"runs/{args.preset or (Path(args.config).stem if args.config else 'vqvae')}"
    )
    if args.resume and args.out and Path(args.out) != folder:
        raise UserError(f"--resume {args.resume} goes on in that folder; leave out --out {args.out}")
    if args.resume or (args.resume == "" and (folder / "config.json").exists()):
        outcome = resume_run(folder, values)
    else:
        outcome = begin_run(values, folder)
    if not outcome.interrupted:
        print(
            f"done: {folder}/model holds the model, {folder}/pictures and {folder}/plots show it. Next:\n"
            f"  vqfast eval {folder}"
        )
    return 0
