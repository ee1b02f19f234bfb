r"""What a step of RFA costs beside NPO and RMU, how it grows, and what an evaluation and an import cost.

    python benchmarks/speed.py --model runs/models/target --data_dir ../shared/tofu800 \
        --output benchmarks/results/speed

Writes speed.json, speed.md and speed.svg. Every step's figure is of a process of its own, one after the other on an
idle machine, in rounds, so that a slow minute meets every method; the evaluation's two forms take turns in one
process. Memory on a CPU is that of a further process, in which the C library hands freed memory back at once: its
resident set is then what a step needs, and not what earlier ones left. Report the ratios.
NPO and RMU come in two forms: `npo` and `rmu` are `rfa_llm.rivals`, LoRA with the adapter-off model as reference;
`npo_as_shipped` and `rmu_as_shipped` run beside a deep copy of the model, take the gradient of all parameters and
project every position on the vocabulary, as their authors' code does (RMU's optimizer moves three matrices, also as
theirs). `floor` is the bare work: forward and backward of the blocks up to the last
aligned one, on the same batches, without adapter, reference, loss or optimizer.
`--parts` runs some of it and keeps the rest of the JSON, which must be of the same machine and versions, and of this
program's: results/speed.json is of an earlier one, which did not count the operations of attention.

    python benchmarks/speed.py --parts steps --shape llama-3.1-8b --quantization nf4 --pairs 6 --tokens 256 \
        --output benchmarks/results/speed_gpu_8b

is the main table on a GPU, of a randomly initialised model and rows of random words. There all methods share one
process, and memory is what PyTorch's allocator has given out. What is as shipped trains all weights, so it has them in
bfloat16 whatever the others have.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from gpu import StepClock, build_model, build_rows, build_tokenizer, memory_bytes, peak_flops, reset_peak_memory
from memory import SHAPES, count_parameters, shape_config
from peft import LoraConfig
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PrinterCallback

from rfa_llm.benchmark.environment import environment
from rfa_llm.blocks import find_blocks, num_blocks
from rfa_llm.data.formats import encode, load_rows, prepare
from rfa_llm.data.pairing import ForgetRetainPairs, LengthGroupedPairs, PairCollator
from rfa_llm.evaluation.scores import answer_losses, greedy_answers
from rfa_llm.residuals import block_features, capture
from rfa_llm.rivals import RIVALS, RivalConfig, losses
from rfa_llm.trainer import RFAConfig, RFATrainer

# Rows of the forget set in a main run, and as many retain rows: four steps an epoch, so that the second comes soon.
ROWS, PAIRS, WARMUP = 24, 6, 5
# RFA with every option that makes it fast, and with one of them changed at a time.
RFA = {
    "rfa": {},
    "rfa_without_cache": {"reference_cache": "off"},
    "rfa_random_order": {"train_sampling_strategy": "random"},
    "rfa_branch_residual": {"residual": "branch"},
    "rfa_default_blocks": {"blocks": None},
    "rfa_rank_16": {},
}
# LoRA's rank where it is not the default.
RANKS = {"rfa_rank_16": 16}
SHIPPED = {"npo_as_shipped": "npo", "rmu_as_shipped": "rmu"}
METHODS = [*RFA, "npo", "rmu", "floor", *SHIPPED]
# What the table divides by.
NEEDED = ("npo_as_shipped", "npo", "floor")
GROWING = ["rfa", "npo", "npo_as_shipped"]
SWEEPS = {
    "tokens": ([64, 128, 256, 512, 1024, 2048], GROWING),
    "pairs": ([1, 2, 4, 8, 16], GROWING),
    "rows": ([12, 24, 48, 96], ["rfa"]),
    "aligned": ([1, 2, 4, 8, 15], ["rfa"]),
    "shape": (["smollm2-135m", "smollm2-360m"], GROWING),
}
# glibc's mallopt(3): what is larger than so many bytes is a mapping of its own, which goes when it is freed.
FREEING = {"MALLOC_MMAP_THRESHOLD_": "131072"}
PARTS = ["imports", "padding", "evaluation", "steps", "memory", "growth"]
NAMES = ("forget", "retain")


# ---- one measurement, in a process of its own ----


def the_device() -> torch.device:
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def load(task: dict, device: torch.device) -> PreTrainedModel:
    """The model in bf16, or its blocks in NF4, all of it in memory."""
    if "shape" in task:
        quantization = "none" if task["method"] in SHIPPED else task.get("quantization", "none")
        return build_model(shape_config(task["shape"]), quantization, device)
    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.to(device)


def rows_of(task: dict, model: PreTrainedModel) -> dict:
    """Forget and retain rows and their tokenizer: TOFU's, or random words where the task says how many tokens."""
    number = task.get("rows", ROWS)
    if "tokens" in task:
        vocab_size = model.config.vocab_size
        sets = [build_rows(number, task["tokens"], vocab_size, seed) for seed in (1, 2)]
        tokenizer = build_tokenizer(vocab_size)
    else:
        folder = Path(task["data_dir"])
        sets = [load_rows(str(folder / f"{name}.jsonl"), "data_dir").select(range(number)) for name in NAMES]
        tokenizer = AutoTokenizer.from_pretrained(task["model"])
    return {"forget_dataset": sets[0], "retain_dataset": sets[1], "processing_class": tokenizer}


def the_trainers_batches(task: dict, model: PreTrainedModel) -> Iterator[dict]:
    """The batches that `make_trainer`'s would see, step by step."""
    rows, size = rows_of(task, model), task.get("pairs", PAIRS)
    sets = [prepare(rows[f"{name}_dataset"], rows["processing_class"], name, None) for name in NAMES]
    pairs = ForgetRetainPairs(*sets, seed=42)
    pairs.group_by_length()
    collator = PairCollator(rows["processing_class"].pad_token_id, "answer", "all")
    for step in range(task["steps"]):
        epoch, number = divmod(step, math.ceil(len(pairs) / size))
        pairs.set_epoch(epoch)
        order = list(LengthGroupedPairs(pairs, size))[number * size :][:size]
        yield collator([pairs[i] for i in order])


def aligned_blocks(task: dict, model: PreTrainedModel) -> list[int]:
    """The last block of the model's lower half, and below it as many as the task says, spread evenly."""
    half = num_blocks(model.config) // 2
    number = task.get("aligned", 1)
    return sorted({half - 1 - i * half // number for i in range(number)})


def make_trainer(task: dict, model: PreTrainedModel, folder: str, clock: StepClock):
    """The trainer of RFA or of a rival on LoRA."""
    common = {
        "output_dir": folder,
        "per_device_train_batch_size": task.get("pairs", PAIRS),
        "max_steps": task["steps"],
        "warmup_steps": 0,
        "max_length": None,
        "train_sampling_strategy": "group_by_length",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    rows = rows_of(task, model)
    if task["method"] in RIVALS:
        args = RivalConfig(method=task["method"], **common)
        trainer = RIVALS[task["method"]](model=model, args=args, callbacks=[clock], **rows)
    else:
        args = RFAConfig(**{**common, "blocks": aligned_blocks(task, model), **RFA[task["method"]]})
        if task["method"] in RANKS:
            rank = RANKS[task["method"]]
            rows["peft_config"] = LoraConfig(r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM")
        trainer = RFATrainer(model=model, args=args, callbacks=[clock], **rows)
    trainer.remove_callback(PrinterCallback)
    return trainer


def as_shipped(method: str, model: PreTrainedModel, steering: torch.Tensor) -> Callable[[dict], torch.Tensor]:
    """`batch -> loss` of NPO or RMU beside a deep copy of the model: one forward a set, every position projected."""
    reference = copy.deepcopy(model).requires_grad_(False)

    def half(batch: dict, forget: bool) -> dict:
        rows = batch["is_forget"] if forget else ~batch["is_forget"]
        longest = batch["attention_mask"][rows].sum(1).max()
        return {name: batch[name][rows, :longest] for name in ("input_ids", "attention_mask", "token_mask")}

    def logits(of: PreTrainedModel, rows: dict) -> torch.Tensor:
        return of(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], use_cache=False).logits

    def row_nll(of: PreTrainedModel, rows: dict) -> torch.Tensor:
        labels = rows["input_ids"].masked_fill(~(rows["token_mask"] & rows["attention_mask"].bool()), -100)
        per_token = F.cross_entropy(
            logits(of, rows)[:, :-1].transpose(1, 2).float(), labels[:, 1:], reduction="none", ignore_index=-100
        )
        return per_token.sum(1)

    def npo(batch: dict) -> torch.Tensor:
        forget, retain = half(batch, True), half(batch, False)
        with torch.no_grad():
            before = row_nll(reference, forget)
        return losses.npo(-row_nll(model, forget), -before, 0.1, len(before)) + row_nll(model, retain).mean()

    def steered_block(of: PreTrainedModel) -> nn.Module:
        blocks = find_blocks(of)
        return blocks[min(7, len(blocks) - 1)]

    def features(of: PreTrainedModel, rows: dict) -> torch.Tensor:
        with capture([steered_block(of)]) as kept:
            logits(of, rows)
        return kept[0][rows["token_mask"]]

    def rmu(batch: dict) -> torch.Tensor:
        forget, retain = half(batch, True), half(batch, False)
        with torch.no_grad():
            before = features(reference, retain)
        steered = losses.rmu(features(model, forget), steering, forget["token_mask"].sum())
        return steered + losses.rmu(features(model, retain), before, retain["token_mask"].sum())

    return {"npo": npo, "rmu": rmu}[method]


def floor(task: dict, model: PreTrainedModel) -> Callable[[dict], torch.Tensor]:
    """`batch -> loss` whose forward and backward are those of the blocks up to the last aligned one alone."""
    model.requires_grad_(False)
    last = find_blocks(model)[aligned_blocks(task, model)[-1]]

    def loss(batch: dict) -> torch.Tensor:
        # The gradient has to reach the first block, as the adapter there asks.
        embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_(True)
        (h,) = block_features(model, [last], inputs_embeds=embedded, attention_mask=batch["attention_mask"])
        return h.float().square().mean()

    return loss


def measure(task: dict) -> dict:
    """Seconds a step after `WARMUP` (from the second epoch on), memory over the base, operations of one step."""
    device = the_device()
    reset_peak_memory(device)
    before = memory_bytes(device)["now"]
    model = load(task, device)
    reset_peak_memory(device)
    base = memory_bytes(device)["now"]
    clock = StepClock(device)
    with tempfile.TemporaryDirectory() as folder:
        if task["method"] in (*SHIPPED, "floor"):
            optimizer = None
            if task["method"] == "floor":
                loss = floor(task, model)
            else:
                steering = losses.rmu_direction(model.config.hidden_size, 0).to(device)
                loss = as_shipped(SHIPPED[task["method"]], model, steering)
                trained = model.parameters()
                if task["method"] == "rmu_as_shipped":
                    trained = [block.mlp.down_proj.weight for block in find_blocks(model)[5:8]]
                    if not trained:
                        trained = [find_blocks(model)[-1].mlp.down_proj.weight]
                optimizer = torch.optim.AdamW(trained, lr=1e-5)
            begin = time.perf_counter()
            for batch in the_trainers_batches(task, model):
                loss({name: value.to(device) for name, value in batch.items()}).backward()
                if optimizer is not None:
                    optimizer.step()
                    model.zero_grad()
                clock.on_step_end(None, None, None)
        else:
            trainer = make_trainer(task, model, folder, clock)
            begin = time.perf_counter()
            trainer.train()

            def loss(batch: dict) -> torch.Tensor:
                with trainer.compute_loss_context_manager():
                    return trainer.compute_loss(trainer.model, batch)

        peak = memory_bytes(device)["peak"]
        # On the first batch for all. A step of RFA with its cache gets its features here, outside the count.
        first = {name: value.to(device) for name, value in next(the_trainers_batches(task, model)).items()}
        first["is_retain"] = ~first["is_forget"]
        if task["method"] in RFA and RFA[task["method"]].get("reference_cache") != "off":
            trainer._cached = trainer._fill_cache()
        # The counter refuses fused attention with fewer key-value heads; its plain form needs the same operations.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
            loss(first).backward()
    ends = clock.ends
    seconds = [b - a for a, b in zip(ends[task["warmup"] - 1 :], ends[task["warmup"] :], strict=False)]
    return {
        **{name: value for name, value in task.items() if name not in ("model", "data_dir")},
        "seconds_per_step": seconds,
        "seconds_in_all": ends[-1] - begin,
        "positions_of_first_step": first["attention_mask"].numel(),
        "bytes_of_base": base - before,
        "bytes_over_base": peak - base,
        "flops_of_first_step": flops.get_total_flops(),
    }


def in_a_process(task: dict, settings: dict[str, str] | None = None) -> dict:
    """`measure` in a process of its own, with these environment variables beside ours."""
    command = [sys.executable, __file__, "--task", json.dumps(task)]
    env = {**os.environ, **(settings or {})}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


# ---- evaluation and import ----


def plain_losses(model: PreTrainedModel, tokenizer, rows: list[dict]) -> list[float]:
    """One forward an answer, every position projected on the vocabulary."""
    found = []
    for row in rows:
        encoded = encode(row, tokenizer)
        ids, start = torch.tensor([encoded["input_ids"]]), encoded["answer_start"]
        logits = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1]
        found.append(F.cross_entropy(logits.float(), ids[0, start:]).item())
    return found


def plain_answers(model: PreTrainedModel, tokenizer, rows: list[dict]) -> list[str]:
    """One `generate` an answer."""
    found = []
    for row in rows:
        encoded = encode(row, tokenizer)
        ids = torch.tensor([encoded["input_ids"][: encoded["answer_start"]]])
        done = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=200, pad_token_id=0
        )
        found.append(tokenizer.decode(done[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return found


@torch.no_grad()
def evaluation(model_path: str, data_dir: str, number: int, rounds: int) -> dict:
    """Rows/s of TOFU's scores of a question set of `number` rows (the answer, its paraphrase, the wrong ones, and a
    greedy answer), ours and plain; plain on every tenth row."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    sets = [load_rows(f"{data_dir}/{name}_perturbed.jsonl", "data_dir") for name in NAMES]
    questions = [row for one in sets for row in one][:number]

    def answers(rows: list[dict]) -> list[dict]:
        keys = ("answer", "paraphrased_answer")
        texts = [(row["question"], [*(row[key] for key in keys), *row["perturbed_answer"]]) for row in rows]
        return [{"question": question, "answer": text} for question, of_row in texts for text in of_row]

    def greedy(rows: list[dict]) -> list[dict]:
        return [{"question": row["question"], "answer": row["answer"]} for row in rows]

    some = questions[::10]
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(rounds):
        begin = time.perf_counter()
        ours = answer_losses(model, tokenizer, answers(questions)), greedy_answers(model, tokenizer, greedy(questions))
        between = time.perf_counter()
        plain = plain_losses(model, tokenizer, answers(some)), plain_answers(model, tokenizer, greedy(some))
        seconds["ours"].append(between - begin)
        seconds["plain"].append(time.perf_counter() - between)
    same = [ours[1][10 * i] == text for i, text in enumerate(plain[1])]
    each = len(ours[0]) // len(questions)
    differences = [
        abs(ours[0][10 * i * each + k] - plain[0][i * each + k]) for i in range(len(some)) for k in range(each)
    ]
    return {
        "rows": {"ours": len(questions), "plain": len(some)},
        "seconds": seconds,
        "rows_per_second": {
            name: len(rows) / statistics.median(seconds[name]) for name, rows in (("ours", questions), ("plain", some))
        },
        "same_greedy_answers": sum(same) / len(same),
        "largest_loss_difference_in_bf16": max(differences),
    }


def import_seconds(rounds: int) -> dict:
    """Seconds of a Python process that imports, in turns, and of `rfa-llm --help`."""
    commands = {
        "transformers and peft": [sys.executable, "-c", "from transformers import Trainer; import peft"],
        "rfa_llm": [sys.executable, "-c", "from rfa_llm import RFAConfig, RFATrainer"],
        "rfa-llm --help": [sys.executable, "-m", "rfa_llm.cli.main", "--help"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds + 1):
        for name, command in commands.items():
            begin = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - begin)
    # The first round fills the disk cache.
    return {name: values[1:] for name, values in seconds.items()}


def padding(model: str, data_dir: str) -> dict[str, float]:
    """Share of a batch's positions that is padding, over three epochs of all rows, in random order and grouped."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    sets = [prepare(load_rows(f"{data_dir}/{name}.jsonl", "data_dir"), tokenizer, name, None) for name in NAMES]
    collator, shares = PairCollator(tokenizer.pad_token_id, "answer", "all"), {}
    for order in ("random", "group_by_length"):
        pairs, real, all_positions = ForgetRetainPairs(*sets, seed=42), 0, 0
        if order == "group_by_length":
            pairs.group_by_length()
        for epoch in range(3):
            pairs.set_epoch(epoch)
            drawn = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(epoch)).tolist()
            rows = list(LengthGroupedPairs(pairs, PAIRS)) if pairs.by_length else drawn
            for start in range(0, len(rows), PAIRS):
                mask = collator([pairs[i] for i in rows[start : start + PAIRS]])["attention_mask"]
                real, all_positions = real + int(mask.sum()), all_positions + mask.numel()
        shares[order] = 1 - real / all_positions
    return shares


# ---- the whole ----


def exponent(x: list[float], y: list[float]) -> float:
    """Slope of the least-squares line through the logarithms: y grows as x to this power."""
    x, y = [math.log(value) for value in x], [math.log(value) for value in y]
    return statistics.linear_regression(x, y).slope


def median_seconds(part: dict) -> dict[str, float]:
    """Median seconds a step of each method, over all steps of all rounds."""
    seconds: dict[str, list[float]] = {}
    for run in part["runs"]:
        seconds.setdefault(run["method"], []).extend(run["seconds_per_step"])
    return {name: statistics.median(values) for name, values in seconds.items()}


def steps_table(part: dict, over: dict[str, int]) -> str:
    """The main table: medians over all steps of all rounds, and bytes over the base, as shares of others'."""
    seconds = median_seconds(part)
    by_method = {name: [run for run in part["runs"] if run["method"] == name] for name in seconds}
    in_all = {name: statistics.median(one["seconds_in_all"] for one in runs) for name, runs in by_method.items()}
    lines = [
        "| method | time / NPO as shipped | time / NPO on LoRA | time / floor | whole run / NPO on LoRA | "
        "memory over base / NPO as shipped | GFLOP of a step | rate / matrix rate |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in seconds:
        flops = by_method[name][0]["flops_of_first_step"]
        cells = [f"{seconds[name] / seconds[other]:.2f}" for other in NEEDED]
        cells += [f"{in_all[name] / in_all['npo']:.2f}", f"{over[name] / over['npo_as_shipped']:.2f}"]
        cells += [f"{flops / 1e9:.0f}", f"{flops / seconds[name] / part['peak_flops']:.0%}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def gpu_memory_table(part: dict) -> str:
    """Of each method, what its model takes and what comes on top at most, in GiB."""
    lines = ["| method | model, GiB | over it | together |", "| --- | ---: | ---: | ---: |"]
    for name, run in {run["method"]: run for run in part["runs"]}.items():
        base, over = run["bytes_of_base"] / 2**30, run["bytes_over_base"] / 2**30
        lines.append(f"| {name} | {base:.2f} | {over:.2f} | {base + over:.2f} |")
    return "\n".join(lines) + "\n"


def growth(result: dict, sweep: str, method: str) -> tuple[list[float], list[float]]:
    """What a sweep varies and the median seconds a step, or in all where it varies the forget set."""
    runs = [run for run in result["growth"] if run["sweep"] == sweep and run["method"] == method]
    x = [shape_parameters(run["shape"]) if sweep == "shape" else run[sweep] for run in runs]
    if sweep == "rows":
        return x, [run["seconds_in_all"] for run in runs]
    return x, [statistics.median(run["seconds_per_step"]) for run in runs]


def shape_parameters(shape: str) -> int:
    return count_parameters(shape_config(shape))["total"]


def growth_table(result: dict) -> str:
    """Fitted exponents, and each sweep's times as shares of its first point's."""
    lines = [
        "| what grows | method | exponent | values | time / the first one's |",
        "| --- | --- | ---: | --- | --- |",
    ]
    for sweep, (_, methods) in SWEEPS.items():
        for method in methods:
            x, y = growth(result, sweep, method)
            values = ", ".join(f"{value / 1e6:.0f}M" if sweep == "shape" else str(value) for value in x)
            ratios = ", ".join(f"{seconds / y[0]:.2f}" for seconds in y)
            lines.append(f"| {sweep} | {method} | {exponent(x, y):.2f} | {values} | {ratios} |")
    return "\n".join(lines) + "\n"


def report(result: dict) -> str:
    """speed.md, of what the JSON holds."""
    machine, parts = result["machine"], []
    on = machine["accelerator"] or f"{machine['cores']} cores ({machine['cpu']})"
    if "steps" in result and {run["method"] for run in result["steps"]["runs"]} <= result.get("memory", {}).keys():
        steps = result["steps"]
        first = steps["runs"][0]
        dtype = "NF4" if first.get("quantization") == "nf4" else "bfloat16"
        rows = f"rows of {first['tokens']} random tokens" if "tokens" in first else "rows of TOFU"
        parts.append(
            f"Written by `benchmarks/speed.py` on {on}, {dtype}, {result['model_name']}, {first['pairs']} forget and "
            f"as many retain {rows} a step. `rfa` aligns one block, "
            "the last of the lower half (not the default, which `rfa_default_blocks` is). Times are medians of "
            f"{len(first['seconds_per_step'])} steps from the second epoch on in {steps['rounds']} rounds, "
            "when `rfa` has its reference features in its cache; what fills it is in the whole run (at most three "
            "epochs of four steps). The operations are counted on one batch.\n"
        )
        parts.append(steps_table(steps, result["memory"]))
        if machine["accelerator"]:
            parts.append(gpu_memory_table(steps))
    if "growth" in result:
        parts.append("`rows` is the time of a whole epoch with the filling of the cache, the others that of a step.\n")
        parts.append(growth_table(result))
    if "padding" in result:
        random_order, grouped = result["padding"]["random"], result["padding"]["group_by_length"]
        parts.append(
            f"Padding: {random_order:.0%} of the positions in random order, {grouped:.0%} grouped by length.\n"
        )
    if "evaluation" in result:
        one = result["evaluation"]
        rate = one["rows_per_second"]
        parts.append(
            f"Evaluation of {one['rows']['ours']} questions (seven answers scored, one generated): "
            f"{rate['ours'] / rate['plain']:.1f}x the rows a second of one forward an answer and one `generate` a "
            f"question; {one['same_greedy_answers']:.0%} of the greedy answers are the same (bfloat16).\n"
        )
    if "imports" in result:
        medians = {name: statistics.median(values) for name, values in result["imports"].items()}
        parts.append(
            f"Import of `rfa_llm` with its trainer: {medians['rfa_llm'] / medians['transformers and peft']:.2f}x that "
            f"of transformers' Trainer and peft; `rfa-llm --help` answers in {medians['rfa-llm --help']:.1f} s.\n"
        )
    return "\n".join(part for part in parts if part)


def draw(result: dict, file: Path) -> None:
    """Time a step against NPO as shipped, and how a step grows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    bars, tokens, size = figure.subplots(1, 3)
    seconds = median_seconds(result["steps"])
    shown = sorted(seconds, key=seconds.__getitem__, reverse=True)
    bars.barh(shown, [seconds[name] / seconds["npo_as_shipped"] for name in shown], color="0.55", edgecolor="black")
    bars.set_xlabel("time a step / NPO as shipped")
    for axes, sweep, label in ((tokens, "tokens", "tokens a row"), (size, "pairs", "pairs of rows a step")):
        for method, style in zip(GROWING, ("o-", "s--", "^:"), strict=True):
            x, y = growth(result, sweep, method)
            axes.loglog(x, y, style, label=method)
        axes.set_xlabel(label)
        axes.set_ylabel("seconds a step")
        axes.legend()
    figure.savefig(file)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--model", help="path of a causal LM with a chat template")
    parser.add_argument("--data_dir", help="folder with TOFU's forget.jsonl, retain.jsonl and their _perturbed files")
    parser.add_argument("--output", type=Path, help="where the results go, without suffix")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help=f"{', '.join(NEEDED)} always")
    parser.add_argument("--rounds", type=int, default=2, help="of the main table; each has `steps` timed steps")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a process")
    parser.add_argument("--questions", type=int, default=200, help="of the evaluation; forget05 has 200")
    parser.add_argument("--shape", choices=SHAPES, help="of a randomly initialised model, in the place of --model")
    parser.add_argument("--quantization", choices=["none", "nf4"], default="none", help="of --shape's model")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="forget rows a step, and as many retain rows")
    parser.add_argument("--tokens", type=int, default=256, help="tokens a row, with --shape")
    args = parser.parse_args(argv)
    if args.task is not None:
        print(json.dumps(measure(json.loads(args.task))))
        return

    missing = [name for name in NEEDED if name not in args.methods]
    if missing:
        sys.exit(f"methods: the others are divided by {' and '.join(missing)}; name them too.")
    if args.shape is None and (args.model is None or args.data_dir is None):
        sys.exit("model, data_dir: give both, or --shape.")
    file = args.output.with_suffix(".json")
    here = {
        **environment(*(["bitsandbytes"] if args.quantization == "nf4" else [])),
        "model_name": args.shape or Path(args.model).name,
    }
    result = json.loads(file.read_text()) if file.exists() else here
    other = [name for name in here if result[name] != here[name]]
    if other:
        sys.exit(f"output: {file} is of another {' and '.join(other)}; name another file, or delete it.")
    if any("pairs" not in run for run in result.get("steps", {}).get("runs", [])):
        sys.exit(f"output: {file} was written by an earlier version of this program; name another file, or delete it.")
    task = {"warmup": WARMUP, "steps": WARMUP + args.steps, "pairs": args.pairs, "rows": ROWS // PAIRS * args.pairs}
    if args.shape:
        task |= {"shape": args.shape, "quantization": args.quantization, "tokens": args.tokens}
    else:
        task |= {"model": args.model, "data_dir": args.data_dir}

    def keep() -> None:
        file.write_text(json.dumps(result, indent=1) + "\n")
        args.output.with_suffix(".md").write_text(report(result))

    if "imports" in args.parts:
        result["imports"] = import_seconds(5)
        keep()
    if "padding" in args.parts:
        result["padding"] = padding(args.model, args.data_dir)
        keep()
    if "evaluation" in args.parts:
        result["evaluation"] = evaluation(args.model, args.data_dir, args.questions, 1)
        keep()
    if "steps" in args.parts:
        peak, source = peak_flops(the_device())
        on_gpu = the_device().type == "cuda"
        runs = []
        result["steps"] = {"rounds": args.rounds, "peak_flops": peak, "peak_flops_source": source, "runs": runs}
        for _ in range(args.rounds):
            for method in args.methods:
                one = {**task, "method": method}
                runs.append(measure(one) if on_gpu else in_a_process(one))
                print(method, runs[-1]["seconds_per_step"], flush=True)
                file.write_text(json.dumps(result, indent=1) + "\n")
        if on_gpu:
            result["memory"] = {one["method"]: one["bytes_over_base"] for one in runs}
        keep()
    if "memory" in args.parts:
        memory = result.setdefault("memory", {})
        for method in args.methods:
            one = {**task, "method": method, "steps": WARMUP + 1}
            memory[method] = in_a_process(one, FREEING)["bytes_over_base"]
            print(method, memory[method], flush=True)
        keep()
    if "growth" in args.parts:
        result["growth"] = []
        for sweep, (values, methods) in SWEEPS.items():
            for value in values:
                for method in methods:
                    # Two pairs of short rows, unless they are what grows.
                    one = {**task, "method": method, "pairs": 2, "tokens": 64, "warmup": 2, "steps": 5, sweep: value}
                    one["rows"] = value if sweep == "rows" else one["pairs"]
                    if sweep == "rows":
                        one["steps"] = math.ceil(value / one["pairs"])
                    result["growth"].append({**in_a_process(one), "sweep": sweep})
                    print(sweep, value, method, result["growth"][-1]["seconds_per_step"], flush=True)
        keep()
    if "steps" in result and "growth" in result:
        draw(result, args.output.with_suffix(".svg"))
    print(report(result))


if __name__ == "__main__":
    main(sys.argv[1:])
