"""The model card of weights that come without one written by hand."""

import json
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

TEMPLATE = """
# A generator of lung nodules for chest X-rays

**Research use. Not a medical device.** Do not use it to diagnose, and do not show its images as those of a patient.

    from carim_aug import SyntheticNoduleMix
    mix = SyntheticNoduleMix.from_pretrained(NAME{prior})

- Architecture: {architecture}
- SHA-256 of the tensors: {weights_hash}

## Training data
{training_data}

## Recipe
{recipe}

- Git commit: {git_commit}
- carim_aug: {version}

## Figures
None came with these weights. `python -m train.reproduction.report`, from a checkout of carim_aug, works them out on
held-out patients; until somebody has, nothing is known of how real the images are or whether training with them helps.

## Limits
- It knows the images that it was trained on, their hospitals, machines and patients, and no others: frontal ones, no
  lateral ones. Labels mined from reports are noisy.
- Generated nodules are not real ones: use them to train, never to validate or test. Whether they help must be shown on
  real images of other patients.
- A generator can repeat its training images; look for that before images are passed on.

## Licence
The weights: {licence}. The images and annotations that they were trained on have terms of their own, which stay in
force.

## Citation
Cite carim_aug (its CITATION.cff), the data named above, and the method:

    K. Ann. Multi-Scale Conditional Generative Adversarial Network for Small Diseases using Class Activation Region
    Influence Maximization. Thesis, Yonsei University, 2021.
"""


def model_card(data: ModelCardData, generator: Any, *, has_prior: bool) -> ModelCard:
    """Return a card of what a generator's weights know of themselves; `data` is its head."""
    facts = generator.provenance
    text = TEMPLATE.format(
        architecture=json.dumps(generator.architecture),
        weights_hash=generator.weights_hash,
        training_data=facts.get("training_data", "None: untrained."),
        recipe=f"    {json.dumps(facts['recipe'])}" if facts.get("recipe") else "Not recorded.",
        git_commit=facts.get("git_commit", "unknown"),
        version=facts.get("carim_aug", "unknown"),
        prior="" if has_prior else ", prior=...",
        licence=data.license,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")
