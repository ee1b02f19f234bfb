"""`rfa-llm merge`: an adapter and its base become one full-precision model, checked before it is kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from accelerate import PartialState
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftModel
from peft.utils import CONFIG_NAME
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from trl import get_quantization_config

from rfa_llm.adapters import base_revision, on_its_base, read_adapter
from rfa_llm.cli.settings import DTYPES, read_settings
from rfa_llm.cli.unlearn import UnlearnModelConfig
from rfa_llm.data.formats import check_tokenizer, load_rows, prepare
from rfa_llm.evaluation import next_token_kl, next_token_logits


@dataclass
class MergeArguments:
    """What to merge, and on which text to check it. The base is loaded as it was for the training."""

    adapter_name_or_path: str = field(default=None, metadata={"help": "The adapter: a folder or a Hub id. Required."})
    output_dir: str = field(default=None, metadata={"help": "Folder of the merged model, new or empty. Required."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The adapter's base. Default: the one that the adapter names."}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "Where the adapter was trained with it."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Where the adapter was trained with it."})
    bnb_4bit_quant_type: str = field(
        default="nf4", metadata={"help": "As in the training.", "choices": ["fp4", "nf4"]}
    )
    use_bnb_nested_quant: bool = field(default=True, metadata={"help": "As in the training."})
    base_dtype: str = field(
        default="auto", metadata={"help": "The training's --dtype: the base's dtype.", "choices": DTYPES}
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "dtype of the merged model; auto takes the base's, which is bfloat16 with --load_in_4bit.",
            "choices": DTYPES,
        },
    )
    sample_dataset: str = field(
        default=None,
        metadata={
            "help": "Text to compare on, such as the retain set: a .jsonl, .json, .csv or .parquet file, or a Hub id. "
            "Required."
        },
    )
    sample_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    sample_rows: int = field(default=16, metadata={"help": "Rows to compare on, from the first."})
    max_length: int = field(default=1024, metadata={"help": "Tokens kept of a row, from its start."})
    # bf16 weights cost thousandths of a nat, and the 8-bit activations that a merged model has no more, hundredths; a
    # lost adapter costs tenths and more.
    max_kl: float = field(
        default=0.1, metadata={"help": "Mean KL divergence, in nats, above which the merged model is not saved."}
    )
    save_anyway: bool = field(default=False, metadata={"help": "Save the merged model however far off it is."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU."})

    def __post_init__(self):
        for name in ("dtype", "base_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not known; use one of {', '.join(DTYPES)}.")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit, load_in_8bit: both are set; set the one that the training had.")
        for name in ("sample_rows", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} leaves no text to compare on; give 1 or more.")
        if not self.max_kl > 0:
            raise ValueError(f"max_kl: {self.max_kl} is not positive; give a number above 0, or set save_anyway.")


def merge(args: MergeArguments) -> dict[str, float]:
    """Merge an adapter into its base and save the result, with the base's tokenizer, in `args.output_dir`.

    A quantized base is dequantized first, and the adapter added to that (peft alone would quantize the sum again).
    The sum is rounded once, to `args.dtype`. What was written is then loaded again and compared with the adapter on
    the base that it was trained on, quantized if that was: `KL(adapter ‖ merged)` over the next token, at all
    positions of the sample rows. The folder appears whole or not at all.

    Args:
        args: What to merge; `MergeArguments(adapter_name_or_path=..., output_dir=..., sample_dataset=...)` is enough.

    Returns:
        `kl_mean` and `kl_largest`, in nats, and `positions`, how many they were taken over.

    Raises:
        ValueError: Bad input, a base that cannot be found or that the adapter does not fit, or the mean divergence is
            above `args.max_kl` (or not a number) without `args.save_anyway`. Nothing has been saved then.
    """
    if args.adapter_name_or_path is None:
        raise ValueError("adapter_name_or_path: no adapter is given; pass its folder or a Hub id.")
    if args.output_dir is None:
        raise ValueError("output_dir: no folder is given; say where the merged model goes.")
    output_dir = Path(args.output_dir)
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        raise ValueError(f"output_dir: {args.output_dir!r} is there already; choose a new or an empty folder.")
    if output_dir.is_symlink() or output_dir.is_mount():
        raise ValueError(
            f"output_dir: {args.output_dir!r} is a link or a mount point, which no whole model can take the place of; "
            "choose a folder below it."
        )
    adapter = read_adapter(args.adapter_name_or_path)
    base_name = args.model_name_or_path or adapter.base_model_name_or_path
    if not base_name:
        raise ValueError(
            f"model_name_or_path: the adapter {args.adapter_name_or_path!r} does not name its base; pass the id or "
            "path of the model that it was trained on."
        )
    if (Path(base_name) / CONFIG_NAME).exists():
        raise ValueError(
            f"model_name_or_path: {base_name!r} is an adapter itself; pass the model that "
            f"{args.adapter_name_or_path!r} was trained on."
        )
    # As `rfa-llm unlearn --model_revision` wrote it into the adapter.
    source = base_revision(adapter.revision, adapter.base_model_name_or_path, args.model_name_or_path)
    rows = load_rows(args.sample_dataset, "sample_dataset", args.sample_config, args.dataset_split)
    try:
        tokenizer = AutoTokenizer.from_pretrained(base_name, **source)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"model_name_or_path: no tokenizer can be loaded from the base {base_name!r} ({error}); pass the base's "
            "id, or its path as seen from here."
        ) from error
    check_tokenizer(tokenizer)
    rows = rows.select(range(min(args.sample_rows, len(rows))))
    sequences = prepare(rows, tokenizer, "sample_dataset", args.max_length)["input_ids"][:]

    # The settings of the training, through the class that reads them there.
    trained = UnlearnModelConfig(
        dtype=args.base_dtype,
        load_in_4bit=args.load_in_4bit,
        load_in_8bit=args.load_in_8bit,
        bnb_4bit_quant_type=args.bnb_4bit_quant_type,
        use_bnb_nested_quant=args.use_bnb_nested_quant,
    )
    quantization = get_quantization_config(trained)
    placement = {"device_map": {"": PartialState(cpu=args.use_cpu).device}}
    model = AutoModelForCausalLM.from_pretrained(
        base_name,
        **source,
        dtype=trained.dtype,
        **placement,
        **({"quantization_config": quantization} if quantization else {}),
    )
    base_dtype = model.dtype
    dtype = base_dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    model = on_its_base(model, args.adapter_name_or_path)
    adapter_logits = list(next_token_logits(model, sequences))

    # peft adds float32 products to the weights in place, so the wider of the two dtypes leaves one rounding.
    model = in_full_precision(model.unload(), torch.promote_types(base_dtype, dtype))
    model = PeftModel.from_pretrained(model, args.adapter_name_or_path).merge_and_unload().to(dtype)

    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}-") as temporary:
        folder = Path(temporary) / "model"
        model.save_pretrained(folder)
        # As it is: `check_tokenizer` may have given the other one a pad token.
        AutoTokenizer.from_pretrained(base_name, **source).save_pretrained(folder)
        # Two models never share the memory.
        del model
        saved = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **placement)
        divergences = torch.cat(
            [next_token_kl(p, q) for p, q in zip(adapter_logits, next_token_logits(saved, sequences), strict=True)]
        )
        figures = {
            "kl_mean": divergences.mean().item(),
            "kl_largest": divergences.max().item(),
            "positions": len(divergences),
        }
        # Written so that a NaN is refused.
        if not (figures["kl_mean"] <= args.max_kl or args.save_anyway):
            raise ValueError(
                f"max_kl: the merged model's next token is {figures['kl_mean']:.3g} nats (mean KL; largest "
                f"{figures['kl_largest']:.3g}) from the adapter's, above {args.max_kl:g}, so it was not saved; choose "
                "a wider dtype, raise max_kl or set save_anyway."
            )
        if output_dir.exists():
            output_dir.rmdir()
        folder.rename(output_dir)
    return figures


def in_full_precision(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model in `dtype`, in place, with plain layers where it was quantized."""
    # transformers gives quantized models alone the attribute.
    if not getattr(model, "is_quantized", False):
        return model.to(dtype)
    transposed = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (Linear4bit, Linear8bitLt)) and module.source_cls is Conv1D
    ]
    model = model.dequantize(dtype)
    # transformers leaves nn.Linear everywhere, but GPT-2 keeps, and saves, these weights the other way round.
    for name in transposed:
        linear = model.get_submodule(name)
        layer = Conv1D(*linear.weight.shape)
        layer.weight, layer.bias = nn.Parameter(linear.weight.data.T.contiguous()), linear.bias
        model.set_submodule(name, layer)
    return model.to(dtype)


def main(argv: list[str]) -> None:
    (args,) = read_settings((MergeArguments,), "merge", argv)
    figures = merge(args)
    table = pd.DataFrame({"nats": {"mean": figures["kl_mean"], "largest": figures["kl_largest"]}})
    print(f"\nKL(adapter ‖ merged) of the next token, at {figures['positions']} positions")
    print(f"{table.to_string(float_format='%.3g')}\n\nMerged model saved to {args.output_dir}.")
