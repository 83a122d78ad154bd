"""What memory there is to watch on this host: whole GPUs and, where MIG is on, its instances.

Owns the list of leaves and the reading of CUDA_VISIBLE_DEVICES. A leaf is known by its UUID: indices
move when a GPU drops off the bus, and CUDA counts in another order than NVML. Reads no memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from monitor_node.nvml_calls import ask


@dataclass(frozen=True, kw_only=True)
class Leaf:
    uuid: str
    label: str  # for people: "GPU 0 NVIDIA H100", "GPU 0 MIG 1 NVIDIA H100 MIG 1g.10gb"
    gpu_index: int  # NVML's
    gpu_uuid: str
    model: str  # of the whole GPU
    handle: Any
    gpu_handle: Any  # of the whole GPU: only it has temperature, power and events
    is_mig: bool


def list_leaves(nvml: Any) -> list[Leaf]:
    """All that can be read. Raises NVMLError when there is a GPU but none answers."""
    leaves: list[Leaf] = []
    failure: Exception | None = None
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            leaves += _leaves_of_gpu(nvml, index)
        except nvml.NVMLError as error:  # lost: the others can still be watched
            failure = error
    if not leaves and failure is not None:
        raise failure
    return leaves


def _leaves_of_gpu(nvml: Any, index: int) -> list[Leaf]:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    uuid, model = str(nvml.nvmlDeviceGetUUID(handle)), str(nvml.nvmlDeviceGetName(handle))
    gpu = Leaf(
        uuid=uuid, label=f"GPU {index} {model}", gpu_index=index, gpu_uuid=uuid, model=model,
        handle=handle, gpu_handle=handle, is_mig=False,
    )  # fmt: skip
    # Without an instance CUDA can use nothing of it, but its memory can be read.
    return list(_mig_leaves(nvml, gpu)) or [gpu]


def _mig_leaves(nvml: Any, gpu: Leaf) -> Iterator[Leaf]:
    mode = ask(nvml, ("nvmlDeviceGetMigMode",), gpu.handle).value  # (current, pending), or not supported
    if mode is None or mode[0] != nvml.NVML_DEVICE_MIG_ENABLE:
        return
    for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(gpu.handle)):
        handle = ask(nvml, ("nvmlDeviceGetMigDeviceHandleByIndex",), gpu.handle, number).value
        if handle is None:
            continue  # a place without an instance
        name = ask(nvml, ("nvmlDeviceGetName",), handle).value or ""
        yield Leaf(
            uuid=str(nvml.nvmlDeviceGetUUID(handle)),
            label=f"GPU {gpu.gpu_index} MIG {number} {name}".strip(),
            gpu_index=gpu.gpu_index, gpu_uuid=gpu.uuid, model=gpu.model,
            handle=handle, gpu_handle=gpu.handle, is_mig=True,
        )  # fmt: skip


def first_visible(leaves: Sequence[Leaf], environment: Mapping[str, str]) -> Leaf | None:
    """The leaf that a CUDA process with this environment calls device 0; None when it cannot be told.

    Without the variable that is number 0. A number is told only where CUDA's order is sure to be NVML's:
    by CUDA_DEVICE_ORDER=PCI_BUS_ID, or because all GPUs are alike. CUDA's own default is fastest first.
    """
    first = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if first.startswith("GPU-"):  # the beginning is enough, for CUDA too; of a MIG GPU its first instance
        meant = [leaf for leaf in leaves if leaf.gpu_uuid.startswith(first)]
        return meant[0] if len({leaf.gpu_uuid for leaf in meant}) == 1 else None
    if first.startswith("MIG-"):
        meant = [leaf for leaf in leaves if leaf.is_mig and leaf.uuid.startswith(first)]
        return meant[0] if len(meant) == 1 else None
    if not first.isdecimal():
        return None
    in_order = environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    if not in_order and len({leaf.model for leaf in leaves}) > 1:
        return None
    return next((leaf for leaf in leaves if leaf.gpu_index == int(first)), None)
