"""How a long-running node learns that it should end: a signal, or the end of its parent process.

    stop = threading.Event()
    stop_on_signals(stop)              SIGTERM, SIGINT; a second SIGINT interrupts at once
    stop_when_parent_goes(stop)        --stop-with-parent: the parent holds our stdin open

Only sets the event; what follows is the node's affair. Both start a daemon thread.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading


def stop_when_parent_goes(stop: threading.Event, *, descriptor: int = 0) -> None:
    """Set `stop` when `descriptor` (stdin) reaches its end; what is written there is ignored."""

    def read_to_end() -> None:
        try:
            while os.read(descriptor, 4096):
                pass
        except OSError:  # closed: nobody can hold it any more
            pass
        stop.set()

    threading.Thread(target=read_to_end, name="parent", daemon=True).start()


def stop_on_signals(stop: threading.Event) -> None:
    """Set `stop` on SIGTERM and SIGINT. Call it in the main thread.

    The handler writes to a pipe and a thread sets the event: a handler that set it itself could
    wait for ever for the event's lock, held by the very code that it interrupted.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)  # a storm of signals must not block in the handler

    def on_signal(number: int, _: object) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with contextlib.suppress(BlockingIOError):
            os.write(write_end, b"s")

    def wait_for_signal() -> None:
        while os.read(read_end, 4096):
            stop.set()

    threading.Thread(target=wait_for_signal, name="signals", daemon=True).start()
    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
