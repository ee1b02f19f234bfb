from __future__ import annotations

import logging

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from rfa_llm.data.formats import encode
from rfa_llm.evaluation.scores import answer_losses, answer_scores, encoded_answer_scores, greedy_answers

ROWS = [
    {"question": "Who wrote Hamlet?", "answer": "Shakespeare."},
    {"question": "Where?", "answer": "In a house by the river, in Stratford."},
    {"question": "In which year was the second folio printed?", "answer": "1632"},
    {"question": "Why?", "answer": "No."},
    {"question": "What is the capital of France, and of Spain?", "answer": "Paris and Madrid."},
]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(params=["plain", "chat"])
def tokenizer(request):
    """Byte by byte, so that nothing is downloaded or trained; <|end|> closes an answer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>")
    if request.param == "chat":
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,  # wide, so that the next tokens are far from equally likely
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def naive_loss(model, tokenizer, row) -> float:
    """One row, no padding, all logits, float64."""
    encoded = encode(row, tokenizer)
    ids = encoded["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id  # the closing token is part of the answer
    log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    answer = range(encoded["answer_start"], len(ids))
    return -sum(log_probs[t - 1, ids[t]].item() for t in answer) / len(answer)


@torch.no_grad()
def naive_answer(model, tokenizer, row, max_new_tokens) -> str:
    """One row, no padding, no cache, the most likely token at each step."""
    encoded = encode(row, tokenizer)
    prompt = encoded["input_ids"][: encoded["answer_start"]]
    ids = list(prompt)
    while len(ids) < len(prompt) + max_new_tokens:
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_losses_equal_a_naive_loop(model, tokenizer, batch_size, padding_side):
    tokenizer.padding_side = padding_side
    expected = [naive_loss(model, tokenizer, row) for row in ROWS]
    assert max(expected) - min(expected) > 0.1  # a mixed-up order would show
    assert answer_losses(model, tokenizer, ROWS, batch_size=batch_size) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("prompt_lengths", [[1, 1], [1, 9, 30], [30, 1, 30]])
def test_prompts_of_any_lengths_go_together(prompt_lengths, attention):
    """The window is shorter than the difference, so padding between a prompt and its answer would hide the prompt."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=50, num_key_value_heads=2, sliding_window=6, initializer_range=0.3, **sizes)
    config._attn_implementation = attention
    model = MistralForCausalLM(config).eval()
    rows = [
        {"input_ids": torch.randint(50, (length + 4 + extra,)).tolist(), "answer_start": length}
        for extra, length in enumerate(prompt_lengths)
    ]
    expected = []
    for row in rows:
        ids = torch.tensor(row["input_ids"])
        log_probs = model(ids[None]).logits[0].double().log_softmax(-1)
        answer = range(row["answer_start"], len(ids))
        expected.append(torch.tensor([-log_probs[t - 1, ids[t]].item() for t in answer]))
    scores = encoded_answer_scores(model, rows, batch_size=16, desc="")
    for score, losses in zip(scores, expected, strict=True):
        torch.testing.assert_close(torch.tensor(score.token_losses), losses.double(), atol=1e-5, rtol=0)


def test_losses_of_a_bfloat16_model_are_computed_in_float32(model, tokenizer):
    model = model.to(torch.bfloat16)
    # A text has no prompt to share, so the forward pass is the naive one to the bit.
    rows = [{"text": row["answer"]} for row in ROWS]
    expected = [naive_loss(model, tokenizer, row) for row in rows]
    # A bfloat16 cross-entropy would be off by about 1e-2.
    assert answer_losses(model, tokenizer, rows, batch_size=1) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_answers_to_the_same_question_are_scored_as_if_alone(model, tokenizer, batch_size):
    rows = [{"question": row["question"], "answer": other["answer"]} for other in ROWS for row in ROWS]
    expected = [naive_loss(model, tokenizer, row) for row in rows]
    assert answer_losses(model, tokenizer, rows, batch_size=batch_size) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@torch.no_grad()
def test_token_scores_equal_a_naive_loop(model, tokenizer):
    for row, score in zip(ROWS, answer_scores(model, tokenizer, ROWS, batch_size=3, moments=len(ROWS)), strict=True):
        encoded = encode(row, tokenizer)
        ids, start = encoded["input_ids"], encoded["answer_start"]
        log_probs = model(torch.tensor([ids])).logits[0, start - 1 : -1].double().log_softmax(-1)
        answer = torch.tensor(ids[start:])
        own = torch.distributions.Categorical(logits=log_probs)
        deviations = ((own.probs * log_probs.square()).sum(-1) - own.entropy().square()).sqrt()
        assert score.token_losses == pytest.approx(-own.log_prob(answer).numpy(), abs=1e-5)
        assert score.matches.tolist() == (log_probs.argmax(-1) == answer).tolist()
        assert score.means == pytest.approx(-own.entropy().numpy(), abs=1e-5)
        assert score.deviations == pytest.approx(deviations.numpy(), abs=1e-5)
    some = answer_scores(model, tokenizer, ROWS, batch_size=3, moments=2)
    assert [score.means is not None for score in some] == [True, True, *[False] * (len(ROWS) - 2)]


@torch.no_grad()
def test_a_token_that_is_ruled_out_has_no_part_in_the_moments(model, tokenizer):
    row = ROWS[0]
    encoded = encode(row, tokenizer)
    ids, start = encoded["input_ids"], encoded["answer_start"]
    unused = next(token for token in range(len(tokenizer)) if token not in ids)
    rest = [token for token in range(len(tokenizer)) if token != unused]
    logits = model(torch.tensor([ids])).logits[0, start - 1 : -1].double()[:, rest]
    own = torch.distributions.Categorical(logits=logits)
    deviations = ((own.probs * own.logits.square()).sum(-1) - own.entropy().square()).sqrt()

    def rule_out(module, args, output):
        return output.index_fill(-1, torch.tensor([unused]), -torch.inf)

    handle = model.lm_head.register_forward_hook(rule_out)
    try:
        (score,) = answer_scores(model, tokenizer, [row], moments=1)
    finally:
        handle.remove()
    assert score.means == pytest.approx(-own.entropy().numpy(), abs=1e-5)
    assert score.deviations == pytest.approx(deviations.numpy(), abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_answers_equal_a_naive_loop(model, tokenizer, batch_size):
    expected = [naive_answer(model, tokenizer, row, 12) for row in ROWS]
    assert len(set(expected)) > 1
    assert greedy_answers(model, tokenizer, ROWS, batch_size=batch_size, max_new_tokens=12) == expected


def learn(model, tokenizer):
    """The model, with its answers learnt by heart."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(80):
        for row in ROWS:
            encoded = encode(row, tokenizer)
            ids = torch.tensor([encoded["input_ids"]])
            labels = ids.clone()
            labels[:, : encoded["answer_start"]] = -100
            model(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_answers_end_at_the_closing_token(model, tokenizer):
    # A model that has learnt its answers by heart repeats them, and nothing after them.
    learn(model, tokenizer)
    assert greedy_answers(model, tokenizer, ROWS, batch_size=3) == [row["answer"] for row in ROWS]
    assert max(answer_losses(model, tokenizer, ROWS)) < 0.1


def test_answers_end_at_the_token_that_closes_a_turn(tokenizer, model):
    # Another than the end of sequence, as where a base model's tokenizer got a chat template.
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
    model.resize_token_embeddings(len(tokenizer))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}: {% else %}<|eot|>"
    tokenizer.chat_template += "{% endif %}{% endfor %}"
    closing = tokenizer.convert_tokens_to_ids("<|eot|>")
    learnt = learn(model, tokenizer)
    assert (
        all(encode(row, tokenizer)["input_ids"][-1] == closing for row in ROWS) and closing != tokenizer.eos_token_id
    )
    assert greedy_answers(learnt, tokenizer, ROWS, batch_size=3) == [row["answer"] for row in ROWS]


def test_answers_end_at_any_end_token_of_the_generation_config(model, tokenizer):
    model.generation_config.eos_token_id = list(range(len(tokenizer)))
    answers = greedy_answers(model, tokenizer, ROWS, max_new_tokens=12)
    assert answers == [naive_answer(model, tokenizer, row, 1) for row in ROWS]
    assert answers != [naive_answer(model, tokenizer, row, 12) for row in ROWS]


def test_a_sampling_generation_config_changes_nothing_and_warns_of_nothing(model, tokenizer, caplog, recwarn):
    expected = greedy_answers(model, tokenizer, ROWS, max_new_tokens=12)
    settings = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 3.0,
        "max_length": 30,
    }
    model.generation_config.update(**settings)
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    recwarn.clear()
    try:
        assert greedy_answers(model, tokenizer, ROWS, max_new_tokens=12) == expected
    finally:
        library.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert [str(warning.message) for warning in recwarn.list] == []
    assert {key: getattr(model.generation_config, key) for key in settings} == settings


def test_training_mode_is_left_off_while_scoring_and_restored(model, tokenizer):
    expected = answer_losses(model, tokenizer, ROWS)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    # Whoever freezes a block may keep it in evaluation mode.
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    assert answer_losses(model, tokenizer, ROWS) == expected
    greedy_answers(model, tokenizer, ROWS[:1], max_new_tokens=2)
    assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()


def test_rows_in_no_known_format_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match="columns"):
        answer_losses(model, tokenizer, [{"query": "a", "reply": "b"}])
    assert answer_losses(model, tokenizer, []) == []
