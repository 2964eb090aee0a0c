"""Architectures. Each implements `Backbone.encode`; nothing outside this folder asks which one it has."""
