"""`rfa-llm unlearn`: make a model forget; `scripts/unlearn.py` is the same for `accelerate launch`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from transformers import TrainerState
from trl import ModelConfig, get_peft_config, get_quantization_config

from rfa_llm.calibration import MENDS, final_look
from rfa_llm.cli.settings import DTYPES, read_settings
from rfa_llm.config import RFAConfig
from rfa_llm.data.formats import load_rows
from rfa_llm.receipt import FIGURE_ROWS, read_receipt
from rfa_llm.trainer import RFATrainer
from rfa_llm.unlearning_trainer import DEFAULT_LORA


@dataclass
class UnlearnArguments:
    """The sets of `rfa-llm unlearn`."""

    _argument_group_name = "sets"

    forget_dataset: str = field(
        default=None,
        metadata={"help": "Rows to forget: a .jsonl, .json, .csv or .parquet file, or a Hub id. Required."},
    )
    retain_dataset: str = field(default=None, metadata={"help": "Rows to keep, likewise. Required."})
    holdout_dataset: str | None = field(
        default=None,
        metadata={"help": "Rows like the forget set's that neither model nor teacher saw, for --stop_at."},
    )
    forget_config: str | None = field(
        default=None, metadata={"help": "Configuration of the forget set's Hub dataset, such as forget10."}
    )
    retain_config: str | None = field(
        default=None, metadata={"help": "Configuration of the retain set's Hub dataset, such as retain90."}
    )
    holdout_config: str | None = field(
        default=None, metadata={"help": "Configuration of the holdout set's Hub dataset."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of the Hub datasets."})


@dataclass
class UnlearnModelConfig(ModelConfig):
    """trl's `ModelConfig` with RFA's defaults; without `--lora_target_modules` the trainer places the adapter."""

    _argument_group_name = "model, adapter and quantization"

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model that has to forget: a Hub id or a folder. Required."}
    )
    dtype: str | None = field(
        default="auto",
        metadata={
            "help": "dtype of the base model, and that 4-bit layers compute in; auto takes the checkpoint's, or "
            "bfloat16 with --load_in_4bit.",
            "choices": DTYPES,
        },
    )
    use_peft: bool = field(default=True, metadata={"help": "Must stay on: RFA is a LoRA method."})
    lora_r: int = field(default=DEFAULT_LORA["r"], metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=DEFAULT_LORA["lora_alpha"], metadata={"help": "LoRA alpha."})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout."})
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "Keep the base model's linear layers in 4 bits: NF4 with double quantization by default."},
    )
    load_in_8bit: bool = field(
        default=False, metadata={"help": "Keep the base model's linear layers in 8 bits: LLM.int8()."}
    )
    use_bnb_nested_quant: bool = field(
        default=True, metadata={"help": "Quantize the scales of 4-bit weights too (double quantization)."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.use_peft:
            raise ValueError("use_peft: False leaves RFA without the adapter that it trains; leave it on.")
        if self.load_in_4bit and self.dtype == "auto":
            # The compute dtype of 4-bit weights has to be named.
            self.dtype = "bfloat16"


def unlearn(data_args: UnlearnArguments, training_args: RFAConfig, model_args: UnlearnModelConfig) -> RFATrainer:
    """Train the adapter, save it in `training_args.output_dir`, and print what became of the residuals."""
    if model_args.model_name_or_path is None:
        raise ValueError("model_name_or_path: no model is given; pass an id or a path.")
    # A folder has no revision, which the adapter and its receipt would name.
    in_folder = Path(model_args.model_name_or_path).is_dir()
    training_args.model_init_kwargs = {
        **({} if in_folder else {"revision": model_args.model_revision}),
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    holdout = None
    if data_args.holdout_dataset is not None:
        holdout = load_rows(
            data_args.holdout_dataset, "holdout_dataset", data_args.holdout_config, data_args.dataset_split
        )
    trainer = RFATrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        forget_dataset=load_rows(
            data_args.forget_dataset, "forget_dataset", data_args.forget_config, data_args.dataset_split
        ),
        retain_dataset=load_rows(
            data_args.retain_dataset, "retain_dataset", data_args.retain_config, data_args.dataset_split
        ),
        holdout_dataset=holdout,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    metrics = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint).metrics
    trainer.save_state()
    trainer.save_model(training_args.output_dir)
    if training_args.should_save:
        losses = answer_table(read_receipt(training_args.output_dir)["metrics"])
        print(
            f"\n{residual_table(trainer)}\n\n{stop_report(trainer.state)}{losses}\n\n"
            f"{memory_report(metrics, training_args.device)}\n\n"
            f"Adapter saved to {training_args.output_dir}."
        )
    trainer.accelerator.end_training()
    return trainer


def stop_report(state: TrainerState) -> str:
    """Where a training with `stop_at` ended, and what was done to its adapter there, as text; nothing for others."""
    look = final_look(state)
    if look is None:
        return ""
    level = next(name for name in MENDS if name in look)
    return (
        f"Ended at step {state.global_step} of {state.max_steps}; then the adapter's effect was multiplied by "
        f"{look['adapter_scale']:.3f} (the losses and residuals above are from before). The forget set's answers are "
        f"at {look['forget_answer_loss']:.3f} nats a token; {level}, which stands for ignorance, is {look[level]:.3f}."
        "\n\n"
    )


def answer_table(metrics: dict[str, dict[str, float]]) -> str:
    """What the receipt says of the answers, as text: how much was forgotten, and what it cost."""
    losses = pd.DataFrame(
        {
            when: [metrics[when][f"{name}_answer_loss"] for name in ("forget", "retain")]
            for when in ("before", "after")
        },
        index=["forget set", "retain set"],
    )
    # Which rows hangs on the receipt's salt, so two runs' figures are not of the same ones.
    title = f"Mean loss of the answers, nats a token, over {FIGURE_ROWS} rows at most, drawn anew for each run"
    return f"{title}\n{losses.to_string(float_format='%.3f')}"


def memory_report(metrics: dict[str, float], device: torch.device) -> str:
    """Each process's peak against the base model's own bytes, as text."""
    base = metrics["base_model_bytes"]
    peaks = {name.rpartition("_")[2]: value for name, value in metrics.items() if name.startswith("peak_bytes/")}
    what = "resident set, Python and libraries included" if device.type == "cpu" else "allocated"
    lines = [f"Peak memory ({what}); the base model's weights are {base / 2**20:,.0f} MiB"]
    for rank, peak in peaks.items():
        lines.append(f"process {rank} on {device.type}  {peak / 2**20:,.0f} MiB  {peak / base:.2f}x the weights")
    return "\n".join(lines)


def residual_table(trainer: RFATrainer) -> str:
    """First and last logged losses, and the relative residuals `‖R_b‖ / ‖h⁰_b‖` at the end, as text."""
    steps = [entry for entry in trainer.state.log_history if "loss_forget" in entry]
    if not steps:
        return "No step of this run was logged."
    losses = pd.DataFrame(
        {f"step {entry['step']}": [entry["loss_forget"], entry["loss_retain"]] for entry in (steps[0], steps[-1])},
        index=["forget loss", "retain loss"],
    )
    # On the retain set residual="branch" computes none.
    sets = ("forget", "retain") if trainer.args.residual == "feature" else ("forget",)
    residuals = pd.DataFrame(
        {f"{name} set": [steps[-1][f"residual_{name}/block_{block}"] for block in trainer.aligned] for name in sets},
        index=[f"block {block}" for block in trainer.aligned],
    )
    return f"{losses.to_string(float_format='%.4f')}\n\nRelative residual, last step\n" + residuals.to_string(
        float_format="%.4f"
    )


def main(argv: list[str]) -> None:
    epilog = (
        "--accelerate_config NAME [--num_processes N] runs it in several processes: a file of configs/accelerate, or "
        "one of your own."
    )
    unlearn(*read_settings((UnlearnArguments, RFAConfig, UnlearnModelConfig), "unlearn", argv, epilog=epilog))
