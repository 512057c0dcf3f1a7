"""The `peftfast` command: one sub-command a module, imported when it is asked for."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

from peftfast._version import __version__

# Name: (module with add_arguments(parser) and main(args) -> exit status, one line of help).
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("peftfast.demo", "fine-tune a model twice, plain and patched, and compare the two"),
    "doctor": ("peftfast.doctor", "what is installed, and what can run on this machine"),
    "memory": ("peftfast.memory.command", "what a model's training takes in memory, and what fits"),
    "bench": ("peftfast.bench", "the benchmarks; from a checkout of the repository only"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sub-command that `argv` (by default the process's arguments) names.

    Returns:
        The exit status: 0 for success, 1 where the command found or met something wrong. Wrong
        usage exits with status 2, as argparse does.
    """
    parser = argparse.ArgumentParser(
        prog="peftfast",
        description="Fast, small fine-tuning of PEFT models.",
        epilog="commands:\n"
        + "\n".join(f"  {name:8}{text}" for name, (_, text) in COMMANDS.items())
        + "\n\n`peftfast COMMAND --help` lists a command's own options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"peftfast {__version__}")
    parser.add_argument("command", nargs="?", choices=COMMANDS, metavar="command", help="see below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command")
    chosen = parser.parse_args(argv)
    if chosen.command is None:
        parser.error(f"a command is needed: {', '.join(COMMANDS)}")

    module_name, text = COMMANDS[chosen.command]
    module = importlib.import_module(module_name)
    command = argparse.ArgumentParser(prog=f"peftfast {chosen.command}", description=text)
    module.add_arguments(command)
    return module.main(command.parse_args(chosen.arguments))


if __name__ == "__main__":
    raise SystemExit(main())
