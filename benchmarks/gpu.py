"""Speed and memory of RFA steps on one GPU, and whether bf16 LoRA and NF4 QLoRA compute what float32 does.

    python benchmarks/gpu.py --output benchmarks/results/gpu.json                    # 1B and 8B, bf16 and NF4
    python benchmarks/gpu.py --shapes tiny --output benchmarks/results/gpu_script_on_cpu.json    # any machine

Builds randomly initialised Llamas of known shapes (no download), lets `RFATrainer` train an adapter on made-up rows of
equal length, and writes tokens/s, peak memory beside the sum of `memory.py`, the model FLOPs utilisation (of the data
sheet's rate), and the rate that the GPU's own matrix products come to. Then one step of a tiny model is compared with
float32 on the CPU. Without a GPU it runs on the CPU, as a check of the script.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import torch
from datasets import Dataset
from memory import RANK, SHAPES, count_parameters, memory_sum, shape_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)

from rfa_llm import RFAConfig, RFATrainer
from rfa_llm.benchmark.environment import environment
from rfa_llm.blocks import find_blocks

# Dense bf16 matrix products in FLOP/s, from NVIDIA's data sheets (half of the figure "with sparsity").
PEAK_FLOPS = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA L4": 121e12,
}
WARMUP = 2
# Rounding to bf16 moves a number by up to 2^-9 = 0.2%. The losses are means over many numbers, where that mostly
# cancels out; the gradient is compared number by number, behind five blocks of it there and back. Measured on a CPU:
# 0.2% and 1.4%, with room for a GPU's other order of summing. One weight matrix a tenth too large moves the gradient
# by more (tests/test_gpu_script.py).
BOUNDS = {"loss_forget": 0.01, "loss_retain": 0.01, "gradient": 0.03}


def build_model(config: LlamaConfig, quantization: str, device: torch.device) -> LlamaForCausalLM:
    """A randomly initialised model on the device, in bf16 or with its blocks' linear layers in NF4.

    NF4 goes through `from_pretrained`, so that the model is what a user gets from a checkpoint; the bf16 weights lie
    on the device meanwhile (16 GB for 8B) and are freed on return.
    """
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    if quantization == "nf4":
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        model = LlamaForCausalLM.from_pretrained(
            None,
            config=config,
            state_dict=model.state_dict(),
            quantization_config=nf4,
            device_map={"": device},
            dtype=torch.bfloat16,
            attn_implementation="sdpa",
        )
    return model


@cache
def build_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """One token a word: `w2`, `w3`, ... up to the vocabulary's size."""
    words = {"<pad>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, vocab_size)}}
    backend = Tokenizer(models.WordLevel(words))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")


def build_rows(number: int, tokens: int, vocab_size: int, seed: int) -> Dataset:
    """Rows of random words, `tokens` tokens each: half of them the prompt, the rest the completion and its eos."""
    ids = torch.randint(2, vocab_size, (number, tokens - 1), generator=torch.Generator().manual_seed(seed))
    words = [[f"w{i}" for i in row] for row in ids.tolist()]
    half = tokens // 2
    return Dataset.from_list([{"prompt": " ".join(w[:half]), "completion": " " + " ".join(w[half:])} for w in words])


def build_trainer(
    model: LlamaForCausalLM, folder: str, rows: int, tokens: int, steps: int, callback: TrainerCallback, **settings
) -> RFATrainer:
    """A trainer of `steps` steps over `rows` forget and as many retain rows each, all of them different."""
    vocab_size = model.config.vocab_size
    trainer = RFATrainer(
        model=model,
        args=RFAConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=rows,
            warmup_steps=0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            # Every row is seen once; `step_flops` counts all passes of a step.
            reference_cache="off",
            **settings,
        ),
        forget_dataset=build_rows(rows * steps, tokens, vocab_size, seed=1),
        retain_dataset=build_rows(rows * steps, tokens, vocab_size, seed=2),
        processing_class=build_tokenizer(vocab_size),
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def step_flops(config: LlamaConfig, count: dict[str, int], rows: int, tokens: int) -> dict[str, int]:
    """Floating-point operations that one step needs, by pass; a multiply-add is two.

    With `P` weights in the blocks' linear layers, `A` in the adapter, `L` blocks, `a` = heads · head_dim, and `T`
    tokens a row, a token's forward costs `F = 2P + 4·L·a·T`: attention is counted over all `T` positions, masked or
    not, as PyTorch's `FlopCounterMode` and the PaLM paper (arXiv 2204.02311, appendix B) count it. Per token:

    - reference (adapter off): `F` on every row;
    - local (adapter off, attention narrowed): `F` on forget rows;
    - forward: `F + 2A` on every row;
    - backward: `2P + 8·L·a·T + 4A` on every row, for the frozen weights give no weight gradient.

    No position is projected on the vocabulary. What gradient checkpointing computes a second time is not counted. A
    little too much is counted for the backward pass of the first block, whose input needs no gradient:
    `2·h·(a + 2k + 3r)` a token, `k` = key-value heads · head_dim.

    Args:
        config: The model's config.
        count: Its parameters, from `memory.count_parameters`.
        rows: Forget rows in the step; as many retain rows come beside them.
        tokens: Of a row.
    """
    p, adapter = count["linear"], count["adapter"]
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * tokens
    forget, both = rows * tokens, 2 * rows * tokens
    return {
        "reference": both * (2 * p + attention),
        "local": forget * (2 * p + attention),
        "forward": both * (2 * p + attention + 2 * adapter),
        "backward": both * (2 * p + 2 * attention + 4 * adapter),
    }


def peak_flops(device: torch.device) -> tuple[float, str]:
    """The device's peak rate of bf16 matrix products in FLOP/s, and where it comes from.

    On a CPU it is float32's where that is higher: without bf16 instructions some bf16 products go by way of float32.
    """
    if device.type == "cpu":
        times = []
        for dtype in (torch.bfloat16, torch.float32):
            matrix = torch.randn(1024, 1024).to(dtype)
            for _ in range(5):
                start = time.perf_counter()
                matrix @ matrix
                times.append(time.perf_counter() - start)
        source = "measured: the best of 5 bf16 and 5 float32 products of 1024 x 1024 matrices on this CPU"
        return 2 * 1024**3 / min(times), source
    name = torch.cuda.get_device_name(device)
    if name not in PEAK_FLOPS:
        raise ValueError(f"peak_tflops: no peak rate is known for {name!r}; give --peak_tflops from its data sheet.")
    return PEAK_FLOPS[name], "data sheet"


def matrix_rate(device: torch.device) -> float:
    """The rate in FLOP/s of bf16 products of 8192 x 8192 matrices on this GPU: the median of 10 after 3 others."""
    n = 8192
    left, right = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(13):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        left @ right
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(times[3:])


def reset_peak_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # proc_pid_clear_refs(5): lets the peak resident set start anew.
        Path("/proc/self/clear_refs").write_text("5")


def memory_bytes(device: torch.device) -> dict[str, int]:
    """Memory in use `now` and at the `peak` since the last reset, of PyTorch's allocator.

    On a CPU it is the process's resident set, which holds freed memory too: it means something for the first run of a
    process only, and little for small models.
    """
    if device.type == "cuda":
        return {"now": torch.cuda.memory_allocated(device), "peak": torch.cuda.max_memory_allocated(device)}
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {key: int(status[name].split()[0]) * 1024 for key, name in (("now", "VmRSS"), ("peak", "VmHWM"))}


def compile_blocks(model: torch.nn.Module) -> None:
    """Let `torch.compile` fuse what each block computes; hooks stay outside, where RFA reads the features."""
    for block in find_blocks(model):
        block.forward = torch.compile(block.forward)


class StepClock(TrainerCallback):
    """Notes when each step has ended on the device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.ends.append(time.perf_counter())


def measure(shape: str, quantization: str, device: torch.device, peak: float, args: argparse.Namespace) -> dict:
    """Train for a few steps; the first `WARMUP` are not timed.

    `model_flops_utilization` is `step_flops / (median seconds per step · peak FLOP/s)`.
    """
    config = shape_config(shape)
    reset_peak_memory(device)
    before = memory_bytes(device)["now"]
    model = build_model(config, quantization, device)
    reset_peak_memory(device)
    base = memory_bytes(device)["now"]
    clock = StepClock(device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(
            *(model, folder, args.rows, args.tokens, WARMUP + args.steps, clock),
            activation_checkpointing=args.gradient_checkpointing,
            bf16=args.mixed_precision == "bf16",
            use_liger_kernel=args.use_liger_kernel,
            use_cpu=device.type == "cpu",
        )
        if args.compile:
            compile_blocks(trainer.model)
        trainer.train()
    highest = memory_bytes(device)["peak"]
    seconds = [end - start for start, end in zip(clock.ends[WARMUP - 1 :], clock.ends[WARMUP:], strict=False)]
    median = statistics.median(seconds)
    tokens = 2 * args.rows * args.tokens
    count = count_parameters(config)
    flops = step_flops(config, count, args.rows, args.tokens)
    predicted = memory_sum(config, count, quantization, args.rows, args.tokens, args.gradient_checkpointing)
    logged = [entry for entry in trainer.state.log_history if "loss_forget" in entry]
    return {
        "shape": shape,
        "quantization": quantization,
        "parameters": count,
        "tokens_per_step": tokens,
        "seconds_per_step": seconds,
        "tokens_per_second": tokens / median,
        "flops_per_step": flops,
        "model_flops_utilization": sum(flops.values()) / (median * peak),
        "memory": {"base": base - before, "peak": highest - before, "step": highest - base},
        "predicted_memory": {**predicted, "step": sum(predicted.values()) - predicted["base"]},
        "loss_forget": [entry["loss_forget"] for entry in logged],
        "loss_retain": [entry["loss_retain"] for entry in logged],
    }


class KeepGradients(TrainerCallback):
    """Keeps the adapter's gradient as the optimizer is about to see it, float32 on the CPU."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.gradients = {name: p.grad.float().cpu() for name, p in named}


def one_step(model: LlamaForCausalLM, **settings) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Both losses and the adapter's gradient of one step, with an adapter that is the same for the same shape."""
    keeper = KeepGradients()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(model, folder, 4, 32, 1, keeper, max_grad_norm=0, **settings)
        generator = torch.Generator().manual_seed(3)
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                # Large enough for residuals of about two thirds of the features.
                parameter.data.copy_(0.04 * torch.randn(parameter.shape, generator=generator))
        trainer.train()
    logged = trainer.state.log_history[0]
    return {name: logged[name] for name in ("loss_forget", "loss_retain")}, keeper.gradients


def check(quantization: str, device: torch.device, mixed_precision: str) -> dict:
    """One step of the tiny shape on the device against float32 on the CPU, on the very same weights.

    The reference has the bf16 weights, or what the NF4 weights stand for, in float32.

    Returns:
        Both losses and their relative errors, and `gradient`, the relative error `‖g - g'‖ / ‖g'‖` of the adapter's.
    """
    model = build_model(shape_config("tiny"), quantization, device)
    reference = LlamaForCausalLM(shape_config("tiny"))
    reference.load_state_dict((model.dequantize() if quantization == "nf4" else model).state_dict())
    exact_losses, exact = one_step(reference, use_cpu=True)
    model = build_model(shape_config("tiny"), quantization, device)
    losses, gradients = one_step(model, use_cpu=device.type == "cpu", bf16=mixed_precision == "bf16")
    difference = sum((gradients[name] - exact[name]).square().sum() for name in exact).sqrt()
    size = sum(gradient.square().sum() for gradient in exact.values()).sqrt()
    errors = {name: abs(losses[name] - exact_losses[name]) / exact_losses[name] for name in losses}
    return {
        "quantization": quantization,
        "losses": losses,
        "float32_losses": exact_losses,
        "relative_errors": {**errors, "gradient": (difference / size).item()},
        "bounds": BOUNDS,
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["llama-3.2-1b", "llama-3.1-8b"])
    parser.add_argument("--quantization", nargs="+", choices=["none", "nf4"], default=["none", "nf4"])
    parser.add_argument("--rows", type=int, default=6, help="forget rows a step; as many retain rows come beside them")
    parser.add_argument("--tokens", type=int, default=256, help="tokens a row")
    parser.add_argument("--steps", type=int, default=10, help=f"steps that are timed, after {WARMUP} that are not")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true", help="torch.compile each block")
    parser.add_argument("--use_liger_kernel", action="store_true", help="fused norms and activations (liger-kernel)")
    parser.add_argument("--mixed_precision", choices=["bf16", "no"], default="bf16", help="what LoRA computes in")
    parser.add_argument("--peak_tflops", type=float, help="the device's peak rate in bf16, where it is not known")
    parser.add_argument("--no-check", action="store_true", help="leave the comparison with float32 out")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    args = parser.parse_args(argv)

    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    peak, source = (args.peak_tflops * 1e12, "--peak_tflops") if args.peak_tflops else peak_flops(device)
    result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "note": "speed and memory of this device" if device.type == "cuda" else "a check of the script, no GPU figure",
        **environment("bitsandbytes"),
        "settings": {**vars(args), "output": args.output.name, "lora_rank": RANK, "seed": 42},
        "peak_flops": peak,
        "peak_flops_source": source,
        "measured_matrix_flops": matrix_rate(device) if device.type == "cuda" else peak,
        "runs": [],
        "checks": [],
    }
    # Written anew after each part, so that one which does not fit the device leaves the others'.
    for shape in args.shapes:
        for quantization in args.quantization:
            result["runs"].append(measure(shape, quantization, device, peak, args))
            args.output.write_text(json.dumps(result, indent=1) + "\n")
            run = result["runs"][-1]
            print(
                f"{shape}, quantization {quantization}: {run['tokens_per_second']:.0f} tokens/s, "
                f"utilization {run['model_flops_utilization']:.1%}, peak {run['memory']['peak'] / 2**30:.2f} GiB"
            )
    for quantization in [] if args.no_check else args.quantization:
        result["checks"].append(check(quantization, device, args.mixed_precision))
        args.output.write_text(json.dumps(result, indent=1) + "\n")
        errors = result["checks"][-1]["relative_errors"]
        print(f"against float32, quantization {quantization}: {errors}")
        for name, error in errors.items():
            if not error <= BOUNDS[name]:
                sys.exit(f"{name} is off by {error:.3g}, more than {BOUNDS[name]}.")


if __name__ == "__main__":
    main(sys.argv[1:])
