"""The hybrid engine: generation inside the training program, on the training weights.

`load_weights` and `take_over` are the only collective calls. `generate` runs on each rank alone, for as long as its own sequences take. `schedule` is
what the host plans of it, `loop` what the device runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from rlhf.config import ModelConfig
from rlhf.files import open_tensors
from rlhf.models.loading import eos_token_ids, file_key, read_architecture, tensor_names, without_dropout
from rlhf.rollout.decoder import Decoder, LeanDecoder, is_lean, lean_layout
from rlhf.rollout.generic import GenericDecoder, refuse_unsupported
from rlhf.rollout.loop import DecodeLoop, Outputs, Slots, draw_tokens
from rlhf.rollout.memory import DeviceBuffer
from rlhf.rollout.paged import PagedCache, PrefillStep, Segment
from rlhf.rollout.schedule import FIRST_ROWS, Schedule, assemble
from rlhf.rollout.weights import Slice, buffer_elements, fill, in_place, vectors_last, views
from rlhf.types import Prompt, Rollout, Sampling


@dataclass(frozen=True)
class EngineSettings:
    """Sizes of the engine on one rank."""

    max_batch: int = 128  # most sequences decoded together
    max_context: int = 0  # most tokens of prompt and response; 0 = what the first call needs
    cache_tokens: int = 0  # tokens that the KV cache holds; 0 = what max_batch sequences need, as far as memory allows
    memory_fraction: float = 0.85  # of the memory that is free when the cache is made
    page_size: int = 64
    prefill_tokens: int = 16_384  # most prompt tokens in one forward
    look_every: int = 8  # decode steps between looks of the host (1 on CPU)
    cuda_graphs: bool = True
    deterministic: bool = False  # no size and no kernel depends on free memory or on a clock


class HybridEngine:
    """`generate(prompts, ...) -> Rollout` on weights that `load_weights` handed over. Usable without the trainer."""

    def __init__(
        self,
        config: PretrainedConfig,
        eos_token_ids: list[int],
        pad_token_id: int,
        settings: EngineSettings,
        device: torch.device,
        dtype: torch.dtype,
        beat: Callable[[], None] = lambda: None,
        decode_text: Callable[[list[int]], str] | None = None,
        trust_remote_code: bool = False,
        to_come: Callable[[], int] = lambda: 0,
        most_cache: Callable[[], float | None] = lambda: None,
    ):
        """config: the actor's architecture. decode_text: token ids -> text, for stop texts. to_come: bytes of the device that others will take, or
        take back, when the cache is made: it leaves them free. most_cache: bytes that it may have in any case, if that is bounded.

        Raises ValueError that names the architecture if neither decoder computes it exactly."""
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
            if device.index != torch.cuda.current_device():
                raise ValueError(
                    f"rollout on {device}: kernels launch on the current device, {torch.cuda.current_device()}; call torch.cuda.set_device"
                )
        self.config, self.settings, self.device, self.dtype = config, settings, device, dtype
        self.pad_token_id, self.beat, self.decode_text = pad_token_id, beat, decode_text
        self.to_come, self.most_cache = to_come, most_cache
        self.eos = torch.tensor(sorted(eos_token_ids), device=device)
        self.lean = is_lean(config)
        self._model: Any = None
        self.aliases: dict[str, list[str]] = {}  # names that tied tensors also go by
        refuse_unsupported(config, settings.max_context)
        if self.lean:
            self._layout = lean_layout(config)
            if config.tie_word_embeddings:
                self.aliases = {"model.embed_tokens.weight": ["lm_head.weight"]}
        else:
            with init_empty_weights(include_buffers=False):
                self._model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
            self._model.tie_weights()  # init_empty_weights makes a parameter of its own for every name
            self._layout = vectors_last([Slice(name, tuple(p.shape)) for name, p in self._model.named_parameters()])
            every = list(self._model.named_parameters(remove_duplicate=False))
            self.aliases = {name: [n for n, q in every if q is p and n != name] for name, p in self._model.named_parameters()}
        self.weights: dict[str, Tensor] = {}  # handed over or borrowed
        self._storage: DeviceBuffer | None = None  # of weights of its own
        self._pool: DeviceBuffer | None = None
        self._wrong: Tensor | None = None
        self._warm = self._lent = False
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None  # for copies beside the decoding
        self._decoder: Decoder | None = None
        self._loop: DecodeLoop | None = None
        self._outputs: Outputs | None = None
        if self._model is not None:  # what it cannot do is refused here, before anything is loaded
            self.own_weights()
            self._model = GenericDecoder(self._model)

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        settings: EngineSettings,
        device: torch.device,
        dtype: torch.dtype,
        tokenizer: Any,
        beat: Callable[[], None] = lambda: None,
        trust_remote_code: bool = False,
    ) -> HybridEngine:
        """An engine with the weights of a model folder (safetensors), for use without the trainer. ValueError if the folder is no such model."""
        config = without_dropout(read_architecture(ModelConfig(path=folder, trust_remote_code=trust_remote_code), "model"))
        ends = eos_token_ids(folder, tokenizer, [])
        engine = cls(
            config, ends, int(tokenizer.pad_token_id), settings, device, dtype, beat, lambda ids: str(tokenizer.decode(ids)), trust_remote_code
        )  # fmt: skip
        files = tensor_names(folder)
        prefix = "model" if engine.lean else engine._model.model.base_model_prefix
        keys = {piece.name: file_key(piece.name, engine.aliases.get(piece.name, []), files, prefix) for piece in engine._layout}
        missing = sorted(name for name, key in keys.items() if key is None)
        if missing:
            raise ValueError(f"{folder}: the weights lack {missing[:3]}")
        handles = {file: open_tensors(file) for file in set(files.values())}
        engine.load_weights((name, handles[files[key]].get_tensor(key)) for name, key in keys.items() if key is not None)
        return engine

    @property
    def parameters(self) -> int:
        return sum(t.numel() for t in self.weights.values())

    @torch.no_grad()
    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take over the actor's weights: whole tensors under transformers' names. (collective, through that iterator)

        Raises RuntimeError if names or shapes do not cover the model exactly."""
        fill(self.own_weights(), tensors)

    @torch.no_grad()
    def take_over(self, gather: Callable[[dict[str, Tensor]], Tensor]) -> None:
        """The weights of a training engine: `gather` writes them to their places in the buffer and returns how many elements came out wrong, which
        `verify` looks at, so that nobody waits here. (collective)"""
        wrong = gather(self.own_weights())
        self._wrong = wrong if self._wrong is None else self._wrong + wrong

    def verify(self) -> None:
        """RuntimeError if what was taken over since the last call has come out wrong (trap 21). (waits for the device)"""
        wrong, self._wrong = int(self._wrong or 0), None
        if wrong:
            raise RuntimeError(f"hand-over of weights: {wrong} elements differ between actor and rollout (trap 21)")

    def borrow(self, weights: dict[str, Tensor]) -> bool:
        """Compute on a training engine's own weights from here on: whole tensors under transformers' names, which must keep their addresses and are
        never written. False, and nothing has changed, where they do not lie as the decoder needs them: q, k, v and gate, up next to each other.

        Raises RuntimeError if names or shapes do not cover the model exactly."""
        expected = {piece.name: piece.shape for piece in self._layout}
        if {name: tuple(tensor.shape) for name, tensor in weights.items()} != expected:
            raise RuntimeError("borrowed weights do not cover the model")
        if not in_place(weights, self._layout, self.dtype, self.device):
            return False
        if {name: tensor.data_ptr() for name, tensor in weights.items()} != {name: tensor.data_ptr() for name, tensor in self.weights.items()}:
            self._storage = None
            self._compute_on({name: tensor.detach() for name, tensor in weights.items()})
        return True

    def own_weights(self) -> dict[str, Tensor]:
        """The weights in a buffer of its own, made with undefined content if there is none."""
        if self._storage is None:
            self._storage = DeviceBuffer(buffer_elements(self._layout) * self.dtype.itemsize, self.device)
            self._compute_on(views(self._storage.tensor.view(self.dtype), self._layout))
        self._storage.restore()
        return self.weights

    def _compute_on(self, weights: dict[str, Tensor]) -> None:
        """Other addresses: what was made for the old ones goes."""
        self._loop = self._outputs = self._pool = self._decoder = None
        self.weights = weights
        if self._model is not None:
            _with_weights(self._model.model if isinstance(self._model, GenericDecoder) else self._model, weights, self.device)

    def lend(self) -> dict[str, Tensor]:
        """The weights, for a training engine to compute on as well: `release` leaves them where they are from here on."""
        self._lent = True
        return self.weights

    def release(self) -> None:
        """KV cache and weights (its own, if not lent) give their memory back; graphs keep their addresses. `take_over` takes it again."""
        for buffer in (self._pool,) if self._lent else (self._storage, self._pool):
            if buffer is not None:
                buffer.release()

    # ------------------------------------------------------------------------------------------------------------ set-up

    @torch.no_grad()
    def prepare(self, max_context: int, rows: int, window: int, sampling: Sampling, forced: bool = False) -> None:
        """Cache, state and graphs for calls of up to `rows` rows, `max_context` tokens, `window` response tokens. Kept while they suffice."""
        s = self.settings
        max_context = max(max_context, s.max_context)
        if not self.weights or (self._storage is not None and not self._storage.mapped):
            raise RuntimeError("the rollout has no weights, or they were released: load_weights, take_over or borrow comes first")
        if self._pool is not None and not self._pool.mapped:
            try:
                self._pool.restore()
            except torch.OutOfMemoryError:  # training has taken more since it was sized: size it anew
                self._loop = self._outputs = self._pool = None
        loop, cuda = self._loop, self.device.type == "cuda"
        if loop is None or max_context > loop.max_context:
            self._loop = self._outputs = self._pool = loop = None
            refuse_unsupported(self.config, max_context)
            self._decoder = LeanDecoder(self.config, self.weights, max_context) if self.lean else self._model
            decoder = self._decoder
            assert decoder is not None
            shape = decoder.shape
            pages = self._pages(max_context, shape.page_bytes(s.page_size, self.dtype))
            size = (shape.layers, 2, pages, s.page_size, shape.kv_heads, shape.head_dim)
            self._pool = DeviceBuffer(pages * shape.page_bytes(s.page_size, self.dtype), self.device)
            cache = PagedCache(shape, self._pool.tensor.view(self.dtype).view(size), s.max_batch, max_context)
            self._loop = loop = DecodeLoop(
                decoder, cache, Slots.empty(s.max_batch, self.device), self.eos, s.max_batch, max_context, s.cuda_graphs
            )  # fmt: skip
        if self._outputs is None or not self._outputs.fits(rows, window, forced, sampling):
            loop.forget_graphs()
            entropy, penalty, most_rows, widest = sampling.entropy, sampling.repetition_penalty != 1.0, rows, window
            if self._outputs is not None:  # for both: calls that alternate must not make them anew each time
                entropy, penalty = entropy or self._outputs.entropies is not None, penalty or self._outputs.seen is not None
                most_rows, widest = max(rows, self._outputs.ids.shape[0] - 1), max(window, self._outputs.ids.shape[1])
            self._outputs = None  # the old ones go first
            self._outputs = Outputs.empty(most_rows, widest, loop.decoder.vocabulary, self.device, forced, entropy, penalty)
        self._outputs.forbid(sampling, self.eos, loop.decoder.vocabulary)
        if cuda and s.cuda_graphs:
            most = loop.batch_for(min(rows, s.max_batch))
            if not s.deterministic and isinstance(loop.decoder, LeanDecoder) and not loop.decoder.tuned:
                loop.decoder.tune(loop.sizes)
            loop.capture([b for b in loop.sizes if b <= most], sampling, self._outputs, self.beat)
            self._first_prefill(sampling)

    def _first_prefill(self, sampling: Sampling) -> None:
        """Kernels of the prefill are compiled here, not in the first rollout. Two tokens on the page of nobody, and nothing is kept."""
        loop, out = self._loop, self._outputs
        assert loop is not None and out is not None
        if self._warm:
            return
        step = PrefillStep(loop.cache, [Segment(loop.cache.holder, 0, 2)])
        logits = loop.decoder.forward(torch.zeros(2, dtype=torch.int64, device=self.device), step.positions, step, step.last)
        none = torch.zeros(1, dtype=torch.int64, device=self.device)
        assert logits is not None
        draw_tokens(logits, sampling, none + len(out.ids) - 1, none, none, none, self.eos, out, none)
        self._warm = True

    def _pages(self, max_context: int, page_bytes: int) -> int:
        s = self.settings
        check_cache(s, max_context)
        least = least_pages(s, max_context)
        wanted = wanted_pages(s, max_context)
        if not s.cache_tokens:
            wanted = max(wanted, least)
        if s.cache_tokens:
            return wanted
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info(self.device)[0] - working_bytes(self.config, s, self.dtype)
        else:
            import psutil

            free = psutil.virtual_memory().available // (2 * int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        free -= self.to_come()
        allowed, most = free * s.memory_fraction, self.most_cache()
        allowed = allowed if most is None else min(allowed, most)
        pages = min(wanted, max(0, int(allowed)) // page_bytes)
        if s.deterministic and pages < wanted:
            raise ValueError(
                f"rollout: a KV cache for {s.max_batch} sequences of {max_context} tokens needs {wanted * page_bytes / 2**30:.1f} GiB, "
                f"{allowed / 2**30:.1f} are to be had, and with deterministic=true its size may not depend on that: set "
                "rollout.cache_tokens, or lower rollout.max_batch"
            )
        if pages < least:
            raise ValueError(
                f"rollout: {allowed / 2**30:.1f} GiB are to be had for the KV cache, and one sequence of {max_context} tokens needs "
                f"{least * page_bytes / 2**30:.1f}: lower rollout.max_new_tokens or data.max_prompt_tokens"
            )
        return pages

    # ---------------------------------------------------------------------------------------------------------- generate

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        draws: Sequence[int],
        group_size: int,
        sampling: Sampling,
        *,
        take: Callable[[], int | None] | None = None,
        most: int = 0,
        share: int = 0,
        limits: Sequence[int] | None = None,
        forced: Sequence[int] | None = None,
        on_finished: Callable[[int, list[int]], None] | None = None,
    ) -> Rollout:
        """`group_size` responses to each prompt; rows ordered as (prompt, sample). No collective.

        draws: global draw index of each prompt, which with the sample's index decides its noise. take: index of the next prompt for this rank,
        None when there are no more (ranks share a queue); the rollout then has the prompts that were taken. most: rows in flight, so that a
        rank leaves some to the others. share: prompts that it takes without asking; beyond them it takes freely only while less than half full,
        else one between two looks, so that whoever happens to look first does not get all that is left. limits: most response tokens, and forced:
        exact response tokens (for measurements), of each row. on_finished(row, response ids) hears of every row once, as it ends.
        ValueError where stop texts are asked of an engine without `decode_text`.
        """
        if sampling.stop and self.decode_text is None:
            raise ValueError("stop texts need decode_text (token ids -> text), which this engine was made without")
        if not prompts:
            return assemble([], torch.zeros(0, dtype=torch.int64), [], None, sampling, self.pad_token_id)
        self.verify()
        longest = max(len(p.input_ids) for p in prompts)
        rows = len(prompts) * group_size
        self.prepare(longest + sampling.max_new_tokens, rows, sampling.max_new_tokens, sampling, forced is not None)
        call = Schedule(self, prompts, draws, group_size, sampling, take, most, share, limits, forced, on_finished)
        switch = sys.getswitchinterval()
        try:
            if on_finished is not None:  # whoever scores in a thread must not keep this one from launching
                sys.setswitchinterval(1e-4)
            call.run()
        finally:
            sys.setswitchinterval(switch)
        return call.rollout()


def least_pages(settings: EngineSettings, max_context: int) -> int:
    """One sequence, the holder's partial page, the page of nobody."""
    return -(-max_context // settings.page_size) + 3


def check_cache(settings: EngineSettings, max_context: int) -> None:
    """ValueError where `cache_tokens` are fewer than one sequence of so many tokens needs."""
    least = least_pages(settings, max_context)
    if settings.cache_tokens and wanted_pages(settings, max_context) < least:
        raise ValueError(
            f"rollout.cache_tokens={settings.cache_tokens}: one sequence of {max_context} tokens needs at least {(least - 1) * settings.page_size}; "
            "raise it, or leave it out"
        )


def wanted_pages(settings: EngineSettings, max_context: int) -> int:
    """Pages of the KV cache, if memory allows; the page of nobody included."""
    s = settings
    return -(-s.cache_tokens // s.page_size) + 1 if s.cache_tokens else (s.max_batch + 1) * -(-max_context // s.page_size) + 1


def working_bytes(config: PretrainedConfig, settings: EngineSettings, dtype: torch.dtype) -> int:
    """Roughly what the largest prefill and the logits of a step take beside the cache."""
    text: Any = config.get_text_config()
    hidden = text.hidden_size
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    prefill = settings.prefill_tokens * (3 * inner + 4 * hidden) * dtype.itemsize
    return int(prefill + max(settings.max_batch, FIRST_ROWS) * text.vocab_size * (4 + dtype.itemsize))


def _with_weights(model: Any, weights: dict[str, Tensor], device: torch.device) -> None:
    """The model with these tensors as its parameters, and its buffers on the device."""
    owners = dict(model.named_modules())
    shared: dict[int, torch.nn.Parameter] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, empty in parameters.items():
        if id(empty) not in shared:
            shared[id(empty)] = torch.nn.Parameter(weights[name], requires_grad=False)
        module, _, leaf = name.rpartition(".")
        owners[module]._parameters[leaf] = shared[id(empty)]
    for module in owners.values():
        for leaf, tensor in module._buffers.items():
            if tensor is not None:
                module._buffers[leaf] = tensor.to(device)
    model.eval()
