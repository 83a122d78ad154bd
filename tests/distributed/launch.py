"""Starts ranks as processes on this machine; each calls one function of a test module.

What torchrun does, without its agent (two seconds of imports): free port, environment, processes. A rank that
fails fails the launch with its stack trace; the others are ended.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from trainer_node.ranks import ranks_of_environment


def launch(work: Callable[..., None], *arguments: Any, ranks: int) -> None:
    """`work(*arguments)` in each; a function of a module, since it is found by name."""
    job = (ranks, free_port(), work, arguments)
    multiprocessing.start_processes(_enter, job, nprocs=ranks, start_method="spawn")


def launch_joined(work: Callable[..., None], *arguments: Any, ranks: int) -> None:
    """`work(ranks, *arguments)` in each, which have found each other already."""
    launch(_join, work, arguments, ranks=ranks)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _enter(rank: int, size: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    work(*arguments)
    # The work is done, its files are closed. On its way out of the interpreter a rank was once aborted by a
    # thread of torch's ("terminate called without an active exception"; docs/lab-log.md, 2026-11-22).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _join(work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    with ranks_of_environment("ddp", on_gpu=False) as ranks:
        work(ranks, *arguments)
