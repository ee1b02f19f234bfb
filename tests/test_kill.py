"""A run that is killed at any moment, again and again, ends as if nothing had happened."""

import multiprocessing
import os
import random
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama, tiny_lora, tiny_rows, tiny_tokenizer
from safetensors.torch import load_file

from rfa_llm import RFAConfig, RFATrainer
from rfa_llm.checkpoints import newest_whole_checkpoint

STEPS = 30


class KilledWhileWriting(RFATrainer):
    """Is killed by itself when a part of its third checkpoint is on disk."""

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if Path(output_dir).name == "checkpoint-6":
            os.kill(os.getpid(), signal.SIGKILL)


def train(output_dir: str, trainer_class: type[RFATrainer], rank: int, processes: int, port: int) -> None:
    """One process of a run that goes on from the newest whole checkpoint, if there is one."""
    torch.set_num_threads(1)
    if processes > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    args = RFAConfig(
        output_dir=output_dir,
        shift="random",
        max_steps=STEPS,
        per_device_train_batch_size=4 // processes,
        learning_rate=1e-3,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = trainer_class(
        tiny_llama(),
        args,
        forget_dataset=tiny_rows(12, first=0),
        retain_dataset=tiny_rows(20, first=20),
        processing_class=tiny_tokenizer(),
        # Dropout, so that the state of the random generators counts.
        peft_config=tiny_lora(lora_dropout=0.1),
    )
    trainer.train(resume_from_checkpoint=newest_whole_checkpoint(output_dir))
    trainer.save_model()
    trainer.accelerator.end_training()


class Run:
    """The processes of a run, forked from a server that has the libraries loaded, so that they start at once."""

    context = multiprocessing.get_context("forkserver")

    def __init__(self, output_dir: Path, processes: int, trainer_class: type[RFATrainer] = RFATrainer):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = [
            self.context.Process(target=train, args=(str(output_dir), trainer_class, rank, processes, port))
            for rank in range(processes)
        ]
        for process in self.processes:
            process.start()

    def join(self) -> list[int]:
        """Exit codes, when all have ended."""
        for process in self.processes:
            process.join(timeout=300)
        return [process.exitcode for process in self.processes]

    def kill_after(self, seconds: float) -> bool:
        """Kill all processes after a time, and say whether any of them was still there."""
        self.processes[0].join(timeout=seconds)
        for process in self.processes:
            process.kill()
        return -signal.SIGKILL in self.join()


Run.context.set_forkserver_preload(["test_kill"])


def check_kills(processes: int, kills: int, tolerance: float, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    begin = time.monotonic()
    assert Run(whole, processes).join() == [0] * processes
    duration = time.monotonic() - begin

    draw = random.Random(0)
    done, runs, inside_a_run = 0, 0, 0
    while done < kills or inside_a_run:
        out = tmp_path / f"killed_{runs}"
        if done < kills:
            # The first kill of all is inside the write of a checkpoint, the others anywhere.
            first = done == 0
            run = Run(out, processes, KilledWhileWriting if first else RFATrainer)
            killed = run.kill_after(300 if first else draw.uniform(0.1, 0.8) * duration)
            if first:
                assert (out / "checkpoint-6" / "adapter_model.safetensors").exists()
                assert newest_whole_checkpoint(str(out)) == str(out / "checkpoint-4")
        else:
            killed = any(Run(out, processes).join())
            assert not killed
        done, inside_a_run = done + killed, inside_a_run + killed
        if not killed:
            ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (out, whole))
            for name, weight in theirs.items():
                difference = torch.linalg.norm(ours[name] - weight) / torch.linalg.norm(weight)
                assert torch.equal(ours[name], weight) if tolerance == 0 else difference <= tolerance, name
            runs, inside_a_run = runs + 1, 0
    assert done == kills


def test_twenty_kills_leave_one_process_bit_for_bit_the_same(tmp_path):
    check_kills(processes=1, kills=20, tolerance=0, tmp_path=tmp_path)


def test_kills_leave_two_processes_the_same(tmp_path):
    check_kills(processes=2, kills=4, tolerance=1e-6, tmp_path=tmp_path)


@pytest.mark.slow
def test_twenty_kills_leave_two_processes_the_same(tmp_path):
    check_kills(processes=2, kills=20, tolerance=1e-6, tmp_path=tmp_path)
