"""Tasks on a Ray cluster: the one of RAY_ADDRESS, or a local one."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any


def run_on_ray(
    function: Callable[..., Any],
    tasks: Iterable[tuple],
    *,
    use_gpus: bool = False,
    lost: Callable[[int, Exception], Any] | None = None,
) -> Iterator[tuple[int, Any]]:
    """(i, function(*task i)) of every task, as they end; the first exception of one is raised.

    Ray tries a task again whose worker died. use_gpus: a task takes a GPU, where the cluster has
    any. lost(i, error): a result in place of one that Ray has given up.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise ValueError("--ray needs the package ray. Run: pip install 'laclip[ray]'") from None
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, include_dashboard=False)
    try:
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0)) if use_gpus else 0
        remote = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0)(function)
        window = 2 * (gpus or max(1, int(resources.get("CPU", 1))))
        waiting = iter(enumerate(tasks))
        running: dict[Any, int] = {}
        while True:
            while len(running) < window and (item := next(waiting, None)) is not None:
                running[remote.remote(*item[1])] = item[0]
            if not running:
                return
            done, _ = ray.wait(list(running))
            for reference in done:
                index = running.pop(reference)
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                except ray.exceptions.WorkerCrashedError as error:
                    if lost is None:
                        raise
                    result = lost(index, error)
                yield index, result
    finally:
        if started:
            ray.shutdown()
