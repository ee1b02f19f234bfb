r"""NF4 + LoRA with SmolLM2-135M on TOFU's 800-row subset: is the base untouched, and does the forgetting come along?

    python benchmarks/qlora.py --models runs/models --data_dir ../shared/tofu800 \
        --bf16_adapter runs/tofu800/local_seed0

Runs `rfa-llm unlearn --load_in_4bit` (configs/tofu800.yaml, the `local` shift, seed 0) on the target, hashes the
quantized base before and after, and merges. Then it scores the forget set's answers, without generating any, for the
target, the adapter on the NF4 base, the same adapter on the bf16 base, the merged model and, where one is given, an
adapter that was trained on the bf16 base. A step whose result is there is not repeated. Results go to
benchmarks/results/qlora.json and qlora.md; those of `--max_steps 120 --results benchmarks/results/qlora_120_steps`,
without another adapter, beside them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import yaml
from peft import PeftModel
from shifts import RECIPE
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import TrlParser, get_quantization_config

from rfa_llm.benchmark.environment import environment
from rfa_llm.checkpoints import base_model_digest
from rfa_llm.cli.merge import MergeArguments, merge
from rfa_llm.cli.unlearn import UnlearnArguments, UnlearnModelConfig, unlearn
from rfa_llm.config import RFAConfig
from rfa_llm.data.tofu import load_tofu
from rfa_llm.evaluation import forget_truth_ratios
from rfa_llm.evaluation.suite import probabilities

RESULTS = Path(__file__).parent / "results" / "qlora"


def load(model: Path, nf4: bool, adapter: Path | None = None) -> PreTrainedModel:
    quantization = {}
    if nf4:
        quantization["quantization_config"] = get_quantization_config(UnlearnModelConfig(load_in_4bit=True))
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, **quantization)
    return base if adapter is None else PeftModel.from_pretrained(base, adapter)


def train(args: argparse.Namespace) -> dict:
    """Train the adapter on the NF4 base; the base's hash before and after, and the logged history."""
    file = args.runs / "training.json"
    if not file.exists():
        sets = {f"{kind}_dataset": args.data_dir / f"{kind}.jsonl" for kind in ("forget", "retain")}
        words = {"model_name_or_path": args.models / "target", "output_dir": args.runs / "adapter", **sets, "seed": 0}
        if args.max_steps is not None:
            words["max_steps"] = args.max_steps
        parser = TrlParser((UnlearnArguments, RFAConfig, UnlearnModelConfig))
        parsed = parser.parse_args_and_config(
            ["--config", str(RECIPE), "--load_in_4bit", "--overwrite_output_dir"]
            + [word for key, value in words.items() for word in (f"--{key}", str(value))]
        )
        before = base_model_digest(load(args.models / "target", nf4=True))
        trainer = unlearn(*parsed)
        settings = {**yaml.safe_load(RECIPE.read_text()), "seed": 0, "max_steps": trainer.state.max_steps}
        training = {
            "settings": {**settings, "quantization": trainer.model.config.quantization_config.to_dict()},
            "base_sha256_before": before.removeprefix("sha256:"),
            "base_sha256_after": base_model_digest(trainer.model).removeprefix("sha256:"),
            "history": trainer.state.log_history,
        }
        file.write_text(json.dumps(training, indent=1))
    return json.loads(file.read_text())


def merged(args: argparse.Namespace) -> dict:
    """Merge the adapter into the dequantized base; the divergence that `rfa-llm merge` reports."""
    file = args.runs / "merge.json"
    if not file.exists():
        figures = merge(
            MergeArguments(
                model_name_or_path=str(args.models / "target"),
                adapter_name_or_path=str(args.runs / "adapter"),
                output_dir=str(args.runs / "merged"),
                sample_dataset=str(args.data_dir / "retain.jsonl"),
                load_in_4bit=True,
            )
        )
        file.write_text(json.dumps(figures))
    return json.loads(file.read_text())


def score(name: str, args: argparse.Namespace, model: Path, nf4: bool = False, adapter: Path | None = None) -> dict:
    """Forget probability and truth ratios on the forget set (metrics of `rfa_llm.evaluation`)."""
    file = args.runs / f"{name}.json"
    if not file.exists():
        rows = list(load_tofu("forget_perturbed", str(args.data_dir)))
        _, log = probabilities(load(model, nf4, adapter), AutoTokenizer.from_pretrained(model), rows, "forget")
        scores = {
            "forget_prob": log["forget_Q_A_Prob"]["agg_value"],
            "forget_truth_ratio": log["forget_truth_ratio"]["agg_value"],
            "truth_ratios": forget_truth_ratios(log).tolist(),
        }
        file.write_text(json.dumps(scores))
    return json.loads(file.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder that scripts/smollm2_tofu.py filled")
    parser.add_argument("--data_dir", type=Path, required=True, help="TOFU's 800-row subset")
    parser.add_argument("--bf16_adapter", type=Path, help="adapter of the same recipe on the bf16 base, to compare")
    parser.add_argument("--runs", type=Path, default=Path("runs/qlora"), help="where adapter, model and scores go")
    parser.add_argument("--results", type=Path, default=RESULTS, help="name of the result files, without suffix")
    parser.add_argument("--max_steps", type=int, help="by default the recipe's")
    args = parser.parse_args()

    args.runs.mkdir(parents=True, exist_ok=True)
    training, divergence = train(args), merged(args)
    target, adapter = args.models / "target", args.runs / "adapter"
    scores = {
        "target, bf16": score("target_bf16", args, target),
        "target, NF4": score("target_nf4", args, target, nf4=True),
        "NF4-trained adapter on NF4": score("adapter_on_nf4", args, target, nf4=True, adapter=adapter),
        "NF4-trained adapter on bf16": score("adapter_on_bf16", args, target, adapter=adapter),
        "NF4-trained adapter, merged": score("merged_bf16", args, args.runs / "merged"),
    }
    if args.bf16_adapter is not None:
        scores["bf16-trained adapter on bf16"] = score("bf16_adapter", args, target, adapter=args.bf16_adapter)

    p = {name: row["forget_prob"] for name, row in scores.items()}
    forgotten_on_bf16 = p["target, bf16"] - p["NF4-trained adapter on bf16"]
    on_nf4, on_merged = (
        np.array(scores[f"NF4-trained adapter{where}"]["truth_ratios"]) for where in (" on NF4", ", merged")
    )
    aggregates = [scores[f"NF4-trained adapter{w}"]["forget_truth_ratio"] for w in (" on NF4", ", merged")]
    figures = {
        "base_bytes_unchanged": training["base_sha256_before"] == training["base_sha256_after"],
        "forgetting_kept_on_bf16": forgotten_on_bf16 / (p["target, bf16"] - p["NF4-trained adapter on NF4"]),
        # NF4 alone costs some of the forget probability, which the figure above counts as forgotten.
        "forgetting_kept_own_bases": forgotten_on_bf16 / (p["target, NF4"] - p["NF4-trained adapter on NF4"]),
        "merged_truth_ratio_off": abs(aggregates[1] / aggregates[0] - 1),
        "merged_truth_ratio_off_by_question_mean": float(np.abs(on_merged / on_nf4 - 1).mean()),
        "merged_truth_ratio_off_by_question_largest": float(np.abs(on_merged / on_nf4 - 1).max()),
        "merge_kl_mean": divergence["kl_mean"],
        "merge_kl_largest": divergence["kl_largest"],
    }
    result = {
        "figures": figures,
        "scores": scores,
        **training,
        "bf16_adapter": None if args.bf16_adapter is None else args.bf16_adapter.name,
        **environment("bitsandbytes"),
    }
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    args.results.with_suffix(".md").write_text(report(result))
    print(report(result))


def report(result: dict) -> str:
    """The result as Markdown."""
    figures, settings, where = result["figures"], result["settings"], result["machine"]
    lines = [
        "SmolLM2-135M-Instruct fine-tuned on TOFU's 800-row subset, made to forget its 100 forget rows on an NF4 base "
        f"(`configs/tofu800.yaml` with `--load_in_4bit`, the `{settings['shift']}` shift, "
        f"{settings['max_steps']} steps, seed {settings['seed']}; written by `benchmarks/qlora.py`). Scores on the "
        f"forget set by TOFU's definitions. Machine: {where['cpu']}, {where['threads']} threads.",
        "",
        "| model | forget probability | forget truth ratio |",
        "| --- | ---: | ---: |",
        *(
            f"| {name} | {row['forget_prob']:.3f} | {row['forget_truth_ratio']:.3f} |"
            for name, row in result["scores"].items()
        ),
        "",
        f"- The NF4 base's bytes are {'the same' if figures['base_bytes_unchanged'] else 'NOT the same'} after the "
        f"training (SHA-256 {result['base_sha256_before'][:16]}… before, {result['base_sha256_after'][:16]}… after).",
        f"- Forgetting that the NF4-trained adapter keeps on the bf16 base, by forget probability: "
        f"{figures['forgetting_kept_on_bf16']:.1%} with both against the bf16 target, "
        f"{figures['forgetting_kept_own_bases']:.1%} with each against the target on its own base.",
        f"- Truth ratio of the merged model against the adapter's on NF4: {figures['merged_truth_ratio_off']:.2%} "
        f"off; question by question {figures['merged_truth_ratio_off_by_question_mean']:.2%} on average, "
        f"{figures['merged_truth_ratio_off_by_question_largest']:.2%} at most.",
        f"- KL(adapter ‖ merged) of the next token on retain rows: {figures['merge_kl_mean']:.4f} nats on average, "
        f"{figures['merge_kl_largest']:.3f} at most.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
