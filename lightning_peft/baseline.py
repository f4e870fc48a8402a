"""What the frozen base is worth without any method: the bar that a tuned model must clear.

Where the head comes with the base, that is the base untouched. Where it is new: two classifiers on
features that are computed once, the model's own head alone, and logistic regression on the mean of
the last hidden states. Their settings are chosen on validation.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset

from lightning_peft.data.by_length import lengths_of
from lightning_peft.errors import ConfigError, DataError
from lightning_peft.tasks.task import Task, model_inputs

_RATES = (3e-4, 1e-3, 3e-3, 1e-2)  # learning rates of the head
_EPOCHS = 20
_PENALTIES = tuple(10.0 ** (k / 2) for k in range(-8, 3))  # weights of half the squared norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline:
    """A classifier on the frozen base; its setting was chosen on validation."""

    name: str
    setting: dict[str, float]
    """What was chosen: the learning rate and epochs, or the penalty."""
    validation: dict[str, float]
    test: dict[str, float]
    """Empty where there is no test split."""
    trained: int
    """Number of trained parameters."""
    seconds: float
    """Time for training and choosing, the features included."""


@dataclasses.dataclass
class _Features:
    """What the frozen base makes of one split."""

    batches: list[dict[str, Tensor]]
    outputs: list[Any]  # what the base returned, without what the head does not read
    mean: Tensor  # (rows, d_model)

    @property
    def targets(self) -> Tensor:
        """The class of each row, `(rows,)`."""
        return torch.cat([batch["labels"] for batch in self.batches])


def frozen_baselines(
    model: nn.Module,
    task: Task,
    train: DataLoader[Any],
    validation: DataLoader[Any],
    test: DataLoader[Any] | None = None,
    progress: bool = True,
    pooled: bool = True,
) -> list[Baseline]:
    """Train both classifiers on the frozen base, and return them, the better on validation first.

    The model is left as it was: its head, its modes and the global random state.

    Args:
        model: A transformers model with a classification head; without an adapter.
        task: Gives the metrics, and by `monitor` the one that chooses.
        train: Batches with `labels`, and of texts `attention_mask`; the same for `validation` and
            `test`.
        validation: What the settings are chosen on.
        test: What the chosen classifiers are measured on at last.
        progress: Show a progress bar on stderr.
        pooled: Try logistic regression too, which gives one class to a row as a whole.

    Raises:
        ConfigError: The model has no base inside, or no head outside it.
        DataError: A split has no rows.
    """
    base = _base(model)
    before = {name: tensor.clone() for name, tensor in _head(model, base).items()}
    modes = {module: module.training for module in model.modules()}
    loaders = {"train": train, "validation": validation} | ({"test": test} if test else {})
    with torch.random.fork_rng():
        model.eval()
        started = time.perf_counter()
        splits = {
            name: _features(model, base, loader, f"{name} features", progress)
            for name, loader in loaders.items()
        }
        shared = time.perf_counter() - started
        torch.manual_seed(0)
        try:
            found = [_tuned_head(model, base, task, splits)]
            if pooled:
                found.append(_regression(task, splits))
        finally:
            for name, parameter in _head(model, base).items():
                parameter.data.copy_(before[name])
            for module, mode in modes.items():
                module.training = mode
    found = [dataclasses.replace(one, seconds=one.seconds + shared) for one in found]
    return sorted(found, key=lambda one: _score(task, one.validation), reverse=True)


def untouched_baseline(
    model: nn.Module,
    task: Task,
    validation: DataLoader[Any],
    test: DataLoader[Any] | None = None,
    progress: bool = True,
) -> Baseline:
    """Measure the base as it came, where a task needs no new head; the model is left as it was.

    Args:
        model: Without an adapter.
        task: Gives the metrics.
        validation: Batches with targets; the same for `test`.
        test: None where there is no test split.
        progress: Show a progress bar on stderr.
    """
    modes = {module: module.training for module in model.modules()}
    loaders = {"validation": validation} | ({"test": test} if test else {})
    started = time.perf_counter()
    model.eval()
    try:
        found = {
            name: _evaluated(model, task, _shown(loader, f"{name} of the base", progress))
            for name, loader in loaders.items()
        }
    finally:
        for module, mode in modes.items():
            module.training = mode
    return Baseline(
        name="untouched base",
        setting={},
        validation=found["validation"],
        test=found.get("test", {}),
        trained=0,
        seconds=time.perf_counter() - started,
    )


@torch.no_grad()
def _evaluated(model: nn.Module, task: Task, batches: Iterable[Any]) -> dict[str, float]:
    device = next(model.parameters()).device
    metrics = task.metrics().to(device)
    for batch in batches:
        out = task.evaluate(model, move_data_to_device(batch, device))
        metrics.update(out.predictions, out.targets)
    return {name: float(value) for name, value in metrics.compute().items()}


def _base(model: nn.Module) -> nn.Module:
    base = getattr(model, "base_model", None)
    if not isinstance(base, nn.Module) or base is model:
        raise ConfigError(
            f"`model` must be a transformers model with a head on a base, but "
            f"{type(model).__name__} has no `base_model` inside."
        )
    return base


def _head(model: nn.Module, base: nn.Module) -> dict[str, nn.Parameter]:
    inside = {id(parameter) for parameter in base.parameters()}
    head = {name: p for name, p in model.named_parameters() if id(p) not in inside}
    if not head:
        raise ConfigError(
            f"`model` must have a head with parameters outside its base, but "
            f"{type(model).__name__} has none: load it for the task."
        )
    return head


@torch.no_grad()
def _features(
    model: nn.Module, base: nn.Module, loader: DataLoader[Any], title: str, progress: bool
) -> _Features:
    device = next(model.parameters()).device
    batches, outputs, means = [], [], []
    compact: Callable[[Any], Any] | None = None
    for loaded in _shown(_by_length(loader), title, progress):
        batch = move_data_to_device(loaded, device)
        output = _run_base(model, base, batch)
        means.append(_mean(output.last_hidden_state, batch.get("attention_mask")))
        compact = compact or _compaction(model, base, batch, output)
        batches.append(batch)
        outputs.append(compact(output))
    if not batches:
        raise DataError(f"the {title} must come from at least one row, but the split has none.")
    return _Features(batches, outputs, torch.cat(means))


def _run_base(model: nn.Module, base: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    """Run the whole model, so that the base gets its inputs as ever, and return what it returns."""
    caught: list[Any] = []
    handle = base.register_forward_hook(lambda module, args, output: caught.append(output))
    try:
        model(**model_inputs(batch))
    finally:
        handle.remove()
    return caught[0]


def _mean(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Average the hidden states over the tokens that are no padding, or over the places.

    They are `(batch, tokens, d_model)`, or `(batch, channels, height, width)` of a convolution.
    """
    if hidden.dim() == 4:
        return hidden.mean((2, 3))
    if mask is None:
        return hidden.mean(1)
    weights = mask.to(hidden.dtype).unsqueeze(-1)  # (batch, tokens, 1)
    return (hidden * weights).sum(1) / weights.sum(1)


def _compaction(
    model: nn.Module, base: nn.Module, batch: Mapping[str, Tensor], output: Any
) -> Callable[[Any], Any]:
    """Return how to store the base's output: without the hidden states if the head ignores them.

    Whether it does shows when they are replaced by NaN: all hidden states for a head that reads a
    pooled output, all but the first token's for one that reads that.
    """
    for keep in (0, 1):
        hidden = output.last_hidden_state.clone()
        hidden[:, keep:] = float("nan")
        with _replay(base, iter([_replaced(output, hidden)])):
            found = model(**model_inputs(batch))
        if all(value.isfinite().all() for value in found.values() if isinstance(value, Tensor)):
            return lambda one: _replaced(one, one.last_hidden_state[:, :keep].clone())
    return lambda one: _replaced(one, one.last_hidden_state)


def _replaced(output: Any, hidden: Tensor) -> Any:
    """Return the base's output with these hidden states, and nothing but what a head may read."""
    fields = {k: v for k, v in output.items() if k == "pooler_output"}
    return type(output)(last_hidden_state=hidden, **fields)


@contextmanager
def _replay(base: nn.Module, outputs: Iterator[Any]) -> Iterator[None]:
    """Let the base return stored outputs instead of computing them."""
    base.forward = lambda *args, **kwargs: next(outputs)
    try:
        yield
    finally:
        del base.forward


def _tuned_head(
    model: nn.Module, base: nn.Module, task: Task, splits: Mapping[str, _Features]
) -> Baseline:
    started = time.perf_counter()
    head = _head(model, base)
    start = {name: parameter.detach().clone() for name, parameter in head.items()}
    trials = []
    for rate in _RATES:
        _assign(head, start)
        optimizer = torch.optim.AdamW(head.values(), lr=rate)
        for epoch in range(1, _EPOCHS + 1):
            _train_head(model, base, task, splits["train"], optimizer)
            metrics = _measure_head(model, base, task, splits["validation"])
            state = {name: parameter.detach().clone() for name, parameter in head.items()}
            trials.append(({"lr": rate, "epochs": epoch}, metrics, state))
    setting, validation, state = max(trials, key=lambda trial: _score(task, trial[1]))
    _assign(head, state)
    return Baseline(
        name="frozen base + tuned head",
        setting=setting,
        validation=validation,
        test=_measure_head(model, base, task, splits["test"]) if "test" in splits else {},
        trained=sum(parameter.numel() for parameter in head.values()),
        seconds=time.perf_counter() - started,
    )


def _train_head(
    model: nn.Module,
    base: nn.Module,
    task: Task,
    features: _Features,
    optimizer: torch.optim.Optimizer,
) -> None:
    model.train()
    base.eval()
    order = torch.randperm(len(features.batches)).tolist()
    with torch.enable_grad(), _replay(base, iter([features.outputs[i] for i in order])):
        for i in order:
            optimizer.zero_grad()
            task.step(model, features.batches[i]).loss.backward()
            optimizer.step()
    model.eval()


@torch.no_grad()
def _measure_head(
    model: nn.Module, base: nn.Module, task: Task, features: _Features
) -> dict[str, float]:
    with _replay(base, iter(features.outputs)):
        steps = [task.step(model, batch) for batch in features.batches]
    return _metrics(task, [(step.predictions, step.targets) for step in steps])


def _regression(task: Task, splits: Mapping[str, _Features]) -> Baseline:
    started = time.perf_counter()
    train = splits["train"]
    centre, spread = train.mean.mean(0), train.mean.std(0).clamp_min(1e-8)
    rows = {name: ((split.mean - centre) / spread).double() for name, split in splits.items()}
    fits = {
        penalty: logistic_regression(rows["train"], train.targets, penalty)
        for penalty in _PENALTIES
    }
    measured = {
        penalty: _metrics(task, [(_choose(rows["validation"], fit), splits["validation"].targets)])
        for penalty, fit in fits.items()
    }
    chosen = max(measured, key=lambda penalty: (_score(task, measured[penalty]), penalty))
    test: dict[str, float] = {}
    if "test" in splits:
        test = _metrics(task, [(_choose(rows["test"], fits[chosen]), splits["test"].targets)])
    return Baseline(
        name="frozen base + logistic regression on mean-pooled features",
        setting={"penalty": chosen},
        validation=measured[chosen],
        test=test,
        trained=sum(tensor.numel() for tensor in fits[chosen]),
        seconds=time.perf_counter() - started,
    )


def logistic_regression(features: Tensor, targets: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Minimise the mean cross-entropy plus `penalty / 2` times the squared norm of the weights.

    Args:
        features: `(rows, d_model)`, standardised, float64.
        targets: Class numbers `(rows,)`.
        penalty: Its weight, positive, which makes the optimum unique but for a shift of the biases.

    Returns:
        Weights `(classes, d_model)` and biases `(classes,)`.
    """
    classes = int(targets.max()) + 1
    weights = features.new_zeros(classes, features.shape[1], requires_grad=True)
    biases = features.new_zeros(classes, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weights, biases],
        max_iter=1000,
        tolerance_grad=1e-8,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        solver.zero_grad()
        logits = features @ weights.T + biases
        value = cross_entropy(logits, targets) + penalty / 2 * weights.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(objective)
    return weights.detach(), biases.detach()


def _choose(features: Tensor, fit: tuple[Tensor, Tensor]) -> Tensor:
    return (features @ fit[0].T + fit[1]).argmax(-1)


def _metrics(task: Task, found: Iterable[tuple[Any, Any]]) -> dict[str, float]:
    metrics = task.metrics()
    for predictions, targets in found:
        if isinstance(predictions, Tensor):
            metrics.to(predictions.device)
        metrics.update(predictions, targets)
    return {name: float(value) for name, value in metrics.compute().items()}


def _score(task: Task, metrics: Mapping[str, float]) -> float:
    """Return the monitored metric so that more is better; the same ties go to the first."""
    value = metrics[task.monitor.rpartition("/")[2]]
    return value if task.mode == "max" else -value


def _assign(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def _by_length(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return the same rows in a fixed order, texts in batches of like lengths.

    Such batches have little padding to compute.
    """
    from datasets import Dataset

    rows: Any = loader.dataset
    order = list(range(len(rows)))
    if isinstance(rows, Dataset):
        lengths = lengths_of(rows["input_ids"])
        order.sort(key=lengths.__getitem__)
    return DataLoader(
        Subset(rows, order), batch_size=loader.batch_size, collate_fn=loader.collate_fn
    )


def _shown(loader: DataLoader[Any], title: str, progress: bool) -> Iterable[Any]:
    from rich.console import Console
    from rich.progress import track

    return track(loader, title, console=Console(stderr=True), disable=not progress)
