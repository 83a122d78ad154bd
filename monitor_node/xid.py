"""What an Xid, the driver's number for a GPU error, says about the GPU. Pure; reads and decides nothing.

The policy is that of NVIDIA's k8s-device-plugin (#1340) and GKE, as kept in docs: six codes are faults
of an application, 48 and 79 end the GPU's use; all others are suspect until someone has looked them up.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class XidKind(enum.StrEnum):
    APPLICATION = "application"  # a fault of the program: the GPU is sound
    FATAL = "fatal"  # the GPU cannot be trusted before it was reset or replaced
    SUSPECT = "suspect"  # not classified


@dataclass(frozen=True, kw_only=True)
class XidVerdict:
    kind: XidKind
    text: str  # one line for people, with what to do


_APPLICATION = {
    13: "the program raised an exception in the graphics engine",
    31: "the program used an address that is not its own (MMU fault)",
    43: "the GPU stopped working on the program",
    45: "work was cleaned up after an earlier error or a kill",
    68: "the program raised an exception in the video processor",
    109: "a context switch took too long",
}
_FATAL = {
    48: "double-bit memory error that ECC cannot correct; reset the GPU",
    79: "the GPU has fallen off the bus; the machine needs a restart, and a look at power and heat",
}


def judge_xid(code: int) -> XidVerdict:
    if code in _APPLICATION:
        text = f"Xid {code}: {_APPLICATION[code]}; the GPU itself is sound"
        return XidVerdict(kind=XidKind.APPLICATION, text=text)
    if code in _FATAL:
        return XidVerdict(kind=XidKind.FATAL, text=f"Xid {code}: {_FATAL[code]}")
    text = f"Xid {code}: not classified; see NVIDIA's Xid catalogue and the kernel log (dmesg)"
    return XidVerdict(kind=XidKind.SUSPECT, text=text)
