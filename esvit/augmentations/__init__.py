"""Multi-crop augmentation, its photometric parts, mixing of images, and the evaluation transform."""
