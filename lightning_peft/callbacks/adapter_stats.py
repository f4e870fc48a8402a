"""Log the learning rates and the norm of the trained parameters' gradient."""

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from lightning_peft.callbacks.summary import trained_size


class AdapterStats(Callback):
    """Log ``lr``, ``adapter/grad_norm`` and, once, ``adapter/parameters`` and ``adapter/bytes``.

    The norm is the 2-norm over all gradients of one optimizer, before clipping. Learning rate and
    norm are computed only at the steps that the trainer logs, so the others cost nothing. With
    several parameter groups of different rates, each has its own ``lr/<name or index>``.

    Example::

        Trainer(callbacks=[PEFT(LoRA()), AdapterStats()])
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parameters, size = trained_size(pl_module)
        for logger in trainer.loggers:
            logger.log_metrics(
                {"adapter/parameters": parameters, "adapter/bytes": size}, trainer.global_step
            )

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if not trainer.loggers or not _logged(trainer):
            return
        # A sharded gradient's norm is a sum over all ranks: each of them must take part.
        norm = gradient_norm(optimizer)
        pl_module.log("adapter/grad_norm", norm, rank_zero_only=True)
        pl_module.log_dict(learning_rates(optimizer), rank_zero_only=True)


def gradient_norm(optimizer: Optimizer) -> Tensor:
    """Return the 2-norm of all gradients of `optimizer` as one scalar tensor."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """Return ``{"lr": ...}``, or one entry for each group where the groups' rates differ."""
    groups = optimizer.param_groups
    rates = {str(group.get("name", i)): float(group["lr"]) for i, group in enumerate(groups)}
    if len(set(rates.values())) <= 1:
        return {"lr": next(iter(rates.values()))}
    return {f"lr/{name}": rate for name, rate in rates.items()}


def _logged(trainer: Trainer) -> bool:
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by its connector
    return every > 0 and (trainer.global_step + 1) % every == 0
