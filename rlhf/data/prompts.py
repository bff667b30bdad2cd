"""Prompts for rl, with every other column kept for the reward functions."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.config import DataConfig, SourceConfig
from rlhf.data.chat import as_conversation, check_examples, check_tokenizer, encode_prompt, put_before
from rlhf.data.rows import DataReport, Dropped, Message, Row, RowProblem, SourceReport, build_rows, check_text, check_text_or_messages, take
from rlhf.data.sources import read_rows
from rlhf.types import Prompt


def load_prompts(sources: list[SourceConfig], data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Prompt], DataReport]:
    """Checked and tokenised prompts of all sources, in file order.

    Columns: everything of the row but the prompt; `answer` is also filled in from a verl row's `reward_model.ground_truth`, and from the
    last line (`#### 72`) of a GSM8K row, whose worked answer stays as `solution`. Raises ValueError as `build_rows` says.
    """
    check_tokenizer(tokenizer)
    check_examples(data)

    def build(source: SourceConfig, row: Row, counts: SourceReport) -> Prompt:
        key, row = normalise(source, row)
        value = check_text_or_messages(take(row, key, "prompt_key"), key, "prompt")
        messages = as_conversation(data, value, key)
        if messages is None:
            assert isinstance(value, str)
            text, ids = value, encode_prompt(tokenizer, value)
        else:
            if messages[-1]["role"] == "assistant":
                raise RowProblem("answered prompt", f"`{key}` ends with an assistant turn, so nothing is left to answer; remove that turn")
            text, ids = last_user_text(messages), encode_prompt(tokenizer, put_before(data, messages)[0])
        if len(ids) > data.max_prompt_tokens:
            if data.on_long_prompt == "drop":
                raise Dropped(f"longer than data.max_prompt_tokens={data.max_prompt_tokens}")
            ids = ids[-data.max_prompt_tokens :]
            counts.truncated += 1
        return Prompt(ids, text, source_name(source, row), {name: column for name, column in row.items() if name != key})

    return build_rows(sources, data, read_rows, build)


def normalise(source: SourceConfig, row: Row) -> tuple[str, Row]:
    """(prompt column, row) with the shapes of known data sets brought to `prompt` and `answer`. The row is not changed in place."""
    key = source.prompt_key
    if key in row:
        return key, _with_ground_truth(row)
    if "messages" in row:
        return "messages", row
    if "question" in row and "answer" in row:
        return "question", {**row, "answer": gsm8k_answer(row["answer"]), "solution": row["answer"]}
    return key, row


def _with_ground_truth(row: Row) -> Row:
    reward_model = row.get("reward_model")
    if "answer" in row or not isinstance(reward_model, dict) or "ground_truth" not in reward_model:
        return row
    return {**row, "answer": reward_model["ground_truth"]}


def gsm8k_answer(value: Any) -> str:
    """The final number of a GSM8K answer, without thousands separators."""
    _, mark, number = check_text(value, "answer", "answer").rpartition("####")
    number = number.strip().replace(",", "")
    if not mark or not number:
        raise RowProblem("no final answer", "`answer` has no final line `#### number` as in GSM8K; name the columns with prompt_key instead")
    return number


def source_name(source: SourceConfig, row: Row) -> str:
    """The name in metrics: the config's, else the row's `data_source`, else the file's or the task's."""
    own = row.get("data_source")
    return source.label if source.name is not None or not isinstance(own, str) or not own else own


def last_user_text(messages: list[Message]) -> str:
    """What a person reads of a conversation."""
    text: str = next((m["content"] for m in reversed(messages) if m["role"] == "user"), messages[-1]["content"])
    return text
