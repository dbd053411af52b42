"""The command line, `extbridge`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

import click

from extbridge.spec.errors import CniError
from extbridge.spec.skel import translate


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


@cli.command()
@click.option(
    "--shim-only",
    is_flag=True,
    required=True,
    expose_value=False,
    help="Nothing but these executables: the only way so far.",
)
@click.option(
    "--bin-dir",
    required=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Where the container runtime looks for CNI plugins.",
)
def install(bin_dir: Path) -> None:
    """Put the CNI plugin `extbridge` and the launcher `extbridge-exec` into DIR."""
    from extbridge.node.install import install_shim

    install_shim(bin_dir)


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
    help="Serve the metrics over TCP too, to whoever asks there: an IP address of the node's.",
)
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text")
def agent(
    run_dir: str,
    networks_dir: str,
    host_process: int | None,
    metrics_listen: str | None,
    log_format: str,
) -> None:
    """Serve this node: answer the CNI shim, hand taps to VM containers."""
    from extbridge.node.compose import run_agent
    from extbridge.node.sockets import parse_address

    try:
        metrics_address = parse_address(metrics_listen) if metrics_listen is not None else None
    except ValueError as error:
        raise click.BadParameter(
            f"{metrics_listen!r} is no IP address with a port; give 192.0.2.1:9477 or [::]:9477",
            param_hint="--metrics-listen",
        ) from error
    run_agent(
        Path(run_dir),
        networks_dir,
        as_json=log_format == "json",
        host_process=host_process,
        metrics_address=metrics_address,
    )


def main() -> None:
    """The executable `extbridge`: an error becomes one line and its hint, exit status 1."""
    try:
        cli()
    except (CniError, OSError) as failure:
        error = translate(failure)
        click.echo(f"extbridge: {error.message}", err=True)
        click.echo(f"  hint: {error.details()}", err=True)
        sys.exit(1)
