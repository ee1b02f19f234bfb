"""Trains rivals one after the other, alone or as one of several CPU processes, for tests/test_rivals.py.

The words are a folder with the model and the sets, a folder for the adapters, the forget rows a process and step, and
methods. accelerate has no FSDP on the CPU, though torch has: this lets it take gloo for what it would do on GPUs.
"""

import os
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType
from conftest import perturb

from rfa_llm.rivals import RIVALS, RivalConfig

fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
if fsdp:
    PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_GPU)

folder, output_dir, rows, *methods = sys.argv[1:]
for method in methods:
    args = RivalConfig(
        output_dir=f"{output_dir}/{method}",
        method=method,
        model_init_kwargs={"dtype": "float32"},
        per_device_train_batch_size=int(rows),
        max_steps=3,
        warmup_steps=0,
        # Adam would make much of the rounding of gradients that are next to none.
        optim="sgd",
        learning_rate=0.1,
        blocks=[1, 2] if method == "circuit_breaker" else None,
        gradient_checkpointing=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=not fsdp and os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true",
        ddp_backend="gloo" if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" else None,
    )
    trainer = RIVALS[method](f"{folder}/model", args, f"{folder}/forget.jsonl", f"{folder}/retain.jsonl")
    # At its very start a circuit breaker follows the rounding alone (cosine 1, distance 0).
    perturb(trainer.model)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
