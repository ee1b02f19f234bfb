"""The `rfa-llm` command: finds the subcommand, lets it run, and turns bad input into one sentence."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable
from importlib import import_module

import yaml
from jinja2 import TemplateError
from safetensors import SafetensorError

from rfa_llm import __version__
from rfa_llm.cli.launch import launch

COMMANDS = {
    "unlearn": "make a model forget a set of rows; writes a LoRA adapter",
    "evaluate": "score a model, with or without an adapter, on TOFU's question sets",
    "publish": "put an adapter on the Hugging Face Hub, with a model card and its receipt",
    "verify": "hold an adapter, its base and the sets against the receipt of its training",
    "report": "write what runs were asked, what they did and what it cost as one HTML page",
    "merge": "make an adapter and its base one full-precision model",
    "finetune": "fine-tune a model on question/answer rows (a target to unlearn, or its retain-only twin)",
    "benchmark": "compare RFA with its rivals on one model, forget set and budget; resumes",
    "demo": "see it work on a small model of made-up authors, or on a model of your own",
}

# What bad input ends in: our own sentences, and those of the libraries that read it (broken weights, a chat template
# that refuses its turns).
BAD_INPUT = (
    *(ValueError, TypeError, OSError, ImportError, FloatingPointError),
    *(yaml.YAMLError, SafetensorError, TemplateError),
)


def run(command: Callable[[list[str]], None], argv: list[str]) -> None:
    """Run a subcommand's `main`; bad input, or Ctrl-C, ends it with one sentence and exit code 1, `--debug` with the
    traceback."""
    # What the libraries warn one another of is not for users of a command.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    debug = "--debug" in argv
    try:
        command([argument for argument in argv if argument != "--debug"])
    except BAD_INPUT as error:
        if debug:
            raise
        sys.exit(f"rfa-llm: error: {error}")
    except KeyboardInterrupt:
        if debug:
            raise
        sys.exit("rfa-llm: stopped.")


def main() -> None:
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="rfa-llm",
        description="Make a language model forget, by Residual Feature Alignment with LoRA.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items())
        + "\n\n`rfa-llm COMMAND --help` lists a command's settings and their defaults;\n"
        "every command also takes `--config FILE.yaml`, and `--debug` for the traceback of an error.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"rfa-llm {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    # Only the command's name is read here; the rest is its own parser's.
    command = parser.parse_args(sys.argv[1:2]).command

    def run_command(argv: list[str]) -> None:
        # The launched processes get `--debug` too.
        if command != "unlearn" or not launch(sys.argv[2:]):
            import_module(f"rfa_llm.cli.{command}").main(argv)

    run(run_command, sys.argv[2:])


if __name__ == "__main__":
    main()
