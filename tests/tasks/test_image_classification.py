"""Labels for images: which methods act on a vision transformer and on a convolutional network."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from PIL import Image

from lightning_peft import (
    BottleneckAdapter,
    Freeze,
    LoRA,
    PEFTModule,
    PrefixTuning,
    PromptTuning,
    inject,
)
from lightning_peft.conversions import write_image_processor
from lightning_peft.data.labelled_images import ImageData
from lightning_peft.errors import TargetError
from lightning_peft.method import Method
from lightning_peft.methods.full import FullFineTuning as Full
from lightning_peft.models import ModelSource
from lightning_peft.tasks.image_classification import ImageClassification

METHODS = [LoRA(), BottleneckAdapter(), PrefixTuning(), PromptTuning(), Freeze(), Full()]


def name_of(method: Method) -> str:
    return type(method).__name__


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, ModelSource]:
    """Small networks with weights drawn at random, by the name of what they are like."""
    from transformers import (
        Dinov2Config,
        Dinov2Model,
        MobileNetV2Config,
        MobileNetV2Model,
    )

    torch.manual_seed(0)
    models = {
        "dinov2": Dinov2Model(
            Dinov2Config(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28,
                patch_size=7,
            )
        ),
        "mobilenetv2": MobileNetV2Model(MobileNetV2Config(depth_multiplier=0.2, image_size=32)),
    }  # fmt: skip
    found = {}
    for name, model in models.items():
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        write_image_processor(folder, "BitImageProcessor", resample=3)
        found[name] = ModelSource(name=str(folder))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Noise that is dark or bright, 32 of each to train on and 16 to be tested on."""
    place = tmp_path_factory.mktemp("noise")
    draw = torch.Generator().manual_seed(0)
    for split, count in (("train", 32), ("test", 16)):
        for label, level in (("bright", 130), ("dark", 60)):
            (place / split / label).mkdir(parents=True)
            for i in range(count):
                image = level + torch.randint(0, 60, (24, 24), generator=draw)
                array = image.to(torch.uint8).numpy()
                Image.fromarray(array).save(place / split / label / f"{i}.png")
    return place


def data_of(folder: Path, source: ModelSource) -> ImageData:
    data = ImageData(path=str(folder), size=28, whole=True, batch_size=32)
    return data.connect(source.image_processor())


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_every_method_starts_on_a_vision_transformer(sources, folder, method):
    data = data_of(folder, sources["dinov2"])
    data.setup("fit")
    task = ImageClassification().connect(data)
    model = task.load_model(sources["dinov2"])
    batch = next(iter(data.val_dataloader()))
    before = task.step(model, batch)
    adapter = inject(model, method)
    task.step(model, batch).loss.backward()
    assert sum(p.grad is not None for p in adapter.parameters()) > 2  # not the head alone
    if not isinstance(method, (PrefixTuning, PromptTuning)):  # whose tokens act from the start
        assert torch.allclose(task.step(model, batch).loss, before.loss, atol=1e-6)


@pytest.mark.parametrize("method", [LoRA(), BottleneckAdapter(), Freeze(), Full()], ids=name_of)
def test_what_a_convolutional_network_has_can_be_trained(sources, folder, method):
    data = data_of(folder, sources["mobilenetv2"])
    data.setup("fit")
    task = ImageClassification().connect(data)
    model = task.load_model(sources["mobilenetv2"])
    inject(model, method)
    task.step(model, next(iter(data.val_dataloader()))).loss.backward()


@pytest.mark.parametrize("method", [PrefixTuning(), PromptTuning()], ids=name_of)
def test_what_needs_attention_says_that_there_is_none(sources, method):
    model = ImageClassification(labels=["a", "b"]).load_model(sources["mobilenetv2"])
    with pytest.raises(TargetError, match=r"no attention that learned keys|patches on a grid"):
        inject(model, method)


def test_lora_learns_and_what_it_learned_is_told(sources, folder):
    seed_everything(0)
    data = data_of(folder, sources["dinov2"])
    data.setup("fit")
    task = ImageClassification(class_weights="balanced").connect(data)
    assert task.class_weights == {"bright": 1.0, "dark": 1.0}
    module = PEFTModule(sources["dinov2"], LoRA(), task, lr=1e-2)
    task.check(module.model, data)
    trainer = Trainer(
        max_epochs=6, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    assert trainer.callback_metrics["val/accuracy"] > 0.9
    found = [row for batch in trainer.predict(module, data.test_dataloader()) for row in batch]
    scores = task.by_class(data.targets("test"), found)
    assert scores["bright"]["images"] == 16
    assert scores["bright"]["f1"] > 0.8
    shown = task.example(data.inputs("test")[0], "bright", found[0])
    assert shown.text == "bright/0.png"


@pytest.mark.parametrize("name", ["dinov2", "mobilenetv2"])
def test_the_frozen_base_is_measured_on_images(sources, folder, name):
    data = data_of(folder, sources[name])
    data.setup("fit")
    task = ImageClassification().connect(data)
    model = task.load_model(sources[name])
    loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
    found = task.baselines(model, *loaders)
    assert {one.name.partition(" + ")[2].partition(" on")[0] for one in found} == {
        "tuned head",
        "logistic regression",
    }
    assert all(set(one.test) == {"accuracy", "f1"} for one in found)
