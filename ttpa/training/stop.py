"""Being told to stop: the step in hand is finished, a checkpoint saved, and the run goes on another time."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

STOPPED = 75
"""Exit code of a run that saved a checkpoint because it was told to stop: EX_TEMPFAIL of sysexits.h, so that a script
can tell it from an error and start the same command again."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # the second is what clusters send some time before the end of a job


class StopSignal:
    """A context manager that sets `asked` when SIGTERM or SIGUSR1 comes, and does nothing else about them; processes
    of one run ask each other, `world.any(stop.asked)`, after each step.

    torchrun passes SIGTERM on to its processes, but SIGUSR1 only when it is told to
    (`--signals-to-handle SIGTERM,SIGUSR1,SIGINT,SIGHUP,SIGQUIT`), and its own exit code is then not STOPPED.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
