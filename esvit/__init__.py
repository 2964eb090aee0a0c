"""Efficient self-supervised vision transformers: pre-training with view- and region-level matching."""
