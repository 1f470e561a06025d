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
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object, set_seed
from diffusers.training_utils import EMAModel
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from ..acceleration_dar import has_fast_bf16
from ..data import BatchStream, DataError, GlobalBatchSampler, StreamedImages, collate
from ..data.sources import DIGITS
from ..files import saved_class, write_json, write_text
from ..hub import model_files, one_line, prepare_repository, push_folder
from ..pictures import plot_history, read_history, save_picture
from ..processes import join_processes
from .arguments import LoopArguments
from .cards import EVALUATIONS, write_run_card
from .checkpoints import find_checkpoint, read_position, read_state, save_checkpoint, saving, way_back
from .pushing import BackgroundPush
from .sharding import check_layout, configure_deepspeed, gather_into
from .stage import Stage
from .trackers import track_pictures

logger = logging.getLogger(__name__)

MODEL_INDICES = ("model_index.json", "config.json")  # say what a finished folder holds
ON_HOST = ("seed", "index", "skipped")  # read one by one: on a GPU each would wait for the device


def pick_precision(requested: str) -> str:
    """accelerate's name for the precision to train in; "auto" is bf16 where it is computed natively."""
    if requested != "auto":
        return requested
    return "bf16" if has_fast_bf16(torch.device("cuda" if torch.cuda.is_available() else "cpu")) else "no"


def claim_output_dir(args: LoopArguments, expected_class: str) -> Path:
    """The output folder, if this run may write there.

    Raises:
        ValueError: if it holds another kind of model, or an earlier run that is neither resumed nor overwritten.
    """
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file.")
    for index in MODEL_INDICES:
        if (folder / index).is_file():
            found = saved_class(json.loads((folder / index).read_text()))
            if found != expected_class:
                raise ValueError(
                    f"output_dir {folder} holds a {found}, not a {expected_class}: choose another folder."
                )
            break
    traces = [folder / name for name in ("checkpoints", "history.jsonl", EVALUATIONS)]
    models = [folder / name for name in MODEL_INDICES]
    if not args.resume_from_checkpoint and any(path.exists() for path in traces + models):
        if not args.overwrite_output_dir:
            raise ValueError(
                f"output_dir {folder} holds an earlier run or model: pass --resume_from_checkpoint latest to continue "
                "it, --overwrite_output_dir to start over, or choose another folder."
            )
        for path in traces:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class NonFiniteLossError(RuntimeError):
    """A loss term became NaN or infinite; the message names the term and the step."""


class StoppedError(RuntimeError):
    """The run was asked to end (SIGTERM) and has left a checkpoint."""


class PushError(RuntimeError):
    """The Hub took nothing, before training or after it; the message says why, and where the finished model is."""


class ResumeError(ValueError):
    """There is no checkpoint to resume from, or it belongs to another run."""


def _difference(name: str, old: Any, new: Any) -> str:
    """What changed, by name; of dictionaries only the entries that differ."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return f"{name} was {old} and is now {new}"
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(f"{name} {key} was {old.get(key)} and is now {new.get(key)}" for key in changed)


class TrainingLoop:
    """One run of one stage. Use `train`."""

    def __init__(self, stage: Stage, args: LoopArguments, accelerator: Accelerator):
        self.stage, self.args, self.accelerator = stage, args, accelerator
        self.folder = Path(args.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.checkpoints = self.folder / "checkpoints"
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
        self._asked_to_stop = self._stopping = False
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
            "seed": args.seed,
            "num_samples": None if args.streaming else len(self.stage.samples),  # type: ignore[arg-type]
            "images_per_step": args.train_batch_size * args.gradient_accumulation_steps * world,
            "max_train_steps": args.max_train_steps,
        }

    def _save_checkpoint(self, step: int) -> None:
        state = {"step": step, **self.description}
        position = None if self.stream is None else self.stream.state_dict()
        with saving(f"checkpoint-{step}", self.checkpoints):
            save_checkpoint(self.accelerator, self.checkpoints, state, self.args.checkpoints_total_limit, position)

    def resume(self) -> None:
        """Continue from the checkpoint the arguments name.

        Raises:
            ResumeError: if there is none, or it comes from another model, data set, batch or schedule.
        """
        try:
            checkpoint = find_checkpoint(self.checkpoints, self.args.resume_from_checkpoint or "latest")
        except ValueError as error:
            raise ResumeError(str(error)) from error
        state = read_state(checkpoint)
        for name, value in self.description.items():
            value = json.loads(json.dumps(value))  # tuples come back as lists
            if value != state.get(name):
                raise ResumeError(f"cannot resume {checkpoint}: {_difference(name, state.get(name), value)}.")
        if self.stream is not None:
            try:
                self.stream.load_state_dict(read_position(checkpoint, self.accelerator.process_index))
            except ValueError as error:
                raise ResumeError(f"cannot resume {checkpoint}: {error}.") from error
        self.accelerator.load_state(str(checkpoint))
        if self.ema is not None:
            self.ema.to(self.accelerator.device)  # accelerate restores custom states on the CPU
        self.start_step = state["step"]
        self.history = [line for line in read_history(self._history_path) if line["step"] <= self.start_step]
        logger.info("resumed from %s", checkpoint)

    @property
    def _history_path(self) -> Path:
        return self.folder / "history.jsonl"

    def _log(self, line: dict) -> None:
        self.history.append(line)
        if self.accelerator.is_main_process:
            with self._history_path.open("a") as file:
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

    @contextmanager
    def _listening_for_sigterm(self) -> Iterator[None]:
        """Inside, SIGTERM (a scheduler's notice) ends the run after the step it is in, with a checkpoint."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: Any) -> None:
            self._asked_to_stop = True

        previous = signal.signal(signal.SIGTERM, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    def _stop(self, step: int, saved: bool) -> None:
        """End a run that was asked to, on all processes together."""
        if not saved:
            self._save_checkpoint(step)
        raise StoppedError(
            f"stopped by SIGTERM after step {step} of {self.args.max_train_steps}; checkpoint-{step} is saved: "
            "continue with --resume_from_checkpoint latest."
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
            )
        )

    def _totals(self, batches: list[dict]) -> dict[str, float]:
        """What the whole step holds, over its micro-batches and all processes."""
        amounts = [self.stage.amounts(batch) | {"skipped": len(batch.get("skipped", []))} for batch in batches]
        amounts[0]["stop"] = float(self._asked_to_stop)
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
                f"{self.args.max_corrupt_images}; the warnings above name them. {way_back(self.checkpoints)}"
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
                            f"{way_back(self.checkpoints)}"
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
                    f"loss term {term.name!r} is {value} at step {step + 1}. {way_back(self.checkpoints)}"
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
            for name, picture in pictures.items():
                save_picture(picture, self.folder / f"{name}.png")
                self._pictures.add(f"{name}.png")
            track_pictures(self.accelerator.trackers, pictures, step)
            plot_history({self.stage.name: self.history}, self.folder / "loss.png")
        self.accelerator.wait_for_everyone()
        return {f"validation/{name}": value for name, value in figures.items()}

    def run(self) -> None:
        """Train to the end and save the model."""
        args, accelerator = self.args, self.accelerator
        if accelerator.is_main_process:
            write_text(self._history_path, "".join(json.dumps(line) + "\n" for line in self.history))
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
                progress.update()
                if done % args.logging_steps == 0 or done == args.max_train_steps:
                    elapsed, images = time.perf_counter() - clock, self.description["images_per_step"]
                    line["images_per_second"] = (done - clock_step) * images / max(elapsed, 1e-9)
                    if accelerator.device.type == "cuda":
                        line["peak_memory_gib"] = torch.cuda.max_memory_allocated(accelerator.device) / 2**30
                    clock, clock_step = time.perf_counter(), done
                    self._log({"step": done, **line, **self.stage.statistics()})
                    progress.set_postfix(loss=f"{line['loss/total']:.3f}", refresh=False)
                if done == args.max_train_steps or (args.validation_steps and done % args.validation_steps == 0):
                    paused = time.perf_counter()
                    figures = self._validate(done)
                    if figures:
                        self._log({"step": done, **figures})
                        progress.write(f"step {done}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))
                    clock += time.perf_counter() - paused
                due = bool(args.checkpointing_steps) and done % args.checkpointing_steps == 0
                if due and done < args.max_train_steps:
                    self._save_checkpoint(done)
                if self._stopping and done < args.max_train_steps:
                    self._stop(done, saved=due)
                if args.push_steps and done % args.push_steps == 0 and done < args.max_train_steps:
                    paused = time.perf_counter()
                    self._push_so_far(done)
                    clock += time.perf_counter() - paused
        self._background.join()
        with saving("the model", self.checkpoints):
            self._save_model()

    def _write_records(self, folder: Path, step: int) -> None:
        """The curves, options and card that belong to the model after ``step`` steps."""
        plot_history({self.stage.name: self.history}, folder / "loss.png")
        record = {"arguments": recorded_arguments(self.args), **self.description, "trained_steps": step}
        write_json(folder / "training.json", record)
        try:
            write_run_card(folder, hub_repository(self.args) if self.args.push_to_hub else str(folder))
        except ValueError as error:
            logger.warning("README.md is left as it is: %s", error)

    def _save_model(self) -> None:
        """Write the finished model aside, then move it into the output folder, its index last."""
        temporary = self.folder / ".saving"
        with self._finished_model():
            if self.accelerator.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)
                self.stage.save(temporary)
        if self.accelerator.is_main_process:
            for name in MODEL_INDICES:  # the old one goes first, the new one comes last: no index over mixed parts
                (self.folder / name).unlink(missing_ok=True)
            for path in sorted(temporary.iterdir(), key=lambda path: path.name in MODEL_INDICES):
                target = self.folder / path.name
                if target.is_dir():
                    shutil.rmtree(target)
                os.replace(path, target)
            temporary.rmdir()
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


def train(stage: Stage, args: LoopArguments, accelerator: Accelerator) -> None:
    """Train ``stage``, leave the finished model in ``args.output_dir``, and push it where ``args.push_to_hub``.

    Raises:
        ResumeError: for a checkpoint that does not fit the run.
        NonFiniteLossError: when a loss term stops being finite.
        PushError: if the Hub takes nothing, before training or after; a finished model stays in its folder.
    """
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
    with loop._listening_for_sigterm():
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
    """The accelerator of a run; says which precision was picked and why."""
    precision = pick_precision(args.mixed_precision)
    accelerator = join_processes(
        mixed_precision=precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.report_to,
        project_dir=args.output_dir,
        dynamo_backend="inductor" if args.torch_compile else None,
    )
    if args.mixed_precision == "auto":
        reason = "computed natively here" if precision == "bf16" else "no native bf16 here"
        accelerator.print(f"mixed precision: {precision} ({reason})")
    check_layout(args, accelerator.distributed_type, accelerator.is_fsdp2)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        configure_deepspeed(args, accelerator)
    return accelerator
