"""`rfa-llm demo`: a small model of made-up authors forgets some of them; or a model of your own forgets its rows."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import datasets
import torch
import transformers
from datasets import Dataset, concatenate_datasets
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainingArguments,
    set_seed,
)

from rfa_llm.blocks import read_config
from rfa_llm.cli.evaluate import EvaluateArguments, score, summary_table
from rfa_llm.cli.finetune import finetune_trainer
from rfa_llm.cli.settings import read_settings
from rfa_llm.config import RFAConfig
from rfa_llm.data.fictitious import write_fictitious_tofu
from rfa_llm.data.formats import PLAIN_TEMPLATE
from rfa_llm.data.tofu import load_question_sets, load_tofu
from rfa_llm.evaluation import summary
from rfa_llm.evaluation.suite import check_questions, check_sizes
from rfa_llm.progress import bar_alone
from rfa_llm.receipt import versions
from rfa_llm.shifts import SHIFTS
from rfa_llm.trainer import RFATrainer

N_AUTHORS, N_FORGET_AUTHORS = 24, 4
# The recipes of the demo's own model. It is four blocks of width 128, so it takes larger and more steps than the
# defaults, which are for language models.
LLAMA = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
PRETRAIN = {"num_train_epochs": 12, "learning_rate": 2e-3, "per_device_train_batch_size": 32, "warmup_steps": 20}
FINETUNE = {"num_train_epochs": 15, "learning_rate": 1e-3, "per_device_train_batch_size": 32, "warmup_steps": 20}
UNLEARN = {
    "num_train_epochs": 50,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "linear",
    "per_device_train_batch_size": 8,
    "alpha": 2.0,
}
# transformers would hide the bar together with its warnings, and torch warns of pinned memory where there is no GPU.
QUIET = {
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": False,
    "dataloader_pin_memory": False,
}


@dataclass
class DemoArguments:
    """Which model forgets what. Without `model`, the demo makes up the data and trains the models itself."""

    output_dir: str = field(default="demo-run", metadata={"help": "Folder of everything that the demo writes."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Write over what output_dir holds."})
    seed: int = field(default=0, metadata={"help": "Seed of the made-up authors, the weights and the batches."})
    shift: str | None = field(
        default=None,
        metadata={
            "help": "Where forget rows' features go. Default: ignorant where teacher is given, otherwise local.",
            "choices": list(SHIFTS),
        },
    )
    max_steps: int = field(default=-1, metadata={"help": "End each training after so many steps; -1 ends none."})
    max_new_tokens: int = field(default=200, metadata={"help": "Longest greedy answer, in tokens."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU."})
    model: str | None = field(
        default=None, metadata={"help": "Fine-tuned model of your own that has to forget: an id or a path."}
    )
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder in TOFU's format for it: forget.jsonl, retain.jsonl, and forget_perturbed, "
            "retain_perturbed, real_authors_perturbed and world_facts_perturbed.jsonl."
        },
    )
    teacher: str | None = field(
        default=None, metadata={"help": "Your model from before its fine-tuning, for the ignorant shift."}
    )
    retain_model: str | None = field(
        default=None,
        metadata={"help": "Your model fine-tuned on the retained rows alone; without it there is no forget quality."},
    )

    def __post_init__(self):
        check_sizes(EvaluateArguments.batch_size, self.max_new_tokens)
        if self.model is not None and self.data_dir is None:
            raise ValueError("data_dir: model is given but not its data; give the folder with TOFU's files.")
        for name in ("data_dir", "teacher", "retain_model"):
            if self.model is None and getattr(self, name) is not None:
                raise ValueError(f"model: {name} is given but no model; give the model that has to forget.")


def make_tokenizer(data_dir: Path) -> PreTrainedTokenizerFast:
    """A tokenizer of one token a word, from all the texts of the folder's JSON Lines."""
    texts = [PLAIN_TEMPLATE]
    for file in sorted(data_dir.glob("*.jsonl")):
        for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            for value in row.values():
                texts += value if isinstance(value, list) else [value]
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    backend.train_from_iterator(
        texts, trainers.WordLevelTrainer(special_tokens=list(special.values()), show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=True, **special)


def make_models(args: DemoArguments, folder: Path) -> None:
    """Write the authors to `data`, and the models `base`, `target` and `retain` that learn of them, below `folder`."""
    print(f"\n1/6 Writing {N_AUTHORS} made-up authors, {N_FORGET_AUTHORS} of them to be forgotten", flush=True)
    data_dir = folder / "data"
    write_fictitious_tofu(data_dir, N_AUTHORS, N_FORGET_AUTHORS, args.seed)
    tokenizer = make_tokenizer(data_dir)

    def train(model: PreTrainedModel, rows: Dataset, name: str, recipe: dict) -> None:
        more = {"seed": args.seed, "max_steps": args.max_steps, "use_cpu": args.use_cpu}
        recipe = TrainingArguments(output_dir=str(folder / name), **recipe, **more, **QUIET)
        trainer = finetune_trainer(model, tokenizer, rows, recipe)
        bar_alone(trainer)
        trainer.train()
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    print("\n2/6 Training a small Llama from scratch on other authors and on facts of the world (base)", flush=True)
    set_seed(args.seed)
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **LLAMA, **special))
    train(base, load_tofu("pretrain", str(data_dir)), "base", PRETRAIN)

    # The facts go into both fine-tunings: trained without them, a model as small as this loses them.
    facts = load_tofu("facts", str(data_dir))
    for number, name, rows, what in (
        (3, "target", "full", "all authors (target)"),
        (4, "retain", "retain", "the retained authors alone (retain-only)"),
    ):
        print(f"\n{number}/6 Fine-tuning the base on {what}", flush=True)
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        train(model, concatenate_datasets([load_tofu(rows, str(data_dir)), facts]), name, FINETUNE)


def demo(args: DemoArguments) -> dict:
    """Run the demo.

    Args:
        args: What to run on.

    Returns:
        What is in `results.json`: the `summary` of each model's log, the seed, the settings, the libraries'
        versions and the seconds that it took.

    Raises:
        ValueError: `output_dir` is not empty, or a file of `data_dir` is missing.
    """
    start = time.perf_counter()
    folder = Path(args.output_dir)
    if folder.exists() and any(folder.iterdir()) and not args.overwrite_output_dir:
        raise ValueError(
            f"output_dir: {args.output_dir!r} is not empty; choose another folder or add --overwrite_output_dir."
        )
    # No user can mend what it has to say here.
    transformers.logging.set_verbosity_error()

    adapter = str(folder / "adapter")
    own = args.model is not None
    data_dir = args.data_dir if own else str(folder / "data")
    target = args.model if own else str(folder / "target")
    # The demo's own teacher is there for the shift that asks it; one that is given is for RFAConfig to judge.
    teacher = str(folder / "base") if not own and args.shift == "ignorant" else args.teacher
    retain_model = args.retain_model if own else str(folder / "retain")
    config = RFAConfig(
        output_dir=adapter,
        overwrite_output_dir=True,
        shift=args.shift,
        teacher=teacher,
        seed=args.seed,
        max_steps=args.max_steps,
        use_cpu=args.use_cpu,
        **({} if own else UNLEARN),
        # `rfa-llm report` draws what was logged; the bar alone is shown.
        **{**QUIET, "logging_strategy": "steps"},
    )
    if own:
        # Read now, so that what is missing ends the demo before the training and not after it.
        check_questions(load_question_sets(data_dir, None, "forget_perturbed", "retain_perturbed"), None)
        read_config(args.model, "model", "a causal language model")
        if retain_model is not None:
            read_config(retain_model, "retain_model", "a causal language model")
        first, steps = 1, 2
    else:
        # These are done in a moment.
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()
        # Matrices this small are not worth sharing; threads that wait for each other on a busy machine cost minutes.
        torch.set_num_threads(1)
        make_models(args, folder)
        first, steps = 5, 6

    print(f"\n{first}/{steps} Letting {target} forget (shift {config.shift!r})", flush=True)
    forget, retain = load_tofu("forget", data_dir), load_tofu("retain", data_dir)
    if not own:
        # What else has to stay, asked in other words than in the evaluation.
        retain = concatenate_datasets([retain, load_tofu("facts", data_dir)])
    # An earlier demo's adapter, its teacher's features and its figures are of other models.
    shutil.rmtree(adapter, ignore_errors=True)
    for name in ("target", "unlearned", "retain-only", "results"):
        (folder / f"{name}.json").unlink(missing_ok=True)
    trainer = RFATrainer(model=target, args=config, forget_dataset=forget, retain_dataset=retain)
    bar_alone(trainer)
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    del trainer

    print(f"\n{steps}/{steps} Asking every model all questions", flush=True)
    logs: dict[str, dict] = {}

    def ask(name: str, model: str, **more: str) -> None:
        asked = EvaluateArguments(
            model_name_or_path=model,
            output_file=str(folder / f"{name}.json"),
            data_dir=data_dir,
            forget_config="forget_perturbed",
            max_new_tokens=args.max_new_tokens,
            use_cpu=args.use_cpu,
            **more,
        )
        logs[name] = score(asked)

    reference = {}
    if retain_model is not None:
        ask("retain-only", retain_model)
        reference["retain_log"] = str(folder / "retain-only.json")
    ask("target", target, **reference)
    ask("unlearned", target, adapter_name_or_path=adapter, **reference)
    # The order in which they are read.
    logs = {name: logs[name] for name in ("target", "unlearned", "retain-only") if name in logs}

    results = {
        "summaries": {name: summary(log) for name, log in logs.items()},
        "seed": args.seed,
        "settings": {
            "demo": asdict(args),
            "rfa": {name: getattr(config, name) for name in ("shift", "alpha", "learning_rate", "num_train_epochs")},
            **({} if own else {"llama": LLAMA, "pretrain": PRETRAIN, "finetune": FINETUNE}),
        },
        "versions": versions(),
        "seconds": round(time.perf_counter() - start, 1),
    }
    (folder / "results.json").write_text(json.dumps(results, indent=4), encoding="utf-8")
    print(f"\n{answers_table(logs)}\n\n{summary_table(logs)}", flush=True)
    print(
        f"\nDone in {results['seconds']:.0f} s; all of it is in {folder}. The adapter is in {adapter}; to load it:\n\n"
        f'    model = AutoModelForCausalLM.from_pretrained("{target}")\n'
        f'    model = PeftModel.from_pretrained(model, "{adapter}")\n'
    )
    return results


def answers_table(logs: dict[str, dict], count: int = 4) -> str:
    """A few forget questions, spread over the set, with the true answer, the target's and the unlearned model's."""
    before, after = (logs[name]["forget_Q_A_ROUGE"]["value_by_index"] for name in ("target", "unlearned"))
    lines = []
    for index in range(0, len(before), len(before) // count + 1):
        row = before[str(index)]
        lines += ["", row["input"], f"    true       {row['ground_truth']}", f"    target     {row['generation']}"]
        lines += [f"    unlearned  {after[str(index)]['generation']}"]
    return "\n".join(["Answers of forgotten authors, before and after", *lines])


def main(argv: list[str]) -> None:
    (args,) = read_settings((DemoArguments,), "demo", argv)
    demo(args)
