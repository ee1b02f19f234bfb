from __future__ import annotations

import copy
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import perturb, tiny_llama, tiny_lora, tiny_rows, tiny_tokenizer
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, BloomForCausalLM
from trl import TrlParser

from rfa_llm.data.formats import encode
from rfa_llm.data.pairing import pad_rows
from rfa_llm.rivals import METHODS, RIVALS, RivalConfig, losses
from rfa_llm.rivals.idk import IDK_ANSWERS, idk_answer, read_idk_answers, with_answer
from rfa_llm.rivals.trainers import RivalCollator

TOFU_IDK = Path(__file__).parent.parent.parent / "shared" / "tofu" / "idontknow.txt"
every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture
def make_rival(tmp_path, tokenizer, forget, retain):
    """Builds a rival's trainer of a short run on the CPU, as conftest's `make_trainer` does RFA's."""

    def make(method: str, config: dict | None = None, **kwargs):
        short = {"max_steps": 3, "per_device_train_batch_size": 2, "warmup_steps": 0, "learning_rate": 5e-3}
        quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
        args = RivalConfig(output_dir=str(tmp_path / "adapter"), method=method, **{**short, **quiet, **(config or {})})
        given = {"forget_dataset": forget, "retain_dataset": retain, "processing_class": tokenizer}
        if "model" not in kwargs:
            kwargs["model"] = tiny_llama()
        return RIVALS[method](args=args, **{**given, **kwargs})

    return make


def adapter(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def step_logs(trainer) -> list[dict]:
    return [log for log in trainer.state.log_history if "loss" in log]


def logits(*probabilities: list[float]) -> torch.Tensor:
    """Logits of these distributions, not normalized."""
    return torch.tensor(probabilities, dtype=torch.float64).log() + 3.0


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


# ---- the formulas, by hand ----


def test_nll_and_row_log_probs():
    scores, labels = logits([0.5, 0.25, 0.25], [0.2, 0.3, 0.5], [0.1, 0.8, 0.1]), torch.tensor([0, 2, 1])
    assert losses.nll(scores, labels, 4).item() == pytest.approx((math.log(2) + math.log(2) - math.log(0.8)) / 4)
    rows = losses.row_log_probs(scores, labels, torch.tensor([0, 0, 1]), 2)
    assert rows.tolist() == pytest.approx([math.log(0.25), math.log(0.8)])


def test_kl_is_the_references_divergence_from_the_model():
    reference, model = logits([0.5, 0.5], [0.9, 0.1]), logits([0.25, 0.75], [0.9, 0.1])
    by_hand = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert losses.kl(reference, model, 2).item() == pytest.approx(by_hand / 2)


def test_npo():
    # π/π₀ is e⁻² and 1.
    loss = losses.npo(torch.tensor([-3.0, -1.0]), torch.tensor([-1.0, -1.0]), 0.5, 2)
    assert loss.item() == pytest.approx(-4 * (log_sigmoid(1.0) + log_sigmoid(0.0)) / 2)
    # Its other form in the paper, (2/β) log(1 + (π/π₀)^β).
    assert loss.item() == pytest.approx(4 * (math.log(1 + math.exp(-2) ** 0.5) + math.log(2)) / 2)


def test_simnpo():
    loss = losses.simnpo(torch.tensor([-6.0, -2.0]), torch.tensor([3, 4]), 4.5, 0.25, 4)
    assert loss.item() == pytest.approx(-2 / 4.5 * (log_sigmoid(4.5 * 2 - 0.25) + log_sigmoid(4.5 * 0.5 - 0.25)) / 4)


def test_dpo():
    chosen, rejected = torch.tensor([-5.0]), torch.tensor([-4.0])
    loss = losses.dpo(chosen, torch.tensor([-8.0]), rejected, torch.tensor([-2.0]), 0.1, 1)
    assert loss.item() == pytest.approx(-20 * log_sigmoid(0.1 * (3 + 2)))


def test_undial():
    # The answer's probability 0.8 is cut by e² before the rest is scaled up.
    left = 0.8 / math.exp(2)
    target = [left / (left + 0.2), 0.2 / (left + 0.2)]
    by_hand = -(target[0] * math.log(0.6) + target[1] * math.log(0.4))
    loss = losses.undial(logits([0.6, 0.4]), logits([0.8, 0.2]), torch.tensor([0]), 2.0, 1)
    assert loss.item() == pytest.approx(by_hand)


def test_rmu():
    features = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    # ((0 + 4) / 2 + (4 + 16) / 2) / 3 tokens
    assert losses.rmu(features, torch.tensor([1.0, 0.0]), 3).item() == pytest.approx(4.0)
    assert losses.rmu(features, features, 3).item() == 0
    direction = losses.rmu_direction(64, seed=3)
    assert direction.norm().item() == pytest.approx(1.0) and direction.min() >= 0
    assert torch.equal(direction, losses.rmu_direction(64, seed=3))
    assert not torch.equal(direction, losses.rmu_direction(64, seed=4))


def test_rerouting():
    features = [torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]])]
    references = [torch.tensor([[5.0, 0.0], [-1.0, 0.0]]), torch.tensor([[4.0, 3.0], [1.0, 0.0]])]
    # Cosines 1, −1, 24/25 and 0; the negative one counts as 0.
    assert losses.reroute(features, references, 2).item() == pytest.approx((1 + 0 + 0.96 + 0) / 4)
    # Distances 4, 3, √2 and √2.
    assert losses.keep(features, references, 2).item() == pytest.approx((4 + 3 + 2 * math.sqrt(2)) / 4)
    assert losses.circuit_breaker_schedule(15, 150, 10.0) == pytest.approx((9.5, 0.5))
    assert losses.circuit_breaker_schedule(150, 150, 10.0) == pytest.approx((5.0, 5.0))


ROWS = torch.tensor([0, 0, 1])


@pytest.mark.parametrize(
    "loss",
    [
        lambda one, other: losses.nll(one, torch.tensor([0, 2, 1]), 3),
        lambda one, other: losses.kl(other, one, 3),
        lambda one, other: losses.row_log_probs(one, torch.tensor([0, 2, 1]), ROWS, 2).sum(),
        lambda one, other: losses.undial(one, other, torch.tensor([0, 2, 1]), 2.0, 3),
        lambda one, other: losses.rmu(one, other, 3),
        lambda one, other: losses.reroute([one], [other], 3),
        lambda one, other: losses.keep([one], [other], 3),
    ],
)
def test_losses_of_a_bfloat16_model_are_computed_in_float32(loss):
    one, other = (torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (0, 1))
    value = loss(one, other)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(one.double(), other.double()).item(), rel=1e-6)


# ---- the trainers, against a computation row by row ----


def log_softmax(scores: np.ndarray) -> np.ndarray:
    scores = scores - scores.max(-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


@torch.no_grad()
def run_rows(model, batch, which) -> list[tuple[np.ndarray, np.ndarray, list[np.ndarray]]]:
    """Each row of a set alone and unpadded, in float64: log-probabilities `[n, vocab]` where its answer's tokens are
    predicted, the tokens `[n]`, and each block's features from the position before the answer on."""
    model, results = model.double().eval(), []
    for row in batch[f"is_{which}"].nonzero()[:, 0].tolist():
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        before = batch["token_mask"][row].int().argmax().item()
        out = model(ids[None], output_hidden_states=True)
        log_probs = log_softmax(out.logits[0, before:-1].numpy())
        results.append((log_probs, ids[before + 1 :].numpy(), [h[0, before:].numpy() for h in out.hidden_states[1:]]))
    return results


def picked(rows) -> list[np.ndarray]:
    """Log-probability of each answer token, an array a row."""
    return [log_probs[np.arange(len(ids)), ids] for log_probs, ids, _ in rows]


def mean_nll(rows) -> float:
    return -np.concatenate(picked(rows)).mean()


def mean_kl(reference, rows) -> float:
    p, q = (np.concatenate([row[0] for row in of]) for of in (reference, rows))
    return (np.exp(p) * (p - q)).sum(-1).mean()


def mean_log_sigmoid(values) -> float:
    return -np.log1p(np.exp(-np.array(values))).mean()


def features(rows, block) -> np.ndarray:
    return np.concatenate([row[2][block] for row in rows])


def expected(method, on, off, batch) -> tuple[float, float]:
    """Forget and retain loss of a batch, from a model with its adapter on and one that never had any."""
    forget, retain, forget0, retain0 = (run_rows(m, batch, s) for m in (on, off) for s in ("forget", "retain"))
    forgotten, forgotten0 = ([row.sum() for row in picked(rows)] for rows in (forget, forget0))
    if method == "grad_ascent" or method == "grad_diff":
        return -mean_nll(forget), mean_nll(retain)
    if method == "kl":
        return -mean_nll(forget), mean_kl(retain0, retain)
    if method == "npo":
        ratios = np.array(forgotten) - np.array(forgotten0)
        return -2 / 0.3 * mean_log_sigmoid(-0.3 * ratios), mean_nll(retain)
    if method == "simnpo":
        means = np.array([row.mean() for row in picked(forget)])
        return -2 / 2.5 * mean_log_sigmoid(-2.5 * means - 0.1), mean_nll(retain)
    if method == "idk_nll":
        return mean_nll(forget), mean_nll(retain)
    if method == "idk_dpo":
        idk, idk0 = ([row.sum() for row in picked(run_rows(m, batch, "idk"))] for m in (on, off))
        margins = np.array(idk) - idk0 - np.array(forgotten) + forgotten0
        return -2 / 0.2 * mean_log_sigmoid(0.2 * margins), mean_nll(retain)
    if method == "undial":
        terms = []
        for (q, ids, _), (p, _, _) in zip(forget, forget0, strict=True):
            p = p.copy()
            p[np.arange(len(ids)), ids] -= 4.0
            terms.append(-(np.exp(log_softmax(p)) * q).sum(-1))
        return np.concatenate(terms).mean(), mean_nll(retain)
    if method == "asu":
        # Rotary embeddings are linear, so smaller queries are a higher temperature.
        teacher = copy.deepcopy(off)
        for block in teacher.model.layers:
            block.self_attn.q_proj.weight.data /= 3.0
        return mean_kl(run_rows(teacher, batch, "forget"), forget), mean_kl(retain0, retain)
    if method == "rmu":
        target = 1.5 * losses.rmu_direction(32, seed=42).double().numpy()
        kept = features(retain, 1) - features(retain0, 1)
        return ((features(forget, 1) - target) ** 2).mean(), (kept**2).mean()
    cosines = []
    for block in (1, 2):
        h, h0 = features(forget, block), features(forget0, block)
        cosines.append((h * h0).sum(-1) / np.linalg.norm(h, axis=-1) / np.linalg.norm(h0, axis=-1))
    kept = [np.linalg.norm(features(retain, b) - features(retain0, b), axis=-1).mean() for b in range(3)]
    return np.maximum(cosines, 0).mean(), np.mean(kept)


SETTINGS = {
    "npo_beta": 0.3,
    "simnpo_beta": 2.5,
    "simnpo_gamma": 0.1,
    "dpo_beta": 0.2,
    "undial_strength": 4.0,
    "rmu_steering_coeff": 1.5,
    "circuit_breaker_alpha": 6.0,
    "asu_temperature": 3.0,
    "idk_answers": ["w1 w2 w3", "w4 w5"],
    "forget_weight": 0.5,
}
BLOCKS = {"rmu": [1], "circuit_breaker": [1, 2]}


@every_method
def test_a_step_logs_what_the_formula_says(method, make_rival):
    config = {**SETTINGS, "blocks": BLOCKS.get(method), "max_steps": 2}
    if method != "grad_ascent":
        config["retain_weight"] = 2.0
    trainer = make_rival(method, config)
    perturb(trainer.model, scale=0.2)
    on = copy.deepcopy(trainer.model)
    batches, collate = [], trainer.data_collator

    def recording(pairs):
        batches.append(collate(pairs))
        return batches[-1]

    trainer.data_collator = recording
    trainer.train()
    logs = step_logs(trainer)
    assert len(logs) == 2
    loss_forget, loss_retain = expected(method, on, tiny_llama(), batches[0])
    assert logs[0]["loss_forget"] == pytest.approx(loss_forget, rel=1e-4)
    assert logs[0]["loss_retain"] == pytest.approx(loss_retain, rel=1e-4)
    for step, log in enumerate(logs, start=1):
        # Half way through a run of two steps, c_s and c_r are α·3/4 and α/4; at its end α/2 both.
        factors = {1: (4.5, 1.5), 2: (3.0, 3.0)}[step] if method == "circuit_breaker" else (1.0, 1.0)
        weighted = 0.5 * factors[0] * log["loss_forget"] + trainer.args.retain_weight * factors[1] * log["loss_retain"]
        assert log["loss"] == pytest.approx(weighted, rel=1e-4)


@pytest.fixture(scope="module")
def learnt() -> dict[str, torch.Tensor]:
    """Weights of a tiny Llama that knows the forget rows by heart."""
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    rows = [encode(row, tokenizer) for row in tiny_rows(6, first=0)]
    batch = pad_rows([{**row, "index": 0} for row in rows], ["answer"] * 6, tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(20):
        out = model(batch["input_ids"], attention_mask=batch["attention_mask"])
        counted = (batch["token_mask"] & batch["attention_mask"].roll(-1, 1).bool())[:, :-1]
        torch.nn.functional.cross_entropy(out.logits[:, :-1][counted], batch["input_ids"][:, 1:][counted]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@every_method
def test_training_lowers_the_forget_loss_and_the_answers_probability(method, learnt, make_rival, retain):
    model = tiny_llama()
    model.load_state_dict(learnt)
    # The forget loss alone, or on a model as small as this the retain loss has its way first.
    config = {"max_steps": 12, "per_device_train_batch_size": 6, "learning_rate": 1e-2, "retain_weight": 0.0}
    config |= {"lr_scheduler_type": "constant", "idk_answers": ["w1 w2"], "blocks": BLOCKS.get(method)}
    trainer = make_rival(method, config, model=model, peft_config=tiny_lora())
    if method == "circuit_breaker":
        # At cosine 1 the loss has no gradient.
        perturb(trainer.model)
    rows = trainer.train_dataset.forget
    batch = RivalCollator(0, "answer", "answer")([{"forget": row} for row in rows])

    def forget_nll():
        return mean_nll(run_rows(copy.deepcopy(trainer.model), batch, "forget"))

    before = forget_nll()
    trainer.train()
    logs = step_logs(trainer)
    assert logs[-1]["loss_forget"] < logs[0]["loss_forget"] - 0.05 * abs(logs[0]["loss_forget"])
    assert before < 1 and forget_nll() > before + 0.1
    assert all(weight.any() for weight in adapter(trainer.model).values())
    weights = {name.replace("base_layer.", ""): p for name, p in trainer.model.get_base_model().state_dict().items()}
    assert all(torch.equal(weight, weights[name]) for name, weight in learnt.items())


@every_method
def test_the_step_does_not_depend_on_how_its_batch_is_cut(method, make_rival):
    def first_step(per_device, accumulation):
        config = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation}
        config |= {"max_steps": 1, "max_grad_norm": 0.0, "optim": "sgd", "idk_answers": ["w1 w2", "w3 w4 w5 w6"]}
        trainer = make_rival(method, {**config, "retain_weight": float(method != "grad_ascent")})
        perturb(trainer.model)
        trainer.train()
        return adapter(trainer.model), step_logs(trainer)[0]

    (weights, log), (weights2, log2) = first_step(6, 1), first_step(3, 2)
    for name in weights:
        torch.testing.assert_close(weights2[name], weights[name], rtol=1e-5, atol=1e-5)
    for name in ("loss", "loss_forget", "loss_retain"):
        assert log2[name] == pytest.approx(log[name], rel=1e-4)


@pytest.mark.parametrize("method", ["npo", "rmu"])
def test_all_tokens_can_count(method, make_rival):
    trainer = make_rival(method, {"forget_tokens": "all", "retain_tokens": "all", "max_steps": 1})
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    tokens = batch["attention_mask"].sum(1)
    # Of n tokens, n − 1 are predicted, and n have features.
    per_row = tokens if method == "rmu" else tokens - 1
    assert trainer._count_tokens([batch]).tolist() == [per_row[:2].sum(), per_row[2:].sum(), 2]


def test_the_default_blocks_and_adapters(make_rival):
    deep = tiny_llama(num_hidden_layers=16, hidden_size=16)
    for method, blocks in (("rmu", [7]), ("circuit_breaker", [5, 10])):
        trainer = make_rival(method, model=copy.deepcopy(deep))
        assert trainer.aligned == blocks
        config = trainer.model.peft_config["default"]
        assert (config.r, config.lora_alpha) == (32, 64)
        assert config.layers_to_transform == list(range(blocks[-1] + 1))
    assert make_rival("npo").model.peft_config["default"].layers_to_transform == [0, 1, 2, 3]


# ---- "I don't know" ----


def test_idk_rows_ask_the_forget_rows_question(make_rival, tokenizer, forget):
    answers = ["w1 w2", "w3 w4 w5", "w6"]
    trainer = make_rival("idk_dpo", {"idk_answers": answers})
    known = [tokenizer(f"{answer}</s>", add_special_tokens=False).input_ids for answer in answers]
    drawn = set()
    for epoch in range(4):
        trainer.train_dataset.set_epoch(epoch)
        for i, row in enumerate(forget):
            idk, asked = trainer.train_dataset[i]["idk"], encode(row, tokenizer)
            assert idk["input_ids"][: idk["answer_start"]] == asked["input_ids"][: asked["answer_start"]]
            drawn.add((i, known.index(idk["input_ids"][idk["answer_start"] :])))
    assert len(drawn) > 2 * len(forget)  # another answer in another epoch
    batch = trainer.data_collator([trainer.train_dataset[i] for i in (4, 2)])
    assert batch["index"][batch["is_forget"]].tolist() == batch["index"][batch["is_idk"]].tolist() == [4, 2]
    longest = make_rival("idk_dpo", {"idk_answers": [" ".join(["w1"] * 50)], "max_length": 20}).train_dataset[0]["idk"]
    assert len(longest["input_ids"]) == 20
    instead = make_rival("idk_nll", {"idk_answers": answers}).train_dataset
    instead.set_epoch(3)
    assert instead[4]["forget"] == trainer.train_dataset[4]["idk"] and instead[4].keys() == {"forget", "retain"}


def test_an_idk_answer_depends_on_seed_epoch_and_row_alone():
    draws = [idk_answer(7, epoch, index, 100) for epoch in range(3) for index in range(40)]
    assert draws == [idk_answer(7, epoch, index, 100) for epoch in range(3) for index in range(40)]
    assert draws != [idk_answer(8, epoch, index, 100) for epoch in range(3) for index in range(40)]
    assert len(set(draws)) > 50 and max(draws) < 100


@pytest.mark.parametrize(
    "row",
    [
        {"question": "w1 ?", "answer": "w2"},
        {"prompt": "w1 ?", "completion": " w2"},
        {"prompt": [{"role": "user", "content": "w1 ?"}], "completion": [{"role": "assistant", "content": "w2"}]},
        {"messages": [{"role": "user", "content": "w1 ?"}, {"role": "assistant", "content": "w2"}]},
    ],
)
def test_the_answer_is_replaced_in_every_format(row, tokenizer):
    before, after = encode(row, tokenizer), encode(with_answer(row, "w8 w9"), tokenizer)
    start = before["answer_start"]
    assert after["answer_start"] == start and after["input_ids"][:start] == before["input_ids"][:start]
    assert tokenizer.convert_ids_to_tokens(after["input_ids"][start:]) == ["w8", "w9", "</s>"]
    if isinstance(row.get("completion"), str):
        assert with_answer(row, "w8")["completion"] == " w8"


def test_answers_come_from_a_file_or_are_our_own(tmp_path):
    file = tmp_path / "idk.txt"
    file.write_text("I don't know. \n\nNo idea.\n")
    assert read_idk_answers(str(file)) == ["I don't know.", "No idea."]
    assert read_idk_answers(None) == list(IDK_ANSWERS)
    parsed, *_ = TrlParser(RivalConfig).parse_args_and_config(
        ["--output_dir", "x", "--method", "idk_nll", "--idk_answers", str(file)]
    )
    assert (parsed.method, parsed.idk_answers) == ("idk_nll", str(file))
    if not TOFU_IDK.exists():
        pytest.skip("TOFU's idontknow.txt is not beside the repository")
    assert len(read_idk_answers(str(TOFU_IDK))) == 100


# ---- several processes ----


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp2", "zero2", "zero3"])
def test_the_cut_over_processes_changes_nothing(mode, forget, retain, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    forget.to_json(tmp_path / "forget.jsonl")
    retain.to_json(tmp_path / "retain.jsonl")
    methods = ["kl", "npo", "idk_dpo", "circuit_breaker", "asu"]
    config = ["--config_file", f"configs/accelerate/{mode}.yaml", "--mixed_precision", "no"]
    launch = ["-m", "accelerate.commands.launch", *config, "--main_process_port", "0"]
    for name, command, rows in (("alone", [], 2), ("both", launch, 1)):
        done = subprocess.run(
            [sys.executable, *command, "tests/rivals_worker.py", tmp_path, tmp_path / name, str(rows), *methods],
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"},
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout
    for method in methods:
        alone, both = (load_file(tmp_path / name / method / "adapter_model.safetensors") for name in ("alone", "both"))
        for name, weight in alone.items():
            assert torch.linalg.norm(both[name] - weight) <= 1e-5 * torch.linalg.norm(weight), (method, name)


# ---- checkpoints and the guard ----


def test_a_resumed_run_keeps_rmus_direction(make_rival):
    config = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "overwrite_output_dir": True}
    whole = make_rival("rmu", config)
    whole.train()
    kept = Path(whole.args.output_dir) / "kept"
    shutil.copytree(kept.with_name("checkpoint-2"), kept)

    def resumed():
        trainer = make_rival("rmu", config)
        trainer.train(resume_from_checkpoint=str(kept))
        return adapter(trainer.model)

    expected = adapter(whole.model)
    assert all(torch.equal(weight, expected[name]) for name, weight in resumed().items())
    state = load_file(kept / "rfa_state.safetensors")
    assert torch.equal(state["vectors"], losses.rmu_direction(32, seed=42)[None])
    with safe_open(kept / "rfa_state.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["method"]) == "rmu" and metadata["blocks"] == "3"
    save_file({"vectors": -state["vectors"]}, kept / "rfa_state.safetensors", metadata=metadata)
    assert not all(torch.equal(weight, expected[name]) for name, weight in resumed().items())


def test_a_checkpoint_of_another_method_or_other_answers_is_refused(make_rival):
    config = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "idk_answers": ["w1"]}
    trainer = make_rival("idk_nll", config)
    trainer.train()
    checkpoint = f"{trainer.args.output_dir}/checkpoint-2"
    with pytest.raises(ValueError, match="^idk_answers: .* was trained with sha256:.* but this run has sha256:"):
        make_rival("idk_nll", {**config, "idk_answers": ["w2"]}).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match='^method: .* was trained with "idk_nll", but this run has "idk_dpo"'):
        make_rival("idk_dpo", config).train(resume_from_checkpoint=checkpoint)


def test_a_loss_that_is_not_finite_stops_the_run(make_rival):
    trainer = make_rival("grad_ascent", {"learning_rate": 1e30})
    with pytest.raises(FloatingPointError, match="not finite at step 2; .* is in .*last_good_adapter; lower"):
        trainer.train()


# ---- bad input ----


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"method": "rfa"}, "method: 'rfa' is not known; use one of grad_ascent, grad_diff, kl, npo"),
        ({"forget_weight": 0.0}, "forget_weight: 0.0 is not positive; give a number above 0"),
        ({"npo_beta": -0.1}, "npo_beta: -0.1 is not positive"),
        ({"undial_strength": 0}, "undial_strength: 0 is not positive"),
        ({"retain_weight": -1.0}, "retain_weight: -1.0 is negative; give 0 or more"),
        ({"method": "grad_ascent", "retain_weight": 1.0}, "retain_weight: 1.0, but grad_ascent has no retain loss"),
        ({"asu_temperature": 1.0}, "asu_temperature: 1.0 does not flatten attention; give more than 1"),
        ({"idk_answers": []}, "idk_answers: there is no answer, or an empty one; give at least one"),
        ({"idk_answers": ["no", " "]}, "idk_answers: there is no answer, or an empty one"),
        ({"idk_answers": "nowhere.txt"}, "idk_answers: there is no file 'nowhere.txt'; give a text file"),
        ({"retain_tokens": "question"}, "retain_tokens: 'question' is not known; use one of answer, all"),
    ],
)
def test_settings(setting, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        RivalConfig(output_dir="nowhere", **setting)


def test_methods_and_trainers(make_rival, tmp_path):
    assert list(RIVALS) == [name for name in METHODS if name in RIVALS] and set(RIVALS) == set(METHODS)
    with pytest.raises(ValueError, match=r"^method: 'rmu' is not what NPOTrainer trains; use RIVALS\['rmu'\]"):
        RIVALS["npo"](model=tiny_llama(), args=RivalConfig(output_dir=str(tmp_path), method="rmu"))


def test_rows_without_a_question(make_rival):
    text = Dataset.from_list([{"text": f"w1 w{i}"} for i in range(6)])
    with pytest.raises(ValueError, match="^forget_dataset has text rows, which ask no question"):
        make_rival("idk_nll", forget_dataset=text)
    make_rival("npo", {"max_steps": 1}, forget_dataset=text).train()


def test_blocks(make_rival):
    with pytest.raises(ValueError, match=r"^blocks: rmu steers one block, but got \[1, 2\]; name one"):
        make_rival("rmu", {"blocks": [1, 2]})
    with pytest.raises(ValueError, match="^blocks: 4 is out of range for a model of 4 blocks"):
        make_rival("circuit_breaker", {"blocks": [4]})
    with pytest.raises(ValueError, match="^peft_config: .* lies above the last aligned block"):
        make_rival("rmu", {"blocks": [1]}, peft_config=tiny_lora(target_modules=["q_proj"]))


def test_an_adapter_that_cannot_be_trained(make_rival, tmp_path):
    get_peft_model(tiny_llama(), tiny_lora(target_modules=["q_proj"])).save_pretrained(tmp_path / "frozen")
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "frozen")
    with pytest.raises(ValueError, match="^peft_config: the adapter has no trainable parameter.*`is_trainable=True`"):
        make_rival("npo", model=model)


def test_attention_that_cannot_be_smoothed(make_rival):
    bloom = BloomForCausalLM(BloomConfig(vocab_size=60, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(ValueError, match="^method: 'asu' needs attention .* BloomForCausalLM .*; use another method"):
        make_rival("asu", model=bloom)
