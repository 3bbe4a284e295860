"""A plan drawn by Ray: an actor a GPU, or a CPU where there is none, takes shard after shard.

The shards' files say what is done, so that Ray has nothing to remember. ray, of the extra `ray`, is imported where a
run begins only.
"""

import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from .options import GenerateOptions, ShardOptions
from .plan_table import Plan
from .shards import RUN, Progress, Run, begin, draw_shards, prepare
from .storage import Storage, is_url
from .write import progress_bar


MOST_DEATHS = 3  # of actors at one shard, which may be what kills them


class Drawer:
    """What an actor is: a pipeline that draws shards. Arguments as of `generate_shards`."""

    def __init__(self, plan: Plan, output: str, options: GenerateOptions, shards: ShardOptions):
        self.output, self.arguments = output, (plan, output, options, shards)

    @cached_property
    def run(self) -> Run:
        return prepare(*self.arguments)[0]

    def load(self) -> None:
        assert self.run

    def begin(self) -> None:
        begin(self.run)

    def draw(self, index: int) -> Progress:
        """Draws one shard, unless it is there, of a run that an actor has begun."""
        check_shared(self.output)
        return draw_shards(self.run, range(index, index + 1), quiet=True)


def generate_on_ray(
    plan: Plan, output: str | Path, options: GenerateOptions | None = None, shards: ShardOptions | None = None
) -> Progress:
    """As `generate_shards`, by the actors of a Ray cluster, that of `shards.ray`.

    The bits are the same on devices of one class; on a CPU an actor has one thread, and more add up in another order.
    An actor that dies is replaced, and its shard drawn by whichever is free first. Where Ray runs already in this
    process, that is used and stays.

    Raises:
        ValueError: as `generate_shards`; or `output` is a folder that the machines of the cluster do not share.
        OSError: as `generate_shards`; or there is no such cluster, or actors die again and again.
        ImportError: Ray is not installed.
    """
    options, shards = options or GenerateOptions(), shards or ShardOptions()
    output = str(output) if is_url(output) else str(Path(output).absolute())
    part, parts = shards.part
    indices = range(-(-len(plan) // shards.size))[part::parts]
    with cluster(shards.ray, options.quiet) as ray:
        resources = ray.cluster_resources()
        gpus = 0 if options.device == "cpu" else int(resources.get("GPU", 0))
        kind = ray.remote(**({"num_gpus": 1} if gpus else {"num_cpus": 1}))(Drawer)
        start = partial(kind.remote, ray.put(plan), output, options, shards)
        actors = [start() for _ in range(min(gpus or int(resources["CPU"]), len(indices)))]
        try:
            with progress_bar(len(indices) * shards.size, options.quiet) as bar:
                return draw_in_turn(actors, start, indices, output, partial(bar.update, shards.size))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError as error:
            raise OSError(f"Ray gave up: {' '.join(str(error).split())}") from error
        finally:
            for actor in actors:
                ray.kill(actor)


def draw_in_turn(
    actors: list[Any], start: Callable[[], Any], indices: range, output: str, then: Callable[[], object]
) -> Progress:
    """Has the shards `indices` drawn by `actors`, each by one that is free; `then` is called after every one.

    An actor that dies is replaced in that list by what `start` gives. Nothing waits for one that cannot come back, as
    where a machine is lost, while there are others.
    """
    import ray

    result, waiting, deaths, begun = Progress(), deque(indices), Counter[int | None](), False
    free = list[Any]()
    busy: dict[Any, tuple[Any, int | None]] = {actor.load.remote(): (actor, None) for actor in actors}
    while waiting or any(index is not None for _, index in busy.values()):
        (done,), _ = ray.wait(list(busy))
        actor, index = busy.pop(done)
        try:
            found = ray.get(done)
            if not begun:
                ray.get(actor.begin.remote())
                check_shared(output)
                begun = True
        except ray.exceptions.RayActorError:
            deaths[index] += 1
            if deaths[index] == MOST_DEATHS:
                raise
            if index is not None:
                waiting.appendleft(index)
            actors.remove(actor)
            actors.append(start())
            busy[actors[-1].load.remote()] = actors[-1], None
        else:
            del deaths[index]
            free.append(actor)
            if index is not None:
                result.add(found)
                then()
        while free and waiting:
            actor, index = free.pop(), waiting.popleft()
            busy[actor.draw.remote(index)] = actor, index
    result.short.sort()
    return result


@contextmanager
def cluster(address: str | None, quiet: bool) -> Iterator[Any]:
    """The module `ray`, connected to a cluster, or to one of this machine alone that ends with the run.

    Args:
        address: `host:port` or `ray://host:port`; empty or None for the cluster that this machine is of, if any.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("--ray needs Ray: pip install 'minim-pipeline[ray]'.") from error
    if ray.is_initialized():
        yield ray
        return
    if address:
        check_answers(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to anybody
    ray.init(address or None, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=not quiet)
    try:
        yield ray
    finally:
        ray.shutdown()


def check_answers(address: str) -> None:
    """Raises ConnectionError if nothing is there: Ray would try for minutes, and end the process then."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ConnectionError(f"No Ray cluster answers at {address}: {error}.") from error


def check_shared(output: str) -> None:
    """Raises ValueError if what an actor has begun in `output` is not to be seen on this machine."""
    if not Storage(output).exists(RUN):
        where = f"{output} on {socket.gethostname()} is not where the others of the cluster write"
        raise ValueError(f"{where}: --output-dir has to be a folder that all share, or a URL.")
