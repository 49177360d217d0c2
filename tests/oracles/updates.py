"""Trains as a run of laclip did, with open_clip's own model, loss, loop and schedule.

python requirements/oracles.py tests/oracles/updates.py RUN WEIGHTS

RUN: the folder of a finished run that began with WEIGHTS and had no warm-up. The batches are those
of laclip's loader. Prints the losses, and how far open_clip's weights end from the run's, as a
share of the way that they went, as JSON.
"""

import json
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import open_clip
import torch
from open_clip_train.scheduler import cosine_lr
from open_clip_train.train import train_one_epoch
from originals import open_clip_model
from torch.nn.utils.rnn import pad_sequence

from laclip.config import load_config
from laclip.convert import from_laclip, read_checkpoint
from laclip.dataset import open_dataset
from laclip.loader import Loader
from laclip.tokenizer import load_tokenizer


def main() -> None:
    run, first = Path(sys.argv[1]), from_laclip(read_checkpoint(sys.argv[2]), "open_clip")
    config = load_config(run / "config.toml")
    siglip, context_length = config.train.loss == "siglip", config.model.text.context_length
    steps, batch = config.train.steps, config.train.global_batch_size
    model = open_clip_model(config.model, init_logit_bias=0.0 if siglip else None, output_dict=True)
    model.load_state_dict(first)
    # The groups of open_clip_train.main, which makes them where nothing else can call it.
    plain = {
        name
        for name, p in model.named_parameters()
        if p.ndim < 2 or any(word in name for word in ("bn", "ln", "bias", "logit_scale"))
    }
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in model.named_parameters() if n in plain], "weight_decay": 0.0},
            {"params": [p for n, p in model.named_parameters() if n not in plain]},
        ],
        lr=config.optimizer.lr,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
    )
    loader = Loader(
        [open_dataset(folder) for folder in config.data.train],
        config.data,
        load_tokenizer(),
        seed=config.run.seed,
        global_batch_size=batch,
        image_size=config.model.vision.image_size,
        context_length=context_length,
        device=torch.device("cpu"),
    )

    class Batches:
        num_batches, num_samples = steps, steps * batch

        def __iter__(self):
            for _, loaded in zip(range(steps), loader):
                captions = loaded.captions.token_ids.split(loaded.captions.lengths.tolist())
                captions = [*captions, torch.zeros(context_length)]
                yield loaded.images, pad_sequence(captions, batch_first=True)[:-1].long()

    contrast = open_clip.loss.SigLipLoss() if siglip else open_clip.loss.ClipLoss()
    losses = []

    def loss(**features):
        found = contrast(**features)
        losses.append(sum(found.values()).item())
        return found

    train_one_epoch(
        model,
        {"train": SimpleNamespace(dataloader=Batches(), set_epoch=lambda epoch: None)},
        loss,
        0,
        optimizer,
        None,
        cosine_lr(optimizer, config.optimizer.lr, 0, steps),
        None,
        Namespace(
            device="cpu", precision="fp32", accum_freq=1, distill=False, skip_scheduler=False,
            horovod=False, grad_clip_norm=config.optimizer.clip_norm or None, rank=0,
            log_local=False, log_every_n_steps=10**9, batch_size=batch, world_size=1, wandb=False,
        ),
    )  # fmt: skip
    theirs = model.state_dict()
    ours = from_laclip(read_checkpoint(run / "model.pt"), "open_clip")
    apart, way = (
        torch.cat([(theirs[name] - other[name]).flatten() for name in theirs]).norm()
        for other in (ours, first)
    )
    print(json.dumps({"losses": losses, "apart": (apart / way).item()}))


if __name__ == "__main__":
    main()
