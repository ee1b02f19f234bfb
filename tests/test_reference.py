from __future__ import annotations

import math
import os

import pytest
import torch
from conftest import perturb, ridge_regression, tiny_llama, tiny_lora
from peft import get_peft_model
from safetensors import SafetensorError

from rfa_llm import reference
from rfa_llm.blocks import find_blocks
from rfa_llm.data.formats import prepare
from rfa_llm.feature_cache import batches
from rfa_llm.reference import (
    Teacher,
    fit_style,
    local_mask,
    mean_features,
    reference_features,
    smoothed_attention,
)

ALIGNED = [1, 2]


@pytest.fixture
def sets(forget, retain, tokenizer):
    return prepare(forget, tokenizer, "forget_dataset", None), prepare(retain, tokenizer, "retain_dataset", None)


@torch.no_grad()
def naive_features(model, row, tokens) -> list[torch.Tensor]:
    """One row without padding; transformers' own record of the blocks' outputs."""
    states = model.eval()(torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states
    first = 0 if tokens == "all" else row["answer_start"] - 1
    return [states[block + 1][0, first:] for block in ALIGNED]


def test_reference_features_are_the_base_models_and_leave_the_adapter_as_it_was():
    base = tiny_llama()
    ids = torch.arange(3, 15).view(2, 6)
    states = base(ids, output_hidden_states=True).hidden_states
    model = get_peft_model(tiny_llama(), tiny_lora(target_modules="all-linear"))
    perturb(model)
    # Something is frozen that peft itself would switch on again.
    frozen = model.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"].weight
    frozen.requires_grad_(False)
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    before = model(ids).logits
    blocks = list(find_blocks(model.get_base_model()))
    features = reference_features(model, blocks[1:3], input_ids=ids, attention_mask=torch.ones_like(ids))
    for feature, block in zip(features, ALIGNED, strict=True):
        assert not feature.requires_grad
        torch.testing.assert_close(feature, states[block + 1])
    assert torch.equal(model(ids).logits, before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable


def test_the_adapter_is_on_again_after_an_error():
    model = get_peft_model(tiny_llama(), tiny_lora(target_modules="all-linear"))
    perturb(model)
    ids = torch.arange(3, 15).view(2, 6)
    before = model(ids).logits

    def fail(module, args):
        raise RuntimeError("inside the block")

    handle = model.get_base_model().model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="inside the block"):
        reference_features(model, model.get_base_model().model.layers, input_ids=ids)
    handle.remove()
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_local_mask_position_by_position(implementation):
    model = tiny_llama()
    model.set_attn_implementation(implementation)
    attention_mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    mask = local_mask(model, attention_mask, window=3, sinks=2)
    seen = mask if mask.dtype == torch.bool else mask == 0
    for row, length in enumerate((8, 5)):
        for query in range(length):
            window = {key for key in (query, query - 1, query - 2) if key >= 0}
            expected = window | {key for key in (0, 1) if key <= query}
            assert set(seen[row, 0, query].nonzero().flatten().tolist()) == expected


def naive_attention(query, key, value, visible, temperature, scaling, softcap, sinks):
    """Loops in float64; `[heads, tokens, head_dim]`, `visible(query, key)`."""
    heads, tokens, size = query.shape
    out = torch.zeros(tokens, heads, value.shape[-1])
    for head in range(heads):
        kv = head * key.shape[0] // heads
        for q in range(tokens):
            scores = {}
            for k in range(tokens):
                if visible(q, k):
                    score = scaling * sum(
                        a * b for a, b in zip(query[head, q].tolist(), key[kv, k].tolist(), strict=True)
                    )
                    score = score if softcap is None else softcap * math.tanh(score / softcap)
                    scores[k] = math.exp(score / temperature)
            total = sum(scores.values()) + (0 if sinks is None else math.exp(sinks[head].item() / temperature))
            for k, weight in scores.items():
                out[q, head] += weight / total * value[kv, k]
    return out


@pytest.mark.parametrize(
    ("scaling", "softcap", "with_sinks"),
    [(None, None, False), (0.3, None, False), (0.3, 2.0, False), (0.3, None, True)],
)
def test_smoothed_attention_against_loops(scaling, softcap, with_sinks):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (3 * torch.randn(1, heads, 5, 4, generator=generator) for heads in (6, 2, 2))
    sinks = torch.randn(6, generator=generator) if with_sinks else None
    causal = torch.full((5, 5), torch.finfo(torch.float32).min).triu(1)[None, None]
    out, _ = smoothed_attention(None, query, key, value, causal, 2.5, scaling=scaling, softcap=softcap, s_aux=sinks)
    expected = naive_attention(
        query[0], key[0], value[0], lambda q, k: k <= q, 2.5, 0.5 if scaling is None else scaling, softcap, sinks
    )
    torch.testing.assert_close(out[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", ["answer", "all"])
def test_mean_features_against_a_loop(sets, tokens):
    model = tiny_llama()
    blocks = [find_blocks(model)[block] for block in ALIGNED]
    retain = sets[1]

    def run(**inputs):
        with torch.no_grad():
            return reference.block_features(model.eval(), blocks, **inputs)

    mean = mean_features(run, batches(retain, tokens, 0, 3), torch.device("cpu"))
    rows = [naive_features(model, row, tokens) for row in retain]
    expected = torch.stack([torch.cat([row[i] for row in rows]).double().mean(0) for i in range(2)])
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, expected.float())


def test_the_style_is_a_ridge_regression_however_rows_are_batched():
    generator = torch.Generator().manual_seed(0)
    x, y, new = (torch.randn(2, n, 5, generator=generator, dtype=torch.float64) for n in (40, 40, 3))
    # Far from 0, as features are: the map must not depend on where they lie.
    x, y = 3 * x + 20, 0.5 * x + 0.1 * y - 7
    # And one huge component must not drown the others.
    x[:, ::7, 2] += 1e3
    pairs = [(list(x[:, a:b]), list(y[:, a:b])) for a, b in ((0, 11), (11, 12), (12, 40))]
    maps = fit_style(pairs)
    assert maps.dtype == torch.float32 and maps.shape == (2, 6, 5)
    for block, of_block in enumerate(maps.double()):
        expected = ridge_regression(x[block], y[block] - x[block])(new[block])
        torch.testing.assert_close(new[block] @ of_block[:-1] + of_block[-1], expected, rtol=1e-5, atol=1e-5)
    # One row says no more than a difference.
    one = fit_style([(list(x[:, :1]), list(y[:, :1]))])
    torch.testing.assert_close(one[:, -1], (y - x)[:, 0].float())
    assert not one[:, :-1].any()


def run_teacher(folder, name, sets, dtype="auto") -> Teacher:
    forget, retain = sets
    teacher = Teacher(name, {"dtype": dtype}, folder, ALIGNED, forget, retain.select(range(7)), None, "answer")
    teacher.run(pad_token_id=0, batch_size=4, device=torch.device("cpu"))
    return teacher


def test_a_teachers_features_are_its_own_in_any_order_of_rows(saved_llama, sets, tmp_path):
    teacher, model = run_teacher(tmp_path / "folder", saved_llama, sets), tiny_llama()
    for cache, rows, order in (
        (teacher.forget, sets[0], [4, 0, 5, 1]),
        (teacher.forget, sets[0], [2]),
        (teacher.retain, sets[1], [6, 2]),
    ):
        expected = [naive_features(model, rows[i], "answer") for i in order]
        for i, block in enumerate(cache.rows(order)):
            torch.testing.assert_close(block, torch.cat([row[i] for row in expected]), rtol=1e-4, atol=1e-5)
    assert teacher.answer_losses == []


def test_a_teachers_features_keep_its_dtype(saved_llama, sets, tmp_path):
    teacher = run_teacher(tmp_path, saved_llama, sets, dtype=torch.bfloat16)
    assert teacher.forget.rows([0])[0].dtype == teacher.retain.rows([0])[0].dtype == torch.bfloat16


def test_a_second_run_needs_no_teacher_unless_its_rows_change(saved_llama, tmp_path, make_trainer, forget):
    teacher = tmp_path / "teacher"
    tiny_llama(initializer_range=0.1).save_pretrained(teacher)
    config = {"shift": "ignorant", "teacher": str(teacher), "blocks": ALIGNED, "next_token_weight": 0.0}
    first = make_trainer(config, model=saved_llama)._teacher.forget.rows([3, 1])
    # Unreadable weights of the same name, size and time: whoever loads the teacher fails.
    weights = teacher / "model.safetensors"
    content, stat = weights.read_bytes(), weights.stat()
    weights.write_bytes(bytes(len(content)))
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = make_trainer(config, model=saved_llama)._teacher.forget.rows([3, 1])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for change in ({"blocks": [0, 2]}, {"forget_tokens": "all"}, {"mean_rows": 3}):
        with pytest.raises(SafetensorError):
            make_trainer({**config, **change}, model=saved_llama)
    with pytest.raises(SafetensorError):
        make_trainer(config, model=saved_llama, forget_dataset=forget.select(range(5)))
    weights.write_bytes(content)
    make_trainer({**config, "mean_rows": 3}, model=saved_llama)


@pytest.mark.parametrize("kept", [False, True])
def test_the_teachers_features_go_with_the_training_unless_they_have_a_folder(
    kept, saved_llama, tmp_path, make_trainer
):
    tiny_llama(initializer_range=0.3).save_pretrained(tmp_path / "teacher")
    config = {"shift": "ignorant", "teacher": str(tmp_path / "teacher"), "max_steps": 2}
    if kept:
        config["reference_cache_dir"] = str(tmp_path / "cache")
    trainer = make_trainer(config, model=saved_llama)
    folder = tmp_path / ("cache" if kept else "adapter/_reference_features")
    of_teacher = list(folder.iterdir())
    assert len(of_teacher) == 2
    # The second training reads files that may be gone.
    for _ in range(2):
        trainer.train()
        assert [file.exists() for file in of_teacher] == [kept, kept]
    assert not (tmp_path / "adapter" / "_reference_features").exists()


def test_the_teachers_features_do_not_outlive_a_trainer_that_is_refused(
    saved_llama, tmp_path, make_trainer, monkeypatch
):
    tiny_llama(initializer_range=0.3).save_pretrained(tmp_path / "teacher")
    config = {"shift": "ignorant", "teacher": str(tmp_path / "teacher")}
    with pytest.raises(ValueError, match="^peft_config: .*lm_head.* lies outside the decoder blocks"):
        make_trainer(config, model=saved_llama, peft_config=tiny_lora(target_modules=["q_proj", "lm_head"]))
    assert not (tmp_path / "adapter" / "_reference_features").exists()

    run = reference.Teacher.run

    def run_and_break(teacher, *args):
        run(teacher, *args)
        assert list((tmp_path / "adapter" / "_reference_features").iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(reference.Teacher, "run", run_and_break)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(config, model=saved_llama)
    assert not (tmp_path / "adapter" / "_reference_features").exists()


def test_a_teacher_trained_again_under_its_name_is_run_again(saved_llama, tmp_path, make_trainer):
    teacher = tmp_path / "teacher"
    config = {"shift": "ignorant", "teacher": str(teacher), "blocks": ALIGNED, "next_token_weight": 0.0}
    features = []
    for scale in (0.1, 0.3):
        tiny_llama(initializer_range=scale).save_pretrained(teacher)
        features.append(make_trainer(config, model=saved_llama)._teacher.forget.rows([0])[0])
    assert not torch.equal(*features)
