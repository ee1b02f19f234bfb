from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_llama, tiny_rows, tiny_tokenizer
from datasets import Dataset, concatenate_datasets
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rfa_llm.benchmark import (
    Run,
    at_best_learning_rate,
    check_reference,
    check_settings,
    draw,
    runs,
    score_model,
    sees_holdout,
    table,
    train_and_score,
    unseen,
)
from rfa_llm.benchmark.picture import FLOOR, trade_off
from rfa_llm.cli import benchmark as cli_benchmark
from rfa_llm.cli.benchmark import BenchmarkArguments, benchmark
from rfa_llm.data.tofu import load_question_sets, load_tofu
from rfa_llm.evaluation import evaluate_tofu, summary

REPO = Path(__file__).parents[1]
METHODS = {
    "rfa": {"trainer": "rfa", "alpha": 2.0},
    "mine": {"trainer": "npo", "learning_rates": [1e-2], "lora": {"r": 4}},
}
SETTINGS = {
    "methods": METHODS,
    "learning_rates": [1e-3, 1e-2],
    "seeds": [0, 3],
    "max_steps": 4,
    "points": 2,
    "training": {"per_device_train_batch_size": 2},
    # Enough for some right answers on every set; otherwise the utility were 0.
    "finetuning": {"max_steps": 60, "per_device_train_batch_size": 8, "learning_rate": 1e-2},
    "max_new_tokens": 4,
    "use_cpu": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model, and questions in TOFU's format."""
    folder = tmp_path_factory.mktemp("benchmark")
    tiny_llama().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    (folder / "data").mkdir()

    def write(name: str, rows: list[dict]) -> None:
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        (folder / "data" / f"{name}.jsonl").write_text(text)

    sets = {"forget": list(tiny_rows(6, first=0)), "retain": list(tiny_rows(8, first=20))}
    facts = {"real_authors": list(tiny_rows(3, first=40)), "world_facts": list(tiny_rows(3, first=50))}
    sets["retain"] += facts["real_authors"] + facts["world_facts"]
    write("full", sets["forget"] + sets["retain"])
    for name, rows in {**sets, **facts}.items():
        write(name, rows)
        wrong = [
            {**row, "paraphrased_answer": f"{row['answer']} w1", "perturbed_answer": ["w2 w3", "w4"]} for row in rows
        ]
        write(f"{name}_perturbed", wrong)
    return folder


def arguments(folder, output_dir, **changes) -> BenchmarkArguments:
    paths = {"output_dir": str(output_dir), "data_dir": str(folder / "data"), "base_model": str(folder / "base")}
    return BenchmarkArguments(**{**SETTINGS, **paths, **changes})


@pytest.fixture(scope="module")
def finished(folder):
    benchmark(arguments(folder, folder / "out"))
    return folder / "out"


def read(file):
    return json.loads(file.read_text())


def question_sets(folder):
    return load_question_sets(str(folder / "data"), None, "forget_perturbed", "retain_perturbed")


def test_what_stops_by_itself_sees_other_holdout_rows_than_the_attacks(finished, folder, tmp_path, monkeypatch):
    # Most questions twice.
    rows = [*tiny_rows(11, first=60), *tiny_rows(8, first=60), *load_tofu("forget", str(folder / "data"))]
    (tmp_path / "holdout.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    given = []

    def recording(run, target, forget, retain, holdout, sets, *more):
        given.append((forget, retain, holdout, sets["holdout"]))
        return train_and_score(run, target, forget, retain, holdout, sets, *more)

    monkeypatch.setattr(cli_benchmark, "train_and_score", recording)
    settings = {"holdout_dataset": str(tmp_path / "holdout.jsonl"), "learning_rates": [1e-3], "seeds": [0]}
    settings |= {f"{name}_model": str(finished / "models" / name) for name in ("target", "retain")}
    settings["methods"] = {"rfa": {"trainer": "rfa", "stop_at": "calibrated", "calibration_steps": 2}}
    benchmark(arguments(folder, tmp_path / "out", **settings))
    ((forget, retain, stops, attacked),) = given
    seen, stop_rows, attack_rows = (
        set(of) for of in ([*forget["question"], *retain["question"]], stops["question"], attacked["question"])
    )
    assert stop_rows and attack_rows
    assert not stop_rows & attack_rows and not seen & (stop_rows | attack_rows)
    (result,) = (read(file) for file in (tmp_path / "out" / "results").glob("rfa_lr*.json"))
    assert {"mia_loss", "mia_min_k", "mia_reference", "privleak"} <= set(result["points"][-1]["summary"])

    # Other rows to stop by are another run; of the attacks' rows the results say so themselves.
    rows = [{**row, "answer": "w9"} if row["question"] in stop_rows else row for row in rows]
    (tmp_path / "holdout.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(ValueError, match=r"rfa_lr\S*.json is of the settings {'stop_rows': 'sha256:\S*'}, not {'"):
        benchmark(arguments(folder, tmp_path / "out", **settings))


def test_the_targets_result_is_held_against_the_retain_only_models(finished, folder, tmp_path):
    results = shutil.copytree(finished / "results", tmp_path / "results")
    for file in [*results.glob("*_lr*.json"), results / "retain-only.json"]:
        file.unlink()
    # Another retain-only model than the one that the target's forget quality is of.
    target = str(finished / "models" / "target")
    other = {"target_model": target, "retain_model": target, "results_dir": str(results)}
    with pytest.raises(ValueError, match="results: .*target.json was compared with another retain-only model"):
        benchmark(arguments(folder, tmp_path / "out", **other))


def test_runs_without_their_targets_result_are_refused(finished, folder, tmp_path):
    results = shutil.copytree(finished / "results", tmp_path / "results")
    (results / "target.json").unlink()
    with pytest.raises(ValueError, match="results: .* has mine_lr.*, but no target.json that would say which target"):
        benchmark(arguments(folder, finished, results_dir=str(results)))
    # Nor are those of another recipe, whose target would be another by the time that they are asked for.
    with pytest.raises(ValueError, match="results: .* has mine_lr.*, but no target.json that would say which target"):
        benchmark(arguments(folder, finished, results_dir=str(results), methods={"rfa": METHODS["rfa"]}))


def test_an_adapter_is_no_target(finished, folder, tmp_path):
    (adapter,) = finished.glob("runs/mine_lr0.01_seed0")
    with pytest.raises(ValueError, match="^target_model: .* is an adapter and no whole model"):
        benchmark(arguments(folder, tmp_path, target_model=str(adapter)))
    assert not list(tmp_path.iterdir())


def test_the_demos_models_are_made_once_and_compared(finished, folder, tmp_path, monkeypatch):
    def made(args, to):
        """As the demo leaves them, without its minutes of training."""
        shutil.copytree(finished / "models", to)
        shutil.copytree(folder / "data", to / "data")
        shutil.copy(folder / "data" / "world_facts.jsonl", to / "data" / "facts.jsonl")

    monkeypatch.setattr(cli_benchmark, "make_models", made)
    threads = torch.get_num_threads()
    # Models and data are made up.
    none = dict.fromkeys(("data_dir", "base_model", "finetuning"))
    args = arguments(folder, tmp_path / "out", demo_models=True, only=["mine"], seeds=[0], **none)
    text = benchmark(args)
    assert "| mine, last step | 0.01 | 4 | 1 |" in text
    # They are there, so they are not made again, over them.
    assert benchmark(args) == text
    torch.set_num_threads(threads)


def test_a_target_without_utility_is_refused(finished, folder, tmp_path):
    results = shutil.copytree(finished / "results", tmp_path / "results")
    content = read(results / "target.json")
    content["points"][0]["summary"]["model_utility"] = 0.0
    (results / "target.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="^target_model: .* has a model utility of 0, so nothing compares with it"):
        benchmark(arguments(folder, finished, results_dir=str(results)))


def test_a_method_may_have_an_adapter_of_its_own(finished):
    ranks = {file.parent.name.split("_")[0]: read(file)["r"] for file in finished.glob("runs/*/adapter_config.json")}
    assert ranks == {"rfa": 32, "mine": 4}


def test_every_learning_rate_runs_on_the_first_seed_and_the_best_on_the_others(finished):
    results = finished / "results"
    utility = read(results / "target.json")["points"][0]["summary"]["model_utility"]
    found = at_best_learning_rate([read(results / f"rfa_lr{rate:g}_seed0.json") for rate in (1e-3, 1e-2)], utility)
    best = found[0]["run"]["learning_rate"]
    names = {file.stem for file in results.glob("*.json")}
    runs_of_rfa = {"rfa_lr0.001_seed0", "rfa_lr0.01_seed0", f"rfa_lr{best:g}_seed3"}
    assert names == {"target", "retain-only", *runs_of_rfa, "mine_lr0.01_seed0", "mine_lr0.01_seed3"}
    assert (results / "table.md").exists()
    picture = (results / "picture.svg").read_text()
    assert all(f">{text}</text>" in picture for text in ("rfa", "mine", "target", "retain-only"))


def test_runs_of_another_time_stay_in_the_table(finished, folder):
    before = (finished / "results" / "table.md").read_text()
    picture = (finished / "results" / "picture.svg").read_bytes()
    # Nothing is left to run for it.
    after = benchmark(arguments(folder, finished, only=["mine"]))
    assert after == before == (finished / "results" / "table.md").read_text()
    assert (finished / "results" / "picture.svg").read_bytes() == picture
    with pytest.raises(ValueError, match="results: .*rfa_lr0.001_seed0.json is of the settings"):
        benchmark(
            arguments(folder, finished, only=["mine"], methods={**METHODS, "rfa": {"trainer": "rfa", "beta": 2}})
        )


def test_a_result_is_what_the_saved_adapter_scores(finished, folder):
    result = read(finished / "results" / "mine_lr0.01_seed3.json")
    assert [point["step"] for point in result["points"]] == [2, 4]
    assert result["points"][0]["summary"] != result["points"][1]["summary"]
    base = AutoModelForCausalLM.from_pretrained(finished / "models" / "target")
    model = PeftModel.from_pretrained(base, finished / "runs" / "mine_lr0.01_seed3")
    log = evaluate_tofu(
        model,
        tiny_tokenizer(),
        question_sets(folder),
        retain_log=finished / "logs" / "retain-only.json",
        max_new_tokens=4,
    )
    assert result["points"][1]["summary"] == pytest.approx(summary(log), abs=1e-6)
    assert not list((finished / "runs").glob("*/checkpoint-*"))
    # What is committed of a run tells none of the questions.
    assert load_tofu("forget", str(folder / "data"))[0]["question"] not in json.dumps(result)


def test_nothing_finished_is_repeated_and_other_settings_are_refused(finished, folder):
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*.json")}
    benchmark(arguments(folder, finished))
    assert {file: file.stat().st_mtime_ns for file in before} == before
    other = {"methods": {"rfa": {"trainer": "rfa", "alpha": 3.0}}}
    with pytest.raises(ValueError, match="rfa_lr0.001_seed0.json is of the settings .*'alpha': 2.0.* not .*3.0"):
        benchmark(arguments(folder, finished, **other))


@pytest.mark.parametrize(
    "results, config",
    [
        ("small", "small"),
        ("tofu800", "tofu800"),
        ("tofu800_60_steps", "tofu800"),
        ("tofu800_calibrated", "tofu800"),
        ("tofu800_rows_400", "tofu800"),
        ("tofu800_rows_400_60_steps", "tofu800"),
        ("tofu800_rows_400_calibrated", "tofu800"),
        ("tofu800_rows_500", "tofu800"),
        ("tofu800_rows_660", "tofu800"),
        ("tofu800_seeds", "tofu800"),
        ("tofu800_rows_400_seeds", "tofu800"),
        ("tofu800_rows_500_seeds", "tofu800"),
        ("tofu800_rows_660_seeds", "tofu800"),
        ("tofu800_rate", "tofu800"),
        ("tofu800_rows_400_rate", "tofu800"),
        ("tofu800_rows_500_rate", "tofu800"),
        ("tofu800_rows_660_rate", "tofu800"),
        ("tofu800_rows_660_variants", "tofu800_variants"),
        ("tofu800_rfa", "tofu800_rfa"),
    ],
)
def test_committed_results_are_of_their_config_and_todays_defaults(results, config):
    config = yaml.safe_load((REPO / f"configs/benchmark/{config}.yaml").read_text())
    files = [*(REPO / "benchmarks/results" / results).glob("*_lr*_seed*.json")]
    assert files
    for file in files:
        content = read(file)
        run = content["run"]
        settings = {"use_cpu": run["settings"]["use_cpu"], **config["training"], **config["methods"][run["method"]]}
        settings.pop("learning_rates", None)
        assert ("stop_rows" in run) == sees_holdout(settings)
        check_settings(Run(**{**run, "settings": settings}), content, file)
        check_reference(content, read(file.with_name("retain-only.json")), file)


@pytest.mark.parametrize(
    "folder", sorted(file.parent.name for file in (REPO / "benchmarks/results").glob("*/table.md"))
)
def test_committed_tables_and_pictures_are_those_of_their_results(folder, tmp_path):
    folder = REPO / "benchmarks/results" / folder
    models = {name: read(folder / f"{name}.json") for name in ("target", "retain-only")}
    models["retain-only"]["points"][0]["summary"].setdefault("forget_quality", 1.0)
    utility = models["target"]["points"][0]["summary"]["model_utility"]
    methods = {}
    for file in sorted(folder.glob("*_lr*_seed*.json")):
        content = read(file)
        methods.setdefault(content["run"]["method"], []).append(content)
    methods = {name: at_best_learning_rate(done, utility) for name, done in methods.items()}
    assert table(models, methods) == (folder / "table.md").read_text(encoding="utf-8")
    picture = (folder / "picture.svg").read_text(encoding="utf-8")
    # Methods stand in the order of their config.
    order = sorted(methods, key=lambda name: picture.index(f">{name}</text>"))
    draw(models, {name: methods[name] for name in order}, tmp_path / "picture.svg")
    assert (tmp_path / "picture.svg").read_text(encoding="utf-8") == picture


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("target", None, r"results: \S*target.json is no whole JSON file \(.*\); delete it"),
        ("retain-only", None, r"results: \S*retain-only.json is no whole JSON file"),
        ("rfa_lr0.001_seed0", None, r"results: \S*rfa_lr0.001_seed0.json is no whole JSON file"),
        ("rfa_lr0.001_seed0", "", r"results: \S*rfa_lr0.001_seed0.json is no whole JSON file"),
        ("rfa_lr0.001_seed0", "[]", r"results: \S*rfa_lr0.001_seed0.json is none that a benchmark wrote; delete it"),
        ("rfa_lr0.001_seed0", "{}", r"results: \S*rfa_lr0.001_seed0.json is no result of a run; delete it"),
    ],
)
def test_a_result_that_was_cut_short_is_named(name, text, message, finished, folder, tmp_path):
    results = shutil.copytree(finished / "results", tmp_path / "results")
    file = results / f"{name}.json"
    file.write_text(file.read_text()[:-20] if text is None else text)
    with pytest.raises(ValueError, match=message):
        benchmark(arguments(folder, finished, results_dir=str(results)))


def test_a_copy_of_a_result_is_no_other_seed(finished, folder, tmp_path):
    results = shutil.copytree(finished / "results", tmp_path / "results")
    shutil.copy(results / "mine_lr0.01_seed0.json", results / "mine_lr0.01_seed0 (1).json")
    with pytest.raises(ValueError, match=r"seed0 \(1\).json is not where the result of mine_lr0.01_seed0 would be"):
        benchmark(arguments(folder, finished, results_dir=str(results)))


def test_the_seeds_of_a_method_are_in_the_order_of_their_numbers(finished, folder, tmp_path, monkeypatch):
    results = shutil.copytree(finished / "results", tmp_path / "results")
    # As text, 10 comes before 2.
    for seed in (2, 10):
        content = read(results / "mine_lr0.01_seed3.json")
        content["run"]["seed"] = content["in_full"]["seed"] = seed
        (results / f"mine_lr0.01_seed{seed}.json").write_text(json.dumps(content))
    (results / "mine_lr0.01_seed0.json").unlink()
    drawn = []
    monkeypatch.setattr(cli_benchmark, "draw", lambda models, methods, path: drawn.append(methods["mine"]))
    benchmark(arguments(folder, finished, only=["rfa"], results_dir=str(results)))
    assert [one["run"]["seed"] for one in drawn[0]] == [2, 3, 10]


def test_what_a_kill_left_of_a_finished_run_is_removed(finished, folder, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    run = out / "runs" / "mine_lr0.01_seed0"
    for left in ("checkpoint-4", "points"):
        (run / left).mkdir()
        (run / left / "file").touch()
    benchmark(arguments(folder, out))
    assert {file.name for file in run.iterdir()} == {
        file.name for file in (finished / "runs" / "mine_lr0.01_seed0").iterdir()
    }


def test_a_result_of_another_default_is_refused(finished, folder, tmp_path):
    results = shutil.copytree(finished / "results", tmp_path / "results")
    file = results / "rfa_lr0.001_seed0.json"
    content = read(file)
    # What rfa's settings here say nothing of.
    assert content["in_full"]["lr_scheduler_type"] == "constant_with_warmup" and content["in_full"]["beta"] == 1
    content["in_full"]["lr_scheduler_type"] = "linear"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"seed0.json is of the settings {'lr_scheduler_type': 'linear'}, not {'lr_s"):
        benchmark(arguments(folder, finished, results_dir=str(results)))


@pytest.mark.parametrize(
    ("name", "lost", "message"),
    [
        ("retain-only", "compared_with", "results: .*retain-only.json does not hold what .* delete it to score"),
        ("rfa_lr0.001_seed0", "in_full", "results: .*rfa_lr0.001_seed0.json is of the settings .* delete it"),
    ],
)
def test_a_result_of_an_earlier_version_is_named(name, lost, message, finished, folder, tmp_path):
    results = shutil.copytree(finished / "results", tmp_path / "results")
    content = read(results / f"{name}.json")
    del content[lost]
    (results / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        benchmark(arguments(folder, finished, results_dir=str(results)))


def test_a_run_that_has_nothing_to_forget_ends_no_other(finished, folder, tmp_path):
    (tmp_path / "new.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in tiny_rows(12, first=60)))
    # The retain-only model never saw the forget set.
    settings = {f"{name}_model": str(finished / "models" / "retain") for name in ("target", "retain")}
    settings["methods"] = {"x": {"trainer": "rfa", "stop_at": "calibrated"}, "mine": METHODS["mine"]}
    settings |= {"holdout_dataset": str(tmp_path / "new.jsonl"), "learning_rates": [1e-3], "seeds": [0]}
    with pytest.raises(ValueError, match=r"^methods: there is no result of x_lr0.001_seed0 \(stop_at: .* no more"):
        benchmark(arguments(folder, tmp_path / "out", **settings))
    assert "| mine, last step |" in (tmp_path / "out" / "results" / "table.md").read_text()


def test_a_retain_only_model_to_which_all_forget_rows_look_known_has_no_privleak(finished, folder, tmp_path):
    (tmp_path / "new.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in tiny_rows(12, first=60)))
    # It saw them.
    settings = {f"{name}_model": str(finished / "models" / "target") for name in ("target", "retain")}
    settings |= {"holdout_dataset": str(tmp_path / "new.jsonl"), "seeds": [0], "only": ["mine"]}
    benchmark(arguments(folder, tmp_path / "out", **settings))
    results = tmp_path / "out" / "results"
    assert read(results / "retain-only.json")["compared_with"]["mia_min_k"]["agg_value"] == 1
    found = read(results / "mine_lr0.01_seed0.json")["points"][0]["summary"]
    assert "mia_min_k" in found and "privleak" not in found


@pytest.mark.parametrize("holdout, level", [(False, "goal_answer_loss"), (True, "retrained_answer_loss")])
def test_a_teacher_gets_holdout_rows_where_they_are_asked_for(holdout, level, finished, folder, tmp_path):
    models, data = finished / "models", str(folder / "data")
    settings = {"teacher": str(models / "retain"), "stop_at": "calibrated", "holdout": holdout, "use_cpu": True}
    run = Run("x", {"trainer": "rfa", **settings}, 1e-3, 0, 1, 1, "rows", {})
    sets = load_tofu("forget", data), load_tofu("retain", data)
    trainer = runs.make_trainer(run, str(models / "target"), *sets, tiny_rows(4, first=60), str(tmp_path / "run"))
    assert level in trainer.train().metrics
    if holdout:
        with pytest.raises(ValueError, match="holdout: 'x' is to see holdout rows, and none are given"):
            runs.make_trainer(run, str(models / "target"), *sets, None, str(tmp_path / "run"))
    else:
        # What is the default makes no other run.
        without = {name: value for name, value in run.settings.items() if name != "holdout"}
        assert runs.identity(run) == runs.identity(replace(run, settings=without))


@pytest.mark.parametrize("interrupted_at", [0, 1])
def test_an_interrupted_run_goes_on_to_the_same_result(finished, folder, tmp_path, monkeypatch, interrupted_at):
    settings = {"trainer": "rfa", "stop_at": "calibrated", "calibration_steps": 2}
    run = Run("rfa", {**settings, "per_device_train_batch_size": 2, "use_cpu": True}, 1e-2, 1, 4, 2, "rows", {})
    data = str(folder / "data")
    more = {
        "model": str(finished / "models" / "target"),
        "forget": load_tofu("forget", data),
        "retain": load_tofu("retain", data),
        "holdout": tiny_rows(4, first=60),
        "sets": question_sets(folder),
        "scoring": {"max_new_tokens": 4},
    }
    train_and_score(run, result=tmp_path / "whole.json", folder=tmp_path / "whole", **more)

    points = []

    def killed(*args, **kwargs):
        points.append(None)
        if len(points) == interrupted_at + 1:
            raise KeyboardInterrupt
        return evaluate_tofu(*args, **kwargs)

    monkeypatch.setattr(runs, "evaluate_tofu", killed)
    with pytest.raises(KeyboardInterrupt):
        train_and_score(run, result=tmp_path / "part.json", folder=tmp_path / "part", **more)
    assert not (tmp_path / "part.json").exists()
    # Nor does another run go on from there.
    for other in ({"max_steps": 2, "points": 1}, {"settings": {**run.settings, "alpha": 3.0}}, {"rows": "others"}):
        with pytest.raises(ValueError, match=r"^results: \S*part is of the settings .* delete it, or choose another"):
            train_and_score(replace(run, **other), result=tmp_path / "part.json", folder=tmp_path / "part", **more)
    train_and_score(run, result=tmp_path / "part.json", folder=tmp_path / "part", **more)
    # The interrupted scoring is made up for; no other is repeated.
    assert len(points) == 3
    assert read(tmp_path / "part.json")["points"] == read(tmp_path / "whole.json")["points"]
    whole, part = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(whole[name], part[name]) for name in whole)


def test_a_run_whose_loss_is_not_finite_ends_no_other(finished, folder, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    (out / "results" / "table.md").unlink()
    with pytest.raises(ValueError, match=r"^methods: there is no result of rfa_lr1e\+30_seed0 \(.* is NaN; .*\); t"):
        benchmark(arguments(folder, out, learning_rates=[1e30, 1e-3]))
    names = {file.name for file in (finished / "results").iterdir()}
    assert {file.name for file in (out / "results").iterdir()} == names
    assert (out / "results" / "table.md").read_text() == (finished / "results" / "table.md").read_text()


def result(rate: float, seed: int, qualities: list[float], utilities: list[float]) -> dict:
    points = [
        {"step": 5 * (i + 1), "summary": {**SUMMARY, "forget_quality": quality, "model_utility": utility}}
        for i, (quality, utility) in enumerate(zip(qualities, utilities, strict=True))
    ]
    computed = {"dtype": "float32", "machine": {"cpu": "an EPYC", "accelerator": None}}
    return {"method": "rfa", "run": {"learning_rate": rate, "seed": seed}, "points": points, **computed}


SUMMARY = {
    "forget_prob": 0.5,
    "forget_truth_ratio": 0.25,
    "forget_rouge": 0.125,
    "extraction_strength": 0.0625,
    "repetition_4": 0.0,
}
MODELS = {"target": result(0, 0, [1e-9], [0.5]), "retain-only": result(0, 0, [1.0], [0.5])}


def test_the_best_learning_rate_is_that_of_the_best_point():
    early = result(1e-3, 0, [0.9, 0.0], [0.5, 0.5])
    late = result(1e-2, 0, [0.5, 0.5], [0.5, 0.5])
    # Utility above the target's does not make up for forget quality.
    rich = result(1e-1, 0, [0.5, 0.5], [1.0, 1.0])
    assert at_best_learning_rate([early, late, rich], 0.5) == [early]


def test_learning_rates_are_compared_on_the_seed_that_has_most_of_them():
    # A lucky seed of one rate says nothing of the others.
    lucky = result(1e-2, 0, [0.9], [0.5])
    low, high = result(1e-3, 1, [0.6], [0.5]), result(1e-2, 1, [0.4], [0.5])
    assert at_best_learning_rate([lucky, low, high], 0.5) == [low]
    assert at_best_learning_rate([lucky, low, high, result(1e-3, 2, [0.1], [0.5])], 0.5)[0] is low


def test_the_table_has_the_best_step_and_the_last_with_median_mean_and_spread():
    method = [
        result(1e-3, 0, [0.5, 0.1], [0.5, 0.4]),
        result(1e-3, 1, [0.7, 0.3], [0.4, 0.5]),
        result(1e-3, 2, [0.2, 0.2], [0.45, 0.3]),
    ]
    lines = table(MODELS, {"rfa": method}).splitlines()
    cells = {line.split(" | ")[0]: line.split(" | ") for line in lines[2:]}
    assert cells["| rfa, best step"][1:7] == [
        "0.001",
        "5",
        "3",
        "0.5 (0.2 to 0.7)",
        "0.450 (0.400 to 0.500)",
        "0.900 (0.800 to 1.000)",
    ]
    assert cells["| rfa, last step"][4] == "0.2 (0.1 to 0.3)"
    assert cells["| target"][4:7] == ["1e-09", "0.500", "1.000"]


def test_the_table_has_the_best_methods_first_and_all_best_steps_before_the_last():
    methods = {
        "poor": [result(1e-3, 0, [0.1, 0.05], [0.5, 0.5])],
        "good": [result(1e-3, 0, [0.2, 0.9], [0.5, 0.5])],
        # The harmonic mean of 0.9 and 0.2 is 0.33, of 0.4 and 0.8 it is 0.53.
        "costly": [result(1e-3, 0, [0.9, 0.4], [0.1, 0.4])],
    }
    names = [line.split(" | ")[0].removeprefix("| ") for line in table(MODELS, methods).splitlines()[4:]]
    order = ["good", "costly", "poor"]
    assert names == [f"{name}, {which} step" for which in ("best", "last") for name in order]


def test_the_picture_has_every_point_in_its_place():
    methods = {"rfa": [result(1e-3, 0, [0.25, 1e-20], [0.4, 0.6]), result(1e-3, 1, [0.9], [0.9])]}
    lines = trade_off({**MODELS, "retain-only": result(0, 0, [1.0], [0.55])}, methods).axes[0].get_lines()
    trajectory, end, *marks = (line.get_xydata().ravel().tolist() for line in lines[:4])
    # From the target on, the first seed's; what lies too low is drawn on the floor.
    assert trajectory == pytest.approx([1.0, FLOOR, 0.8, 0.25, 1.2, FLOOR])
    assert end == trajectory[-2:]
    assert marks == [[1.0, FLOOR], pytest.approx([1.1, 1.0])]


def test_the_table_says_what_was_computed_where_and_leaves_out_what_a_seed_lacks():
    first, second = result(1e-3, 0, [0.5], [0.5]), result(1e-3, 1, [0.5], [0.5])
    first["points"][0]["summary"] = {**first["points"][0]["summary"], "privleak": 1.0}
    second |= {"dtype": "bfloat16", "machine": {"cpu": "a Xeon", "accelerator": "an H200"}}
    heading, _, target, _, row, _ = table(MODELS, {"rfa": [first, second]}).splitlines()
    cells = dict(zip(heading.split(" | "), row.split(" | "), strict=True))
    assert (cells["PrivLeak"], cells["computed in |"]) == ("-", "bfloat16, an H200; float32, an EPYC |")
    assert target.endswith(" | float32, an EPYC |")


def test_runs_that_stop_by_themselves_have_each_its_own_last_step():
    def rows(*results):
        return {line.split(" | ")[0]: line.split(" | ") for line in table(MODELS, {"rfa": results}).splitlines()[2:]}

    longer = result(1e-3, 1, [0.7, 0.3, 0.6], [0.4, 0.5, 0.5])
    cells = rows(result(1e-3, 0, [0.5, 0.1], [0.5, 0.4]), longer)
    assert cells["| rfa, best step"][2:5] == ["5", "2", "0.6 (0.5 to 0.7)"]
    assert cells["| rfa, last step"][2:5] == ["12.5 (10 to 15)", "2", "0.35 (0.1 to 0.6)"]
    # One that has stopped stays as it is.
    cells = rows(result(1e-3, 0, [0.5], [0.5]), {**longer, "points": longer["points"][1:]})
    assert cells["| rfa, best step"][2:5] == ["10 (5 to 15)", "2", "0.55 (0.5 to 0.6)"]


def test_target_and_retain_only_are_scored_once(finished, folder):
    file = finished / "results" / "target.json"
    before = file.stat().st_mtime_ns
    log = finished / "logs" / "target.json"
    of = (read(file)["rows"], read(file)["scored"])
    assert score_model("target", "nowhere", {}, *of, file, log, {}, may_be_missing=True) == read(file)
    # Of a target, on the Hub too, a result alone is not taken.
    with pytest.raises(OSError, match="(?i)not a (valid|local)|couldn't"):
        score_model("target", "nowhere", question_sets(folder), *of, file, log, {})
    assert file.stat().st_mtime_ns == before


def test_the_retain_only_model_is_needed_once(finished, folder, tmp_path):
    """Its result has all that later runs are compared with, and none of the text."""
    other = tmp_path / "out"
    shutil.copytree(finished / "models" / "target", other / "models" / "target")
    for name in ("target", "retain-only"):
        (other / "results").mkdir(exist_ok=True)
        shutil.copy(finished / "results" / f"{name}.json", other / "results")
    benchmark(arguments(folder, other, only=["mine"], seeds=[0]))
    assert not (other / "models" / "retain").exists()
    ours, before = (read(one / "results" / "mine_lr0.01_seed0.json")["points"] for one in (other, finished))
    assert ours == before
    log = read(finished / "logs" / "retain-only.json")
    kept = read(other / "results" / "retain-only.json")
    assert kept["compared_with"] == {name: log[name] for name in kept["compared_with"]}
    assert load_tofu("forget", str(folder / "data"))[0]["question"] not in json.dumps(kept)


def test_the_holdout_rows_are_those_that_no_model_saw():
    forget, retain, new = tiny_rows(3, first=0), tiny_rows(4, first=20), tiny_rows(9, first=60)
    mixed = concatenate_datasets([new.select(range(4)), forget, retain, new.select(range(4, 9))])
    questions = unseen(mixed, forget, retain)["question"]
    assert questions == new["question"]
    with pytest.raises(ValueError, match=r"holdout_dataset: its columns are \['text'\]; give rows of question and"):
        unseen(Dataset.from_list([{"text": "a"}]), forget, retain)
    with pytest.raises(ValueError, match="holdout_dataset: 0 of its 4 rows are in neither"):
        unseen(retain, forget, retain)
    with pytest.raises(ValueError, match="holdout_dataset row 1: answer is None; give text or drop the row"):
        unseen(Dataset.from_list([new[0], {**new[1], "answer": None}]), forget, retain)


def test_a_holdout_set_whose_questions_are_all_drawn_for_the_attacks(folder, tmp_path):
    first, second = tiny_rows(2, first=60)
    # Shuffled, the other question is among the first two.
    (tmp_path / "new.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in (first, first, second, first)))
    settings = {"holdout_dataset": str(tmp_path / "new.jsonl"), "base_model": "nowhere"}
    settings["methods"] = {"rfa": {"trainer": "rfa", "stop_at": "calibrated"}}
    with pytest.raises(ValueError, match="^holdout_dataset: the rows that are drawn for the membership attacks"):
        benchmark(arguments(folder, tmp_path / "out", **settings))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forget_perturbed_config": "retain_perturbed"}, "^forget_perturbed_config: 13 of its 14 questions are not"),
        ({"retain_perturbed_config": "forget_perturbed"}, "^retain_perturbed_config: 6 of its 6 rows are in the"),
        ({"retain_config": "full"}, "^forget_config, retain_config: 6 rows are in both sets; remove them from one"),
        ({"forget_perturbed_config": "forget"}, r"^the question set 'forget' lacks the columns \['paraphrased"),
        ({"forget_config": "texts"}, r"^forget_config: its columns are \['text'\]; give rows of question and answer"),
        ({"facts_dir": "nowhere"}, "^facts_dir 'nowhere' has no real_authors_perturbed.jsonl"),
        ({"forget_config": "empty"}, "^data_dir's empty.jsonl is empty; give at least one row"),
    ],
)
def test_rows_that_do_not_go_together_are_refused_before_any_training(changes, message, folder, tmp_path):
    data = shutil.copytree(folder / "data", tmp_path / "data")
    (data / "texts.jsonl").write_text('{"text": "w1 w2"}\n')
    (data / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=message):
        benchmark(arguments(folder, tmp_path / "out", data_dir=str(data), **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": None}, "methods: none is given"),
        ({"methods": {"rfa": {"alpha": 1.0}}}, "methods: 'rfa' is .* give it a `trainer`"),
        (
            {"methods": {"rfa": {"trainer": "rfa", "stop_at": "calibrated"}}},
            "holdout_dataset: none is given, and 'rfa' has stop_at='calibrated' and no teacher",
        ),
        (
            {"methods": {"rfa": {"trainer": "rfa", "teacher": "t", "stop_at": "calibrated", "holdout": True}}},
            "holdout_dataset: none is given, and 'rfa' has stop_at='calibrated' and holdout",
        ),
        ({"only": ["nop"]}, r"only: \['nop'\] are not among the methods"),
        ({"points": 3}, "points: 3 does not divide max_steps=4"),
        ({"max_steps": 4.0}, "points: 2 does not divide max_steps=4.0; give whole numbers that do"),
        ({"seeds": []}, "learning_rates, seeds: both need at least one"),
        ({"seeds": [0, -1]}, "seeds: -1 is no seed; give whole numbers from 0 to 4294967295"),
        ({"seeds": [0.5]}, "seeds: 0.5 is no seed"),
        ({"learning_rates": [1e-2, -1.0]}, "learning_rates: -1.0 is no finite number above 0"),
        ({"methods": ["rfa"]}, r"methods: \['rfa'\] is no mapping; give names with their values"),
        ({"training": [1]}, r"training: \[1\] is no mapping"),
        (
            {"methods": {"r[1]": {"trainer": "rfa"}}},
            r"methods: 'r\[1\]' becomes part of file names; give text .* letters",
        ),
        ({"methods": {"rfa": {"trainer": "rfa", "lora": 4}}}, "methods: 'rfa' has lora: 4; give fields of LoraConfig"),
        ({"methods": {"rfa": {"trainer": "rfa", "learning_rates": []}}}, r"has learning_rates: \[\]; give a list"),
        ({"data_dir": None}, "data_dir: no data is given"),
        (
            {"demo_models": True},
            "demo_models: it makes up models and data and would not read base_model, finetuning",
        ),
        ({"max_new_tokens": 0}, "batch_size, max_new_tokens: 16 and 0 must both be whole numbers of 1 or more"),
        ({"batch_size": 8.0}, "batch_size, max_new_tokens: 8.0 and 4 must both be whole numbers of 1 or more"),
        ({"results_dir": 5}, "results_dir: 5 is no text; give a path"),
        ({"data_dir": 5}, "data_dir: 5 is no text; give a path"),
        ({"seeds": [True]}, "seeds: True is no seed"),
        ({"learning_rates": [float("inf")]}, "learning_rates: inf is no finite number above 0"),
        ({"only": [1, "a"]}, r"only: \[1, 'a'\] are not among the methods"),
        ({"methods": {1: {"trainer": "rfa"}}}, "methods: 1 becomes part of file names; give text .in quotes"),
        (
            {"methods": {"_x": {"trainer": "rfa"}}},
            "methods: '_x' becomes part of file names; .* a letter or digit first",
        ),
        ({"methods": {"target": {"trainer": "rfa"}}}, "methods: 'target' is the name of a row of the table already"),
        ({"methods": {"x": {"trainer": ["npo"]}}}, "methods: 'x' is {'trainer': .* give it a `trainer`"),
        ({"training": {"lora": 4}}, "methods: 'rfa' has lora: 4; give fields of LoraConfig"),
    ],
)
def test_bad_arguments_are_refused(folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(folder, tmp_path, **changes)


def test_a_model_that_is_not_there_is_refused_by_its_setting(folder, tmp_path):
    with pytest.raises(ValueError, match="^target_model: 'no/such/model' is no model .there is no such folder.; give"):
        benchmark(arguments(folder, tmp_path, target_model="no/such/model"))
    assert not list(tmp_path.iterdir())


def test_a_missing_model_without_a_base_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="base_model: .*target is missing"):
        benchmark(arguments(folder, tmp_path, base_model=None))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainer": "npoo"}, "methods: 'x' has the trainer 'npoo', which is not known; use 'rfa' or one of"),
        ({"trainer": "npo", "alpah": 2.0}, "methods: 'x' has 'alpah', which is no field of RivalConfig; docs/api"),
        ({"trainer": "rfa", "alpah": 2.0}, "has 'alpah', which is no field of RFAConfig; did you mean 'alpha'[?]"),
        ({"trainer": "rfa", "holdout": True}, "methods: 'x' has holdout, but no stop_at"),
        ({"trainer": "rfa", "max_steps": 2}, "methods: 'x' has 'max_steps', which the comparison sets by itself"),
        ({"trainer": "rfa", "alpha": "2e0"}, "methods: 'x' has 'alpha' as the text '2e0'; YAML sees a number where"),
        (
            {"trainer": "rfa", "learning_rates": 1e-3},
            r"methods: 'x' has learning_rates: 0.001; give a list, such as \[",
        ),
        ({"trainer": "rfa", "learning_rates": ["1e-3"]}, "learning_rates: '1e-3' is no number with a dot"),
        ({"trainer": "rfa", "gradient_accumulation_steps": 0}, "gradient_accumulation_steps: 0 is not positive"),
        ({"trainer": "npo", "lora": {"lora_dropout": "5e-2"}}, "'x' has lora with 'lora_dropout' as the text '5e-2'"),
        ({"trainer": "npo", "lora": {"rr": 4}}, r"methods: 'x' has lora: {'rr': 4} \(.*\); give fields of LoraConfig"),
        ({"trainer": "npo", "lora": {"r": 0}}, r"methods: 'x' has lora: {'r': 0} \(peft_config: r=0 is no rank"),
        ({"trainer": "npo", "lora": {"bias": "all"}}, r"methods: 'x' has lora: .* \(peft_config: bias='all' trains"),
    ],
)
def test_a_wrong_setting_is_refused_before_any_training(settings, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        benchmark(arguments(folder, tmp_path, methods={**METHODS, "x": settings}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finetuning": {"learning_rate": "1e-2"}}, "^finetuning: it has 'learning_rate' as the text '1e-2'; YAML"),
        ({"finetuning": {"max_step": 4}}, "^finetuning: .*'max_step'; give settings of `rfa-llm finetune`"),
        ({"training": {"learning_rates": [5e-3]}}, "^methods: 'rfa' has 'learning_rates', which is no field of RFAC"),
    ],
)
def test_a_wrong_recipe_is_refused_before_any_training(changes, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        benchmark(arguments(folder, tmp_path, **changes))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("setting", ["output_dir", "results_dir"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_any_training(setting, folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"^{setting}: .*file/folder cannot be written to; give another folder"):
        benchmark(arguments(folder, **{"output_dir": tmp_path / "out", setting: str(tmp_path / "file" / "folder")}))
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": "nowhere"}, "^methods: 'x' has teacher: 'nowhere' is no model .* the checkpoint from before"),
        ({"blocks": [99]}, "^blocks: 99 is out of range for a model of 4 blocks"),
    ],
)
def test_a_setting_that_the_models_do_not_have_is_refused_before_any_run(
    settings, message, finished, folder, tmp_path
):
    methods = {"y": METHODS["mine"], "x": {"trainer": "rfa", **settings}}
    models = {f"{name}_model": str(finished / "models" / name) for name in ("target", "retain")}
    with pytest.raises(ValueError, match=message):
        benchmark(arguments(folder, tmp_path / "out", methods=methods, **models))
    assert not (tmp_path / "out").exists()


def test_results_and_models_of_other_rows_are_refused(finished, folder, tmp_path):
    data = shutil.copytree(folder / "data", tmp_path / "data")
    other = {"data_dir": str(data), "results_dir": str(finished / "results")}
    # As many rows, and one of them of other words.
    forget = (data / "forget.jsonl").read_text()
    first, _, others = forget.partition("\n")
    (data / "forget.jsonl").write_text(f"{json.dumps({**json.loads(first), 'answer': 'w1'})}\n{others}")
    with pytest.raises(ValueError, match="results: .*retain-only.json is of other forget, retain or question rows"):
        benchmark(arguments(folder, finished, **other))
    (data / "forget.jsonl").write_text(forget)
    assert benchmark(arguments(folder, finished, **other)) == (finished / "results" / "table.md").read_text()
    (data / "full.jsonl").write_text(forget)
    with pytest.raises(ValueError, match="output_dir: .*target was not fine-tuned from .* on the rows that full has"):
        benchmark(arguments(folder, finished, **other))
    for changed in ({"base_model": "another"}, {"finetuning": {"max_steps": 61}}):
        with pytest.raises(ValueError, match="output_dir: .*target was not fine-tuned from base_model="):
            benchmark(arguments(folder, finished, **changed))


def test_results_of_other_models_or_scored_otherwise_are_refused(finished, folder, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    with pytest.raises(ValueError, match=r"retain-only.json was scored with {'max_new_tokens': 4, .* not with .* 5"):
        benchmark(arguments(folder, out, max_new_tokens=5))
    (tmp_path / "new.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in tiny_rows(9, first=60)))
    with pytest.raises(ValueError, match=r"retain-only.json was scored with .*'holdout': None}, not with .*'sha256:"):
        benchmark(arguments(folder, out, holdout_dataset=str(tmp_path / "new.jsonl")))
    # The same model in another dtype is the same; in bfloat16 as a GPU would score it.
    target, retain_only = out / "models" / "target", out / "models" / "retain"
    AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16).save_pretrained(target)
    benchmark(arguments(folder, out))
    shutil.copy(retain_only / "model.safetensors", target)
    with pytest.raises(ValueError, match=r"results: \S*target.json is of another model than \S*target \("):
        benchmark(arguments(folder, out))


def test_results_compared_with_another_retain_only_model_are_refused(finished, folder, tmp_path):
    results = shutil.copytree(finished / "results", tmp_path / "results")
    content = read(results / "retain-only.json")
    rows = content["compared_with"]["forget_truth_ratio"]["value_by_index"]
    for index, row in rows.items():
        row["score"] *= 10 ** int(index)
    (results / "retain-only.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"rfa_lr\S*.json was compared with another retain-only model than"):
        benchmark(arguments(folder, finished, results_dir=str(results), retain_model="nowhere"))


def test_a_result_that_does_not_belong_here_is_named_before_any_training(finished, folder, tmp_path):
    results = shutil.copytree(finished / "results", tmp_path / "results")
    stale = read(results / "mine_lr0.01_seed0.json")
    stale["run"]["max_steps"] = 2
    stale["run"]["seed"] = stale["in_full"]["seed"] = 5
    (results / "mine_lr0.01_seed5.json").write_text(json.dumps(stale))
    (results / "rfa_lr0.001_seed0.json").unlink()
    with pytest.raises(ValueError, match=r"mine_lr0.01_seed5.json is of the settings .*'max_steps': 2"):
        benchmark(arguments(folder, finished, results_dir=str(results)))
    assert not (results / "rfa_lr0.001_seed0.json").exists()


def test_the_rate_of_the_other_seeds_is_chosen_among_all_that_have_run(finished, folder, tmp_path):
    """Of two calls with a rate each, the second's seeds run at the better one of both."""
    results = shutil.copytree(finished / "results", tmp_path / "results")
    utility = read(results / "target.json")["points"][0]["summary"]["model_utility"]
    files = {rate: results / f"rfa_lr{rate:g}_seed0.json" for rate in (1e-3, 1e-2)}
    best = at_best_learning_rate([read(file) for file in files.values()], utility)[0]["run"]["learning_rate"]
    (other,) = set(files) - {best}
    text = benchmark(
        arguments(folder, finished, results_dir=str(results), only=["rfa"], learning_rates=[other], seeds=[0, 3])
    )
    assert not (results / f"rfa_lr{other:g}_seed3.json").exists()
    assert f"| rfa, last step | {best:g} | 4 | 2 |" in text
    # A seed that came first, or is named first, does not hide the rates of another.
    text = benchmark(
        arguments(folder, finished, results_dir=str(results), only=["rfa"], learning_rates=[other], seeds=[2, 0])
    )
    assert f"| rfa, last step | {best:g} | 4 | 2 |" in text


def test_a_model_whose_making_was_cut_short_is_made_again(finished, folder, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    target = out / "models" / "target"
    # What a kill leaves: `save_pretrained` writes config.json first. `left` stands for files of the cut run.
    target.rename(target.with_name("target.unfinished"))
    (out / "models/target.unfinished/model.safetensors").unlink()
    (out / "models/target.unfinished/left").touch()
    benchmark(arguments(folder, out))
    whole = finished / "models" / "target"
    assert {file.name: file.read_bytes() for file in target.iterdir()} == {
        file.name: file.read_bytes() for file in whole.iterdir()
    }
    assert not target.with_name("target.unfinished").exists()


def test_a_method_whose_name_begins_with_another_s(finished, folder, tmp_path):
    results = shutil.copytree(finished / "results", tmp_path / "results")
    for file in results.glob("mine_lr*.json"):
        content = read(file)
        content["method"] = content["run"]["method"] = "rfa_lr_slow"
        (results / file.name.replace("mine", "rfa_lr_slow")).write_text(json.dumps(content))
        file.unlink()
    methods = {"rfa": METHODS["rfa"], "rfa_lr_slow": METHODS["mine"]}
    assert "| rfa_lr_slow, best step |" in benchmark(
        arguments(folder, finished, methods=methods, results_dir=str(results))
    )
