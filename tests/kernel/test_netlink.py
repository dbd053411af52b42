"""The netlink socket, where no verb of the plugin leads: long dumps, refusals, batches."""

from __future__ import annotations

import errno
import json
import socket
import struct

import pytest

from extbridge.demo.lab import run, within
from extbridge.kernel import netlink
from extbridge.kernel.links import list_links
from extbridge.kernel.netlink import NETLINK_NETFILTER, NETLINK_ROUTE, Netlink, attributes, text
from tests.kernel.observe import tables
from tests.support import require

RTM_NEWLINK = 16
RTM_GETLINK = 18

# linux/netfilter/nfnetlink.h, nf_tables.h: messages of the subsystem nf_tables, 10.
NFNL_BATCH = (0x10, 0x11)
NFT_NEWTABLE, NFT_DELTABLE, NFT_GETTABLE = 0xA00, 0xA02, 0xA01
NFPROTO_INET = 1
NFTA_TABLE_NAME = 1


def test_long_dump_is_read_to_its_end(pod: str) -> None:
    """Every link of a namespace is listed, also where the kernel needs many messages for them."""
    batch = "".join(f"link add br{number} type bridge\n" for number in range(100))
    run("sh", "-c", f"printf '{batch}' | ip -batch -", netns=pod)
    with within(pod), Netlink(NETLINK_ROUTE) as route:
        found = {(link.ifindex, link.name, link.mac) for link in list_links(route)}
    shown = json.loads(run("ip", "-json", "link", netns=pod))
    assert found == {(it["ifindex"], it["ifname"], it["address"]) for it in shown}
    assert len(found) == 101


def test_refusal_is_an_oserror_in_the_kernels_words(pod: str) -> None:
    """What the kernel refuses names the call and the object, and gives the kernel's own reason."""
    no_such_kind = netlink.nested(18, text(1, "no-such-kind"))
    header = struct.pack("=BxHiII", 0, 0, 0, 0, 0)
    with within(pod), Netlink(NETLINK_ROUTE) as route:
        with pytest.raises(
            OSError, match=r"^\[Errno 95\] link x: .*: Unknown device type"
        ) as caught:
            route.request(
                RTM_NEWLINK, header + no_such_kind, flags=netlink.NLM_F_CREATE, what="link x"
            )
        assert caught.value.errno == errno.EOPNOTSUPP
        # A dump is refused at its beginning or its end, here for a header that makes no sense.
        senseless = struct.pack("=BxHiII", 0, 0, 7, 0, 0)
        with pytest.raises(OSError, match="dump: Invalid argument"):
            route.request(RTM_GETLINK, senseless, flags=netlink.NLM_F_DUMP, what="dump")
        # And the socket goes on to serve.
        assert [link.name for link in list_links(route)] == ["lo"]


def test_batch_is_applied_whole_or_not_at_all(pod: str) -> None:
    """A batch of which any part is refused changes nothing, and is not heard of again later."""
    require("nft")
    with within(pod), Netlink(NETLINK_NETFILTER) as netfilter:
        transact(netfilter, (NFT_NEWTABLE, "first"))
        with pytest.raises(FileNotFoundError):
            transact(
                netfilter, (NFT_NEWTABLE, "second"), (NFT_DELTABLE, "no"), (NFT_DELTABLE, "none")
            )
        assert names(netfilter) == ["first"]
        transact(netfilter, (NFT_DELTABLE, "first"), (NFT_NEWTABLE, "third"))
        assert names(netfilter) == ["third"]
    assert tables(pod) == ["inet third"]


def transact(netfilter: Netlink, *messages: tuple[int, str]) -> None:
    """Make and delete nftables tables in one batch."""
    begin, end = ((kind, header(0, 10)) for kind in NFNL_BATCH)
    parts = [
        (kind, netlink.NLM_F_CREATE if kind == NFT_NEWTABLE else 0,
         header(NFPROTO_INET) + text(NFTA_TABLE_NAME, name))
        for kind, name in messages
    ]  # fmt: skip
    netfilter.transaction(begin, parts, end, what="tables")


def names(netfilter: Netlink) -> list[str]:
    """The tables that there are, asked through the same socket."""
    answers = netfilter.request(
        NFT_GETTABLE, header(NFPROTO_INET), flags=netlink.NLM_F_DUMP, what="tables"
    )
    return [netlink.as_text(attributes(answer[4:])[NFTA_TABLE_NAME]) for answer in answers]


def header(family: int, subsystem: int = 0) -> bytes:
    """A struct nfgenmsg."""
    return struct.pack(">BBH", family, 0, subsystem)


def test_answers_are_the_kernels_only(pod: str) -> None:
    """A process of the pod that sends to our socket is not taken for the kernel."""
    forged = struct.pack("=BxHiII", 0, 1, 7, 0, 0) + text(3, "forged") + netlink.u32(4, 1500)
    with within(pod), Netlink(NETLINK_ROUTE) as route:
        port = route._socket.getsockname()[0]
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE) as sender:
            for sequence in range(1, 9):
                header = struct.pack("=IHHII", 16 + len(forged), RTM_NEWLINK, 2, sequence, port)
                sender.sendto(header + forged, (port, 0))
        assert [link.name for link in list_links(route)] == ["lo"]
