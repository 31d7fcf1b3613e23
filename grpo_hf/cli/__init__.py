"""`grpo-hf train | serve | verify | ...`: one module a subcommand, imported when it is asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from grpo_hf import __version__
from grpo_hf.cli.mistakes import as_sentences

COMMANDS = {
    "train": ("grpo_hf.cli.train", "train a model as a recipe says"),
    "recipes": ("grpo_hf.cli.recipes", "list the recipes that `train` knows by name"),
    "init": ("grpo_hf.cli.init", "write a recipe, a verifier and its test to start from"),
    "eval": ("grpo_hf.cli.eval", "sample held-out rows: avg@k, pass@k and maj@k with their intervals"),
    "compare": ("grpo_hf.cli.compare", "two evaluations of the same rows, pair by pair"),
    "serve": ("grpo_hf.cli.serve", "start a vLLM server that a trainer can give weights to"),
    "verify": ("grpo_hf.cli.verify", "score completions with any reward, or check a dataset's gold answers"),
    "toy": ("grpo_hf.toy.cli", "the CS336 lecture's sorting experiments, and what solves them"),
    "report": ("grpo_hf.cli.report", "write the page about a run, also while it goes on, or about several side by side"),
    "rollouts": ("grpo_hf.cli.rollouts", "look through a run's samples in the terminal"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Hand the rest of the command line to the subcommand."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: grpo-hf COMMAND ...\n")
        print("\n".join(f"  {name:<9}{text}" for name, (_, text) in COMMANDS.items()))
        print("\n--version prints the version; --traceback, after a command, shows where in the code a mistake was found.")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"grpo-hf {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        print(f"grpo-hf: there is no command {arguments[0]!r}, only {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    with as_sentences(arguments):
        return importlib.import_module(COMMANDS[arguments[0]][0]).main(arguments[1:])
