import pytest
import torch
from PIL import Image

from lightning_peft import Freeze, LoRA, inject
from lightning_peft.config import instantiate
from lightning_peft.data.detection import DetectionData
from lightning_peft.errors import ConfigError, DataError
from lightning_peft.models import ModelSource
from lightning_peft.structure.anatomy import head_parameters
from lightning_peft.tasks.constant_boxes import constant_boxes
from lightning_peft.tasks.detectors import decoded, load_detector, takes_mask
from lightning_peft.tasks.object_detection import ObjectDetection
from tests.pictures import DETR, RF_DETR, draw, processor, save_dinov2, write_voc, yolos

CLASSES = ("blue", "red")


@pytest.fixture
def task():
    return ObjectDetection(CLASSES, threshold=0.0)


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    folder = write_voc(tmp_path_factory.mktemp("data") / "voc", {"train": 8, "val": 2, "test": 2})
    draw(folder / "JPEGImages/test_1.png", 9, size=(64, 64))  # another proportion than the rest
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ModelSource(name=str(save_dinov2(tmp_path_factory.mktemp("model"))))


def loaded(voc, split="test", **settings):
    data = DetectionData(path=str(voc), batch_size=2, **settings).connect(processor())
    return next(iter(getattr(data, f"{split}_dataloader")()))


@pytest.mark.parametrize("kind", ["yolos", "detr", "rf_detr"])
def test_the_loss_is_the_models_own_and_reaches_what_is_fresh(kind, task, voc, source):
    batch = loaded(voc)
    if kind == "yolos":
        model, inputs = yolos(), {"pixel_values": batch["pixel_values"]}
    else:
        model = load_detector(source, CLASSES, {"detr": DETR, "rf_detr": RF_DETR}[kind])
        inputs = {name: batch[name] for name in ("pixel_values", "pixel_mask")}
    out = task.step(model, batch)
    torch.testing.assert_close(out.loss, model(**inputs, labels=batch["labels"]).loss)
    out.loss.backward()
    assert [len(one["boxes"]) for one in out.targets] == [2, 2]
    last = next(p for n, p in model.named_parameters() if "class" in n and n.endswith("bias"))
    assert last.grad.abs().sum() > 0


def test_images_without_objects_can_be_trained_on(task, voc, source):
    batch = loaded(voc)
    for one in batch["labels"]:
        one["class_labels"], one["boxes"] = one["class_labels"][:0], one["boxes"][:0]
    for model in (yolos(), load_detector(source, CLASSES, DETR)):
        loss = task.step(model, batch).loss
        assert loss.isfinite()
        loss.backward()


def test_a_new_detector_has_the_pretrained_backbone_and_is_fresh_around_it(source):
    base = source.load("AutoModel")
    for settings, part in ((DETR, "backbone.model"), (RF_DETR, "backbone.backbone")):
        model = load_detector(source, CLASSES, settings)
        backbone = model.model.get_submodule(part)
        for name, tensor in base.state_dict().items():
            assert torch.equal(backbone.state_dict()[name], tensor)
        inside = {id(p) for p in backbone.parameters()}
        fresh = {n for n, p in model.named_parameters() if id(p) not in inside}
        assert set(model.fresh_parameters) == fresh
        assert set(head_parameters(model)) == fresh
        assert model.config.id2label == dict(enumerate(CLASSES))
        assert not model.training


@pytest.mark.parametrize(("size", "atol"), [((28, 28), 1e-6), ((28, 42), 0.02)])
def test_the_new_detectors_backbone_computes_what_the_base_does(source, size, atol):
    """But for RF-DETR's own way to scale the position embeddings to another size."""
    pixels = torch.randn(1, 3, *size)
    wanted = source.load("AutoModel")(pixels).last_hidden_state[:, 1:]
    model = load_detector(source, CLASSES, RF_DETR)
    (*_, last) = model.model.backbone.backbone(pixels).feature_maps
    torch.testing.assert_close(last.flatten(2).transpose(1, 2), wanted, atol=atol, rtol=0)


def test_methods_act_in_the_backbone_and_the_rest_is_trained_in_place(source):
    model = load_detector(source, CLASSES, RF_DETR)
    adapter = inject(model, LoRA(r=2, targets="backbone.backbone.*.q_proj"))
    assert len(adapter.deltas) == 2
    assert set(adapter.in_place) == set(model.fresh_parameters)
    model = load_detector(source, CLASSES, DETR)
    assert set(inject(model, Freeze(layers=0)).in_place) == set(model.fresh_parameters)


def test_what_an_untrained_lora_leaves_alone_is_exact(source, voc, task):
    model, batch = load_detector(source, CLASSES, RF_DETR), loaded(voc)
    with torch.no_grad():
        before = task.step(model, batch).loss
        inject(model, LoRA(r=2, targets="backbone.backbone.*.q_proj"))
        assert torch.equal(task.step(model, batch).loss, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "detrr"}, "`detector.type` must be a detector .* Did you mean `detr`"),
        (RF_DETR | {"backbone": {}}, "`detector` must be settings of rf_detr on Dinov2Model"),
        (DETR | {"backbone": {"hidden_size": 64}}, "must have a backbone like Dinov2Model"),
        (DETR | {"decoder_layer": 2}, "`detector.decoder_layer` must be a setting of detr"),
    ],
)
def test_detectors_that_cannot_be_are_refused(source, settings, message):
    with pytest.raises(ConfigError, match=message):
        load_detector(source, CLASSES, settings)


def test_a_softmax_gives_each_query_one_class_or_none():
    logits = torch.tensor([[[4.0, 1.0, 0.0], [0.0, 0.0, 9.0], [0.0, 2.0, 0.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 1, 1], [0.5, 0.5, 0.2, 0.2], [0.9, 0.1, 0.4, 0.2]]])
    (found,) = decoded(logits, boxes, classes=2, most=2)
    assert found["labels"].tolist() == [0, 1]
    torch.testing.assert_close(found["scores"], torch.stack([
        logits[0, 0].softmax(0)[0], logits[0, 2].softmax(0)[1]
    ]))  # fmt: skip
    torch.testing.assert_close(found["boxes"][1], torch.tensor([0.7, 0.0, 1.0, 0.2]))


def test_sigmoids_score_every_class_by_itself():
    logits = torch.tensor([[[3.0, 2.0], [-1.0, 1.0]]])
    (found,) = decoded(logits, torch.full((1, 2, 4), 0.5), classes=2, most=3)
    assert found["labels"].tolist() == [0, 1, 1]
    torch.testing.assert_close(found["scores"], torch.tensor([3.0, 2.0, 1.0]).sigmoid())


class Fixed(torch.nn.Module):
    """Sees one red box, given as shares of what it is shown."""

    def __init__(self, box):
        super().__init__()
        self.box = torch.tensor([[box]])

    def forward(self, pixel_values, labels=None):
        from types import SimpleNamespace

        count = len(pixel_values)
        logits = torch.tensor([[[0.0, 5.0, 0.0]]]).expand(count, 1, 3)
        loss = torch.zeros(()) if labels is None else labels[1]["boxes"].sum()
        return SimpleNamespace(loss=loss, logits=logits, pred_boxes=self.box.expand(count, 1, 4))


class Masked(Fixed):
    def forward(self, pixel_values, pixel_mask, labels=None):
        return super().forward(pixel_values, labels)


def test_boxes_come_back_in_pixels_of_the_file_padded_or_not(task, voc):
    """The second image is 64 × 64, scaled to 28 × 28 in a batch of 37 columns."""
    batch = loaded(voc, size={"shortest_edge": 28, "longest_edge": 56})
    within = task.predictions(Masked([0.5, 0.5, 0.5, 0.5]), batch)
    assert [row["objects"][0]["box"] for row in within] == [[16, 12, 48, 36], [16, 16, 48, 48]]
    share = 28 / 37
    seen = task.predictions(Fixed([0.5 * share, 0.5, 0.5 * share, 0.5]), batch)
    assert seen[1]["objects"][0]["box"] == pytest.approx([16, 16, 48, 48], abs=0.1)
    assert takes_mask(Masked([0.5] * 4))
    inner, outer = (task.step(m([0.5] * 4), batch).loss for m in (Masked, Fixed))
    boxes = batch["labels"][1]["boxes"]
    torch.testing.assert_close(inner, boxes.sum())
    torch.testing.assert_close(outer, (boxes * torch.tensor([share, 1, share, 1])).sum())


def test_objects_below_the_threshold_are_not_written(voc):
    batch = loaded(voc)
    rows = ObjectDetection(CLASSES, threshold=0.5).predictions(Fixed([0.5] * 4), batch)
    assert [one["label"] for one in rows[0]["objects"]] == ["red"]
    assert 0.9 < rows[0]["objects"][0]["score"] < 1


def test_boxes_are_drawn_in_the_colour_of_their_class(task, voc, tmp_path):
    image = voc / "JPEGImages/train_0.png"
    found = {"objects": [{"label": "red", "score": 0.8, "box": [4.0, 2.0, 60.0, 44.0]}]}
    task.draw(str(image), found, tmp_path / "new", number=3)
    drawn = Image.open(tmp_path / "new/00003-train_0.png")
    original = Image.open(image).convert("RGB")
    assert drawn.size == original.size
    assert drawn.getpixel((60, 30)) != original.getpixel((60, 30))
    assert drawn.getpixel((30, 40)) == original.getpixel((30, 40))


def test_the_report_counts_objects(task):
    target = [{"label": "red", "box": [0, 0, 9, 9], "ignored": False}] * 2
    shown = task.example("a/b.png", target, {"objects": [{"label": "blue"}]})
    assert (shown.text, shown.gold, shown.predicted) == ("b.png", "2 red", "1 blue")
    assert task.example("b.png", [], {"objects": []}).right


def test_the_same_boxes_on_all_images_are_a_poor_baseline(task, voc):
    data = DetectionData(path=str(voc), batch_size=2).connect(processor())
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    boxes = constant_boxes(loaders[0], 2)
    assert boxes["labels"].tolist() == [0, 1]
    assert boxes["scores"].tolist() == [0.5, 0.5]
    torch.testing.assert_close(
        boxes["boxes"][0], torch.tensor([0.5 - 7 / 64, 0.5 - 8 / 48, 0.5 + 7 / 64, 0.5 + 8 / 48])
    )
    (found,) = task.baselines(yolos(), *loaders)
    assert found.trained == 0
    assert 0 <= found.validation["map"] < 0.3
    assert set(found.test) == set(found.validation)


def test_classes_come_from_the_data_and_survive_storage(voc):
    data = DetectionData(path=str(voc)).connect(processor())
    task = ObjectDetection(detector=DETR).connect(data)
    assert task.labels == CLASSES
    again = instantiate(task.to_spec())
    assert (again.labels, again.detector, again.threshold) == (CLASSES, DETR, 0.5)
    with pytest.raises(DataError, match=r"set `data\.classes=\[x,y\]`"):
        ObjectDetection(["x", "y"]).connect(data)
    with pytest.raises(DataError, match=r"as many as the model has outputs \(3\)"):
        task.check(yolos(3), data)


def test_settings_and_models_that_do_not_fit_are_refused(voc, build):
    with pytest.raises(ConfigError, match="`threshold` must be a score"):
        ObjectDetection(threshold=2)
    with pytest.raises(ConfigError, match=r"call `connect\(data\)` first"):
        ObjectDetection().metrics()
    data = DetectionData(path=str(voc)).connect(processor())
    with pytest.raises(ConfigError, match=r"must be a detector .*ViTForImageClassification"):
        ObjectDetection(CLASSES).check(build("vit").model, data)


def test_a_detector_that_is_loaded_gets_a_head_for_the_classes(tmp_path):
    yolos(classes=5).save_pretrained(tmp_path)
    model = load_detector(ModelSource(name=str(tmp_path)), CLASSES, None)
    assert model.config.num_labels == 2
    assert all("class_labels_classifier" in name for name in model.fresh_parameters)
