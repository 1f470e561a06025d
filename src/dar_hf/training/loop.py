"""The training loop that both stages share, on accelerate.

One step takes ``gradient_accumulation_steps`` micro-batches on every process. Losses are summed and divided by what
the whole step holds, so the layout of the batch changes nothing but rounding, except the language model's dropout,
which each process draws from its own generator; a checkpoint holds its state. See `dar_hf.data.batches` for why all
else is a function of the run's seed and step.
"""

import copy
import functools
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from diffusers.training_utils import EMAModel
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from .arguments import LoopArguments
from .batches import TrainingBatches, to_device
from .checkpoints import has_checkpoints, load_checkpoint, read_state, resume_hint, save_checkpoint, saving
from .folder_lock import lock_folder, unlock_folder
from .launcher import end_processes
from .muon import MuonAdamW
from .pushing import claim_repository, push_finished, push_in_background
from .records import RunRecords
from .resuming import ResumeError, check_same_run, choose_checkpoint, describe_run, has_finished, resuming_from
from .run_folder import CHECKPOINTS, SAVING, install_model
from .sharding import gather_into
from .stage import Stage
from .stopping import StoppedError, StopRequest

logger = logging.getLogger(__name__)


class NonFiniteLossError(RuntimeError):
    """A loss term became NaN or infinite; the message names the term and the step."""


def train(stage: Stage, args: LoopArguments, accelerator: Accelerator) -> None:
    """Train ``stage``, leave the finished model in ``args.output_dir``, and push it where ``args.push_to_hub``.

    Raises:
        FolderInUseError: if another run is writing into the folder.
        ResumeError: for a checkpoint that does not fit the run.
        NonFiniteLossError: when a loss term stops being finite.
        StoppedError: when the run was asked to end; it leaves a checkpoint.
        PushError: if the Hub takes nothing, before training or after; a finished model stays in its folder.
    """
    folder = Path(args.output_dir)
    pushes = args.push_to_hub and accelerator.is_main_process
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        lock_folder(folder)
    try:
        if pushes:
            claim_repository(args, stage.saved_class)
        _run(stage, args, accelerator)
        end_processes(accelerator)
        if pushes:
            push_finished(args)
    finally:
        unlock_folder(folder)


def _run(stage: Stage, args: LoopArguments, accelerator: Accelerator) -> None:
    """Train, validate and save. A function of its own, so that the loop is gone when it returns.

    With the loop goes the wrapped model, which must be gone before `end_processes` ends the communication.
    """
    set_seed(args.seed + accelerator.process_index)  # dropout differs between processes; all else has its own seed
    loop = TrainingLoop(stage, args, accelerator)
    if args.resume_from_checkpoint:
        loop.resume(args.resume_from_checkpoint)
    if loop.finished:
        return
    if args.report_to:
        plain = {name: value for name, value in vars(args).items() if isinstance(value, (int, float, str))}
        accelerator.init_trackers("dar-hf", config=plain)
    with loop.stop_request.listening():
        loop.train_and_save()


class TrainingLoop:
    """One run of one stage. Use `train`."""

    def __init__(self, stage: Stage, args: LoopArguments, accelerator: Accelerator):
        self.stage = stage
        self.args = args
        self.accelerator = accelerator
        self.folder = Path(args.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.checkpoints = self.folder / CHECKPOINTS
        if args.gradient_checkpointing:
            # the names in diffusers and in transformers
            enable = getattr(stage.model, "enable_gradient_checkpointing", None)
            (enable or stage.model.gradient_checkpointing_enable)()
        self.sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        self.whole = copy.deepcopy(stage.model) if self.sharded and accelerator.is_main_process else None
        stage.model.to(accelerator.device)
        stage.prepare(accelerator)
        optimizer_class: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
        if args.muon_learning_rate:
            dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
            optimizer_class = functools.partial(MuonAdamW, muon_dtype=dtype)
        optimizer = optimizer_class(
            stage.parameter_groups(),
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
            fused=True,
        )
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.model, self.optimizer = accelerator.prepare(stage.model, optimizer)
        self.parameters = list(self.model.parameters())  # FSDP has replaced the model's
        self.ema = EMAModel(self.parameters, decay=args.ema_decay, foreach=True) if args.ema_decay else None
        for state in (self.ema, *stage.stateful):
            if state is not None:
                accelerator.register_for_checkpointing(state)
        self.images_per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
        self.description = describe_run(stage, args, accelerator, self.sharded, self.images_per_step)
        self.records = RunRecords(args, self.description, accelerator)
        self.batches = TrainingBatches(stage.samples, args, accelerator)
        self.stop_request = StopRequest(accelerator)
        self.background = push_in_background(args)
        self.start_step = 0
        self.finished = False  # by an earlier run

    def resume(self, name: str) -> None:
        """Continue from the checkpoint that ``name`` stands for, see `find_checkpoint`.

        "latest" starts a run where there is none, and notes that the run has ``finished`` where it has.

        Raises:
            ResumeError: if there is none, it is damaged, or it comes from another model, data set, batch or schedule.
        """
        if name == "latest":
            self.finished = has_finished(self.folder, self.description)
            if self.finished:
                self.accelerator.print(f"{self.folder}: the run has finished its {self.args.max_train_steps} steps.")
                return
            if not has_checkpoints(self.checkpoints):
                self.accelerator.print(f"no checkpoint in {self.checkpoints}: the run starts at its beginning.")
                return
        checkpoint = choose_checkpoint(self.checkpoints, name)
        with resuming_from(checkpoint):
            state = read_state(checkpoint)
            check_same_run(checkpoint, state, self.description)
            self.batches.resume(state["step"], checkpoint)
            options = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
            load_checkpoint(self.accelerator, checkpoint)
        # the checkpoint brings its run's options, too; those of this run count
        for group, of_this_run in zip(self.optimizer.param_groups, options, strict=True):
            group.update(of_this_run)
        if self.ema is not None:
            self.ema.decay = self.args.ema_decay
            if [p.shape for p in self.ema.shadow_params] != [p.shape for p in self.parameters]:
                raise ResumeError("cannot resume: the checkpoint's averaged weights are of another model.")
            self.ema.to(self.accelerator.device)  # accelerate restores custom states on the CPU
        self.start_step = state["step"]
        self.records.resume(self.start_step)
        logger.info("resumed from %s", checkpoint)

    def train_and_save(self) -> None:
        """Train to the end, save the model and validate it."""
        args = self.args
        self.records.begin()
        if self.start_step < args.max_train_steps:
            self._all_steps()
        # the model is saved before what can fail, or wait for a network
        self._save_model()
        self.background.join()
        self._validate(args.max_train_steps)
        if self.accelerator.is_main_process:
            self.records.write_final()
        self.accelerator.wait_for_everyone()

    def _all_steps(self) -> None:
        """All steps that are left, with a checkpoint of the last: a finished run can be made longer."""
        args = self.args
        batches = iter(self.batches)
        self.model.train()
        progress = tqdm(
            total=args.max_train_steps,
            initial=self.start_step,
            desc=self.stage.name,
            disable=not self.accelerator.is_main_process,
            mininterval=1.0,
        )
        seconds = 0.0  # of the steps since the last line of the log
        logged_step = self.start_step
        with progress:  # an error ends its line
            for step in range(self.start_step, args.max_train_steps):
                started = time.perf_counter()
                line = self._step(step, [next(batches) for _ in range(args.gradient_accumulation_steps)])
                is_stopping = self.stop_request.is_made_anywhere()
                seconds += time.perf_counter() - started
                done = step + 1
                is_last = done == args.max_train_steps
                progress.update()
                if is_last or done % args.logging_steps == 0:
                    images = (done - logged_step) * self.images_per_step
                    self._log(done, line, images / max(seconds, 1e-9))
                    progress.set_postfix(loss=f"{line['loss/total']:.3f}", refresh=False)
                    seconds = 0.0
                    logged_step = done
                is_saved = bool(args.checkpointing_steps) and (is_last or done % args.checkpointing_steps == 0)
                if is_saved:  # before the validation, which can fail
                    self._save_checkpoint(done)
                if is_last:
                    break
                if is_stopping:  # a validation may take longer than a scheduler waits
                    self._stop(done, is_saved)
                if args.validation_steps and done % args.validation_steps == 0:
                    self._validate(done)
                if args.push_steps and done % args.push_steps == 0:
                    self._push_so_far(done)

    # One step

    def _step(self, step: int, batches: list[dict]) -> dict[str, float]:
        """One optimizer step; returns its losses, gradient norm and learning rate."""
        accelerator = self.accelerator
        stage = self.stage
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self.args.learning_rate_factor(step)
        batches = [stage.prepare_batch(batch) for batch in batches]
        totals = self._step_totals(batches)
        if totals["skipped"]:
            self.batches.count_corrupt(batches)
        # the losses are divided by the totals of the whole step; backward divides by processes and accumulation steps
        # once more, which this undoes
        scale = accelerator.num_processes * self.args.gradient_accumulation_steps
        sums = torch.zeros(len(stage.terms), device=accelerator.device)
        for batch in batches:
            batch = to_device(batch, accelerator.device)
            with accelerator.accumulate(self.model):
                output = stage.forward(self.model, batch, step)
                values = [term.function(output, batch, step) / totals[term.per] for term in stage.terms]
                loss = sum(term.weight * value for term, value in zip(stage.terms, values, strict=True))
                sums += torch.stack([value.detach() for value in values])
                # DeepSpeed's takes the optimizer's step, too; clipping and `step` below then do nothing
                accelerator.backward(loss * scale)
        norm = self._clip_gradients()
        losses = self._finite_losses(step, sums, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.step(self.parameters)
        stage.after_step(step, accelerator, self.optimizer, self.ema)
        line = {**losses, "grad_norm": norm, "lr": self.optimizer.param_groups[0]["lr"]}
        if self.batches.corrupt_images:
            line["data/corrupt_images"] = len(self.batches.corrupt_images)
        return line

    def _step_totals(self, batches: list[dict]) -> dict[str, float]:
        """Denominators of the losses, and images left out: sums over the step's micro-batches of all processes."""
        # in one sum with the images left out: each sum over the processes costs a round trip
        parts = [self.stage.loss_denominators(batch) | {"skipped": len(batch.get("skipped", []))} for batch in batches]
        names = sorted(parts[0])
        sums = torch.tensor([sum(part[name] for part in parts) for name in names], dtype=torch.float64)
        sums = self.accelerator.reduce(sums.to(self.accelerator.device, torch.float32), "sum")
        return dict(zip(names, sums.tolist(), strict=True))

    def _finite_losses(self, step: int, sums: torch.Tensor, norm: float) -> dict[str, float]:
        """Loss terms of the step over all processes. It ends the run before the optimizer uses bad gradients.

        Raises:
            NonFiniteLossError: for a term that is not finite, or else for gradients that are not.
        """
        terms = self.stage.terms
        values = self.accelerator.reduce(sums, "sum").tolist()
        losses = {"loss/total": 0.0}
        for term, value in zip(terms, values, strict=True):
            if not math.isfinite(value):
                raise NonFiniteLossError(
                    f"loss term {term.name!r} is {value} at step {step + 1}. {resume_hint(self.checkpoints)}"
                )
            losses[f"loss/{term.name}"] = value
            if term.in_total:
                losses["loss/total"] += term.weight * value
        # fp16 skips such steps; DeepSpeed calls such norms -1
        if self.accelerator.mixed_precision != "fp16" and not 0 <= norm < math.inf:
            hint = resume_hint(self.checkpoints)
            raise NonFiniteLossError(f"the gradient is not finite at step {step + 1} (norm {norm}). {hint}")
        return losses

    def _clip_gradients(self) -> float:
        """Clip the gradients, and return the norm they had."""
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.args.max_grad_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        return float(norm)

    # Between steps

    def _log(self, step: int, line: dict[str, float], images_per_second: float) -> None:
        line = line | {"images_per_second": images_per_second}
        if self.accelerator.device.type == "cuda":
            line["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.accelerator.device) / 2**30
        self.records.log({"step": step, **line, **self.stage.statistics()})

    def _save_checkpoint(self, step: int) -> None:
        state = {"step": step, **self.description}
        with saving(f"checkpoint-{step}", self.checkpoints):
            save_checkpoint(
                self.accelerator, self.checkpoints, state, self.args.checkpoints_total_limit, self.batches.position()
            )

    def _validate(self, step: int) -> None:
        """Validate the model as it would be saved, on the main process."""
        metrics: dict[str, float] = {}
        images: dict[str, Any] = {}
        with self._finished_model():
            if self.accelerator.is_main_process:
                metrics, images = self.stage.validate(step)
        self.records.log_validation(step, metrics, images)

    def _stop(self, step: int, is_saved: bool) -> None:
        """End a run that was asked to, on all processes together."""
        if not is_saved:
            self._save_checkpoint(step)
        raise StoppedError(
            f"stopped by {self.stop_request.name} after step {step} of {self.args.max_train_steps}; "
            f"checkpoint-{step} is saved: continue with --resume_from_checkpoint latest.",
            self.stop_request.signal_number,
        )

    def _push_so_far(self, step: int) -> None:
        """Upload the model, images and card of the unfinished run, while it goes on."""

        def write(folder: Path) -> None:
            self.stage.save(folder)
            self.records.copy_to(folder)
            self.records.write(folder, step)

        with self._finished_model():
            if self.accelerator.is_main_process:
                self.background.start(f"Step {step} of {self.args.max_train_steps}", write)

    # The finished model

    def _save_model(self) -> None:
        """Write the finished model aside, then move it into the output folder, its index last."""
        with saving("the model", self.checkpoints):
            temporary = self.folder / SAVING
            with self._finished_model():
                if self.accelerator.is_main_process:
                    shutil.rmtree(temporary, ignore_errors=True)
                    self.stage.save(temporary)
            if self.accelerator.is_main_process:
                install_model(temporary, self.folder)
                self.records.write(self.folder, self.args.max_train_steps)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _finished_model(self) -> Iterator[None]:
        """Inside, the main process's stage holds the model as it would be saved. All processes enter together."""
        stage = self.stage
        trained = stage.model
        if self.sharded:
            gather_into(self.accelerator.unwrap_model(self.model, keep_torch_compile=False), self.whole)
            if self.whole is not None:
                stage.model = self.whole.to(self.accelerator.device)
        if not self.accelerator.is_main_process:
            yield
            return
        with self.averaged_weights():
            stage.model.eval()
            try:
                yield
            finally:
                stage.model = trained
                stage.model.train()
                if self.whole is not None:
                    self.whole.to("cpu")

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the model holds the averaged weights, where there are any."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)
