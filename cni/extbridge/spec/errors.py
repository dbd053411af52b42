"""Every error that a CNI runtime can be told, as one tree.

A code below 100 is the CNI specification's own (SPEC 1.1.0, section 2, "Error"); from 100 on they
are ours. The message says what is wrong with what was given; the hint says what to do about it and
travels as the specification's `details`, which end with the error's place on the page
docs/errors.md. That page is made of the docstrings and remedies here (tools/docs.py).
"""

from __future__ import annotations

import re
from typing import ClassVar


class CniError(Exception):
    """An answer to the runtime: never raised itself, only its kinds."""

    code: ClassVar[int]
    remedy: ClassVar[str]
    """What to do about any of this kind; the hint knows more of the one at hand."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.details()}"

    @classmethod
    def anchor(cls) -> str:
        """The kind's place on the page: MacInUse is at mac-in-use."""
        return re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()

    def details(self, request_id: str = "") -> str:
        """The hint, where the page says more, and under which ID the agent's log does."""
        request = f", request {request_id}" if request_id else ""
        return f"{self.hint} (errors.md#{self.anchor()}{request})".lstrip()

    def to_json(self, cni_version: str, request_id: str = "") -> dict[str, object]:
        """The error object of SPEC section 2, "Error", for the version the request asked for."""
        return {
            "cniVersion": cni_version,
            "code": self.code,
            "msg": self.message,
            "details": self.details(request_id),
        }


class IncompatibleVersion(CniError):
    """The asked cniVersion does not know this verb, or cannot express its result."""

    code = 1
    remedy = (
        "Give the configuration a cniVersion that the details name: GC and STATUS came with 1.1.0, "
        "CHECK with 0.4.0, and before 0.3.0 no NIC was without addresses."
    )


class UnsupportedField(CniError):
    """A field is understood, but not in this combination."""

    code = 2
    remedy = "Leave out what the message names, or ask for it where the details say."


class UnknownContainer(CniError):
    """The container, or the attachment it should have, does not exist."""

    code = 3
    remedy = (
        "If the pod is to live on, delete it and let it be created again: ADD makes what is "
        "missing. A launcher is told so in a pod without a NIC of ours: look at the pod's "
        "annotation or its network, and whether ADD has succeeded."
    )


class InvalidEnvironment(CniError):
    """A CNI_* environment variable is missing or malformed."""

    code = 4
    remedy = (
        "A container runtime gives these variables; by hand, give those that the message names. "
        "CNI_NETNS has to be a pod's namespace, which may have ended meanwhile."
    )


class IoFailure(CniError):
    """A file of ours could not be read or written."""

    code = 5
    remedy = (
        "Look at the file or folder that the message names: room, permissions, a file system that "
        "is read-only. The run folder is /run/extbridge, or what EXTBRIDGE_RUN names."
    )


class DecodeFailure(CniError):
    """Standard input is not the JSON object it has to be."""

    code = 6
    remedy = (
        "The configuration is one JSON object of at most 1 MiB; `python3 -m json.tool FILE` shows "
        "where it is none."
    )


class InvalidNetworkConfig(CniError):
    """The network's definition is wrong: a key, a value, or a NIC that cannot carry it."""

    code = 7
    remedy = (
        "The message names the key, what was given and what is allowed: mend the network's "
        "definition, the configuration, or the pod's annotation that asks for it."
    )


class TryAgainLater(CniError):
    """A passing condition; the runtime should send the same request again."""

    code = 11
    remedy = (
        "Nothing, as a rule: kubelet asks again. If it lasts, the message says what is waited for: "
        "a NIC that is down (`ip link set NIC up`), or an agent that starts or stops."
    )


class OutOfReach(TryAgainLater):
    """The attachment's namespace lives, but cannot be reached at its path."""

    remedy = (
        "End the process that still stands in the pod's namespace, or let the agent see the "
        "namespace's path; the next GC, or the agent's next start, frees the NIC."
    )


class PluginNotAvailable(CniError):
    """STATUS: no ADD can succeed on this node now."""

    code = 50
    remedy = (
        "No new pod can get this network on this node until the message's reason has gone. Running "
        "VMs are not touched."
    )


class LimitedConnectivity(CniError):
    """STATUS: attachments made now would have no carrier."""

    code = 51
    remedy = (
        "Look at cable, switch port and `ip link show NIC`. Pods get their NICs all the same, "
        "without a network behind them."
    )


class InternalError(CniError):
    """A defect of extbridge itself; the traceback is on standard error."""

    code = 100
    remedy = "Report it, with the traceback that is on standard error or in the agent's log."


class NotPermitted(CniError):
    """The caller lacks a privilege that the verb needs."""

    code = 101
    remedy = (
        "Run it as root with all capabilities; an agent in a container is privileged and has "
        "hostPID. A launcher has to run in a pod with a network namespace of its own, of at most "
        "256 macvtaps."
    )


class KernelRefused(CniError):
    """A system call failed for a reason that no other kind names."""

    code = 102
    remedy = (
        "The message names the call and the object, and the words are the kernel's. Mostly a "
        "module is missing (macvtap, nf_tables, sch_tbf, ifb), or the object has gone meanwhile."
    )


class NameTaken(CniError):
    """The interface name is in use in the pod's namespace."""

    code = 103
    remedy = (
        "Ask for another interface name, or delete the attachment that has it (DEL); `ip link` in "
        "the pod's namespace shows who has it."
    )


class MacInUse(CniError):
    """The MAC is in use on this NIC."""

    code = 104
    remedy = (
        "Give the VM another MAC, or take that one from who has it. Two networks on one NIC derive "
        "different MACs for one VM; a fixed `mac` in a network is for one VM only."
    )


class NicBusy(CniError):
    """passthru needs the whole NIC, and somebody else is on it (or has it whole)."""

    code = 105
    remedy = (
        "Free the NIC, or give the network another: a passthru NIC carries one macvtap, and a port "
        "of a bridge or bond none."
    )


class AttachmentDiffers(CniError):
    """CHECK: the attachment is not what ADD made."""

    code = 106
    remedy = (
        "Somebody has changed the NIC since ADD: the message says what was made and what is found. "
        "Delete the pod and let it be created again."
    )


class WrongTap(CniError):
    """The device node answered for another NIC; its fd was closed, not handed on."""

    code = 107
    remedy = "Nothing was handed over. Report it; then delete the pod and let it be created again."


class TapHeld(CniError):
    """Another living process has the tap."""

    code = 108
    remedy = (
        "End the process that the message names, or wait for it to end: one process at a time has "
        "a VM's tap."
    )


class IpamFailure(CniError):
    """The delegated IPAM plugin refused, failed, or answered what cannot be understood."""

    code = 109
    remedy = (
        "The words are the IPAM plugin's: addresses that are used up, a daemon that does not run, "
        "a configuration that it does not like. Its own documentation knows more."
    )


class QemuRefused(CniError):
    """Hot-plug: QEMU, or the guest in it, did not do what it was asked."""

    code = 110
    remedy = (
        "The words are QEMU's: mostly, no root port is free for one more device. Or a guest does "
        "not let go of a NIC that it uses: end that in the guest, then detach."
    )
