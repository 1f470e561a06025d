"""The training loop that both stages share, on accelerate.

One step takes ``gradient_accumulation_steps`` micro-batches on every process. Losses are summed and divided by what
the whole step holds, so the layout of the batch changes nothing but speed. See `dar_hf.data.batches` for why a run is
a function of its seed and step.
"""

import copy
import gc
import json
import logging
import math
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    broadcast_object_list,
    gather_object,
    set_seed,
)
from diffusers.training_utils import EMAModel
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from ..data import BatchStream, DataError, GlobalBatchSampler, StreamedImages, collate
from ..data.sources import DIGITS
from ..hub import model_files, prepare_repository, push_folder
from ..hub.run_cards import write_run_card
from ..utils.errors import one_line
from ..utils.files import write_json, write_text
from ..utils.pictures import plot_history, save_picture
from ..utils.processes import join_processes
from .arguments import LoopArguments
from .checkpoints import (
    CheckpointError,
    find_checkpoint,
    has_checkpoints,
    load_checkpoint,
    read_position,
    read_state,
    resume_hint,
    save_checkpoint,
    saving,
)
from .folder_lock import lock_folder, unlock_folder
from .launcher import check_launcher, pick_precision, precision_reason
from .pushing import BackgroundPush
from .resuming import ResumeError, check_same_run
from .run_folder import (
    CHECKPOINTS,
    HISTORY,
    RECORD,
    SAVING,
    install_model,
    is_finished,
    read_kept_history,
    read_record,
)
from .sharding import check_layout, configure_deepspeed, gather_into
from .stage import Stage
from .stopping import StoppedError, StopRequest
from .trackers import track_pictures

logger = logging.getLogger(__name__)

ON_HOST = ("seed", "index", "skipped")  # read one by one: on a GPU each would wait for the device


class NonFiniteLossError(RuntimeError):
    """A loss term became NaN or infinite; the message names the term and the step."""


class PushError(RuntimeError):
    """The Hub took nothing, before training or after it; the message says why, and where the finished model is."""


class TrainingLoop:
    """One run of one stage. Use `train`."""

    def __init__(self, stage: Stage, args: LoopArguments, accelerator: Accelerator):
        self.stage, self.args, self.accelerator = stage, args, accelerator
        self.folder = Path(args.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.checkpoints = self.folder / CHECKPOINTS
        if args.gradient_checkpointing:
            enable = getattr(stage.model, "enable_gradient_checkpointing", None)
            (enable or stage.model.gradient_checkpointing_enable)()
        self.sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        self.whole = copy.deepcopy(stage.model) if self.sharded and accelerator.is_main_process else None
        stage.model.to(accelerator.device)
        stage.prepare(accelerator)
        optimizer = torch.optim.AdamW(
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
        for state in (self.ema, *stage.keepers):
            if state is not None:
                accelerator.register_for_checkpointing(state)
        self.description = self._describe()
        self.history: list[dict] = []
        self.start_step = 0
        self.stream = self._open_stream()
        self.corrupt_images: set[int] = set()
        self.finished = False  # by an earlier run
        self._request = StopRequest(accelerator)
        self._stopping = False
        self._pictures: set[str] = set()  # written by this process: an earlier run's may still lie there
        self._background = BackgroundPush(
            self.folder, lambda path, text: push_folder(path, hub_repository(args), text)
        )

    # Checkpoints and history

    def _describe(self) -> dict:
        """What makes the run the one it is; a resumed run must agree in all of it."""
        world = self.accelerator.num_processes
        args = self.args
        return {
            "stage": self.stage.name,
            "model": self.stage.describe(),
            "layout": self.accelerator.distributed_type.value if self.sharded else "copies",
            "seed": args.seed,
            "num_samples": None if args.streaming else len(self.stage.samples),  # type: ignore[arg-type]
            "images_per_step": args.train_batch_size * args.gradient_accumulation_steps * world,
            "data": self.stage.describe_data(),
            "max_train_steps": args.max_train_steps,
        }

    def _save_checkpoint(self, step: int) -> None:
        state = {"step": step, **self.description}
        position = None if self.stream is None else self.stream.state_dict()
        with saving(f"checkpoint-{step}", self.checkpoints):
            save_checkpoint(self.accelerator, self.checkpoints, state, self.args.checkpoints_total_limit, position)

    def resume(self) -> None:
        """Continue from the checkpoint the arguments name.

        "latest" starts a run where there is none, and notes that the run has ``finished`` where it has.

        Raises:
            ResumeError: if there is none, it is damaged, or it comes from another model, data set, batch or schedule.
        """
        name = self.args.resume_from_checkpoint or "latest"
        if name == "latest" and self._ends_here():
            return
        checkpoint = self._find_checkpoint(name)
        try:
            state = read_state(checkpoint)
            check_same_run(checkpoint, state, self.description)
            if self.stream is not None:
                self.stream.load_state_dict(read_position(checkpoint, self.accelerator.process_index))
            load_checkpoint(self.accelerator, checkpoint)
            self._check_averages()
        except ResumeError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ResumeError(f"cannot resume {checkpoint}: {str(error).rstrip('.')}.") from error
        if self.ema is not None:
            self.ema.to(self.accelerator.device)  # accelerate restores custom states on the CPU
        self.start_step = state["step"]
        self.history = read_kept_history(self._history_path, self.start_step)
        logger.info("resumed from %s", checkpoint)

    def _ends_here(self) -> bool:
        """Whether there is nothing to resume from: the run has finished, or has not begun."""
        if is_finished(self.folder):
            record = read_record(self.folder)
            if self.args.max_train_steps == record["max_train_steps"]:
                check_same_run(self.folder, record, self.description)
                self.accelerator.print(f"{self.folder}: the run has finished its {self.args.max_train_steps} steps.")
                self.finished = True
                return True
            if not has_checkpoints(self.checkpoints):
                raise ResumeError(
                    f"cannot resume {self.folder}: the run finished after {record['max_train_steps']} steps and left "
                    "no checkpoint. To go on from its model, give it to another run by --init_from."
                )
        if has_checkpoints(self.checkpoints):
            return False
        self.accelerator.print(f"no checkpoint in {self.checkpoints}: the run starts at its beginning.")
        return True

    def _find_checkpoint(self, name: str) -> Path:
        """The main process looks, since complete checkpoints are known by reading all of them."""
        found = ["", ""]
        if self.accelerator.is_main_process:
            try:
                found[0] = str(find_checkpoint(self.checkpoints, name))
            except CheckpointError as error:
                found[1] = str(error)
        broadcast_object_list(found)
        if found[1]:
            raise ResumeError(found[1])
        return Path(found[0])

    def _check_averages(self) -> None:
        if self.ema is None:
            return
        shapes = [parameter.shape for parameter in self.parameters]
        if [average.shape for average in self.ema.shadow_params] != shapes:
            raise ResumeError("cannot resume: the checkpoint's averaged weights are of another model.")

    @property
    def _history_path(self) -> Path:
        return self.folder / HISTORY

    def _log(self, line: dict) -> None:
        self.history.append(line)
        if self.accelerator.is_main_process:
            with saving(HISTORY, self.checkpoints), self._history_path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        self.accelerator.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])

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

    def _stop(self, step: int, saved: bool) -> None:
        """End a run that was asked to, on all processes together."""
        if not saved:
            self._save_checkpoint(step)
        raise StoppedError(
            f"stopped by {self._request.name} after step {step} of {self.args.max_train_steps}; checkpoint-{step} is "
            "saved: continue with --resume_from_checkpoint latest.",
            self._request.signal_number,
        )

    # Steps

    def _open_stream(self) -> BatchStream | None:
        if not isinstance(self.stage.samples, StreamedImages):
            return None
        return BatchStream(
            self.stage.samples,
            self.args.train_batch_size,
            num_processes=self.accelerator.num_processes,
            process_index=self.accelerator.process_index,
            num_workers=self.args.dataloader_num_workers,
            seed=self.args.seed,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def _batches(self) -> Iterator[dict]:
        if self.stream is not None:
            return iter(self.stream)
        sampler = GlobalBatchSampler(
            len(self.stage.samples),  # type: ignore[arg-type]
            self.args.train_batch_size,
            num_processes=self.accelerator.num_processes,
            process_index=self.accelerator.process_index,
            accumulation=self.args.gradient_accumulation_steps,
            seed=self.args.seed,
            start_step=self.start_step,
            num_steps=self.args.max_train_steps,
        )
        workers = self.args.dataloader_num_workers
        return iter(
            torch.utils.data.DataLoader(
                self.stage.samples,
                batch_sampler=sampler,  # type: ignore[arg-type]
                collate_fn=collate,
                num_workers=workers,
                pin_memory=self.accelerator.device.type == "cuda",
                # without its own generator the loader draws from the global one, and a resumed run drops other units
                generator=torch.Generator().manual_seed(self.args.seed),
                persistent_workers=workers > 0,
                worker_init_fn=_leave_interrupts_to_the_run,
            )
        )

    def _totals(self, batches: list[dict]) -> dict[str, float]:
        """What the whole step holds, over its micro-batches and all processes."""
        amounts = [self.stage.amounts(batch) | {"skipped": len(batch.get("skipped", []))} for batch in batches]
        amounts[0]["stop"] = float(self._request.is_made)
        names = sorted(amounts[0])
        sums = torch.tensor([sum(amount.get(name, 0.0) for amount in amounts) for name in names], dtype=torch.float64)
        sums = self.accelerator.reduce(sums.to(self.accelerator.device, torch.float32), "sum")
        return dict(zip(names, sums.tolist(), strict=True))

    def _note_corrupt(self, batches: list[dict]) -> None:
        """Count distinct images that could not be read, of all processes; they call this together.

        Raises:
            DataError: if there are too many.
        """
        own = [index for batch in batches for index in batch.get("skipped", [])]
        self.corrupt_images.update(gather_object(own))
        if len(self.corrupt_images) > self.args.max_corrupt_images:
            raise DataError(
                f"{len(self.corrupt_images)} images could not be read, more than max_corrupt_images="
                f"{self.args.max_corrupt_images}; the warnings above name them. {resume_hint(self.checkpoints)}"
            )

    def _step(self, step: int, batches: list[dict]) -> dict[str, float]:
        """One optimizer step; returns its losses, gradient norm and learning rate."""
        accelerator, args, stage = self.accelerator, self.args, self.stage
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * args.learning_rate_factor(step)
        totals = self._totals(batches)
        self._stopping = totals["stop"] > 0  # one process that was asked stops all
        if totals["skipped"]:
            self._note_corrupt(batches)
        # backward averages over processes and accumulation steps; the losses are divided by totals already
        scale = accelerator.num_processes * args.gradient_accumulation_steps
        logged = torch.zeros(len(stage.terms), device=accelerator.device)
        norm = torch.zeros(())
        for batch in batches:
            batch = {
                name: value if name in ON_HOST else value.to(accelerator.device, non_blocking=True)
                for name, value in batch.items()
            }
            with accelerator.accumulate(self.model):
                output = stage.forward(self.model, batch, step)
                values = [term.function(output, batch) / totals[term.per] for term in stage.terms]
                loss = sum(term.weight * value for term, value in zip(stage.terms, values, strict=True))
                logged += torch.stack([value.detach() for value in values])
                if accelerator.sync_gradients:
                    losses = self._checked(step, logged)
                accelerator.backward(loss * scale)  # DeepSpeed's takes the optimizer's step, too
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.parameters, args.max_grad_norm)
                    norm = norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm)
                    # fp16 skips such steps; DeepSpeed calls such norms -1
                    if accelerator.mixed_precision != "fp16" and not 0 <= float(norm) < math.inf:
                        raise NonFiniteLossError(
                            f"the gradient is not finite at step {step + 1} (norm {float(norm)}). "
                            f"{resume_hint(self.checkpoints)}"
                        )
                self.optimizer.step()
                self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.step(self.parameters)
        stage.after_step(step, accelerator, self.optimizer, self.ema)
        line = {**losses, "grad_norm": float(norm), "lr": self.optimizer.param_groups[0]["lr"]}
        return line | ({"data/corrupt_images": len(self.corrupt_images)} if self.corrupt_images else {})

    def _checked(self, step: int, logged: torch.Tensor) -> dict[str, float]:
        """Loss terms of the step over all processes, before the optimizer uses their gradients."""
        values = self.accelerator.reduce(logged, "sum").tolist()
        for term, value in zip(self.stage.terms, values, strict=True):
            if not math.isfinite(value):
                raise NonFiniteLossError(
                    f"loss term {term.name!r} is {value} at step {step + 1}. {resume_hint(self.checkpoints)}"
                )
        terms = zip(self.stage.terms, values, strict=True)
        total = sum(term.weight * value for term, value in terms if term.in_total)
        named = {f"loss/{term.name}": value for term, value in zip(self.stage.terms, values, strict=True)}
        return {"loss/total": total, **named}

    def _validate(self, step: int) -> dict[str, float]:
        """Validate the averaged weights on the main process, and write its pictures."""
        figures: dict[str, float] = {}
        pictures: dict[str, Any] = {}
        with self._finished_model():
            if self.accelerator.is_main_process:
                figures, pictures = self.stage.validate(step)
        if self.accelerator.is_main_process:
            with saving("the validation's pictures", self.checkpoints):
                for name, picture in pictures.items():
                    save_picture(picture, self.folder / f"{name}.png")
                    self._pictures.add(f"{name}.png")
                plot_history({self.stage.name: self.history}, self.folder / "loss.png")
            track_pictures(self.accelerator.trackers, pictures, step)
        self.accelerator.wait_for_everyone()
        return {f"validation/{name}": value for name, value in figures.items()}

    def _log_validation(self, step: int) -> None:
        figures = self._validate(step)
        if figures:
            self._log({"step": step, **figures})
            if self.accelerator.is_main_process:
                tqdm.write(f"step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))

    def run(self) -> None:
        """Train to the end and save the model."""
        if self.accelerator.is_main_process:
            with saving(HISTORY, self.checkpoints):
                write_text(self._history_path, "".join(json.dumps(line) + "\n" for line in self.history))
        if self.start_step < self.args.max_train_steps:
            self._train()
        # the model is saved before what can fail, or wait for a network
        with saving("the model", self.checkpoints):
            self._save_model()
        self._background.join()
        self._log_validation(self.args.max_train_steps)
        if self.accelerator.is_main_process:
            with saving(RECORD, self.checkpoints):
                self._write_records(self.folder, self.args.max_train_steps)
        self.accelerator.wait_for_everyone()

    def _train(self) -> None:
        """All steps that are left, with a checkpoint of the last: a finished run can be made longer."""
        args, accelerator = self.args, self.accelerator
        batches = self._batches()
        self.model.train()
        bar = tqdm(
            total=args.max_train_steps,
            initial=self.start_step,
            desc=self.stage.name,
            disable=not accelerator.is_main_process,
            mininterval=1.0,
        )
        clock, clock_step = time.perf_counter(), self.start_step
        with bar as progress:  # an error ends its line
            for step in range(self.start_step, args.max_train_steps):
                line = self._step(step, [next(batches) for _ in range(args.gradient_accumulation_steps)])
                done = step + 1
                is_last = done == args.max_train_steps
                progress.update()
                if done % args.logging_steps == 0 or is_last:
                    elapsed, images = time.perf_counter() - clock, self.description["images_per_step"]
                    line["images_per_second"] = (done - clock_step) * images / max(elapsed, 1e-9)
                    if accelerator.device.type == "cuda":
                        line["peak_memory_gib"] = torch.cuda.max_memory_allocated(accelerator.device) / 2**30
                    clock, clock_step = time.perf_counter(), done
                    self._log({"step": done, **line, **self.stage.statistics()})
                    progress.set_postfix(loss=f"{line['loss/total']:.3f}", refresh=False)
                due = bool(args.checkpointing_steps) and (done % args.checkpointing_steps == 0 or is_last)
                if due:  # before the validation, which can fail
                    self._save_checkpoint(done)
                paused = time.perf_counter()
                if args.validation_steps and done % args.validation_steps == 0 and not is_last:
                    self._log_validation(done)
                clock += time.perf_counter() - paused
                if self._stopping and not is_last:
                    self._stop(done, saved=due)
                paused = time.perf_counter()
                if args.push_steps and done % args.push_steps == 0 and not is_last:
                    self._push_so_far(done)
                clock += time.perf_counter() - paused

    def _write_records(self, folder: Path, step: int) -> None:
        """The curves, options and card that belong to the model after ``step`` steps."""
        plot_history({self.stage.name: self.history}, folder / "loss.png")
        record = {"arguments": recorded_arguments(self.args), **self.description, "trained_steps": step}
        write_json(folder / RECORD, record)
        try:
            write_run_card(folder, hub_repository(self.args) if self.args.push_to_hub else str(folder))
        except ValueError as error:
            logger.warning("README.md is left as it is: %s", error)

    def _save_model(self) -> None:
        """Write the finished model aside, then move it into the output folder, its index last."""
        temporary = self.folder / SAVING
        with self._finished_model():
            if self.accelerator.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)
                self.stage.save(temporary)
        if self.accelerator.is_main_process:
            install_model(temporary, self.folder)
            self._write_records(self.folder, self.args.max_train_steps)
        self.accelerator.wait_for_everyone()

    def _push_so_far(self, step: int) -> None:
        """Upload the model, pictures and card of the unfinished run, while it goes on."""

        def write(folder: Path) -> None:
            self.stage.save(folder)
            for name in self._pictures:
                shutil.copy(self.folder / name, folder)
            shutil.copy(self._history_path, folder)
            self._write_records(folder, step)

        with self._finished_model():
            if self.accelerator.is_main_process:
                self._background.start(f"Step {step} of {self.args.max_train_steps}", write)


def recorded_arguments(args: LoopArguments) -> dict[str, Any]:
    """A run's options for its record; local places begin with ./ there, and look like no id of the Hub elsewhere."""
    options = dict(vars(args))
    for name in ("dataset_name", "tokenizer", "codes", "init_from"):
        value = options.get(name)
        if value and value != DIGITS and value[0] not in "./~" and Path(value).exists():
            options[name] = f"./{value}"
    return options


def hub_repository(args: LoopArguments) -> str:
    """The repository that a run is pushed to."""
    return args.hub_model_id or Path(args.output_dir).resolve().name


def claim_repository(args: LoopArguments, saved_class: str) -> None:
    """Create the run's repository, so that what would refuse the finished model does so before training.

    Raises:
        PushError: if it cannot be written, or holds another kind of model, or a link in the output folder leads out
            of it.
    """
    try:
        if Path(args.output_dir).is_dir():
            model_files(args.output_dir)
        private = args.hub_private_repo or None
        args.hub_model_id = prepare_repository(hub_repository(args), saved_class, private=private)
    except Exception as error:  # also what the transport raises
        raise PushError(f"cannot push to {hub_repository(args)}: {one_line(error)}") from error


def _push(args: LoopArguments) -> None:
    try:
        url = push_folder(args.output_dir, hub_repository(args), f"Train {args.max_train_steps} steps")
    except Exception as error:
        raise PushError(
            f"the finished model is in {args.output_dir}, but not on the Hub: {one_line(error)} "
            f"To push it again: python examples/push_to_hub.py {args.output_dir} {hub_repository(args)}"
        ) from error
    print(f"pushed to {url.repo_url}")


def _leave_interrupts_to_the_run(worker: int) -> None:
    """A Ctrl-C reaches the workers of a loader, too; they end with the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def train(stage: Stage, args: LoopArguments, accelerator: Accelerator) -> None:
    """Train ``stage``, leave the finished model in ``args.output_dir``, and push it where ``args.push_to_hub``.

    Raises:
        FolderInUseError: if another run is writing into the folder.
        ResumeError: for a checkpoint that does not fit the run.
        NonFiniteLossError: when a loss term stops being finite.
        PushError: if the Hub takes nothing, before training or after; a finished model stays in its folder.
    """
    folder = Path(args.output_dir)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        lock_folder(folder)
    try:
        _train_and_push(stage, args, accelerator)
    finally:
        unlock_folder(folder)


def _train_and_push(stage: Stage, args: LoopArguments, accelerator: Accelerator) -> None:
    if args.push_to_hub and accelerator.is_main_process:
        claim_repository(args, stage.saved_class)
    set_seed(args.seed + accelerator.process_index)  # dropout differs between processes; all else has its own seed
    loop = TrainingLoop(stage, args, accelerator)
    if args.resume_from_checkpoint:
        loop.resume()
    if args.report_to:
        accelerator.init_trackers(
            "dar-hf", config={k: v for k, v in vars(args).items() if isinstance(v, (int, float, str))}
        )
    if not loop.finished:
        with loop._request.listening():
            loop.run()
    # the wrapped model must go before the process group: otherwise its reducer destroys the group last, which joins
    # the communication thread under the interpreter's lock and can wait for ever
    accelerator.free_memory()
    del loop
    gc.collect()
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from deepspeed import comm

        comm.destroy_process_group()  # it holds the groups in places of its own
    accelerator.end_training()
    if args.push_to_hub and accelerator.is_main_process:
        _push(args)


def make_accelerator(args: LoopArguments) -> Accelerator:
    """The accelerator of a run; says which precision was picked and why.

    Raises:
        ValueError: if the launcher's settings contradict the options, or would give a wrong model.
    """
    check_launcher(args)
    precision = pick_precision(args.mixed_precision)
    accelerator = join_processes(
        mixed_precision=precision,
        # given as a number, the launcher's variable would win over it
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=args.gradient_accumulation_steps),
        log_with=args.report_to,
        project_dir=args.output_dir,
        dynamo_backend="inductor" if args.torch_compile else None,
    )
    if args.report_to and not accelerator.log_with:  # accelerate leaves out what is not installed
        raise ValueError(f"report_to: the package of {args.report_to} is not installed.")
    if args.mixed_precision == "auto":
        accelerator.print(f"mixed precision: {precision} ({precision_reason(precision)})")
    check_layout(args, accelerator.distributed_type, accelerator.is_fsdp2)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        configure_deepspeed(args, accelerator)
    return accelerator
