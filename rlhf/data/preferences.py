"""Preference pairs for reward models."""

from __future__ import annotations

import os

from transformers import PreTrainedTokenizerBase

from rlhf.config import DataConfig, SourceConfig
from rlhf.data.chat import check_examples, check_tokenizer
from rlhf.data.prompts import source_name
from rlhf.data.rows import DataReport, Message, Row, RowProblem, SourceReport, build_rows, check_text, check_text_or_messages, take
from rlhf.data.sequences import check_length, encode_pair
from rlhf.data.sources import read_rows
from rlhf.types import PreferencePair, Sequence

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"

Side = str | list[Message]


def load_preferences(sources: list[SourceConfig], data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[PreferencePair], DataReport]:
    """Checked and tokenised pairs of all sources, in file order; a pair with a side longer than `data.max_tokens` is dropped.

    Prompt + chosen / rejected, each text or messages. Where chosen and rejected are whole conversations (the prompt repeated in them,
    or no prompt column), what they share is the prompt; so are HH transcripts ("\\n\\nHuman: ...\\n\\nAssistant: ..."), which become
    messages under `data.chat: true`. Raises ValueError as `build_rows` says.
    """
    check_tokenizer(tokenizer)
    check_examples(data)

    def build(source: SourceConfig, row: Row, counts: SourceReport) -> PreferencePair:
        prompt, chosen, rejected = _split(source, row, data.chat is True)
        name = source_name(source, row)
        sides = []
        for side, key in ((chosen, source.chosen_key), (rejected, source.rejected_key)):
            ids, mask = encode_pair(data, tokenizer, prompt, side, source.prompt_key, key)
            check_length(ids, data)
            sides.append(Sequence(ids, mask, name))
        return PreferencePair(sides[0], sides[1], name)

    return build_rows(sources, data, read_rows, build)


def _split(source: SourceConfig, row: Row, chat: bool) -> tuple[Side, Side, Side]:
    """(prompt, chosen, rejected) of a row, the prompt not repeated in the sides."""
    chosen_key, rejected_key = source.chosen_key, source.rejected_key
    chosen = check_text_or_messages(take(row, chosen_key, "chosen_key"), chosen_key, "response")
    rejected = check_text_or_messages(take(row, rejected_key, "rejected_key"), rejected_key, "response")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowProblem("wrong type", f"one of `{chosen_key}` and `{rejected_key}` is text, the other a list of messages; write both alike")
    if chosen == rejected or (isinstance(chosen, str) and isinstance(rejected, str) and chosen.strip() == rejected.strip()):
        raise RowProblem("equal sides", f"`{chosen_key}` and `{rejected_key}` are the same; a pair must differ")
    if source.prompt_key in row:
        prompt = check_text_or_messages(take(row, source.prompt_key, "prompt_key"), source.prompt_key, "prompt")
        if isinstance(chosen, list) and isinstance(rejected, list):
            opening: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            return prompt, _without(opening, chosen, chosen_key), _without(opening, rejected, rejected_key)
        return prompt, chosen, rejected
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _split_messages(chosen, rejected, source)
    assert isinstance(chosen, str) and isinstance(rejected, str)
    if not (chosen.startswith(_HUMAN) and rejected.startswith(_HUMAN)):
        take(row, source.prompt_key, "prompt_key")
    if chat:
        return _split_messages(_transcript(chosen, chosen_key), _transcript(rejected, rejected_key), source)
    shared = os.path.commonprefix([chosen, rejected])  # noqa: RUF071 - character by character is what is wanted
    cut = shared.rfind(_ASSISTANT) + len(_ASSISTANT)
    if _ASSISTANT not in shared:
        raise _no_shared_prompt(source)
    return chosen[:cut], check_text(chosen[cut:], chosen_key, "response"), check_text(rejected[cut:], rejected_key, "response")


def _without(opening: list[Message], side: list[Message], key: str) -> list[Message]:
    rest = side[len(opening) :] if side[: len(opening)] == opening else side
    if not rest:
        raise RowProblem("empty response", f"`{key}` only repeats the prompt; add the assistant's response")
    return rest


def _split_messages(chosen: list[Message], rejected: list[Message], source: SourceConfig) -> tuple[list[Message], list[Message], list[Message]]:
    """The prompt is what both share, up to the last message that an assistant turn follows on both sides."""
    cut = 0
    for index, (left, right) in enumerate(zip(chosen, rejected, strict=False)):
        if left["role"] == right["role"] == "assistant":
            cut = index
        if left != right:
            break
    if cut == 0:
        raise _no_shared_prompt(source)
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _no_shared_prompt(source: SourceConfig) -> RowProblem:
    return RowProblem("no shared prompt", f"`{source.chosen_key}` and `{source.rejected_key}` share no prompt; a pair answers one prompt")


def _transcript(text: str, key: str) -> list[Message]:
    """The messages of an HH transcript."""
    messages: list[Message] = []
    for part in text.split(_HUMAN)[1:]:
        human, *answers = part.split(_ASSISTANT)
        messages.append({"role": "user", "content": check_text(human, key, "message").strip()})
        messages += [{"role": "assistant", "content": check_text(answer, key, "response").strip()} for answer in answers]
    return messages
