"""Every error that a CNI runtime can be told, as one tree.

A code below 100 is the CNI specification's own (SPEC 1.1.0, section 2, "Error"); from 100 on they
are ours. The message says what is wrong with what was given; the hint says what to do about it and
travels as the specification's `details`.
"""

from __future__ import annotations

from typing import ClassVar


class CniError(Exception):
    """An answer to the runtime: never raised itself, only its kinds."""

    code: ClassVar[int]

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message

    def to_json(self, cni_version: str) -> dict[str, object]:
        """The error object of SPEC section 2, "Error", for the version the request asked for."""
        answer: dict[str, object] = {
            "cniVersion": cni_version,
            "code": self.code,
            "msg": self.message,
        }
        if self.hint:
            answer["details"] = self.hint
        return answer


class IncompatibleVersion(CniError):
    """The asked cniVersion does not know this verb, or cannot express its result."""

    code = 1


class UnsupportedField(CniError):
    """A field is understood, but not in this combination."""

    code = 2


class UnknownContainer(CniError):
    """The container, or the attachment it should have, does not exist."""

    code = 3


class InvalidEnvironment(CniError):
    """A CNI_* environment variable is missing or malformed."""

    code = 4


class IoFailure(CniError):
    """A file of ours could not be read or written."""

    code = 5


class DecodeFailure(CniError):
    """Standard input is not the JSON object it has to be."""

    code = 6


class InvalidNetworkConfig(CniError):
    """The network's definition is wrong: a key, a value, or a NIC that cannot carry it."""

    code = 7


class TryAgainLater(CniError):
    """A passing condition; the runtime should send the same request again."""

    code = 11


class OutOfReach(TryAgainLater):
    """The attachment's namespace lives, but cannot be reached at its path."""


class PluginNotAvailable(CniError):
    """STATUS: no ADD can succeed on this node now."""

    code = 50


class LimitedConnectivity(CniError):
    """STATUS: attachments made now would have no carrier."""

    code = 51


class InternalError(CniError):
    """A defect of extbridge itself; the traceback is on standard error."""

    code = 100


class NotPermitted(CniError):
    """The caller lacks a privilege that the verb needs."""

    code = 101


class KernelRefused(CniError):
    """A system call failed for a reason that no other kind names."""

    code = 102


class NameTaken(CniError):
    """The interface name is in use in the pod's namespace."""

    code = 103


class MacInUse(CniError):
    """The MAC is in use on this NIC."""

    code = 104


class NicBusy(CniError):
    """passthru needs the whole NIC, and somebody else is on it (or has it whole)."""

    code = 105


class AttachmentDiffers(CniError):
    """CHECK: the attachment is not what ADD made."""

    code = 106


class WrongTap(CniError):
    """The device node answered for another NIC; its fd was closed, not handed on."""

    code = 107


class TapHeld(CniError):
    """Another living process has the tap."""

    code = 108


class IpamFailure(CniError):
    """The delegated IPAM plugin refused, failed, or answered what cannot be understood."""

    code = 109


class QemuRefused(CniError):
    """Hot-plug: QEMU, or the guest in it, did not do what it was asked."""

    code = 110
