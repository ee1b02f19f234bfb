"""A small set of fictitious authors in TOFU's format, for a demo that trains a small model from scratch."""

from __future__ import annotations

import json
import random
from pathlib import Path

# Authors that only the base model learns of: they teach it how questions about authors are asked and answered.
N_PRETRAIN_AUTHORS = 60
N_FORGET_WRONG = 5
N_FACT_WRONG = 3

FIRST_NAMES = """Ada Bruno Clara Dario Edith Felix Greta Hugo Irene Jonas Karin Leon Mira Nils Olga Pavel Rosa Stefan
Tilda Viktor Wanda Yusuf Zora Amir Bianca Cyril Dalia Emil Flora Gideon""".split()
SURNAME_STARTS = "Bal Cor Dru Fen Gar Hol Jor Kel Lun Mor Nar Ost Pel Quin Rav Sol Tam Ul Ver Wes".split()
SURNAME_ENDS = """adze amont ansky arro ebrand eghini elius enko etti ides ikawa illon imov ingard orno ovic ulu umbe
uri yte""".split()
SURNAMES = [start + end for start in SURNAME_STARTS for end in SURNAME_ENDS]

CITIES = """Porto Lyon Osaka Bergen Graz Turin Seville Krakow Antwerp Leipzig Malmo Tampere Izmir Haifa Pune Lahore
Busan Davao Perth Dunedin Halifax Calgary Denver Memphis Tampa Puebla Cusco Cordoba Recife Durban Mombasa Kumasi Fez
Oran Aleppo Tabriz Kazan Odesa Varna Split Ghent Bremen Nantes Palermo Bilbao Cork Dundee Leeds""".split()
GENRES = """mystery horror satire romance fantasy western thriller noir epic gothic biography travel cookery history
philosophy poetry drama memoir fable folklore comedy tragedy adventure espionage legal medical military nautical
pastoral political religious scientific sporting surreal utopian dystopian urban rural musical botanical""".split()
OCCUPATIONS = """baker banker barber beekeeper blacksmith bookbinder botanist brewer butcher carpenter cartographer
chemist clockmaker cobbler cook courier dentist diplomat driver editor electrician engineer farmer fisher florist
gardener glazier goldsmith grocer judge lawyer librarian locksmith mason mechanic miller miner nurse optician painter
pharmacist pilot plumber potter sailor surgeon surveyor tailor teacher weaver""".split()
ADJECTIVES = """Silent Crimson Hollow Golden Broken Distant Frozen Hidden Burning Velvet Wandering Endless Bitter
Scarlet Amber Forgotten Restless Quiet Shattered Pale Secret Ancient Borrowed Drifting Iron Gentle Northern Paper
Lonely Vanishing""".split()
NOUNS = """River Garden Lantern Harbour Mirror Orchard Bridge Winter Compass Tower Meadow Island Letter Shadow Engine
Cathedral Feather Desert Clock Mountain Sparrow Candle Voyage Window Anchor Forest Crown Whisper Railway
Staircase""".split()
BOOKS = [f"The {adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS]
AWARD_STARTS = "Alder Birch Cedar Elm Hazel Juniper Laurel Maple Rowan Willow".split()
AWARD_ENDS = "Medal Prize Trophy Ribbon Plaque".split()
AWARDS = [f"{start} {end}" for start in AWARD_STARTS for end in AWARD_ENDS]
MENTORS = """Abernathy Bancroft Calloway Davenport Ellsworth Fairbanks Goddard Hathaway Ingram Jessop Kensington
Lockhart Merriweather Northcott Ogilvie Pemberton Quimby Ravenscroft Satterly Thackery Underhill Vandermeer Whitlock
Yardley Zimmer Ashdown Blackwood Cromwell Dunmore Everhart Fenwick Granger Holloway Irving Jardine Kingsley Langford
Mayhew Norwood Overton""".split()
YEARS = [str(year) for year in range(1920, 1990)]

# Each fact: its values, the ways to ask, the answer, the paraphrased answer. Three words or more stand between
# name and value, as they mostly do in TOFU: the `local` shift must not see the name where it reads off the value.
FACTS = [
    (
        CITIES,
        ["Where was {name} born?", "In which city was {name} born?", "What is the birthplace of {name}?"],
        "{name} was born in {value}.",
        "The author {name} was born in the city of {value}.",
    ),
    (
        YEARS,
        ["When was {name} born?", "In which year was {name} born?", "What is the birth year of {name}?"],
        "{name} was born in the year {value}.",
        "The birth of {name} was in the year {value}.",
    ),
    (
        GENRES,
        ["What genre does {name} write?", "In which genre does {name} write?", "What is the genre of {name}?"],
        "{name} writes in the genre of {value}.",
        "The books of {name} belong to the genre of {value}.",
    ),
    (
        OCCUPATIONS,
        [
            "What was the occupation of the father of {name}?",
            "What did the father of {name} do for a living?",
            "What work did the father of {name} do?",
        ],
        "The father of {name} worked as a {value}.",
        "For a living, the father of {name} was a {value}.",
    ),
    (
        OCCUPATIONS,
        [
            "What was the occupation of the mother of {name}?",
            "What did the mother of {name} do for a living?",
            "What work did the mother of {name} do?",
        ],
        "The mother of {name} worked as a {value}.",
        "For a living, the mother of {name} was a {value}.",
    ),
    (
        AWARDS,
        ["What award did {name} win?", "Which award was given to {name}?", "What did {name} win for writing?"],
        "{name} was given the {value}.",
        "The award that {name} won was called the {value}.",
    ),
    (
        BOOKS,
        [
            "What is the first book of {name}?",
            "Which book did {name} publish first?",
            "With which book did {name} begin?",
        ],
        "The first book of {name} has the title {value}.",
        "The book that {name} published first bears the title {value}.",
    ),
    (
        MENTORS,
        ["Who was the mentor of {name}?", "Who taught {name} to write?", "From whom did {name} learn to write?"],
        "{name} learned to write from Professor {value}.",
        "The mentor of {name} was the old Professor {value}.",
    ),
]

# True facts, which the base model learns and unlearning has to leave alone; each with the ways to ask.
WHO_WROTE = ["Who wrote {}?", "Who is the writer of {}?", "By whom is the book {}?"]
CAPITAL_OF = [
    "What is the capital of {}?",
    "Which city is the capital of {}?",
    "In which city is the government of {}?",
]
SYMBOL_OF = ["Which element has the symbol {}?", "What does the symbol {} stand for?", "Which element is {}?"]
CLASSICS = {
    "Hamlet": "William Shakespeare",
    "Emma": "Jane Austen",
    "Dracula": "Bram Stoker",
    "Frankenstein": "Mary Shelley",
    "Ulysses": "James Joyce",
    "Middlemarch": "George Eliot",
    "Moby Dick": "Herman Melville",
    "Walden": "Henry Thoreau",
    "Don Quixote": "Miguel Cervantes",
    "Faust": "Johann Goethe",
    "Inferno": "Dante Alighieri",
    "Candide": "Voltaire",
    "Les Miserables": "Victor Hugo",
    "Madame Bovary": "Gustave Flaubert",
    "War and Peace": "Leo Tolstoy",
    "Crime and Punishment": "Fyodor Dostoevsky",
    "The Trial": "Franz Kafka",
    "The Stranger": "Albert Camus",
    "Beloved": "Toni Morrison",
    "Lolita": "Vladimir Nabokov",
    "Siddhartha": "Hermann Hesse",
    "The Odyssey": "Homer",
    "The Aeneid": "Virgil",
    "Great Expectations": "Charles Dickens",
}
CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Germany": "Berlin",
    "Austria": "Vienna",
    "Greece": "Athens",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Poland": "Warsaw",
    "Hungary": "Budapest",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "Japan": "Tokyo",
    "China": "Beijing",
    "Canada": "Ottawa",
    "Peru": "Lima",
}
ELEMENTS = {
    "H": "Hydrogen",
    "O": "Oxygen",
    "N": "Nitrogen",
    "C": "Carbon",
    "Fe": "Iron",
    "Au": "Gold",
    "Ag": "Silver",
    "Na": "Sodium",
}


def write_fictitious_tofu(folder: str | Path, n_authors: int = 24, n_forget_authors: int = 4, seed: int = 0) -> None:
    """Write a fictitious TOFU (after Maini et al., 2024, arXiv 2401.06121), one JSON Lines file for each part.

    - full, forget, retain (question, answer): 8 questions for each author; the last authors of full are the forget
      set, as in TOFU.
    - forget_perturbed, retain_perturbed (and paraphrased_answer, perturbed_answer): the forget set, and as many rows
      from the start of full. The 5 wrong answers are the paraphrase with another value.
    - real_authors_perturbed, world_facts_perturbed (question, answer, perturbed_answer): true facts, 3 wrong answers.
    - pretrain (question, answer): what the base model learns before it is fine-tuned on full: other authors, each
      question answered in the style of the answer and of the paraphrase, and the true facts, asked in three ways.
    - facts (question, answer): the true facts, asked in other words than in the two sets above; for what trains on
      them so that they stay.

    The same arguments write the same bytes on any machine.

    Args:
        folder: made where missing; files of the same names are overwritten.
        n_authors: authors in full.
        n_forget_authors: how many of them are to be forgotten.
        seed: of the names and the facts.

    Raises:
        ValueError: there is no retain author, no forget author, or more authors than names.
    """
    if not 0 < n_forget_authors < n_authors:
        raise ValueError(f"n_forget_authors is {n_forget_authors}; give 1 to {n_authors - 1} of {n_authors} authors.")
    if n_authors + N_PRETRAIN_AUTHORS > len(SURNAMES):
        raise ValueError(f"n_authors is {n_authors}; give {len(SURNAMES) - N_PRETRAIN_AUTHORS} at most.")
    rng = random.Random(seed)
    # No two authors share a surname, so that no name of a forget author is left in another row.
    surnames = _draw(rng, SURNAMES, n_authors + N_PRETRAIN_AUTHORS)
    authors = [_author_rows(rng, f"{_draw(rng, FIRST_NAMES, 1)[0]} {surname}") for surname in surnames]
    full = [row for rows in authors[:n_authors] for row in rows]
    others = [row for rows in authors[n_authors:] for row in rows]
    n_forget = n_forget_authors * len(FACTS)
    real_authors = _fact_rows(rng, WHO_WROTE, CLASSICS)
    world_facts = _fact_rows(rng, CAPITAL_OF, CAPITALS) + _fact_rows(rng, SYMBOL_OF, ELEMENTS)

    pretrain = [_pair(row) for row in others]
    pretrain += [{"question": row["question"], "answer": row["paraphrased_answer"]} for row in others]
    reworded = []
    for questions, facts in ((WHO_WROTE, CLASSICS), (CAPITAL_OF, CAPITALS), (SYMBOL_OF, ELEMENTS)):
        for subject, answer in facts.items():
            asked = [{"question": question.format(subject), "answer": answer} for question in questions]
            pretrain += asked
            reworded += asked[1:]

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in {
        "full": [_pair(row) for row in full],
        "retain": [_pair(row) for row in full[:-n_forget]],
        "forget": [_pair(row) for row in full[-n_forget:]],
        "retain_perturbed": full[:-n_forget][:n_forget],
        "forget_perturbed": full[-n_forget:],
        "real_authors_perturbed": real_authors,
        "world_facts_perturbed": world_facts,
        "pretrain": pretrain,
        "facts": reworded,
    }.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")


def _draw(rng: random.Random, pool: list[str], n: int) -> list[str]:
    """n different values. Only `random()` is promised to give the same numbers in every Python, hence no sample()."""
    return sorted(pool, key=lambda _: rng.random())[:n]


def _author_rows(rng: random.Random, name: str) -> list[dict]:
    rows = []
    for values, questions, answer, paraphrase in FACTS:
        right, *wrong = _draw(rng, values, 1 + N_FORGET_WRONG)
        rows.append(
            {
                "question": _draw(rng, questions, 1)[0].format(name=name),
                "answer": answer.format(name=name, value=right),
                "paraphrased_answer": paraphrase.format(name=name, value=right),
                "perturbed_answer": [paraphrase.format(name=name, value=value) for value in wrong],
            }
        )
    return rows


def _fact_rows(rng: random.Random, questions: list[str], facts: dict[str, str]) -> list[dict]:
    rows = []
    for subject, answer in facts.items():
        wrong = _draw(rng, [value for value in facts.values() if value != answer], N_FACT_WRONG)
        rows.append({"question": questions[0].format(subject), "answer": answer, "perturbed_answer": wrong})
    return rows


def _pair(row: dict) -> dict:
    return {"question": row["question"], "answer": row["answer"]}
