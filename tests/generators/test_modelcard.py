"""Model cards: what a reader of papers looks for, a head that the hub takes, and a hand-written card that is kept."""

import copy
import pickle

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData

from carim_aug import LocationPrior, NoduleGenerator
from carim_aug.generators.modelcard import completed_card
from carim_aug.generators.multiscale import GeneratorConfig

SECTIONS = ["What it is", "Training data", "Recipe", "Figures", "Where it falls short", "Licence", "Citation"]
OWN = "# Ours\n\n## Figures\nAUC 0.9\n\n## How to cite\nUs.\n"


def made(seed: int = 0) -> NoduleGenerator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NoduleGenerator(GeneratorConfig(16, 4, 4, (3, 3), (1, 0), 2))


def headings(card: ModelCard) -> list[str]:
    return [line.removeprefix("## ") for line in card.text.splitlines() if line.startswith("## ")]


@pytest.fixture
def folder(tmp_path):
    """Weights with a prior and a card of the user's own."""
    made().save_pretrained(tmp_path, prior=LocationPrior.bundled(), training_data="a phantom")
    (tmp_path / "README.md").write_text(OWN)
    return tmp_path


def check_head(card: ModelCard) -> None:
    """What the hub asks of a head, as far as it can be known without it."""
    _, head, text = str(card).split("---\n", 2)
    data = yaml.safe_load(head)
    assert data["license"] == "mit" and data["library_name"] == "carim_aug"
    assert all(isinstance(tag, str) for tag in data["tags"]) and "chest-x-ray" in data["tags"]
    assert ModelCard(str(card)).data.to_dict() == data and text == card.text


def test_a_written_card_has_what_a_reader_looks_for():
    generator = made()
    generator.provenance = {"training_data": "1,109 {films}", "recipe": {"images": 7}, "git_commit": "0123abc"}
    card = generator.generate_model_card(datasets=["user/films"])
    check_head(card)
    assert headings(card) == SECTIONS and card.data.datasets == ["user/films"]
    for word in ("1,109 {films}", '{"images": 7}', "0123abc", generator.weights_hash, "16 x 16 px", "Yonsei"):
        assert word in card.text
    assert "not a medical device" in card.text.lower() and "prior=..." in card.text
    assert "None: untrained." in made().generate_model_card().text


def test_the_card_beside_loaded_weights_goes_with_them_with_a_head_and_what_it_lacks(folder, tmp_path):
    generator = NoduleGenerator.from_pretrained(folder)
    for one in (generator, copy.deepcopy(generator), pickle.loads(pickle.dumps(generator))):
        card = one.generate_model_card(license="mit")
        check_head(card)
        assert headings(card) == ["Figures", "How to cite", "Licence"] and "AUC 0.9" in card.text
    generator.save_pretrained(tmp_path / "again")
    assert "AUC 0.9" in (tmp_path / "again/README.md").read_text()


def test_a_card_of_other_weights_is_not_kept(folder):
    trained, told, drawn = (NoduleGenerator.from_pretrained(folder) for _ in range(3))
    with torch.no_grad():
        trained.stem.norm.bias[0] += 1
    told.provenance["training_data"] = "another phantom"
    drawn._keep(LocationPrior.fit([torch.tensor([[30.0, 40, 36, 46]])] * 40, 100))
    for generator in (trained, told, drawn):
        assert headings(generator.generate_model_card()) == SECTIONS


def test_the_bundled_card_is_pushed_whole_with_a_head():
    card = NoduleGenerator.from_pretrained().generate_model_card()
    check_head(card)
    assert {"Training data", "Recipe", "Figures", "Where it falls short", "Licence", "Citation"} <= set(headings(card))
    assert "bundled generator" in card.text


def test_a_head_of_the_users_own_is_kept_and_completed():
    own = "---\nlicense: cc-by-4.0\nlanguage: en\n---\n# Ours\n\n## License\nCC BY.\n\n## Citation\nUs.\n"
    card = completed_card(own, ModelCardData(license="mit", library_name="carim_aug"))
    assert card.data.to_dict() == {"license": "cc-by-4.0", "language": "en", "library_name": "carim_aug"}
    assert headings(card) == ["License", "Citation"]
