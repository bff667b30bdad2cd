"""What the host plans of a rollout: which rows enter the batch and when, which pages they get, who makes room for whom.

The host learns from looks at the device that lag one block of steps behind; the device decides everything about tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rlhf.rollout.loop import draw_tokens
from rlhf.rollout.paged import PrefillStep, Segment, upload
from rlhf.rollout.sampler import row_keys
from rlhf.types import Prompt, Rollout, Sampling

if TYPE_CHECKING:
    from rlhf.rollout.engine import HybridEngine

FIRST_ROWS = 512  # first tokens sampled at once: each needs a row of logits


@dataclass
class Waiting:
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
class Look:
    """What the device held when a block of steps had run."""

    state: Tensor  # [4, used] int64 on the host, valid once `event` has passed: row, length, live, new
    free: Tensor  # [1] int32 on the host
    event: torch.cuda.Event | None
    admitted: int  # rows that had been given a slot by then
    steps: int  # decode steps that had been launched by then
    taken: int  # pages that the host had given away by then


class Schedule:
    """One call of `generate`, as the host plans it."""

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
        self.waiting: deque[Waiting] = deque()
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
        together: dict[tuple[int, ...], Waiting] = {}
        for p in prompts:
            self.taken.append(p)
            ids = self.prompts[p].input_ids
            rows = range(p * self.group_size, (p + 1) * self.group_size)
            if tuple(ids) in together:
                together[tuple(ids)].rows += rows
            else:
                together[tuple(ids)] = Waiting(ids, list(rows))
        self.waiting += together.values()

    # ------------------------------------------------------------------------------------------------------------ the loop

    def run(self) -> None:
        previous: Look | None = None
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

    def _look(self) -> Look:
        s, used = self.state, self.used
        state = torch.stack([s.row[:used], s.length[:used], s.live[:used].long(), s.new[:used]])
        free = self.cache.free_count.clone()
        event = None
        if self.cuda:
            pinned, pinned_free = torch.empty(state.shape, dtype=state.dtype, pin_memory=True), torch.empty(1, dtype=torch.int32, pin_memory=True)
            state, free = pinned.copy_(state, non_blocking=True), pinned_free.copy_(free, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        return Look(state, free, event, self.admitted, self.steps, self.pages_taken)

    def _consider(self, look: Look) -> None:
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
            self.waiting.appendleft(Waiting(self.prompts[r // self.group_size].input_ids, [r], tokens=int(new[slot])))
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
                self.waiting += (Waiting(waiting.ids, [r], tokens=1) for r in waiting.rows)
                self.cache.release(self.cache.holder_index)
                self._consider(self._look())

    # ----------------------------------------------------------------------------------------------------------- admission

    def _admit(self) -> None:
        """Slots, pages and a prefill for as many waiting rows as fit."""
        while True:
            batch: list[tuple[Waiting, list[int], int]] = []  # (what waits, rows that enter, first slot)
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

    def _enter(self, batch: list[tuple[Waiting, list[int], int]]) -> None:
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

    def _pages_for(self, fresh: list[tuple[Waiting, list[int], int]]) -> tuple[Tensor, np.ndarray]:
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

    def _prefill(self, fresh: list[tuple[Waiting, list[int], int]]) -> None:
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

    def _forward(self, stretch: list[tuple[Segment, int]], fresh: list[tuple[Waiting, list[int], int]]) -> None:
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
            if self.out.seen is not None and self.sampling.repetition_penalty != 1.0:
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

    def _seat(self, batch: list[tuple[Waiting, list[int], int]]) -> None:
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
            return assemble([], self.draw[:0], [], None, self.sampling, self.engine.pad_token_id)
        index = torch.tensor(rows, dtype=torch.int64, device=self.device)
        out, window = self.out, self.sampling.max_new_tokens
        lengths, finished = out.lengths[index].cpu(), out.finished[index].cpu()
        ids, logprobs = out.ids[index, :window].cpu(), out.logprobs[index, :window].cpu()
        entropies = out.entropies[index, :window].cpu() if out.entropies is not None and self.sampling.entropy else None
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
        return assemble(
            [self.prompts[r // self.group_size] for r in rows], self.draw[host], self.sample[host],
            (ids, lengths, finished, logprobs, entropies), self.sampling, self.engine.pad_token_id,
        )  # fmt: skip


def assemble(prompts: list[Prompt], draw: Tensor, sample: Tensor, found: Any, sampling: Sampling, pad_token_id: int) -> Rollout:
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
