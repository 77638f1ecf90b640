"""Octavo behind Ray Serve: replicas of the whole server that come and go with the load.

Each replica is an engine with Octavo's own HTTP application in front, so every route and every stream is as
`octavo serve` has it; Serve's proxies share the requests out. Flags are the engine's, and a few of Serve's:

    python examples/ray_serve.py MODEL --max-replicas 4 --gpus-per-replica 1 --port 8000
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from ray import serve
from ray.serve.config import AutoscalingConfig, HTTPOptions

from octavo.cli.serve import KEY_VARIABLE
from octavo.config import EngineArgs
from octavo.config.flags import add_engine_flags, parse_given
from octavo.formats.locate import DEFAULT_MODEL
from octavo.server.backend import ServerSettings

if TYPE_CHECKING:
    from starlette.applications import Starlette

DRAIN_SECONDS = 600
"""For a replica that is no longer needed to finish its requests; Serve's own 20 s would cut long ones off."""


@serve.ingress()
class Octavo:
    """A replica. Serve starts it in its event loop, builds the application, asks for its health and ends it."""

    async def __init__(self, engine: EngineArgs, settings: ServerSettings) -> None:  # type: ignore[misc]
        from octavo.frontend import AsyncLLM

        self.llm = await AsyncLLM.start(engine)
        self.settings = settings

    def __serve_build_asgi_app__(self) -> Starlette:
        from octavo.server.app import create_app

        return create_app(self.llm, self.settings)

    async def check_health(self) -> None:
        """Serve replaces a replica whose engine has died."""
        await self.llm.check_health()

    async def __del__(self) -> None:
        if hasattr(self, "llm"):  # not if it has failed to start
            await self.llm.shutdown()


def parser_of_flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_flags(parser)
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", metavar="TEXT", help="Address to listen on (127.0.0.1)")
    server.add_argument("--port", type=int, default=8000, metavar="N", help="Port to listen on (8000)")
    server.add_argument(
        "--api-key",
        nargs="+",
        default=[],
        metavar="TEXT",
        help=f"Keys of which a client must send one; also from {KEY_VARIABLE}",
    )
    server.add_argument("--served-model-name", nargs="+", default=[], metavar="TEXT", help="Names of the model")
    group = parser.add_argument_group("replicas")
    group.add_argument("--min-replicas", type=int, default=1, metavar="N", help="Fewest replicas (1)")
    group.add_argument("--max-replicas", type=int, default=2, metavar="N", help="Most replicas (2)")
    group.add_argument(
        "--target-ongoing-requests",
        type=float,
        default=32,
        metavar="X",
        help="Requests in flight in each replica from which one more is started (32)",
    )
    group.add_argument(
        "--upscale-delay",
        type=float,
        default=5,
        metavar="S",
        help="Seconds above the target before one more starts (5)",
    )
    group.add_argument(
        "--downscale-delay", type=float, default=60, metavar="S", help="Seconds below it before one ends (60)"
    )
    group.add_argument("--gpus-per-replica", type=int, default=0, metavar="N", help="GPUs that Ray gives each (0)")
    group.add_argument("--cpus-per-replica", type=int, default=1, metavar="N", help="CPUs that Ray gives each (1)")
    return parser


def main() -> None:
    flags = parser_of_flags().parse_args()
    engine, _, dropped = parse_given(flags)
    for line in dropped:
        print(line, file=sys.stderr)
    settings = ServerSettings(
        served_model_names=tuple(flags.served_model_name) or (engine.model or DEFAULT_MODEL,),
        api_keys=tuple(flags.api_key or filter(None, [os.environ.get(KEY_VARIABLE)])),
    )
    deployment = serve.deployment(Octavo).options(
        autoscaling_config=AutoscalingConfig(
            min_replicas=flags.min_replicas,
            max_replicas=flags.max_replicas,
            target_ongoing_requests=flags.target_ongoing_requests,
            upscale_delay_s=flags.upscale_delay,
            downscale_delay_s=flags.downscale_delay,
        ),
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        max_ongoing_requests=max(int(8 * flags.target_ongoing_requests), 1),  # beyond it requests wait in Serve
        ray_actor_options={"num_cpus": flags.cpus_per_replica, "num_gpus": flags.gpus_per_replica},
    )
    serve.start(http_options=HTTPOptions(host=flags.host, port=flags.port))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's own would end its processes under the requests
    try:
        serve.run(deployment.bind(engine, settings), name="octavo", blocking=True)
    except KeyboardInterrupt:
        pass
    finally:
        with suppress(TimeoutError):  # requests in flight have a minute
            serve.delete("octavo")  # so that nothing stays on a cluster that outlives this process


if __name__ == "__main__":
    main()
