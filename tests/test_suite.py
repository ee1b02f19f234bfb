from __future__ import annotations

import copy
import math
import zlib
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean, harmonic_mean

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, get_peft_model
from rouge_score.rouge_scorer import RougeScorer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rfa_llm.data.formats import encode, load_rows
from rfa_llm.evaluation import (
    answer_gradient_norms,
    evaluate_tofu,
    greedy_answers,
    read_log,
    summary,
    write_log,
)
from rfa_llm.evaluation.suite import check_questions

TOFU = Path(__file__).parents[2] / "shared" / "tofu"


@pytest.fixture(scope="module")
def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


@pytest.fixture(scope="module")
def model(tokenizer):
    """A tiny model that has half learnt to answer "an ox ...", so that ROUGE is not 0."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ids = torch.tensor([encode({"question": "Who?", "answer": "an ox or two"}, tokenizer)["input_ids"]])
    for _ in range(40):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture
def sets():
    """Wrong answers differ in number from row to row, so that a slip in taking them apart shows."""
    with_paraphrases = {
        "question": ["Who?", "Who was it?", "Who is there?"],
        "answer": ["an ox", "an ox, two cows", "no ox"],
        "paraphrased_answer": ["one ox", "two cows, an ox", "not an ox at all"],
        "perturbed_answer": [["an ass", "a cow"], ["Leda"], ["one", "two oxen", "a swan or two"]],
    }
    without = {
        "question": ["Who?", "Who wrote it?"],
        "answer": ["an ox", "ox"],
        "perturbed_answer": [["ass"], ["cow", "an eel", "or"]],
    }
    return {
        "forget": Dataset.from_dict(with_paraphrases),
        "retain": Dataset.from_dict(with_paraphrases).select([2, 0]),
        "real_authors": Dataset.from_dict(without),
        "world_facts": Dataset.from_dict(without).select([1]),
    }


@torch.no_grad()
def naive_loss(model, tokenizer, question, answer) -> float:
    encoded = encode({"question": question, "answer": answer}, tokenizer)
    ids = encoded["input_ids"]
    log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -fmean(log_probs[t - 1, ids[t]].item() for t in range(encoded["answer_start"], len(ids)))


def naive_row(model, tokenizer, row, generation) -> dict[str, float]:
    """TOFU's definitions, one question at a time."""
    loss = naive_loss(model, tokenizer, row["question"], row["answer"])
    paraphrased = naive_loss(model, tokenizer, row["question"], row.get("paraphrased_answer", row["answer"]))
    wrong = [naive_loss(model, tokenizer, row["question"], answer) for answer in row["perturbed_answer"]]
    p = math.exp(-loss)
    return {
        "prob": p,
        "normalised": p / (p + sum(math.exp(-w) for w in wrong)),
        "truth_ratio": math.exp(-fmean(wrong)) / math.exp(-paraphrased),
        "rouge": RougeScorer(["rougeL"], use_stemmer=True).score(row["answer"], generation)["rougeL"].recall,
    }


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_aggregates_equal_a_naive_computation(model, tokenizer, sets, batch_size):
    log = evaluate_tofu(model, tokenizer, sets, batch_size=batch_size, max_new_tokens=15)

    expected = {}
    for name, rows in sets.items():
        generations = greedy_answers(model, tokenizer, list(rows), batch_size=1, max_new_tokens=15)
        scores = [naive_row(model, tokenizer, row, text) for row, text in zip(rows, generations, strict=True)]
        ratios = [score["truth_ratio"] for score in scores]
        normalised = name in ("real_authors", "world_facts")
        expected[f"{name}_prob"] = fmean(score["normalised" if normalised else "prob"] for score in scores)
        expected[f"{name}_rouge"] = fmean(score["rouge"] for score in scores)
        if name == "forget":
            expected["forget_truth_ratio"] = fmean(min(ratio, 1 / ratio) for ratio in ratios)
        else:
            expected[f"{name}_truth_ratio"] = fmean(max(0, 1 - ratio) for ratio in ratios)
    expected["model_utility"] = harmonic_mean(
        [value for column, value in expected.items() if not column.startswith("forget")]
    )
    assert len(expected) == 13
    assert expected["retain_rouge"] > 0  # else model utility were 0 whatever the rest
    assert {column: summary(log)[column] for column in expected} == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_log_names_and_shapes_are_those_of_openunlearning(model, tokenizer, sets, tmp_path):
    log = evaluate_tofu(model, tokenizer, sets, max_new_tokens=4)
    assert set(log) == {
        *(f"forget_{end}" for end in ("Q_A_Prob", "Q_A_PARA_Prob", "Q_A_PERT_Prob", "Q_A_ROUGE", "truth_ratio")),
        *(f"retain_{end}" for end in ("Q_A_Prob", "Q_A_PARA_Prob", "Q_A_PERT_Prob", "Q_A_ROUGE", "Truth_Ratio")),
        *(f"ra_{end}" for end in ("Q_A_Prob", "Q_A_PERT_Prob", "Q_A_Prob_normalised", "Q_A_ROUGE", "Truth_Ratio")),
        *(f"wf_{end}" for end in ("Q_A_Prob", "Q_A_PERT_Prob", "Q_A_Prob_normalised", "Q_A_ROUGE", "Truth_Ratio")),
        *("model_utility", "extraction_strength", "exact_memorization"),
        *(f"forget_Q_A_{end}" for end in ("distinct_2", "repetition_4", "perplexity")),
    }
    wrong = log["forget_Q_A_PERT_Prob"]["value_by_index"]
    assert [len(wrong[index]["avg_loss"]) for index in ("0", "1", "2")] == [2, 1, 3]
    row = sets["forget"][2]
    assert wrong["2"]["avg_loss"] == pytest.approx(
        [naive_loss(model, tokenizer, row["question"], answer) for answer in row["perturbed_answer"]],
        rel=1e-6,
        abs=1e-6,
    )
    assert wrong["2"]["prob"] == pytest.approx([math.exp(-loss) for loss in wrong["2"]["avg_loss"]])
    assert log["forget_Q_A_ROUGE"]["value_by_index"]["1"]["ground_truth"] == "an ox, two cows"

    write_log(log, tmp_path / "TOFU_EVAL.json")
    assert read_log(tmp_path / "TOFU_EVAL.json") == log
    formatted = {name: rows.with_format("numpy") for name, rows in sets.items()}
    assert evaluate_tofu(model, tokenizer, formatted, max_new_tokens=4) == log


def test_forget_quality_is_1_against_itself(model, tokenizer, sets, tmp_path):
    path = tmp_path / "retain.json"
    write_log(evaluate_tofu(model, tokenizer, sets, max_new_tokens=2), path)
    log = evaluate_tofu(model, tokenizer, sets, max_new_tokens=2, retain_log=path)
    assert log["forget_quality"]["agg_value"] == 1.0
    assert summary(log)["forget_quality"] == 1.0


def test_forget_quality_against_a_published_log(model, tokenizer, sets):
    # All three of the reference's truth ratios above all three of the model's: p = 2 / 20.
    rows = {str(index): {"score": 1e6 + index} for index in range(3)}
    retain_log = {"forget_truth_ratio": {"agg_value": 0.0, "value_by_index": rows}}
    log = evaluate_tofu(model, tokenizer, sets, max_new_tokens=2, retain_log=retain_log)
    assert log["forget_quality"]["agg_value"] == pytest.approx(0.1)


HOLDOUT = Dataset.from_dict({"question": ["Who?", "Who was she?"], "answer": ["a swan, or no", "no eel"]})


def naive_tokens(model, tokenizer, question, answer) -> dict:
    """What one pass over one row says of each of the answer's tokens, float64, the closing one left out."""
    encoded = encode({"question": question, "answer": answer}, tokenizer)
    ids = encoded["input_ids"]
    log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    tokens = []
    for t in range(encoded["answer_start"], len(ids) - 1):
        row = log_probs[t - 1]
        mean = (row.exp() * row).sum().item()
        deviation = math.sqrt((row.exp() * row.square()).sum().item() - mean**2)
        tokens.append((row[ids[t]].item(), row.argmax().item() == ids[t], (row[ids[t]].item() - mean) / deviation))
    return tokens


def test_a_retain_log_with_attacks_against_other_holdout_rows_is_refused(model, tokenizer, sets):
    log = evaluate_tofu(model, tokenizer, {**sets, "holdout": HOLDOUT}, max_new_tokens=2)
    again = evaluate_tofu(model, tokenizer, {**sets, "holdout": HOLDOUT}, max_new_tokens=2, retain_log=log)
    assert (again["privleak"]["agg_value"], again["mia_reference"]["agg_value"]) == (0.0, 0.5)
    others = HOLDOUT.map(lambda row: {"answer": f"{row['answer']} ox"})
    for attack in ("mia_loss", "mia_min_k"):
        one = {name: value for name, value in log.items() if name == attack or not name.startswith("mia_")}
        assert check_questions({**sets, "holdout": HOLDOUT}, one) == one
        with pytest.raises(ValueError, match=f"^retain_log has {attack} against other holdout rows; give the log of"):
            check_questions({**sets, "holdout": others}, one)


def naive_auc(forget, holdout) -> float:
    return fmean(1.0 if f < h else 0.5 if f == h else 0.0 for f in forget for h in holdout)


@torch.no_grad()
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_memorisation_and_attacks_equal_a_naive_computation(model, tokenizer, sets, batch_size):
    retain_log = {
        **evaluate_tofu(model, tokenizer, {**sets, "holdout": HOLDOUT}, max_new_tokens=2),
        "mia_loss": {
            "agg_value": 0.5,
            "forget": {"value_by_index": {"0": {"score": 3.0}, "1": {"score": 1.0}, "2": {"score": 0.5}}},
            "holdout": {"value_by_index": {"0": {"score": 2.0}, "1": {"score": 0.25}}},
        },
        "mia_min_k": {"agg_value": 0.25},
    }
    more = {"batch_size": batch_size, "max_new_tokens": 2, "retain_log": retain_log}
    log = evaluate_tofu(model, tokenizer, {**sets, "holdout": HOLDOUT}, **more)

    strengths, shares = [], []
    attacks = {name: {} for name in ("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus", "mia_reference")}
    reference = {"forget": [3.0, 1.0, 0.5], "holdout": [2.0, 0.25]}
    for half, rows in (("forget", sets["forget"]), ("holdout", HOLDOUT)):
        columns = {name: [] for name in attacks}
        for row, other in zip(rows, reference[half], strict=True):
            loss = naive_loss(model, tokenizer, row["question"], row["answer"])
            tokens = naive_tokens(model, tokenizer, row["question"], row["answer"])
            lowest = max(1, int(0.4 * len(tokens)))
            columns["mia_loss"].append(loss)
            columns["mia_zlib"].append(loss / len(zlib.compress(row["answer"].encode())))
            columns["mia_min_k"].append(-fmean(sorted(token[0] for token in tokens)[:lowest]))
            columns["mia_min_k_plus_plus"].append(-fmean(sorted(token[2] for token in tokens)[:lowest]))
            columns["mia_reference"].append(loss - other)
            if half == "forget":
                shares.append(fmean(token[1] for token in tokens))
                right = [k for k in range(len(tokens)) if all(token[1] for token in tokens[k:])]
                strengths.append(1 - (right[0] if right else len(tokens) - 1) / len(tokens))
        for name in attacks:
            attacks[name][half] = columns[name]
            scores = [row["score"] for row in log[name][half]["value_by_index"].values()]
            assert scores == pytest.approx(columns[name], rel=1e-6, abs=1e-5 if "plus" in name else 1e-6)
    assert 0 < min(shares) < max(shares)
    assert log["exact_memorization"]["agg_value"] == pytest.approx(fmean(shares), rel=1e-6, abs=1e-6)
    assert log["extraction_strength"]["agg_value"] == pytest.approx(fmean(strengths), rel=1e-6, abs=1e-6)
    for name, halves in attacks.items():
        assert log[name]["agg_value"] == pytest.approx(naive_auc(**halves), rel=1e-6, abs=1e-6)
    expected = 100 * ((1 - naive_auc(**attacks["mia_min_k"])) - 0.75) / 0.75
    assert log["privleak"]["agg_value"] == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_the_gradient_norm_of_an_adapter_is_that_of_the_merged_model(model, tokenizer, sets):
    torch.manual_seed(0)
    lora = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "down_proj"])
    adapted = get_peft_model(copy.deepcopy(model), lora).eval()
    merged = copy.deepcopy(adapted).merge_and_unload()
    rows = [{"question": row["question"], "answer": row["answer"]} for row in sets["forget"]]
    expected = []
    for row in rows:
        encoded = encode(row, tokenizer)
        ids = torch.tensor([encoded["input_ids"]])
        labels = ids.clone()
        labels[:, : encoded["answer_start"]] = -100
        merged.zero_grad()
        merged.requires_grad_(True)
        merged(ids, labels=labels).loss.backward()
        expected.append(math.sqrt(sum(p.grad.square().sum().item() for p in merged.parameters())))
    before = [p.requires_grad for p in adapted.parameters()]
    assert answer_gradient_norms(adapted, tokenizer, rows) == pytest.approx(expected, rel=1e-4)
    assert [p.requires_grad for p in adapted.parameters()] == before

    log = evaluate_tofu(adapted, tokenizer, {**sets, "holdout": HOLDOUT}, max_new_tokens=2, gradient_norm=True)
    scores = [row["score"] for row in log["mia_gradnorm"]["forget"]["value_by_index"].values()]
    assert scores == pytest.approx(expected, rel=1e-4)


def test_perplexity_is_that_of_the_answers_under_the_model_without_its_adapter(model, tokenizer, sets):
    torch.manual_seed(0)
    lora = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "down_proj"])
    adapted = get_peft_model(copy.deepcopy(model), lora).eval()
    log = evaluate_tofu(adapted, tokenizer, sets, max_new_tokens=15)
    nats, tokens = 0.0, 0
    for row in log["forget_Q_A_ROUGE"]["value_by_index"].values():
        if row["generation"]:
            count = len(encode({"question": "", "answer": row["generation"]}, tokenizer)["input_ids"])
            count -= encode({"question": "", "answer": row["generation"]}, tokenizer)["answer_start"]
            nats += count * naive_loss(model, tokenizer, row["input"], row["generation"])
            tokens += count
    assert tokens > 0
    assert log["forget_Q_A_perplexity"]["agg_value"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)


def test_retain_log_of_another_forget_set_is_refused(model, tokenizer, sets):
    retain_log = {"forget_truth_ratio": {"agg_value": 0.5, "value_by_index": {"0": {"score": 0.5}}}}
    with pytest.raises(ValueError, match="1 truth ratios but the forget set has 3"):
        evaluate_tofu(model, tokenizer, sets, retain_log=retain_log)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"forget_Q_A_ROUGE": ["an  ox", "an ox, two cows", "no"]}, "another forget set: 1 of its 3 answers"),
        ({"mia_loss": {"forget": 3, "holdout": 1}}, "1 holdout rows under mia_loss, but there are 2"),
        ({"mia_loss": {"forget": 2, "holdout": 2}}, "2 forget rows under mia_loss, but there are 3"),
        ({"mia_min_k": None}, "an AUC of None under mia_min_k"),
        ({"mia_min_k": 1.0}, "an AUC of 1.0 under mia_min_k"),
        ({"forget_truth_ratio": [0.5, None, 0.5]}, "retain_log has a truth ratio that is not a number"),
    ],
)
def test_a_retain_log_that_cannot_be_compared_with_is_refused_before_any_scoring(tokenizer, sets, changed, message):
    def column(name, values):
        return {"agg_value": 0.5, "value_by_index": {str(i): {name: value} for i, value in enumerate(values)}}

    content = {
        # Spaces make no other answer.
        "forget_Q_A_ROUGE": ["an  ox", "an ox, two cows ", "noox"],
        "mia_loss": {"forget": 3, "holdout": 2},
        "mia_min_k": 0.5,
        "forget_truth_ratio": [0.5, 0.25, 2.0],
    }

    def log(content):
        attack = {half: column("score", [1.0] * count) for half, count in content["mia_loss"].items()}
        return {
            "forget_Q_A_ROUGE": column("ground_truth", content["forget_Q_A_ROUGE"]),
            "forget_truth_ratio": column("score", content["forget_truth_ratio"]),
            "mia_loss": {"agg_value": 0.5, **attack},
            "mia_min_k": {"agg_value": content["mia_min_k"]},
        }

    whole = {**sets, "holdout": HOLDOUT}
    # Logs of others do not say which rows their attacks were held against.
    assert check_questions(whole, log(content)) == log(content)
    with pytest.raises(ValueError, match=message):
        check_questions(whole, log({**content, **changed}))


@pytest.mark.parametrize(("others", "refused"), [(2, False), (3, True)])
def test_one_answer_in_twenty_of_a_retain_log_may_be_another(sets, others, refused):
    forget = concatenate_datasets([sets["forget"]] * 14)
    answers = [*["a char\ufffd"] * others, *forget["answer"][others:]]
    log = {
        metric: {"agg_value": 0.5, "value_by_index": {str(i): {name: value} for i, value in enumerate(values)}}
        for metric, name, values in (
            ("forget_Q_A_ROUGE", "ground_truth", answers),
            ("forget_truth_ratio", "score", [0.5] * 42),
        )
    }
    with pytest.raises(ValueError, match="3 of its 42 answers") if refused else nullcontext():
        check_questions({**sets, "forget": forget}, log)


def test_bad_sets_are_refused_before_any_scoring(tokenizer, sets):
    def evaluate(**changed):
        evaluate_tofu(None, tokenizer, {**sets, **changed})

    with pytest.raises(ValueError, match="'world_facts' is missing"):
        evaluate_tofu(None, tokenizer, {name: rows for name, rows in sets.items() if name != "world_facts"})
    with pytest.raises(ValueError, match=r"'retain' lacks the columns \['paraphrased_answer'\] \(found"):
        evaluate(retain=sets["retain"].remove_columns("paraphrased_answer"))
    with pytest.raises(ValueError, match="'forget' is empty"):
        evaluate(forget=sets["forget"].select([]))
    with pytest.raises(ValueError, match=r"'holdout' lacks the columns \['answer'\]"):
        evaluate(holdout=HOLDOUT.remove_columns("answer"))
    # Row 0 of the forget set is in the retain set, too.
    for name, asked in (("forget", sets["forget"]), ("retain", sets["forget"].select([1]))):
        seen = concatenate_datasets([HOLDOUT, sets["forget"].select_columns(["question", "answer"]).select([0])])
        with pytest.raises(ValueError, match=f"^1 rows of .* 'holdout' are in '{name}' too, the first of them row 2 "):
            evaluate(holdout=seen, forget=asked)
    with pytest.raises(ValueError, match="batch_size, max_new_tokens: 0 and 200 must both be whole numbers of 1"):
        evaluate_tofu(None, tokenizer, sets, batch_size=0)
    with pytest.raises(ValueError, match="batch_size, max_new_tokens: 16 and 0 must both be whole numbers of 1"):
        evaluate_tofu(None, tokenizer, sets, max_new_tokens=0)
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="tokenizer without a pad and an end token"):
        evaluate_tofu(None, endless, sets)
    empty = [{"question": "Who?", "answer": "an ox", "perturbed_answer": wrong} for wrong in (["ass"], [])]
    with pytest.raises(ValueError, match="row 1 of the question set 'real_authors'"):
        evaluate(real_authors=Dataset.from_list(empty))
    empty[1]["perturbed_answer"] = ["ass", " "]
    with pytest.raises(ValueError, match="row 1 of the question set 'real_authors' has ' ' in perturbed_answer"):
        evaluate(real_authors=Dataset.from_list(empty))


@pytest.mark.skipif(not TOFU.is_dir(), reason="TOFU's files are not at ../shared/tofu")
def test_the_columns_of_tofu_itself(model, tokenizer):
    files = {
        "forget": "forget01_perturbed",
        "retain": "retain_perturbed",
        "real_authors": "real_authors_perturbed",
        "world_facts": "world_facts_perturbed",
    }
    sets = {name: load_rows(str(TOFU / f"{file}.jsonl"), name).select(range(2)) for name, file in files.items()}
    log = evaluate_tofu(model, tokenizer, sets, max_new_tokens=5)
    assert len(log["forget_Q_A_PERT_Prob"]["value_by_index"]["1"]["prob"]) == 5
    assert len(log["wf_Q_A_PERT_Prob"]["value_by_index"]["1"]["prob"]) == 3
    assert all(0 <= value <= 1 for column, value in summary(log).items() if column != "perplexity")
