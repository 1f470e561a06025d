"""A run that is asked to end: by a scheduler's SIGTERM, or by Ctrl-C."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from accelerate import Accelerator

ONE_INTERRUPT = 2.0  # seconds; torchrun passes on a Ctrl-C that the terminal has sent to all processes already
NOTE = b"\nending after this step, with a checkpoint; Ctrl-C again ends at once\n"


class StoppedError(RuntimeError):
    """The run was asked to end and has left a checkpoint.

    Attributes:
        signal_number: the signal that asked.
    """

    def __init__(self, message: str, signal_number: int = signal.SIGTERM):
        super().__init__(message)
        self.signal_number = signal_number


class StopRequest:
    """Notes that this process was asked to end; the loop ends the run, on all processes together.

    Attributes:
        is_made: whether it was.
        signal_number: by which signal; SIGTERM where another process was asked.
    """

    def __init__(self, accelerator: Accelerator):
        self.is_made = False
        self.signal_number: int = signal.SIGTERM
        self._accelerator = accelerator
        self._one_interrupt = ONE_INTERRUPT if accelerator.num_processes > 1 else 0.0
        self._made_at = 0.0

    @property
    def name(self) -> str:
        """The signal, as people call it."""
        if self.signal_number == signal.SIGINT:
            return "Ctrl-C"
        return signal.Signals(self.signal_number).name

    def is_made_anywhere(self) -> bool:
        """Whether any process was asked. All processes call this together, and get the same answer."""
        if self._accelerator.num_processes == 1:
            return self.is_made
        count = torch.tensor(float(self.is_made), device=self._accelerator.device)
        return bool(self._accelerator.reduce(count, "sum") > 0)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, SIGTERM and the first Ctrl-C are noted; another Ctrl-C interrupts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.is_made:
            if number == signal.SIGINT and time.monotonic() - self._made_at >= self._one_interrupt:
                raise KeyboardInterrupt
            return
        self.is_made = True
        self.signal_number = number
        self._made_at = time.monotonic()
        if number == signal.SIGINT and self._accelerator.is_main_process:
            os.write(2, NOTE)  # print must not be called while it may be at work
