"""The model card of a generator: data, recipe, figures, limits, licence, citation, and a head that the hub reads.

A card that was written by hand is better than this one and is kept (`NoduleGenerator.generate_model_card`); only what
it lacks of head, licence and citation is added.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

TEMPLATE = """
# A generator of chest X-rays with lung nodules

**Research use. Not a medical device.** Do not use it to diagnose, and do not show its images as those of a patient.

## What it is
A mask-conditional generator of frontal chest X-rays, {size} x {size} px, one channel: from noise and a mask of where
nodules lie to an image; with an empty mask, to one without a nodule.{prior_told}

    from carim_aug import NoduleGenerator, SyntheticNoduleMix
    mix = SyntheticNoduleMix.from_pretrained(NAME{prior})
    generator = NoduleGenerator.from_pretrained(NAME)

- Architecture: {architecture}
- SHA-256 of the tensors: {weights_hash}

## Training data
{training_data}

## Recipe
{recipe}

- Git commit: {git_commit}
- carim_aug: {version}

## Figures
None came with these weights. `python -m train.reproduction.report`, from a checkout of carim_aug, works them out on held-out
patients; until somebody has, nothing is known of how real the images are or whether training with them helps.

## Where it falls short
- It knows the films that it was trained on, their hospitals, machines and patients, and no others: frontal ones, no
  lateral ones. Labels mined from reports are noisy.
- Generated nodules are not real ones: use them to train, never to validate or test. Whether they help must be shown on
  real films of other patients.
- A generator can repeat its training films; look for that before images are passed on.
"""

LICENCE = """
## Licence
The weights: {licence}. The films and annotations that they were trained on have terms of their own, which stay in
force.
"""

CITATION = """
## Citation
Cite carim_aug (its CITATION.cff), the data named above, and the method:

    K. Ann. Multi-Scale Conditional Generative Adversarial Network for Small Diseases using Class Activation Region
    Influence Maximization. Thesis, Yonsei University, 2021.
"""

_SECTIONS = {"licen[cs]e": LICENCE, "citation|how to cite": CITATION}


def written_card(
    data: ModelCardData,
    *,
    architecture: Mapping[str, Any],
    weights_hash: str,
    provenance: Mapping[str, Any],
    has_prior: bool,
) -> ModelCard:
    """Gives a card from what weights know of themselves.

    Args:
        data: its head.
        architecture: the generator's numbers.
        weights_hash: of the tensors.
        provenance: training_data, recipe, git_commit and version, where known.
        has_prior: whether a location prior lies beside the weights.
    """
    recipe = provenance.get("recipe")
    text = TEMPLATE.format(
        size=architecture["image_size"],
        architecture=json.dumps(architecture),
        weights_hash=weights_hash,
        training_data=provenance.get("training_data", "None: untrained."),
        recipe=f"    {json.dumps(recipe)}" if recipe else "None was told.",
        git_commit=provenance.get("git_commit", "unknown"),
        version=provenance.get("carim_aug", "unknown"),
        prior=", prior=..." if not has_prior else "",
        prior_told=" Beside it a prior of the nodules' number, place and size." if has_prior else "",
    )
    return completed_card(text, data)


def completed_card(text: str, data: ModelCardData) -> ModelCard:
    """Gives a card with what it lacks of head, licence and citation.

    Args:
        text: Markdown, with a head or without; its own entries and sections are kept.
        data: entries of the head.
    """
    head = re.match(r"\s*---\r?\n.*?\r?\n---\r?\n", text, re.DOTALL)
    if head is None:
        text = f"---\n{data.to_yaml()}\n---\n{text}"
    card = ModelCard(text)
    card.data = ModelCardData(**{**data.to_dict(), **card.data.to_dict()})
    for heading, section in _SECTIONS.items():
        if re.search(rf"^#+\s*({heading})\b", card.text, re.IGNORECASE | re.MULTILINE) is None:
            card.text = f"{card.text.rstrip()}\n{section.format(licence=card.data.license)}"
    return card
