"""Trains with evaluations on the way, alone or as one of several CPU processes, for tests/test_callbacks.py.

The words are a folder with the model and the sets, a folder in it for the run, and the forget rows a process and step.
accelerate has no FSDP on the CPU, though torch has: this lets it take gloo for what it would do on GPUs.
"""

import os
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType
from test_callbacks import SHORT, question_sets

from rfa_llm import RFAConfig, RFATrainer, TofuEvaluationCallback
from rfa_llm.memory import base_model_bytes, held_values

fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
if fsdp:
    PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_GPU)

folder, name, rows = sys.argv[1:]
args = RFAConfig(
    output_dir=f"{folder}/{name}",
    model_init_kwargs={"dtype": "float32"},
    per_device_train_batch_size=int(rows),
    max_steps=3,
    warmup_steps=0,
    # Adam would make much of the rounding of gradients that are next to none.
    optim="sgd",
    learning_rate=0.1,
    report_to="none",
    disable_tqdm=True,
    save_strategy="no",
    use_cpu=not fsdp and not deepspeed,
    ddp_backend="gloo" if deepspeed else None,
)
trainer = RFATrainer(f"{folder}/model", args, f"{folder}/forget.jsonl", f"{folder}/retain.jsonl")
trainer.add_callback(TofuEvaluationCallback(trainer, question_sets(), steps=2, **SHORT))
trainer.train()
trainer.save_state()
base = [p for p in trainer.model.parameters() if not p.requires_grad]
held = sum(held_values(p)[-1].numel() * p.element_size() for p in base) / base_model_bytes(trainer.model)
whole = name == "alone" or not (fsdp or deepspeed)
assert abs(held - (1 if whole else 0.5)) < 0.02, held
