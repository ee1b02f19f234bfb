from __future__ import annotations

import os
from collections.abc import Iterable

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach the network

import pytest
import torch
from datasets import Dataset
from hub_server import HubServer
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rfa_llm import RFAConfig, RFATrainer
from rfa_llm.data.formats import encode

SPECIAL = ["<pad>", "</s>", "<unk>"]
WORDS = ["Question", "Answer", ":", "?", "\n", *(f"w{i}" for i in range(52))]


def tiny_llama(**config) -> LlamaForCausalLM:
    """4 blocks of width 32, with weights wide enough that the blocks really change the features."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0, "eos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(**{"vocab_size": len(SPECIAL) + len(WORDS), **sizes, **more, **config}))


def tiny_lora(**config) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **config})


def tiny_rows(number: int, first: int) -> Dataset:
    """Question/answer rows; the answers are from 1 to 9 words long."""
    rows = []
    for i in range(first, first + number):
        answer = " ".join(f"w{(i * 7 + k * k) % 52}" for k in range(1 + 4 * i % 9))
        rows.append({"question": f"w{i % 52} w{i * 3 % 52} ?", "answer": answer})
    return Dataset.from_list(rows)


def learn_by_heart(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: Iterable[dict]) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    encoded = [torch.tensor([encode(row, tokenizer)["input_ids"]]) for row in rows]
    for _ in range(15):
        for ids in encoded:
            model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def perturb(model: torch.nn.Module, scale: float = 0.05) -> None:
    """Move the adapter away from its start, where the residual is 0."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; adds no bos."""
    vocab = {token: i for i, token in enumerate(SPECIAL + WORDS)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Punctuation()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="session", autouse=True)
def own_torch_extensions(tmp_path_factory):
    """DeepSpeed builds an extension under a lock, which a killed process leaves behind for all that come after."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("torch_extensions")))
        yield


@pytest.fixture
def hub():
    """A Hub of our own, on loopback."""
    server = HubServer()
    yield server
    server.stop()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture
def forget() -> Dataset:
    return tiny_rows(6, first=0)


@pytest.fixture
def retain() -> Dataset:
    return tiny_rows(10, first=20)


@pytest.fixture
def saved_llama(tmp_path, tokenizer) -> str:
    """Path of a tiny Llama with its tokenizer."""
    path = tmp_path / "model"
    tiny_llama().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def make_trainer(tmp_path, tokenizer, forget, retain):
    """Builds an `RFATrainer` of a short run on the CPU: `config` goes to `RFAConfig`, the rest to the trainer."""

    def make(config: dict | None = None, **kwargs) -> RFATrainer:
        short = {"max_steps": 3, "per_device_train_batch_size": 2, "warmup_steps": 0, "learning_rate": 1e-2}
        quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
        args = RFAConfig(
            **{"output_dir": str(tmp_path / "adapter"), "shift": "negate", **short, **quiet, **(config or {})}
        )
        given = {"forget_dataset": forget, "retain_dataset": retain, "processing_class": tokenizer}
        if "model" not in kwargs:
            kwargs["model"] = tiny_llama()
        return RFATrainer(args=args, **{**given, **kwargs})

    return make


def ridge_regression(x: torch.Tensor, y: torch.Tensor):
    """The affine map from x to y `[n, hidden]` of `fit_style`: least squares, the ridge as more observations."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    ridge = 0.1 * (x - mean_x).square().mean(0).median()
    more = (len(x) * ridge).sqrt() * torch.eye(x.shape[1], dtype=x.dtype)
    matrix = torch.linalg.lstsq(torch.cat([x - mean_x, more]), torch.cat([y - mean_y, 0 * more])).solution
    return lambda h: mean_y + (h - mean_x) @ matrix
