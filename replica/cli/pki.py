"""`replica pki`: a private certificate authority, enough for two sites that trust each other and nobody else."""

from __future__ import annotations

from pathlib import Path

import click

from replica.cli.command import Command


@click.group()
def pki() -> None:
    """Make the certificates that the two sites know each other by.

    Keep the authority's key (ca.key) offline once all certificates are issued:
    whoever holds it can be any primary and any receiver.
    """


@pki.command(cls=Command)
@click.argument("directory", type=click.Path(path_type=Path))
def init(directory: Path) -> None:
    """Make a certificate authority in DIRECTORY: ca.crt and ca.key.

    \b
    Example:
      replica pki init pki/
    """
    from replica.transport.pki import init as make_authority

    make_authority(directory)
    click.echo(f"made the certificate authority {directory / 'ca.crt'}; keep {directory / 'ca.key'} secret and safe")


@pki.command(cls=Command)
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("name")
@click.option(
    "--host", "hosts", multiple=True, help="A DNS name or IP address a receiver is reached at; may be given repeatedly."
)
def issue(directory: Path, name: str, hosts: tuple[str, ...]) -> None:
    """Issue a certificate for NAME: DIRECTORY/NAME.crt and NAME.key.

    NAME is the identity the other side sees: what `[[allow]] primary` patterns
    match, and the owner of a primary's replicas.

    \b
    Examples:
      replica pki issue pki/ dr-1 --host dr-1.example.org --host 192.0.2.7     a receiver
      replica pki issue pki/ hv-1                                              a primary
    """
    from replica.transport.pki import issue as issue_certificate

    issue_certificate(directory, name, hosts)
    click.echo(f"issued {directory / f'{name}.crt'} with its key {directory / f'{name}.key'}")
