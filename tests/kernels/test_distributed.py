"""Ranks against one process: the same numbers, and the promised order of events.

gloo on CPUs, and one rank of NCCL where there is a GPU.
"""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from train_job import free_port

BATCH, DIM = 36, 16


def run_ranks(world_size: int, function, *arguments, backend: str = "gloo") -> list:
    """What `function(rank, *arguments)` returned on each of `world_size` ranks."""
    port = free_port()
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    multiprocessing.start_processes(
        _rank_main,
        (world_size, port, results, backend, function, arguments),
        nprocs=world_size,
        start_method="spawn",
    )
    found = dict(results.get() for _ in range(world_size))
    return [found[rank] for rank in range(world_size)]


def _rank_main(rank, world_size, port, results, backend, function, arguments):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    if backend == "gloo":
        os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    import laclip.kernels.testing  # noqa: F401

    dist.init_process_group(backend, rank=rank, world_size=world_size)
    try:
        results.put((rank, function(rank, *arguments)))
        # A rank that leaves while another still talks to it can take that one down (SIGABRT).
        dist.barrier()
    finally:
        dist.destroy_process_group()
    # Python's own end stops threads that wait for its lock; in one of gloo's, C++ then aborts.
    os._exit(0)


def cases():
    for implementation, batch in (("chunked", BATCH), ("triton", BATCH), ("reference", 12)):
        for loss in ("clip", "siglip"):
            for variants in (0, 2):
                for smoothing in (0.0, 0.1) if loss == "clip" else (0.0,):
                    if implementation == "triton" and variants and not smoothing:
                        continue
                    yield implementation, batch, loss, variants, smoothing


def equality_worker(rank: int) -> list[tuple[str, float]]:
    """Largest differences between the ranks' averaged results and one process's, by case."""
    from laclip.kernels import start_gather
    from laclip.kernels.testing import PUBLIC, inputs

    world_size, group = dist.get_world_size(), dist.group.WORLD
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    differences = []
    for implementation, batch, loss, variants, smoothing in cases():
        tensors = inputs(loss, "planted", batch, DIM, torch.float32, device, 15.0, variants)
        image, text, *scalars = tensors
        options = {"label_smoothing": smoothing} if loss == "clip" else {}

        def evaluate(leaves, text_argument, *, loss=loss, options=options, **more):
            image, _, *scalars = leaves
            value = PUBLIC[loss](image, text_argument, *scalars, **options, **more)
            (3 * value).backward()
            return value.detach()

        whole = [tensor.clone().requires_grad_() for tensor in tensors]
        expected = evaluate(whole, whole[1], implementation="reference")
        own = slice(rank * batch // world_size, (rank + 1) * batch // world_size)
        mine = [
            tensor.clone().requires_grad_() for tensor in (image[own], text[..., own, :], *scalars)
        ]
        early = smoothing > 0  # half of the cases gather by hand
        local = mine[1]
        found = evaluate(
            mine,
            start_gather(local, group) if early else local,
            group=None if early else group,
            implementation=implementation,
            chunk_rows=7,
        )
        shared = torch.stack([found, *(scalar.grad for scalar in mine[2:])])
        dist.all_reduce(shared)
        pairs = [
            (shared / world_size, torch.stack([expected, *(leaf.grad for leaf in whole[2:])])),
            (mine[2].grad, whole[2].grad),  # the same on every rank
            (mine[0].grad / world_size, whole[0].grad[own]),
            (mine[1].grad / world_size, whole[1].grad[..., own, :]),
        ]
        worst = max(float((a - b).norm() / b.norm()) for a, b in pairs)
        differences.append((f"{implementation} {loss} {variants} {smoothing}", worst))
    return differences


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_averaged_ranks_equal_one_process(world_size):
    for differences in run_ranks(world_size, equality_worker):
        assert len(differences) == 16
        assert [case for case in differences if not case[1] < 1e-5] == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_rank_on_a_gpu_equals_one_process():
    (differences,) = run_ranks(1, equality_worker, backend="nccl")
    assert [case for case in differences if not case[1] < 1e-5] == []


def fallback_worker(rank: int) -> tuple[int, float]:
    """This rank's flag, and its largest error, where rank 0 alone must fall back."""
    from laclip.kernels import clip_loss, triton_blocks
    from laclip.kernels.testing import inputs, relative_error, truth

    image, text, scale = inputs("clip", "opposite", 32, 32, torch.float32, "cpu", 100.0)
    image[16:] = inputs("clip", "random", 32, 32, torch.float32, "cpu", 100.0)[0][16:]
    exact = truth("clip", [image, text, scale])
    own = slice(rank * 16, rank * 16 + 16)
    mine = [tensor.clone().requires_grad_() for tensor in (image[own], text[own], scale)]
    pairs = triton_blocks.pair_cosines(image[own], text[own])
    flag = triton_blocks.log_sums(image[own], text, scale, pairs, rank * 16, 4096)[2]
    loss = clip_loss(*mine, group=dist.group.WORLD, implementation="triton")
    loss.backward()
    shared = torch.stack([loss.detach(), mine[2].grad])
    dist.all_reduce(shared)
    errors = [
        relative_error(shared / 2, torch.stack([exact[0], exact[3]])),
        relative_error(mine[0].grad / 2, exact[1][own]),
        relative_error(mine[1].grad / 2, exact[2][own]),
    ]
    return int(flag), max(errors)


def test_one_rank_may_fall_back_alone():
    (first_flag, first_error), (second_flag, second_error) = run_ranks(2, fallback_worker)
    assert (first_flag, second_flag) == (1, 0)
    assert max(first_error, second_error) < 2e-5


SCALARS = {"clip": [5.0], "siglip": [5.0, -1.0]}  # of each loss


def events_worker(rank: int) -> dict[str, list[str]]:
    """The order in which the towers run and the network is started and awaited, by loss."""
    from laclip.kernels import gather, start_gather
    from laclip.kernels.testing import PUBLIC

    events: list[str] = []

    class Watched:
        def __init__(self, name, work):
            self.name, self.work = name, work

        def wait(self):
            events.append(f"{self.name} awaited")
            return self.work.wait()

    def watch(name, start):
        def started(*arguments, **options):
            work = start(*arguments, **options)
            if not options.get("async_op"):
                return work
            events.append(f"{name} started")
            return Watched(name, work)

        return started

    gather._all_gather = watch("gather", gather._all_gather)
    gather._reduce_scatter = watch("scatter", gather._reduce_scatter)
    towers = {name: torch.nn.Linear(8, DIM) for name in ("text", "image")}
    for name, tower in towers.items():
        tower.register_forward_hook(lambda *_, name=name: events.append(f"{name} forward"))
        tower.register_full_backward_hook(lambda *_, name=name: events.append(f"{name} backward"))
    found = {}
    for loss in SCALARS:
        events.clear()
        inputs = torch.randn(6, 8)
        text = towers["text"](inputs.clone().requires_grad_())
        gathered = start_gather(text, dist.group.WORLD)
        image = towers["image"](inputs.clone().requires_grad_())
        scalars = map(torch.tensor, SCALARS[loss])
        PUBLIC[loss](image, gathered, *scalars, implementation="chunked").backward()
        found[loss] = list(events)
    return found


def test_the_network_runs_under_the_image_tower():
    expected = [
        "text forward",
        "gather started",
        "image forward",
        "gather awaited",
        "scatter started",
        "image backward",
        "scatter awaited",
        "text backward",
    ]
    for found in run_ranks(2, events_worker):
        assert found == {"clip": expected, "siglip": expected}


def freed_worker(rank: int) -> dict[str, bool]:
    """Whether gathered features are gone with the step, without a search for cycles, by loss."""
    import gc
    import weakref

    from laclip.kernels import start_gather
    from laclip.kernels.testing import PUBLIC

    gc.disable()
    found = {}
    for loss in SCALARS:
        gathered = start_gather(torch.randn(6, DIM, requires_grad=True), dist.group.WORLD)
        watched = weakref.ref(gathered)
        scalars = map(torch.tensor, SCALARS[loss])
        value = PUBLIC[loss](torch.randn(6, DIM), gathered, *scalars, implementation="chunked")
        value.backward()
        del gathered, value
        found[loss] = watched() is None
    return found


def test_gathered_features_are_freed_with_the_step():
    assert run_ranks(1, freed_worker) == [{"clip": True, "siglip": True}]


def disagreement_worker(rank: int) -> list[str]:
    """The messages of calls on which the ranks disagree, each in a group of its own."""
    from laclip.kernels import clip_loss, start_gather

    scale = torch.tensor(5.0)
    odd = rank == 1
    attempts = [
        lambda group: clip_loss(*2 * [torch.ones(4 + odd, 8)], scale, group=group),
        lambda group: clip_loss(
            torch.ones(4, 8 << odd), torch.ones(4, 8 << odd), scale, group=group
        ),
        lambda group: start_gather(torch.ones(4 - 4 * odd, 8), group),
        lambda group: start_gather(torch.ones(*([2] if odd else []), 4, 8), group),
        lambda group: start_gather(torch.ones(4, 8).to(torch.bfloat16 if odd else None), group),
    ]
    messages = []
    for attempt in attempts:
        try:
            attempt(dist.new_group())
            messages.append("accepted")
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_ranks_that_disagree_are_refused_on_all_ranks():
    found = run_ranks(2, disagreement_worker)
    assert found[0] == found[1]
    assert all("the ranks disagree" in message for message in found[0])
    assert "rank 0: [4, 8], rank 1: [5, 8]" in found[0][0]
