from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_llama, tiny_lora, tiny_rows
from datasets import Dataset
from peft import IA3Config, PeftModel, PromptTuningConfig, VeraConfig, get_peft_model
from transformers import (
    BertConfig,
    BitsAndBytesConfig,
    DistilBertConfig,
    Gemma3nTextConfig,
    LlamaConfig,
    MambaConfig,
    PreTrainedTokenizerFast,
    T5Config,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
)
from transformers.trainer_pt_utils import AcceleratorConfig

from rfa_llm import RFAConfig, RFATrainer
from rfa_llm.blocks import check_decoder_only
from rfa_llm.data.formats import load_rows
from rfa_llm.unlearning_trainer import BASE_KEEPING_INITS, _check_launch


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forget_dataset": None}, "^forget_dataset is None; give a Dataset"),
        ({"retain_dataset": None}, "^retain_dataset is None; give a Dataset"),
        ({"forget_dataset": Dataset.from_list([])}, "^forget_dataset is empty; give at least one row"),
        (
            {"retain_dataset": tiny_rows(3, 0).rename_column("answer", "reply")},
            r"^retain_dataset: the columns are \['question', 'rep",
        ),
        (
            {"forget_dataset": tiny_rows(6, first=18)},
            "^4 rows of forget_dataset .* the first of them row 2 of forget_dataset .*; rem",
        ),
    ],
)
def test_data(change, message, make_trainer):
    with pytest.raises(ValueError, match=message):
        make_trainer(model=tiny_llama(), **change)


def test_a_model_that_is_not_there(make_trainer):
    with pytest.raises(ValueError, match="^model: 'no/such-model' is no model .*; give the folder or Hub id of a "):
        make_trainer(model="no/such-model")


def test_an_answer_that_is_wholly_cut(make_trainer):
    with pytest.raises(
        ValueError, match="^forget_dataset row 0: max_length=5 cuts the whole answer.*raise max_length"
    ):
        make_trainer({"max_length": 5})


def test_a_tokenizer_without_pad_and_end_token(make_trainer, tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, unk_token="<unk>")
    with pytest.raises(ValueError, match="processing_class .* without a pad and an end token; set its eos_token"):
        make_trainer(processing_class=bare)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"alpha": 0.0}, "alpha: 0.0 is not positive; give a number above 0"),
        ({"alpha": float("inf")}, "alpha: inf is not finite; give a number above 0"),
        ({"alpha": "4"}, "alpha: '4' is text; give a number above 0"),
        ({"learning_rate": -1.0}, "learning_rate: -1.0 is not positive; give a number above 0"),
        ({"per_device_train_batch_size": -2}, "per_device_train_batch_size: -2 is not positive"),
        ({"per_device_train_batch_size": 1.5}, "per_device_train_batch_size: 1.5 is no whole number"),
        ({"beta": None}, "beta: None is not positive; give a number above 0"),
        ({"alpha": float("nan")}, "alpha: nan is not positive"),
        ({"beta": -1.0}, "beta: -1.0 is not positive; give a number above 0"),
        ({"shift_scale": 0.0}, "shift_scale: 0.0 is not positive"),
        ({"local_window": 0}, "local_window: 0 is not positive"),
        ({"local_sinks": -1}, "local_sinks: -1 is no number of tokens; give 0 or more"),
        ({"mean_rows": 0}, "mean_rows: 0 is not positive"),
        ({"mean_rows": 2.5}, "mean_rows: 2.5 is no whole number"),
        ({"local_window": float("inf")}, "local_window: inf is no whole number"),
        ({"next_token_weight": -1.0}, "next_token_weight: -1.0 is no weight; give 0 or more"),
        ({"next_token_weight": float("inf")}, "next_token_weight: inf is no weight; give 0 or more"),
        ({"next_token_weight": 1.0, "residual": "branch"}, "next_token_weight: 1.0 needs reference features"),
        ({"smoothing_temperature": 1.0}, "smoothing_temperature: 1.0 does not flatten attention; give more than 1"),
        ({"max_length": 0}, "max_length: 0 keeps no token; give 1 or more, or None"),
        (
            {"shift": "ignorence"},
            "shift: 'ignorence' is not known; use one of local, smoothed, ignorant, mean, random",
        ),
        ({"forget_tokens": "question"}, "forget_tokens: 'question' is not known; use one of answer, all"),
        ({"retain_tokens": ""}, "retain_tokens: '' is not known; use one of answer, all"),
        ({"remove_unused_columns": True}, "remove_unused_columns: True would drop the rows"),
        ({"residual": "both"}, "residual: 'both' is not known; use one of feature, branch"),
        ({"reference_cache": "ram"}, "reference_cache: 'ram' is not known; use one of auto, disk, memory, off"),
        ({"reference_cache_gb": 0.0}, "reference_cache_gb: 0.0 is not positive"),
        (
            {"reference_cache_dir": "x", "reference_cache": "memory"},
            "reference_cache_dir: 'x' is given, but reference_",
        ),
        ({"reference_cache_dir": __file__}, "reference_cache_dir: .* is a file; give the name of a folder"),
        ({"padding_free": True}, "padding_free: it needs the reference features .* use 'disk' or 'memory'"),
        (
            {"train_sampling_strategy": "batch_rebalance"},
            "train_sampling_strategy: 'batch_rebalance' is not known; use",
        ),
        ({"shift": "ignorant"}, "teacher: shift='ignorant' needs the checkpoint from before .*or use shift='local'"),
    ],
)
def test_settings(setting, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        RFAConfig(output_dir="nowhere", **setting)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([], "blocks: the list is empty; name at least one block"),
        ([1, 4], "blocks: 4 is out of range for a model of 4 blocks; use -4 to 3"),
        ([-5], "blocks: -5 is out of range for a model of 4 blocks"),
        ([3, -1], r"blocks: \[3, -1\] names a block twice"),
    ],
)
def test_blocks(blocks, message, make_trainer):
    with pytest.raises(ValueError, match=f"^{message}"):
        make_trainer({"blocks": blocks})


def test_the_next_token_term_needs_the_last_block(make_trainer):
    with pytest.raises(
        ValueError, match="^next_token_weight: 0.5 needs the last block's features, but .* 2 of 4; align"
    ):
        make_trainer({"blocks": [1, 2], "next_token_weight": 0.5})


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [2, 3]},
            r"^blocks: aligned block 1 lies below every adapter \(the first adapter sits on block 2\)",
        ),
        (
            {"target_modules": ["lm_head"]},
            r"^blocks: aligned block 1 lies below every adapter \(no block has an adapter",
        ),
        (
            {"target_modules": "all-linear"},
            r"^peft_config: model\.layers\.3\.self_attn\.q_proj\.lora_A\S+ lies above the last aligned block \(2\)"
            r".*leave it out of the adapter \(`layers_to_transform=list\(range\(3\)\)`",
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0, 1, 2], "modules_to_save": ["lm_head"]},
            "^peft_config: lm_head.* lies outside the decoder blocks, whose features alone are aligned",
        ),
    ],
    ids=["too high", "outside", "above", "head"],
)
def test_adapters(adapter, message, make_trainer):
    with pytest.raises(ValueError, match=message):
        make_trainer({"blocks": [1, 2]}, peft_config=tiny_lora(**adapter))


def moved_with_the_adapter_off(init) -> float:
    """How far the logits are from the base's where an adapter with these first weights is switched off."""
    model = get_peft_model(tiny_llama(), tiny_lora(target_modules=["q_proj"], init_lora_weights=init))
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad(), model.disable_adapter():
        return (model(ids).logits - tiny_llama()(ids).logits).abs().max().item()


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_an_adapter_that_would_change_the_base_is_refused(init, make_trainer):
    assert moved_with_the_adapter_off(init) > 0.01
    sentence = f"^peft_config: init_lora_weights='{init}' changes the base's weights.*; use one of True, False, 'gau"
    with pytest.raises(ValueError, match=sentence):
        make_trainer(model="nowhere", peft_config=tiny_lora(init_lora_weights=init))
    model = get_peft_model(tiny_llama(), tiny_lora(target_modules=["q_proj"], init_lora_weights=init))
    with pytest.raises(ValueError, match=sentence):
        make_trainer(model=model)


@pytest.mark.parametrize("init", BASE_KEEPING_INITS)
def test_first_weights_that_are_let_pass_leave_the_base_as_it_is(init, make_trainer):
    assert moved_with_the_adapter_off(init) == 0
    make_trainer(peft_config=tiny_lora(init_lora_weights=init))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_an_adapter_that_trains_the_bases_biases_is_refused(bias, make_trainer):
    with pytest.raises(ValueError, match=f"^peft_config: bias='{bias}' trains the base's own biases.*leave it 'none'"):
        make_trainer(model="nowhere", peft_config=tiny_lora(bias=bias))


def test_an_adapter_outside_the_blocks(make_trainer):
    with pytest.raises(ValueError, match="^peft_config: PromptTuningConfig puts nothing into the blocks; use a Lora"):
        make_trainer(model="nowhere", peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def test_an_adapter_that_comes_with_the_model(make_trainer, tmp_path):
    model = get_peft_model(tiny_llama(), tiny_lora(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="^peft_config: the model carries an adapter already; leave peft_config out"):
        make_trainer(model=model, peft_config=tiny_lora())
    model.save_pretrained(tmp_path / "frozen")
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "frozen")
    with pytest.raises(ValueError, match="^peft_config: the adapter has no trainable parameter.*`is_trainable=True`"):
        make_trainer(model=model)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BertConfig(), r"is an encoder \(bert\); pass a decoder-only model"),
        (T5Config(), r"is an encoder-decoder \(t5\); pass a decoder-only model"),
        (ViTConfig(), r"\(vit\) has no causal language model class in transformers; pass a decoder-only model"),
    ],
    ids=["encoder", "encoder-decoder", "other"],
)
def test_models_that_are_no_decoders_are_refused_without_their_weights(config, message, make_trainer, tmp_path):
    path = str(tmp_path / "model")
    config.save_pretrained(path)  # no weights beside it
    with pytest.raises(ValueError, match=f"^model: '{path}' {message}"):
        make_trainer(model=path)


@pytest.mark.parametrize("model", [None, Path("model")])
def test_a_model_of_the_wrong_type(model, make_trainer):
    with pytest.raises(TypeError, match=f"^model: got a {type(model).__name__}; pass an id or path as text"):
        make_trainer(model=model)


@pytest.mark.parametrize(
    "config", [DistilBertConfig(), MambaConfig(), Gemma3nTextConfig()], ids=lambda c: c.model_type
)
def test_models_that_would_be_read_wrongly(config):
    # DistilBERT's configuration knows no `is_decoder`.
    with pytest.raises(ValueError, match=rf"^model: 'x' .*\({config.model_type}\)"):
        check_decoder_only(config, "x")


def test_an_encoder_that_is_told_to_decode_passes():
    check_decoder_only(BertConfig(is_decoder=True), "bert")


def test_a_model_that_is_an_adapter(make_trainer, tmp_path):
    path = str(tmp_path / "lora")
    get_peft_model(tiny_llama(), tiny_lora(target_modules=["q_proj"])).save_pretrained(path)
    with pytest.raises(ValueError, match=f"^model: '{path}' is an adapter.*`rfa-llm merge` merges an adapter"):
        make_trainer(model=path)


def test_words_for_from_pretrained_that_are_no_object(tmp_path):
    with pytest.raises(ValueError, match="^model_init_kwargs: 'dtype=bfloat16' is no object; give names and values"):
        RFAConfig(output_dir=str(tmp_path), model_init_kwargs="dtype=bfloat16")


def test_a_model_without_a_name_needs_its_tokenizer(make_trainer):
    with pytest.raises(ValueError, match="^processing_class: a model without a name has no tokenizer to load"):
        make_trainer(processing_class=None)


def test_one_block_is_given_as_a_list(make_trainer):
    with pytest.raises(ValueError, match=r"^blocks: 2 is no list; give one, such as \[2\]"):
        make_trainer({"blocks": 2})


@pytest.mark.parametrize("loader", ["quantization_config", "model_init_kwargs"])
def test_loading_options_for_a_loaded_model(loader, make_trainer):
    config = {"model_init_kwargs": {"dtype": "bfloat16"}} if loader == "model_init_kwargs" else {}
    quantization = BitsAndBytesConfig(load_in_4bit=True) if loader == "quantization_config" else None
    with pytest.raises(ValueError, match="^model: it is loaded already, so quantization_config and model_init_kwargs"):
        make_trainer(config, quantization_config=quantization)


def test_a_teacher_beside_a_loaded_model(make_trainer):
    with pytest.raises(
        ValueError, match="^model: shift='ignorant' runs the teacher before .* a loaded LlamaForCausalLM"
    ):
        make_trainer({"shift": "ignorant", "teacher": "somewhere"}, model=tiny_llama())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LlamaConfig(vocab_size=60, hidden_size=64, num_hidden_layers=4), "has hidden_size=64, but the model 32"),
        (LlamaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=5), "has num_hidden_layers=5, but the model 4"),
        (LlamaConfig(vocab_size=70, hidden_size=32, num_hidden_layers=4), "has vocab_size=70, but the model 60"),
        (BertConfig(), r"is an encoder \(bert\)"),
    ],
    ids=["width", "depth", "vocabulary", "encoder"],
)
def test_a_teacher_of_another_kind_is_refused_without_its_weights(
    config, message, make_trainer, saved_llama, tmp_path
):
    teacher = str(tmp_path / "teacher")
    config.save_pretrained(teacher)
    with pytest.raises(ValueError, match=f"^teacher: '{teacher}' {message}"):
        make_trainer({"shift": "ignorant", "teacher": teacher}, model=saved_llama)


@pytest.mark.parametrize(("kind", "message"), [("nothing", "is no model "), ("an adapter", "is an adapter and no ")])
def test_a_teacher_that_is_no_model(kind, message, make_trainer, saved_llama, tmp_path):
    teacher = str(tmp_path / "teacher")
    if kind == "an adapter":
        tiny_lora().save_pretrained(teacher)
    with pytest.raises(ValueError, match=f"^teacher: '{teacher}' {message}.* give the folder or Hub id of the whole"):
        make_trainer({"shift": "ignorant", "teacher": teacher}, model=saved_llama)


def test_a_teacher_beside_a_shift_of_ones_own(make_trainer, saved_llama):
    with pytest.raises(ValueError, match="^teacher: 'nowhere' is not asked by a shift of your own; leave one"):
        make_trainer(
            {"shift": None, "teacher": "nowhere"}, model=saved_llama, shift=lambda reference, block: reference
        )


def test_a_teacher_that_nobody_asks():
    with pytest.raises(
        ValueError, match="^teacher: 'base' is asked by shift='ignorant' alone, but shift='local'; set"
    ):
        RFAConfig(teacher="base", shift="local")
    # What no shift was named for is `local` by now.
    with pytest.raises(ValueError, match="^teacher: 'base' is asked"):
        replace(RFAConfig(use_cpu=True), teacher="base")


def test_an_output_dir_that_holds_an_adapter(make_trainer, tmp_path):
    first = make_trainer()
    first.train()
    first.save_model()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="^output_dir: .*adapter' already holds an adapter.*set overwrite_output_dir"):
        make_trainer()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    make_trainer({"overwrite_output_dir": True})


def test_an_output_dir_that_is_a_file(make_trainer, tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(ValueError, match="^output_dir: .*note' is a file"):
        make_trainer({"output_dir": str(tmp_path / "note")})


def test_a_refused_call_leaves_nothing_behind(tokenizer, forget, retain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = RFAConfig(output_dir="adapter", shift="negate", blocks=[9], use_cpu=True)
    with pytest.raises(ValueError, match="out of range"):
        RFATrainer(tiny_llama(), args, forget, retain, processing_class=tokenizer)
    assert os.listdir() == []


def test_settings_of_another_kind_of_trainer(forget, retain, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match="^args: got a TrainingArguments; pass the trainer's own config, such as"):
        RFATrainer(tiny_llama(), args, forget, retain)


def test_a_token_beyond_the_models_embeddings(make_trainer, tokenizer):
    known = len(tokenizer)
    # As in many recipes, without the resize that belongs to it.
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(
        ValueError, match=rf"^processing_class: its token {known} \(.*PAD.*\) is beyond the model's {known}"
    ):
        make_trainer(processing_class=tokenizer)


def test_an_epoch_without_a_whole_step(make_trainer):
    config = {"per_device_train_batch_size": 7, "dataloader_drop_last": True, "max_steps": 2}
    with pytest.raises(ValueError, match="^dataloader_drop_last: the 6 forget rows are less than the 7 of a step"):
        make_trainer(config)


def test_what_a_trainer_has_and_this_one_has_not(make_trainer):
    trainer = make_trainer()
    with pytest.raises(ValueError, match="^create_model_card: `save_model` writes the card, with its receipt"):
        trainer.create_model_card()
    with pytest.raises(ValueError, match="^predict: there is nothing of it here; ask the model itself"):
        trainer.predict(trainer.train_dataset)


@pytest.mark.parametrize(
    "adapter",
    [
        tiny_lora(target_modules=["q_proj"], modules_to_save=["input_layernorm"]),
        IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[]),
    ],
    ids=["whole modules", "another kind"],
)
def test_branches_hold_nothing_beside_lora(adapter, make_trainer):
    with pytest.raises(ValueError, match="^residual: 'branch' needs LoRA alone, but .* is trained too; use 'feature'"):
        make_trainer({"residual": "branch"}, peft_config=adapter)


def last_good(trainer) -> dict[str, torch.Tensor]:
    """The adapter beside the failed run, loaded on a fresh model."""
    model = PeftModel.from_pretrained(tiny_llama(), Path(trainer.args.output_dir) / "last_good_adapter")
    weights = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    assert torch.isfinite(model(torch.arange(3, 9)[None]).logits).all()
    return weights


def not_finite_from_step(step):
    calls = []

    def shift(reference, block):
        calls.append(block)
        return torch.full_like(reference, float("nan") if len(calls) >= step else 0.1)

    return shift


class KeepSteps(TrainerCallback):
    """The adapter after each step."""

    def __init__(self):
        self.adapters = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.adapters.append({name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name})


def test_a_loss_that_is_not_finite_stops_the_run(make_trainer):
    steps = KeepSteps()
    trainer = make_trainer({"blocks": [1], "max_steps": 5}, shift=not_finite_from_step(3), callbacks=[steps])
    with pytest.raises(
        FloatingPointError,
        match=r"forget set is not finite at step 3; .* \(after step 1\) is in .*last_good_adapter; lower",
    ):
        trainer.train()
    # Step 2 saw finite losses, with the adapter as step 1 had left it.
    weights, expected = last_good(trainer), steps.adapters[0]
    assert weights.keys() == expected.keys() and len(steps.adapters) == 2
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


def test_a_learning_rate_that_is_far_too_high_stops_the_run(make_trainer):
    trainer = make_trainer({"learning_rate": 1e30, "max_steps": 5})
    with pytest.raises(
        FloatingPointError, match=r"on the forget and retain set is not finite at step 2; .*after step 0"
    ):
        trainer.train()
    last_good(trainer)


def test_a_loss_that_is_not_finite_right_after_a_resume_is_not_the_dtypes_fault(make_trainer):
    config = {"save_strategy": "steps", "save_steps": 2}
    make_trainer({**config, "max_steps": 2}, shift=not_finite_from_step(9)).train()
    trainer = make_trainer({**config, "max_steps": 4, "overwrite_output_dir": True}, shift=not_finite_from_step(1))
    with pytest.raises(FloatingPointError, match="at step 3, the first one since the checkpoint; go on from an older"):
        trainer.train(resume_from_checkpoint=True)


def test_a_loss_that_is_never_finite(make_trainer):
    trainer = make_trainer(shift=not_finite_from_step(1))
    with pytest.raises(FloatingPointError, match="on the forget set is not finite at step 1, before the adapter has"):
        trainer.train()
    assert not (Path(trainer.args.output_dir) / "last_good_adapter").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha: 5.0"),
        ({"save_only_model": True}, "save_strategy, save_only_model: .* would leave no checkpoint"),
        ({"num_train_epochs": 0}, "num_train_epochs: 0 trains nothing"),
        ({"eval_strategy": "epoch"}, "eval_strategy: .*epoch.* has no evaluation set"),
    ],
)
def test_inherited_settings_that_spoil_the_method_are_refused(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        RFAConfig(output_dir=str(tmp_path), **config)


@pytest.mark.parametrize("end", ["", "/"])
def test_a_teacher_that_is_the_model_itself(end, saved_llama, make_trainer):
    with pytest.raises(ValueError, match="teacher: .* is the model itself"):
        make_trainer({"shift": "ignorant", "teacher": saved_llama + end}, model=saved_llama)


@pytest.mark.parametrize("shift", [lambda h, block: h[:, :1], lambda h, block: 0])
def test_a_shift_of_ones_own_that_gives_no_shift(shift, make_trainer):
    with pytest.raises(ValueError, match=r"shift: the function gave .* for block \d; return a tensor \[\d+, 32\]"):
        make_trainer(shift=shift).train()


def test_an_adapter_that_the_last_step_broke_is_not_saved(make_trainer):
    trainer = make_trainer({"max_steps": 2})
    trainer.train()
    with torch.no_grad():
        next(p for p in trainer.model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="adapter is not finite after step 2.*last_good_adapter"):
        trainer.save_model()
    assert not (Path(trainer.args.output_dir) / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "rows.jsonl",
            '{"text": "a"}\n\n{"text": "b"\n',
            "forget_dataset .*rows.jsonl.* cannot be read .line 3: .*; give one JSON object a line",
        ),
        ("rows.json", '{"text": "a"}', "it is no list of rows.; give a list of JSON objects"),
        ("rows.jsonl", '["a"]\n', "row 0 is no object"),
        ("rows.jsonl", "\n", "forget_dataset is empty; give at least one row"),
        (
            "rows.csv",
            "question,answer\na,b,c\n",
            "row 0 .* more cells than the header.*; give a header and as many cells",
        ),
    ],
)
def test_a_file_that_cannot_be_read(name, text, message, tmp_path, make_trainer):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        make_trainer(forget_dataset=str(tmp_path / name))


def test_a_byte_order_mark_is_no_part_of_a_column(tmp_path):
    path = tmp_path / "excel.csv"
    path.write_text("question,answer\nw1,w2\n", encoding="utf-8-sig")
    assert load_rows(str(path), "forget_dataset").column_names == ["question", "answer"]


def test_processes_of_unlike_numbers_of_batches_and_batches_cut_by_others_are_refused(monkeypatch):
    """The first would wait for ever in the sum over all tokens of a step."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for settings in ({}, {"even_batches": False, "split_batches": True}):
        _check_launch(SimpleNamespace(world_size=2, accelerator_config=AcceleratorConfig(**settings)))
    with pytest.raises(ValueError, match="accelerator_config: even_batches=False may leave a process"):
        _check_launch(SimpleNamespace(world_size=2, accelerator_config=AcceleratorConfig(even_batches=False)))
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(ValueError, match="^accelerator_config: dispatch_batches would cut a batch between"):
        _check_launch(SimpleNamespace(world_size=1, accelerator_config=AcceleratorConfig(dispatch_batches=True)))


def test_several_gpus_of_one_process_are_for_a_model_that_is_spread_over_them(forget, retain, tokenizer, tmp_path):
    def trainer(model):
        args = RFAConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
        assert args.n_gpu <= 1
        args._n_gpu = 2
        return RFATrainer(model, args, forget, retain, processing_class=tokenizer)

    with pytest.raises(ValueError, match="^args: DataParallel .* would cut a batch between its forget and its retain"):
        trainer(tiny_llama())
    spread = tiny_llama()
    spread.hf_device_map = {"model": 0, "lm_head": 1}
    assert trainer(spread).args.n_gpu == 1


def test_an_adapters_own_dropout_stays(make_trainer):
    config = VeraConfig(vera_dropout=0.25, target_modules=["q_proj", "o_proj"], r=2)
    trainer = make_trainer(model=tiny_llama(attention_dropout=0.5), peft_config=config)
    attention = trainer.model.get_base_model().model.layers[0].self_attn
    assert attention.q_proj.vera_dropout["default"].p == 0.25 and attention.attention_dropout == 0.0
