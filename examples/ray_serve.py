"""Octavo behind Ray Serve: replicas of the whole server that come and go with the load.

Each replica is an engine with Octavo's own HTTP application in front, so every route and every stream is as `octavo
serve` has it; Serve's proxies share the requests out. Flags are those of `octavo serve`, and a few of Serve's:

    python examples/ray_serve.py MODEL --max-replicas 4 --gpus-per-replica 1 --port 8000
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from ray import serve
from ray.serve.config import AutoscalingConfig, HTTPOptions

from octavo.config import EngineArgs
from octavo.config.flags import add_engine_flags, add_server_flags, parse_given
from octavo.server.backend import ServerSettings

if TYPE_CHECKING:
    from starlette.applications import Starlette


@serve.deployment
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_flags(parser)
    add_server_flags(parser)
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
    group.add_argument("--gpus-per-replica", type=int, default=0, metavar="N", help="GPUs that Ray gives each (0)")
    group.add_argument("--cpus-per-replica", type=int, default=1, metavar="N", help="CPUs that Ray gives each (1)")
    flags = parser.parse_args()
    engine, server, dropped = parse_given(flags)
    for line in dropped:
        print(line, file=sys.stderr)
    settings = ServerSettings(
        served_model_names=server.served_model_name or (engine.model or "default",),
        api_keys=server.api_key,
        tool_call_parser=server.tool_call_parser,
        reasoning_parser=server.reasoning_parser,
    )
    deployment = Octavo.options(
        autoscaling_config=AutoscalingConfig(
            min_replicas=flags.min_replicas,
            max_replicas=flags.max_replicas,
            target_ongoing_requests=flags.target_ongoing_requests,
            upscale_delay_s=5,
            downscale_delay_s=60,
        ),
        max_ongoing_requests=int(8 * flags.target_ongoing_requests),  # beyond it requests wait in Serve
        ray_actor_options={"num_cpus": flags.cpus_per_replica, "num_gpus": flags.gpus_per_replica},
    )
    serve.start(http_options=HTTPOptions(host=server.host, port=server.port))
    serve.run(deployment.bind(engine, settings), name="octavo", blocking=True)


if __name__ == "__main__":
    main()
