"""`rfa-llm finetune`: make a target to unlearn, or its retain-only twin, with plain supervised fine-tuning."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from datasets import Dataset
from peft import PeftConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from trl import ModelConfig, get_peft_config

from rfa_llm.blocks import num_blocks, placed, read_config
from rfa_llm.cli.settings import read_settings
from rfa_llm.data.formats import check_tokenizer, load_rows, prepare


@dataclass
class FinetuneArguments:
    """What to fine-tune on."""

    _argument_group_name = "data"

    train_dataset: str = field(
        default=None, metadata={"help": "Rows: a .jsonl, .json, .csv or .parquet file, or a Hub id. Required."}
    )
    train_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})


@dataclass
class FinetuneConfig(TrainingArguments):
    """`TrainingArguments` with the recipe of our TOFU targets as defaults."""

    _argument_group_name = "training"

    output_dir: str | None = field(default=None, metadata={"help": "Folder of the fine-tuned model."})
    learning_rate: float = field(default=1e-3, metadata={"help": "The initial learning rate for AdamW."})
    num_train_epochs: float = field(default=6.0, metadata={"help": "Passes over the data."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Rows per device and step."})
    warmup_steps: float = field(default=10, metadata={"help": "Warm-up steps, or their share of all if below 1."})
    save_strategy: str = field(default="no", metadata={"help": "When to save checkpoints."})

    def __post_init__(self):
        started = int(os.environ.get("WORLD_SIZE", 1))
        if started > 1:
            raise ValueError(
                f"args: {started} processes were started, and a model is fine-tuned here in one; start one."
            )
        super().__post_init__()


@dataclass
class FinetuneModelConfig(ModelConfig):
    """trl's `ModelConfig`, with LoRA of rank 32 on every linear layer of every block as the default."""

    _argument_group_name = "model and adapter"

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model to fine-tune: a Hub id or a folder. Required."}
    )
    dtype: str | None = field(default="auto", metadata={"help": "dtype of the model."})
    use_peft: bool = field(default=True, metadata={"help": "LoRA, merged at the end; off trains all weights."})
    lora_r: int = field(default=32, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=64, metadata={"help": "LoRA alpha."})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout."})

    def __post_init__(self):
        super().__post_init__()
        if self.load_in_4bit or self.load_in_8bit:
            raise ValueError(
                "load_in_4bit, load_in_8bit: a whole model is saved here, in full precision; leave them out."
            )


def finetune_trainer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, args: TrainingArguments
) -> Trainer:
    """A trainer of whatever of the model is trainable, in place, with the loss on the answers alone.

    Args:
        model: A causal LM or a `PeftModel`.
        tokenizer: Its tokenizer.
        dataset: Rows in a format of `rfa_llm.data.formats`.
        args: The recipe.
    """
    check_tokenizer(tokenizer)
    encoded = prepare(dataset, tokenizer, "train_dataset", max_length=None)
    rows = [
        {"input_ids": ids, "labels": [-100] * start + ids[start:]}
        for ids, start in zip(encoded["input_ids"], encoded["answer_start"], strict=True)
    ]
    return Trainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )


def finetune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    args: TrainingArguments,
    peft_config: PeftConfig | None,
) -> None:
    """Train as `finetune_trainer` says, and save model and tokenizer in `args.output_dir`.

    With a `peft_config` an adapter is trained, on every block unless the config says otherwise, and merged.
    `args.resume_from_checkpoint` is the checkpoint to go on from.
    """
    if peft_config is not None:
        model = get_peft_model(model, placed(peft_config, model, num_blocks(model.config) - 1))
    finetune_trainer(model, tokenizer, dataset, args).train(resume_from_checkpoint=args.resume_from_checkpoint)
    if peft_config is not None:
        model = model.merge_and_unload()
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)


def main(argv: list[str]) -> None:
    dataclasses = (FinetuneArguments, FinetuneConfig, FinetuneModelConfig)
    data_args, training_args, model_args = read_settings(dataclasses, "finetune", argv)
    if model_args.model_name_or_path is None:
        raise ValueError("model_name_or_path: no model is given; pass an id or a path.")
    dataset = load_rows(data_args.train_dataset, "train_dataset", data_args.train_config, data_args.dataset_split)
    source = {"revision": model_args.model_revision}
    read_config(model_args.model_name_or_path, "model_name_or_path", "a causal language model", **source)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, **source)
    model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, dtype=model_args.dtype, **source)
    if model_args.attn_implementation is not None:
        model.set_attn_implementation(model_args.attn_implementation)
    finetune(model, tokenizer, dataset, training_args, get_peft_config(model_args))
    print(f"Model saved to {training_args.output_dir}.")
