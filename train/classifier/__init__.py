"""The chest X-ray classifier (CheXNet's role), and encoders."""
