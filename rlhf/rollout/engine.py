"""The hybrid engine: generation inside the training program, on the training weights.

`load_weights` and `take_over` are the only collective calls. `generate` runs on each rank alone, for as long as its own sequences take. The host
plans (which prompts enter, when to make room) from looks at the device that lag one block of steps behind; the device decides everything about
tokens.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from rlhf.config import ModelConfig
from rlhf.models.loading import eos_token_ids, file_key, read_architecture, tensor_names, without_dropout
from rlhf.rollout import kernels
from rlhf.rollout.decoder import Decoder, LeanDecoder, is_lean, lean_layout
from rlhf.rollout.generic import GenericDecoder, refuse_unsupported
from rlhf.rollout.loop import DecodeLoop, Outputs, Slots, draw_tokens
from rlhf.rollout.memory import DeviceBuffer
from rlhf.rollout.paged import PagedCache, PrefillStep, Segment, upload
from rlhf.rollout.sampler import row_keys
from rlhf.rollout.weights import Slice, buffer_elements, fill, views
from rlhf.types import Prompt, Rollout, Sampling

FIRST_ROWS = 512  # first tokens sampled at once: each needs a row of logits


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


@dataclass
class _Waiting:
    """Rows that have no slot yet and share what comes before. tokens > 0: they were preempted after so many response tokens (one row then)."""

    ids: list[int]
    rows: list[int]
    tokens: int = 0
    held: bool = False  # the holder slot has its prefix

    @property
    def length(self) -> int:
        """Tokens that are in the cache once a row of it has entered: the last token of a preempted row is fed again."""
        return len(self.ids) + max(0, self.tokens - 1)


@dataclass
class _Look:
    """What the device held when a block of steps had run."""

    state: Tensor  # [4, used] int64 on the host, valid once `event` has passed: row, length, live, new
    free: Tensor  # [1] int32 on the host
    event: torch.cuda.Event | None
    admitted: int  # rows that had been given a slot by then
    steps: int  # decode steps that had been launched by then
    taken: int  # pages that the host had given away by then


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
    ):
        """config: the actor's architecture. decode_text: token ids -> text, for stop texts.

        Raises ValueError that names the architecture if neither decoder computes it exactly."""
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
            if device.index != torch.cuda.current_device():
                raise ValueError(
                    f"rollout on {device}: kernels launch on the current device, {torch.cuda.current_device()}; call torch.cuda.set_device"
                )
        self.config, self.settings, self.device, self.dtype = config, settings, device, dtype
        self.pad_token_id, self.beat, self.decode_text = pad_token_id, beat, decode_text
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
            self._layout = [Slice(name, tuple(p.shape)) for name, p in self._model.named_parameters()]
            every = list(self._model.named_parameters(remove_duplicate=False))
            self.aliases = {name: [n for n, q in every if q is p and n != name] for name, p in self._model.named_parameters()}
        self._storage = DeviceBuffer(buffer_elements(self._layout) * dtype.itemsize, device)
        self.weights = views(self._storage.tensor.view(dtype), self._layout)
        self._pool: DeviceBuffer | None = None
        self._wrong: Tensor | None = None
        self._warm = False
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None  # for copies beside the decoding
        self._decoder: Decoder | None = None
        self._loop: DecodeLoop | None = None
        self._outputs: Outputs | None = None
        if self._model is not None:
            self._model = GenericDecoder(_with_weights(self._model, self.weights, device))

    @classmethod
    def from_folder(
        cls, folder: Path, settings: EngineSettings, device: torch.device, dtype: torch.dtype, tokenizer: Any, beat: Callable[[], None] = lambda: None
    ) -> HybridEngine:
        """An engine with the weights of a model folder (safetensors), for use without the trainer. ValueError if the folder is no such model."""
        config = without_dropout(read_architecture(ModelConfig(path=folder), "model"))
        ends = eos_token_ids(folder, tokenizer, [])
        engine = cls(config, ends, int(tokenizer.pad_token_id), settings, device, dtype, beat, lambda ids: str(tokenizer.decode(ids)))
        files = tensor_names(folder)
        prefix = "model" if engine.lean else engine._model.model.base_model_prefix
        keys = {name: file_key(name, engine.aliases.get(name, []), files, prefix) for name in engine.weights}
        missing = sorted(name for name, key in keys.items() if key is None)
        if missing:
            raise ValueError(f"{folder}: the weights lack {missing[:3]}")
        handles = {file: safe_open(file, framework="pt") for file in set(files.values())}
        engine.load_weights((name, handles[files[key]].get_tensor(key)) for name, key in keys.items() if key is not None)
        return engine

    @property
    def parameters(self) -> int:
        return sum(t.numel() for t in self.weights.values())

    @torch.no_grad()
    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take over the actor's weights: whole tensors under transformers' names. (collective, through that iterator)

        Raises RuntimeError if names or shapes do not cover the model exactly."""
        self._storage.restore()
        fill(self.weights, tensors)

    @torch.no_grad()
    def take_over(self, gather: Callable[[dict[str, Tensor]], Tensor]) -> None:
        """The weights of a training engine: `gather` writes them to their places in the buffer and returns how many elements came out wrong, which
        `generate` looks at, so that nobody waits here. (collective)"""
        self._storage.restore()
        self._wrong = gather(self.weights)

    def release(self) -> None:
        """Weights and KV cache give their memory back; graphs keep their addresses. `load_weights` takes it again."""
        for buffer in (self._storage, self._pool):
            if buffer is not None:
                buffer.release()

    # ------------------------------------------------------------------------------------------------------------ set-up

    @torch.no_grad()
    def prepare(self, max_context: int, rows: int, window: int, sampling: Sampling, forced: bool = False) -> None:
        """Cache, state and graphs for calls of up to `rows` rows, `max_context` tokens, `window` response tokens. Kept while they suffice."""
        s = self.settings
        max_context = max(max_context, s.max_context)
        if not self._storage.mapped:
            raise RuntimeError("the rollout's weights were released: load_weights or take_over comes first")
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
            old = self._outputs
            self._outputs = Outputs.empty(
                max(rows, old.ids.shape[0] - 1 if old else 0),
                max(window, old.ids.shape[1] if old else 0),
                loop.decoder.vocabulary,
                self.device,
                forced,
                sampling,
            )
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
        kernels.sample(logits, sampling.temperature or 1.0, sampling.temperature > 0, none, none, none)
        self._warm = True

    def _pages(self, max_context: int, page_bytes: int) -> int:
        s = self.settings
        least = -(-max_context // s.page_size) + 3  # one sequence, the holder's partial page, the page of nobody
        wanted = -(-s.cache_tokens // s.page_size) + 1 if s.cache_tokens else (s.max_batch + 1) * -(-max_context // s.page_size) + 1
        if not s.cache_tokens:
            wanted = max(wanted, least)
        elif wanted < least:
            raise ValueError(
                f"rollout.cache_tokens={s.cache_tokens}: one sequence of {max_context} tokens needs at least {(least - 1) * s.page_size}"
            )
        if s.cache_tokens:
            return wanted
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info(self.device)[0] - self._working_bytes()
        else:
            import psutil

            free = psutil.virtual_memory().available // (2 * int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        pages = min(wanted, int(free * s.memory_fraction) // page_bytes)
        if s.deterministic and pages < wanted:
            raise ValueError(
                f"rollout: a KV cache for {s.max_batch} sequences of {max_context} tokens needs {wanted * page_bytes / 2**30:.1f} GiB, "
                f"{free * s.memory_fraction / 2**30:.1f} are to be had, and with deterministic=true its size may not depend on that: set "
                "rollout.cache_tokens, or lower rollout.max_batch"
            )
        if pages < least:
            raise ValueError(
                f"rollout: {free / 2**30:.1f} GiB are free for the KV cache, and one sequence of {max_context} tokens needs "
                f"{least * page_bytes / 2**30:.1f}: lower rollout.max_new_tokens or data.max_prompt_tokens"
            )
        return pages

    def _working_bytes(self) -> int:
        """Roughly what the largest prefill and the logits of a step take beside the cache."""
        text: Any = self.config.get_text_config()
        hidden = text.hidden_size
        inner = getattr(text, "intermediate_size", None) or 4 * hidden
        prefill = self.settings.prefill_tokens * (3 * inner + 4 * hidden) * self.dtype.itemsize
        return prefill + max(self.settings.max_batch, FIRST_ROWS) * text.vocab_size * (4 + self.dtype.itemsize)

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
            return _assemble([], torch.zeros(0, dtype=torch.int64), [], None, sampling, self.pad_token_id)
        if self._wrong is not None and int(self._wrong):
            raise RuntimeError(f"hand-over of weights: {int(self._wrong)} elements differ between actor and rollout (trap 21)")
        self._wrong = None
        longest = max(len(p.input_ids) for p in prompts)
        rows = len(prompts) * group_size
        self.prepare(longest + sampling.max_new_tokens, rows, sampling.max_new_tokens, sampling, forced is not None)
        call = _Call(self, prompts, draws, group_size, sampling, take, most, share, limits, forced, on_finished)
        switch = sys.getswitchinterval()
        try:
            if on_finished is not None:  # whoever scores in a thread must not keep this one from launching
                sys.setswitchinterval(1e-4)
            call.run()
        finally:
            sys.setswitchinterval(switch)
        return call.rollout()


def _with_weights(model: Any, weights: dict[str, Tensor], device: torch.device) -> Any:
    """The model with its parameters in the flat buffer, and its buffers on the device."""
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
    return model.eval()


class _Call:
    """One call of `generate`: the host's side of it."""

    def __init__(
        self,
        engine: HybridEngine,
        prompts: Sequence[Prompt],
        draws: Sequence[int],
        group_size: int,
        sampling: Sampling,
        take: Callable[[], int | None] | None,
        most: int,
        share: int,
        limits: Sequence[int] | None,
        forced: Sequence[int] | None,
        on_finished: Callable[[int, list[int]], None] | None,
    ):
        assert engine._loop is not None and engine._outputs is not None
        self.engine, self.loop, self.out, self.sampling = engine, engine._loop, engine._outputs, sampling
        self.cache, self.state, self.decoder = self.loop.cache, self.loop.state, self.loop.decoder
        self.device, self.cuda = engine.device, engine.device.type == "cuda"
        self.prompts, self.group_size, self.take, self.on_finished = prompts, group_size, take, on_finished
        self.draw = torch.tensor(draws, dtype=torch.int64).repeat_interleave(group_size)
        self.sample = torch.arange(group_size).repeat(len(prompts))
        self.keys = row_keys(sampling.seed, sampling.stream, self.draw, self.sample).to(self.device)
        rows = len(prompts) * group_size
        window = sampling.max_new_tokens
        self.limit = torch.tensor(limits if limits is not None else [window] * rows).clamp(max=window).to(self.device)
        self.out.clear()
        if forced is not None:
            self.out.forced[:rows] = torch.tensor(forced, device=self.device)
        self.cache.reset()
        self.state.live.zero_()
        self.most = min(most or self.loop.max_batch, self.loop.max_batch)
        self.share, self.beyond = share or len(prompts), -1  # and after how many steps the last prompt beyond the share was taken
        self.waiting: deque[_Waiting] = deque()
        self.taken: list[int] = []
        self.exhausted = take is None
        if take is None:
            self._enqueue(range(len(prompts)))
        # No more than a page: a row then begins at most one page between two looks.
        self.block = min(engine.settings.look_every, self.cache.page_size) if self.cuda else 1
        self.used = 0  # slots below this may be live
        self.admitted = self.steps = self.pages_taken = 0
        self.free_pages = self.cache.pages - 1  # at least so many, as of the last look
        self.growth = np.zeros((4, 0), dtype=np.int64)  # slots that may live: length, pages held, after how many steps that was so, entry number
        self.checked: dict[int, int] = {}  # row -> response tokens that were searched for stop texts
        self.stopped: dict[int, int] = {}  # row -> response tokens, ended by a stop text
        self.told: set[int] = set()
        self.side = engine.side

    def _enqueue(self, prompts: Iterable[int]) -> None:
        """Equal prompts wait together: one prefill serves them all."""
        together: dict[tuple[int, ...], _Waiting] = {}
        for p in prompts:
            self.taken.append(p)
            ids = self.prompts[p].input_ids
            rows = range(p * self.group_size, (p + 1) * self.group_size)
            if tuple(ids) in together:
                together[tuple(ids)].rows += rows
            else:
                together[tuple(ids)] = _Waiting(ids, list(rows))
        self.waiting += together.values()

    # ------------------------------------------------------------------------------------------------------------ the loop

    def run(self) -> None:
        previous: _Look | None = None
        while True:
            self._admit()
            if self.used == 0:
                if not self.waiting:
                    return
                continue
            if not self._room():
                self._make_room()
                previous = None
                continue
            batch = self.loop.batch_for(self.used)
            for _ in range(self.block):
                self.loop.step(batch, self.sampling, self.out)
            self.steps += self.block
            look = self._look()
            self.engine.beat()
            if not self.cuda:
                self._consider(look)
            else:
                if previous is not None:
                    self._consider(previous)
                previous = look

    def _look(self) -> _Look:
        s, used = self.state, self.used
        state = torch.stack([s.row[:used], s.length[:used], s.live[:used].long(), s.new[:used]])
        free = self.cache.free_count.clone()
        event = None
        if self.cuda:
            pinned, pinned_free = torch.empty(state.shape, dtype=state.dtype, pin_memory=True), torch.empty(1, dtype=torch.int32, pin_memory=True)
            state, free = pinned.copy_(state, non_blocking=True), pinned_free.copy_(free, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        return _Look(state, free, event, self.admitted, self.steps, self.pages_taken)

    def _consider(self, look: _Look) -> None:
        """Learn from a look: who ended, how many slots are needed, how many pages are left; close the gaps that the ended ones leave."""
        if look.event is not None:
            look.event.synchronize()
        row, length, live, new = look.state.numpy()
        if self.sampling.stop:
            self._search_stops(row, new)
        if self.on_finished is not None:
            self._tell(row[live == 0])
        alive = live == 1
        page = self.cache.page_size
        since = self.growth[:, self.growth[3] >= look.admitted]  # entered after the look
        seen = np.stack([length[alive], -(-length[alive] // page), np.full(alive.sum(), look.steps), np.full(alive.sum(), -1)])
        self.growth = np.concatenate([seen, since], axis=1)
        self.free_pages = int(look.free) - (self.pages_taken - look.taken)
        bound = int(alive.sum()) + self.admitted - look.admitted
        pending = bool(self.waiting) or not self.exhausted
        fewer = self.loop.batch_for(bound) < self.loop.batch_for(self.used) if bound else self.used > 0
        if bound < self.used and (fewer or (pending and self.used - bound >= max(1, self.used // 16))):
            self._compact(bound)

    def _compact(self, bound: int) -> None:
        """Live slots to the front, in their order; the pages of the others are free. Without waiting for the device."""
        used = self.used
        order = torch.argsort((~self.state.live[:used]).to(torch.int8), stable=True)
        dead = ~self.state.live[:used]
        # The pages of dead slots first: a release of all slots with the living ones masked out needs no count on the host.
        held = self.cache.held[:used].clone()
        self.cache.held[:used] = torch.where(dead, held, 0)
        tables = self.cache.table[:used].clone()
        self.cache.release(self.loop.slots[:used])
        self.cache.table[:used] = torch.where(dead[:, None], 0, tables)[order]
        self.cache.held[:used] = torch.where(dead, 0, held)[order]
        self.state.reorder(order)
        self.used = bound

    def _track(self, lengths: np.ndarray, steps: int) -> None:
        """Rows with `lengths` tokens in the cache have entered."""
        number = np.arange(self.admitted, self.admitted + len(lengths))
        fresh = np.stack([lengths, -(-lengths // self.cache.page_size), np.full(len(lengths), steps), number])
        self.growth = np.concatenate([self.growth, fresh], axis=1)
        self.admitted += len(lengths)

    def _growth(self, steps: int) -> int:
        """Most pages that the live slots need for `steps` steps from now."""
        length, held, at, _ = self.growth
        return int((-(-(length + (self.steps - at) + steps) // self.cache.page_size) - held).sum())

    def _room(self) -> bool:
        return self._growth(self.block) <= self.free_pages

    def _make_room(self) -> None:
        """The pool is full: give back what ended rows hold, then preempt the youngest rows until the others can go on. (waits for the device)"""
        self._consider(self._look())
        self._consider(self._look())  # without the rows that the first has ended
        self._compact(int(self.growth.shape[1]))
        self._consider(self._look())
        if self._room() or self.used == 0:
            return
        look = self._look()
        if look.event is not None:
            look.event.synchronize()
        row, _, _, new = look.state.numpy()
        victims: list[int] = []
        page = self.cache.page_size
        free, growth = self.free_pages, self.growth
        for slot in range(self.used - 1, 0, -1):
            victims.append(slot)
            # Shared pages are not free until the last of the group goes: count only what is surely the victim's own.
            free += max(0, int(growth[1, slot]) - self._shared_pages(int(row[slot])))
            rest = growth[:, :slot]
            if int((-(-(rest[0] + self.block) // page) - rest[1]).sum()) <= free:
                break
        if not victims:
            self._drop_holder()
            return
        for slot in victims:
            r = int(row[slot])
            self.waiting.appendleft(_Waiting(self.prompts[r // self.group_size].input_ids, [r], tokens=int(new[slot])))
        self.state.live[torch.tensor(victims, device=self.device)] = False
        self._compact(self.used - len(victims))
        self._consider(self._look())

    def _shared_pages(self, row: int) -> int:
        return len(self.prompts[row // self.group_size].input_ids) // self.cache.page_size

    def _drop_holder(self) -> None:
        """Rows of a partly admitted group prefill their prompt again, one by one."""
        for waiting in list(self.waiting):
            if waiting.held:
                self.waiting.remove(waiting)
                self.waiting += (_Waiting(waiting.ids, [r], tokens=1) for r in waiting.rows)
                self.cache.release(self.cache.holder_index)
                self._consider(self._look())

    # ----------------------------------------------------------------------------------------------------------- admission

    def _admit(self) -> None:
        """Slots, pages and a prefill for as many waiting rows as fit."""
        while True:
            batch: list[tuple[_Waiting, list[int], int]] = []  # (what waits, rows that enter, first slot)
            budget = self.engine.settings.prefill_tokens
            slot = self.used
            reserve = self._growth(self.block)
            while slot < self.most and budget > 0:
                if not self.waiting and not self._pull(slot):
                    break
                head = self.waiting[0]
                length = head.length
                full, partial = divmod(length, self.cache.page_size)
                number = min(len(head.rows), self.most - slot)
                shared = 0 if head.held else full
                holder = 0 if head.held else int(partial > 0)
                spare = self.free_pages - reserve - number  # a page each, to begin with
                if partial and number > spare - shared - holder:
                    number = spare - shared - holder
                if number <= 0 or spare < shared:
                    if slot > 0:
                        break
                    number = 1  # alone on the device: it fits, whatever the reserve
                    if not head.held:
                        self._drop_holder()
                keep = number < len(head.rows)
                needed = shared + (number if partial else 0) + (holder if keep else 0)
                self.free_pages -= needed
                self.pages_taken += needed
                reserve += number
                batch.append((head, head.rows[:number], slot))
                head.rows = head.rows[number:]
                slot += number
                budget -= 0 if head.held else length
                if not head.rows:
                    self.waiting.popleft()
                else:
                    break  # slots or pages are used up
            if not batch:
                return
            self._enter(batch)
            lengths = np.concatenate([np.full(len(rows), w.length) for w, rows, _ in batch])
            self._track(lengths, self.steps)
            self.used = slot

    def _pull(self, used: int) -> bool:
        if self.exhausted or self.take is None:
            return False
        if len(self.taken) >= self.share and 2 * used >= self.most:
            if self.beyond == self.steps:
                return False
            self.beyond = self.steps
        p = self.take()
        if p is None:
            self.exhausted = True
            return False
        self._enqueue([p])
        return True

    def _enter(self, batch: list[tuple[_Waiting, list[int], int]]) -> None:
        """Pages, prefill and slots for all entries at once: what the device is asked to do does not grow with their number."""
        cache = self.cache
        fresh = [entry for entry in batch if not entry[0].held]
        for waiting, rows, slot in batch:  # first, because a new group may need the holder after them
            if waiting.held:
                full, partial = divmod(waiting.length, cache.page_size)
                cache.share(cache.holder, range(slot, slot + len(rows)), full, partial > 0)
                if not waiting.rows:
                    cache.release(cache.holder_index)
        if fresh:
            numbered, copies = self._pages_for(fresh)
            self._prefill(fresh)
            if copies.shape[1]:
                source, target = numbered[upload(copies, self.device)].long()
                cache.copy_pages(source, target)
        for waiting, _, _ in fresh:
            waiting.held = bool(waiting.rows)
        self._seat(batch)

    def _pages_for(self, fresh: list[tuple[_Waiting, list[int], int]]) -> tuple[Tensor, np.ndarray]:
        """New pages for every slot of each entry (and the holder, for rows that wait on): full ones shared, the partly filled one each its own.
        Returns the pages by number, and the numbers [2, copies] of pages to be copied once the first slot's are filled."""
        page = self.cache.page_size
        slots: list[int] = []
        places = np.zeros(
            (sum(len(rows) + bool(w.rows) for w, rows, _ in fresh), max(self.cache.pages_for(w.length) for w, _, _ in fresh)), dtype=np.int64
        )
        counts: list[np.ndarray] = []
        copies: list[np.ndarray] = []
        given = at = 0
        for waiting, rows, slot in fresh:
            seats = [*range(slot, slot + len(rows)), *([self.cache.holder] if waiting.rows else [])]
            full, partial = divmod(waiting.length, page)
            places[at : at + len(seats), :full] = np.arange(given + 1, given + full + 1)
            counts.append(np.full(full, len(seats)))
            given += full
            if partial:
                own = np.arange(given + 1, given + len(seats) + 1)
                places[at : at + len(seats), full] = own
                counts.append(np.ones(len(seats), dtype=np.int64))
                copies.append(np.stack([own[:1].repeat(len(seats) - 1), own[1:]]))
                given += len(seats)
            slots += seats
            at += len(seats)
        return self.cache.take(slots, places, np.concatenate(counts)), np.concatenate(copies, axis=1) if copies else np.zeros((2, 0), dtype=np.int64)

    def _prefill(self, fresh: list[tuple[_Waiting, list[int], int]]) -> None:
        """Through the model, in stretches of at most `prefill_tokens`; then the first token of every row of a new group."""
        budget = self.engine.settings.prefill_tokens
        stretch: list[tuple[Segment, int]] = []
        room = budget
        for index, (waiting, _, slot) in enumerate(fresh):
            length, start = waiting.length, 0
            while start < length:
                end = min(length, start + room)
                stretch.append((Segment(slot, start, end), index))
                room -= end - start
                start = end
                if room == 0:
                    self._forward(stretch, fresh)
                    stretch, room = [], budget
        if stretch:
            self._forward(stretch, fresh)

    def _forward(self, stretch: list[tuple[Segment, int]], fresh: list[tuple[_Waiting, list[int], int]]) -> None:
        step = PrefillStep(self.cache, [segment for segment, _ in stretch])
        pieces = []
        for segment, index in stretch:
            waiting, rows, _ = fresh[index]
            pieces.append(np.array(waiting.ids[segment.start : segment.end], dtype=np.int64))
            begin, end = (max(0, at - len(waiting.ids)) for at in (segment.start, segment.end))
            if end > begin:  # a preempted row's own tokens
                pieces.append(self.out.ids[rows[0], begin:end].cpu().numpy().astype(np.int64))
        ids = upload(np.concatenate(pieces), self.device)
        ends = [
            i
            for i, (segment, index) in enumerate(stretch)
            if fresh[index][0].tokens == 0 and segment.end == len(fresh[index][0].ids)
        ]  # fmt: skip
        keep = step.last[upload(np.array(ends), self.device)] if ends else None
        logits = self.decoder.forward(ids, step.positions, step, keep)
        if logits is None:
            return
        rows, source = [], []
        for i, at in enumerate(ends):
            waiting, entering, _ = fresh[stretch[at][1]]
            group = entering + waiting.rows
            rows += group
            source += [i] * len(group)
            if self.out.seen is not None:
                self.out.seen[upload(np.array(group), self.device)[:, None], upload(np.array(waiting.ids), self.device)[None]] = True
        for start in range(0, len(rows), FIRST_ROWS):
            self._first(rows[start : start + FIRST_ROWS], source[start : start + FIRST_ROWS], logits)

    def _first(self, rows: list[int], source: list[int], logits: Tensor) -> None:
        """The first token of each row, from its prompt's logits."""
        r, which, out, eos = upload(np.array(rows), self.device), upload(np.array(source), self.device), self.out, self.engine.eos
        zeros = torch.zeros_like(r)
        token, logprob = draw_tokens(
            logits, self.sampling, r, self.keys[r], zeros, zeros + self.sampling.min_new_tokens, eos, out, which
        )  # fmt: skip
        stops = torch.isin(token, eos)
        if out.forced is not out.lengths:
            due = out.forced[r]
            token = torch.where(due == 1, eos[0], token)
            stops = torch.where(due > 0, due == 1, stops)
        out.ids[r, 0], out.logprobs[r, 0] = token.int(), logprob
        out.lengths[r], out.finished[r] = zeros + 1, stops

    def _seat(self, batch: list[tuple[_Waiting, list[int], int]]) -> None:
        """Rows go on from their last token, which stands behind what the cache has."""
        found = [(r, w.length, max(1, w.tokens)) for w, rows, _ in batch for r in rows]
        row, length, new = upload(np.array(found, dtype=np.int64).T.copy(), self.device)
        first = batch[0][2]
        limit = self.limit[row]
        self.state.put(
            slice(first, first + len(found)),
            row=row,
            token=self.out.ids[row, new - 1].long(),
            length=length,
            new=new,
            key=self.keys[row],
            limit=limit,
            least=torch.full_like(row, self.sampling.min_new_tokens),
            live=~self.out.finished[row] & (new < limit),
        )

    # --------------------------------------------------------------------------------------------------------------- ends

    def _tell(self, rows: np.ndarray) -> None:
        """Hand over the responses of rows that have ended. Their tokens are final: another stream reads them while decoding goes on."""
        assert self.on_finished is not None
        fresh = [int(r) for r in rows if int(r) not in self.told]
        if not fresh:
            return
        self.told.update(fresh)
        if self.side is None:
            ids, lengths = self.out.ids[fresh], self.out.lengths[fresh]
        else:
            with torch.cuda.stream(self.side):
                index = torch.tensor(fresh, device=self.device)
                lengths = self.out.lengths[index].cpu()
                ids = self.out.ids[index, : int(lengths.max())].cpu()
        for r, row_ids, n in zip(fresh, ids.tolist(), lengths.tolist(), strict=True):
            self.on_finished(r, row_ids[: self.stopped.get(r, n)])

    def _search_stops(self, rows: np.ndarray, new: np.ndarray) -> None:
        """End rows whose text has come to contain a stop text, at the token that completes it."""
        assert self.engine.decode_text is not None, "stop texts need decode_text"
        grown = [(int(r), int(n)) for r, n in zip(rows, new, strict=True) if int(r) not in self.stopped and int(n) > self.checked.get(int(r), 0)]
        if not grown:
            return
        ids = self.out.ids[torch.tensor([r for r, _ in grown], device=self.device)].tolist()
        tail = 8 + max(len(text) for text in self.sampling.stop)  # tokens: no token is shorter than a character or a byte of one
        ended = []
        for (r, n), row_ids in zip(grown, ids, strict=True):
            for end in range(self.checked.get(r, 0) + 1, n + 1):
                text = self.engine.decode_text(row_ids[max(0, end - 4 * tail) : end])
                if any(stop in text for stop in self.sampling.stop):
                    self.stopped[r] = end
                    ended.append(r)
                    break
            self.checked[r] = n
        if ended:
            self.state.live[: self.used] &= ~torch.isin(self.state.row[: self.used], torch.tensor(ended, device=self.device))

    def rollout(self) -> Rollout:
        rows = [p * self.group_size + s for p in sorted(self.taken) for s in range(self.group_size)]
        if not rows:
            return _assemble([], self.draw[:0], [], None, self.sampling, self.engine.pad_token_id)
        index = torch.tensor(rows, dtype=torch.int64, device=self.device)
        out, window = self.out, self.sampling.max_new_tokens
        lengths, finished = out.lengths[index].cpu(), out.finished[index].cpu()
        ids, logprobs = out.ids[index, :window].cpu(), out.logprobs[index, :window].cpu()
        entropies = None if out.entropies is None else out.entropies[index, :window].cpu()
        if self.sampling.stop:
            self._search_stops(np.array(rows), lengths.numpy())
            for i, r in enumerate(rows):
                if r in self.stopped and self.stopped[r] <= int(lengths[i]):
                    lengths[i], finished[i] = self.stopped[r], True
        if self.on_finished is not None:
            self._tell(np.array(rows))
        beyond = torch.arange(window) >= lengths[:, None]
        for tensor in (logprobs, entropies):
            if tensor is not None:
                tensor[beyond] = 0.0
        host = index.cpu()
        return _assemble(
            [self.prompts[r // self.group_size] for r in rows], self.draw[host], self.sample[host],
            (ids, lengths, finished, logprobs, entropies), self.sampling, self.engine.pad_token_id,
        )  # fmt: skip


def _assemble(prompts: list[Prompt], draw: Tensor, sample: Tensor, found: Any, sampling: Sampling, pad_token_id: int) -> Rollout:
    """Prompts and responses under each other, padded on the right."""
    if found is None:
        none = torch.zeros(0, dtype=torch.int64)
        empty = torch.zeros(0, sampling.max_new_tokens)
        return Rollout([], none, none, torch.zeros(0, 0, dtype=torch.int64), none, none, none.bool(), empty, empty if sampling.entropy else None)
    ids, lengths, finished, logprobs, entropies = found
    known = {id(p): np.asarray(p.input_ids) for p in prompts}  # the samples of one prompt share it
    before = np.array([len(p.input_ids) for p in prompts])
    after = lengths.numpy()
    input_ids = np.full((len(prompts), int((before + after).max())), pad_token_id, dtype=np.int64)
    for i, prompt in enumerate(prompts):
        input_ids[i, : before[i]] = known[id(prompt)]
    row, column = np.nonzero(np.arange(ids.shape[1]) < after[:, None])
    input_ids[row, before[row] + column] = ids.numpy()[row, column]
    return Rollout(prompts, draw, sample, torch.from_numpy(input_ids), torch.from_numpy(before), lengths, finished, logprobs, entropies)
