"""The settings of a subcommand, from its words and the file of `--config`."""

from __future__ import annotations

import argparse
from pathlib import Path

from trl import TrlParser

from rfa_llm.cli.main import USAGE


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each default, but for None: what that stands for is said in words, or the setting is required."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def read_settings(
    dataclasses: tuple[type, ...], command: str, argv: list[str], usage: str = USAGE, epilog: str | None = None
) -> tuple:
    """An instance of each dataclass.

    Args:
        dataclasses: What the subcommand reads.
        command: Its name.
        argv: The words after it.
        usage, epilog: Of its help.

    Raises:
        ValueError: There is no such file of settings, or no such setting, or a dataclass refuses a value.
        SystemExit: Help was asked for (exit code 0), or a value is of another type (2).
    """
    parser = TrlParser(
        dataclasses,
        prog=f"rfa-llm {command}",
        usage=usage,
        epilog=epilog,
        formatter_class=HelpFormatter,
        # The beginning of a setting's name is a slip, as it is in a file of settings.
        allow_abbrev=False,
    )
    if "--config" in argv:
        file = " ".join(argv[argv.index("--config") + 1 :][:1])
        if not Path(file).is_file():
            raise ValueError(f"config: {file!r} is no file; give a YAML file of settings.")
    *settings, unknown = parser.parse_args_and_config(argv, return_remaining_strings=True)
    if unknown:
        raise ValueError(f"{unknown[0]}: there is no such setting; `rfa-llm {command} --help` lists them.")
    return tuple(settings)
