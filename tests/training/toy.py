"""The smallest task: a linear layer learns a fixed map; used to test the loop without any data or model of ours."""

import json

import torch
from torch import nn

from apps.training.config import Section, TaskSection, TrainConfig


class ToySection(TaskSection):
    nan_from: int | None = None


class ToyData(Section):
    noise: float = 0.1


class ToyConfig(TrainConfig):
    task: ToySection
    data: ToyData = ToyData()


class ToyTask:
    config_class = ToyConfig
    smoke = ()

    def __init__(self, config, context):
        self.config, self.context = config, context
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        self.tied = nn.Linear(4, 8)
        self.tied.weight = self.net[0].weight

    def modules(self):
        return {"net": self.net, "tied": self.tied}

    def batch(self, index):
        generator = torch.Generator().manual_seed(self.config.run.seed * 7919 + index * 64 + self.context.rank)
        x = torch.randn(self.config.run.batch_size, 4, generator=generator)
        return {"x": x, "y": x[:, :2] * 2, "index": index}

    def loss(self, batch):
        noisy = batch["x"] + self.config.data.noise * torch.randn_like(batch["x"])  # global random state on purpose
        loss = (self.net(noisy) - batch["y"]).square().mean() + 1e-3 * self.tied(noisy).square().mean()
        limit = self.config.task.nan_from
        if limit is not None and batch["index"] >= limit:
            loss = loss * torch.nan
        return loss, {"noise": noisy.detach().std()}

    def validate(self):
        torch.rand(3)  # a careless task: the loop must put the random state back
        return {"loss": float(self.net(torch.ones(2, 4)).square().mean())}

    def preview(self, path):
        raise OSError("the disk of previews is full")

    def export(self, folder):
        (folder / "weights.json").write_text(json.dumps(self.net[0].weight.tolist()))
