"""Loaders and chat templates, on tiny tokenizers built here; every expectation is worked out by hand."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rlhf.config import DataConfig, SourceConfig, parse_config
from rlhf.data import (
    RowProblem,
    encode_conversation,
    encode_prompt,
    encode_response,
    load_preferences,
    load_prompts,
    load_sequences,
    read_rows,
)
from rlhf.preflight import check_data

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] END }}{% endgeneration %}{{ AFTER }}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED_INSIDE = MARKED.replace("END", "+ '<|im_end|>\n'").replace("AFTER", "''")
MARKED_OUTSIDE = MARKED.replace("END", "").replace("AFTER", "'<|im_end|>\n'")
# As reasoning templates do: only an answer after the last user message keeps its thoughts.
REWRITING = CHATML.replace(
    "m['content'] + '<|im_end|>\n'", "('<think>' if loop.last and m['role'] == 'assistant' else '') + m['content'] + '<|im_end|>\n'"
)

TURNS = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": " hi  you"},
    {"role": "user", "content": "how are you"},
    {"role": "assistant", "content": "fine é"},
]


def make_tokenizer(template: str | None = CHATML, eos: str = "<|im_end|>", specials: str = "$A", trim: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE, pad = EOS; `specials` is what the tokenizer adds around a text by default."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=310, special_tokens=names, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(["hello how are you fine user assistant system answer"] * 20, trainer)
    known = [(name, tokenizer.token_to_id(name)) for name in names]
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=trim), processors.TemplateProcessing(single=specials, special_tokens=known)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, pad_token=eos, chat_template=template)


TOKENIZER = make_tokenizer()


def trained_text(tokenizer: PreTrainedTokenizerFast, ids: list[int], mask: list[bool]) -> str:
    """The trained tokens as text, runs kept apart by |."""
    runs: list[list[int]] = []
    for index, (token, trains) in enumerate(zip(ids, mask, strict=True)):
        if trains and (index == 0 or not mask[index - 1]):
            runs.append([])
        if trains:
            runs[-1].append(token)
    return "|".join(tokenizer.decode(run) for run in runs)


def config(**options: Any) -> DataConfig:
    return DataConfig(train=[SourceConfig(path=Path("unused"))], **options)


Write = Callable[..., SourceConfig]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_jsonl(*rows: Any, file: str = "rows.jsonl", **options: Any) -> SourceConfig:
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (tmp_path / file).write_bytes(b"".join(line + b"\n" for line in lines))
        return SourceConfig(path=tmp_path / file, **options)

    return write_jsonl


# ---- chat templates and masks


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("template", [CHATML, MARKED_INSIDE, MARKED_OUTSIDE])
def test_loss_is_on_assistant_turns_and_their_end_token(template: str, trim: bool) -> None:
    tokenizer = make_tokenizer(template, trim=trim)
    ids, mask = encode_conversation(tokenizer, TURNS)
    assert trained_text(tokenizer, ids, mask) == " hi  you<|im_end|>|fine é<|im_end|>"
    whole = tokenizer.apply_chat_template(TURNS, return_dict=False)
    assert ids == whole[: len(ids)], "the text is tokenised whole"
    assert tokenizer.decode(whole[len(ids) :]) == "\n", "only what the template writes after the last end token is cut"


def test_only_turns_from_first_trained_on() -> None:
    for template in (CHATML, MARKED_INSIDE):
        ids, mask = encode_conversation(make_tokenizer(template), TURNS, first_trained=2)
        assert trained_text(TOKENIZER, ids, mask) == "fine é<|im_end|>"


def test_trap_3_eos_trains_when_pad_is_eos() -> None:
    assert TOKENIZER.pad_token_id == TOKENIZER.eos_token_id
    for ids, mask in (encode_conversation(TOKENIZER, TURNS), encode_response(TOKENIZER, "how", "fine")):
        assert ids[-1] == TOKENIZER.eos_token_id
        assert mask[-1]


def test_trap_3_an_eos_in_the_text_is_not_doubled() -> None:
    ids, mask = encode_response(TOKENIZER, "how", "fine<|im_end|>")
    assert (ids, mask) == encode_response(TOKENIZER, "how", "fine")


def test_plain_prompt_keeps_bos_and_never_ends() -> None:
    tokenizer = make_tokenizer(specials="<s> $A </s>")
    assert tokenizer("hello")["input_ids"][-1] == tokenizer.convert_tokens_to_ids("</s>"), "the tokenizer itself would end the prompt"
    hello = tokenizer("hello", add_special_tokens=False)["input_ids"]
    assert encode_prompt(tokenizer, "hello") == [tokenizer.bos_token_id, *hello]
    ids, mask = encode_response(tokenizer, "hello", "hello")
    assert ids == [tokenizer.bos_token_id, *hello, *hello, tokenizer.eos_token_id]
    assert mask == [False] * (1 + len(hello)) + [True] * (len(hello) + 1)


def test_chat_prompt_ends_with_the_generation_prompt() -> None:
    assert TOKENIZER.decode(encode_prompt(TOKENIZER, TURNS[:1])) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (REWRITING, "renders assistant turn 1 differently once other messages follow"),
        (CHATML.replace("assistant\n' }}{% endif", "bot\n' }}{% endif"), "not as a continuation"),
        (
            "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
            "eos_token",
        ),
        (MARKED.replace("END", "").replace("AFTER", "'\n'"), "eos_token"),
        ("{% generation %}{{ messages[1]['content'] + '<|im_end|>' }}{% endgeneration %}", "has 1 {% generation %} blocks for 2 assistant turns"),
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
    ],
)
def test_templates_that_cannot_be_masked_are_named(template: str, message: str) -> None:
    with pytest.raises(RowProblem) as problem:
        encode_conversation(make_tokenizer(template), TURNS)
    assert message in str(problem.value)
    assert problem.value.reason == "chat template"


def test_rewriting_template_serves_single_turns() -> None:
    tokenizer = make_tokenizer(REWRITING)
    assert trained_text(tokenizer, *encode_conversation(tokenizer, TURNS[:2])) == "<think> hi  you<|im_end|>"


# ---- prompts


def test_prompts_of_every_shape(write: Write) -> None:
    source = write(
        {"prompt": "how are you", "answer": 4},
        {"prompt": TURNS[:1], "data_source": "openai/gsm8k", "reward_model": {"style": "rule", "ground_truth": "72"}},
        {"messages": TURNS[:3]},
        {"question": "how", "answer": "48/2\n#### 1,072"},
    )
    prompts, report = load_prompts([source], config(), TOKENIZER)
    assert [p.text for p in prompts] == ["how are you", "hello", "how are you", "how"]
    assert [p.source for p in prompts] == ["rows", "openai/gsm8k", "rows", "rows"]
    assert [p.columns.get("answer") for p in prompts] == [4, "72", None, "1072"]
    assert prompts[3].columns["solution"] == "48/2\n#### 1,072"
    assert all("prompt" not in p.columns for p in prompts)
    assert TOKENIZER.decode(prompts[0].input_ids) == "how are you"
    assert report.summary() == "rows: 4 rows"


def test_name_of_the_config_wins_over_data_source(write: Write) -> None:
    prompts, report = load_prompts([write({"prompt": "how", "data_source": "x"}, name="mine")], config(), TOKENIZER)
    assert (prompts[0].source, report.summary()) == ("mine", "mine: 1 rows")


def test_chat_option(write: Write) -> None:
    plain, talk = write({"prompt": "how"}, file="plain.jsonl"), write({"prompt": TURNS[:1]}, file="talk.jsonl")
    prompts, _ = load_prompts([plain], config(chat=True), TOKENIZER)
    assert TOKENIZER.decode(prompts[0].input_ids) == "<|im_start|>user\nhow<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(ValueError, match=r"talk.jsonl:1: `prompt` is a list of messages but data.chat is false"):
        load_prompts([talk], config(chat=False), TOKENIZER)
    with pytest.raises(ValueError, match=r"data.system_prompt.*data.chat=true"):
        load_prompts([plain], config(system_prompt="answer"), TOKENIZER)
    with pytest.raises(ValueError, match="no chat template"):
        load_prompts([talk], config(), make_tokenizer(None))


def test_system_prompt_and_examples_come_first_and_do_not_train(write: Write) -> None:
    data = config(system_prompt="answer", examples=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    system = {"role": "system", "content": "own"}
    source = write({"messages": TURNS[:2]}, {"messages": [system, *TURNS[:2]]}, {"prompt": TURNS[:1], "response": "fine"})
    sequences, _ = load_sequences([source], data, TOKENIZER)
    head = "<|im_start|>system\nanswer<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nhello"
    texts = [TOKENIZER.decode(s.input_ids) for s in sequences]
    assert texts[0].startswith(head)
    assert texts[1].startswith(head.replace("answer", "own")), "a row's own system message wins"
    trained = [trained_text(TOKENIZER, s.input_ids, s.loss_mask) for s in sequences]
    assert trained == [" hi  you<|im_end|>", " hi  you<|im_end|>", "fine<|im_end|>"]


def test_bad_examples_are_a_config_error(write: Write) -> None:
    with pytest.raises(ValueError, match=r"data.examples\[0\].role` is 'human'; use one of"):
        load_prompts([write({"prompt": "how"})], config(chat=True, examples=[{"role": "human", "content": "x"}]), TOKENIZER)


def test_long_prompts_are_dropped_or_cut_at_the_front(write: Write) -> None:
    source = write({"prompt": "how"}, {"prompt": "hello how are you"})
    whole = encode_prompt(TOKENIZER, "hello how are you")
    assert len(whole) == 4
    prompts, report = load_prompts([source], config(max_prompt_tokens=3), TOKENIZER)
    assert [p.text for p in prompts] == ["how"]
    assert report.summary() == "rows: 1 rows, 1 dropped (longer than data.max_prompt_tokens=3)"
    prompts, report = load_prompts([source], config(max_prompt_tokens=3, on_long_prompt="truncate"), TOKENIZER)
    assert prompts[1].input_ids == whole[1:]
    assert (report.summary(), report.truncated, report.rows) == ("rows: 2 rows, 1 truncated", 1, 2)


# ---- sequences


def test_sequences_of_every_shape(write: Write) -> None:
    source = write(
        {"prompt": "how", "response": " fine"},
        {"prompt": TURNS[:1], "response": "fine"},
        {"prompt": TURNS},
        {"messages": TURNS},
        {"question": "how", "answer": "48/2\n#### 24"},
        {"data_source": "x", "prompt": TURNS[:1], "reward_model": {"ground_truth": "72"}},
        {"prompt": "hello", "response": TURNS[1:2]},
    )
    sequences, _ = load_sequences([source], config(), TOKENIZER)
    both = " hi  you<|im_end|>|fine é<|im_end|>"
    assert [trained_text(TOKENIZER, s.input_ids, s.loss_mask) for s in sequences] == [
        " fine<|im_end|>",
        "fine<|im_end|>",
        both,
        both,
        "48/2\n#### 24<|im_end|>",
        "72<|im_end|>",
        " hi  you<|im_end|>",
    ]
    assert TOKENIZER.decode(sequences[4].input_ids) == "how48/2\n#### 24<|im_end|>"


def test_long_sequences_and_pairs_are_dropped_and_counted(write: Write) -> None:
    short, long = {"prompt": "how", "response": "fine"}, {"prompt": "how", "response": "fine " * 9}
    sequences, report = load_sequences([write(short, long)], config(max_tokens=8), TOKENIZER)
    assert (len(sequences), dict(report.dropped)) == (1, {"longer than data.max_tokens=8": 1})
    pairs = write({"prompt": "how", "chosen": "a", "rejected": "b"}, {"prompt": "how", "chosen": "a", "rejected": "fine " * 9})
    assert load_preferences([pairs], config(max_tokens=8), TOKENIZER)[1].summary() == "rows: 1 rows, 1 dropped (longer than data.max_tokens=8)"
    with pytest.raises(ValueError, match=r"no usable row is left:\nrows: 0 rows, 2 dropped \(longer than data.max_tokens=2\)"):
        load_sequences([write(short, long)], config(max_tokens=2), TOKENIZER)


# ---- preference pairs


HH = "\n\nHuman: how are you\n\nAssistant: fine\n\nHuman: hello\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "chat", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "how", "chosen": " fine", "rejected": " no"}, None, "how", " fine<|im_end|>", " no<|im_end|>"),
        (
            {"prompt": TURNS[:1], "chosen": "a", "rejected": "b"},
            None,
            "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
            "a<|im_end|>",
            "b<|im_end|>",
        ),
        ({"chosen": HH + " Hi you.", "rejected": HH + " Hi, no."}, None, HH, " Hi you.<|im_end|>", " Hi, no.<|im_end|>"),
    ],
)
def test_pairs(write: Write, row: dict[str, Any], chat: bool | None, prompt: str, chosen: str, rejected: str) -> None:
    (pair,), _ = load_preferences([write(row)], config(chat=chat), TOKENIZER)
    for side, text in ((pair.chosen, chosen), (pair.rejected, rejected)):
        assert TOKENIZER.decode(side.input_ids) == prompt + text
        assert trained_text(TOKENIZER, side.input_ids, side.loss_mask) == text


def test_pairs_of_conversations_share_their_prompt(write: Write) -> None:
    bad = {"role": "assistant", "content": "no"}
    source = write(
        {"chosen": TURNS, "rejected": [*TURNS[:3], bad]},
        {"prompt": TURNS[:3], "chosen": TURNS[3:], "rejected": [bad]},
        {"prompt": TURNS[:3], "chosen": TURNS, "rejected": [*TURNS[:3], bad]},
    )
    pairs, _ = load_preferences([source], config(), TOKENIZER)
    assert pairs[0] == pairs[1] == pairs[2]
    assert trained_text(TOKENIZER, pairs[0].chosen.input_ids, pairs[0].chosen.loss_mask) == "fine é<|im_end|>"
    assert trained_text(TOKENIZER, pairs[0].rejected.input_ids, pairs[0].rejected.loss_mask) == "no<|im_end|>"


def test_prompt_text_repeated_in_conversations(write: Write) -> None:
    row = {"prompt": "hello", "chosen": TURNS[:2], "rejected": [TURNS[0], {"role": "assistant", "content": "no"}]}
    (pair,), _ = load_preferences([write(row)], config(), TOKENIZER)
    assert TOKENIZER.decode(pair.rejected.input_ids) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nno<|im_end|>"


def test_hh_transcripts_become_messages_under_chat(write: Write) -> None:
    (pair,), _ = load_preferences([write({"chosen": HH + " Hi you.", "rejected": HH + " Hi, no."})], config(chat=True), TOKENIZER)
    start, end = "<|im_start|>", "<|im_end|>\n"
    prompt = f"{start}user\nhow are you{end}{start}assistant\nfine{end}{start}user\nhello{end}{start}assistant\n"
    assert TOKENIZER.decode(pair.chosen.input_ids) == prompt + "Hi you.<|im_end|>"
    assert trained_text(TOKENIZER, pair.rejected.input_ids, pair.rejected.loss_mask) == "Hi, no.<|im_end|>"


# ---- malformed rows


USER = {"role": "user", "content": "how"}
SFT_OK = {"prompt": "how", "response": "fine"}
BAD_SEQUENCES: list[tuple[Any, str, str]] = [  # row, reason, what the message says of it
    (b"", "blank line", "remove it"),
    (b"   ", "blank line", "remove it"),
    (b"{", "invalid JSON", "column"),
    (b'{"prompt": "how" "response": "x"}', "invalid JSON", "column 18"),
    (b"{'prompt': 'how'}", "invalid JSON", "column 2"),
    (b'{"prompt": "how"} {"prompt": "how"}', "invalid JSON", "Extra data"),
    (b'{"prompt": "how", "response": "x",}', "invalid JSON", "column"),
    (b"[" * 100_000, "invalid JSON", "recursion"),
    (b'{"prompt": "how", "n": ' + b"9" * 5000 + b"}", "invalid JSON", "limit"),
    (b"[1, 2]", "not an object", "list"),
    (b'"text"', "not an object", "str"),
    (b"null", "not an object", "NoneType"),
    (b"7", "not an object", "int"),
    (b'{"prompt": NaN, "response": "x"}', "NaN", "NaN is not JSON"),
    (b'{"prompt": "how", "response": "x", "score": Infinity}', "NaN", "Infinity is not JSON"),
    (b'{"prompt": "how", "response": "x", "score": [{"a": 1e999}]}', "NaN", "`score`"),
    (b'{"prompt": "how", "prompt": "x", "response": "x"}', "duplicate key", "`prompt` stands twice"),
    (b'{"prompt": "\xff", "response": "x"}', "not UTF-8", "byte 13"),
    ({"prompt": "\ud800", "response": "x"}, "not UTF-8", "`prompt`"),
    (b'{"prompt": "a\0b", "response": "x"}', "null byte", "null byte"),
    ({"prompt": "how", "response": "a\0"}, "null byte", "`response`"),
    ({"prompt": "", "response": "x"}, "empty prompt", "`prompt` is empty"),
    ({"prompt": " \n", "response": "x"}, "empty prompt", "`prompt` is empty"),
    ({"prompt": [], "response": "x"}, "empty prompt", "empty list"),
    ({"prompt": None, "response": "x"}, "null", "`prompt` is null"),
    ({"prompt": 5, "response": "x"}, "wrong type", "`prompt` is of type int"),
    ({"prompt": {"text": "x"}, "response": "x"}, "wrong type", "`prompt` is of type dict"),
    ({"prompt": "how", "response": ["x"]}, "wrong type", "`response[0]` is of type str"),
    ({"prompt": "how", "response": True}, "wrong type", "`response` is of type bool"),
    ({"prompt": "how", "response": ""}, "empty response", "`response` is empty"),
    ({"prompt": "how", "response": None}, "null", "`response` is null"),
    ({"prompt": "how"}, "missing key", "`response` is missing; the row has prompt; set response_key"),
    ({"promt": "how", "response": "x"}, "missing key", "`prompt` is missing; the row has promt, response; set prompt_key"),
    ({}, "missing key", "no columns"),
    ({"prompt": [{"role": "human", "content": "x"}], "response": "x"}, "unknown role", "`prompt[0].role` is 'human'"),
    ({"prompt": [{"content": "x"}], "response": "x"}, "role missing", "`prompt[0]` has no `role`"),
    ({"prompt": [USER, {"role": "user"}], "response": "x"}, "content missing", "`prompt[1]` has no `content`"),
    ({"prompt": [{"role": "user", "content": " "}], "response": "x"}, "empty message", "`prompt[0].content` is empty"),
    ({"prompt": [{"role": ["user"], "content": "x"}], "response": "x"}, "unknown role", "['user']"),
    ({"prompt": [{"role": "user", "content": ["x"]}], "response": "x"}, "wrong type", "`prompt[0].content` is of type list"),
    ({"prompt": TURNS[:2], "response": "x"}, "answered prompt", "ends with an assistant turn"),
    ({"prompt": [USER], "response": [USER]}, "no assistant turn", "`response` ends with a user message"),
    ({"messages": [USER]}, "missing key", "`response`"),
    ({"question": "how", "answer": ""}, "empty response", "`answer`"),
]
BAD_PAIRS: list[tuple[Any, str, str]] = [
    ({"prompt": "how", "chosen": "a", "rejected": "a "}, "equal sides", "are the same"),
    ({"prompt": "how", "chosen": TURNS[1:2], "rejected": TURNS[1:2]}, "equal sides", "are the same"),
    ({"prompt": "how", "chosen": "a"}, "missing key", "`rejected` is missing"),
    ({"prompt": "how", "chosen": "", "rejected": "a"}, "empty response", "`chosen` is empty"),
    ({"prompt": "how", "chosen": "a", "rejected": TURNS[1:2]}, "wrong type", "write both alike"),
    ({"chosen": "a", "rejected": "b"}, "missing key", "`prompt` is missing"),
    ({"chosen": HH, "rejected": HH + " x"}, "empty response", "`chosen` is empty"),
    ({"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: x"}, "no shared prompt", "share no prompt"),
    ({"chosen": TURNS[1:2], "rejected": [{"role": "assistant", "content": "b"}]}, "no shared prompt", "share no prompt"),
    ({"prompt": [USER], "chosen": [USER], "rejected": TURNS[1:2]}, "empty response", "only repeats the prompt"),
]
BAD_PROMPTS: list[tuple[Any, str, str]] = [
    ({"question": "how", "answer": "no mark"}, "no final answer", "#### number"),
    ({"question": "how", "answer": 72}, "wrong type", "`answer` is of type int"),
    ({"messages": TURNS}, "answered prompt", "remove that turn"),
]
KINDS = [
    (load_sequences, SFT_OK, BAD_SEQUENCES),
    (load_preferences, {"prompt": "how", "chosen": "a", "rejected": "b"}, BAD_PAIRS),
    (load_prompts, {"prompt": "how"}, BAD_PROMPTS),
]


def test_each_malformed_row_is_named_with_its_line(write: Write) -> None:
    for load, good, bad_rows in KINDS:
        for row, reason, says in bad_rows:
            with pytest.raises(ValueError) as error:
                load([write(good, good, row, good)], config(), TOKENIZER)  # type: ignore[operator]
            message = str(error.value)
            assert message.startswith(f"1 bad rows ({reason} 1); mend them, or leave them out with data.on_bad_row=skip:\n  rows.jsonl:3: "), message
            assert says in message


def test_all_malformed_rows_are_reported_together_or_skipped_and_counted(write: Write) -> None:
    assert len(BAD_SEQUENCES) >= 40
    rows = [row for bad, _, _ in BAD_SEQUENCES for row in (bad, SFT_OK)]  # bad rows on the odd lines
    source = write(*rows)
    with pytest.raises(ValueError) as error:
        load_sequences([source], config(), TOKENIZER)
    head, *lines = str(error.value).splitlines()
    assert [line.split(": ")[0].strip() for line in lines[:-1]] == [f"rows.jsonl:{1 + 2 * i}" for i in range(10)]
    assert lines[-1] == f"  ... and {len(BAD_SEQUENCES) - 10} more"
    reasons = [reason for _, reason, _ in BAD_SEQUENCES]
    assert head.startswith(f"{len(BAD_SEQUENCES)} bad rows (")
    assert all(f"{reason} {reasons.count(reason)}" in head for reason in reasons)

    sequences, report = load_sequences([source], config(on_bad_row="skip"), TOKENIZER)
    assert len(sequences) == report.rows == len(BAD_SEQUENCES)
    assert all(TOKENIZER.decode(s.input_ids) == "howfine<|im_end|>" for s in sequences)
    assert report.dropped == {reason: reasons.count(reason) for reason in reasons}


def test_only_bad_rows_leave_nothing(write: Write) -> None:
    with pytest.raises(ValueError, match=r"no usable row is left:\nrows: 0 rows, 1 dropped \(missing key\)"):
        load_prompts([write({"x": 1})], config(on_bad_row="skip"), TOKENIZER)


# ---- sources


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [{"prompt": f"how {i}", "answer": f"é{i}, x"} for i in range(4)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "answer"])
        writer.writeheader()
        writer.writerows(rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    locations = {
        "a.jsonl": "a.jsonl:3",
        "a.jsonl.gz": "a.jsonl.gz:3",
        "a.json": "a.json:row 3",
        "a.csv": "a.csv:4",
        "a.parquet": "a.parquet:row 3",
        "saved": "saved:row 3",
    }
    for name, location in locations.items():
        found = list(read_rows(SourceConfig(path=tmp_path / name, size=3)))
        assert [row for _, row in found] == rows[:3], name
        assert found[2][0] == location


def test_verl_parquet(tmp_path: Path) -> None:
    row = {"data_source": "openai/gsm8k", "prompt": TURNS[:1], "reward_model": {"style": "rule", "ground_truth": "72"}, "extra_info": {"index": 0}}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "train.parquet")
    (prompt,), _ = load_prompts([SourceConfig(path=tmp_path / "train.parquet")], config(), TOKENIZER)
    assert (prompt.source, prompt.columns["answer"], prompt.columns["extra_info"]) == ("openai/gsm8k", "72", {"index": 0})


def test_bad_rows_of_csv_and_parquet_are_their_own(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'prompt,answer\nhow,1\nhow\nhow,1,2\n\xff,1\n"how\nyou",1\n')
    prompts, report = load_prompts([SourceConfig(path=tmp_path / "a.csv")], config(on_bad_row="skip"), TOKENIZER)
    assert [p.text for p in prompts] == ["how", "how\nyou"]
    assert report.dropped == {"invalid CSV": 2, "not UTF-8": 1}
    bad = pa.array([b"how", b"\xff", b"you"]).view(pa.string())
    pq.write_table(pa.table({"prompt": bad, "score": [0.0, 0.0, float("nan")]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"2 bad rows(.|\n)*a.parquet:row 2: .*not UTF-8(.|\n)*a.parquet:row 3: `score` holds NaN"):
        load_prompts([SourceConfig(path=tmp_path / "a.parquet")], config(), TOKENIZER)


def test_task_rows() -> None:
    prompts, report = load_prompts([SourceConfig(task="chain_sum", size=3, seed=1)], config(), TOKENIZER)
    assert report.summary() == "chain_sum: 3 rows"
    columns = prompts[0].columns
    assert prompts[0].source == columns["task"] == columns["data_source"] == "chain_sum"
    assert columns["entry"]["question"] == prompts[0].text
    assert columns["entry"]["answer"] == columns["answer"]
    again, _ = load_prompts([SourceConfig(task="chain_sum", size=3, seed=1)], config(), TOKENIZER)
    other, _ = load_prompts([SourceConfig(task="chain_sum", size=3, seed=2)], config(), TOKENIZER)
    assert again == prompts != other


def test_sources_that_cannot_be_read_name_the_mend(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "train.txt").write_text("")
    (tmp_path / "bad.json").write_text('[\n{"prompt": }]')
    (tmp_path / "one.json").write_text("{}")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "how"}\n' * 99)[:-9])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    (tmp_path / "folder").mkdir()
    datasets.DatasetDict({"train": datasets.Dataset.from_list([SFT_OK])}).save_to_disk(tmp_path / "splits")
    for source, message in [
        ({"path": "tran.jsonl"}, r"tran.jsonl: no such file; did you mean .*/train.jsonl\?"),
        ({"path": "no/x.jsonl"}, "no such file; give the path"),
        ({"path": "train.txt"}, r"unknown suffix '.txt'; use .jsonl"),
        ({"path": "bad.json"}, r"bad.json:2: not valid JSON"),
        ({"path": "one.json"}, "a list of objects"),
        ({"path": "cut.jsonl.gz"}, "cannot be read"),
        ({"path": "bad.parquet"}, "not a readable parquet file"),
        ({"path": "folder"}, "not written by datasets.save_to_disk"),
        ({"path": "splits"}, "holds the splits train; name one, e.g. .*splits/train"),
        ({"task": "chain_summ"}, r"unknown; did you mean chain_sum\?"),
        ({"task": "chain_sum", "task_config": {"max_term": 3}}, r"unknown task_config.max_term; did you mean max_terms\?"),
        ({"task": "chain_sum", "task_config": {"size": 3}}, "set it on the source itself"),
        ({"task": "chain_sum", "task_config": {"max_terms": -3}}, "is refused: "),
    ]:
        options = {key: tmp_path / value if key == "path" else value for key, value in source.items()}  # type: ignore[operator]
        with pytest.raises(ValueError, match=message):
            list(read_rows(SourceConfig(**options)))


# ---- before a model loads


ROWS = {
    "rl": ({"prompt": "w5 w6"}, "`prompt` is missing"),
    "sft": ({"prompt": "w5 w6", "response": "w7"}, "`prompt` is missing"),
    "reward_model": ({"prompt": "w5", "chosen": "w7", "rejected": "w8"}, "`chosen` is missing"),
}


@pytest.mark.parametrize("task", ROWS)
def test_data_is_looked_at_before_a_model_loads(models: Path, tmp_path: Path, task: str) -> None:
    good, lacks = ROWS[task]
    (tmp_path / "good.jsonl").write_text(json.dumps(good) + "\nnot json\n")  # the second row is for the start to find
    (tmp_path / "other.jsonl").write_text('{"text": "w5"}\n')
    (tmp_path / "rows.txt").write_text("")

    def refusal(rows: bool, *train: str, **data: Any) -> str:
        tree: dict[str, Any] = {
            "task": task,
            "run_dir": tmp_path / "run",
            "actor": {"path": models / "llama"},
            "reward_model": {"path": models / "llama"},
            "reward": {"components": [{"function": "format_tags"}]} if task == "rl" else {},
            "data": {"train": [{"path": tmp_path / name} for name in train], "max_prompt_tokens": 1, "max_tokens": 2, **data.get("data", {})},
            "validation": {"data": [{"path": tmp_path / name} for name in data.get("held_out", [])], "verifier": "exact_match"},
            "train": {"steps": 1},
        }
        try:
            check_data(parse_config(tree), rows)
        except ValueError as error:
            return str(error)
        return ""

    for rows in (False, True):
        assert refusal(rows, "good.jsonl", held_out=["good.jsonl"]) == ""
        assert refusal(rows, "god.jsonl") == f"data.train.path={tmp_path}/god.jsonl: no such file; did you mean {tmp_path}/good.jsonl?"
        assert refusal(rows, "good.jsonl", "god.jsonl").startswith(f"data.train.1.path={tmp_path}/god.jsonl: no such file")
        assert refusal(rows, "good.jsonl", held_out=["rows.txt"]).startswith(f"validation.data.path={tmp_path}/rows.txt: unknown suffix")
    assert refusal(False, "other.jsonl") == refusal(True, "other.jsonl", data={"on_bad_row": "skip"}) == ""
    said = refusal(True, "good.jsonl", held_out=["other.jsonl"])
    assert said.startswith("validation.data: 1 bad rows") and "other.jsonl:1" in said and lacks in said
