"""Faults and other conditions for runs of train.py: functions for the option `before` of run_script.

Each one changes the process that it runs in, then train.py starts in this process."""
import os
import pathlib
import signal
import time


def terminal(path):
    """Use the terminal `path`, which becomes the controlling terminal."""
    tty = os.open(path, os.O_RDWR)
    for number in range(3):
        os.dup2(tty, number)


def endless_save(marker):
    """Saving a checkpoint does not end. The file `marker` appears when it begins."""
    import torch

    def save(*arguments):
        pathlib.Path(marker).touch()
        time.sleep(600)

    torch.save = save


def save_until_second_sigterm(marker):
    """Saving a checkpoint takes until the process gets one more SIGTERM. The file `marker` appears
    when it begins."""
    import torch
    original = torch.save

    def save(*arguments):
        received, handler = [], signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda *given: (handler(*given), received.append(given)))
        pathlib.Path(marker).touch()
        while not received:
            time.sleep(0.002)
        original(*arguments)

    torch.save = save


def variables(values):
    """Set environment variables. train.py reads some of them when it starts."""
    os.environ.update(values)
