"""The settings of a subcommand, from its words and the file of `--config`."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import NoneType, UnionType
from typing import Union, get_args, get_origin, get_type_hints

from transformers import TrainingArguments
from trl import TrlParser

# argparse's own usage would list hundreds of settings before each error.
USAGE = "%(prog)s [--config FILE.yaml] [--SETTING VALUE ...] [--debug]"

# Of every subcommand that loads a model.
DTYPES = ["auto", "bfloat16", "float16", "float32"]


def leading_words(argv: list[str], *names: str) -> list[str]:
    """The arguments with the words before the first `--` as the settings of these names, which may so be left out."""
    words = []
    for name, word in zip(names, argv, strict=False):
        if word.startswith("-"):
            break
        words += [f"--{name}", word]
    return [*words, *argv[len(words) // 2 :]]


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows each default, but for None: what that stands for is said in words, or the setting is required."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


# peft takes text here too, such as all-linear.
TEXT_OR_LIST = {"lora_target_modules"}


class SettingsParser(TrlParser):
    """Refuses one value in a recipe where a list belongs; text would be read letter by letter."""

    def set_defaults_with_config(self, **settings) -> list[str]:
        hints = {name: hint for one in self.dataclass_types for name, hint in get_type_hints(one).items()}
        lists = {name for name, hint in hints.items() if _is_list(hint)} - TEXT_OR_LIST
        for name, value in settings.items():
            if name in lists and not isinstance(value, (list, NoneType)):
                raise ValueError(f"{name}: {value!r} is no list; give one, such as [{value}].")
        return super().set_defaults_with_config(**settings)


def _is_list(hint: object) -> bool:
    """Whether a setting of this type is a list, or None, and nothing else."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return {get_origin(kind) for kind in kinds if kind is not NoneType} == {list}


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
        ValueError: There is no such file of settings, or no such setting, or one value where a list belongs, or a
            dataclass refuses a value.
        SystemExit: Help was asked for (exit code 0), or a value is of another type (2).
    """
    parser = SettingsParser(
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
    for one in settings:
        if isinstance(one, TrainingArguments) and one.resume_from_checkpoint in ("true", "True", "false", "False"):
            # A folder or a yes, so argparse leaves it text.
            one.resume_from_checkpoint = one.resume_from_checkpoint in ("true", "True")
    if unknown:
        # Those of a recipe come with dashes, too.
        raise ValueError(f"{unknown[0].lstrip('-')}: there is no such setting; `rfa-llm {command} --help` lists them.")
    return tuple(settings)
