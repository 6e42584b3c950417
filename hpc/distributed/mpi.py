"""Join the MPI ranks of this program, or run as one rank without MPI.

mpi4py is imported only under an MPI launcher. If launcher and mpi4py belong to different MPIs,
every rank silently sees a world of size 1. The sizes are compared, so that a mismatch is an error.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from hpc.cli import UserError, flush_output, report_error
from hpc.distributed.launcher import announced_mpi_size, speaks_only_pmix, srun_tasks

T = TypeVar("T")
# Bytes of a message: small enough for the cache, and far below MPI's limit of 2^31 elements
_MESSAGE_BYTES = 2**21


class World:
    """The ranks of an MPI communicator; without one, rank 0 of 1."""

    def __init__(self, communicator: Any = None) -> None:
        self._communicator = communicator
        self.rank: int = communicator.Get_rank() if communicator else 0
        self.size: int = communicator.Get_size() if communicator else 1

    def bcast(self, value: T) -> T:
        """Return rank 0's `value` on every rank. The other ranks' values are ignored."""
        return self._communicator.bcast(value, root=0) if self._communicator else value

    def gather(self, value: T) -> list[T] | None:
        """Return the values of all ranks, in rank order, on rank 0; None on the others."""
        return self._communicator.gather(value, root=0) if self._communicator else [value]

    def barrier(self) -> None:
        """Block until every rank has called this."""
        if self._communicator:
            self._communicator.Barrier()

    def rows_to_root(self, arrays: Iterable[NDArray[np.int64]], rows: NDArray[np.intp]) -> None:
        """Copy the rows of all ranks into rank 0's arrays.

        Args:
            arrays: int64, C-contiguous, the same number on each rank, with rows of equal shape.
                Rank 0's arrays have space for all rows and already hold its own. Another rank's
                arrays begin with the `len(rows)` rows that it sends.
            rows: the numbers of this rank's rows in rank 0's arrays. Distinct over all ranks.
        """
        of_ranks = self.gather(rows)
        assert of_ranks is None or len(found := np.concatenate(of_ranks)) == len(np.unique(found))
        for array in arrays:
            assert array.dtype == np.int64 and array.flags.c_contiguous
            most = max(1, _MESSAGE_BYTES // (array.itemsize * math.prod(array.shape[1:])))
            if of_ranks is None:
                for at in range(0, len(rows), most):
                    self._communicator.Send(array[at : min(at + most, len(rows))], dest=0)
                continue
            received = np.empty((most, *array.shape[1:]), np.int64)
            for source, theirs in enumerate(of_ranks[1:], start=1):
                for at in range(0, len(theirs), most):
                    piece = received[: len(theirs) - at]
                    self._communicator.Recv(piece, source=source)
                    array[theirs[at : at + most]] = piece

    @contextmanager
    def abort_on_error(self) -> Iterator[None]:
        """End all ranks if the block raises: the others would wait for this one forever.

        The error is printed here, since nothing runs after the abort: as one line for a
        `UserError`, else with its traceback. With one rank it is raised as usual.
        """
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            if self.size == 1:
                raise
            self._abort(error)

    def _abort(self, error: BaseException) -> None:
        code = report_error(error, rank=f"rank {self.rank} of {self.size}")
        flush_output()
        self._communicator.Abort(code)


def world(environ: Mapping[str, str] = os.environ) -> World:
    """Return the ranks that the launcher started, or one rank without an MPI launcher.

    Raises:
        UserError: MPI sees another number of ranks than the launcher announced.
    """
    size = announced_mpi_size(environ)
    if size is None:
        _refuse_tasks_without_mpi(environ)
        return World()
    if size == 1:
        return World()
    return _checked_world(size, environ)


def _refuse_tasks_without_mpi(environ: Mapping[str, str]) -> None:
    if (tasks := srun_tasks(environ) or 1) > 1:
        raise UserError(
            f"srun started {tasks} tasks without MPI: each would do the whole work; use "
            "`srun --mpi=pmix` (or pmi2: what your MPI was built for), or `srun -n 1`"
        )


def _checked_world(size: int, environ: Mapping[str, str]) -> World:
    try:
        import mpi4py

        # an MPI library may end the process at its start if it does not know the launcher
        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"{size} ranks were launched, but mpi4py does not load ({error}); load the site's MPI "
            "module or install the `mpich` wheel, or start a single process"
        ) from error
    if speaks_only_pmix(environ) and _is_mpich_without_pmix(MPI):
        raise _mismatch(size, "in PMIx, which this MPI does not speak", MPI)
    with warnings.catch_warnings(action="ignore"):  # mpi4py warns of the mismatch checked below
        if not MPI.Is_initialized():
            MPI.Init_thread()
    found = World(MPI.COMM_WORLD)
    if found.size != size:
        raise _mismatch(size, f"but MPI sees {found.size}", MPI)
    return found


def _is_mpich_without_pmix(library: Any) -> bool:
    is_mpich = library.get_vendor()[0] == "MPICH"
    return is_mpich and "pmix" not in library.Get_library_version().lower()


def _mismatch(size: int, what: str, library: Any) -> UserError:
    name, version = library.get_vendor()
    return UserError(
        f"the launcher announced {size} ranks, {what} ({name} {'.'.join(map(str, version))}): "
        "launcher and mpi4py belong to different MPIs; use the mpiexec of the MPI that mpi4py was "
        "built for, or `srun --mpi=pmix` or `--mpi=pmi2`, or a single process"
    )
