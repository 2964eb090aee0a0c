"""Image sets of several storage formats, and the loader whose every view is keyed by its sample."""
