"""The shards of a run on a Ray cluster: a task a shard, an engine a worker."""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from laclip.rewrite.captions import CaptionShard
from laclip.rewrite.engine import EngineSettings, build_engine
from laclip.rewrite.job import Plan, rewrite_shards


def rewrite_on_ray(
    shards: list[CaptionShard], plan: Plan, settings: EngineSettings
) -> Iterator[dict]:
    """As `job.rewrite_shards`, on the cluster of RAY_ADDRESS or a local one.

    Captions and the run's folder must lie on a file system that every node sees. With the engine
    transformers a task takes a GPU, where the cluster has any. A shard whose worker died is tried
    again by Ray, and goes on from its part.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise ValueError("--ray needs the package ray. Run: pip install 'laclip[ray]'") from None
    plan = replace(plan, folder=plan.folder.resolve())
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, include_dashboard=False)
    try:
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0)) if settings.engine == "transformers" else 0
        task = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0)(rewrite_shard)
        window = 2 * (gpus or max(1, int(resources.get("CPU", 1))))
        waiting = iter(shards)
        running: dict = {}
        while True:
            while len(running) < window and (shard := next(waiting, None)) is not None:
                placed = replace(shard, path=shard.path.resolve())
                running[task.remote(placed, plan, settings)] = shard
            if not running:
                return
            done, _ = ray.wait(list(running))
            for reference in done:
                shard = running.pop(reference)
                try:
                    yield ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                except ray.exceptions.WorkerCrashedError as error:
                    yield {"shard": shard.name, "problem": f"its workers died: {error}"}
    finally:
        if started:
            ray.shutdown()


def rewrite_shard(shard: CaptionShard, plan: Plan, settings: EngineSettings) -> dict:
    """What a worker does: one shard; returns its counts, or its problem."""
    results = list(rewrite_shards([shard], plan, _engine(settings)))
    return results[0] if results else {"shard": shard.name, "problem": "another process has it"}


@lru_cache(maxsize=1)
def _engine(settings: EngineSettings):
    """A worker loads its model once."""
    return build_engine(settings)
