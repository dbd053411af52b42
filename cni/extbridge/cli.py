"""The command line, `extbridge`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, TypeVar

import click

from extbridge.spec.errors import CniError
from extbridge.spec.skel import translate

if TYPE_CHECKING:
    from extbridge.node.agent import Companion
    from extbridge.node.metrics import Metrics
Command = TypeVar("Command", bound=Callable[..., Any])


_run_dir = click.option(
    "--run-dir",
    envvar="EXTBRIDGE_RUN",
    default="/run/extbridge",
    show_default=True,
    metavar="FOLDER",
    # What cannot be read is told of by whoever reads it.
    type=click.Path(path_type=Path, readable=False),
    help="Where the agent's sockets, ledger and spool are.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="extbridge-cni")
def cli() -> None:
    """Virtual machines in pods, straight onto the switch outside."""


@cli.command(context_settings={"ignore_unknown_options": True})
@click.option("--netns", required=True, metavar="PATH", help="The pod's network namespace.")
@click.option(
    "--ifname",
    "ifnames",
    multiple=True,
    metavar="NAME",
    help="A NIC of that namespace; may be given again. Without: all that extbridge made.",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(netns: str, ifnames: tuple[str, ...], command: tuple[str, ...]) -> NoReturn:
    """Run COMMAND, a QEMU, with the taps of a namespace, as root and without an agent.

    \b
    Filled in anywhere in COMMAND, for a NIC named net1:
      {net1.fd} {net1.fds}    the fd; one a queue, separated by colons
      {net1.vhostfds}         likewise for vhost-net, where the node has it
      {net1.mac} {net1.mtu} {net1.queues}
      {net1.ip} {net1.prefix} {net1.netmask} {net1.gateway}
                              the guest's first address, where it has one
      {net1.ips} {net1.dns}   all of them, with prefix lengths; name servers
    Without any of these, -netdev and -device are appended for every NIC; the
    device's model is virtio-net-pci, or what EXTBRIDGE_MODEL names.
    """  # noqa: D301 - the backspace is click's mark for lines to be left alone
    from extbridge.handoff import take_taps
    from extbridge.kernel.netns import opened_netns
    from extbridge.ledger import Holder, Ledger
    from extbridge.node.launcher import DEFAULT_MODEL, MODEL_VARIABLE, render_command

    with opened_netns(netns) as namespace:
        if namespace is None:
            raise click.BadParameter(
                f"there is no network namespace at {netns}; give a path, as /var/run/netns/NAME",
                param_hint="--netns",
            )
        ledger = Ledger.from_environment(os.environ)
        holder = Holder.of(os.getpid())
        with take_taps(namespace, holder, ledger=ledger, ifnames=ifnames) as taps:
            model = os.environ.get(MODEL_VARIABLE) or DEFAULT_MODEL
            argv = render_command(command, taps, model=model)
            for tap in taps:
                for fd in (*tap.fds, *tap.vhost_fds):
                    os.set_inheritable(fd, True)  # noqa: FBT003 - os takes no keyword
            # Python ignores them, and what is ignored stays so over exec (man 2 execve).
            for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(ignored, signal.SIG_DFL)
            try:
                os.execvp(argv[0], argv)
            except OSError as error:
                raise click.ClickException(f"{argv[0]}: {error.strerror}") from error


_qmp = click.option(
    "--qmp", metavar="SOCKET", help="QEMU's QMP; of a container, below /proc/PID/root."
)
_pods_netns = click.option(
    "--netns", metavar="PATH", help="The pod's namespace, if it is not where ADD saw it."
)


_host_process = click.option(
    "--host-process",
    type=click.IntRange(min=1),
    metavar="PID",
    help="In an agent's container: a process of the host, mostly 1, in whose mount namespace IPAM"
    " plugins are run.",
)


@cli.command()
@click.argument("pod")
@click.option("--network", required=True, metavar="NAME", help="One that is defined on this node.")
@click.option("--interface", metavar="NAME", help="Without: the first macvtap%d that is free.")
@click.option("--mac", metavar="MAC", help="Without: the network's, or the derived one.")
@click.option("--ip", "ips", multiple=True, metavar="ADDRESS", help="May be given again.")
@_qmp
@_pods_netns
@_host_process
@click.option(
    "--networks-dir",
    default="/etc/cni/extbridge.d",
    show_default=True,
    metavar="FOLDER",
    help="Where networks are defined.",
)
def attach(
    *,
    pod: str,
    network: str,
    interface: str | None,
    mac: str | None,
    ips: tuple[str, ...],
    qmp: str | None,
    netns: str | None,
    host_process: int | None,
    networks_dir: str,
) -> None:
    """Make one more NIC in a POD that runs, and plug it into its QEMU.

    POD is named by namespace/name, by container ID, or by the MAC or the name of a NIC that it has.
    The NIC is gone with the pod; a VM that is started anew in it has the NIC from the start. The
    device's model is virtio-net-pci, or what EXTBRIDGE_MODEL names; IPAM plugins are looked for in
    CNI_PATH, else in /opt/cni/bin.

    Without --qmp the NIC waits for a launcher.
    """
    from extbridge.hotplug import AskedNic, plug_nic
    from extbridge.ledger import Ledger
    from extbridge.node.launcher import DEFAULT_MODEL, MODEL_VARIABLE
    from extbridge.plugin import Node

    entry = plug_nic(
        Node(Ledger.from_environment(os.environ), networks_dir, host_process),
        pod,
        AskedNic(network, interface, mac, ips),
        model=os.environ.get(MODEL_VARIABLE) or DEFAULT_MODEL,
        cni_path=os.environ.get("CNI_PATH") or "/opt/cni/bin",
        qmp=qmp,
        netns=netns,
    )
    click.echo(f"{entry.ifname} {entry.mac} on {entry.lower}")
    if entry.holder is not None:
        click.echo(f"plugged into process {entry.holder.pid}", err=True)
    else:
        click.echo(
            f"not plugged in: the pod's next launcher takes it, now one with"
            f" EXTBRIDGE_IFNAMES={entry.ifname}",
            err=True,
        )


@cli.command()
@click.argument("pod")
@click.argument("nic", metavar="IFNAME|MAC")
@_qmp
@_pods_netns
@_host_process
@click.option(
    "--timeout",
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    type=click.FloatRange(min=0, min_open=True),
    help="How long the guest may take to let go of it.",
)
def detach(
    pod: str,
    nic: str,
    *,
    qmp: str | None,
    netns: str | None,
    host_process: int | None,
    timeout: float,
) -> None:
    """Take a NIC that `attach` made out of its POD's QEMU, and unmake it.

    A QEMU that has it needs --qmp, and a guest that listens.
    """
    from extbridge.hotplug import unplug_nic
    from extbridge.ledger import Ledger
    from extbridge.plugin import Node

    ledger = Ledger.from_environment(os.environ)
    node = Node(ledger, host_process=host_process)
    entry = unplug_nic(node, pod, nic, qmp=qmp, netns=netns, seconds=timeout)
    click.echo(f"{entry.ifname} {entry.mac} is gone")


@cli.command()
def demo() -> None:
    """Two VMs ping each other across a VEPA switch, all on this machine and of its own making.

    The guests' kernel is looked for in the folder that EXTBRIDGE_GUEST names, else in .guest, where
    `make demo` puts it.
    """
    from extbridge.demo.story import tell

    sys.exit(tell())


_bin_dir = click.option(
    "--bin-dir",
    required=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Where the container runtime looks for CNI plugins.",
)


@cli.command()
@_bin_dir
@click.option(
    "--conf-dir",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Where it looks for network configurations. Without: nothing but the executables.",
)
@click.option(
    "--chained",
    is_flag=True,
    help="Put extbridge behind the plugins of the first network there; pods ask by annotation.",
)
@click.option(
    "--conflist",
    metavar="FILE",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Put this network there.",
)
@click.option(
    "--shim-only",
    is_flag=True,
    help="The executables and nothing else: with --conf-dir, what install has put there is taken"
    " out again.",
)
def install(
    bin_dir: Path, conf_dir: Path | None, conflist: Path | None, *, chained: bool, shim_only: bool
) -> None:
    """Put the CNI plugin `extbridge` and the launcher `extbridge-exec` into a node's folder.

    Done twice it is done once. What was in the folders before is given back by uninstall.
    """
    from extbridge.node import conflist as configurations
    from extbridge.node.install import install_shim

    if chained + shim_only + (conflist is not None) > 1:
        raise click.UsageError("--chained, --conflist and --shim-only are three ways: choose one")
    if (conf_dir is not None) != (chained or conflist is not None) and not shim_only:
        raise click.UsageError("--conf-dir goes with --chained or --conflist, and they with it")
    if shim_only and conf_dir is not None:
        configurations.remove(conf_dir)
    if shim_only or conf_dir is None:
        install_shim(bin_dir)
        return
    prepared: AbstractContextManager[object] = (
        configurations.chained(conf_dir)
        if conflist is None
        else configurations.put(conf_dir, conflist)
    )
    # The runtime may call the executable as soon as a configuration names it.
    with prepared:
        install_shim(bin_dir)


@cli.command()
@_bin_dir
@click.option(
    "--conf-dir",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Where it looks for network configurations, if install was given that.",
)
def uninstall(bin_dir: Path, conf_dir: Path | None) -> None:
    """Leave a node's folders as they were before install; pods with NICs have to be gone."""
    from extbridge.node.conflist import remove
    from extbridge.node.install import uninstall_shim

    if conf_dir is not None:
        remove(conf_dir)
    for path in uninstall_shim(bin_dir):
        click.echo(f"extbridge: {path} is not extbridge's, and was left", err=True)


_files = click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.File("rb"))


@cli.command()
@_files
@click.option(
    "--to",
    "form",
    type=click.Choice(["yaml", "nad", "json"]),
    default="yaml",
    show_default=True,
    help="yaml: definitions, in the ConfigMap of deploy/, and the attachment definitions that there"
    " were, for them; nad: a NetworkAttachmentDefinition for each network, which is all in it;"
    " json: the CNI configuration of one network.",
)
def convert(files: tuple[BinaryIO, ...], form: str) -> None:
    """Print the networks that other programs have in FILEs (- for standard input), as extbridge's.

    \b
    Each FILE may be
      libvirt's network XML, <extbridge> or <forward><interface>;
      a CNI configuration of the plugin macvlan, or a list with it;
      NetworkAttachmentDefinitions of macvlan or macvtap-cni, the latter's
      ConfigMap, as kubectl prints or takes them;
      a definition of extbridge's own, in XML, YAML or JSON.
    What cannot be carried over is said on standard error, and the exit status is 3 then.
    """  # noqa: D301 - click's mark, as above
    from extbridge.network.conversion import Form
    from extbridge.network.convert import convert as convert_texts

    converted = convert_texts({file.name: file.read() for file in files})
    click.echo(converted.write(Form(form)), nl=False)
    for sentence in converted.left_out:
        click.echo(f"left out: {sentence}", err=True)
    if converted.left_out:
        sys.exit(3)


@cli.command()
@_files
def validate(files: tuple[BinaryIO, ...]) -> None:
    """Say whether FILEs (- for standard input) are what the plugin takes, or each fault's place.

    These are definitions of networks (XML, YAML, JSON), CNI configurations and lists with
    extbridge, NetworkAttachmentDefinitions with it, and the ConfigMap extbridge-networks. Nothing
    of the node is looked at; `extbridge networks` and `extbridge doctor` do that. The exit status
    is 1 with any fault.
    """
    from extbridge.network.validate import find_faults

    status = 0
    for file in files:
        faults = find_faults(file.name, file.read())
        for fault in faults:
            click.echo(fault)
            status = 1
        if not faults:
            click.echo(f"{file.name}: ok")
    sys.exit(status)


@cli.command()
def schema() -> None:
    """Print the JSON Schema of a network's definition, for editors to complete it by."""
    from extbridge.network.schema import schema_text

    click.echo(schema_text(), nl=False)


@cli.command()
@_run_dir
@click.option(
    "--networks-dir",
    default="/etc/cni/extbridge.d",
    show_default=True,
    metavar="FOLDER",
    help="Where networks are defined, for configurations that name no networksDir.",
)
@_host_process
@click.option(
    "--metrics-listen",
    metavar="ADDRESS:PORT",
    callback=lambda _, __, given: None if given is None else _address(given),
    help="Serve the metrics over TCP too, to whoever asks there: an IP address of the node's.",
)
@click.option(
    "--device-plugins",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Offer each network to kubelet as the resource extbridge.io/NETWORK. The folder is"
    " kubelet's for device plugins, mostly /var/lib/kubelet/device-plugins.",
)
@click.option(
    "--kubernetes",
    is_flag=True,
    help="Ask the API server about pods, and tell it of their NICs, as this pod's service account.",
)
@click.option(
    "--kubeconfig",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The same, as this file says.",
)
@click.option(
    "--node-name",
    envvar="NODE_NAME",
    metavar="NAME",
    help="The node's name in the cluster; needed with either. Devices are numbered by it, or"
    " else by the host's.",
)
@click.option(
    "--orphans-after",
    type=click.FloatRange(min=1),
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    help="With either: when NICs are freed whose pod is gone, and with which no process works.",
)
@click.option(
    "--conf-dir",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Keep extbridge in the first network of the container runtime's folder, where install"
    " --chained has put it, also when others write that anew.",
)
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text")
def agent(  # noqa: PLR0917 - click calls it, by keyword
    run_dir: Path,
    networks_dir: str,
    host_process: int | None,
    metrics_listen: tuple[str, int] | None,
    device_plugins: Path | None,
    kubeconfig: Path | None,
    node_name: str | None,
    orphans_after: float,
    conf_dir: Path | None,
    log_format: str,
    *,
    kubernetes: bool,
) -> None:
    """Serve this node: answer the CNI shim, hand taps to VM containers."""
    from extbridge.node.compose import run_agent

    reservations = None
    companions: list[Callable[[Metrics], Companion]] = []
    if device_plugins is not None:
        # gRPC is 25 MB that an agent without kubelet does not need.
        from extbridge.kube.device_plugin import DevicePlugins
        from extbridge.reservations import Reservations

        reservations = Reservations(node_name or os.uname().nodename)
        companions.append(
            partial(DevicePlugins, device_plugins, Path(networks_dir), run_dir, reservations)
        )
    if conf_dir is not None:
        from extbridge.node.keeper import Keeper

        companions.append(partial(Keeper, conf_dir))
    cluster = None
    if kubernetes or kubeconfig is not None:
        if not node_name:
            raise click.UsageError(
                "--kubernetes and --kubeconfig need --node-name, or NODE_NAME in the environment"
                " (fieldRef spec.nodeName)"
            )
        from extbridge.kube.cluster import Cluster

        cluster = partial(
            Cluster,
            node=node_name,
            kubeconfig=kubeconfig,
            host_process=host_process,
            orphan_seconds=orphans_after,
        )
    run_agent(
        run_dir,
        networks_dir,
        as_json=log_format == "json",
        host_process=host_process,
        reservations=reservations,
        companions=companions,
        cluster=cluster,
        metrics_address=metrics_listen,
    )


def _no_colour(context: click.Context, _: click.Parameter, value: bool) -> None:  # noqa: FBT001
    """Pipes get none either, and who has set NO_COLOR (no-color.org)."""
    if value or os.environ.get("NO_COLOR"):
        context.color = False


_no_color = click.option(
    "--no-color",
    is_flag=True,
    expose_value=False,
    callback=_no_colour,
    help="No colours; nor into a pipe, or with NO_COLOR set.",
)


def _output(*ways: str) -> Callable[[Command], Command]:
    return click.option("-o", "--output", type=click.Choice(ways), default=ways[0])


def _known(context: click.Context, _: click.Parameter, begun: str) -> list[str]:
    """What `show` could mean, for the shell to complete; nothing where that cannot be known."""
    from extbridge.ledger import Ledger

    try:
        entries = list(Ledger(context.params["run_dir"]).entries())
    except OSError:
        return []
    known = {name for it in entries for name in (it.pod, it.mac, it.container_id) if name}
    return sorted(name for name in known if name.startswith(begun))


@cli.command(name="list")
@_run_dir
@_output("table", "wide", "json", "yaml")
@click.option("--tree", is_flag=True, help="From each NIC to the processes that hold its taps.")
@_no_color
def list_(run_dir: Path, output: str, *, tree: bool) -> None:
    """List this node's attachments: which pod has which NIC, and who holds its tap."""
    from extbridge import console

    if tree and output != "table":
        raise click.UsageError(f"--tree and -o {output} are two ways: choose one")
    told = console.attachments(run_dir)
    if tree:
        console.print_tree(told)
    else:
        console.print_attachments(told, output)


@cli.command()
@_run_dir
@_output("text", "json", "yaml")
@_no_color
@click.argument("which", shell_complete=_known)
def show(run_dir: Path, output: str, which: str) -> None:
    """Show everything about WHICH attachments, and whether they are as they were made.

    WHICH is a pod (namespace/name, or its name), an interface, a MAC, a device's number, or the
    beginning of a container ID.
    """
    from extbridge import console

    told = console.shown(run_dir, which)
    if not told:
        raise click.ClickException(f"there is no attachment {which}; `extbridge list` has them all")
    console.print_shown(told, output)


@cli.command()
@_run_dir
@click.option(
    "--networks-dir",
    metavar="FOLDER",
    help="Where networks are defined; without: where the agent has them.",
)
@_output("table", "json", "yaml")
@_no_color
def networks(run_dir: Path, networks_dir: str | None, output: str) -> None:
    """List the networks that are defined, with their NICs, and what is amiss with them."""
    from extbridge import console

    told = console.defined(run_dir, networks_dir)
    console.print_networks(told, output)


@cli.command()
@_run_dir
@_output("text", "json")
def watch(run_dir: Path, output: str) -> None:
    """Print what happens to attachments, a line each, until interrupted."""
    from extbridge import console

    try:
        for event in console.watched(run_dir):
            console.print_event(event, output)
    except KeyboardInterrupt:
        sys.exit(130)


# What cannot be read is what doctor is to tell of.
_ANYWHERE = click.Path(path_type=Path, readable=False)


@cli.command()
@_run_dir
@click.option(
    "--networks-dir",
    default="/etc/cni/extbridge.d",
    show_default=True,
    metavar="FOLDER",
    help="Where networks are defined.",
)
@click.option(
    "--bin-dir",
    metavar="FOLDER",
    type=_ANYWHERE,
    help="Where the container runtime looks for CNI plugins; mostly, and by default, /opt/cni/bin.",
)
@click.option(
    "--conf-dir",
    metavar="FOLDER",
    type=_ANYWHERE,
    help="Where it looks for network configurations; by default /etc/cni/net.d.",
)
@click.option(
    "--device-plugins",
    metavar="FOLDER",
    type=_ANYWHERE,
    help="kubelet's folder for device plugins. Without: only looked at if extbridge is in it.",
)
@click.option(
    "--probe",
    "nic",
    metavar="NIC",
    help="Ask the switch instead: at most 20 frames, EtherType 0x88B5, from NIC to itself.",
)
@click.option(
    "-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True
)
@_no_color
def doctor(
    *,
    run_dir: Path,
    networks_dir: str,
    bin_dir: Path | None,
    conf_dir: Path | None,
    device_plugins: Path | None,
    nic: str | None,
    output: str,
) -> NoReturn:
    """Look for what is wrong on this node, and say what to do about it.

    Nothing is changed, and no NIC of the node is touched: what the kernel can do is tried in
    namespaces that are removed again. With --probe, two macvtaps are on NIC for a few seconds; they
    tell whether the switch reflects what VEPA sends it, and how long a frame may be.

    The exit status is 1 with a failure, 0 without; warnings are no failures.
    """
    from extbridge.doctor.examination import Places, examine
    from extbridge.doctor.finding import guarded
    from extbridge.doctor.probe import probe
    from extbridge.doctor.report import report
    from extbridge.ledger import Ledger

    if nic is not None:
        findings = guarded(f"probe of {nic}", probe(nic, Ledger(run_dir)))
    else:
        findings = examine(Places(run_dir, networks_dir, bin_dir, conf_dir, device_plugins))
    sys.exit(report(findings, as_json=output == "json"))


@cli.command()
def manual() -> None:
    """Print the manual page, for `man -l -` to show, or for a file extbridge.1."""
    from importlib.metadata import version

    from extbridge.manual import manual_page

    click.echo(manual_page(cli, name="extbridge", version=version("extbridge-cni")), nl=False)


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes SHELL complete this command, for its startup file to evaluate."""
    from click.shell_completion import BashComplete, FishComplete, ZshComplete

    kinds = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}
    click.echo(kinds[shell](cli, {}, "extbridge", "_EXTBRIDGE_COMPLETE").source())


def _address(given: str) -> tuple[str, int]:
    from extbridge.node.sockets import parse_address

    try:
        return parse_address(given)
    except ValueError as error:
        raise click.BadParameter(
            f"{given!r} is no IP address with a port; give 192.0.2.1:9477 or [::]:9477"
        ) from error


def main() -> None:
    """The executable `extbridge`: an error becomes one line and its hint, exit status 1."""
    try:
        cli()
    except (CniError, OSError) as failure:
        error = translate(failure)
        click.echo(f"extbridge: {error.message}", err=True)
        click.echo(f"  {'hint: ' if error.hint else ''}{error.details()}", err=True)
        sys.exit(1)
