"""Keep the pod's own IP stack off the VM's NIC (promise 3).

While no tap is open, a macvtap hands its frames to the IP stack of its namespace (tap_handle_frame
finds no queue and lets them pass), and that stack may send through it at any time. Three things
stop it, none of which touches the frames of an open tap:

- NOARP, given when the link is made, for ARP in both directions;
- `disable_ipv6`, before the link is UP, so that no address, neighbour discovery or MLD begins, and
  `addr_gen_mode` none, so that there is still no address where the runtime writes 0 to that setting
  of all links, as some do after ADD;
- an nftables table that drops what the stack would hear (prerouting) or speak (postrouting). It
  also covers IPv4 broadcasts from 0.0.0.0 and SO_BINDTODEVICE, which needs no privilege.

The rules name the ifindex, which is unique on the node and never used again, so that neither a
rename nor a later link of the same name changes what they mean.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from extbridge.kernel import nftables
from extbridge.kernel.antispoof import Guard, guard_table
from extbridge.kernel.links import list_links
from extbridge.kernel.mounts import detached_mount
from extbridge.kernel.netlink import NETLINK_NETFILTER, Netlink
from extbridge.kernel.nftables import (
    INET,
    INET_POSTROUTING,
    INET_PREROUTING,
    Chain,
    Hook,
    Table,
    drop,
    equal,
    load_meta,
    rule,
    table_name,
)

# linux/netfilter/nf_tables.h, enum nft_meta_keys.
_META_IIF = 4
_META_OIF = 5

# linux/if_link.h, enum in6_addr_gen_mode.
_IN6_ADDR_GEN_MODE_NONE = 1

# Before connection tracking, defragmentation and every other rule (NF_IP_PRI_FIRST is the least).
_PRIORITY = -500


def silence(ifindex: int, name: str, guard: Guard | None = None) -> None:
    """Silence the link, which is still DOWN and NOARP; the thread stands in its namespace.

    With a `guard` the guest's frames are held to it, in the same transaction.
    """
    # A link with less than IPv6's smallest MTU has none of these (addrconf_notify).
    with suppress(FileNotFoundError):
        _set_ipv6(name, {"disable_ipv6": 1, "addr_gen_mode": _IN6_ADDR_GEN_MODE_NONE})
    guarded = () if guard is None else (guard_table(ifindex, name, guard),)
    nftables.add_tables(_silence_table(ifindex), *guarded)


def disable_ipv6() -> None:
    """Links that are made in the thread's namespace from now on have no IPv6."""
    with suppress(FileNotFoundError):
        _set_ipv6("default", {"disable_ipv6": 1})


def unsilence_absent(route: Netlink) -> None:
    """Remove the rules whose link is gone, those of a guard too.

    After the link, not before: a link that is UP and not silenced would be heard until it has gone.
    On a kernel without nf_tables there are none, and DEL works. The thread stands in the namespace
    of `route`.
    """
    try:
        netfilter = Netlink(NETLINK_NETFILTER)
    except OSError as error:
        if error.errno != errno.EPROTONOSUPPORT:
            raise
        return
    try:
        # In this order: a link that an ADD has just made is there before its rules are.
        ours = {
            (family, name): ifindex
            for family, name in nftables.list_tables(netfilter)
            if (ifindex := nftables.ifindex_of(name)) is not None
        }
        present = {link.ifindex for link in list_links(route)} if ours else set()
        absent = [table for table, ifindex in ours.items() if ifindex not in present]
        nftables.delete_tables(netfilter, absent)
    finally:
        # To close it is to wait for the RCU grace period after which the kernel frees the table
        # (nft_rcv_nl_event), 10 ms for which nobody else has to wait.
        threading.Thread(target=netfilter.close, name="netfilter close").start()


def unsilenced_by(ifindex: int, name: str) -> str:
    """What of the silence is missing, in words; empty when it is whole.

    NOARP and addresses are the link's, see links; the thread stands in the namespace.
    """
    with suppress(FileNotFoundError):
        if Path("/proc", _ipv6_settings(name), "disable_ipv6").read_bytes().strip() != b"1":
            return f"IPv6 is enabled on {name}"
    table = _silence_table(ifindex)
    # A rule of somebody else before ours could accept.
    for chain in nftables.changed_chains(table):
        return f"nftables table inet {table.name}, chain {chain}, does not drop"
    return ""


def _silence_table(ifindex: int) -> Table:
    index = equal(struct.pack("=I", ifindex))
    hears = rule(load_meta(_META_IIF), index, drop())
    speaks = rule(load_meta(_META_OIF), index, drop())
    return Table(
        INET,
        table_name(ifindex),
        (
            Chain("hears", (hears,), Hook(INET_PREROUTING, _PRIORITY)),
            Chain("speaks", (speaks,), Hook(INET_POSTROUTING, _PRIORITY)),
        ),
    )


def _ipv6_settings(name: str) -> str:
    # proc_sys_lookup answers for the namespace of the thread that opens.
    return f"sys/net/ipv6/conf/{name}"


def _set_ipv6(name: str, settings: Mapping[str, int]) -> None:
    # A procfs of its own, which knows no other namespace: in that of /proc the `ipv6` of all have
    # one place in the kernel's cache (proc_sys_compare), and with a thousand pods to find the right
    # one takes a millisecond.
    proc = detached_mount("proc")
    try:
        for key, value in settings.items():
            path = f"{_ipv6_settings(name)}/{key}"
            setting = os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc)
            try:
                os.write(setting, b"%d" % value)
            finally:
                os.close(setting)
    finally:
        os.close(proc)
