"""``liber serve`` and ``liber score``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from liber_runtime.cli.application import StoreOption, TritonOption, application, output, quiet_grpc
from liber_runtime.memory import absolute_url, open_store
from liber_runtime.settings import load_settings


@application.command()
def serve(
    repository: Annotated[Path, typer.Option(help="Model repository that `liber build --repository` published into.")],
    store: StoreOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    grpc_port: Annotated[int, typer.Option(help="0 lets the system choose.")] = 8001,
    http_port: Annotated[int, typer.Option(help="0 lets the system choose.")] = 8000,
    metrics_port: Annotated[int, typer.Option(help="Triton's own. 0 lets the system choose.")] = 8002,
    supervisor_metrics_port: Annotated[
        int, typer.Option(help="Serve Prometheus metrics of what was restarted on this port; 0 for none.")
    ] = 0,
    log_file: Annotated[Path, typer.Option(help="Triton's own log.")] = Path("runs/triton.log"),
    tls_certificate: Annotated[
        Path | None,
        typer.Option(
            envvar="LIBER_SERVER_TLS_CERTIFICATE",
            help="Serve gRPC over TLS only, with this certificate (PEM); HTTP, without TLS, to this machine only.",
        ),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(envvar="LIBER_SERVER_TLS_KEY", help="The certificate's private key (PEM).")
    ] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(
            envvar="LIBER_SERVER_TLS_CLIENT_CA",
            help="Serve those callers alone whose certificate one of these authorities has issued (PEM).",
        ),
    ] = None,
) -> None:
    """Start tritonserver, watch and heal it, until SIGTERM or Ctrl-C.

    With a key in LIBER_CONTROL_KEY, or in the file that LIBER_CONTROL_KEY_FILE names, model control asks for it.
    """
    from liber_runtime.metrics import registry_of, serve_registry
    from liber_runtime.server import Security, TritonServer, run_until_signalled

    settings = load_settings()
    security = Security(tls_certificate, tls_key, tls_client_ca, settings.read_control_key())
    # Triton's models run elsewhere than here, and a store that is not there is better told of before they load.
    url = absolute_url(store or settings.store)
    open_store(url, create=False).close()
    server = TritonServer(
        repository,
        log_file=log_file,
        host=host,
        grpc_port=grpc_port,
        http_port=http_port,
        metrics_port=metrics_port,
        security=security,
        environment={"LIBER_STORE": url},
    )

    if supervisor_metrics_port:
        serve_registry(registry_of(server), supervisor_metrics_port, host)

    def announce(ready: TritonServer) -> None:
        output.print(
            f"ready: gRPC {ready.grpc_url}, HTTP {ready.http_url}, metrics {ready.metrics_url}", soft_wrap=True
        )

    run_until_signalled(server, announce)


@application.command()
def score(
    user: Annotated[str, typer.Argument(help="User id.")],
    items: Annotated[list[str], typer.Argument(help="Item ids, the candidates.")],
    triton: TritonOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score candidates for a user, best first."""
    quiet_grpc()
    from liber_runtime.scoring import ScoringClient

    with ScoringClient(triton) as client:
        scores = client.score(user, items)
    order = np.argsort(-scores.probability, kind="stable")
    if as_json:
        ranked = [{"item": items[place], "click_probability": float(scores.probability[place])} for place in order]
        typer.echo(
            json.dumps(
                {
                    "user": user,
                    "ranking": ranked,
                    "unknown_users": scores.unknown_users,
                    "unknown_items": scores.unknown_items,
                }
            )
        )
        return
    table = Table(
        "item", "click probability", title=f"user {user}" + (" (nothing known)" if scores.unknown_users else "")
    )
    for place in order:
        unknown = " (not in the catalogue)" if items[place] in scores.unknown_items else ""
        table.add_row(f"{items[place]}{unknown}", f"{scores.probability[place]:.4f}")
    output.print(table)
