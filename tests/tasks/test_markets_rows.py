"""Each row of a batch of several markets is what the adapter of its market alone makes of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_peft import LoRA, PEFTModule
from lightning_peft.carrying.switching import mixed
from lightning_peft.data.markets import MarketData, apart
from lightning_peft.errors import ConfigError
from lightning_peft.models import ModelSource
from lightning_peft.tasks.chat import Chat
from lightning_peft.tasks.markets import Markets
from lightning_peft.tasks.named_entities import NamedEntities
from lightning_peft.tasks.question_answering import QuestionAnswering
from lightning_peft.tasks.sequence_classification import SequenceClassification
from lightning_peft.tasks.task import Task
from lightning_peft.tasks.translation import Translation
from tests.jobs.command import GOOD
from tests.jobs.conftest import tiny_model  # noqa: F401  # a fixture
from tests.tiny_chat import chat, save_tiny, write_rows

LENGTHS = [3, 70, 5, 24, 4, 45, 3, 6]  # words, so that rows are one to several windows
MARKETS = ["amazon.de", "fr"]


def question(i: int, words: list[str]) -> dict[str, Any]:
    answers = {"text": [words[0]], "answer_start": [0]}
    return {"question": "tea", "context": " ".join(words), "answers": answers}


def tagged(i: int, words: list[str]) -> dict[str, Any]:
    return {"tokens": words, "labels": ["B-drink", *["O"] * (len(words) - 1)]}


def pair(i: int, words: list[str]) -> dict[str, Any]:
    return {"source": " ".join(words[:9]), "target": " ".join(words[: 1 + i % 3])}


def talk(i: int, words: list[str]) -> dict[str, Any]:
    return {"messages": chat(" ".join(words[:9]), " ".join(words[: 1 + i % 3]))}


def judged(i: int, words: list[str]) -> dict[str, Any]:
    return {"text": " ".join(words), "label": ["yes", "no"][i // 2 % 2]}


TASKS: dict[str, tuple[Task, Any, str, dict[str, Any]]] = {
    "texts": (
        SequenceClassification(),
        judged,
        "classification.ClassificationData",
        {"max_length": 28},
    ),
    "qa": (
        QuestionAnswering(),
        question,
        "question_answering.QuestionData",
        {"max_length": 32, "stride": 4},
    ),
    "ner": (NamedEntities(), tagged, "entities.EntityData", {"max_length": 16}),
    "translation": (
        Translation(max_new_tokens=5, samples=5),
        pair,
        "generation.GenerationData",
        {"max_source": 64, "max_target": 16},
    ),
    "beams": (
        Translation(max_new_tokens=5, samples=5, beams=2),
        pair,
        "generation.GenerationData",
        {"max_source": 64, "max_target": 16},
    ),
    "chat": (Chat(max_new_tokens=5, samples=3), talk, "chat.ChatData", {"max_length": 128}),
}


@pytest.fixture(scope="module")
def sources(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, ModelSource]:  # noqa: F811
    """A model that reads, and one that writes."""
    writer = save_tiny(tmp_path_factory.mktemp("chat"))
    return {False: ModelSource(name=str(tiny_model)), True: ModelSource(name=str(writer))}


def built(
    kind: str, sources: Mapping[bool, ModelSource], folder: Path, **more: Any
) -> tuple[PEFTModule, MarketData]:
    task, make, data_class, settings = TASKS[kind]
    paths = {}
    for split, first in (("train", ["was"]), ("test", ["tea"])):
        texts = [
            first + [[*GOOD, "coffee"][(i + j) % 6] for j in range(n)]
            for i, n in enumerate(LENGTHS)
        ]
        rows = [make(i, words) | {"market": MARKETS[i % 2]} for i, words in enumerate(texts)]
        paths[split] = write_rows(folder / f"{split}.jsonl", rows)
    paths["validation"] = paths["test"]
    spec = {"_target_": f"lightning_peft.data.{data_class}", "batch_size": 4} | settings | more
    data = MarketData(path=paths, rows=spec)
    source = sources[kind in ("translation", "beams", "chat")]
    markets = Markets(task)
    markets.equip(data, source)
    torch.manual_seed(0)
    module = PEFTModule(source, LoRA(r=4), markets.connect(data))
    markets.check(module.model, data)
    with torch.no_grad():
        for parameter in module.trained.parameters():
            parameter.normal_(0, 0.3)
    return module, data


@pytest.mark.parametrize("kind", TASKS)
def test_each_row_goes_through_its_own_adapter(
    kind: str, sources: dict[bool, ModelSource], tmp_path: Path
) -> None:
    module, data = built(kind, sources, tmp_path)
    task = module.task
    loader, numbers = task.asked(data.test_dataloader())
    found = [row for batch in loader for row in task.predictions(module.model, batch)]
    numbers = range(len(LENGTHS)) if numbers is None else numbers
    assert [row["adapter"] for row in found] == [["amazon-de", "fr"][n % 2] for n in numbers]
    alone = {}
    for name in ("amazon-de", "fr"):
        with torch.no_grad(), mixed(module.model, [name]):
            batches = apart(loader)
            alone[name] = [r for b in batches for r in task.task.predictions(module.model, b)]
    assert alone["amazon-de"] != alone["fr"]
    for i, row in enumerate(found):
        for name, value in alone[row["adapter"]][i].items():
            assert_same(row[name], value)


def assert_same(found: Any, expected: Any) -> None:
    """Compare what may hold rounded numbers somewhere inside."""
    if isinstance(expected, Mapping):
        assert found.keys() == expected.keys()
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
        return
    assert found == (pytest.approx(expected, abs=1e-4) if isinstance(expected, float) else expected)


@pytest.mark.parametrize("kind", ["qa", "ner", "translation", "chat"])
def test_metrics_of_a_market_are_those_of_its_rows(
    kind: str, sources: dict[bool, ModelSource], tmp_path: Path
) -> None:
    module, data = built(kind, sources, tmp_path)
    task = module.task
    metrics, own = task.metrics(), {name: task.task.metrics() for name in ("amazon-de", "fr")}
    with torch.no_grad():
        for batch in data.test_dataloader():
            out = task.evaluate(module.model, batch)
            metrics.update(out.predictions, out.targets)
        loader = data.test_dataloader()
        for row in range(len(LENGTHS)):
            name = ["amazon-de", "fr"][row % 2]
            batch = loader.collate_fn([loader.dataset[row]])
            out = task.evaluate(module.model, batch)
            own[name].update(out.predictions[0], out.targets)
    found = metrics.compute()
    for market, scores in own.items():
        for name, score in scores.compute().items():
            torch.testing.assert_close(
                found[f"{name}_{market}"], score, check_dtype=False, atol=1e-4, rtol=1e-4
            )
    table = task.by_group({name: float(value) for name, value in found.items()})
    assert list(table) == MARKETS


def test_conversations_of_several_markets_share_no_row(
    sources: dict[bool, ModelSource], tmp_path: Path
) -> None:
    _, data = built("chat", sources, tmp_path, pack=True)
    data.setup("fit")
    with pytest.raises(ConfigError, match=r"set `data\.rows\.pack=false`"):
        data.train_dataloader()
    for name in ("streaming", "by_length"):
        with pytest.raises(ConfigError, match=rf"`data\.rows\.{name}` must be false"):
            built("texts", sources, tmp_path, **{name: True})
