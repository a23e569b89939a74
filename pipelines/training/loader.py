"""From units to tensors on the device, made ahead of the step that needs them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from features.batch import Batch, to_batch
from pipelines.training.batches import Step, ahead
from pipelines.training.progress import Pace
from pipelines.training.sharding import Traffic
from pipelines.training.train_config import Task
from pipelines.training.workers import largest_of_workers, told_by_workers

Loaded = tuple[Batch, dict[str, torch.Tensor]]


def load_batches(
    task: Task, steps: list[Step], *, prefetch: int, device: torch.device, pace: Pace
) -> Iterator[tuple[Step, Batch, dict[str, torch.Tensor]]]:
    """Each step's batch and targets, all workers' padded to equally many videos; waiting is counted in `pace`."""
    made_ahead = ahead(lambda step: _collate(task, step), steps, depth=prefetch)
    while True:
        with pace.waiting_for("input"):
            following = next(made_ahead, None)
            if following is None:
                return
            step, (batch, targets) = following
            if dist.get_world_size() > 1:
                batch = batch.pad_videos(largest_of_workers(len(batch.video_dense_UD), device))
            batch = batch.to(device)
            targets = {name: tensor.to(device) for name, tensor in targets.items()}
        yield step, batch, targets


def traffic_of(task: Task, step: Step, device: torch.device) -> dict[str, Traffic]:
    """Bags a step and ids a bag of each feature, as this step's batch has them; the most of all workers."""
    batch, _ = _collate(task, step)
    asked = {}
    for bags in (batch.user, batch.video):
        lengths_FB = bags.lengths().view(len(bags.keys()), -1).float()
        n_bags = largest_of_workers(lengths_FB.shape[1], device)
        for name, mean in zip(bags.keys(), lengths_FB.mean(dim=1).tolist(), strict=True):
            asked[name] = Traffic(n_bags, mean)
    return told_by_workers(asked)[0]  # the planner must see one figure everywhere


def _collate(task: Task, step: Step) -> Loaded:
    made = task.collate(step.units, seed=step.seed, seed_of_all=step.seed_of_all)
    return to_batch(made.inputs), {name: torch.from_numpy(array) for name, array in made.targets.items()}
