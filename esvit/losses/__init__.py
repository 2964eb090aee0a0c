"""View-level (DINO) and region-level (EsViT) matching losses that never keep prototype logits."""
