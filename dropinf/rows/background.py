"""A thread that runs calls in order, so that the one who gives them need not wait."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable


class Background:
    """Runs calls one after the other, in a thread that starts with the first.

    An error of a call ends them: those behind it are not run, and `give` and `check` raise it from
    then on. A process that was forked off has no such thread, and must not go on with it.
    """

    def __init__(self, most_bytes: int) -> None:
        """Calls that wait hold so many bytes at most, or are one."""
        self._most_bytes = most_bytes
        self._pid = os.getpid()
        self._calls: deque[tuple[Callable[[], None], int]] = deque()  # the first one may be running
        self._num_bytes = 0
        self._lock = threading.RLock()  # entered without a step of Python: no interrupt leaves it
        self._changed = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._ended = False

    def give(self, call: Callable[[], None], num_bytes: int) -> None:
        """Have a call run, behind those before; waits while these hold too many bytes.

        Raises:
            Exception: that of a call before.
        """
        self._check_process()
        if self._thread is None:  # before there is a call, which an interrupt would leave to nobody
            # A daemon, so that a process which never closed this can end.
            threading.Thread(target=self._run, name="dropinf rows", daemon=True).start()
        self.wait(lambda: not self._calls or self._num_bytes + num_bytes <= self._most_bytes)
        with self._lock:
            self.check()
            if self._ended:
                raise RuntimeError("these rows are written to their end; nothing follows them")
            self._calls.append((call, num_bytes))
            self._num_bytes += num_bytes
            self._changed.notify_all()

    def wait(self, enough: Callable[[], bool] = lambda: False) -> None:
        """Till all calls have run, one has failed, no more will run, or it is `enough`."""
        self._check_process()
        with self._lock:
            self._changed.wait_for(lambda: not self._calls or self._ended or enough())

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError(f"rows are written by process {self._pid}, not by one forked off")

    def check(self) -> None:
        """Raise the error of the call that failed, if one did."""
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """Run no more; the call that is running comes to its end."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._ended = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        with self._lock:
            if self._thread is not None or self._ended:
                return  # there is one
            self._thread = threading.current_thread()
        while True:
            with self._lock:
                self._changed.wait_for(lambda: self._calls or self._ended)
                if self._ended:
                    return
                call, num_bytes = self._calls[0]
            try:
                call()
            except BaseException as error:
                self._error = error
            with self._lock:
                if self._error is not None:
                    self._calls.clear()
                    self._ended = True
                else:
                    self._calls.popleft()
                    self._num_bytes -= num_bytes
                call = None  # and with it the rows
                self._changed.notify_all()
