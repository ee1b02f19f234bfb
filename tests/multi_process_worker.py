"""`rfa-llm unlearn` as one of several CPU processes, for tests/test_multi_process.py.

accelerate has no FSDP on the CPU, though torch has: under FSDP this lets accelerate take gloo for what it would do on
GPUs. `FAIL_ON_RANK` makes that process fail at its third step. Each process writes how much of the base model it
holds, and the hooks that are left.
"""

import json
import os
import sys
from pathlib import Path

import transformers
from accelerate import PartialState
from accelerate.utils import DistributedType
from trl import TrlParser

from rfa_llm import RFAConfig, RFATrainer
from rfa_llm.cli.unlearn import UnlearnArguments, UnlearnModelConfig, unlearn
from rfa_llm.memory import base_model_bytes, held_values

if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_GPU)

# transformers takes bf16 for granted on a GPU alone; the CPU computes it too.
transformers.training_args.is_torch_bf16_gpu_available = lambda: True

if os.environ.get("FAIL_ON_RANK") == os.environ["RANK"]:
    compute_loss = RFATrainer.compute_loss

    def fail(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise OSError(f"the disk of process {os.environ['RANK']} is full")
        return compute_loss(self, *args, **kwargs)

    RFATrainer.compute_loss = fail

data_args, training_args, model_args = TrlParser(
    (UnlearnArguments, RFAConfig, UnlearnModelConfig)
).parse_args_and_config(sys.argv[1:])
trainer = unlearn(data_args, training_args, model_args)
base = [p for p in trainer.model.parameters() if not p.requires_grad]
held = sum(held_values(p)[-1].numel() * p.element_size() for p in base)
hooks = [hook for block in trainer._blocks() for hook in block._forward_hooks.values()]
# DeepSpeed and FSDP leave hooks of their own.
report = {
    "held": held / base_model_bytes(trainer.model),
    "hooks": sum("capture.<locals>" in repr(hook) for hook in hooks),
}
(Path(training_args.output_dir) / f"process_{os.environ['RANK']}.json").write_text(json.dumps(report))
