"""What Ann (2021) reports, with controls."""
