"""Ranks as actors of a Ray cluster, on any of its machines; Ray finds their places, starts them and says who has died.

Rank 0 stays in the engine's process, whose machine is a node of the cluster too. A placement group has one bundle for
each rank, a GPU or (on CPUs) a core, packed on as few nodes as can be; ranks follow each other node by node, so the
tensor ranks of a stage are together where they fit. Orders go out over sockets (`parallel.sockets`), collectives over
the nodes' addresses; Ray carries neither. Nothing of ours is pickled but the actor's class, by its name.

    engine                                        actor
    create, up, load, serve            -------->  import torch; "up" is done
    connect, load                                 connect, load; "ready" is done
    Plan, Sample, ... through a socket -------->  forward, sample
    LEAVE                              -------->  "serve" is done
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import ray
from ray.util import get_node_ip_address, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from octavo.config.engine import EngineConfig
from octavo.core.errors import ConfigError, EngineDead
from octavo.engine.ranks import GRACE_SECONDS, OnDeath, Peers
from octavo.parallel.sockets import SocketReader, SocketWriter
from octavo.worker.frames import Start

logger = logging.getLogger("octavo")
THREADS = "OMP_NUM_THREADS"
PLACEMENT_SECONDS = 600.0
"""How long a cluster may take to find places, which may mean to start machines."""
PATIENCE_SECONDS = 10.0
"""How often it is said that they are waited for."""

Ended = tuple[int, str]
"""As a process ends: 0, or 2 for something to correct in the configuration, or 1; and the last words."""


class Rank:
    """The actor. Its methods are called in this order."""

    def up(self, threads: str | None) -> Ended:
        """The engine's own OMP_NUM_THREADS holds here too; Ray's is the number of cores that a bundle counts."""
        os.environ.pop(THREADS, None)
        if threads is not None:
            os.environ[THREADS] = threads
        return 0, ""

    def load(self, frame: bytes, port: int, secret: bytes) -> Ended:
        from octavo.worker.rank import load

        def work() -> None:
            start = msgspec.msgpack.decode(frame, type=Start)
            config = start.config
            if config.load_format != "dummy" and not Path(config.model.path).exists():
                raise ConfigError(
                    f"the model is at {config.model.path}, but node {start.host} has nothing there: every node of the "
                    "cluster needs the model's files at the same path"
                )
            self._worker = load(start)
            self._orders = SocketReader(start.store[0], port, secret)

        return _ended(work)

    def serve(self) -> Ended:
        from octavo.worker.rank import serve

        return _ended(lambda: serve(self._worker, self._orders.read))


def _ended(work: Callable[[], None]) -> Ended:
    try:
        work()
    except ConfigError as error:
        return 2, str(error)
    except Exception as error:
        traceback.print_exc()
        return 1, repr(error)
    return 0, ""


class Actors(Peers):
    """Peers that are actors."""

    cause_seconds = 10.0  # Ray asks a dead actor's node first

    def __init__(self, config: EngineConfig, on_death: OnDeath) -> None:
        from octavo.parallel.comm import open_store

        super().__init__(config.parallel.ranks - 1, on_death)
        self._actors: list[Any] = []
        self._watchers: list[threading.Thread] = []
        self._group: Any = None
        self._orders: SocketWriter | None = None
        self._ours = _attach()
        try:
            address = get_node_ip_address()
            self._group = _reserve(config, address)
            bundles = _bundle_nodes(self._group)
            order = by_node(bundles)
            nodes = [bundles[bundle] for bundle in order]
            addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
            self.store = open_store(address)
            self._orders = SocketWriter(address, self.count)
            starts = [
                Start(rank, config, (address, self.store.port), addresses[node], neighbours_of(nodes, rank))
                for rank, node in enumerate(nodes)
            ]
            self.start = msgspec.structs.replace(starts[0], config=self._of_rank_0(config))
            for start, bundle in list(zip(starts, order, strict=True))[1:]:
                self._create(start, bundle)
        except BaseException:
            self.close()
            raise

    def _of_rank_0(self, config: EngineConfig) -> EngineConfig:
        """The configuration with the GPU of bundle 0."""
        if config.device.kind == "cpu":
            return config
        (gpu,) = ray.get(_task(_gpus, config, self._group, 0).remote())
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        if shown is not None and str(gpu) not in shown.split(","):
            raise ConfigError(
                f"Ray gives rank 0 the GPU {gpu}, but CUDA_VISIBLE_DEVICES is {shown} in the engine's process: unset it"
            )
        return _on_gpu(config, int(gpu) if shown is None else shown.split(",").index(str(gpu)))

    def _create(self, start: Start, bundle: int) -> None:
        assert self._orders is not None
        actor = _task(Rank, start.config, self._group, bundle).remote()
        self._actors.append(actor)
        if start.config.device.kind == "cuda":  # Ray shows an actor its own GPU only
            start = msgspec.structs.replace(start, config=_on_gpu(start.config, 0))
        calls = {
            "up": actor.up.remote(os.environ.get(THREADS)),
            "ready": actor.load.remote(
                msgspec.msgpack.encode(start), self._orders.port, self._orders.secrets[start.rank - 1]
            ),
            "": actor.serve.remote(),
        }
        watcher = threading.Thread(target=self._watch, args=(start.rank, start.host, calls), daemon=True)
        self._watchers.append(watcher)
        watcher.start()

    def _watch(self, rank: int, host: str, calls: dict[str, Any]) -> None:
        who = f"rank {rank} (an actor on node {host})"
        for word, call in calls.items():
            try:
                code, last = ray.get(call)
            except Exception as error:
                self.fall(EngineDead(f"{who} died: {' '.join(str(error).split())}"))
                return
            if code:
                self.fall(ConfigError(last) if code == 2 else EngineDead(f"{who} failed: {last}"))
                return
            self._hear(rank, word)
        self.fall(EngineDead(f"{who} has left"))

    def wait_for(self, word: str) -> None:
        super().wait_for(word)
        if word == "ready" and self._orders is not None:
            self._orders.accept()

    def _write(self, frame: bytes, check: Callable[[], None]) -> None:
        if self._orders is not None:
            self._orders.write(frame, check)

    def _await_end(self) -> None:
        for watcher in self._watchers:
            watcher.join(GRACE_SECONDS)

    def _kill(self) -> None:
        for actor in self._actors:
            with contextlib.suppress(Exception):  # it, or the cluster, may be gone
                ray.kill(actor)

    def _release(self) -> None:
        for watcher in self._watchers:
            watcher.join(GRACE_SECONDS)
        if self._orders is not None:
            self._orders.close()
        if self._group is not None:
            with contextlib.suppress(Exception):
                remove_placement_group(self._group)
        self._actors.clear()
        if self._ours:
            ray.shutdown()


def _attach() -> bool:
    """Connects to the cluster, RAY_ADDRESS's or the one of this machine, or starts one; False if somebody had before.

    Raises ConfigError when there is none at RAY_ADDRESS.
    """
    if ray.is_initialized():
        return False
    try:
        ray.init(address="auto", logging_level=logging.WARNING)
    except ConnectionError as error:
        if "RAY_ADDRESS" in os.environ:
            raise ConfigError(
                f"RAY_ADDRESS is {os.environ['RAY_ADDRESS']!r}, where no Ray cluster answers ({error}): start it, or "
                "unset RAY_ADDRESS"
            ) from None
        logger.info("starting Ray on this machine: there is no cluster to connect to")
        ray.init(address="local", include_dashboard=False, logging_level=logging.WARNING)
    return True


def _reserve(config: EngineConfig, address: str) -> Any:
    """A placement group with a bundle for each rank, that of rank 0 here. Raises ConfigError when there is no place."""
    unit = "GPU" if config.device.kind == "cuda" else "CPU"
    bundles = [{unit: 1.0} for _ in range(config.parallel.ranks)]
    bundles[0][f"node:{address}"] = 0.001
    group = placement_group(bundles, strategy="PACK")
    waited = 0.0
    while not group.wait(PATIENCE_SECONDS if waited else min(1.0, PLACEMENT_SECONDS)):
        total, free = (resources.get(unit, 0.0) for resources in (ray.cluster_resources(), ray.available_resources()))
        have = f"{len(bundles)} {unit}s, one of them on {address}; of {total:g} in the cluster {free:g} are free"
        if waited >= PLACEMENT_SECONDS:
            remove_placement_group(group)
            raise ConfigError(f"Ray has found no place for {have}: add nodes, or lower the parallel sizes")
        logger.warning("waiting for Ray to find %s", have)
        waited += PATIENCE_SECONDS
    return group


def _bundle_nodes(group: Any) -> list[str]:
    """Node id of each bundle."""
    nodes: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    return [nodes[bundle] for bundle in range(len(nodes))]


def by_node(nodes: list[str]) -> list[int]:
    """Bundles in the order of ranks, given each one's node: node by node, beginning with that of bundle 0."""
    first: dict[str, int] = {}
    for bundle, node in enumerate(nodes):
        first.setdefault(node, bundle)
    return sorted(range(len(nodes)), key=lambda bundle: (first[nodes[bundle]], bundle))


def neighbours_of(nodes: list[str], rank: int) -> tuple[int, int]:
    """(index, count) of the rank among those on its node."""
    return nodes[:rank].count(nodes[rank]), nodes.count(nodes[rank])


def _task(work: Any, config: EngineConfig, group: Any, bundle: int) -> Any:
    """The class or function as Ray runs it in the bundle."""
    place = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=bundle)
    unit = {"num_gpus": 1, "num_cpus": 0} if config.device.kind == "cuda" else {"num_cpus": 1}
    return ray.remote(work).options(scheduling_strategy=place, **unit)


def _gpus() -> list[Any]:
    return list(ray.get_gpu_ids())


def _on_gpu(config: EngineConfig, index: int) -> EngineConfig:
    return msgspec.structs.replace(config, device=msgspec.structs.replace(config.device, index=index))
