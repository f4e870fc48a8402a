"""Inject LoRA into any nn.Module, train it in your own loop, save it and load it again."""

import sys

import torch
from torch import nn

from lightning_peft import LoRA, inject, load_adapter

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 2))  # stands for your base
x = torch.randn(256, 16)
y = (x[:, 0] * x[:, 1] > 0).long()

adapter = inject(model, LoRA(r=4, targets="all-linear"))  # the base is frozen now
optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.02)
for step in range(201):
    loss = nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0:
        print(f"step {step:3d}  loss {loss.item():.3f}")

tuned = model(x)
folder = adapter.save(sys.argv[1] if len(sys.argv) > 1 else "runs/plain_pytorch")
adapter.remove()  # bitwise the base again
load_adapter(model, folder)  # checked against the base: another one is refused
print(f"{folder} gives the same outputs: {torch.equal(model(x), tuned)}")
