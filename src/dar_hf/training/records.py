"""What a run writes about itself: history, curves, validation images, options and card."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from ..data.sources import DIGITS
from ..hub.run_cards import write_run_card
from ..utils.files import write_json, write_text
from ..utils.pictures import plot_history, save_picture
from .arguments import LoopArguments
from .checkpoints import saving
from .pushing import hub_repository
from .run_folder import CHECKPOINTS, HISTORY, RECORD, read_kept_history
from .trackers import track_images

logger = logging.getLogger(__name__)


class RunRecords:
    """The records of a run in its folder, which the main process writes.

    Args:
        args: the options of the run.
        description: what tells it from others, see `describe_run`.
        accelerator: with the experiment trackers.
    """

    def __init__(self, args: LoopArguments, description: dict, accelerator: Accelerator):
        self.args = args
        self.description = description
        self.accelerator = accelerator
        self.folder = Path(args.output_dir)
        self.history: list[dict] = []
        self._plotted: tuple[Path, int] | None = None  # where curves were drawn last, and of how many lines
        self.pictures: set[str] = set()  # of this run: an earlier one's may still lie in the folder

    @property
    def history_path(self) -> Path:
        return self.folder / HISTORY

    def resume(self, step: int) -> None:
        """Take over the history up to ``step``."""
        self.history = read_kept_history(self.history_path, step)

    def begin(self) -> None:
        """Write the history as it is when training begins; later lines are appended."""
        if self.accelerator.is_main_process:
            with self._saving(HISTORY):
                write_text(self.history_path, "".join(json.dumps(line) + "\n" for line in self.history))

    def log(self, line: dict) -> None:
        """Add a line to the history, and to the trackers. All processes call this together."""
        self.history.append(line)
        if self.accelerator.is_main_process:
            with self._saving(HISTORY), self.history_path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        values = {name: value for name, value in line.items() if name != "step"}
        self.accelerator.log(values, step=line["step"])

    def log_validation(self, step: int, metrics: dict[str, float], images: Mapping[str, Image.Image]) -> None:
        """Log what a validation found, with its images and the curves so far. All processes call this together."""
        if self.accelerator.is_main_process:
            with self._saving("the validation's pictures"):
                for name, image in images.items():
                    save_picture(image, self.folder / f"{name}.png")
                    self.pictures.add(f"{name}.png")
                self._plot(self.folder)
            track_images(self.accelerator.trackers, images, step)
        self.accelerator.wait_for_everyone()
        if metrics:
            line = {f"validation/{name}": value for name, value in metrics.items()}
            self.log({"step": step, **line})
            tqdm.write(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in line.items()))

    def write(self, folder: Path, step: int) -> None:
        """Write the curves, options and card of the model after ``step`` steps into its folder."""
        self._plot(folder)
        record = {"arguments": recorded_arguments(self.args), **self.description, "trained_steps": step}
        write_json(folder / RECORD, record)
        source = str(folder)
        if self.args.push_to_hub:
            source = hub_repository(self.args)
        try:
            write_run_card(folder, source)
        except ValueError as error:
            logger.warning("README.md is left as it is: %s", error)

    def write_final(self) -> None:
        """The records of the finished model."""
        with self._saving(RECORD):
            self.write(self.folder, self.args.max_train_steps)

    def copy_to(self, folder: Path) -> None:
        """Copy the history and the validation's images."""
        for name in (HISTORY, *self.pictures):
            shutil.copy(self.folder / name, folder)

    def _plot(self, folder: Path) -> None:
        state = (folder, len(self.history))
        if state != self._plotted:  # drawing takes a second
            plot_history({self.description["stage"]: self.history}, folder / "loss.png")
            self._plotted = state

    def _saving(self, what: str) -> Any:
        return saving(what, self.folder / CHECKPOINTS)


def recorded_arguments(args: LoopArguments) -> dict[str, Any]:
    """A run's options for its record; local paths begin with ./ there, so that they look like no id of the Hub."""
    options = dict(vars(args))
    for name in ("dataset_name", "tokenizer", "codes", "init_from"):
        value = options.get(name)
        if value and value != DIGITS and value[0] not in "./~" and Path(value).exists():
            options[name] = f"./{value}"
    return options
