"""Demonstrations for sft."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from rlhf.config import DataConfig, SourceConfig
from rlhf.data.chat import Encoded, as_conversation, check_examples, check_tokenizer, encode_conversation, encode_response, put_before
from rlhf.data.prompts import source_name
from rlhf.data.rows import DataReport, Dropped, Message, Row, RowProblem, SourceReport, build_rows, check_text, check_text_or_messages, take
from rlhf.data.sources import read_rows
from rlhf.types import Sequence


def load_sequences(sources: list[SourceConfig], data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Sequence], DataReport]:
    """Checked and tokenised training sequences of all sources, in file order; longer ones than `data.max_tokens` are dropped.

    With a response column the loss is on the response only; in a whole conversation (`messages`, or a prompt column that ends with an
    assistant turn) it is on every assistant turn, those of `data.examples` excepted. Raises ValueError as `build_rows` says.
    """
    check_tokenizer(tokenizer)
    check_examples(data)

    def build(source: SourceConfig, row: Row, counts: SourceReport) -> Sequence:
        ids, mask = _encode(source, row)
        check_length(ids, data)
        return Sequence(ids, mask, source_name(source, row))

    def _encode(source: SourceConfig, row: Row) -> Encoded:
        key, response_key = _keys(source, row)
        value = check_text_or_messages(take(row, key, "prompt_key"), key, "prompt")
        if isinstance(value, list) and response_key not in row and value[-1]["role"] == "assistant":
            messages = as_conversation(data, value, key)
            assert messages is not None
            return encode_conversation(tokenizer, *put_before(data, messages))
        response: str | list[Message]
        if response_key not in row and isinstance(row.get("reward_model"), dict):  # verl: the ground truth is all the row knows
            response = check_text(row["reward_model"].get("ground_truth"), "reward_model.ground_truth", "response")
        else:
            response = check_text_or_messages(take(row, response_key, "response_key"), response_key, "response")
        return encode_pair(data, tokenizer, value, response, key, response_key)

    return build_rows(sources, data, read_rows, build)


def _keys(source: SourceConfig, row: Row) -> tuple[str, str]:
    """(prompt column, response column), GSM8K and `messages` recognised where the configured prompt column is missing."""
    if source.prompt_key not in row:
        if "messages" in row:
            return "messages", source.response_key
        if "question" in row and "answer" in row:
            return "question", "answer"
    return source.prompt_key, source.response_key


def encode_pair(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, prompt: str | list[Message], response: str | list[Message], key: str, response_key: str
) -> Encoded:
    """Prompt + response, each text or messages; the loss is on the response only."""
    if isinstance(response, list) and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    messages = as_conversation(data, prompt, key)
    if messages is None:
        assert isinstance(prompt, str) and isinstance(response, str)
        return encode_response(tokenizer, prompt, response)
    if messages[-1]["role"] == "assistant":
        raise RowProblem("answered prompt", f"`{key}` ends with an assistant turn, before `{response_key}`; remove one of them")
    if isinstance(response, str):
        response = [{"role": "assistant", "content": response}]
    elif response[-1]["role"] != "assistant":
        raise RowProblem("no assistant turn", f"`{response_key}` ends with a {response[-1]['role']} message; it must end with an assistant turn")
    before, _ = put_before(data, messages)
    return encode_conversation(tokenizer, [*before, *response], len(before))


def check_length(ids: list[int], data: DataConfig) -> None:
    if len(ids) > data.max_tokens:
        raise Dropped(f"longer than data.max_tokens={data.max_tokens}")
