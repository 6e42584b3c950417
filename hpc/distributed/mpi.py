"""The MPI communicator, or its one-rank stand-in where no MPI launched us.

mpi4py is imported only under an MPI launcher. Under a launcher of another MPI it silently becomes
many worlds of size one that all write the same file: sizes are compared, and a mismatch stops."""

from __future__ import annotations

import fcntl
import math
import os
import stat
import sys
import termios
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from hpc.cli import USER_ERROR_EXIT_CODE, UserError, one_line

T = TypeVar("T")
# Open MPI; MPICH, Intel MPI and Slurm's pmi2; MVAPICH
_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
# Bytes of a message: still in the cache when its rows are put in their places, and far below the
# 2^31 numbers at which MPI's own counts end
_MESSAGE = 2**21


class World:
    """The ranks that work together. Without a communicator: rank 0 of 1."""

    def __init__(self, communicator: Any = None) -> None:
        self._communicator = communicator
        self.rank: int = communicator.Get_rank() if communicator else 0
        self.size: int = communicator.Get_size() if communicator else 1

    def bcast(self, value: T) -> T:
        """Rank 0's value on every rank; what the others pass is ignored."""
        return self._communicator.bcast(value, root=0) if self._communicator else value

    def gather(self, value: T) -> list[T] | None:
        """On rank 0 every rank's value, in order of ranks; None elsewhere."""
        return self._communicator.gather(value, root=0) if self._communicator else [value]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self._communicator:
            self._communicator.Barrier()

    def rows_to_root(self, arrays: Iterable[NDArray[np.int64]], places: NDArray[np.intp]) -> None:
        """Put the rows of all ranks into rank 0's arrays, which have its own already. On the others
        arrays begin with those rows that belong in the `places` of rank 0's. The arrays of ranks,
        as many on each, have equally long rows. No two ranks may have the same place."""
        of_ranks = self.gather(places)
        assert of_ranks is None or len(found := np.concatenate(of_ranks)) == len(np.unique(found))
        for array in arrays:
            assert array.dtype == np.int64 and array.flags.c_contiguous
            most = max(1, _MESSAGE // (array.itemsize * math.prod(array.shape[1:])))
            if of_ranks is None:
                for at in range(0, len(places), most):
                    self._communicator.Send(array[at : min(at + most, len(places))], dest=0)
                continue
            received = np.empty((most, *array.shape[1:]), np.int64)
            for source, theirs in enumerate(of_ranks[1:], start=1):
                for at in range(0, len(theirs), most):
                    piece = received[: len(theirs) - at]
                    self._communicator.Recv(piece, source=source)
                    array[theirs[at : at + most]] = piece

    @contextmanager
    def abort_on_error(self) -> Iterator[None]:
        """An error in the block ends all ranks: the others would wait for this one for ever.

        It is printed here, one line for a `UserError`, since nothing runs after the abort. With
        one rank it is passed on."""
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            if self.size == 1:
                raise
            self._abort(error)

    def _abort(self, error: BaseException) -> None:
        if isinstance(error, UserError):
            sys.stderr.write(f"error: {one_line(str(error))}\n")
        else:
            print(f"rank {self.rank} of {self.size} failed:", file=sys.stderr)
            traceback.print_exception(error)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            _await_reader(stream)
        self._communicator.Abort(USER_ERROR_EXIT_CODE if isinstance(error, UserError) else 1)


def _await_reader(stream: TextIO, seconds: float = 2.0) -> None:
    # on an abort mpiexec drops what it has not read yet, and the message with it
    end = time.monotonic() + seconds
    while _unread(stream) and time.monotonic() < end:
        time.sleep(0.01)


def _unread(stream: TextIO) -> int:
    """Bytes that wait in the pipe behind `stream`; 0 if it is no pipe."""
    try:
        descriptor = stream.fileno()
        if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            return 0
        answer = fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4))
    except (OSError, ValueError):
        return 0
    return int.from_bytes(answer, sys.byteorder)


def world(environ: Mapping[str, str] | None = None) -> World:
    """The ranks that the launcher started, or one rank where there was no MPI launcher.

    Raises `UserError` where MPI does not see the ranks that the launcher announced."""
    environ = os.environ if environ is None else environ
    size = launched_size(environ)
    if size is None:
        _refuse_tasks_without_mpi(environ)
        return World()
    if size == 1:
        return World()
    return _checked_world(size, environ)


def launched_size(environ: Mapping[str, str]) -> int | None:
    """How many ranks the launcher announced; None where no MPI launcher is in play."""
    for name in _SIZE_VARIABLES:
        if environ.get(name, "").isdigit():
            return int(environ[name])
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "")
    if tasks.isdigit() and _slurm_speaks_mpi(environ):
        return int(tasks)
    return None


def _slurm_speaks_mpi(environ: Mapping[str, str]) -> bool:
    # srun tells every task its plugin, "none" among them; PMIx and PMI name the rank as well
    plugin = environ.get("SLURM_MPI_TYPE", "none")
    return plugin != "none" or "PMIX_RANK" in environ or "PMI_RANK" in environ


def _refuse_tasks_without_mpi(environ: Mapping[str, str]) -> None:
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "")
    if tasks.isdigit() and int(tasks) > 1:
        raise UserError(
            f"srun started {tasks} tasks without MPI: each would do the whole work; use "
            "`srun --mpi=pmix` (or pmi2: what your MPI was built for), or `srun -n 1`"
        )


def _checked_world(size: int, environ: Mapping[str, str]) -> World:
    try:
        import mpi4py

        # a library that meets a launcher it does not know may end the process where it starts
        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"{size} ranks were launched, but mpi4py does not load ({error}); load the site's MPI "
            "module or install the `mpich` wheel, or start a single process"
        ) from error
    if _cannot_speak(MPI, environ):
        raise _mismatch(size, "in PMIx, which this MPI does not speak", MPI)
    with warnings.catch_warnings(action="ignore"):  # of what is compared here
        if not MPI.Is_initialized():
            MPI.Init_thread()
    found = World(MPI.COMM_WORLD)
    if found.size != size:
        raise _mismatch(size, f"but MPI sees {found.size}", MPI)
    return found


def _cannot_speak(library: Any, environ: Mapping[str, str]) -> bool:
    """Whether the launcher speaks PMIx alone, as Open MPI's and `srun --mpi=pmix` do, and this is
    an MPICH that was built without it."""
    pmix_alone = "PMIX_RANK" in environ and "PMI_RANK" not in environ
    is_mpich = library.get_vendor()[0] == "MPICH"
    return pmix_alone and is_mpich and "pmix" not in library.Get_library_version().lower()


def _mismatch(size: int, what: str, library: Any) -> UserError:
    name, version = library.get_vendor()
    return UserError(
        f"the launcher announced {size} ranks, {what} ({name} {'.'.join(map(str, version))}): "
        "launcher and mpi4py belong to different MPIs; use the mpiexec of the MPI that mpi4py was "
        "built for, or `srun --mpi=pmix` or `--mpi=pmi2`, or a single process"
    )
