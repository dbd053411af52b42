"""Networks written as libvirt's network XML.

Two spellings are read: `<extbridge mode dev/>`, of libvirt's first macvtap patch, and the `<forward
mode><interface dev/></forward>` that libvirt took in its place (docs/formatnetwork.html). The first
is also written; its further attributes and children are the keys of the other spellings.
"""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Final
from xml.parsers import expat

from extbridge.network.definition import (
    MAX_DEPTH,
    MODES,
    Network,
    network_to_object,
)
from extbridge.spec.errors import InvalidNetworkConfig, UnsupportedField
from extbridge.spec.fields import JsonObject, allowed_hint, describe, get_object, refuse_unknown

_NUMBER_ATTRIBUTES = frozenset({"mtu", "queues"})

_TRUTH_ATTRIBUTES = frozenset({"trust"})

_ATTRIBUTES = ("mtu", "queues", "mac", "macPrefix", "antispoof", "trust", "handoff")
"""Of `<extbridge>`, besides mode and dev."""

_TRUTHS: Final[Mapping[str, bool]] = {"true": True, "yes": True, "false": False, "no": False}
"""XML Schema's words and libvirt's."""

_LIBVIRT_ONLY_MODES = ("nat", "route", "open", "hostdev")

_NIC_SETTINGS = ("virtualport", "vlan", "bandwidth", "portgroup")
"""Children of `<network>` by which libvirt changes what a macvtap does. The others are about its
own bridge and the services on it, which a macvtap network does not have."""


@dataclass(frozen=True, slots=True)
class _Element:
    name: str
    attributes: Mapping[str, str]
    children: list[_Element] = field(default_factory=list)
    text: list[str] = field(default_factory=list)


def object_from_xml(text: str) -> JsonObject:
    """The definition in text, as the object that the other spellings are.

    As the patch did, all beside `<name>`, `<uuid>` and `<extbridge>` is ignored where there is an
    `<extbridge>`. In libvirt's spelling what would change the VM's NIC is refused instead.
    Raises InvalidNetworkConfig; for what is not XML with line and column.
    """
    root = _parse_tree(text)
    if root.name != "network":
        raise InvalidNetworkConfig(
            f"the document's element is {describe(root.name)}", "it has to be <network>"
        )
    definition: dict[str, object] = {}
    for key in ("name", "uuid"):
        element = _find_child(root, key)
        if element is not None:
            definition[key] = "".join(element.text).strip()
    extbridge = _find_child(root, "extbridge")
    forward = _find_child(root, "forward")
    if extbridge is not None:
        return definition | _read_extbridge(extbridge)
    if forward is not None:
        return definition | _read_forward(root, forward)
    raise InvalidNetworkConfig(
        "<network> has neither <extbridge> nor <forward>",
        "name the mode and the NIC: <extbridge mode='vepa' dev='eth0'/>",
    )


def network_to_xml(network: Network) -> str:
    """Network as XML with an `<extbridge>`.

    Raises UnsupportedField for a network with an ipam: an object of somebody else's keys and types
    has no spelling here.
    """
    definition = network_to_object(network)
    if "ipam" in definition:
        raise UnsupportedField(
            f"network {network.name} has an ipam, which XML cannot say", "write it as YAML or JSON"
        )
    lines = ["<network>", f"  <name>{network.name}</name>"]
    if network.uuid is not None:
        lines.append(f"  <uuid>{network.uuid}</uuid>")
    attributes: dict[str, object] = {"mode": network.mode.value}
    children: list[str] = []
    match get_object(definition, "extbridge"):
        case {"dev": str() as name}:
            attributes["dev"] = name
        case {"dev": list() as names}:
            children += [_format_tag("interface", {"dev": name}) for name in names]
        case {"dev": Mapping() as selector}:
            children.append(_format_tag("select", selector))
    attributes |= {key: definition[key] for key in _ATTRIBUTES if key in definition}
    bandwidth = get_object(definition, "bandwidth")
    if bandwidth is not None:
        children.append(_format_tag("bandwidth", bandwidth))
    lines.append("  " + _format_tag("extbridge", attributes, is_empty=not children))
    if children:
        lines += [*(f"    {child}" for child in children), "  </extbridge>"]
    return "\n".join([*lines, "</network>", ""])


def find_ignored(text: str) -> list[str]:
    """What object_from_xml, which has taken text, takes no notice of; a sentence for each."""
    root = _parse_tree(text)
    taken = {"name", "uuid", "extbridge" if _find_child(root, "extbridge") else "forward"}
    names = dict.fromkeys(child.name for child in root.children if child.name not in taken)
    return [f"<{name}>: extbridge takes no notice of it" for name in names]


def _parse_tree(text: str) -> _Element:
    """The document's elements; comments and processing instructions are passed over.

    A DOCTYPE is refused as soon as it begins: what it declares is the only way to make a small
    document large or to have a parser open other files.
    """
    document = _Element("", {})
    open_elements = [document]
    parser = expat.ParserCreate()
    parser.buffer_text = True

    def start_element(name: str, attributes: dict[str, str]) -> None:
        if len(open_elements) > MAX_DEPTH:
            raise InvalidNetworkConfig(
                f"line {parser.CurrentLineNumber}: elements nest too deeply",
                f"allowed: {MAX_DEPTH} levels",
            )
        element = _Element(name, attributes)
        open_elements[-1].children.append(element)
        open_elements.append(element)

    def end_element(_: str) -> None:
        open_elements.pop()

    def add_text(data: str) -> None:
        open_elements[-1].text.append(data)

    def refuse_doctype(*_: object) -> None:
        raise InvalidNetworkConfig(
            f"line {parser.CurrentLineNumber}: a DOCTYPE", "leave it out, and its entities"
        )

    parser.StartElementHandler = start_element
    parser.EndElementHandler = end_element
    parser.CharacterDataHandler = add_text
    parser.StartDoctypeDeclHandler = refuse_doctype
    try:
        parser.Parse(text, True)  # noqa: FBT003 - pyexpat takes no keywords
    except expat.ExpatError as failure:
        place = f"line {failure.lineno}, column {failure.offset + 1}"
        raise InvalidNetworkConfig(
            f"{place}: {expat.ErrorString(failure.code)}", "it has to be XML"
        ) from failure
    except UnicodeEncodeError as failure:
        raise InvalidNetworkConfig("text that is not Unicode", "it has to be XML") from failure
    return document.children[0]


def _find_child(element: _Element, name: str) -> _Element | None:
    found = [child for child in element.children if child.name == name]
    if len(found) > 1:
        raise InvalidNetworkConfig(
            f"<{element.name}> has {len(found)} <{name}>", "keep one of them"
        )
    return found[0] if found else None


def _read_extbridge(extbridge: _Element) -> dict[str, object]:
    attributes = extbridge.attributes
    refuse_unknown(attributes, ("mode", "dev", *_ATTRIBUTES), where="extbridge")
    _refuse_unknown_children(extbridge, ("interface", "select", "bandwidth"))
    names = _read_names(extbridge)
    select = _find_child(extbridge, "select")
    if select is not None and names:
        raise InvalidNetworkConfig(
            "<extbridge> both names a NIC and selects by <select>", "keep one of them"
        )
    definition: dict[str, object] = {
        key: _read_value(key, attributes[key]) for key in _ATTRIBUTES if key in attributes
    }
    definition["extbridge"] = {
        "mode": attributes.get("mode"),
        "dev": names if select is None else select.attributes,
    }
    bandwidth = _find_child(extbridge, "bandwidth")
    if bandwidth is not None:
        definition["bandwidth"] = {
            key: _read_number(value) for key, value in bandwidth.attributes.items()
        }
    return definition


def _read_forward(root: _Element, forward: _Element) -> dict[str, object]:
    # Without a mode libvirt takes NAT (virNetworkForwardDefParseXML).
    mode = forward.attributes.get("mode", "nat")
    if mode in _LIBVIRT_ONLY_MODES:
        raise InvalidNetworkConfig(
            f"<forward mode='{mode}'> is no macvtap; only libvirt makes such networks",
            f"allowed: {', '.join(MODES)}",
        )
    if mode not in MODES:
        raise InvalidNetworkConfig(
            f"the mode of <forward> is {describe(mode)}", allowed_hint(mode, MODES)
        )
    bridge = _find_child(root, "bridge")
    if bridge is not None and "name" in bridge.attributes:
        raise InvalidNetworkConfig(
            f"<forward mode='{mode}'> with <bridge name=…> is about a bridge of the host, no NIC",
            "name the NIC, <interface dev='eth0'/> in <forward>, and leave <bridge> out",
        )
    for setting in _NIC_SETTINGS:
        if any(child.name == setting for child in root.children):
            raise InvalidNetworkConfig(
                f"<{setting}> would change the macvtap in a way that extbridge does not",
                "leave it out; <extbridge> has keys of its own, bandwidth among them",
            )
    refuse_unknown(forward.attributes, ("mode", "dev"), where="forward")
    _refuse_unknown_children(forward, ("interface",))
    return {"extbridge": {"mode": mode, "dev": _read_names(forward)}}


def _read_names(element: _Element) -> str | list[str] | None:
    """The NICs of `dev=` and of the children; both may name the first, as libvirt prints it."""
    first = element.attributes.get("dev")
    names: list[str] = []
    for child in element.children:
        if child.name != "interface":
            continue
        # libvirt tells the number of connections of a network that is up.
        refuse_unknown(child.attributes, ("dev", "connections"), where="interface")
        if "dev" not in child.attributes:
            raise InvalidNetworkConfig("an <interface> is without dev", "name the NIC")
        names.append(child.attributes["dev"])
    if first is None or not names:
        return names or first
    if first != names[0]:
        raise InvalidNetworkConfig(
            f"<{element.name}> has the dev {describe(first)} and a first <interface> with another",
            f"it has to be {describe(names[0])}, or left out",
        )
    return names


def _refuse_unknown_children(element: _Element, allowed: Collection[str]) -> None:
    refuse_unknown({child.name: child for child in element.children}, allowed, where=element.name)


def _read_value(key: str, text: str) -> object:
    if key in _NUMBER_ATTRIBUTES:
        return _read_number(text)
    return _TRUTHS.get(text, text) if key in _TRUTH_ATTRIBUTES else text


def _read_number(text: str) -> object:
    """Text that is no number stays text, which parse_network refuses by the name of its key."""
    return int(text) if re.fullmatch(r"[0-9]{1,20}", text) else text


def _format_tag(name: str, attributes: Mapping[str, object], *, is_empty: bool = True) -> str:
    said = "".join(
        f" {key}='{html.escape('true' if value is True else str(value))}'"
        for key, value in attributes.items()
    )
    return f"<{name}{said}{'/' if is_empty else ''}>"
