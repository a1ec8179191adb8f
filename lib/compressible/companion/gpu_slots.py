"""GPUs of this machine for jobs that share it: one a job, also for two batches at once."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from compressible.runtime.paths import variables_set

DEVICES = Path("/dev")


@contextlib.contextmanager
def gpu_slot(count: int) -> Iterator[str]:
    """Hold one of the first `count` GPUs of this machine, or of as many as it has, waiting for it; 0 hides all GPUs.

    Yields the device number as CUDA_VISIBLE_DEVICES has it during the block. A scheduler that has shown
    this process one GPU is left alone.
    """
    here = min(count, len(list(DEVICES.glob("nvidia[0-9]*"))) or count)
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    shown = list(map(str, range(here))) if told is None else told.split(",")
    devices = [device for device in shown if device][:count]
    if len(devices) <= (0 if told is None else 1):
        with variables_set(CUDA_VISIBLE_DEVICES="".join(devices)):
            yield "".join(devices)
        return
    device, lock = first_free(devices)
    try:
        with variables_set(CUDA_VISIBLE_DEVICES=device):
            yield device
    finally:
        lock.release()


def first_free(devices: Sequence[str]) -> tuple[str, Any]:
    """Wait for the first of the GPUs that no other job of this user holds, and return it with its held lock."""
    from filelock import FileLock, Timeout

    # On this machine, not in the cache: that may be shared by machines with GPUs of their own.
    folder = Path(tempfile.gettempdir()) / f"compressible-gpus-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    # A part of a GPU has slashes in its name.
    locks = {device: FileLock(folder / f"{quote(device.strip(), safe='')}.lock") for device in devices}
    while True:
        for device, lock in locks.items():
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=0)
                return device, lock
        time.sleep(0.5)
