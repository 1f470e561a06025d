"""Work cut into shards: each is a file that is written atomically, so that any number of processes share the work and
an interrupted run continues where it stopped.

What a shard holds follows from its place alone. The parts are read in order and one at a time, so metrics do not
depend on which process made which, and no set has to fit into memory.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..utils.files import write_json

SETTINGS_FILE = "settings.json"
Compute = Callable[[range], dict[str, torch.Tensor]]


class ShardFolder:
    """A set of ``count`` images as a folder of safetensors files.

    Args:
        folder: where they are.
        settings: what the shards depend on; a folder made with others is refused.
        count: images of the set.
        shard_size: images of a shard.
    """

    def __init__(self, folder: Path, settings: dict, count: int, shard_size: int):
        self.folder = folder
        self.count = count
        self.settings = json.loads(json.dumps(settings | {"shard_size": shard_size}))  # as it is read back
        self.ranges = [range(start, min(start + shard_size, count)) for start in range(0, count, shard_size)]

    def claim(self, overwrite: bool) -> None:
        """Make the folder, or check that it belongs to the same evaluation.

        Raises:
            ValueError: if it does not, naming a setting that differs.
        """
        path = self.folder / SETTINGS_FILE
        if path.is_file() and not overwrite:
            found = json.loads(path.read_text())
            for name in sorted(found.keys() | self.settings.keys()):
                if found.get(name) != self.settings.get(name):
                    raise ValueError(
                        f"{self.folder} holds another evaluation: {name} was {found.get(name)!r}, now "
                        f"{self.settings.get(name)!r}. Choose another output_dir or pass --overwrite_output_dir."
                    )
            return
        if self.folder.is_dir() and any(self.folder.iterdir()) and not overwrite:
            raise ValueError(f"{self.folder} holds files that are no evaluation's: choose another output_dir.")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        write_json(path, self.settings)

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.safetensors"

    def is_done(self, index: int) -> bool:
        """Whether a shard is there, readable, and as long as it has to be."""
        if not self._path(index).is_file():
            return False
        try:
            with safe_open(self._path(index), "pt") as file:
                return (file.metadata() or {}).get("rows") == str(len(self.ranges[index]))
        except SafetensorError:
            return False

    def fill(self, accelerator: Accelerator, compute: Compute, title: str) -> None:
        """Compute what is missing, shared among the processes; all of them call this together."""
        mine = range(accelerator.process_index, len(self.ranges), accelerator.num_processes)
        for index in tqdm(mine, desc=title, disable=not accelerator.is_main_process):
            if self.is_done(index):
                continue
            tensors = compute(self.ranges[index])
            # copies: the format takes no views of one memory
            tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
            temporary = self.folder / f".{index:06d}.{os.getpid()}.tmp"
            save_file(tensors, temporary, metadata={"rows": str(len(self.ranges[index]))})
            os.replace(temporary, self._path(index))
        accelerator.wait_for_everyone()

    def parts(self, name: str) -> Iterator[torch.Tensor]:
        """A tensor of every shard that has it, in order."""
        for index in range(len(self.ranges)):
            with safe_open(self._path(index), "pt") as file:
                if name in file.keys():  # noqa: SIM118 - not a dictionary
                    yield file.get_tensor(name)

    def has(self, name: str) -> bool:
        """Whether the shards hold a tensor of this name."""
        with safe_open(self._path(0), "pt") as file:
            return name in file.keys()  # noqa: SIM118

    def rows(self, name: str) -> torch.Tensor:
        """A tensor of all shards, for what fits into memory."""
        return torch.cat(list(self.parts(name)))
