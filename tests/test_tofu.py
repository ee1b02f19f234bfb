from pathlib import Path

import pytest

from rfa_llm.data.tofu import load_tofu

TOFU = Path(__file__).parents[2] / "shared" / "tofu"
needs_tofu = pytest.mark.skipif(not TOFU.is_dir(), reason="needs TOFU as JSON Lines in ../shared/tofu")


@needs_tofu
def test_the_sets_have_tofus_sizes_and_make_up_full():
    full, forget, retain = (load_tofu(config, str(TOFU)) for config in ("full", "forget10", "retain90"))
    assert (len(full), len(forget), len(retain)) == (4000, 400, 3600)
    assert retain.to_list() + forget.to_list() == full.to_list()
    assert full.column_names == ["question", "answer"]
    assert full.cache_files == []


@needs_tofu
@pytest.mark.parametrize(
    ("config", "n_rows", "n_wrong", "paraphrased"),
    [
        ("forget10_perturbed", 400, 5, True),
        ("retain_perturbed", 400, 5, True),
        ("real_authors_perturbed", 100, 3, False),
        ("world_facts_perturbed", 117, 3, False),
    ],
)
def test_the_perturbed_sets_have_their_wrong_answers(config, n_rows, n_wrong, paraphrased):
    rows = load_tofu(config, str(TOFU))
    assert len(rows) == n_rows
    assert {len(wrong) for wrong in rows["perturbed_answer"]} == {n_wrong}
    assert ("paraphrased_answer" in rows.column_names) == paraphrased


def test_a_missing_config_lists_those_there(tmp_path):
    for name in ("retain", "forget"):
        (tmp_path / f"{name}.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    assert load_tofu("forget", str(tmp_path)).to_list() == [{"question": "q", "answer": "a"}]
    with pytest.raises(
        ValueError, match=r"no forget10.jsonl for config 'forget10'; give one of \['forget', 'retain'\]"
    ):
        load_tofu("forget10", str(tmp_path))
