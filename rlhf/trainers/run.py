"""What every task needs around its loop: world, tokenizer, metrics, checkpoints, and the best metric so far."""

from __future__ import annotations

import contextlib
import copy
import fcntl
import hashlib
import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
import torch
import yaml
from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf import files
from rlhf.budget import BUDGET, CHOSEN, choose, chosen_before, open_choices, read_budget, smaller, value_of, with_values, write_budget
from rlhf.checkpoint import Checkpoints, Export, Exporter, Failure, Mark
from rlhf.config import Config, ModelConfig, TrainedModelConfig, role_settings, shown, to_yaml
from rlhf.distributed import EXIT_AGAIN, EXIT_BAD, World, device_names
from rlhf.engine import TrainEngine, loading_context
from rlhf.files import Written
from rlhf.guards import Action, Guard
from rlhf.memory import GIB, MemoryMeter, Plan, device_capacity, held_now, host_capacity, is_out_of_memory, longest_row, of_others, plan_memory
from rlhf.metrics import Console, MetricsLog, PhaseTimer, peak_flops
from rlhf.models.checkpointing import recompute
from rlhf.models.compiling import compile_layers
from rlhf.models.export import export_adapter, export_model, on_host
from rlhf.models.loading import load_causal_lm, load_scalar_model, model_dtype, read_architecture, score_statistics
from rlhf.models.lora import adapter_parameters, add_adapters, weight_layout
from rlhf.models.rotary import check_length
from rlhf.models.scoring_head import fuse_head
from rlhf.preflight import roles
from rlhf.progress import PROGRESS, Progress
from rlhf.ranks import Pace, check_agreement, config_items
from rlhf.requests import STOP, own, started, tell
from rlhf.state import Copy, TensorFile, copy_to_host


@dataclass
class Best:
    """The best values of a metric and the steps that had them; part of the state. What a new one has pushed out stays known until the new one is on
    the disk."""

    metric: str
    mode: str
    keep: int = 1
    ranking: list[tuple[float, int]] = field(default_factory=list)  # (value, step), the best first, with what has been pushed out
    written: set[int] = field(default_factory=set)  # steps

    @property
    def top(self) -> list[tuple[float, int]]:
        return self.ranking[: self.keep]

    @property
    def steps(self) -> list[int]:
        return [step for _, step in self.top]

    def settle(self, step: int, written: bool) -> None:
        """The save of a step is over."""
        if written:
            self.written.add(step)
        else:
            self.ranking = [entry for entry in self.ranking if entry[1] != step]
        there = [entry for entry in self.ranking if entry[1] in self.written]
        if len(there) >= self.keep:
            self.ranking = self.ranking[: self.ranking.index(there[self.keep - 1]) + 1]

    def check(self, metrics: dict[str, float]) -> None:
        """Raises ValueError if the metric is not among what validation measured."""
        if self.metric not in metrics:
            raise ValueError(f"validation.best_metric={self.metric}: not measured; there are {', '.join(sorted(metrics))}")

    def offer(self, step: int, metrics: dict[str, float]) -> bool:
        """Whether this step is among the best `keep` now. Raises ValueError as `check` does."""
        self.check(metrics)
        value = metrics[self.metric]
        if math.isnan(value):
            return False
        sign = -1 if self.mode == "max" else 1
        ranking = sorted([*self.ranking, (value, step)], key=lambda entry: sign * entry[0])  # of equals the earlier stays ahead
        if (value, step) not in ranking[: self.keep]:
            return False
        self.ranking = ranking
        return True


@dataclass
class Run:
    config: Config
    world: World
    tokenizer: PreTrainedTokenizerBase
    checkpoints: Checkpoints
    resume_from: Path | None
    log: MetricsLog
    console: Console
    timer: PhaseTimer
    best: Best
    meter: MemoryMeter
    longest: int  # tokens of the longest row
    plan: Plan = field(default_factory=Plan)
    guard: Guard = field(init=False)
    recipe: str = "{}"  # YAML, as this start was given it, without secrets
    data: dict[str, Any] = field(default_factory=dict)  # of the training rows: `check_same_data`
    state: dict[str, Any] = field(default_factory=dict)  # of the checkpoint that we resume from
    unscored: int = field(default=0, init=False)  # steps in a row
    agreed: int | None = None  # the step after which the ranks were last found in the same state
    _saving: Mark | None = field(default=None, init=False)  # of which it is not known yet whether it is on the disk

    def __post_init__(self) -> None:
        # In a checkpoint: without the run folder, which may be another one later.
        self._kept_recipe = {key: value for key, value in yaml.safe_load(self.recipe).items() if key != "run_dir"}
        self.guard = Guard(self.config.train.bad_steps)
        self.pace = Pace(self.world)
        self.compare({}, dict)

    def compare(self, engines: Mapping[str, TrainEngine], other: Callable[[], dict[str, Any]]) -> None:
        """What `agree` looks at: engines, and what else must be the same on all ranks."""
        self._engines, self._other = engines, other

    @property
    def on_gpu(self) -> bool:
        return self.world.device.type == "cuda"

    @property
    def samples_dir(self) -> Path:
        return self.config.run_dir / "samples"

    def settings(self, role: ModelConfig) -> dict[str, Any]:
        return role_settings(self.config, role, world_size=self.world.size, on_gpu=self.on_gpu)

    def expect(self, longest: int, held_out: int = 0) -> None:
        """The data is known, and with it the plan of the memory and what the recipe leaves to it: `config` is resolved from here on. (collective)

        longest, held_out: tokens of the longest row that is trained on, and of others. ValueError where a model would compute them wrongly."""
        for name, role in roles(self.config):
            mend = "lower data.max_prompt_tokens or rollout.max_new_tokens" if self.config.task == "rl" else "lower data.max_tokens"
            check_length(read_architecture(role, name), max(longest, held_out), name, mend)
        self.longest = longest
        found = self.world.gather_objects((device_capacity(), host_capacity(self.world.local_size)))  # (collective)
        known = [capacity for capacity, _ in found if capacity is not None]
        least = min(known) if len(known) == self.world.size else None  # of devices that are not alike every rank plans for the smallest
        if open_choices(self.config):
            host = min((room for _, room in found if room is not None), default=None)
            values, line = choose(self.config, roles(self.config), self.world.size, least, longest, host)
            if self.world.is_main:
                before = chosen_before(self.config.run_dir) if self.resume_from else {}  # for other keys
                write_budget(self.config.run_dir, 0, CHOSEN, before | values)
            self.console.message(line)
            # An earlier start without a checkpoint may have found out that less is possible.
            config = with_values(self.config, values)
            self.config = self.world.broadcast_object(read_budget(config) if self.world.is_main else config)  # (collective)
        try:
            self.plan = plan_memory(self.config, roles(self.config), self.world.size, longest, self.on_gpu, least)
        except Exception as error:  # a forecast that fails is no reason not to train
            self.console.message(f"no plan of the memory: {error}")
        if self.plan.cache is not None:
            self.console.message(
                f"the KV cache has {self.plan.cache / GIB:.2f} GiB at most, as the other phases need the rest; rollout.release=true would give the "
                "update all of it"
            )

    def train_engine(
        self, role: TrainedModelConfig, key: str, total_steps: int, scalar_head: str | None = None, base: Mapping[str, nn.Parameter] | None = None
    ) -> TrainEngine:
        """Load, adapt and wrap a trained model; scalar_head: "zero" or "keep" for a critic or reward model; base: of another role. (collective)"""
        settings = self.settings(role)
        placement = loading_context(settings, self.world, base)
        dtype = model_dtype(role, self.world.device)
        if scalar_head is None:
            module = load_causal_lm(role, key, placement, self.world, dtype, self.config.train.packing)
        else:
            module = load_scalar_model(role, key, placement, self.world, dtype, scalar_head, self.config.train.packing)
            if key == "critic" and scalar_head == "keep" and role.path is not None:
                module.centre(*score_statistics(role.path))
        plain = module
        if role.lora:
            module = add_adapters(module, role.lora, self.config.seed)
        fuse_head(plain)  # after the adapters: one on the head needs its logits
        if role.compile:
            compile_layers(module)
        recompute(module, role.recomputed, key)
        return TrainEngine(module, role, settings, self.world, total_steps, self.config.seed, key)

    def resume(self, engines: Mapping[str, TrainEngine], steps: int) -> int:
        """Restore engines, generators and the best metrics; the step to go on after (0 = from the start). The first engine's model is the one that
        is exported. (collective)"""
        exported = next(iter(engines.values())).module.parameters() if self.config.checkpoint.save_hf else ()
        size = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in exported)
        if remark := self.checkpoints.prepare(engines, size):  # (collective)
            self.console.message(remark)
        own = float(sum(engine.state_bytes() for engine in engines.values()))
        self.world.requests.expect_save(int(self.world.global_sum({"bytes": own})["bytes"]))  # (collective)
        if self.resume_from is None:
            self._keep_recipe()
            return 0
        self.state = self.checkpoints.load(self.resume_from, engines)
        if self.state["best"]["metric"] == self.best.metric:  # values of another metric cannot be compared
            self.best.ranking = [(value, step) for value, step in self.state["best"]["top"]][: self.best.keep]
            self.best.written = set(self.best.steps)
        self.guard.load_state_dict(self.state["guard"])
        step = int(self.state["step"])
        if self.state["part"] and self.state.get("data", self.data) != self.data:
            self.state["part"] = 0  # its prompts are gone
            done = f"what step {step + 1} had finished was of other rows: it begins anew"
        elif self.state["part"] and (other := _of_the_step(self.state.get("recipe", self._kept_recipe), self._kept_recipe)):
            self.state["part"] = 0  # what is kept of it is of another plan
            done = f"what step {step + 1} had finished was with another {other}: it begins anew"
        elif self.state["part"] and step >= steps:
            done = (
                f"nothing is left to do: it was inside of step {step + 1}, and train.steps is {steps}; scripts/export.py writes a model folder of it"
            )
        elif self.state["part"]:
            done = f"going on inside of step {step + 1}"
        else:
            self.log.complete(step, self.state["metrics"])
            done = "the run is complete; --resume never starts it afresh" if step >= steps else f"going on after step {step}"
        self.console.message(f"resumed from {self.resume_from}: {done}")
        if "recipe" in self.state:
            for change in changes(self.state["recipe"], self._kept_recipe):
                self.console.message(f"recipe, since then: {change}")
        self._keep_recipe()
        return step

    def _keep_recipe(self) -> None:
        """In the run folder, once this start is not refused any more."""
        if self.world.is_main:
            (self.config.run_dir / "config.yaml").write_text(self.recipe)

    def progress(self, step: int, engines: dict[str, TrainEngine], state: dict[str, Any]) -> Progress:
        """Of a step that begins, with what the checkpoint that we resume from has of it; state: of the trainer as the step begins."""

        before = {**self._own_state(), **state, "metrics": {}}  # a step that goes on is judged when it is over, and once
        del before["best"]  # which a save that is still under way may yet change

        def boundary(progress: Progress) -> None:  # (collective)
            if asked := self.asked():
                kept = progress.collected(self.world)  # (collective)
                with self.timer.phase("save_checkpoint"):
                    self._save(Mark(step - 1, progress.part), before, engines, progress=kept if self.world.is_main else None)
                self._follow(asked)

        kept = None
        if self.resume_from is not None and self.state["part"] and self.state["step"] == step - 1:
            kept = files.read_tensors(self.resume_from / "progress" / PROGRESS)
        return Progress(boundary, kept, self.world)

    def judge(
        self,
        step: int,
        problem: str | None,
        metrics: dict[str, float],
        engines: dict[str, TrainEngine],
        save_batch: Callable[[Path], None] = lambda folder: None,
    ) -> bool:
        """Whether a step was good; what was not is skipped, leads back to the last good checkpoint, or ends the run. Adds to `metrics`. (collective)

        Raises SystemExit where the run ends."""
        action, problem, remarks = self.guard.judge(problem, metrics)
        for remark in remarks:
            self.console.message(f"step {step}: {remark}")
        metrics |= {"guard/bad_steps": float(self.guard.bad), "guard/rolled_back": float(action is Action.ROLL_BACK)}
        if problem is None:
            return True
        found = None
        if action is Action.ROLL_BACK:
            self.checkpoints.finish()  # (collective)
            found = self.checkpoints.last_good()  # (collective)
            if found is None:
                action = Action.STOP
        self.console.message(f"step {step}: {problem}: " + (f"weights go back to {found.name}" if found else action.value))
        if found is not None:
            self.checkpoints.load(found, engines)  # (collective)
        if action is Action.STOP:
            folder = self.config.run_dir / f"bad-step-{step:06}"
            if self.world.is_main:
                with self.disk_may_fail():
                    folder.mkdir(exist_ok=True)
                    (folder / "why.txt").write_text(f"{problem}\n")
                    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1))
                    save_batch(folder)
            self.console.message(f"error: step {step}: {problem}, and so were steps before it; its batch is in {folder}")
            tell(EXIT_BAD)
            raise SystemExit(EXIT_BAD)
        return False

    def end_if_unscored(self, step: int, scored: bool) -> None:
        """End the run where no sample of step after step has a score: nothing is learnt, and nobody may be looking. SystemExit. (collective)"""
        self.unscored = 0 if scored else self.unscored + 1
        if self.unscored >= 2 * max(1, self.config.train.bad_steps):
            failure = self.checkpoints.finish()  # (collective); the weights are good
            self.console.message(
                f"error: step {step}: no sample of the last {self.unscored} steps has a score: nothing is learnt (why is counted in "
                f"reward_failures/... of metrics.jsonl). Mend the reward, and start it again{f'. {failure.text}' if failure else ''}"
            )
            tell(EXIT_BAD)
            raise SystemExit(EXIT_BAD)

    @contextlib.contextmanager
    def disk_may_fail(self) -> Iterator[None]:
        """What is written here is not worth the run."""
        try:
            yield
        except OSError as error:
            self.console.message(f"not written: {error}")

    def is_due(self, step: int, steps: int) -> bool:
        """Whether the recipe wants a checkpoint of this step."""
        wanted = self.config.checkpoint
        return (step == steps and wanted.last) or bool(wanted.every and step % wanted.every == 0)

    def asked(self) -> int:
        """What any rank was asked for (`Requests`). (collective)"""
        return self.world.most(self.world.requests.poll())

    def end_step(
        self,
        step: int,
        metrics: dict[str, float],
        engines: dict[str, TrainEngine],
        state: dict[str, Any],
        exported: str,
        save: bool,
        statistics: Callable[[], tuple[float, float]] | None = None,
        timing: Callable[[], dict[str, float]] = dict,
    ) -> None:
        """Save if it is to be (`save`) or was asked for, log, leave if that was asked for. (collective)

        exported: the engine whose model is written as HF folder and adapter; statistics: of a reward model's scores (collective)."""
        asked = self.asked()
        if save or asked:
            exporter = None
            with self.timer.phase("save_checkpoint"):
                self.agree(step)  # (collective)
                measured = statistics() if statistics else None  # (collective)
                if measured is not None:
                    state = {**state, "statistics": measured}
                if self.config.checkpoint.save_hf:
                    exporter = partial(self._exporter, engines[exported], measured)
                # The line of this step is written after its checkpoint; a kill between the two must not lose it.
                self._save(Mark(step), {**state, "metrics": metrics}, engines, exporter)
        elif step == 1 or step % self.config.train.digest_every == 0:
            self.agree(step)  # (collective)
        self.log_step(step, metrics | timing())
        self._follow(asked)

    def _save(
        self, mark: Mark, state: dict[str, Any], engines: dict[str, TrainEngine], exporter: Exporter | None = None, progress: TensorFile | None = None
    ) -> None:  # (collective)
        began = time.monotonic()
        self._settle(self.checkpoints.finish())  # (collective)
        self._saving = mark
        state = {**self._own_state(), **state}
        failure = self.checkpoints.save(mark, engines, state, self.best.steps, exporter, progress)
        self.world.requests.saved(time.monotonic() - began)
        if not self.checkpoints.background or (failure is not None and failure.missing == mark):
            self._settle(failure)
        if failure is not None:
            self.console.message(f"{failure.text}. Training goes on; the checkpoints before it are whole.")

    def _settle(self, failure: Failure | None) -> None:
        """The last save is over: what is not there is not the best, and pushes nothing out."""
        if self._saving is not None and not self._saving.part:
            self.best.settle(self._saving.step, failure is None or failure.missing != self._saving)
        self._saving = None

    def _own_state(self) -> dict[str, Any]:
        best = {"metric": self.best.metric, "top": list(self.best.top)}
        return {
            "recipe": self._kept_recipe,
            "data": self.data,
            "best": best,
            "guard": copy.deepcopy(self.guard.state_dict()),
            "good": self.guard.bad == 0,
        }

    def _follow(self, asked: int) -> None:
        """Leave, if that is what was asked for: everything is saved. (collective)"""
        if asked < STOP:
            return
        self.world.requests.leaving = True
        failure = self.checkpoints.finish()  # (collective)
        reasons = [reason for reason in self.world.gather_objects(self.world.requests.reason) if reason]  # (collective)
        if self.world.is_main:
            self.world.requests.leave(reasons[0])
        self.console.message(f"leaving: {reasons[0]}. " + (f"{failure.text}. " if failure else "") + "Started again, it goes on from here.")
        raise SystemExit(EXIT_AGAIN)

    def finish(self) -> None:
        """Everything is on disk, or it is an error: RuntimeError. (collective)"""
        if failure := self.checkpoints.finish():
            raise RuntimeError(f"the last checkpoint: {failure.text}")
        if self.world.is_main:
            self.world.requests.done()

    def _exporter(self, engine: TrainEngine, statistics: tuple[float, float] | None, copy: Copy = copy_to_host) -> Export | None:
        """Writes what is taken now, on rank 0. (collective)"""
        role = engine.config
        assert role.path is not None
        source, module, tokenizer = role.path, engine.module, self.tokenizer
        adapter = engine.full_parameters(adapter_parameters(module)) if role.lora else None  # (collective)
        model = on_host(engine.full_tensors(weight_layout(module)), self.world.is_main, copy)  # (collective); last, as it may fail on one rank
        if not self.world.is_main:
            return None

        def export(folder: Path) -> dict[Path, Written]:
            written = export_model(folder / "hf", module, model, source, tokenizer, statistics, role.trust_remote_code)
            if adapter is not None:
                export_adapter(folder / "adapter", module, adapter, source, statistics)
            return written

        return export

    def agree(self, step: int) -> None:
        """Raises RuntimeError on all ranks where they are not in the same state. (collective)"""
        if self.world.size > 1 and step != self.agreed:
            items = {"step": step, **config_items(self.config), **self._other()}
            for name, engine in self._engines.items():
                items |= {f"{name}: {what}": value for what, value in engine.replicated().items()}
            check_agreement(items, f"after step {step}", self.world)
            self.agreed = step

    def log_step(self, step: int, metrics: dict[str, float]) -> None:
        """(collective)"""
        told = self.world.gather_objects(self.pace.take())
        paces, slow = self.pace.compare(told, metrics.get("timing_s/step", 0.0))
        metrics = metrics | paces
        for remark in slow:
            self.console.message(remark)
        if step:
            measured, remarks = self.meter.compare(self.plan)
            metrics = metrics | measured
            for remark in [*remarks, *(f"step {step}: {remark}" for remark in self.guard.timed(metrics))]:
                self.console.message(remark)
        with self.disk_may_fail():
            self.log.log(step, metrics)
        self.console.step(step, metrics)

    def leave(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the sinks, also when training failed. A tracker that hangs would keep the interpreter from exiting, so then it ends here."""
        self.console.close()
        self.log.close()
        if error is not None:
            self.checkpoints.abandon()
        if error is not None and is_out_of_memory(error):
            self.end_for_memory(error)
        if self.log.abandoned:
            if error is not None and not isinstance(error, SystemExit):
                sys.excepthook(type(error), error, trace)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0 if error is None else error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)

    def end_for_memory(self, error: BaseException) -> NoReturn:
        """Write a smaller budget and end this rank and all others, to be started again. ValueError, when the others have ended, if none can be
        smaller."""
        phase, folder, reason = self.timer.latest, self.config.run_dir, str(error).partition("\n")[0]
        held = "; ".join(filter(None, [held_now(), f"planned for it: {self.plan.largest(phase)}"]))
        try:
            key, value = smaller(self.config, phase, self.longest, self.plan.cache is not None)
        except ValueError as problem:
            self.world.end_all(2)
            raise ValueError(f"{problem}\n{held}") from None
        write_budget(folder, self.world.rank, key, value)
        tell(EXIT_AGAIN)
        print(
            f"error (rank {self.world.rank}): out of memory in phase {phase}: {reason}\n"
            f"{held}\n"
            f"Start it again: it goes on with {key}={value} ({folder / BUDGET}). To have it so from the start, put that into the recipe.",
            file=sys.stderr,
            flush=True,
        )
        self.world.end_all(EXIT_AGAIN)
        sys.stdout.flush()
        os._exit(EXIT_AGAIN)  # without the interpreter's goodbyes: they may wait for ranks that have left


def start_run(
    config: Config,
    world: World,
    tokenizer: PreTrainedTokenizerBase,
    resume: str,
    total_steps: int,
    best: Best,
    cleanup: contextlib.ExitStack,
    rows: Iterable[list[int]] = (),
    held_out: Iterable[list[int]] = (),
) -> Run:
    """Open the run folder: decide what to resume from and with which budget, open the sinks; `cleanup` closes them, and ends the job where memory ran
    out. rows, held_out: token ids of what is trained and validated on, in the sampler's order. ValueError where the checkpoint was trained on other
    rows. (collective)"""
    check_agreement(config_items(config), "at the start", world)  # (collective)
    data, recipe = check_same_data(world, rows, held_out), to_yaml(config)  # (collective)
    if busy := world.broadcast_object(take_folder(config.run_dir, cleanup) if world.is_main else None):  # (collective)
        raise ValueError(busy)
    checkpoints = Checkpoints(config.run_dir, world, config.checkpoint.keep_last, config.checkpoint.background)
    if world.is_main:
        (config.run_dir / "samples").mkdir(parents=True, exist_ok=True)
    world.barrier()
    resume_from, remarks = checkpoints.find(resume)
    before = files.read_object(resume_from / "trainer_state.json") if resume_from else {}
    if config.data.on_change == "error" and before.get("data", data) != data:
        raise ValueError(
            f"data.train: {data['rows']} rows, and not those that {resume_from} was trained on ({before['data']['rows']}): it would go on in others. "
            "Give it the same ones; or go on with these, data.on_change=accept; or start afresh, --resume never"
        )
    if world.is_main and resume != "auto":
        remarks += checkpoints.go_on_from(resume_from)
        remarks += _set_samples_aside(config.run_dir / "samples") if resume_from is None else []
        own(config.run_dir)
    budget = config.run_dir / BUDGET
    if world.is_main and resume == "never" and budget.exists() and budget.stat().st_mtime < started():
        budget.unlink()  # of another run; an earlier attempt of this job has learnt what it says
    origin = resume_from.parent.parent if resume_from else None  # the run folder of the checkpoint
    left = open_choices(config)
    config = world.broadcast_object(read_budget(config, origin) if world.is_main else config)
    taken = {key: value for key in left if (value := value_of(config, key)) != "auto"}
    if taken and world.is_main and origin and origin.resolve() != config.run_dir.resolve():
        write_budget(config.run_dir, 0, CHOSEN, taken)
    step = int(before["step"]) if resume_from else None
    console = Console(config.tracking.console, total_steps, world.is_main)
    log = MetricsLog(config.run_dir, config.tracking, shown(config), step, world.is_main)

    def on_phase(name: str) -> None:
        world.watchdog.enter(name, timer.step)
        meter.begin()
        console.phase(name)
        run.pace.begin(name)

    def on_end(name: str) -> None:
        run.pace.end(name)
        meter.end(name)

    meter = MemoryMeter(world.device.type == "cuda", of_others(world.size))
    timer = PhaseTimer(torch.cuda.synchronize if world.device.type == "cuda" else None, on_phase, on_end)
    longest = longest_row(config)
    run = Run(config, world, tokenizer, checkpoints, resume_from, log, console, timer, best, meter, longest, recipe=recipe, data=data)
    cleanup.push(run.leave)
    for remark in remarks:
        console.message(remark)
    if taken:
        console.message(f"auto: {' '.join(f'{key}={str(value).lower()}' for key, value in taken.items())}: from {BUDGET}")
    return run


def _set_samples_aside(folder: Path) -> list[str]:
    """Those of an earlier run, which this one would overwrite one by one."""
    if not any(folder.iterdir()):
        return []
    number = 1
    while (old := folder.with_name(f"samples-{number}")).exists():
        number += 1
    folder.rename(old)
    folder.mkdir()
    return [f"the samples of an earlier run are kept in {old}"]


def take_folder(run_dir: Path, cleanup: contextlib.ExitStack) -> str | None:
    """Hold the run folder until the run is over; who holds it already, if somebody does. The system lets go of it when this process ends."""
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = cleanup.enter_context((run_dir / ".lock").open("a+"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        return f"run_dir={run_dir}: another job is at work there ({lock.read().strip()}): end it first, or give this one another folder"
    except OSError:  # a file system without locks
        return None
    lock.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}", file=lock, flush=True)
    return None


def check_same_data(world: World, rows: Iterable[list[int]], held_out: Iterable[list[int]] = ()) -> dict[str, Any]:
    """{"rows": how many, "sha256": of their token ids in this order} of the training rows.

    Every rank has read its own copy of the data; ranks that hold different rows would train on them without a word: RuntimeError. (collective)
    """
    data, other = _digest(rows), _digest(held_out)
    found = world.gather_objects((data, other))
    odd = next((rank for rank, theirs in enumerate(found) if theirs != found[0]), None)
    if odd is not None:
        raise RuntimeError(f"rank {odd} has read other data than rank 0: do both see the same files, and is PYTHONHASHSEED the same?")
    return data


def _digest(rows: Iterable[list[int]]) -> dict[str, Any]:
    digest, count = hashlib.sha256(), 0
    for ids in rows:
        digest.update(np.array([len(ids), *ids]).tobytes())
        count += 1
    return {"rows": count, "sha256": digest.hexdigest()}


# What a step that goes on in its middle may have otherwise: where its memory is, and how prompts come to the ranks.
_FREE = {"rollout." + name for name in ("max_batch", "cache_tokens", "memory_fraction", "prefill_tokens", "release", "balance")}
_FREE |= {"reward." + name for name in ("workers", "timeout", "while_decoding")}


def _of_the_step(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first key that a step which is half done cannot have otherwise: its rows, their scores, or what is learnt from them."""
    for change in changes(before, now):
        key = change.split(": ", 1)[0]
        if key in ("seed", "reference.path") or (key.split(".")[0] in ("rollout", "reward", "algorithm") and key not in _FREE):
            return key
    return None


def changes(before: Any, now: Any, key: str = "") -> Iterator[str]:
    """ "KEY: BEFORE -> NOW" of everything that is not the same in two recipes."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in [*before, *(name for name in now if name not in before)]:
            yield from changes(before.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for i, pair in enumerate(zip(before, now, strict=True)):
            yield from changes(*pair, f"{key}.{i}")
    elif before != now:
        yield f"{key}: {json.dumps(before)} -> {json.dumps(now)}"


def device_peak_flops() -> float | None:
    names = device_names()
    return peak_flops(names[0]) if names else None
