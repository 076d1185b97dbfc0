"""``liber serve`` and ``liber score``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from liber_runtime.cli.application import StoreOption, TritonOption, application, output
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
) -> None:
    """Start tritonserver, watch and heal it, until SIGTERM or Ctrl-C."""
    from liber_runtime.metrics import registry_of, serve_registry
    from liber_runtime.server import TritonServer, run_until_signalled

    # Triton's models run elsewhere than here, and a store that is not there is better told of before they load.
    url = absolute_url(store or load_settings().store)
    open_store(url, create=False).close()
    server = TritonServer(
        repository,
        log_file=log_file,
        host=host,
        grpc_port=grpc_port,
        http_port=http_port,
        metrics_port=metrics_port,
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
