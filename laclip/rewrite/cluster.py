"""The shards of a run on a Ray cluster: a task a shard, an engine a worker."""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from laclip.ray_tasks import run_on_ray
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
    plan = replace(plan, folder=plan.folder.resolve())
    tasks = ((replace(shard, path=shard.path.resolve()), plan, settings) for shard in shards)

    def lost(index: int, error: Exception) -> dict:
        return {"shard": shards[index].name, "problem": f"its workers died: {error}"}

    use_gpus = settings.engine == "transformers"
    for _, result in run_on_ray(rewrite_shard, tasks, use_gpus=use_gpus, lost=lost):
        yield result


def rewrite_shard(shard: CaptionShard, plan: Plan, settings: EngineSettings) -> dict:
    """What a worker does: one shard; returns its counts, or its problem."""
    results = list(rewrite_shards([shard], plan, _engine(settings)))
    return results[0] if results else {"shard": shard.name, "problem": "another process has it"}


@lru_cache(maxsize=1)
def _engine(settings: EngineSettings):
    """A worker loads its model once."""
    return build_engine(settings)
