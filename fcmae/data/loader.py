"""The endless stream of samples that training reads, and the worker processes that fill it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from multiprocessing.synchronize import Semaphore
from types import TracebackType

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, default_collate

from fcmae.data.dataset import KeyedImages
from fcmae.errors import UsageError

# Seconds without a batch after which loader processes are taken to hang: as long as ranks wait for each other
# (fcmae/train/distributed.py), so that storage may be away for a while.
PATIENCE = 30 * 60
# Seconds without a batch after which one that is dead is why. torch looks every 5, but not while it reads: of one that
# died in the middle of a word the rest would be waited for without end, since others hold its line open.
CERTAIN = 10
# Seconds that forked processes have to begin, the first time and each time they are forked again. One that does not has
# copied a lock which another thread held at that moment, and waits for ever: of a library, or of Python itself, as in
# 3.10.13 and 3.11.7 (python/cpython#112275, mended in 2024), where a thread of gloo lets go of a tensor just then.
BEGINNING = (30, 60, 120, 240)


class SampleStream(Sampler[list[tuple[int, int]]]):
    """Seeded permutations of the dataset, one per epoch, joined end to end: batches of (epoch, index) keys.

    Optimizer step s consumes positions [s*E, (s+1)*E) of the stream, E = batch_size * accum_steps *
    world_size. Its micro-batch a on rank r is the slice of `batch_size` positions from s*E + (a*world_size +
    r)*batch_size. So a position is a function of the step alone, ranks and accumulation split the same
    samples, no remainder is dropped and each image is seen exactly once per epoch. Iterating yields the
    batches of steps start_step ... end_step - 1.

    Raises UsageError when one step would need more images than there are.
    """

    def __init__(
        self,
        length: int,
        seed: int,
        batch_size: int,
        *,
        end_step: int,
        start_step: int = 0,
        accum_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.length, self.seed, self.batch_size = length, seed, batch_size
        self.start_step, self.end_step, self.accum_steps = start_step, end_step, accum_steps
        self.rank, self.world_size = rank, world_size
        self.effective_batch = batch_size * accum_steps * world_size
        if self.effective_batch > length:
            raise UsageError(
                f"the effective batch of {self.effective_batch} ({batch_size} per process x {accum_steps} "
                f"accumulated x {world_size} processes) is larger than the dataset of {length} images; "
                "lower the batch size"
            )

    def __len__(self) -> int:
        return max(0, self.end_step - self.start_step) * self.accum_steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        drawn, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.start_step, self.end_step):
            for micro in range(self.accum_steps):
                slot = micro * self.world_size + self.rank
                first = step * self.effective_batch + slot * self.batch_size
                keys = []
                for position in range(first, first + self.batch_size):
                    epoch, place = divmod(position, self.length)
                    if epoch != drawn:
                        rng = np.random.default_rng([self.seed, epoch])
                        drawn, order = epoch, rng.permutation(self.length)
                    keys.append((epoch, int(order[place])))
                yield keys


def make_loader(
    dataset: KeyedImages,
    stream: SampleStream,
    workers: int = 0,
    prefetch_factor: int = 2,
    pin_memory: bool = False,
) -> DataLoader:
    """Batches of the dataset's items, e.g. {"image": float32 (B, C, H, W), "mask": bool (B, gh, gw), "index": (B,),
    "bad": list[str]}.

    The batches do not depend on `workers`; 0 loads in the calling process. Each worker keeps
    `prefetch_factor` batches ready. Iterate once, for the whole run: a second iterator starts the stream
    again. A batch that does not come raises what fcmae/train/lost.py puts into words.
    """
    return PatientLoader(
        dataset,
        batch_sampler=stream,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor if workers else None,
        persistent_workers=workers > 0,
        # Without its own generator the loader would draw from the global one, which a resumed run restores.
        generator=torch.Generator(),
    )


class PatientLoader(DataLoader):
    """A DataLoader whose processes are killed when no batch comes for `PATIENCE` seconds: its own `timeout` does not
    end the wait for a process that stops between announcing a batch and handing its memory over.

    One that dies is told by the `next` that waits for its batch. torch's signal handler tells wherever the program is:
    in a destructor, where it is printed and forgotten, or in the middle of a word with another process, which prints.

    When one that is forked does not begin, all are killed and forked again. `worker_init_fn` is its own.
    """

    processes: tuple = ()

    def __iter__(self) -> Iterator:
        if not self.num_workers:
            return super().__iter__()
        context = self.multiprocessing_context or multiprocessing.get_context()
        for seconds in BEGINNING:
            # Others than forked ones copy nothing, and take as long as Python and torch take to be imported.
            begun = context.Semaphore(0) if context.get_start_method() == "fork" else None
            self.worker_init_fn = partial(start_worker, begun)
            others = multiprocessing.active_children()
            with _child_ended(None):  # torch's handler goes with it
                batches = super().__iter__()
            new = tuple(process for process in multiprocessing.active_children() if process not in others)
            if begun is None or _all_begin(new, begun, seconds):
                self.processes = new or self.processes  # those that persist are begun by the first iterator alone
                return _patiently(batches, self.processes)
            print(f"warning: a loader process did not begin in {seconds} s; all are forked again", file=sys.stderr)
            self._iterator = None  # where torch keeps one whose processes persist
            del batches  # its threads end before the next fork
        raise RuntimeError(
            f"DataLoader workers did not begin, forked {len(BEGINNING)} times in {sum(BEGINNING)} seconds"
        )


def _all_begin(processes: tuple, begun: Semaphore, seconds: float) -> bool:
    """False, and they are ended, when one of these does not come to run. One that ended itself is told by `next`."""
    left, latest = len(processes), time.monotonic() + seconds
    try:
        while left and not any(process.exitcode is not None for process in processes):
            if begun.acquire(timeout=0.5):
                left -= 1
            elif time.monotonic() > latest:
                end_workers(processes)
                return False
    except BaseException:  # Ctrl-C: Python's own end of a program would wait for one that hangs
        end_workers(processes)
        raise
    return True


def _patiently(batches: Iterator, processes: tuple) -> Iterator:
    count, asking = 0, False
    ended, hung, in_vain = threading.Event(), threading.Event(), threading.Event()

    def death() -> RuntimeError | None:
        dead = [process.pid for process in processes if process.exitcode]  # 0: at the stream's end
        return RuntimeError(f"DataLoader worker (pid {dead[0]}) exited unexpectedly") if dead else None

    def look(*_) -> None:
        if in_vain.is_set():
            raise death()

    def watch() -> None:
        number, late = 0, 0
        while not ended.wait(1):  # seconds of this process: while it is stopped none pass
            number, late = (number, late + 1) if asking and number == count else (count, 0)
            if late > PATIENCE:
                hung.set()
                for process in processes:
                    process.kill()
                    if ended.wait(10):  # told by the first that dies; one that waits for a disk does not
                        return
            elif late > CERTAIN and death() and hasattr(signal, "pthread_kill"):
                in_vain.set()
                signal.pthread_kill(threading.main_thread().ident, signal.SIGCHLD)

    threading.Thread(target=watch, daemon=True).start()
    try:
        while True:
            count, asking = count + 1, True
            try:
                with _child_ended(look):
                    batch = next(batches)
            except StopIteration:
                return
            except Exception as error:
                if hung.is_set():
                    end_workers()
                    raise RuntimeError(f"DataLoader timed out after {PATIENCE} seconds") from error
                if isinstance(error, (OSError, EOFError)):
                    time.sleep(1)  # of one that dies the line is closed first
                    if told := death():
                        raise told from error
                raise
            asking = False
            yield batch
    finally:
        ended.set()


@contextlib.contextmanager
def _child_ended(handler: Callable | None) -> Iterator[None]:
    """Call the handler when a child of this process ends, meanwhile and in the main thread alone; None: as it is."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    if handler is not None:
        signal.signal(signal.SIGCHLD, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def end_workers(processes: Iterable | None = None) -> None:
    """Kill these loader processes, or all that are left, and wait for their ends."""
    for process in multiprocessing.active_children() if processes is None else processes:
        process.kill()
        process.join(10)  # one that waits for a disk does not end


def collate(items: list[dict]) -> dict[str, Tensor | list[str]]:
    """Stack the items of `KeyedImages` into one batch; "bad" becomes one flat list."""
    batch = {name: default_collate([item[name] for item in items]) for name in items[0] if name != "bad"}
    batch["bad"] = [line for item in items for line in item["bad"]]
    return batch


def start_worker(begun: Semaphore | None, worker: int) -> None:
    """Leave it to the parent when to stop: Ctrl-C, SLURM and submitit signal every process of a job, but the
    parent still needs the batches to finish its step and save, and its handlers must not run in a worker. A parent
    that was killed is not a worker's fault: the line that breaks in the middle of a word with it is not told.
    begun: raised when that is done."""
    try:
        torch.set_num_threads(1)
        for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
        if hasattr(signal, "sigtimedwait"):  # Linux; elsewhere SIGTERM keeps its default
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            # Under the forkserver start method, the process that starts a worker is not the one that owns it.
            owners = {os.getppid(), multiprocessing.parent_process().pid}
            threading.Thread(target=_obey_owners, args=(os.getppid(), owners), daemon=True).start()
            sys.excepthook = _told_to_owners  # Python's own thread that hands over memory tells its exceptions there
    finally:  # what is raised here comes with the first batch
        if begun is not None:
            begun.release()


def _told_to_owners(kind: type, error: BaseException, trace: TracebackType | None) -> None:
    if isinstance(error, (ConnectionError, EOFError)):
        time.sleep(3)  # of a parent that dies the lines are closed first; then _obey_owners ends this process
    sys.__excepthook__(kind, error, trace)


def _obey_owners(parent: int, owners: set[int]) -> None:
    """Exit when the parent is gone or an owner sends SIGTERM, as DataLoader does to a worker that hangs."""
    while os.getppid() == parent:
        sent = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if sent and sent.si_pid in owners:
            break
    os._exit(0)
