"""The TOFU benchmark's rows (Maini et al., 2024, arXiv 2401.06121), from the Hub or from a folder of JSON Lines."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, load_dataset

from rfa_llm.data.formats import load_rows


def load_tofu(config: str, data_dir: str | None = None, field: str = "data_dir") -> Dataset:
    """One configuration of TOFU.

    Args:
        config: such as "full", "forget10", "retain90", "forget10_perturbed", "retain_perturbed" or
            "real_authors_perturbed".
        data_dir: a folder with one file `{config}.jsonl` for each configuration; None takes `locuslab/TOFU` from the
            Hub.
        field: the setting that the folder came from, named in errors.

    Returns:
        A Dataset with the columns `question` and `answer`; a perturbed configuration has `perturbed_answer` too (list
        of str), and that of a forget or retain set `paraphrased_answer`.

    Raises:
        ValueError: `data_dir` has no such file, or it cannot be read or has no rows.
    """
    if data_dir is None:
        return load_dataset("locuslab/TOFU", config, split="train")
    path = Path(data_dir) / f"{config}.jsonl"
    if not path.is_file():
        found = sorted(file.stem for file in Path(data_dir).glob("*.jsonl"))
        mend = f"give one of {found}" if found else "give the folder that holds TOFU's .jsonl files"
        raise ValueError(f"{field} {data_dir!r} has no {path.name} for config {config!r}; {mend}.")
    return load_rows(str(path), f"{field}'s {path.name}")


def load_question_sets(
    data_dir: str | None, facts_dir: str | None, forget_config: str, retain_config: str
) -> dict[str, Dataset]:
    """TOFU's four question sets, as `rfa_llm.evaluation.evaluate_tofu` takes them.

    Args:
        data_dir: as of `load_tofu`.
        facts_dir: the folder of the real authors and world facts, where it is not `data_dir`.
        forget_config, retain_config: such as "forget10_perturbed" and "retain_perturbed".

    Raises:
        ValueError: as from `load_tofu`.
    """
    facts = (data_dir, "data_dir") if facts_dir is None else (facts_dir, "facts_dir")
    return {
        "forget": load_tofu(forget_config, data_dir),
        "retain": load_tofu(retain_config, data_dir),
        "real_authors": load_tofu("real_authors_perturbed", *facts),
        "world_facts": load_tofu("world_facts_perturbed", *facts),
    }
