"""`--accelerate_config`: run `rfa-llm unlearn` in several processes through `accelerate launch`."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from importlib.resources import as_file, files
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml


def launch(argv: list[str]) -> bool:
    """Run `rfa-llm unlearn` under `accelerate launch` if `argv` asks for it with `--accelerate_config`.

    Args:
        argv: The words after the subcommand. `--accelerate_config` takes the name of a file in `configs/accelerate`
            (without `.yaml`) or the path of one of your own, `--num_processes` the number of processes in the place
            of the file's.

    Returns:
        `False`, with nothing done, without `--accelerate_config`; `True` when the run has ended well.

    Raises:
        ValueError: There is no such configuration.
        SystemExit: The run failed; with its exit code.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--accelerate_config")
    parser.add_argument("--num_processes")
    own, rest = parser.parse_known_args(argv)
    if own.accelerate_config is None:
        return False
    shipped = files("rfa_llm") / "accelerate_configs"
    known = sorted(file.name.removesuffix(".yaml") for file in shipped.iterdir() if file.name.endswith(".yaml"))
    if own.accelerate_config in known:
        source = as_file(shipped / f"{own.accelerate_config}.yaml")
    elif Path(own.accelerate_config).is_file():
        source = as_file(Path(own.accelerate_config))
    else:
        raise ValueError(
            f"accelerate_config: {own.accelerate_config!r} is neither a file nor one of {', '.join(known)}; give one."
        )
    # torch's launcher leaves its log folders behind, in TMPDIR.
    with source as config, TemporaryDirectory() as temporary:
        settings = yaml.safe_load(config.read_text()) or {}
        words = ["--config_file", str(config)]
        if own.num_processes is not None:
            words += ["--num_processes", own.num_processes]
        environment = {**os.environ, "TMPDIR": temporary}
        if settings.get("use_cpu"):
            # accelerate's file alone does not bring several CPU processes together.
            if settings.get("distributed_type") == "DEEPSPEED":
                environment["DS_ACCELERATOR"] = "cpu"
                rest += ["--ddp_backend", "gloo"]
            else:
                rest += ["--use_cpu", "true"]
        module = ["--module", "rfa_llm.cli.main", "unlearn"]
        # In a group of its own, so that a signal to this process reaches all of them, once.
        process = subprocess.Popen(
            [sys.executable, "-m", "accelerate.commands.launch", *words, *module, *rest],
            env=environment,
            start_new_session=True,
        )
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda received, frame: os.killpg(process.pid, received))
        code = process.wait()
    if code != 0:
        sys.exit(code)
    return True
