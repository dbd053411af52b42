"""Networks as resources that kubelet gives to pods, from registration to the container's start."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from extbridge.demo.lab import Lab, Nic, run
from extbridge.network.definition import FIRST_DEVICE, FIRST_IFINDEX
from extbridge.reservations import DEVICES
from tests.kernel.agents import SECONDS, Agent, Launcher, until
from tests.kernel.kubelet import Kubelet
from tests.kernel.observe import leftovers, macvtaps, picture, show_link
from tests.support import Answer, Cni

NO_ATTACHMENT: Mapping[str, None] = {"CONTAINERID": None, "IFNAME": None}
CODE_OF_STUBS = Path(__file__).parents[2] / "cni/extbridge/kube/proto"

# Opens its first argument as QEMU's user, who has no capability.
AS_QEMU = ("setpriv", "--reuid=107", "--regid=107", "--clear-groups", "--bounding-set=-all", "--",
           "sh", "-c", 'exec 3<>"$1" && echo opened', "sh")  # fmt: skip


class Networks:
    """The node's folder of definitions."""

    def __init__(self, folder: Path, nic: Nic) -> None:
        folder.mkdir()
        self.folder = folder
        self.nic = nic

    def define(self, network: str, dev: object = None, /, mode: str = "vepa", **keys: str) -> None:
        """Define a network on a NIC, or on a list of them, as YAML that JSON is."""
        lines = [f"extbridge: {{mode: {mode}, dev: {dev or self.nic.name}}}"]
        lines += [f"{key}: {value}" for key, value in keys.items()]
        self.write(network, "\n".join(lines))

    def write(self, network: str, text: str) -> None:
        """Write the definition as it is."""
        (self.folder / f"{network}.yaml").write_text(text)

    def remove(self, network: str) -> None:
        """Have the network no more."""
        (self.folder / f"{network}.yaml").unlink()


@pytest.fixture
def networks(tmp_path: Path, nic: Nic) -> Networks:
    """The network `blue` on the node's NIC."""
    networks = Networks(tmp_path / "networks", nic)
    networks.define("blue")
    return networks


@pytest.fixture
def kubelet(tmp_path: Path) -> Iterator[Kubelet]:
    """The node's kubelet, serving."""
    with Kubelet(tmp_path / "k") as kubelet:
        yield kubelet.start()


@pytest.fixture
def agent(run_dir: Path, tmp_path: Path, networks: Networks, kubelet: Kubelet) -> Iterator[Agent]:
    """The node's agent with device plugins, serving."""
    options = ("--networks-dir", str(networks.folder), "--device-plugins", str(kubelet.folder))
    with Agent(run_dir, tmp_path / "agent.log", *options) as agent:
        yield agent.start()


def asked(network: str, device: str, /, **keys: object) -> dict[str, object]:
    """The configuration that Multus passes on for a pod that kubelet gave the device."""
    return {
        "cniVersion": "1.1.0",
        "name": network,
        "type": "extbridge",
        "network": network,
        # Whatever the device is, of whatever bus.
        "deviceID": device,
        "pciBusID": device,
        "capabilities": {"deviceID": True},
        "runtimeConfig": {"deviceID": device},
        **keys,
    }


def status_of(shim: Cni, network: str) -> Answer:
    """What STATUS says of a configuration that names the network."""
    config = {"cniVersion": "1.1.0", "name": "n", "type": "extbridge", "network": network}
    return shim("STATUS", config, **NO_ATTACHMENT)


# In kubelet's order.


def test_device_reaches_qemu(
    kubelet: Kubelet, networks: Networks, agent: Agent, shim: Cni, pod: str
) -> None:
    """Registered, listed, allocated, attached: QEMU's user opens the node that kubelet named.

    To allocate makes nothing yet, so a pod that never starts leaves nothing.
    """
    networks.define("blue", handoff="device")
    devices = kubelet.sees("blue", healthy=DEVICES)
    [registration] = kubelet.ask("state")["registrations"]
    assert registration == {
        "version": "v1beta1",
        "endpoint": "extbridge-blue.sock",
        "resource_name": "extbridge.io/blue",
        "options": {},
        "told": {},
    }
    before = picture(agent.run_dir, pod)
    # Whether it is listed tells nothing of the definition's other keys.
    node = f"/dev/tap{devices[3]}"
    spec = {"container_path": node, "host_path": node, "permissions": "rw"}
    until(lambda: kubelet.allocate("blue", [devices[3]]) == {"containers": [{"devices": [spec]}]})
    assert picture(agent.run_dir, pod) == before
    assert not os.path.exists(node)
    config = asked("blue", devices[3])
    assert shim("ADD", config, NETNS=pod).status == 0
    assert (os.stat(node).st_uid, os.stat(node).st_gid) == (107, 107)
    assert run(*AS_QEMU, node) == "opened\n"
    assert shim("DEL", config, NETNS=pod).status == 0
    assert not os.path.exists(node)
    # The next pod may have it.
    assert shim("ADD", config, NETNS=pod, CONTAINERID="container-2").status == 0
    assert shim("DEL", config, NETNS=pod, CONTAINERID="container-2").status == 0
    assert leftovers(pod, agent.run_dir) == []


def test_fds_reach_the_launcher(
    kubelet: Kubelet, agent: Agent, shim: Cni, launcher: Launcher, pod: str
) -> None:
    """A pod on a network with fds gets the folder of launcher and socket, read-only, once."""
    devices = kubelet.sees("blue", healthy=DEVICES)
    folder = str(agent.run_dir / "pod")
    mount = {"container_path": folder, "host_path": folder, "read_only": True}
    assert kubelet.allocate("blue", devices[:2], [], [devices[2]]) == {
        "containers": [{"mounts": [mount]}, {}, {"mounts": [mount]}]
    }
    agent.counts({"device_allocations_total{network=blue}": 3})
    config = asked("blue", devices[0])
    assert shim("ADD", config, NETNS=pod).status == 0
    assert show_link("net1", pod)["ifindex"] == int(devices[0])
    # Nobody but the agent opens the node of a tap that it hands over.
    assert os.stat(f"/dev/tap{devices[0]}").st_uid == 0
    assert launcher.printed(pod, "{net1.queues}") == ["1"]
    assert shim("DEL", config, NETNS=pod).status == 0


def test_device_comes_chained_too(
    kubelet: Kubelet, agent: Agent, shim: Cni, networks: Networks, pod: str
) -> None:
    """Behind the cluster's own plugin, where the annotation names the network, it is the same."""
    device = kubelet.sees("blue", healthy=DEVICES)[0]
    annotations = "io.kubernetes.cri.pod-annotations"
    config: dict[str, object] = {
        "cniVersion": "1.0.0",
        "name": "cluster",
        "type": "extbridge",
        "capabilities": {annotations: True, "deviceID": True},
        "prevResult": {"cniVersion": "1.0.0", "interfaces": [{"name": "net1", "sandbox": pod}]},
        "runtimeConfig": {"deviceID": device, annotations: {"extbridge.io/networks": "blue"}},
    }
    # As Multus writes it into each plugin of a list.
    config |= {"deviceID": device, "pciBusID": device}
    run("ip", "link", "add", "net1", "type", "veth", "peer", "name", "net1p", netns=pod)
    networks.define("red")
    other = kubelet.sees("red", healthy=DEVICES)[0]
    before = picture(agent.run_dir, pod)
    runtime = {"deviceID": other, annotations: {"extbridge.io/networks": "blue"}}
    wrong = {"deviceID": other, "pciBusID": other, "runtimeConfig": runtime}
    for said in (wrong, {"runtimeConfig": runtime}):
        refused = shim("ADD", {**config, **said}, NETNS=pod).error
        assert (refused["code"], picture(agent.run_dir, pod)) == (7, before)
    added = shim("ADD", config, NETNS=pod)
    assert added.status == 0
    assert shim("CHECK", {**config, "prevResult": added.result}, NETNS=pod).status == 0
    assert show_link("macvtap0", pod)["ifindex"] == int(device)
    assert shim("DEL", config, NETNS=pod).status == 0


def test_twenty_pods_at_once(kubelet: Kubelet, agent: Agent, shim: Cni, lab: Lab) -> None:
    """However many pods start at the same moment, each has its own device and NIC."""
    devices = kubelet.sees("blue", healthy=DEVICES)[:20]
    answers = kubelet.ask("allocate_at_once", resource="extbridge.io/blue", devices=devices)
    assert all(answer["containers"] for answer in answers)
    pods = [lab.pod(f"p{number}") for number in range(20)]

    def ask(verb: str, number: int) -> int:
        config = asked("blue", devices[number])
        return shim(verb, config, NETNS=pods[number], CONTAINERID=f"c{number}").status

    with ThreadPoolExecutor(20) as threads:
        assert set(threads.map(lambda it: ask("ADD", it), range(20))) == {0}
        assert [show_link("net1", pod)["ifindex"] for pod in pods] == [int(it) for it in devices]
        assert set(threads.map(lambda it: ask("DEL", it), range(20))) == {0}
    assert [leftovers(pod, agent.run_dir) for pod in pods] == [[]] * 20


# Restarts.


@pytest.mark.parametrize("ends", [Kubelet.stop, Kubelet.kill])
def test_kubelet_restarts(
    kubelet: Kubelet, networks: Networks, agent: Agent, ends: Callable[[Kubelet], None]
) -> None:
    """A kubelet that starts anew wipes its folder, and knows all resources again, as before.

    Whatever else lies in the folder stays, and so does a kubelet's own socket.
    """
    networks.define("red")
    before = {name: kubelet.sees(name, healthy=DEVICES) for name in ("blue", "red")}
    for times in (2, 3):
        ends(kubelet)
        kubelet.start()
        after = {name: kubelet.sees(name, healthy=DEVICES) for name in before}
        assert after == before
        agent.counts({"device_registrations_total{code=OK,network=blue}": times})
    files = {path.name for path in kubelet.folder.iterdir()}
    assert files == {"kubelet.sock", "extbridge-blue.sock", "extbridge-red.sock"}


def test_kubelet_comes_later(tmp_path: Path, agent: Agent, kubelet: Kubelet, shim: Cni) -> None:
    """The agent serves without a kubelet, even without its folder, and registers when it comes."""
    agent.stop()
    kubelet.stop()
    kubelet.folder.rmdir()
    kubelet.folder = tmp_path / "later/k"
    agent.options = (*agent.options[:-1], str(kubelet.folder))
    agent.start()
    assert status_of(shim, "blue").status == 0
    kubelet.start()
    assert kubelet.sees("blue", healthy=DEVICES)


def test_kubelet_refuses_for_now(kubelet: Kubelet, networks: Networks, agent: Agent) -> None:
    """A registration that is refused is tried again, and the log has one line about it."""
    kubelet.sees("blue", healthy=DEVICES)
    kubelet.ask("refuse", times=2)
    networks.define("red")
    kubelet.sees("red", healthy=DEVICES)
    counted = "device_registrations_total{code=INVALID_ARGUMENT,network=red}"
    agent.counts({counted: 2, "device_registrations_total{code=OK,network=red}": 1})
    assert agent.log.count("kubelet does not register extbridge.io/red") == 1


def test_kubelet_hangs_up(kubelet: Kubelet, agent: Agent) -> None:
    """A kubelet that hangs up on a plugin without a restart is told of the resource again."""
    kubelet.sees("blue", healthy=DEVICES)
    kubelet.ask("forget", resource="extbridge.io/blue")
    agent.counts({"device_registrations_total{code=OK,network=blue}": 2})
    kubelet.sees("blue", healthy=DEVICES)


@pytest.mark.parametrize("ends", [Agent.stop, Agent.kill])
def test_agent_restarts(
    kubelet: Kubelet, agent: Agent, shim: Cni, pod: str, ends: Callable[[Agent], None]
) -> None:
    """The agent's successor offers the same devices; those that pods have are still theirs."""
    devices = kubelet.sees("blue", healthy=DEVICES)
    config = asked("blue", devices[0])
    assert shim("ADD", config, NETNS=pod).status == 0
    ends(agent)
    assert kubelet.sees("blue", healthy=0, unhealthy=DEVICES) == []
    agent.start()
    assert kubelet.sees("blue", healthy=DEVICES) == devices
    error = shim("ADD", config, NETNS=pod, CONTAINERID="container-2", IFNAME="net2").error
    assert error["msg"] == f"deviceID is {devices[0]}, which net1 of container-1 has"
    assert shim("ADD", asked("blue", devices[1]), NETNS=pod, IFNAME="net2").status == 0
    for device, ifname in zip(devices, ("net1", "net2"), strict=False):
        assert shim("DEL", asked("blue", device), NETNS=pod, IFNAME=ifname).status == 0
    assert leftovers(pod, agent.run_dir) == []


def test_devices_are_the_nodes_whatever_the_host_is_called(
    kubelet: Kubelet, agent: Agent, shim: Cni, pod: str
) -> None:
    """Devices follow the node's name in the cluster, which a host that is renamed keeps."""
    options = agent.options

    def restart(node: str, host: str) -> list[str]:
        agent.stop()
        kubelet.sees("blue", healthy=0, unhealthy=DEVICES)
        agent.options = (*options, "--node-name", node)
        agent.wrapper = ("unshare", "--uts", "sh", "-c", f'hostname {host}; exec "$@"', "sh")
        agent.start()
        return kubelet.sees("blue", healthy=DEVICES)

    hosts = kubelet.sees("blue", healthy=DEVICES)
    devices = restart("node-1", "before.example")
    assert shim("ADD", asked("blue", devices[0]), NETNS=pod).status == 0
    assert shim("DEL", asked("blue", devices[0]), NETNS=pod).status == 0
    assert restart("node-1", "after.example") == devices
    assert not {*restart("node-2", "after.example"), *hosts} & {*devices}


def test_agent_leaves_kubelets_folder_as_it_was(kubelet: Kubelet, agent: Agent) -> None:
    """An agent that ends takes its sockets with it."""
    kubelet.sees("blue", healthy=DEVICES)
    agent.stop()
    assert [path.name for path in kubelet.folder.iterdir()] == ["kubelet.sock"]


# Health and capacity.


def test_health_follows_the_nic(kubelet: Kubelet, agent: Agent, lab: Lab, nic: Nic) -> None:
    """Devices are healthy while an ADD would give a NIC that works: there, up, with carrier."""
    for spoil, mend in (
        (("ip", "link", "set", nic.name, "down"), ("ip", "link", "set", nic.name, "up")),
        (("ip", "link", "set", nic.name, "name", "xbaway"),
         ("ip", "link", "set", "xbaway", "name", nic.name)),
    ):  # fmt: skip
        kubelet.sees("blue", healthy=DEVICES)
        run(*spoil)
        kubelet.sees("blue", healthy=0, unhealthy=DEVICES)
        agent.counts({"devices{health=Healthy,network=blue}": 0})
        run(*mend)
    kubelet.sees("blue", healthy=DEVICES)
    run("ip", "link", "set", nic.port, "down", netns=lab.switch)
    kubelet.sees("blue", healthy=0, unhealthy=DEVICES)
    run("ip", "link", "set", nic.port, "up", netns=lab.switch)
    kubelet.sees("blue", healthy=DEVICES)
    run("ip", "link", "delete", nic.name)
    kubelet.sees("blue", healthy=0, unhealthy=DEVICES)
    agent.counts({"devices{health=Unhealthy,network=blue}": DEVICES})
    run("ip", "link", "add", nic.name, "type", "veth", "peer", "name", "xbback")
    run("ip", "link", "set", "xbback", "up")
    run("ip", "link", "set", nic.name, "up")
    kubelet.sees("blue", healthy=DEVICES)


@pytest.mark.usefixtures("agent")
def test_one_good_nic_of_a_pool_is_enough(
    kubelet: Kubelet, networks: Networks, lab: Lab, nic: Nic
) -> None:
    """Devices of a pool are healthy while any of its NICs is."""
    other = lab.nic()
    networks.define("pool", [nic.name, other.name])
    kubelet.sees("pool", healthy=DEVICES)
    run("ip", "link", "set", nic.name, "down")
    kubelet.sees("blue", healthy=0, unhealthy=DEVICES)
    assert all(kubelet.devices("pool").values())
    run("ip", "link", "set", other.name, "down")
    kubelet.sees("pool", healthy=0, unhealthy=DEVICES)


@pytest.mark.usefixtures("agent")
def test_pool_that_follows_the_default_route(
    kubelet: Kubelet, networks: Networks, nic: Nic
) -> None:
    """A network on the NIC of the default route is healthy from that route's coming on."""
    networks.define("uplink", "{route: default}")
    kubelet.sees("uplink", healthy=0, unhealthy=DEVICES)
    run("ip", "route", "add", "default", "dev", nic.name)
    kubelet.sees("uplink", healthy=DEVICES)
    run("ip", "route", "delete", "default")
    kubelet.sees("uplink", healthy=0, unhealthy=DEVICES)


def test_passthru_has_as_many_devices_as_nics(
    kubelet: Kubelet, networks: Networks, agent: Agent, shim: Cni, lab: Lab
) -> None:
    """Of a passthru network kubelet gives out as many devices as there are NICs that work.

    A device that a pod has is as healthy as the NIC that it got. A NIC that another network has
    taken is none.
    """
    nics = [lab.nic() for _ in range(3)]
    networks.define("pass", [nic.name for nic in nics], mode="passthru")
    devices = kubelet.sees("pass", healthy=3)
    pod = lab.pod("first")
    assert shim("ADD", asked("pass", devices[2]), NETNS=pod).status == 0

    def become(*healthy: str) -> None:
        until(lambda: [it for it, able in kubelet.devices("pass").items() if able] == [*healthy])

    # Its NIC is the first, its device the last.
    run("ip", "link", "set", nics[0].name, "down")
    become(devices[0], devices[1])
    run("ip", "link", "set", nics[0].name, "up")
    run("ip", "link", "set", nics[1].name, "down")
    become(devices[0], devices[2])
    networks.define("other", nics[2].name)
    other = kubelet.sees("other", healthy=DEVICES)[0]
    taker = {"NETNS": lab.pod("second"), "CONTAINERID": "container-2"}
    assert shim("ADD", asked("other", other), **taker).status == 0
    become(devices[2])
    run("ip", "link", "set", nics[1].name, "up")
    become(devices[0], devices[2])
    run("ip", "link", "delete", nics[2].name)
    run("ip", "link", "set", nics[1].name, "down")
    become(devices[2])
    assert len(kubelet.devices("pass")) == 3
    assert shim("DEL", asked("other", other), **taker).status == 0
    assert shim("DEL", asked("pass", devices[2]), NETNS=pod).status == 0
    agent.counts({"devices{health=Healthy,network=pass}": 1})


# Definitions.


def test_definitions_come_and_go(kubelet: Kubelet, networks: Networks, agent: Agent) -> None:
    """Resources follow the folder by themselves: what comes, what changes, what goes."""
    devices = kubelet.sees("blue", healthy=DEVICES)
    networks.define("red", mode="passthru")
    assert kubelet.sees("red", healthy=1)
    networks.define("blue", handoff="device")
    until(lambda: "devices" in kubelet.allocate("blue", [devices[0]])["containers"][0])
    networks.define("blue", "nope")
    kubelet.sees("blue", healthy=0, unhealthy=DEVICES)
    networks.define("blue")
    assert kubelet.sees("blue", healthy=DEVICES) == devices
    networks.remove("red")
    kubelet.sees("red", healthy=0, unhealthy=1)
    until(lambda: not (kubelet.folder / "extbridge-red.sock").exists())
    assert agent.metrics()["extbridge_devices{health=Healthy,network=red}"] == 0
    networks.define("red", mode="passthru")
    assert kubelet.sees("red", healthy=1)


def test_config_map_is_swapped(
    kubelet: Kubelet, networks: Networks, agent: Agent, nic: Nic
) -> None:
    """A ConfigMap's volume changes by one symlink, and all of its networks at once."""
    kubelet.sees("blue", healthy=DEVICES)
    networks.remove("blue")

    def publish(version: str, **files: str) -> None:
        # As kubelet's AtomicWriter does.
        (networks.folder / version).mkdir()
        for name, text in files.items():
            (networks.folder / version / f"{name}.yaml").write_text(text)
        (networks.folder / "..data_tmp").symlink_to(version)
        (networks.folder / "..data_tmp").rename(networks.folder / "..data")
        for name in files:
            with suppress(FileExistsError):
                (networks.folder / f"{name}.yaml").symlink_to(f"..data/{name}.yaml")

    good = f"extbridge: {{dev: {nic.name}}}"
    publish("..one", blue=good, red=good)
    kubelet.sees("red", healthy=DEVICES)
    publish("..two", blue=good, red="extbridge: {dev: nope}")
    kubelet.sees("red", healthy=0, unhealthy=DEVICES)
    kubelet.sees("blue", healthy=DEVICES)
    assert agent.metrics()["extbridge_network_broken{network=red}"] == 0


def test_broken_network_does_not_keep_the_others(
    kubelet: Kubelet, networks: Networks, agent: Agent, shim: Cni, pod: str
) -> None:
    """A definition that breaks is named in log, metrics and STATUS; the others work as before."""
    networks.define("red")
    device = kubelet.sees("red", healthy=DEVICES)[0]
    networks.write("red", "extbridge: {devv: eth7}")
    kubelet.sees("red", healthy=0, unhealthy=DEVICES)
    said = "red.yaml: extbridge.devv is not a known key"
    assert agent.log.count(f"error: network red: {networks.folder}/{said}") == 1
    agent.counts({"network_broken{network=red}": 1, "network_broken{network=blue}": 0})
    error = status_of(shim, "red").error
    assert (error["code"], said in str(error["msg"])) == (50, True)
    assert str(error["msg"]).startswith("network red: ")
    assert error["details"]
    refused = shim("ADD", asked("red", device), NETNS=pod).error
    assert (refused["code"], said in str(refused["msg"])) == (7, True)
    config = asked("blue", kubelet.sees("blue", healthy=DEVICES)[0])
    assert status_of(shim, "blue").status == 0
    assert shim("ADD", config, NETNS=pod).status == 0
    assert shim("DEL", config, NETNS=pod).status == 0
    networks.define("red")
    assert kubelet.sees("red", healthy=DEVICES)[0] == device
    assert status_of(shim, "red").status == 0
    agent.counts({"network_broken{network=red}": 0})
    until(lambda: "network red: nothing is wrong with it any more" in agent.log)


def test_folder_that_cannot_be_read(
    kubelet: Kubelet, networks: Networks, agent: Agent, tmp_path: Path
) -> None:
    """While the folder of definitions is none, nothing changes; the log says so, once."""
    devices = kubelet.sees("blue", healthy=DEVICES)
    networks.folder.rename(tmp_path / "away")
    networks.folder.touch()
    until(lambda: "device plugins: [Errno 20] Not a directory" in agent.log)
    assert "error: device plugins" in agent.log
    networks.folder.unlink()
    (tmp_path / "away").rename(networks.folder)
    networks.define("red")
    kubelet.sees("red", healthy=DEVICES)
    assert kubelet.sees("blue", healthy=DEVICES) == devices
    assert agent.log.count("device plugins:") == 1


def test_network_with_a_name_that_is_no_resources(
    kubelet: Kubelet, networks: Networks, agent: Agent, shim: Cni, pod: str
) -> None:
    """A name that Kubernetes does not allow a resource is said so, and works without devices."""
    networks.define("green_")
    networks.define("l" * 64)
    until(lambda: agent.log.count("it is no resource") == 2)
    kubelet.sees("blue", healthy=DEVICES)
    assert list(kubelet.ask("state")["devices"]) == ["extbridge.io/blue"]
    config = asked("green_", "")
    assert shim("ADD", config, NETNS=pod).status == 0
    assert shim("DEL", config, NETNS=pod).status == 0


# Refusals.


@pytest.mark.parametrize("device", ["", "tap3", "-1", str(FIRST_IFINDEX), "٣", "9" * 5000])
def test_unknown_device_is_not_allocated(kubelet: Kubelet, agent: Agent, device: str) -> None:
    """A device that the network does not have is refused by name, and the pod gets none."""
    devices = kubelet.sees("blue", healthy=DEVICES)
    refused = kubelet.allocate("blue", [devices[0]], [device])
    assert refused["code"] == "NOT_FOUND"
    assert "extbridge.io/blue has no device" in refused["details"]
    assert agent.metrics()["extbridge_device_allocations_total{network=blue}"] == 0


def test_add_with_anothers_device_is_refused(
    kubelet: Kubelet, networks: Networks, agent: Agent, shim: Cni, lab: Lab
) -> None:
    """Unknown, of another network, in use, of a network that has gone: said so, nothing touched."""
    networks.define("red")
    blue = kubelet.sees("blue", healthy=DEVICES)
    red = kubelet.sees("red", healthy=DEVICES)
    first, second = lab.pod("first"), lab.pod("second")
    assert shim("ADD", asked("blue", blue[0]), NETNS=first).status == 0
    before = picture(agent.run_dir, first, second)
    # What kubelet did not give may still be a number that the kernel could.
    nobodys = str(next(it for it in range(FIRST_DEVICE, FIRST_DEVICE + DEVICES * 3)
                       if str(it) not in blue + red))  # fmt: skip
    inline: dict[str, object] = {"network": None, "extbridge": {"dev": networks.nic.name}}

    def refused(config: dict[str, object], *told: str) -> None:
        other = {"NETNS": second, "CONTAINERID": "container-2"}
        error = shim("ADD", config, **other).error
        assert error["code"] == 7
        assert all(it in f"{error['msg']}; {error['details']}" for it in told), error
        assert picture(agent.run_dir, first, second) == before

    refused(asked("blue", red[0]), "one of network red's", "request extbridge.io/blue")
    refused(asked("blue", nobodys), f"deviceID is {nobodys}, no network's and none of blue's")
    refused(asked("blue", str(FIRST_IFINDEX)), "no network's")
    refused(asked("blue", blue[0]), "which net1 of container-1 has", "ask the device plugin")
    refused(asked("green", blue[1], **inline), "no devices of network green", "never in the agent")
    # Defined in the configuration itself, under a name that has devices, it has those.
    assert shim("ADD", asked("red", red[0], **inline), NETNS=first, IFNAME="net2").status == 0
    networks.remove("red")
    kubelet.sees("red", healthy=0, unhealthy=DEVICES)
    before = picture(agent.run_dir, first, second)
    refused(asked("red", red[1], **inline), "no devices of network red", "or gone")
    refused(asked("red", red[1]), "network red is not defined")
    # DEL does not ask whose the device is.
    assert shim("DEL", asked("red", red[0], **inline), NETNS=first, IFNAME="net2").status == 0
    assert shim("DEL", asked("blue", blue[0]), NETNS=first).status == 0
    assert macvtaps(first) == []


# What it costs others.


def test_plain_agent_imports_no_grpc(agent: Agent) -> None:
    """An agent without device plugins does not pay for their library."""
    agent.stop()
    traced = (sys.executable, "-X", "importtime")

    def imported(*options: str) -> set[str]:
        former = len(agent.log)
        agent.options, agent.wrapper = options, traced
        agent.start()
        agent.stop()
        named = re.findall(r"\| +([a-zA-Z_]\w*)", agent.log[former:])
        return {"grpc", "google", "kubernetes"} & set(named)

    with_plugins = agent.options
    assert imported() == set()
    assert imported(*with_plugins) == {"grpc", "google"}


def test_stubs_are_what_the_proto_says(tmp_path: Path) -> None:
    """The Python for kubelet's messages is what `make stubs` makes of their definition."""
    subprocess.run(
        ("make", "--silent", "stubs", f"STUBS={tmp_path}"),
        cwd=CODE_OF_STUBS.parents[3], check=True, timeout=SECONDS,
    )  # fmt: skip
    made = {path.name: path.read_bytes() for path in tmp_path.rglob("*.py*")}
    assert made == {path.name: path.read_bytes() for path in CODE_OF_STUBS.glob("*_pb2.py*")}
