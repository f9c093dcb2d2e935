"""``vqfast data``: fetch a data set, or say what is here."""

from __future__ import annotations

from pathlib import Path

from vqfast.cli import UserError
from vqfast.data import SOURCES, default_folder, fetch
from vqfast.data.fetch import complete_folder
from vqfast.train.config import did_you_mean

EPILOG = "Everything that is fetched is checked against its known sha256. Without a name, the data sets are listed."


def add_arguments(parser) -> None:
    parser.add_argument("name", nargs="?", help=f"one of {', '.join(SOURCES)}")
    parser.add_argument("folder", nargs="?", help="where to put it (default: the cache folder)")
    parser.add_argument("--local", metavar="PATH", help="a copy that is already on this machine")


def run(args) -> int:
    if args.name is None:
        for name in SOURCES:
            folder = complete_folder(name, default_folder(name))
            print(f"{name:<10} {f'in {folder}' if folder else f'not here; fetch it with: vqfast data {name}'}")
        print("photographs is inside the package, always here")
        return 0
    if args.name not in SOURCES:
        raise UserError(
            f"there is no data set {args.name!r}{did_you_mean(args.name, SOURCES)}; there are {', '.join(SOURCES)}"
        )
    fetch(args.name, Path(args.folder) if args.folder else None, local=Path(args.local) if args.local else None)
    return 0
