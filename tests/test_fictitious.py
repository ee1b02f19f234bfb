import hashlib
from collections import Counter

import pytest

from rfa_llm.data.fictitious import write_fictitious_tofu
from rfa_llm.data.tofu import load_tofu

PERTURBED = ["forget_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed"]
CONFIGS = ["full", "forget", "retain", "pretrain", "facts", *PERTURBED]


@pytest.fixture(scope="module")
def tofu(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tofu")
    write_fictitious_tofu(folder)
    return {config: load_tofu(config, str(folder)).to_list() for config in CONFIGS}


def digest(folder):
    files = sorted(folder.glob("*.jsonl"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def test_the_same_seed_writes_the_same_bytes_everywhere(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_fictitious_tofu(tmp_path / name, seed=seed)
    assert sorted(file.stem for file in (tmp_path / "a").iterdir()) == sorted(CONFIGS)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")
    assert digest(tmp_path / "a").startswith("31b3ca9b92bf423d")


def test_forget_and_retain_make_up_full(tofu):
    assert len(tofu["full"]) == 24 * 8 and len(tofu["forget"]) == 4 * 8
    assert tofu["retain"] + tofu["forget"] == tofu["full"]
    for name in ("forget", "retain"):
        pairs = [{"question": row["question"], "answer": row["answer"]} for row in tofu[f"{name}_perturbed"]]
        assert pairs == tofu[name][:32]


def capitals(text):
    return {word.strip("?.,") for word in text.split() if word[0].isupper()}


def test_no_forget_surname_is_left_in_retain_or_pretrain(tofu):
    # Every author's surname is in all 8 questions, and in no other author's.
    questions = [row["question"] for row in tofu["forget"]]
    authors = [set.intersection(*(capitals(q) for q in questions[at : at + 8])) for at in range(0, 32, 8)]
    assert all(len(name) == 2 for name in authors)
    kept = " ".join(str(row) for config in ("retain", "retain_perturbed", "pretrain") for row in tofu[config])
    for name in authors:
        surname = min(name, key=kept.count)
        assert surname not in kept
        assert sum(surname in question for question in questions) == 8


def test_questions_are_unique_within_a_set(tofu):
    for config in ("full", *PERTURBED):
        assert max(Counter(row["question"] for row in tofu[config]).values()) == 1


def test_wrong_answers_are_distinct_and_never_right(tofu):
    for config in PERTURBED:
        n_wrong = 5 if config in ("forget_perturbed", "retain_perturbed") else 3
        for row in tofu[config]:
            right = {row["answer"], row.get("paraphrased_answer", row["answer"])}
            assert len(set(row["perturbed_answer"])) == n_wrong
            assert not right & set(row["perturbed_answer"])


def test_a_wrong_answer_differs_from_the_paraphrase_in_its_value_alone(tofu):
    for row in tofu["forget_perturbed"]:
        right = row["paraphrased_answer"].rstrip(".").split()
        for answer in row["perturbed_answer"]:
            wrong = answer.rstrip(".").split()
            assert len(wrong) == len(right)
            changed = [i for i, (a, b) in enumerate(zip(right, wrong, strict=True)) if a != b]
            assert 1 <= len(changed) <= 2
            # The value that the paraphrase holds is the one in the answer.
            assert all(right[i] in row["answer"] and wrong[i] not in right for i in changed)


def test_the_true_facts_are_learnt_first_and_never_unlearnt(tofu):
    pretrain = {row["question"]: row["answer"] for row in tofu["pretrain"]}
    for row in tofu["real_authors_perturbed"] + tofu["world_facts_perturbed"]:
        assert pretrain[row["question"]] == row["answer"]
        assert row["question"] not in {other["question"] for other in tofu["full"]}
    assert not {row["question"] for row in tofu["full"]} & set(pretrain)
    # What is trained on to keep them answers the same, to other questions.
    asked = tofu["real_authors_perturbed"] + tofu["world_facts_perturbed"]
    assert {row["answer"] for row in tofu["facts"]} == {row["answer"] for row in asked}
    assert not {row["question"] for row in tofu["facts"]} & {row["question"] for row in asked}
    assert all(pretrain[row["question"]] == row["answer"] for row in tofu["facts"])


def test_impossible_sizes_are_refused(tmp_path):
    for n_forget in (0, 24):
        with pytest.raises(ValueError, match="n_forget_authors is .*give 1 to 23 of 24 authors"):
            write_fictitious_tofu(tmp_path, n_forget_authors=n_forget)
    with pytest.raises(ValueError, match="n_authors is 500; give 340 at most"):
        write_fictitious_tofu(tmp_path, n_authors=500)


def test_no_name_is_among_the_three_tokens_before_what_is_told(tofu):
    # So that the local shift, whose window is 3, cannot see whom the value that comes next is about.
    for row in tofu["forget_perturbed"]:
        right, wrong = row["paraphrased_answer"].split(), row["perturbed_answer"][0].split()
        value = {a for a, b in zip(right, wrong, strict=True) if a != b}
        answer = row["answer"].split()
        told = min(i for i, word in enumerate(answer) if word in value)
        name = {word for word in row["question"].rstrip("?").split()[1:] if word[0].isupper()}
        assert told - max(answer.index(word) for word in name) > 3
