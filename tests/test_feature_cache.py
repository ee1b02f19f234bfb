from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama, tiny_lora, tiny_rows
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2MoeConfig, TrainerCallback

from rfa_llm import feature_cache
from rfa_llm.blocks import find_blocks
from rfa_llm.data.formats import prepare
from rfa_llm.feature_cache import FeatureCache, has_room_for
from rfa_llm.residuals import block_features

ALIGNED = [1, 2]
CPU = torch.device("cpu")


@pytest.fixture
def rows(tokenizer):
    return prepare(tiny_rows(11, first=0), tokenizer, "forget_dataset", None)


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(feature_cache, "ROWS_A_FILE", 4)


class Run:
    """The features of a model's blocks; counts its calls."""

    def __init__(self, model=None):
        self.model = (tiny_llama() if model is None else model).eval()
        self.calls = 0

    @torch.no_grad()
    def __call__(self, **inputs):
        self.calls += 1
        return block_features(self.model, [find_blocks(self.model)[block] for block in ALIGNED], **inputs)


def fill(cache, run, missing=None, process=0, processes=1):
    cache.fill(run, cache.missing() if missing is None else missing, 0, 3, CPU, process, processes, "test")


def naive(row, tokens):
    """One row without padding; transformers' own record of the blocks' outputs."""
    with torch.no_grad():
        states = tiny_llama().eval()(torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states
    first = 0 if tokens == "all" else row["answer_start"] - 1
    return [states[block + 1][0, first:] for block in ALIGNED]


@pytest.mark.parametrize("tokens", ["answer", "all"])
@pytest.mark.parametrize("where", ["disk", "memory"])
@pytest.mark.parametrize("wanted", [range(11), [0, 3, 4, 8, 9], [2, 5]], ids=["all", "some", "less than a file"])
def test_rows_are_the_models_own_in_any_order(where, tokens, wanted, rows, tmp_path):
    wanted = list(wanted)
    cache = FeatureCache(tmp_path if where == "disk" else None, ["key"], ALIGNED, rows, wanted, tokens)
    fill(cache, Run())
    assert cache.missing() == []
    for order in (wanted, wanted[::-1], wanted[1:2], [wanted[0], wanted[-1], wanted[0]]):
        expected = [naive(rows[index], tokens) for index in order]
        for number, block in enumerate(cache.rows(order)):
            torch.testing.assert_close(block, torch.cat([row[number] for row in expected]), rtol=1e-4, atol=1e-5)


def test_the_size_that_is_told_is_the_size(rows, tmp_path):
    cache = FeatureCache(tmp_path, ["key"], ALIGNED, rows, list(range(8)), "all")
    fill(cache, Run())
    tensors = [load_file(file) for file in tmp_path.iterdir()]
    held = sum(t.nbytes for file in tensors for name, t in file.items() if name != "offsets")
    assert 32 * 4 * cache.values() == held == 2 * 32 * 4 * sum(len(rows[i]["input_ids"]) for i in range(8))
    assert cache.values([0]) + cache.values([1]) == cache.values() > cache.values([1]) > cache.values([]) == 0


def test_nothing_is_computed_twice_and_nothing_else_is_taken_for_it(rows, tmp_path):
    def missing(key="key", aligned=(1, 2), tokens="answer", dataset=rows, wanted=range(8)):
        return FeatureCache(tmp_path, [key], aligned, dataset, list(wanted), tokens).missing()

    run = Run()
    fill(FeatureCache(tmp_path, ["key"], ALIGNED, rows, list(range(8)), "answer"), run)
    # Two files of four rows, each in two batches of at most three.
    assert run.calls == 4
    assert missing() == []
    # The same tokens, of which others are the answer.
    moved = rows.map(lambda row: {"answer_start": row["answer_start"] + 1}, keep_in_memory=True)
    others = [{"key": "another"}, {"aligned": (0, 2)}, {"tokens": "all"}, {"dataset": rows.select(range(1, 11))}]
    for change in (*others, {"dataset": moved}):
        assert missing(**change) == [0, 1]
    # The first file fits; of the others, one is new and one overlaps what is there.
    assert missing(wanted=range(11)) == [2]


def test_a_writer_that_dies_leaves_whole_files_only(rows, tmp_path, monkeypatch):
    run, save = Run(), feature_cache.save_file
    written = []

    def die_in_the_second(tensors, part):
        written.append(part)
        if len(written) == 2:
            part.write_bytes(b"half")
            raise KeyboardInterrupt
        save(tensors, part)

    monkeypatch.setattr(feature_cache, "save_file", die_in_the_second)
    cache = FeatureCache(tmp_path, ["key"], ALIGNED, rows, list(range(11)), "answer")
    with pytest.raises(KeyboardInterrupt):
        fill(cache, run)
    assert len(list(tmp_path.iterdir())) == 1 and cache.missing() == [1, 2]
    fill(cache, run)
    assert cache.missing() == [] and len(list(tmp_path.iterdir())) == 3


def test_a_file_that_was_cut_is_computed_again_and_one_that_is_open_may_go(rows, tmp_path):
    def new():
        return FeatureCache(tmp_path, ["key"], ALIGNED, rows, list(range(8)), "answer")

    first = new()
    fill(first, Run())
    assert first.missing() == []
    expected = first.rows(list(range(8)))
    files = sorted(tmp_path.iterdir(), key=lambda file: first._names.index(file.name))
    files[0].write_bytes(files[0].read_bytes()[:-200])
    files[1].write_bytes(b"")
    second = new()
    assert second.missing() == [0, 1]
    fill(second, Run())
    assert second.missing() == []
    shutil.rmtree(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(second.rows(list(range(8))), expected, strict=True))


def test_processes_share_the_work_in_as_many_batches_each(rows, tmp_path):
    caches = [FeatureCache(tmp_path, ["key"], ALIGNED, rows, list(range(11)), "answer") for _ in range(2)]
    missing, runs = caches[0].missing(), [Run(), Run()]
    assert missing == [0, 1, 2]
    for process, (cache, run) in enumerate(zip(caches, runs, strict=True)):
        fill(cache, run, missing, process, 2)
    assert runs[0].calls == runs[1].calls == 4
    assert caches[0].missing() == []
    alone = FeatureCache(None, ["key"], ALIGNED, rows, list(range(11)), "answer")
    fill(alone, Run())
    for a, b in zip(caches[1].rows(range(11)), alone.rows(range(11)), strict=True):
        assert torch.equal(a, b)


# ---- in the trainer ----


class CountReferencePasses(TrainerCallback):
    """How many forward passes the first block has seen by the end of each step."""

    def __init__(self, model):
        self.count, self.by_step = 0, []
        find_blocks(model)[0].register_forward_hook(self._add)

    def _add(self, module, args, output):
        self.count += 1

    def on_step_end(self, args, state, control, **kwargs):
        self.by_step.append(self.count)


def adapter(trainer):
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("where", "shift"),
    [("auto", "local"), ("disk", "local"), ("disk", "smoothed"), ("disk", "mean"), ("memory", "negate")],
)
def test_a_run_with_the_cache_is_a_run_without_it(where, shift, make_trainer, tmp_path):
    # Adam makes steps of one size of gradients that are next to nothing but rounding, so not too large ones.
    config = {"shift": shift, "blocks": [1, 2], "max_steps": 7, "learning_rate": 1e-3}
    off = make_trainer({**config, "reference_cache": "off"})
    expected = adapter(off)
    on = make_trainer({**config, "reference_cache": where, "output_dir": str(tmp_path / "on")})
    differences = {name: torch.linalg.norm(value - expected[name]) for name, value in adapter(on).items()}
    assert all(differences[name] <= 1e-3 * torch.linalg.norm(value) for name, value in expected.items())
    whole = torch.stack([torch.linalg.norm(value) for value in expected.values()]).norm()
    assert torch.stack(list(differences.values())).norm() <= 1e-4 * whole
    for ours, theirs in zip(on.state.log_history, off.state.log_history, strict=True):
        for name in theirs:
            if name.startswith(("loss", "residual")):
                # Batches of another shape round in another way, also where the adapter has not moved.
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


def test_steps_run_one_pass_with_the_cache_and_three_without(make_trainer, tmp_path):
    for setting, passes in (("auto", 1), ("off", 3)):
        model = tiny_llama()
        counter = CountReferencePasses(model)
        config = {"shift": "local", "max_steps": 6, "reference_cache": setting, "output_dir": str(tmp_path / setting)}
        make_trainer(config, model=model, callbacks=[counter]).train()
        assert [b - a for a, b in zip(counter.by_step, counter.by_step[1:], strict=False)] == [passes] * 5


def test_the_cache_goes_with_the_run_unless_it_has_a_folder_of_its_own(make_trainer, tmp_path, monkeypatch):
    def passes(model=None, **config):
        model = tiny_llama() if model is None else model
        counter = CountReferencePasses(model)
        make_trainer({"overwrite_output_dir": True, **config}, model=model, callbacks=[counter]).train()
        return counter.by_step[0]

    assert passes(reference_cache="disk") == passes(reference_cache="disk") > 1
    assert not list((tmp_path / "adapter").glob("_reference_features"))
    own = {"reference_cache": "disk", "reference_cache_dir": str(tmp_path / "cache")}
    assert passes(**own) > 1
    # A second run finds all of it, whatever else is different, also where the disk is full by now; it computes one
    # row of either set again.
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    assert passes(**own, learning_rate=1e-4) == 1 + 2
    monkeypatch.undo()
    # Another base model, in weights or in configuration alone, finds none.
    assert passes(**own, model=tiny_llama(rms_norm_eps=1e-3)) > 1
    model = tiny_llama()
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] += 1
    assert passes(**own, model=model) > 1


@pytest.mark.parametrize("change", ["weights", "buffer", "file"])
def test_features_of_another_model_are_not_taken_for_its_own(change, make_trainer, tmp_path):
    own = {"reference_cache": "disk", "reference_cache_dir": str(tmp_path / "cache"), "overwrite_output_dir": True}
    make_trainer(own).train()
    make_trainer(own).train()
    trainer = make_trainer(own)
    base = trainer.model.get_base_model().model
    if change == "weights":
        base.layers[0].mlp.up_proj.weight.data.mul_(2)
    elif change == "buffer":
        base.rotary_emb.inv_freq.mul_(2)
    else:
        for path in (tmp_path / "cache").iterdir():
            tensors = load_file(path)
            save_file({name: t if name == "offsets" else 1.2 * t for name, t in tensors.items()}, path)
    with pytest.raises(
        ValueError, match="^reference_cache_dir: the features in .*cache' are not those that the model"
    ):
        trainer.train()


class FailAtStep2(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


def test_a_run_that_fails_leaves_no_features_and_can_be_run_again(make_trainer, tmp_path):
    trainer = make_trainer({"reference_cache": "disk", "max_steps": 3}, callbacks=[FailAtStep2()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not (tmp_path / "adapter" / "_reference_features").exists()
    trainer.pop_callback(FailAtStep2)
    # Longer than before, so with retain rows that the first run would not have seen.
    trainer.args.max_steps = 8
    trainer.train()
    assert trainer.state.global_step == 8
    # Outside a run the losses are those of a step without a cache.
    batch = next(iter(trainer.get_train_dataloader()))
    assert torch.isfinite(trainer.compute_loss(trainer.model, batch))
    assert not (tmp_path / "adapter" / "_reference_features").exists()


def test_retain_rows_that_are_seen_once_are_not_kept(make_trainer, tmp_path):
    # 6 forget rows and 10 retain rows: each retain row comes once in one epoch, some twice in two.
    for steps, setting, passes in ((3, "auto", 2), (3, "disk", 1), (6, "auto", 1)):
        model = tiny_llama()
        counter = CountReferencePasses(model)
        config = {"max_steps": steps, "reference_cache": setting, "output_dir": str(tmp_path / f"{steps}{setting}")}
        make_trainer(config, model=model, callbacks=[counter]).train()
        assert counter.by_step[2] - counter.by_step[1] == passes


def test_a_cache_that_does_not_fit_is_left_out_or_refused(make_trainer, monkeypatch, caplog):
    model = tiny_llama()
    counter = CountReferencePasses(model)
    trainer = make_trainer({"reference_cache_gb": 1e-6}, model=model, callbacks=[counter])
    warnings = []
    monkeypatch.setattr(feature_cache.logger, "warning", warnings.append)
    trainer.train()
    assert counter.by_step == [2, 4, 6] and "reference_cache_gb=1e-06 and half of the" in warnings[0]
    for setting in ("disk", "memory"):
        with pytest.raises(ValueError, match="reference_cache: the features would take .* raise reference_cache_gb"):
            make_trainer({"reference_cache_gb": 1e-6, "reference_cache": setting}).train()
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(ValueError, match="make room"):
        make_trainer({"reference_cache": "disk"}).train()


@pytest.mark.parametrize(
    ("missing", "limit_gb", "fits"),
    [(500, 1e-6, True), (501, 1e-6, False), (0, 1e-6, True), (0, 0.9e-6, False)],
)
def test_room_is_the_limit_and_half_of_what_is_free(missing, limit_gb, fits, tmp_path, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert has_room_for(1000, missing, tmp_path / "cache", limit_gb, or_not=True) == fits


def test_only_the_retain_rows_that_the_run_sees_are_computed(make_trainer, retain):
    trainer = make_trainer({"max_steps": 3})
    pairs = trainer.train_dataset
    seen = set()
    for epoch in range(2):
        pairs.set_epoch(epoch)
        seen |= {pairs[i]["retain"]["index"] for i in range(len(pairs))}
    assert pairs.retain_rows(2) == sorted(seen)
    assert len(pairs.retain_rows(1)) == 6 and pairs.retain_rows(2) == list(range(len(retain)))


# ---- the variant that needs no reference on the retain set ----


def test_branch_losses_against_a_loop(make_trainer):
    trainer = make_trainer({"residual": "branch", "blocks": [2], "max_steps": 1, "alpha": 3.0})
    model = trainer.model
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.copy_(0.05 * torch.randn(p.shape, generator=generator))
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(model, batch)
    logged = {name: value.item() for name, value in trainer._sums.items()}

    ratios = {}
    keep = batch["token_mask"] & ~batch["is_forget"][:, None]

    def hook(name, layer):
        def look(module, args, output):
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            x = args[0][keep]
            branch = 2.0 * x @ down.T @ up.T  # lora_alpha / r is 64 / 32
            base = x @ layer.base_layer.weight.T
            ratios[name] = [(b.square().sum() / y.square().sum()).item() for b, y in zip(branch, base, strict=True)]

        return look

    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_B")}
    for name, layer in layers.items():
        layer.register_forward_hook(hook(name, layer))
    with torch.no_grad():
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert len(ratios) == 3 * 7
    expected = sum(sum(of_layer) / len(of_layer) for of_layer in ratios.values()) / len(ratios)
    assert logged["loss_retain"] == pytest.approx(expected, rel=1e-4)
    assert not any(name.startswith("residual_retain") for name in logged)


def test_branches_go_to_zero_on_the_retain_set_and_no_reference_runs_over_it(make_trainer):
    model = tiny_llama()
    tokens = []
    find_blocks(model)[0].register_forward_hook(lambda module, args, output: tokens.append(len(args[0])))
    config = {"residual": "branch", "reference_cache": "off", "max_steps": 40, "blocks": [1, 2], "alpha": 20.0}
    trainer = make_trainer(config, model=model)
    trainer.train()
    # Rows of a step: two forget rows for the reference, then all four.
    assert tokens == [2, 4] * 40
    logs = [entry for entry in trainer.state.log_history if "loss_forget" in entry]
    assert logs[-1]["loss_forget"] < 0.8 * logs[0]["loss_forget"]
    assert logs[-1]["loss_retain"] < 0.5 * max(entry["loss_retain"] for entry in logs)
    assert not math.isnan(logs[-1]["loss"])


def test_branches_of_other_adapters_are_refused(make_trainer):
    with pytest.raises(ValueError, match="residual: 'branch' needs LoRA alone, but .*lora_magnitude_vector"):
        make_trainer({"residual": "branch", "blocks": [1]}, peft_config=tiny_lora(use_dora=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_branches_under_checkpointing(use_reentrant, make_trainer):
    config = {"residual": "branch", "blocks": [1, 2], "max_steps": 3}
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    if use_reentrant:
        with pytest.raises(ValueError, match="residual: 'branch' .* set it to False"):
            make_trainer({**config, **checkpointing})
        return
    plain, checkpointed = adapter(make_trainer(config)), adapter(make_trainer({**config, **checkpointing}))
    for name, value in plain.items():
        assert torch.linalg.norm(checkpointed[name] - value) <= 1e-4 * torch.linalg.norm(value)


def test_layers_that_see_other_positions_than_the_batchs_are_refused(make_trainer):
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 2, "num_experts_per_tok": 1}
    model = AutoModelForCausalLM.from_config(
        Qwen2MoeConfig(**sizes, moe_intermediate_size=16, shared_expert_intermediate_size=16)
    )
    with pytest.raises(ValueError, match="residual: 'branch' needs layers that see whole rows, but .*expert"):
        make_trainer({"residual": "branch", "blocks": [1]}, model=model).train()


def test_a_saved_adapter_of_a_cached_run_is_plain(make_trainer, tmp_path):
    trainer = make_trainer({"residual": "branch"})
    trainer.train()
    trainer.save_model()
    assert not [path for path in Path(tmp_path / "adapter").iterdir() if path.is_dir()]
    PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
