"""Print the norm of a gradient that is whole, and of the same one sharded over two processes."""

import json
import sys

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_peft import LoRA, inject
from lightning_peft.callbacks.adapter_stats import gradient_norm


def norm(shard: bool) -> float:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    inject(model, LoRA(r=2, targets="all-linear"), train="1.bias", head=False)
    if shard:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.ones(2, 8)).square().sum().backward()
    return float(gradient_norm(optimizer))


store, rank = sys.argv[1:]
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
print(json.dumps({"whole": norm(shard=False), "sharded": norm(shard=True)}))
distributed.destroy_process_group()
