"""From text and conversations to token ids and loss masks.

A text is tokenised whole and spans of characters are mapped to its tokens, so token boundaries are those the model meets.
Only the plain prompt / response form joins two pieces, as generation does: the prompt stands tokenised before the response exists.
"""

from __future__ import annotations

import re
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from rlhf.config import DataConfig
from rlhf.data.rows import Message, RowProblem, check_messages

Encoded = tuple[list[int], list[bool]]  # input_ids [T], loss_mask [T]
Span = tuple[int, int]  # characters [start, end)

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError if the tokenizer cannot serve: no offsets, no end token."""
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer {tokenizer.name_or_path}: is not a fast tokenizer; save it with a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {tokenizer.name_or_path}: has no eos_token, so no response could end; set it in tokenizer_config.json")


def check_examples(data: DataConfig) -> None:
    """Raises ValueError if `data.examples` is not a conversation."""
    try:
        if data.examples:
            check_messages(list(data.examples), "data.examples", "examples")
    except RowProblem as problem:
        raise ValueError(str(problem)) from None


def as_conversation(data: DataConfig, value: str | list[Message], key: str) -> list[Message] | None:
    """The messages of a prompt (or of a whole conversation), or None where `data.chat` leaves it plain text."""
    if isinstance(value, list):
        if data.chat is False:
            raise RowProblem("conversation", f"`{key}` is a list of messages but data.chat is false; remove data.chat, or give plain text")
        return value
    if data.chat:
        return [{"role": "user", "content": value}]
    if data.system_prompt is not None or data.examples:
        raise ValueError(
            "data.system_prompt and data.examples need conversations, but there are plain-text rows; set data.chat=true to wrap these too"
        )
    return None


def put_before(data: DataConfig, messages: list[Message]) -> tuple[list[Message], int]:
    """(`data.system_prompt`, `data.examples` and `messages` as one conversation, index of the first message after the examples).

    A system message of the row itself stays first, and wins over the config's.
    """
    own = messages[:1] if messages[0]["role"] in ("system", "developer") else []
    system = own or ([] if data.system_prompt is None else [{"role": "system", "content": data.system_prompt}])
    head = [*system, *data.examples]
    return [*head, *messages[len(own) :]], len(head)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | list[Message]) -> list[int]:
    """Token ids [T] that a response follows.

    Text: with the tokenizer's default special tokens, except those it puts at the end (an EOS there would end the response before it
    starts). Messages: the chat template with its generation prompt. Raises RowProblem if the template refuses the messages.
    """
    if isinstance(prompt, list):
        text, _ = _render(tokenizer, prompt, add_generation_prompt=True)
        return _ids(tokenizer, text)
    encoded = tokenizer(prompt, return_special_tokens_mask=True)
    ids: list[int] = list(encoded["input_ids"])
    added: list[int] = list(encoded["special_tokens_mask"])  # 1 where the tokenizer added the token, 0 where the text holds it
    while added and added[-1]:
        ids.pop()
        added.pop()
    return ids


def encode_response(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> Encoded:
    """Plain prompt + response + EOS; the loss is on the response and on its EOS, also where pad = EOS (trap 3)."""
    prompt_ids = encode_prompt(tokenizer, prompt)
    response_ids = _ids(tokenizer, response)
    if response_ids[-1:] != [tokenizer.eos_token_id]:
        response_ids.append(tokenizer.eos_token_id)
    return prompt_ids + response_ids, [False] * len(prompt_ids) + [True] * len(response_ids)


def encode_conversation(tokenizer: PreTrainedTokenizerBase, messages: list[Message], first_trained: int = 0) -> Encoded:
    """The rendered conversation; the loss is on the assistant turns from message `first_trained` on, each with its end-of-turn token.

    What the template writes after that token (mostly a newline) does not train: generation has stopped there. The sequence ends with
    the last trained token, as a rollout does, so a reward model reads its score where it will read it later. Raises RowProblem if
    no such turn exists, if the template refuses the messages, or if its turns cannot be told apart.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    trained = [index for index in turns if index >= first_trained]
    if not trained:
        raise RowProblem("no assistant turn", "the conversation has no assistant turn to train on; add one, or set data.*.response_key")
    marks = _GENERATION.search(_template(tokenizer)) is not None
    text, spans = _render(tokenizer, messages, marked=marks)
    if not marks:
        spans = [_turn_by_prefix(tokenizer, text, messages, index) for index in trained]
    elif len(spans) == len(turns):
        spans = spans[len(turns) - len(trained) :]
    else:
        raise _template_problem(f"has {len(spans)} {{% generation %}} blocks for {len(turns)} assistant turns; it must have one for each")
    spans = [_with_end_token(tokenizer, text, span) for span in spans]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = _mask(encoded["offset_mapping"], spans)
    end = len(mask) - mask[::-1].index(True)
    return list(encoded["input_ids"][:end]), mask[:end]


def _mask(offsets: list[Span], spans: list[Span]) -> list[bool]:
    """[T] True where a token holds a character of a span (spans in order, not overlapping)."""
    mask: list[bool] = []
    current = 0
    for start, end in offsets:
        # Byte-level tokenizers may trim leading spaces from the offsets (to nothing for a token of spaces), so `start` alone cannot decide.
        while current < len(spans) and spans[current][1] <= start:
            current += 1
        mask.append(current < len(spans) and spans[current][0] < end)
    return mask


def _turn_by_prefix(tokenizer: PreTrainedTokenizerBase, text: str, messages: list[Message], index: int) -> Span:
    """Assistant turn `index` in the whole rendering: what it adds to the messages before it and their generation prompt."""
    before, _ = _render(tokenizer, messages[:index], add_generation_prompt=True)
    after, _ = _render(tokenizer, messages[: index + 1])
    if not after.startswith(before):
        raise _template_problem(f"renders messages[:{index + 1}] not as a continuation of messages[:{index}] with the generation prompt")
    if not text.startswith(after):
        raise _template_problem(f"renders assistant turn {index} differently once other messages follow it: keep one assistant turn in a row")
    return len(before), len(after)


def _with_end_token(tokenizer: PreTrainedTokenizerBase, text: str, span: Span) -> Span:
    """The span cut or extended to end with the end-of-turn token, which templates put before a newline or after the marked block."""
    start, end = span
    specials = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    turn = text[start:end].rstrip()
    if any(turn.endswith(token) for token in specials):
        return start, start + len(turn)
    # Just after the block, only an end token may be taken in, never the header of the next turn.
    ends = [token for token in specials if token == tokenizer.eos_token or text.rstrip().endswith(token)]
    for token in ends:
        if text.startswith(token, end):
            return start, end + len(token)
    raise _template_problem("ends an assistant turn without a special token, so no response would learn to end: write {{ eos_token }} there")


def _template_problem(what: str) -> RowProblem:
    return RowProblem("chat template", f"the chat template {what}; or mark the assistant turns in the template with {{% generation %}}")


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.chat_template is None:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path}: has no chat template, but there are conversations; "
            "add chat_template.jinja to its folder, or give plain text and data.chat=false"
        )
    template: str = tokenizer.get_chat_template()
    return template


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], add_generation_prompt: bool = False, marked: bool = False
) -> tuple[str, list[Span]]:
    """The text of a conversation, and with `marked` the spans of its {% generation %} blocks."""
    # Below apply_chat_template, which gives the blocks only as a token mask: their ends are needed in characters.
    special_tokens: dict[str, Any] = tokenizer.special_tokens_map
    rendered: Any
    try:
        rendered = render_jinja_template(
            [messages],
            chat_template=_template(tokenizer),
            return_assistant_tokens_mask=marked,
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
        )
    except TemplateError as error:
        raise RowProblem("chat template", f"the chat template refuses these messages: {error.message}; mend the row or the template") from None
    texts, spans = rendered
    return texts[0], spans[0] if marked else []


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
