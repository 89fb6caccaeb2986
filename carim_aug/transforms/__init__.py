"""The product: `SyntheticNoduleMix` and what it is made of."""
