"""Rows to checked and tokenised prompts, sequences and preference pairs, and the order in which they are drawn."""

from rlhf.data.chat import encode_conversation, encode_prompt, encode_response
from rlhf.data.preferences import load_preferences
from rlhf.data.prompts import load_prompts
from rlhf.data.rows import DataReport, RowProblem, SourceReport
from rlhf.data.sampler import Draw, DrawSampler
from rlhf.data.sequences import load_sequences
from rlhf.data.sources import read_rows

__all__ = [
    "DataReport",
    "Draw",
    "DrawSampler",
    "RowProblem",
    "SourceReport",
    "encode_conversation",
    "encode_prompt",
    "encode_response",
    "load_preferences",
    "load_prompts",
    "load_sequences",
    "read_rows",
]
