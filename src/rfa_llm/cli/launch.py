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
        ValueError: There is no such configuration, or no such number of processes.
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
        mend = f"give a file that `accelerate config` wrote, or one of {', '.join(known)}"
        try:
            settings = yaml.safe_load(config.read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"accelerate_config: {own.accelerate_config!r} is no YAML; {mend}.") from error
        if not isinstance(settings, dict) or "distributed_type" not in settings:
            raise ValueError(f"accelerate_config: {own.accelerate_config!r} names no distributed_type; {mend}.")
        words = ["--config_file", str(config)]
        if own.num_processes is not None:
            _check_num_processes(own.num_processes, own.accelerate_config, settings)
            words += ["--num_processes", own.num_processes]
        if settings.get("num_machines", 1) == 1 and "main_process_port" not in settings:
            # Any that is free: accelerate's own choice is one port, and another run may have it.
            words += ["--main_process_port", "0"]
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
            [sys.executable, "-m", "rfa_llm.cli.launch", *words, *module, *rest],
            env=environment,
            start_new_session=True,
        )
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # nohup has a run outlive its terminal.
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda received, frame: os.killpg(process.pid, received))
        code = process.wait()
    if code != 0:
        sys.exit(code)
    return True


def _check_num_processes(number: str, name: str, settings: dict) -> None:
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f"num_processes: {number!r} is no number of processes; give 1 or more.")
    # accelerate would start one, without a word.
    if settings["distributed_type"] in ("NO", False) and int(number) > 1:
        raise ValueError(
            f"num_processes: {number}, but accelerate_config {name!r} runs one process; give another one, such as ddp "
            "or ddp_cpu, or leave num_processes out."
        )


def main() -> None:
    """`accelerate launch`, which ends with a sentence instead of its own traceback when a process fails."""
    # Here, because `rfa-llm --help` reads this file too and should not wait for torch.
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(launch_command_parser().parse_args())
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        _fail(rank, failure.exitcode)
    except subprocess.CalledProcessError as error:
        _fail(0, error.returncode)
    except SignalException as error:
        sys.exit(f"rfa-llm: error: {signal.Signals(error.sigval).name} has ended the run.")
    except ValueError as error:
        sys.exit(f"rfa-llm: error: accelerate_config: {error}")


def _fail(rank: int, code: int) -> None:
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    sys.exit(f"rfa-llm: error: process {rank} ended with {how}, and the run with it; what it said itself is above.")


if __name__ == "__main__":
    main()
