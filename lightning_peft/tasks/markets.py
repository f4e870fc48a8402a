"""One task in several markets: an adapter and a head for each, on one base, in one run."""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_peft.baseline import Baseline
from lightning_peft.carrying.switching import mixed
from lightning_peft.config import TARGET, Unbuilt, instantiate_as, target_of, to_spec
from lightning_peft.data.markets import MARKET, MarketData, apart, asked_with_markets
from lightning_peft.errors import ConfigError, DataError
from lightning_peft.report import Example
from lightning_peft.tasks.task import NUMBERS, StepOutput, Task, metric_name

if TYPE_CHECKING:
    from pathlib import Path

    from torch.utils.data import DataLoader

    from lightning_peft.models import ModelSource


class Markets(Task):
    """The rows of each market go through an adapter of its own; the base is shared and untouched.

    The loss is that of the task over the batch, whose rows may be of several markets: an adapter's
    share of it is that of its rows. Metrics are those of the task over all rows, and for each
    market: `accuracy` and `accuracy_<market>`.

    Args:
        task: the task, or its description.
        markets: their names in order; None takes the data's by `connect`.
        shared: whether all rows go through one adapter, to compare with; metrics stay by market.

    Raises:
        ConfigError: two markets would give their adapters one name.
    """

    def __init__(
        self,
        task: Unbuilt | Task,
        markets: Sequence[str] | None = None,
        shared: bool = False,
    ) -> None:
        self.task: Task = task if isinstance(task, Task) else _built(task)
        self.markets: tuple[str, ...] | None = None
        self.shared = shared
        self.monitor, self.mode, self.suffix = self.task.monitor, self.task.mode, self.task.suffix
        self.headline, self.predicts = self.task.headline, self.task.predicts
        if markets is not None:
            self._know(markets)

    def equip(self, data: MarketData, source: "ModelSource") -> None:
        self.task.equip(_checked(data).connect(self.markets).rows, source)

    def connect(self, data: MarketData) -> Self:
        """Take the markets of the data, unless the settings give them.

        Raises:
            DataError: Both give markets, and they differ.
        """
        found = _checked(data).markets
        if self.markets is not None and self.markets != found:
            raise DataError(
                f"the markets of the data must be those of the task ({', '.join(self.markets)}), "
                f"but are {', '.join(found)} instead: set `data.markets` to the former."
            )
        self._know(found)
        self.task = self.task.connect(data.rows)
        return self

    def load_model(self, source: "ModelSource") -> nn.Module:
        if getattr(source, "gradient_checkpointing", False) and not self.shared:
            raise ConfigError(
                "`model.gradient_checkpointing` must be false for several adapters in one batch, "
                "since layers would be computed again after the rows have left theirs."
            )
        return self.task.load_model(source)

    def metrics(self) -> MetricCollection:
        markets, whole = self._named(), self.task.metrics()
        found: dict[str, Metric | MetricCollection] = {
            str(name): OfMarket(metric, None) for name, metric in whole.items()
        }
        for number, market in enumerate(map(metric_name, markets)):
            found |= {
                f"{name}_{market}": OfMarket(metric, number)
                for name, metric in self.task.metrics().items()
            }
        return MetricCollection(found, compute_groups=False)

    def step(self, model: nn.Module, batch: Mapping[str, Tensor]) -> StepOutput:
        """Return the task's loss, with predictions beside the numbers of their markets."""
        with self._through_their_adapters(model, batch):
            return _beside(self.task.step(model, batch), batch)

    def evaluate(self, model: nn.Module, batch: Mapping[str, Tensor]) -> StepOutput:
        with self._through_their_adapters(model, batch):
            return _beside(self.task.evaluate(model, batch), batch)

    def predictions(self, model: nn.Module, batch: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """Return what the task predicts for each row, and which adapter did."""
        with self._through_their_adapters(model, batch):
            found = self.task.predictions(model, batch)
        names = self._adapters_of(batch)
        return [{**row, "adapter": name} for row, name in zip(found, names, strict=True)]

    def readable(self, read: Any, prediction: dict[str, Any]) -> dict[str, Any]:
        return self.task.readable(read, prediction)

    def asked(self, loader: "DataLoader[Any]") -> "tuple[DataLoader[Any], Sequence[int] | None]":
        return asked_with_markets(loader, self.task.asked)

    def scores(
        self, targets: Sequence[Any], predictions: Sequence[Mapping[str, Any]]
    ) -> dict[str, float]:
        return self.task.scores(targets, predictions)

    def draw(self, read: Any, prediction: Mapping[str, Any], folder: "Path", number: int) -> None:
        self.task.draw(read, prediction, folder, number)

    def example(self, read: Any, target: Any, prediction: Mapping[str, Any]) -> Example | None:
        return self.task.example(read, target, prediction)

    def by_class(
        self, targets: Sequence[Any], predictions: Sequence[Mapping[str, Any]]
    ) -> dict[str, dict[str, float]]:
        return self.task.by_class(targets, predictions)

    def by_group(self, metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
        names = list(map(str, self.task.metrics()))
        rows = {m: {n: f"{n}_{metric_name(m)}" for n in names} for m in self._named()}
        return {
            market: {name: metrics[key] for name, key in keys.items()}
            for market, keys in rows.items()
        }

    def baselines(
        self,
        model: nn.Module,
        train: "DataLoader[Any]",
        validation: "DataLoader[Any]",
        test: "DataLoader[Any] | None",
    ) -> list[Baseline]:
        loaders = [loader and apart(loader) for loader in (train, validation, test)]
        return self.task.baselines(model, *cast(Any, loaders))

    def check(self, model: nn.Module, data: MarketData) -> None:
        self.task.check(model, data.rows)

    def to_spec(self) -> dict[str, Any]:
        markets = list(self.markets) if self.markets is not None else None
        own = {"markets": markets, "shared": self.shared}
        return {TARGET: target_of(type(self)), "task": to_spec(self.task), **own}

    def _know(self, markets: Sequence[str]) -> None:
        """Take the markets, and give each an adapter."""
        names = tuple(re.sub(r"[^\w-]", "-", str(market)) for market in markets)
        if len(set(names)) < len(names) or not names:
            raise ConfigError(
                f"`markets` must have names that differ in their letters and digits, which the "
                f"folders of their adapters are called by, but are {', '.join(markets)}."
            )
        self.markets = tuple(map(str, markets))
        self.adapters = () if self.shared else names

    @contextmanager
    def _through_their_adapters(
        self, model: nn.Module, batch: Mapping[str, Tensor]
    ) -> Iterator[None]:
        if self.shared:
            yield
            return
        names = self._adapters_of(batch)
        numbers = batch[NUMBERS].tolist() if NUMBERS in batch else range(len(names))
        with mixed(model, [names[number] for number in numbers]):
            yield

    def _adapters_of(self, batch: Mapping[str, Tensor]) -> list[str]:
        if MARKET not in batch:
            raise DataError(
                f"a batch must say the market of each row in `{MARKET}`, but has "
                f"{', '.join(batch)} instead: take `data=markets`."
            )
        names = self.adapters or ("default",) * len(self._named())
        return [names[number] for number in batch[MARKET].tolist()]

    def _named(self) -> tuple[str, ...]:
        if self.markets is None:
            raise ConfigError(
                "`markets` must be known, but is None instead: give `Markets(markets=[...])`, or "
                "call `connect(data)` first."
            )
        return self.markets


class OfMarket(Metric):
    """A metric over the rows of one market; NaN where there are none.

    Args:
        metric: of the task.
        market: the market's number; None takes all rows.
    """

    full_state_update = False
    rows: Tensor

    def __init__(self, metric: Metric, market: int | None) -> None:
        super().__init__()
        self.metric, self.market = metric, market
        self.add_state("rows", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predictions: tuple[Any, Tensor], targets: Any) -> None:
        """Add a batch: predictions beside the number of each row's market, and targets."""
        found, markets = predictions
        chosen = [i for i, market in enumerate(markets.tolist()) if self.market in (None, market)]
        if chosen:
            self.rows += len(chosen)
            self.metric.update(_taken(found, chosen), _taken(targets, chosen))

    def compute(self) -> Tensor:
        """Return the metric, a scalar."""
        if not self.rows:
            return torch.tensor(float("nan"), device=self.device)
        with warnings.catch_warnings():  # one process of several may have no row
            warnings.filterwarnings("ignore", "The ``compute`` method of metric")
            return cast(Tensor, self.metric.compute())

    def reset(self) -> None:
        """Forget all rows."""
        super().reset()
        self.metric.reset()


def _built(spec: Mapping[str, Any]) -> Task:
    return instantiate_as(Task, spec, "task.task")  # type: ignore[type-abstract]


def _checked(data: Any) -> MarketData:
    if not isinstance(data, MarketData):
        raise ConfigError(
            f"`data` must be of several markets, but is {type(data).__name__} instead: take "
            f"`data=markets`."
        )
    return data


def _beside(out: StepOutput, batch: Mapping[str, Tensor]) -> StepOutput:
    return out._replace(predictions=(out.predictions, batch[MARKET]))


def _taken(values: Any, rows: Sequence[int]) -> Any:
    return values[list(rows)] if isinstance(values, Tensor) else [values[i] for i in rows]
