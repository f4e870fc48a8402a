"""The guard that stops a training before a step with a loss or a gradient that is not finite."""

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_peft.adapter import Adapter
from lightning_peft.carrying.group import AdapterGroup
from lightning_peft.errors import NonFiniteError, TargetError
from lightning_peft.training import checkpoint as content


def is_watched(loss: Tensor, trainer: Any) -> bool:
    """Whether the loss itself is looked at, and not only its gradients."""
    # With several processes gradients are non-finite on all of them or on none, while a process
    # that stops alone for its own loss leaves the others waiting. A loss in fp16 overflows when it
    # is scaled, which the scaler sees and mends.
    return trainer.world_size == 1 and loss.dtype != torch.float16


def refuse_without_gradient(adapter: Adapter | AdapterGroup) -> NoReturn:
    """Say that nothing which is trained has a part in the loss.

    Raises:
        TargetError: always.
    """
    trained = adapter.named_parameters()
    raise TargetError(
        f"the loss must depend on what is trained, but reaches none of the {len(trained):,} "
        f"tensors, such as `{min(trained)}`: their modules do not run for these inputs, or run "
        "without a gradient; take other targets or another method."
    )


def require_finite(module: Any, loss: Tensor | None, optimizer: Optimizer) -> None:
    """Look at the sum of losses since the last step and at the gradients, before the next step.

    Raises:
        NonFiniteError: one of them is NaN or infinite; nothing was stepped.
    """
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    gradients = [p.grad for p in parameters if p.grad is not None]
    if getattr(module.trainer.precision_plugin, "scaler", None) is not None:
        gradients = []  # the scaler looks for overflow itself and skips the step
    norm = torch.nn.utils.get_total_norm(gradients)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    # One number, so that a GPU is waited for once a step.
    both = norm if loss is None else norm + loss.to(norm.device)
    if not torch.isfinite(both) and (cause := _cause(module, loss, optimizer)):
        raise NonFiniteError(
            f"{cause} at step {module.global_step} of epoch {module.current_epoch}: nothing was "
            "stepped; lower the learning rate or clip gradients, and look at the data."
        )


def _cause(module: Any, loss: Tensor | None, optimizer: Optimizer) -> str | None:
    """Say what is not finite; None where only the norm of finite gradients overflowed."""
    if loss is not None and not torch.isfinite(loss):
        return f"The loss is {float(loss)}"
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in content.trained(module).items():
        gradient = parameter.grad
        if id(parameter) in held and gradient is not None and not gradient.isfinite().all():
            return f"The gradient of `{name}` is not finite"
    return None
