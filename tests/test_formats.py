import json
import os

import pytest
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rfa_llm.data.formats import check_disjoint, check_tokenizer, encode, load_rows, prepare, spread

SPECIAL = ["<unk>", "<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
WORDS = [
    "Question",
    ":",
    "\n",
    "Answer",
    "user",
    "assistant",
    "system",
    "who",
    "are",
    "you",
    "I",
    "am",
    "Ada",
    "Bo",
    "?",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)
QA = {"question": "who are you ?", "answer": "I am Ada"}


def make_tokenizer(chat=False, adds_bos=False, eos="</s>"):
    vocab = {token: i for i, token in enumerate(SPECIAL + WORDS)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    split = [
        pre_tokenizers.Split(" ", "removed"),
        pre_tokenizers.Split("\n", "isolated"),
        pre_tokenizers.Punctuation(),
    ]
    backend.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|im_end|>" if chat else eos,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    if adds_bos:
        backend = tokenizer.backend_tokenizer
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode_prompt(row, tokenizer):
    encoded = encode(row, tokenizer)
    return encoded["input_ids"][: encoded["answer_start"]]


def split_tokens(row, tokenizer):
    encoded = encode(row, tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    assert "<unk>" not in tokens
    return tokens[: encoded["answer_start"]], tokens[encoded["answer_start"] :]


PLAIN_PROMPT = ["Question", ":", "who", "are", "you", "?", "\n", "Answer", ":"]
CHAT_PROMPT = ["<|im_start|>", "user", "\n", "who", "are", "you", "?", "<|im_end|>", "\n", "<|im_start|>", "assistant"]
CHAT_PROMPT += ["\n"]


def test_question_answer_with_the_plain_template():
    assert split_tokens(QA, make_tokenizer()) == (PLAIN_PROMPT, ["I", "am", "Ada", "</s>"])


def test_question_answer_with_the_chat_template_ends_with_the_end_of_turn():
    assert split_tokens(QA, make_tokenizer(chat=True)) == (CHAT_PROMPT, ["I", "am", "Ada", "<|im_end|>"])


@pytest.mark.parametrize("chat", [False, True])
def test_a_conversation_is_encoded_like_its_question_and_answer(chat):
    tokenizer = make_tokenizer(chat)
    turns = [{"role": "user", "content": QA["question"]}, {"role": "assistant", "content": QA["answer"]}]
    assert encode({"messages": turns}, tokenizer) == encode(QA, tokenizer)
    assert encode({"prompt": turns[:1], "completion": turns[1:]}, tokenizer) == encode(QA, tokenizer)


def test_the_last_assistant_turn_is_the_answer():
    turns = [{"role": "system", "content": "you are Bo"}, {"role": "user", "content": "who ?"}]
    turns += [{"role": "assistant", "content": "Bo"}, {"role": "user", "content": "you ?"}]
    turns += [{"role": "assistant", "content": "Ada"}]
    prompt, answer = split_tokens({"messages": turns}, make_tokenizer(chat=True))
    assert prompt.count("<|im_start|>") == 5 and "Bo" in prompt
    assert answer == ["Ada", "<|im_end|>"]
    with pytest.raises(ValueError, match="set the tokenizer's chat_template"):
        encode({"messages": turns}, make_tokenizer())


@pytest.mark.parametrize("chat", [False, True])
def test_prompt_and_completion_strings_are_used_as_they_are(chat):
    tokenizer = make_tokenizer(chat)
    prompt, answer = split_tokens({"prompt": "who ?", "completion": "I am"}, tokenizer)
    assert (prompt, answer) == (["who", "?"], ["I", "am", tokenizer.eos_token])
    assert split_tokens({"prompt": "who ?", "completion": f"I am{tokenizer.eos_token}"}, tokenizer) == (prompt, answer)


def test_bos_comes_once_where_the_tokenizer_adds_one():
    tokenizer = make_tokenizer(adds_bos=True)
    assert split_tokens(QA, tokenizer)[0] == ["<s>", *PLAIN_PROMPT]
    assert split_tokens({"prompt": "who", "completion": "Bo"}, tokenizer)[0] == ["<s>", "who"]
    assert split_tokens({"prompt": "<s>who", "completion": "Bo"}, tokenizer)[0] == ["<s>", "who"]


def test_a_chat_prompt_is_what_the_tokenizer_itself_makes_of_it():
    tokenizer = make_tokenizer(chat=True, adds_bos=True)
    question = [{"role": "user", "content": QA["question"]}]
    expected = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    assert encode_prompt(QA, tokenizer) == expected


def test_text_is_all_answer_after_one_token():
    assert split_tokens({"text": "I am Ada"}, make_tokenizer()) == (["<s>"], ["I", "am", "Ada", "</s>"])
    assert split_tokens({"text": "<s>Ada"}, make_tokenizer()) == (["<s>"], ["Ada", "</s>"])
    tokenizer = make_tokenizer()
    tokenizer.bos_token = None
    assert split_tokens({"text": "Ada"}, tokenizer) == (["</s>"], ["Ada", "</s>"])


@pytest.mark.parametrize("chat", [False, True])
def test_the_prompt_does_not_depend_on_the_answer(chat):
    tokenizer = make_tokenizer(chat)
    prompts = [encode_prompt({**QA, "answer": answer}, tokenizer) for answer in ("Ada", "\nBo", ": I am", "  you")]
    assert all(prompt == prompts[0] for prompt in prompts)


def test_a_chat_template_that_rewrites_the_prompt_is_refused():
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = "{{ messages | length }}" + CHAT_TEMPLATE
    with pytest.raises(ValueError, match="set a chat_template"):
        encode(QA, tokenizer)


def test_a_template_that_also_ends_the_conversation_gives_one_closing_token():
    tokenizer = make_tokenizer(chat=True)
    tokenizer.add_tokens(["</s>"], special_tokens=True)
    tokenizer.chat_template += "{% if not add_generation_prompt %}</s>{% endif %}"
    assert split_tokens(QA, tokenizer) == (CHAT_PROMPT, ["I", "am", "Ada", "<|im_end|>"])
    # The closing token may hold the answer's text, and the answer special tokens of its own.
    tokenizer.add_tokens(["end"])
    assert split_tokens({**QA, "answer": "end"}, tokenizer) == (CHAT_PROMPT, ["end", "<|im_end|>"])
    odd = {**QA, "answer": "I am </s> Ada"}
    assert split_tokens(odd, tokenizer) == (CHAT_PROMPT, ["I", "am", "</s>", "Ada", "<|im_end|>"])


def test_an_answer_has_the_tokens_that_follow_its_prompt():
    # As SentencePiece does, this tokenizer puts a space before each text.
    tokenizer = make_tokenizer()
    words = ["▁Question", "Answer", ":", "▁who", "▁I", "▁am", "I", "\n", "?", "▁", "</s>", "<unk>"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            pre_tokenizers.Split(":", "isolated"),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}Question: {{ m.content }}\nAnswer:{% else %}{{ m.content }}"
        "{% endif %}{% endfor %}"
    )
    prompt, answer = split_tokens({"question": "who", "answer": "I am"}, tokenizer)
    assert prompt == ["▁Question", ":", "▁who", "\n", "Answer", ":"]
    # Alone it would begin with "▁I".
    assert answer == ["I", "▁am", "</s>"]


def test_a_template_that_ends_no_turn_gets_the_end_of_sequence():
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = CHAT_TEMPLATE.replace(" + '<|im_end|>\n'", "")
    _, answer = split_tokens(QA, tokenizer)
    assert answer == ["I", "am", "Ada", tokenizer.eos_token]


@pytest.mark.parametrize("format", ["torch", "numpy"])
def test_a_datasets_format_does_not_reach_the_encoded_rows(format):
    rows = Dataset.from_list([QA])
    plain, formatted = (load_rows(one, "forget_dataset") for one in (rows, rows.with_format(format)))
    one, other = (prepare(some, make_tokenizer(), "forget_dataset", None) for some in (plain, formatted))
    assert one[:] == other[:]
    with pytest.raises(ValueError, match="1 rows of forget_dataset are in retain_dataset too"):
        check_disjoint(one, other, "forget_dataset", "retain_dataset")


def test_prepare_keeps_ids_start_and_row_number_only():
    rows = Dataset.from_list([{**QA, "index": "x"}, {"question": "who ?", "answer": "Bo", "index": "y"}])
    tokenizer = make_tokenizer()
    encoded = prepare(rows, tokenizer, "forget_dataset", None)
    assert sorted(encoded.column_names) == ["answer_start", "index", "input_ids"]
    assert encoded["index"][:] == [0, 1]
    assert encoded[1]["input_ids"] == encode(rows[1], tokenizer)["input_ids"]


def test_prepare_cuts_an_answer_but_not_off():
    rows = Dataset.from_list([{"question": "who ?", "answer": "Bo"}, QA])  # prompts of 7 and 9 tokens
    assert len(prepare(rows, make_tokenizer(), "forget_dataset", 10)[1]["input_ids"]) == 10
    with pytest.raises(ValueError, match="forget_dataset row 1: max_length=9 cuts the whole answer.*raise max_length"):
        prepare(rows, make_tokenizer(), "forget_dataset", 9)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"query": "who", "answer": "Bo"}],
            r"\['answer', 'query'\]; give prompt/completion, or messages, or question/",
        ),
        ([QA, {"question": "who", "answer": " \n"}], "retain_dataset row 1: the answer .* is empty"),
        ([QA, {"question": "who", "answer": None}], "retain_dataset row 1: answer is None; give text"),
        ([{"question": None, "answer": "Bo"}], "retain_dataset row 0: question is None; give text"),
        ([{"prompt": "", "completion": "Bo"}], "retain_dataset row 0: the prompt is empty"),
        ([{"messages": [{"role": "user", "content": "who"}]}], "retain_dataset row 0: the turns are .*assistant"),
        ([{"messages": []}], "retain_dataset row 0: the turns are"),
        ([{"messages": None}], "retain_dataset row 0: messages is None; give a list of turns"),
        (
            [{"messages": [{"from": "human", "value": "who"}]}],
            "row 0: messages has a turn without a role; give each",
        ),
        (
            [{"prompt": [{"role": "user", "content": "who"}], "completion": "Bo"}],
            "row 0: completion is 'Bo'; give a li",
        ),
        (
            [{"messages": [{"role": "user"}, {"role": "assistant", "content": "Bo"}]}],
            "the content of a user turn is None",
        ),
    ],
)
def test_prepare_names_what_is_wrong(rows, message):
    with pytest.raises((ValueError, TypeError), match=message):
        prepare(Dataset.from_list(rows), make_tokenizer(), "retain_dataset", None)


def test_prepare_names_the_row_whose_turns_the_chat_template_refuses():
    tokenizer = make_tokenizer(chat=True)
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    tokenizer.chat_template = refusal + CHAT_TEMPLATE
    turns = [{"role": "user", "content": "who ?"}, {"role": "assistant", "content": "Bo"}]
    rows = [{"messages": turns}, {"messages": [{"role": "system", "content": "you are Bo"}, *turns]}]
    with pytest.raises(
        ValueError, match=r"^forget_dataset row 1: the chat template refuses the turns \(no system turns"
    ):
        prepare(Dataset.from_list(rows), tokenizer, "forget_dataset", None)


def test_prepare_leaves_no_file(tmp_path):
    rows = Dataset.from_list([QA])
    rows.save_to_disk(tmp_path / "rows")
    before = sorted(os.walk(tmp_path))
    encoded = prepare(Dataset.load_from_disk(tmp_path / "rows"), make_tokenizer(), "forget_dataset", None)
    assert encoded.cache_files == [] and sorted(os.walk(tmp_path)) == before


def test_check_disjoint_counts_the_shared_rows():
    def encoded(*answers):
        rows = Dataset.from_list([{"question": "who ?", "answer": answer} for answer in answers])
        return prepare(rows, make_tokenizer(), "forget_dataset", None)

    check_disjoint(encoded("Ada"), encoded("Bo"), "forget_dataset", "retain_dataset")
    with pytest.raises(ValueError, match="^2 rows of forget_dataset.*row 1 of forget_dataset"):
        check_disjoint(encoded("I", "Ada", "Bo"), encoded("Bo", "am", "Ada"), "forget_dataset", "retain_dataset")


@pytest.mark.parametrize(
    ("number", "taken"),
    [(3, [0, 1, 2]), (5, [0, 1, 2, 3, 4]), (9, [0, 1, 3, 5, 7]), (10, [0, 2, 4, 6, 8]), (14, [0, 2, 5, 8, 11])],
)
def test_spread_reaches_over_all_rows(number, taken):
    assert spread(Dataset.from_dict({"row": range(number)}), 5)["row"] == taken


def test_check_tokenizer_fills_the_pad_token_only():
    tokenizer = make_tokenizer()
    check_tokenizer(tokenizer)
    assert tokenizer.pad_token == "</s>"
    tokenizer.pad_token = "<pad>"
    check_tokenizer(tokenizer)
    assert tokenizer.pad_token == "<pad>"
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="a tokenizer without an end token"):
        check_tokenizer(tokenizer)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="a tokenizer without a pad and an end token"):
        check_tokenizer(tokenizer)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_load_rows_reads_files_into_memory(tmp_path, monkeypatch, suffix):
    rows = Dataset.from_list([QA, {"question": 'who, "you"\n?', "answer": "NA"}])
    path = tmp_path / f"rows.{suffix}"
    if suffix == "json":
        rows.to_json(path, lines=False)
    else:
        {"jsonl": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}[suffix](path)
    loaded = load_rows(str(path), "forget_dataset")
    assert loaded.to_list() == rows.to_list()
    assert loaded.cache_files == []


def test_load_rows_takes_a_datasets_rows_and_names_bad_sources(tmp_path):
    assert load_rows(Dataset.from_list([QA]), "forget_dataset").to_list() == [QA]
    with pytest.raises(ValueError, match="forget_dataset is None"):
        load_rows(None, "forget_dataset")
    with pytest.raises(ValueError, match="retain_dataset is 'nowhere.jsonl', but there is no such file"):
        load_rows("nowhere.jsonl", "retain_dataset")
    (tmp_path / "rows.jsonl").write_text(json.dumps(QA))
    (tmp_path / "rows.txt").write_text("who")
    for other in (tmp_path, tmp_path / "rows.txt"):
        with pytest.raises(
            ValueError, match="forget_dataset is .*, a folder or a file of another type; give a .jsonl, "
        ):
            load_rows(str(other), "forget_dataset")
    with pytest.raises(
        ValueError, match="^forget_dataset: 'nobody/nothing' cannot be loaded from the Hub .*; give id, co"
    ):
        load_rows("nobody/nothing", "forget_dataset")
    with pytest.raises(TypeError, match="forget_dataset is a DatasetDict"):
        load_rows(DatasetDict(train=Dataset.from_list([QA])), "forget_dataset")
