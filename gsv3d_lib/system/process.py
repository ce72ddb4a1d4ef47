"""One training at a time in a folder, and how a training is stopped.

It is stopped between two steps, where all weights are whole.
"""

from __future__ import annotations

import os
import platform
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .errors import UserError
from .paths import remove_leftovers

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def only_training(run_dir: Path, first: bool) -> Iterator[None]:
    """Within the block no other process trains in `run_dir`; UserError where one does.

    The system gives the lock back when its process ends, however it ends. Windows, and
    file systems without locks, go without.
    first: of several processes of one training, only the first takes the lock.
    """
    if not first:
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / "training.lock", "a+") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            other = file.read(200).strip() or "just started"
            raise UserError(
                f"Another training works in {run_dir} ({other}): "
                "wait until it ends, or name another folder."
            ) from None
        except OSError:  # ENOLCK, ENOSYS, ...: a network file system that cannot
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        remove_leftovers(run_dir, alone=fcntl is not None)
        yield


class Signals:
    """Notes Ctrl-C and SIGTERM within the block; the training asks between two steps.

    Only the main thread may listen; in another, and where a signal is ignored on
    purpose (nohup), nothing changes. A second Ctrl-C does not wait. Afterwards the
    handlers are those of before.
    """

    def __init__(self):
        self.noted = 0
        self.before = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame) -> None:
        if number == self.noted == signal.SIGINT:
            raise KeyboardInterrupt
        self.noted = self.noted or number

    def of_any_process(self, accelerator) -> int:
        """The signal that any process of this training has got, 0 for none.

        All of them ask, so all of them leave after the same step.
        """
        if accelerator.num_processes == 1:
            return self.noted
        return int(accelerator.gather(torch.tensor([self.noted], device=accelerator.device)).max())


def leave(number: int, run_dir: Path, step: int, first: bool) -> None:
    """End a training that a signal stopped.

    Raises KeyboardInterrupt for Ctrl-C, and SystemExit with 128 + 15 for SIGTERM.
    """
    kept = f"{run_dir} holds its {step} steps" if step else "it had done no step"
    sentence = f"the training was stopped; {kept}, and the same command goes on from there."
    if number == signal.SIGINT:
        raise KeyboardInterrupt(sentence)
    if first:
        print(f"gsv3d: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(128 + number)
