"""The command ``vqfast``: one module per command, found here by name and imported only when it is called.

A command module has ``add_arguments(parser)`` and ``run(args) -> int``. What a user did wrong ends as one sentence
on stderr and exit code 2; only a bug shows a traceback.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "train a model from a preset or a TOML file; resume a run",
    "sweep": "train a grid of commitment weights and codebook sizes, and compare",
    "eval": "judge a model: errors, bits, code usage, JPEG and WebP at the same size",
    "reconstruct": "write pictures next to what the model makes of them",
    "encode": "turn pictures into a token file",
    "decode": "turn a token file back into pictures",
    "train-prior": "train a prior over the codes of a model",
    "sample": "draw pictures from a model and its prior",
    "compress": "write pictures as entropy-coded codes",
    "decompress": "turn what compress wrote back into pictures",
    "data": "fetch or check a data set",
    "bench": "time the quantizer against plain PyTorch on this machine",
    "demo": "train on the embedded photographs for two minutes and show everything",
    "demo-generate": "train a VQ-VAE-2 and priors in a few minutes and draw pictures",
    "doctor": "say what runs here, what does not, and why",
}
_EXTRAS = {"numpy": "train", "PIL": "train", "safetensors": "train", "tomli": "train"}


class UserError(Exception):
    """Something that the user can put right; the message says what and how."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, 1 for failed work, 2 for a user's error, 130 after a second
    Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        from vqfast import __version__

        print(f"vqfast {__version__}")
        return 0
    name = argv[0]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        return _complain(
            f"there is no command {name!r}{f', did you mean {close[0]}?' if close else ''}; "
            f"the commands are {', '.join(COMMANDS)}"
        )
    try:
        module = importlib.import_module(f"vqfast.cli.{name.replace('-', '_')}")
        parser = argparse.ArgumentParser(
            prog=f"vqfast {name}",
            description=COMMANDS[name][0].upper() + COMMANDS[name][1:] + ".",
            epilog=getattr(module, "EPILOG", None),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("--traceback", action="store_true", help="show where an error came from")
        module.add_arguments(parser)
        if name != "doctor":  # which reports it among other things
            _check_environment()
    except ImportError as error:
        return _missing(error)
    except UserError as error:
        return _complain(str(error))
    args = parser.parse_args(argv[1:])
    if args.traceback:
        return module.run(args)
    return _guarded(module.run, args)


def _guarded(run, args) -> int:
    """Runs a command; turns users' errors into sentences."""
    try:
        return run(args)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output (head, less) left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ImportError as error:
        return _missing(error)
    except _user_errors() as error:
        return _complain(str(error))
    except OSError as error:
        return _complain(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))


def _check_environment() -> None:
    """A VQFAST_* variable that no op could heed is said before any work is done."""
    from vqfast import _backends

    try:
        _backends.check_environment()
    except ValueError as error:
        raise UserError(str(error)) from None


def _user_errors() -> tuple[type[Exception], ...]:
    """The exceptions whose messages are meant for users. Their modules are imported late, and may lack their
    libraries.
    """
    kinds: list[type[Exception]] = [UserError]
    for module, name in (
        ("vqfast._backends", "BackendError"),
        ("vqfast.tokens", "TokenFileError"),
        ("vqfast.train.config", "ConfigError"),
        ("vqfast.train.checkpoint", "CheckpointError"),
        ("vqfast.train.loop", "TrainingError"),
        ("vqfast.models", "ModelFileError"),
        ("vqfast.data", "DataError"),
        ("vqfast.data", "DataFileError"),
        ("vqfast.data", "PictureError"),
    ):
        try:
            kinds.append(getattr(importlib.import_module(module), name))
        except ImportError:
            continue
    return tuple(kinds)


def _missing(error: ImportError) -> int:
    """A library that is not installed; ours say so in a sentence and carry no module's name."""
    if error.name is None:
        return _complain(str(error))
    package = error.name.partition(".")[0]
    if package not in _EXTRAS:
        raise error
    return _complain(f"this command needs {package}, which is not installed: pip install 'vqfast[{_EXTRAS[package]}]'")


def _complain(sentence: str) -> int:
    if int(os.environ.get("RANK", 0)) == 0:  # under torchrun one process speaks for all
        print(f"vqfast: {sentence}", file=sys.stderr)
    return 2


def _overview() -> str:
    lines = [
        "vqfast: exact and fast vector quantization for PyTorch",
        "",
        "  vqfast COMMAND [options]     vqfast COMMAND --help",
        "",
    ]
    lines += [f"  {name:<14} {help}" for name, help in COMMANDS.items()]
    lines += ["", "Start with:  vqfast demo     then:  vqfast train --preset photos --data FOLDER_OF_PICTURES"]
    return "\n".join(lines)
