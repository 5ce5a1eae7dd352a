# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""One Accelerate loop: prepare, step, log, validate, save, resume. Model, data and metrics arrive as arguments."""

import logging
import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from .arguments import T3DTrainingArguments
from .averaging import WeightAverage
from .batch_norm import training_mode
from .checkpoints import AVERAGED_FOLDER, MODEL_FILE, Stateful, random_state, restore_random_state
from .files import write_text
from .guard import NonFiniteGuard
from .model_card import CARD_FILE, fill_model_card
from .model_setup import set_up_model
from .optimization import clamp_logit_scale, learning_rate, parameter_groups, shrink_place_weights
from .parallel import refuse_shared_samples, step_gradients, wrap_model
from .prefetch import prefetched
from .preflight import (
    choose_precision,
    device_name,
    refuse_before_training,
    refuse_lonely_reports,
    refuse_missing_trackers,
    refuse_scarce_views,
    refuse_unmeasured_metric,
    warn_of_inexact_resumption,
)
from .processes import ProcessGroup
from .progress import ProgressReporter, StepMeter
from .run_checkpoints import RunCheckpoints
from .sampling import BatchStream, KeyedDataset, ShardedBatchSampler, stable_seed
from .session import RunSession
from .sharded_state import model_tensors, write_tensors
from .sharding import clip_gradients, gradient_norm
from .state import TrainerState, TrainingResult, run_identity, save_model_folder
from .stopping import EXIT_STATUS_INTERRUPTED, StopRequest, obey_parent_alone, stop_signals_held

logger = logging.getLogger(__name__)


class T3DTrainer:
    """
    Trains a model whose output has `loss`; every other scalar of the output is logged.

    Args:
        model (`PreTrainedModel`): not wrapped.
        args ([`T3DTrainingArguments`]): the settings.
        train_dataset ([`KeyedDataset`]): asked for [`SampleKey`]s.
        collator (callable): samples -> the model's keyword arguments.
        evaluate (callable, *optional*):
            Model -> metrics. Called in evaluation mode, without gradients, on every process; what it draws from
            random generators does not reach training.
        batch_transform (callable, *optional*): batch on its device -> the model's keyword arguments; training only.
        make_stream (callable, *optional*):
            Batch size and share (`num_processes`, `process_index`, `seed`, `drop_last`) -> the batches, in place of an
            order of the trainer's own.
        processor (*optional*): saved with the model.
        card_facts (`dict`, *optional*): what the model card says about the data; see [`fill_model_card`].
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: T3DTrainingArguments,
        train_dataset: KeyedDataset,
        collator: Callable[[list[Any]], dict[str, torch.Tensor]],
        *,
        evaluate: Callable[[PreTrainedModel], dict[str, float]] | None = None,
        batch_transform: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None,
        make_stream: Callable[..., BatchStream] | None = None,
        processor: Any = None,
        card_facts: dict[str, Any] | None = None,
    ) -> None:
        self.args = args
        self.output_dir = Path(args.output_dir)
        self.train_dataset = train_dataset
        self.collator = collator
        self.evaluate = evaluate
        self.batch_transform = batch_transform or dict
        self.processor = processor
        self.card_facts = card_facts or {}
        refuse_missing_trackers(args.trackers)
        refuse_unmeasured_metric(args, evaluate)
        self.accelerator = Accelerator(
            cpu=args.use_cpu or not torch.accelerator.is_available(),
            mixed_precision=choose_precision(args),
            log_with=args.trackers or None,
            project_dir=args.output_dir,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=args.find_unused_parameters)],
        )
        # Dropout differs between processes; views and order come from keys.
        set_seed(stable_seed(args.seed, self.accelerator.process_index) % 2**32)
        self.is_streaming = make_stream is not None
        self.sampler: Any = (make_stream or partial(ShardedBatchSampler, len(train_dataset)))(
            args.per_device_train_batch_size,
            num_processes=self.accelerator.num_processes,
            process_index=self.accelerator.process_index,
            seed=args.seed,
            drop_last=args.drop_last,
        )
        refuse_before_training(self.accelerator, args, len(train_dataset), self.steps_per_epoch)
        refuse_shared_samples(self.accelerator, self.sampler, getattr(train_dataset, "fingerprint", None))
        set_up_model(model, args)
        self.model = wrap_model(self.accelerator, model, args)
        self.unwrapped_model = self.accelerator.unwrap_model(self.model)
        refuse_lonely_reports(self)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.unwrapped_model, args),
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
        )
        self.state = TrainerState()
        self.metrics: dict[str, float] = {}
        # What is saved and resumed besides, by name.
        self.extra_state: dict[str, Stateful] = {"scaler": self.accelerator.scaler} if self.accelerator.scaler else {}
        self.average = None
        if args.ema_decay is not None:
            self.average = self.extra_state["average"] = WeightAverage(self.unwrapped_model, args.ema_decay)
        self.processes = ProcessGroup()
        row_numbers = getattr(train_dataset, "row_numbers", None)
        self.guard = NonFiniteGuard(self.unwrapped_model, args, self.processes, row_numbers)
        self.session = RunSession(self.output_dir, self.processes, lambda: asdict(self.state))
        self.checkpoints = RunCheckpoints(args, self.processes, self.session)
        self.deadline = None if args.max_hours is None else time.monotonic() + 3600 * args.max_hours

    # ------------------------------------------------------------------------------------------ before training

    @property
    def pairs_per_step(self) -> int:
        """Volume-report pairs of an optimiser step, over all processes."""
        args = self.args
        return args.per_device_train_batch_size * self.accelerator.num_processes * args.gradient_accumulation_steps

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch."""
        num_steps = self.sampler.num_batches / self.args.gradient_accumulation_steps
        return math.floor(num_steps) if self.args.drop_last else math.ceil(num_steps)

    @property
    def total_steps(self) -> int | None:
        """Optimiser steps of the run; `None` if only time bounds it."""
        args = self.args
        if args.max_steps is not None or args.max_train_minutes is not None:
            return args.max_steps
        return max(1, round(args.num_train_epochs * self.steps_per_epoch))

    @property
    def progress(self) -> float:
        """Share of the run that is over, of its steps or its minutes, whichever is further; 1 if it stops early."""
        patience = self.args.early_stopping_patience
        if patience is not None and self.state.num_validations_without_gain >= patience:
            return 1.0
        shares = [0.0]
        if self.total_steps is not None:
            shares.append(self.state.step / self.total_steps)
        if self.args.max_train_minutes is not None:
            shares.append(self.state.elapsed_seconds / (60 * self.args.max_train_minutes))
        return max(shares)

    # ------------------------------------------------------------------------------------------ training

    def train(self, *, resume: bool = False) -> TrainingResult:
        """
        Train to the end of the budget, or until a signal, and write what remains.

        Args:
            resume (`bool`, defaults to `False`):
                Continue from the newest checkpoint in `output_dir`, or start if there is none. Without it a folder
                that holds checkpoints is refused.
        """
        with self.session as session:
            if not resume:
                self.checkpoints.refuse_former_run()
            random_state_of_rank = self._resume() if resume else None
            self.state.choose_metric(self.args.metric_for_best_model, self.args.greater_is_better)
            settings = self.args.to_dict()
            reporter = ProgressReporter(
                self.accelerator,
                self.output_dir,
                settings,
                total=self.total_steps,
                step=self.state.step,
                name=self.state.run,
            )
            if random_state_of_rank is not None:
                restore_random_state(random_state_of_rank)
            session.begin(reporter.close)
            with StopRequest(self.deadline) as stop:
                interrupted = self._run(reporter, stop)
            model_dir = None if interrupted else self._save_model()
            status = "interrupted" if interrupted else "completed"
            session.write_status(status, (stop.cause or "a signal to another process") if interrupted else None)
        return TrainingResult(status, self.state, model_dir, self.metrics)

    def _run(self, reporter: ProgressReporter, stop: StopRequest) -> bool:
        """Steps until the budget is spent; returns whether a signal ended them first."""
        args, state, first_step = self.args, self.state, self.state.step
        meter = StepMeter(self.accelerator, state, len(self.train_dataset))
        training_mode(self.model, args)
        if state.step and self._step_needs_evaluation() and state.evaluated_step != state.step:
            # A signal stopped the run before the validation of its last step.
            self._evaluate(reporter)
            self.save_checkpoint()
            reporter.draw()
        # Every run takes a step, however short the time that it is given.
        interrupted = False
        with closing(self._steps()) as steps:
            while self.progress < 1 and not interrupted:
                start = time.monotonic()
                micro_batches = next(steps)
                if state.step == first_step and "local_pixel_values" in micro_batches[0]:
                    refuse_scarce_views(self, micro_batches[0]["local_pixel_values"].shape[1])
                wait_seconds = time.monotonic() - start
                meter.add(self._step(micro_batches), wait_seconds)
                state.elapsed_seconds += time.monotonic() - start
                interrupted = self._agree(stop)
                reporter.advance()
                is_evaluation_due = not interrupted and self._step_needs_evaluation()
                is_save_due = interrupted or self.progress >= 1 or _is_multiple(state.step, args.save_steps)
                if is_save_due or is_evaluation_due or _is_multiple(state.step, args.logging_steps):
                    self.session.check()
                    reporter.log(
                        state.step, meter.pop(self.progress) | {"learning_rate": self.optimizer.param_groups[0]["lr"]}
                    )
                if is_evaluation_due:
                    # A validation without gain may be the one that ends the run.
                    is_save_due |= self._evaluate(reporter) or self.progress >= 1
                if is_save_due:
                    self.save_checkpoint()
                    reporter.draw()
        return interrupted

    def _step_needs_evaluation(self) -> bool:
        """Whether a validation follows the step that was taken last."""
        return self.progress >= 1 or _is_multiple(self.state.step, self.args.eval_steps)

    def _steps(self) -> Generator[list[dict[str, torch.Tensor]], None, None]:
        """Lists of micro-batches, one list per optimiser step, from where the state stands; `close` ends loading."""
        state, args = self.state, self.args
        size = args.gradient_accumulation_steps
        batches_per_epoch = min(self.sampler.num_batches, self.steps_per_epoch * size)
        with closing(self._batches(batches_per_epoch)) as batches:
            while True:
                if state.next_batch >= batches_per_epoch:
                    state.epoch, state.next_batch = state.epoch + 1, 0
                micro_batches = list(islice(batches, min(size, batches_per_epoch - state.next_batch)))
                state.next_batch += len(micro_batches)
                yield micro_batches

    def _batches(self, batches_per_epoch: int) -> Generator[dict[str, torch.Tensor], None, None]:
        """This process's batches, made ahead of time; where the steps are known, no more than they take."""
        state, args = self.state, self.args
        self.sampler.seek(state.epoch, state.next_batch)
        limit = None
        if self.total_steps is not None:
            first = state.epoch * batches_per_epoch + state.next_batch
            epochs, steps = divmod(self.total_steps, self.steps_per_epoch)
            limit = epochs * batches_per_epoch + steps * args.gradient_accumulation_steps - first
        options: dict[str, Any] = {
            "num_workers": args.dataloader_num_workers,
            "pin_memory": self.accelerator.device.type == "cuda",
            "worker_init_fn": obey_parent_alone,
        }
        if self.is_streaming:
            stream = islice(self.sampler.batches(batches_per_epoch, starting=stop_signals_held, **options), limit)
            return (batch for batch in stream) if args.dataloader_num_workers else prefetched(stream)
        loader = DataLoader(
            cast(Dataset, self.train_dataset),
            batch_sampler=islice(self.sampler.endless(batches_per_epoch), limit),
            collate_fn=self.collator,
            # A loader draws its workers' seed from the global generator unless it is given one.
            generator=torch.Generator(),
            **options,
        )
        if not args.dataloader_num_workers:
            return prefetched(loader)
        # Loader processes work ahead by themselves.
        with stop_signals_held():
            batches = iter(loader)
        return (batch for batch in batches)

    def _step(self, micro_batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """One optimiser step; returns the scalars of the model's output, those of micro-batches averaged."""
        args, state, scaler = self.args, self.state, self.accelerator.scaler
        done = range(state.next_batch - len(micro_batches), state.next_batch)
        self.guard.remember()
        terms = step_gradients(self.accelerator, self.model, micro_batches, args, self.batch_transform)
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        parameters = [parameter for parameter in self.unwrapped_model.parameters() if parameter.grad is not None]
        terms["grad_norm"] = gradient_norm([parameter.grad for parameter in parameters])
        # The first step already moves: a step-driven schedule counts the step that is being taken.
        progress = (
            self.progress if self.total_steps is None else max(self.progress, (state.step + 1) / self.total_steps)
        )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(
                group["peak_lr"], progress, minimum=args.min_learning_rate, warmup_ratio=args.warmup_ratio
            )
        if self.guard.admits(
            terms, state.step + 1, lambda: self.sampler.samples(state.epoch, done), scaler is not None
        ):
            if args.max_grad_norm is not None:
                clip_gradients(parameters, args.max_grad_norm, terms["grad_norm"])
            self.optimizer.step() if scaler is None else scaler.step(self.optimizer)
            # Before the average sees it, or the average would pass the bound.
            clamp_logit_scale(self.unwrapped_model)
            shrink_place_weights(self.optimizer)
            if self.average is not None:
                self.average.update()
        else:
            state.skipped_steps += 1
            terms = {}
        if scaler is not None:
            scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.num_volumes += sum(self.sampler.global_size(batch) for batch in done)
        return terms

    def _agree(self, stop: StopRequest) -> bool:
        """Whether any process should stop; also gives all processes the main one's clock."""
        if self.accelerator.num_processes == 1:
            return stop.cause is not None
        is_main = self.accelerator.is_main_process
        heard = float(stop.cause is not None)
        clock = self.state.elapsed_seconds if is_main else 0.0
        message = torch.tensor([heard, clock], dtype=torch.float64, device=self.accelerator.device)
        heard, self.state.elapsed_seconds = self.accelerator.reduce(message, reduction="sum").tolist()
        return heard > 0

    def _averaged(self) -> AbstractContextManager[None]:
        """Within it, the model has its averaged weights, where they are kept."""
        return nullcontext() if self.average is None else self.average.applied()

    @contextmanager
    def _evaluation_mode(self) -> Iterator[None]:
        """Evaluation mode, no gradients, and random generators as they were afterwards."""
        before = random_state()
        self.unwrapped_model.eval()
        try:
            with self._averaged(), torch.no_grad(), self.accelerator.autocast():
                yield
        finally:
            training_mode(self.unwrapped_model, self.args)
            restore_random_state(before)

    def _evaluate(self, reporter: ProgressReporter) -> bool:
        """Validate; returns whether the metric that chooses the best checkpoint was never better."""
        self.state.evaluated_step = self.state.step
        if self.evaluate is None:
            return False
        with self._evaluation_mode():
            # One answer: what follows from it is collective.
            self.metrics = self.processes.from_main(self.evaluate(self.unwrapped_model))
        reporter.log(self.state.step, self.metrics, kind="validation")
        return self.state.note_metrics(self.metrics, self.args.metric_for_best_model, self.args.greater_is_better)

    # ------------------------------------------------------------------------------------------ saving

    def save_checkpoint(self) -> Path:
        """Write a checkpoint of this moment; called on every process."""
        return self.checkpoints.save(
            step=self.state.step,
            best_step=self.state.best_step,
            model=self.unwrapped_model,
            optimizer=self.optimizer,
            extra=self.extra_state,
            state={"trainer": asdict(self.state), "metrics": self.metrics, "run": run_identity(self)},
            add_files=self._save_configuration,
        )

    def _save_configuration(self, folder: Path) -> None:
        """
        What lets `from_pretrained` read a checkpoint, with its card, and in `averaged/` the averaged weights, if they
        are kept.
        """
        folders = [folder]
        if self.average is not None:
            folders.append(folder / AVERAGED_FOLDER)
            folders[-1].mkdir()
            with self.average.applied():
                write_tensors(model_tensors(self.unwrapped_model), folders[-1] / MODEL_FILE)
        card = self._model_card()
        for target in folders:
            write_text(target / CARD_FILE, card)
            self.unwrapped_model.config.save_pretrained(target)
            if self.processor is not None:
                self.processor.save_pretrained(target)

    def _resume(self) -> dict[str, Any] | None:
        """Load the newest checkpoint; returns this process's random state."""
        found = self.checkpoints.resume(self.unwrapped_model, self.optimizer, self.extra_state, run_identity(self))
        if found is None:
            return None
        warn_of_inexact_resumption(self.accelerator)
        saved, random_state_of_rank = found
        self.state, self.metrics = TrainerState(**saved["trainer"]), saved["metrics"]
        if random_state_of_rank is None:
            set_seed(stable_seed(self.args.seed, self.processes.rank, self.state.step) % 2**32)
        return random_state_of_rank

    def _model_card(self) -> str:
        """The card of the weights as they are now."""
        run = {
            "steps": self.state.step,
            "evaluated_step": self.state.evaluated_step,
            "volumes": self.state.num_volumes,
            "minutes": self.state.elapsed_seconds / 60,
            "processes": self.accelerator.num_processes,
            "device": device_name(self.accelerator.device),
            "precision": self.accelerator.mixed_precision,
        }
        return fill_model_card(
            self.unwrapped_model,
            self.args,
            processor=self.processor,
            metrics=self.metrics,
            run=run,
            **self.card_facts,
        )

    def _save_model(self) -> Path:
        """Write the folder that others load: model, processor and model card."""
        folder, card, check = self.output_dir / "model", self._model_card(), self.session.check
        with self._averaged():
            return save_model_folder(folder, self.unwrapped_model, self.processor, card, self.processes, check)


def _is_multiple(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0


__all__ = ["EXIT_STATUS_INTERRUPTED", "T3DTrainer"]
