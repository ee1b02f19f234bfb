"""How much memory a step takes: a sum from a model's shape, and what a few real steps on the CPU say to it.

    python benchmarks/memory.py              # the sum for 1B, 8B and 70B, in bf16 and NF4, on one GPU and on several
    python benchmarks/memory.py --measure    # and small models' steps on this machine's CPU, beside their own sums

Writes benchmarks/results/memory.json and memory.md. Parameters are counted on the meta device, so no weight is ever
made; the bytes that the backward pass keeps are those of transformers' Llama with peft's LoRA layers, and
tests/test_memory_sum.py counts them a second time by hooks on a real forward.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from rfa_llm.benchmark.environment import environment
from rfa_llm.blocks import find_blocks, lora_placement, resolve_blocks

RESULTS = Path(__file__).parent / "results"
GPU = Path(__file__).with_name("gpu.py")

# Shapes, not weights. Source: config.json of HuggingFaceTB/SmolLM2-135M and -360M and of meta-llama/Llama-3.2-1B,
# Llama-3.1-8B and Llama-3.1-70B on the Hub. `tiny` is ours, with weights wide enough that its blocks change the
# features.
SHAPES = {
    "tiny": {
        **{"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 5, "vocab_size": 512},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1},
    },
    "smollm2-135m": {
        **{"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152},
        **{"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    },
    "smollm2-360m": {
        **{"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "vocab_size": 49152},
        **{"num_attention_heads": 15, "num_key_value_heads": 5, "tie_word_embeddings": True},
    },
    "llama-3.2-1b": {
        **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True},
    },
    "llama-3.1-8b": {
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256},
        **{"num_attention_heads": 32, "num_key_value_heads": 8},
    },
    "llama-3.1-70b": {
        **{"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256},
        **{"num_attention_heads": 64, "num_key_value_heads": 8},
    },
}
WORKED = ("llama-3.2-1b", "llama-3.1-8b", "llama-3.1-70b")
# Shape, quantization, gradient checkpointing.
MEASURED = [
    ("tiny", "none", False),
    ("smollm2-135m", "none", False),
    ("smollm2-135m", "none", True),
    ("smollm2-135m", "nf4", False),
]
RANK = 32
GIB = 2**30
# NF4 with double quantization (Dettmers et al., QLoRA, arXiv 2305.14314): 4 bits a weight, one byte for each 64
# weights, and one float32 for each 256 of those bytes.
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)


def shape_config(shape: str) -> LlamaConfig:
    return LlamaConfig(**SHAPES[shape], pad_token_id=0, eos_token_id=1)


def count_parameters(config: LlamaConfig, rank: int = RANK) -> dict[str, int]:
    """Parameters of a model with RFA's default adapter, counted on the meta device.

    Returns:
        `linear`: weights of the blocks' linear layers; `block`: all of one block; `root`: all that is in no block
        (embedding, last norm, head; tied ones once); `total` of the base; `adapter`: LoRA on every linear layer.
    """
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        total = model.num_parameters()
        blocks = find_blocks(model)
        linear = sum(m.weight.numel() for m in blocks.modules() if isinstance(m, torch.nn.Linear))
        block = sum(p.numel() for p in blocks[0].parameters())
        adapted = get_peft_model(model, LoraConfig(r=rank, **lora_placement(model, len(blocks) - 1)))
        adapter, _ = adapted.get_nb_trainable_parameters()
    return {
        "linear": linear,
        "block": block,
        "root": total - block * len(blocks),
        "total": total,
        "adapter": adapter,
    }


def kept_bytes(config: LlamaConfig, rank: int, adapter_bytes: int) -> int:
    """Bytes that one block keeps for the backward pass, per token, with a bf16 or NF4 base and no checkpointing.

    `h` hidden, `i` intermediate, `a` heads · head_dim, `k` key-value heads · head_dim:

    - two RMSNorms, computed in float32: their input and its inverse norm, `2 (4h + 4)`;
    - attention: query, key, value and output in bf16, `2 (2a + 2k)`, and the log-sum-exp, `4 heads`;
    - the MLP: gate, its SiLU, and up in bf16, `2 · 3i`;
    - LoRA: each of the seven layers keeps its own copy of its input, `5h + a + i` numbers, and what A makes of it,
      `7r` numbers, of `adapter_bytes` each. The frozen weights need no input kept.

    Args:
        config: The model's config.
        rank: Of LoRA.
        adapter_bytes: 2 where LoRA computes in bf16, as `rfa_llm.adapters.computing_in_model_dtype` lets it; 4 where
            it computes in the float32 of its weights.
    """
    h, i, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    a, k = heads * config.head_dim, config.num_key_value_heads * config.head_dim
    norms, attention, mlp = 2 * (4 * h + 4), 2 * (2 * a + 2 * k) + 4 * heads, 2 * 3 * i
    return norms + attention + mlp + adapter_bytes * (5 * h + a + i + 7 * rank)


def memory_sum(
    config: LlamaConfig,
    count: dict[str, int],
    quantization: str,
    rows: int,
    tokens: int,
    checkpointing: bool,
    rank: int = RANK,
) -> dict[str, float]:
    """Bytes that a step of RFA with the `local` shift takes on one device, by what they are for.

    - `base`: 2 bytes a parameter; with NF4, `NF4_BITS` for the blocks' linear layers.
    - `adapter`: LoRA in float32, its gradient, and the copy from the last good step, 12 bytes a parameter; 2 more for
      the bf16 copy that it computes with.
    - `optimizer`: AdamW's two moments in float32, 8 bytes an adapter parameter.
    - `activations`: `kept_bytes` of all blocks; with checkpointing each block's input (`2h`) and one block's whole.
    - `features`: at each aligned block `h`, and at the tokens that count `h`, `h⁰` and the residual in bf16 and the
      float32 copy that the loss squares, `12h` a token; and for forget tokens the local features and the shift, `4h`.
    - `workspace`: what comes and goes: three of the MLP's inner tensors, `6i` a token; with NF4 the largest weight in
      bf16. No logits: a step ends with the last aligned block.

    Args:
        config: The model's config.
        count: Its parameters, from `count_parameters`.
        quantization: `none` (a bf16 base) or `nf4`.
        rows: Forget rows in the step; as many retain rows come beside them.
        tokens: Of a row; all count.
        checkpointing: `gradient_checkpointing`.
        rank: Of LoRA.
    """
    h, i, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    linear_bytes = 2 if quantization == "none" else NF4_BITS / 8
    kept = kept_bytes(config, rank, adapter_bytes=2)
    all_tokens = 2 * rows * tokens
    aligned = len(resolve_blocks(None, layers))
    return {
        "base": linear_bytes * count["linear"] + 2 * (count["total"] - count["linear"]),
        "adapter": 14 * count["adapter"],
        "optimizer": 8 * count["adapter"],
        "activations": all_tokens * (layers * 2 * h + kept if checkpointing else layers * kept),
        "features": aligned * h * (12 * all_tokens + 4 * rows * tokens),
        "workspace": 6 * i * all_tokens + (2 * h * i if quantization == "nf4" else 0),
    }


def per_gpu(count: dict[str, int], parts: dict[str, float], mode: str, gpus: int) -> float:
    """Bytes on each of several GPUs, each with `rows` of its own.

    - `ddp`: everything, and the buckets that gradients are averaged in (4 bytes an adapter parameter).
    - `zero2`: as `ddp`, with the adapter's gradients (4 bytes a parameter) and optimizer state in shards.
    - `fsdp2` and `zero3`: weights, adapter and optimizer state in shards; gathered whole are what is in no block
      (embedding, head), and two blocks, the one at work and the next.

    Args:
        count: From `count_parameters`.
        parts: From `memory_sum`.
        mode: `ddp`, `zero2`, `fsdp2` or `zero3`.
        gpus: Number of GPUs.
    """
    whole = sum(parts.values())
    if mode == "ddp":
        return whole + 4 * count["adapter"]
    if mode == "zero2":
        return whole - (parts["optimizer"] + 4 * count["adapter"]) * (1 - 1 / gpus)
    sharded = parts["base"] + parts["adapter"] + parts["optimizer"]
    gathered = 2 * (count["root"] + 2 * count["block"])
    return whole - sharded * (1 - 1 / gpus) + gathered


def sums(rows: int, tokens: int) -> list[dict]:
    """The sums of `WORKED` shapes for each base and with and without checkpointing, on one GPU and on several."""
    result = []
    for shape in WORKED:
        config = shape_config(shape)
        count = count_parameters(config)
        for quantization, checkpointing in product(("none", "nf4"), (False, True)):
            parts = memory_sum(config, count, quantization, rows, tokens, checkpointing)
            # 4-bit weights in shards are another matter (docs/multi-gpu.md).
            modes = ("ddp", "zero2", "fsdp2") if quantization == "none" else ("ddp", "zero2")
            result.append(
                {
                    "shape": shape,
                    "quantization": quantization,
                    "gradient_checkpointing": checkpointing,
                    "parts": parts,
                    "total": sum(parts.values()),
                    "per_gpu": {mode: {n: per_gpu(count, parts, mode, n) for n in (2, 4, 8)} for mode in modes},
                }
            )
    return result


def measure(shape: str, quantization: str, checkpointing: bool) -> dict:
    """A few steps of `gpu.py` on the CPU, in a process of their own: its memory, and the sum for the same step."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run.json"
        words = ["--shapes", shape, "--quantization", quantization, "--rows", "2", "--tokens", "64", "--steps", "2"]
        words += ["--no-check", "--output", str(output)] + ["--gradient_checkpointing"] * checkpointing
        # No GPU; and freed tensors go back to the system at once, or the resident set would still hold them.
        settings = {"CUDA_VISIBLE_DEVICES": "", "MALLOC_MMAP_THRESHOLD_": "65536"}
        subprocess.run([sys.executable, GPU, *words], check=True, env={**os.environ, **settings})
        run = json.loads(output.read_text())["runs"][0]
    names = ("shape", "quantization", "memory", "predicted_memory")
    return {**{name: run[name] for name in names}, "gradient_checkpointing": checkpointing}


def table(header: list[str], rows: list[list]) -> str:
    """A Markdown table; numbers are bytes, written in GiB."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    lines += [[f"{cell / GIB:.2f}" if isinstance(cell, (int, float)) else cell for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def label(entry: dict) -> str:
    base = {"none": "bf16", "nf4": "NF4"}[entry["quantization"]]
    return f"{entry['shape']}, {base}{', checkpointing' if entry['gradient_checkpointing'] else ''}"


def report(result: dict) -> str:
    """The result as Markdown."""
    rows, tokens = result["rows"], result["tokens"]
    parts = list(result["sums"][0]["parts"])
    modes = [("ddp", 2), ("zero2", 8), ("fsdp2", 2), ("fsdp2", 4), ("fsdp2", 8)]
    one = [[label(e), *(e["parts"][part] for part in parts), e["total"]] for e in result["sums"]]
    several = [
        [label(e), e["total"], *(e["per_gpu"][mode][str(n)] if mode in e["per_gpu"] else "-" for mode, n in modes)]
        for e in result["sums"]
    ]
    text = [
        f"Memory of one step in GiB: RFA with the `local` shift, LoRA of rank {RANK} on every linear layer of the "
        f"blocks, {rows} forget and {rows} retain rows of {tokens} tokens on each GPU, in bf16 (written "
        "by `benchmarks/memory.py`, which holds the formulas). A sum, not a measurement; the CUDA context (0.5 GiB or "
        "so) and what the allocator cannot use come on top.",
        table(["one GPU", *parts, "total"], one),
        "The total on each of several GPUs:",
        table(["on each GPU", "alone", "DDP", "ZeRO-2 x8", *(f"FSDP2, ZeRO-3 x{n}" for n in (2, 4, 8))], several),
    ]
    if result["measured"]:
        text += [
            "Measured on a CPU: by how much the process's resident set at its peak, over four steps with 2 forget and "
            "2 retain rows of 64 tokens, is larger than with the base model alone. Beside it the sum for the same "
            "step without its base; what is left is the process itself (code, tokenizer, data), as in the tiny "
            "model's row:",
            table(
                ["CPU", "measured", "sum"],
                [[label(e), e["memory"]["step"], e["predicted_memory"]["step"]] for e in result["measured"]],
            ),
            f"torch {result['versions']['torch']}, {result['machine']['cpu']}, {result['machine']['threads']} "
            "thread(s), seed 42.",
        ]
    return "\n\n".join(text) + "\n"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=6, help="forget rows a step; as many retain rows come beside them")
    parser.add_argument("--tokens", type=int, default=256, help="tokens a row")
    parser.add_argument("--measure", action="store_true", help="let small models take a few steps on the CPU, too")
    parser.add_argument("--output", type=Path, default=RESULTS / "memory.json", help="and .md beside it")
    args = parser.parse_args(argv)

    result = {
        "rows": args.rows,
        "tokens": args.tokens,
        "lora_rank": RANK,
        **environment(),
        "sums": sums(args.rows, args.tokens),
        "measured": [measure(*run) for run in MEASURED] if args.measure else [],
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    text = report(json.loads(args.output.read_text()))
    args.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
