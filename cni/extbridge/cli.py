"""The command line, `extbridge`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn

import click

from extbridge.spec.errors import CniError
from extbridge.spec.skel import translate

if TYPE_CHECKING:
    from extbridge.node.agent import Companion
    from extbridge.node.metrics import Metrics


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
@click.option("--shim-only", is_flag=True, help="The executables and nothing else.")
def install(
    bin_dir: Path, conf_dir: Path | None, conflist: Path | None, *, chained: bool, shim_only: bool
) -> None:
    """Put the CNI plugin `extbridge` and the launcher `extbridge-exec` into a node's folder.

    Done twice it is done once. What was in the folders before is given back by uninstall.
    """
    from extbridge.node import conflist as configurations
    from extbridge.node.install import install_shim

    if (conf_dir is not None) != (chained or conflist is not None) or (conf_dir and shim_only):
        raise click.UsageError("--conf-dir goes with --chained or --conflist, and they with it")
    if chained and conflist is not None:
        raise click.UsageError("--chained and --conflist are two ways: choose one")
    if conf_dir is None:
        install_shim(bin_dir)
        return
    prepared = (
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


@cli.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.File("rb"))
def convert(files: tuple[BinaryIO, ...]) -> None:
    """Print, as YAML, the networks that macvtap-cni has in FILEs (- for standard input).

    These are its ConfigMap and NetworkAttachmentDefinitions, as kubectl prints or takes them. What
    cannot be carried over is said on standard error, and the exit status is 3 then.
    """
    from extbridge.network.convert import convert as convert_texts

    converted = convert_texts({file.name: file.read() for file in files})
    click.echo(converted.to_yaml(), nl=False)
    for sentence in converted.left_out:
        click.echo(f"left out: {sentence}", err=True)
    if converted.left_out:
        sys.exit(3)


@cli.command()
@click.option(
    "--run-dir",
    envvar="EXTBRIDGE_RUN",
    default="/run/extbridge",
    show_default=True,
    metavar="FOLDER",
    help="Where sockets, ledger and spool are.",
)
@click.option(
    "--networks-dir",
    default="/etc/cni/extbridge.d",
    show_default=True,
    metavar="FOLDER",
    help="Where networks are defined, for configurations that name no networksDir.",
)
@click.option(
    "--host-process",
    type=click.IntRange(min=1),
    metavar="PID",
    help="For an agent in a container: a process of the host, mostly 1, in whose mount namespace"
    " IPAM plugins are run.",
)
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
    help="The node's name in the cluster; needed with either.",
)
@click.option(
    "--orphans-after",
    type=click.FloatRange(min=1),
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    help="With either: when NICs are freed whose pod is gone, and with which no process works.",
)
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text")
def agent(  # noqa: PLR0917 - click calls it, by keyword
    run_dir: str,
    networks_dir: str,
    host_process: int | None,
    metrics_listen: tuple[str, int] | None,
    device_plugins: Path | None,
    kubeconfig: Path | None,
    node_name: str | None,
    orphans_after: float,
    log_format: str,
    *,
    kubernetes: bool,
) -> None:
    """Serve this node: answer the CNI shim, hand taps to VM containers."""
    from extbridge.node.compose import run_agent

    run = Path(run_dir)
    reservations = None
    companions: list[Callable[[Metrics], Companion]] = []
    if device_plugins is not None:
        # gRPC is 25 MB that an agent without kubelet does not need.
        from extbridge.kube.device_plugin import DevicePlugins
        from extbridge.reservations import Reservations

        reservations = Reservations(os.uname().nodename)
        companions.append(
            partial(DevicePlugins, device_plugins, Path(networks_dir), run, reservations)
        )
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
        run,
        networks_dir,
        as_json=log_format == "json",
        host_process=host_process,
        reservations=reservations,
        companions=companions,
        cluster=cluster,
        metrics_address=metrics_listen,
    )


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
